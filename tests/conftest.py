"""Shared by all tests: the hypothesis profiles, and the devices."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=25)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms on CUDA need it

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


collect_ignore = ["golden/make_crf.py"]  # a script that needs the extra crf-reference


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """The CPU, and CUDA where there is one."""
    return request.param
