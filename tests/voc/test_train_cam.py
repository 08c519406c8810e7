"""Stage train_cam: its start, its scales, its signals, its pictures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import train_cam
from batches import Samples
from config import Augment, Optimizer
from data import VOCFolder
from networks import build_cam, load_trained
from torch.testing import assert_close

from tests.voc.trainings import damage, open_run, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


def test_start_from_begins_with_that_network(root, whole, tmp_path):
    config = tiny_config()
    config.cam.start_from, config.cam.optimizer = whole.folder("train_cam"), Optimizer(lr=0.0)
    run = open_run(root, tmp_path, config)
    train_cam.train_cam(run)
    assert_close(load_trained(run, "train_cam").state_dict(), load_trained(whole, "train_cam").state_dict())
    config.cam.start_from = tmp_path
    with pytest.raises(FileNotFoundError, match=r"start_from.*model\.pt"):
        train_cam.train_cam(open_run(root, tmp_path / "other", config))


@pytest.mark.parametrize(
    "changes", [{"cls_scales": (1.5,)}, {"mam_student_scales": (3.0,)}, {"scales": (0.5, 2.0), "cls_scales": (0.5,)}]
)
def test_scales_that_do_not_fit_are_refused(root, tmp_path, changes):
    config = tiny_config(cam=replace(tiny_config().cam, **changes))
    with pytest.raises(ValueError, match=r"cam\.(cls_scales|mam_student_scales|scales) must"):
        train_cam.train_cam(open_run(root, tmp_path, config))


def test_collapse_signals_of_hand_made_cams():
    student = [torch.tensor([[[[1.0, 0.5, 0.0, 0.0]], [[9.0, 9.0, 9.0, 9.0]]]])]
    teacher = [torch.tensor([[[[0.5, 0.25, 0.0, 0.0]], [[9.0, 9.0, 9.0, 9.0]]]])]  # parallel: xi = 1, the target itself
    signals = train_cam.collapse_signals(student, teacher, torch.tensor([[1, 0]]))
    assert {name: round(value.item(), 5) for name, value in signals.items()} == {
        "gap": -0.375,
        "zeros": 0.5,
        "peak": 0.5,
    }
    empty = train_cam.collapse_signals(student, teacher, torch.tensor([[0, 0]]))
    assert all(value.isfinite() for value in empty.values())


def test_overlays_leave_out_bad_images(own_root):
    damage(own_root, "truncated image")
    data, config = VOCFolder(own_root), tiny_config()
    stems = ["train_0002", "train_0003"]
    pictures = train_cam.overlays(build_cam(config, data.num_classes), Samples(data, stems, config, Augment(crop=32)))
    assert list(pictures) == ["cam/train_0002"]
