"""Shared by the tests of weight files."""

from pathlib import Path

import pytest
from torch import nn


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file, written anew by each test."""
    return tmp_path_factory.mktemp("weights") / "weights"


@pytest.fixture
def no_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave weights as they lie in memory: 105 million numbers take seconds to draw."""
    for name in ("kaiming_normal_", "kaiming_uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)
