"""Shared by the tests of weight files."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file, written anew by each test."""
    return tmp_path_factory.mktemp("weights") / "weights"
