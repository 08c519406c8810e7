"""A process that is killed or meets a full disk: the same command goes on."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
from run import main
from storage import load_checkpoint

from tests.voc.runs import Again, Call, command, contents, unfinished


@pytest.mark.parametrize(
    ("stage", "name", "whole", "kept"),
    [
        ("infer_cam", ".png", 2, 2),
        ("train_affinity", ".png", 3, 2),  # an image's two label maps are made together
        pytest.param("make_labels", ".png", 4, 4, marks=pytest.mark.slow),
        pytest.param("infer_seg", ".png", 4, 3, marks=pytest.mark.slow),  # 3 of val; of test one of a batch of two
        pytest.param("infer_cam", "stages.jsonl", 0, 7, marks=pytest.mark.slow),  # 6 CAMs and done.json
    ],
)
def test_killed_process_continues_at_the_first_unfinished_batch(
    again: Again, call: Call, stage: str, name: str, whole: int, kept: int
) -> None:
    folder, wanted, base = again(stage)
    ended = command("run.py", *base, "--stages", stage, fault=("killed", name, whole))
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    there = {name: content for name, content in contents(folder).items() if not name.endswith(".tmp")}
    assert there.items() <= wanted.items()
    assert len(unfinished(folder.parent)) == 1
    dates = {name: (folder / name).stat().st_mtime_ns for name in there}
    call(main, *base, "--stages", stage)
    assert contents(folder) == wanted
    assert [(folder / name).stat().st_mtime_ns == dates[name] for name in there].count(True) == kept
    assert not unfinished(folder.parent)


@pytest.mark.parametrize(
    ("stage", "name", "whole", "steps"),
    [
        ("train_cam", "step-0000002", 0, 1),
        pytest.param("train_cam", "model.pt", 0, 2, marks=pytest.mark.slow),
        pytest.param("train_cam", "metrics.jsonl", 0, 0, marks=pytest.mark.slow),  # half a line is left
        pytest.param("infer_cam", ".png", 2, 0, marks=pytest.mark.slow),
    ],
)
def test_full_disk_is_told_naming_the_file_and_the_command_continues(
    again: Again, call: Call, stage: str, name: str, whole: int, steps: int
) -> None:
    folder, wanted, base = again(stage)
    others = {path.name: contents(path) for path in folder.parent.iterdir() if path.is_dir()}
    ended = command("run.py", *base, "--stages", stage, fault=("full", name, whole))
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    (told,) = re.findall(r"could not write (.+) \(File too large\)", ended.stderr)
    assert Path(told).parent == folder
    assert name in Path(told).name
    assert not unfinished(folder.parent)
    images = {name: content for name, content in contents(folder).items() if name.endswith(".png")}
    assert images.items() <= wanted.items()
    assert (load_checkpoint(folder) or {"step": 0})["step"] == steps
    logged = [log.read_text().splitlines()[:steps] for log in folder.glob("metrics.jsonl")]
    call(main, *base, "--stages", stage)
    # A step that was repeated would have another speed.
    assert [log.read_text().splitlines()[:steps] for log in folder.glob("metrics.jsonl")] == logged
    assert {path.name: contents(path) for path in folder.parent.iterdir() if path.is_dir()} == others | {stage: wanted}


def test_full_disk_is_told_while_the_demo_s_images_are_written(tmp_path: Path, call: Call) -> None:
    arguments = ("--data", "demo", "--out", tmp_path / "out", "--stages", "train_cam", "--dry-run")
    result = command("run.py", *arguments, fault=("full", "train_0003", 0))
    assert result.returncode != 0
    assert f"could not write the data set {tmp_path / 'out' / 'shapes'} (" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out" / "shapes").exists()
    call(main, *arguments)
