"""headroom.py against loops over thresholds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import headroom as headroom_command
import numpy as np
import pytest
import torch
from batches import Samples
from headroom import headroom
from networks import build_cam

import pixelss
from tests.voc.runs import VOC, Call, config, new_run


def miou(prediction: np.ndarray, truth: np.ndarray, classes: int) -> float:
    """Return the mean IoU in per cent over classes that occur, void left out."""
    seen = truth != 255
    pairs = [((prediction == c) & seen, (truth == c) & seen) for c in range(classes + 1)]
    return 100 * float(np.mean([(p & t).sum() / (p | t).sum() for p, t in pairs if (p | t).any()]))


def test_headroom_is_the_iou_of_cam_and_targets_on_the_crops_of_a_training(shapes: Path, tmp_path: Path) -> None:
    made = new_run(shapes, tmp_path / "run")
    scales = {"cam.scales": [1.0, 1.5], "cam.cls_scales": [1.0]}
    settings = config(**scales, **{"cam.start_from": made.folder("train_cam"), "cam.augment.crop": 32})
    made.config = settings
    found = headroom(made)

    stems, classes = made.data.stems("train"), made.data.num_classes
    network = build_cam(settings, classes)
    network.load_state_dict(torch.load(made.folder("train_cam") / "model.pt", weights_only=True))
    samples = Samples(made.data, stems, settings, settings.cam.augment, [shapes / "SegmentationClass"])
    ((images, tags, maps, _),) = samples.batches(len(stems), 0, 1, pin=False)
    with torch.no_grad():
        outputs = pixelss.multi_scale_forward(network.eval(), images, scales=[1.0, 1.5])
    cams = [pixelss.normalize_cam(output.cam).double().numpy() for output in outputs]
    truth = maps[:, 0].numpy()
    for scale, own, other in (("x1", *cams), ("x1.5", *cams[::-1])):
        columns: dict[str, Any] = {name: np.zeros_like(own) for name in ("CAM", "MMM", "MAM")}
        for b, k in tags.nonzero().tolist():
            norms = np.sqrt((own[b, k] ** 2).sum() * (other[b, k] ** 2).sum())
            xi = 2 - ((own[b, k] * other[b, k]).sum() / norms if norms > 0 else 0)
            columns["CAM"][b, k] = own[b, k]
            columns["MMM"][b, k] = (own[b, k] + other[b, k]) / 2
            columns["MAM"][b, k] = (1.0 * own[b, k] + xi * other[b, k]) / 2  # a live map is not unlike itself
        for name, cam in columns.items():
            best = max(miou(np.where(cam.max(1) > t / 100, cam.argmax(1) + 1, 0), truth, classes) for t in range(120))
            assert found.scales[scale][name] == pytest.approx(best, abs=0.05)
    together = pixelss.msinf_cam([output.cam for output in outputs], tags).numpy()
    maps_at = [np.where(together.max(1) > t / 100, together.argmax(1) + 1, 0) for t in range(100)]
    best = max(miou(prediction, truth, classes) for prediction in maps_at)
    assert found.scales.keys() == {"x1", "x1.5", "all"}
    assert found.scales["all"] == {"CAM": pytest.approx(best, abs=0.05)}
    mask = np.where(together.max(1) > settings.cam.threshold, together.argmax(1) + 1, 0)
    assert 100 * found.mask.miou.item() == pytest.approx(miou(mask, truth, classes), abs=0.05)


def test_headroom_command_prints_a_table(finished: tuple[Path, str], shapes: Path, tiny: Path, call: Call) -> None:
    base = ("--data", shapes, "--config", VOC / "demo.yaml", "--config", tiny)
    assert "cam.start_from must be" in call(headroom_command.main, *base, ok=False)
    lines = call(headroom_command.main, *base, "--cam.start_from", finished[0] / "train_cam").splitlines()
    assert lines[0] == "| scale | CAM | target of MMM | target of MAM |"
    assert [line.split()[1] for line in lines[2:6]] == ["x0.5", "x1", "x2", "all"]
    assert re.fullmatch(r"\| x2 \| [\d.]+ \| [\d.]+ \([+-][\d.]+\) \| [\d.]+ \([+-][\d.]+\) \|", lines[4])
    assert any(line.startswith("train_cam: the teacher lags by") for line in lines)
    assert any("mask at threshold 0.2: mIoU" in line for line in lines)
