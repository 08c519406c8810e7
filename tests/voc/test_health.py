"""A loss that is not finite stops a training, or its step is left out without a trace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import train_cam
import train_seg
import training
from batches import Batch
from networks import load_trained

from tests.voc.trainings import check_resumed, fail_at, metrics, model_digest, open_run, tiny_config, with_labels

pytestmark = pytest.mark.usefixtures("one_thread")


def test_nonfinite_loss_stops_and_keeps_the_checkpoint(root, whole, tmp_path, monkeypatch):
    run = open_run(root, tmp_path)
    with monkeypatch.context() as patch:
        fail_at(patch, 4, float("nan"))
        with pytest.raises(RuntimeError, match=r"not finite in the steps 5 to 5 of train_cam.*cam\.optimizer\.lr"):
            train_cam.train_cam(run)
    assert [path.name[:12] for path in sorted(run.folder("train_cam").glob("step-*.pt"))] == [
        "step-0000002",
        "step-0000004",
    ]
    train_cam.train_cam(run)
    check_resumed(run, whole, "train_cam")


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_nonfinite_loss_skips_that_step_alone(root, whole, tmp_path, monkeypatch, factor):
    run = open_run(root, tmp_path, tiny_config(on_nonfinite_loss="skip"))
    with monkeypatch.context() as patch:
        fail_at(patch, 3, factor)
        with pytest.warns(UserWarning, match="step 4 of train_cam is left out"):
            train_cam.train_cam(run)
    weights = load_trained(run, "train_cam").state_dict()
    assert all(value.isfinite().all() for value in weights.values())
    assert model_digest(run) != model_digest(whole)
    assert metrics(run)[:3] == metrics(whole)[:3]
    assert "loss" not in metrics(run)[3]
    assert metrics(run)[4]["loss"] != metrics(whole)[4]["loss"]


def test_a_skipped_step_leaves_no_trace_in_the_norms(root, tmp_path, monkeypatch):
    """A forward pass of what is not finite changes a norm's statistics before any loss tells of it."""
    moved, calls = training.to_device, iter(range(100))

    def damaged(batch: Batch, device: torch.device) -> Batch:
        batch = moved(batch, device)
        return batch._replace(images=batch.images * float("nan")) if next(calls) == 3 else batch

    run = with_labels(open_run(root, tmp_path, tiny_config(on_nonfinite_loss="skip")))
    run.config.seg = replace(run.config.seg, norm=True, from_cam=False)
    monkeypatch.setattr(training, "to_device", damaged)
    with pytest.warns(UserWarning, match="step 4 of train_seg is left out"):
        train_seg.train_seg(run)
    assert all(value.isfinite().all() for value in load_trained(run, "train_seg").state_dict().values())
