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
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pixelss import CAMHead, resnet38
from pixelss.io import VOC_CLASSES
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
    assert "1 of 6 annotations of the list train are missing" in message
    assert f"Correct {shapes / 'ImageSets/Segmentation/train.txt'}, or" in message
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


def test_pace_counts_from_the_step_where_the_modules_start(capsys: pytest.CaptureFixture[str]) -> None:
    demo = load_config([VOC / "demo.yaml"], []).cam  # its modules join for the last fifth
    lag, distance = pace(demo, 320)
    assert lag == pytest.approx(0.3 * 0.2**0.9 / 0.02)
    assert distance == pytest.approx(0.3 * sum((left / 300) ** 0.9 for left in range(1, 61)))
    print_pace(demo, 320)
    assert "lower" not in capsys.readouterr().out
    demo.rcm = demo.mam = 0.0
    assert pace(demo, 320)[0] == pytest.approx(15)
    demo.mam, demo.mam_gate.iterations = 1.0, 300  # never: as at the last step
    assert pace(demo, 320)[1] == pytest.approx(0.3 * (1 / 300) ** 0.9)


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


def test_estimate_is_what_resnet38_costs_a_pixel(shapes: Path) -> None:
    settings = load_config([VOC / "paper.yaml"], ["--cam.schedule.iterations=1", "--data.train=train"])
    settings.data.val, settings.data.test = "val", None
    settings.data.classes = None
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        nn.Sequential(resnet38(), CAMHead(4096, 20))(torch.rand(1, 3, 96, 96))
    tflop = counter.get_total_flops() / 96**2 / 1e12
    step = 4 * 16 * (96**2 + 192**2 + 384**2)  # student forth and back, teacher forth; crops at three scales
    scored = 6 * 2 * (0.5**2 + 1 + 1.5**2 + 2**2) * 375 * 500  # images, with their mirror images, at four scales
    data = VOCFolder(shapes)
    estimate = cost(settings, data, ["train_cam", "score_cam", "evaluate"])
    assert estimate == pytest.approx({"train_cam": step * tflop, "score_cam": scored * tflop}, rel=1e-3)
    assert cost(settings, data, ["train_cam", "infer_cam", "score_cam"]).keys() == {"train_cam", "infer_cam"}


@pytest.mark.parametrize("name", ["paper.yaml", "mini.yaml"])
def test_the_classes_of_the_settings_are_voc_s(name: str) -> None:
    assert tuple(load_config([VOC / name], []).data.classes or ()) == VOC_CLASSES


def test_dry_run_tells_of_settings_that_the_run_folder_refuses(tmp_path: Path, shapes: Path, call: Call) -> None:
    base = ("--data", shapes, "--out", tmp_path / "out", "--config", VOC / "demo.yaml")
    (tmp_path / "out" / "train_cam").mkdir(parents=True)
    (tmp_path / "out" / "train_cam" / "metrics.jsonl").write_text("begun")
    call(main, *base, "--stages", "infer_cam", ok=False)
    plan = call(main, *base, "--dry-run", "--cam.temperature", "0.3", "--stages", "train_cam", ok=False)
    assert "cam.temperature: 0.5 -> 0.3" in plan
