"""--dry-run: what is missing, and what a run would cost."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
from pathlib import Path

import pytest
import torch
from config import CAM, Optimizer, Schedule
from data import VOCFolder
from plan import cost, pace, print_pace
from run import load_config, main

from tests.distributed import run_processes
from tests.voc.runs import VOC, Call


def test_only_the_lists_that_the_stages_read_are_wanted(shapes: Path, tmp_path: Path, call: Call) -> None:
    root = tmp_path / "set"
    shutil.copytree(shapes, root)
    (root / "ImageSets/Segmentation/val.txt").unlink()
    shutil.rmtree(root / "SegmentationClass")
    resnet = ("--config", VOC / "demo.yaml", "--network.backbone", "resnet38")
    plan = call(main, "--data", root, "--out", tmp_path, *resnet, "--dry-run", "--stages", "train_cam,infer_cam")
    assert "An estimate" in plan
    plan = call(main, "--data", root, "--out", tmp_path, *resnet, "--dry-run", "--stages", "score_cam", ok=False)
    assert "SegmentationClass is missing" in plan


def test_dry_run_names_everything_missing(tmp_path: Path, shapes: Path, call: Call) -> None:
    empty = ("--data", tmp_path / "empty", "--out", tmp_path / "out", "--dry-run")
    message = call(main, *empty, "--network.weights", tmp_path / "none.params", ok=False)
    for name in ("JPEGImages", "Annotations", "SegmentationClass", "train_aug.txt", "train.txt", "val.txt", "test.txt"):
        assert name in message
    assert "SBD" in message
    assert "none.params" in message
    if not torch.cuda.is_available():
        assert "--device cpu" in message
    assert not (tmp_path / "out").exists()
    base = ("--data", shapes, "--out", tmp_path / "out", "--config", VOC / "demo.yaml")
    plan = call(main, *base, "--dry-run", "--network.backbone", "resnet38")
    assert "An estimate" in plan
    assert "Nothing is missing." in plan
    (shapes / "Annotations" / "train_0002.xml").rename(tmp_path / "kept.xml")
    message = call(main, *base, ok=False)
    (tmp_path / "kept.xml").rename(shapes / "Annotations" / "train_0002.xml")
    assert "1 of 6 annotations of train.txt are missing" in message
    assert "train_0002.xml" in message


def test_pace_of_the_paper_and_of_ten_times_its_rate(capsys: pytest.CaptureFixture[str]) -> None:
    lag, distance = pace(load_config([VOC / "paper.yaml"], []).cam, 10_582)
    assert round(lag, 1) == 3.3
    assert 65 < distance < 72
    fast = CAM(optimizer=Optimizer(lr=0.01, momentum=0.9), schedule=Schedule(iterations=3))
    assert pace(fast, 1)[0] == pytest.approx(33.3, abs=0.1)
    assert pace(fast, 1)[1] == pytest.approx(0.1 * (1 + (2 / 3) ** 0.9 + (1 / 3) ** 0.9))
    print_pace(fast, 1)
    assert "lower cam.teacher_momentum" in capsys.readouterr().out
    print_pace(CAM(rcm=0, mam=0, optimizer=Optimizer(lr=0.01, momentum=0.9)), 1)
    assert "lower cam.teacher_momentum" not in capsys.readouterr().out
    assert pace(CAM(teacher_momentum=1.0), 16)[0] == float("inf")


def plan_of(rank: int, root: str, out: str) -> str:
    """Print the plan in one of several processes."""
    sys.argv = ["run.py", "--data", root, "--out", out, "--config", str(VOC / "demo.yaml"), "--dry-run"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main()
    return printed.getvalue()


def test_dry_run_of_two_processes_prints_one_plan(shapes: Path, tmp_path: Path) -> None:
    first, second = run_processes(plan_of, 2, str(shapes), str(tmp_path / "out"))
    assert "Nothing is missing." in first
    assert second == ""


def test_estimate_is_the_measured_step(shapes: Path) -> None:
    settings = load_config([VOC / "paper.yaml"], ["--cam.schedule.iterations=1", "--data.train=train"])
    settings.data.val, settings.data.test = "val", None
    settings.data.classes = None
    data, flipped = VOCFolder(shapes), 2 * (0.5**2 + 1 + 1.5**2 + 2**2) * 375 * 500
    estimate = cost(settings, data, ["train_cam", "score_cam", "evaluate"])
    pixel = 49.7 / (16 * 192**2 * (0.5**2 + 1 + 2**2) * 4)
    assert estimate == pytest.approx({"train_cam": 49.7, "score_cam": 6 * flipped * pixel})
    assert cost(settings, data, ["train_cam", "infer_cam", "score_cam"]).keys() == {"train_cam", "infer_cam"}
