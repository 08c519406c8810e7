"""Shared by all tests: the hypothesis profiles, the marks, and the devices."""

from __future__ import annotations

import os
import re

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=25)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms on CUDA need it

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


# By the file's place: what runs whole examples as a user does
PIPELINE = re.compile(r"tests/(voc/|test_examples|test_docs)")
NOT_UNIT = {"slow", "pipeline", "processes", "inductor"}

collect_ignore = ["golden/make_crf.py"]  # a script that needs the extra crf-reference


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the pipeline's tests by their place, those that compile by name, and as `unit` what has no other mark."""
    for item in items:
        if PIPELINE.search(item.path.as_posix()):
            item.add_marker(pytest.mark.pipeline)
        if "compile" in item.name:
            item.add_marker(pytest.mark.inductor)
        if not NOT_UNIT & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.unit)


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """The CPU, and CUDA where there is one."""
    return request.param
