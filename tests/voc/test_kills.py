"""Kills, full disks and damaged files by the dozen; the scripts make hundreds and thousands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.voc.disks import namespace

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="the scripts fork")]
TESTS = Path(__file__).parents[1]


def output_of(script: str, *words: object) -> str:
    """Run a script in a process of its own, as it forks: that needs a process that has not trained."""
    done = subprocess.run(
        [sys.executable, str(TESTS / script), *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("data", [(), ("--own",)])
def test_a_run_that_is_killed_often_ends_in_the_same_files(tmp_path: Path, data: tuple[str, ...]) -> None:
    printed = output_of("voc/kills.py", "--kills", 10, "--seed", 1, "--folder", tmp_path / "kills", *data)
    assert "10 kills in" in printed


@pytest.mark.parametrize(("script", "count"), [("backbones/fuzz.py", 1000), ("voc/fuzz.py", 150)])
def test_damaged_files_are_read_right_or_named(script: str, count: int) -> None:
    printed = output_of(script, "--count", count, "--seed", 1)
    assert re.search(rf"{count} files .*, 0 faults", printed), printed


def may_mount() -> bool:
    mount = ("mount", "-t", "tmpfs", "disk", tempfile.gettempdir())  # seen by nobody else, and gone with the process
    return bool(shutil.which("unshare")) and not subprocess.run([*namespace(), *mount], capture_output=True).returncode


@pytest.mark.skipif(not may_mount(), reason="no disk can be mounted here: it needs Linux and unshare")
def test_full_and_read_only_disks_at_every_stage() -> None:
    assert "After each of them the same command gave" in output_of("voc/disks.py")
