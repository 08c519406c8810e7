"""What the tests of trainings share: a tiny setting of all losses, interruptions, digests, damaged files."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import train_cam
from config import CAM, Augment, Config, Data, Gate, Network, Optimizer, Schedule
from data import VOCFolder
from PIL import Image
from pipeline import STAGES
from shapes import CLASSES
from stages import Run

STEPS = 6
TRAININGS = {name: stage.function for name, stage in STAGES.items() if stage.section}


def tiny_config(**changes: object) -> Config:
    """All losses, gates that open on the way, momentum: everything that a checkpoint must hold."""
    schedule = Schedule(iterations=STEPS, batch=5, checkpoint_every=2, log_every=1)
    augment = Augment(crop=32)
    config = Config(
        device="cpu",
        precision="float32",
        compile=False,
        workers=0,
        data=Data(train="train"),
        network=Network("small", dim=16),
    )
    config.cam = CAM(
        direct=0.1,
        rcm_gate=Gate(iterations=1),
        mam_gate=Gate(iterations=2),
        teacher_momentum=0.9,
        schedule=schedule,
        augment=augment,
        optimizer=Optimizer(momentum=0.9, clip=5.0),
    )
    for section in (config.affinity, config.seg):
        section.schedule, section.augment = schedule, augment
    return replace(config, **changes)


def open_run(root: Path, out: Path, config: Config | None = None) -> Run:
    return Run(config or tiny_config(), VOCFolder(root), out, torch.device("cpu"))


def with_labels(run: Run) -> Run:
    """Put the truth in the place of what CRF and random walk would make of the CAMs."""
    for name in ("train_affinity/labels/low", "train_affinity/labels/high", "make_labels"):
        shutil.copytree(run.data.root / "SegmentationClass", run.out / name, dirs_exist_ok=True)
    return run


def model_digest(run: Run, stage: str = "train_cam") -> str:
    return hashlib.sha256((run.folder(stage) / "model.pt").read_bytes()).hexdigest()


def metrics(run: Run, stage: str = "train_cam") -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run.folder(stage) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_s"} for line in lines]


def check_resumed(run: Run, whole: Run, stage: str) -> None:
    assert model_digest(run, stage) == model_digest(whole, stage)
    assert metrics(run, stage) == metrics(whole, stage)


def fail_at(monkeypatch: pytest.MonkeyPatch, step: int, factor: float | None = None) -> None:
    """Make train_cam's loss of one step raise, or multiply it."""
    whole = train_cam.Objective.__call__

    def broken(self, student, batch, now, report):
        loss, values = whole(self, student, batch, now, report)
        if now == step and factor is None:
            raise KeyboardInterrupt
        return (loss * factor if now == step else loss), values

    monkeypatch.setattr(train_cam.Objective, "__call__", broken)


def train_until(run: Run, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Run train_cam and interrupt it as `fail_at` does."""
    with monkeypatch.context() as patch:
        fail_at(patch, step)
        with pytest.raises(KeyboardInterrupt):
            train_cam.train_cam(run)


def train_in_pieces(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Config) -> Run:
    """Train without a break and again with two; check that both are equal, and return the first."""
    unbroken, broken = open_run(root, tmp_path / "a", config), open_run(root, tmp_path / "b", config)
    train_cam.train_cam(unbroken)
    for step in (3, 5):  # checkpoints after steps 2 and 4
        train_until(broken, monkeypatch, step)
    train_cam.train_cam(broken)
    check_resumed(broken, unbroken, "train_cam")
    assert len(metrics(unbroken)) == STEPS
    return unbroken


def damage(root: Path, what: str) -> str:
    """Damage one image's files; returns what the message must say."""
    stem = "train_0003"
    image, mask, xml = (
        root / f for f in (f"JPEGImages/{stem}.jpg", f"SegmentationClass/{stem}.png", f"Annotations/{stem}.xml")
    )
    if what == "truncated image":
        image.write_bytes(image.read_bytes()[:400])
        return rf"{image.name} cannot be read"
    if what == "no image":
        image.unlink()
        return rf"{image.name} is missing"
    if what == "size":
        Image.fromarray(np.zeros((40, 30), np.uint8)).save(mask)
        return rf"{mask.name} must have its image's size \(40, 40\), but has \(40, 30\)"
    if what == "16 bits":
        Image.fromarray(np.full((40, 40), 257, np.uint16)).save(mask)
        return rf"{mask.name} must hold class indices"
    if what == "colours":
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(mask)
        return rf"{mask.name} must hold class indices"
    if what == "values":
        Image.fromarray(np.full((40, 40), 9, np.uint8)).save(mask)
        return rf"{mask.name} must hold 0 to {len(CLASSES)} or 255, but holds \[9\]"
    if what == "no mask":
        mask.unlink()
        return rf"{mask.name}.*no such mask"
    if what == "class":
        xml.write_text("<annotation><object><name>dragon</name></object></annotation>")
        return rf"{xml.name} names \['dragon'\]"
    if what == "xml":
        xml.write_text("<annotation><object>")
        return rf"{xml.name} is no readable XML"
    xml.unlink()
    return rf"{xml.name} is missing"
