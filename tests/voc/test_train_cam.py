"""Stage train_cam: its start, its scales, its signals, its pictures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import train_cam
from batches import Samples
from config import Augment, Optimizer
from data import BadFileError, VOCFolder
from networks import build_cam, load_trained
from torch.testing import assert_close

from tests.voc.trainings import (
    damage,
    metrics,
    open_run,
    tiny_config,
    train_in_pieces,
)

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


SEAM = {"er": 1.0, "ecr": 1.0, "minpool": 1.0, "view_scales": (1.0, 0.5)}


def test_correlation_is_trained_and_resumed_bit_for_bit(root, tmp_path, monkeypatch):
    config = tiny_config(cam=replace(tiny_config().cam, **SEAM, optimizer=Optimizer(head_lr=10, momentum=0.9)))
    unbroken = train_in_pieces(root, tmp_path, monkeypatch, config)
    assert {"er", "ecr", "minpool", "rcm"} <= set(metrics(unbroken)[-1])
    torch.manual_seed(config.seed)
    start = build_cam(config, unbroken.data.num_classes).state_dict()
    trained = load_trained(unbroken, "train_cam").state_dict()
    moved = {name for name in trained if not trained[name].equal(start[name])}
    assert {name for name in trained if "correlation" in name} <= moved


def test_a_row_with_correlation_starts_from_a_network_without_and_back(root, whole, tmp_path):
    config = tiny_config(cam=replace(tiny_config().cam, **SEAM, start_from=whole.folder("train_cam")))
    config.cam.optimizer = Optimizer(lr=0.0)
    run = open_run(root, tmp_path / "a", config)
    train_cam.train_cam(run)
    plain, got = load_trained(whole, "train_cam").state_dict(), load_trained(run, "train_cam").state_dict()
    assert got.keys() - plain.keys() == {name for name in got if "correlation" in name}
    assert_close({name: got[name] for name in plain}, plain)
    back = build_cam(tiny_config(), run.data.num_classes)
    train_cam.load_start(back, run.folder("train_cam"))
    assert_close(back.state_dict(), plain)
    with pytest.raises(BadFileError, match=r"model\.pt holds another network .* \(Missing key"):
        train_cam.load_start(torch.nn.Linear(2, 2), run.folder("train_cam"))


def test_two_views_of_one_scale_are_refused(root, tmp_path):
    config = tiny_config(cam=replace(tiny_config().cam, view_scales=(0.5, 0.5)))
    with pytest.raises(ValueError, match=r"cam\.view_scales must be two different scales"):
        train_cam.train_cam(open_run(root, tmp_path, config))


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
