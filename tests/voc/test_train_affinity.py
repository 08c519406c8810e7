"""Stage train_affinity: kinds of pairs, and masks at the centres of cells; IRNet's boundaries."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import saving
import torch
import train_affinity
from networks import build_affinity, load_trained
from torch.testing import assert_close

import pixelss
from tests.oracles import bilinear
from tests.voc.trainings import STEPS, check_resumed, metrics, open_run, tiny_config, with_labels


def test_kinds_of_pairs_sum_to_the_loss():
    maps = torch.randint(0, 3, (2, 9, 9))
    labels = pixelss.affinity_labels(maps, maps, radius=3)
    affinity = torch.rand(labels.shape)
    loss, parts = train_affinity.kind_by_kind(affinity, labels)
    assert_close(loss, pixelss.affinity_loss(affinity, labels), check_dtype=False)
    assert set(parts) == {"different", "background", "foreground"}


def test_label_maps_are_read_at_the_centres_of_cells():
    maps = torch.arange(16 * 16).view(1, 16, 16)
    assert train_affinity.subsampled(maps, (2, 2)).tolist() == [
        [[4 * 16 + 4, 4 * 16 + 12], [12 * 16 + 4, 12 * 16 + 12]]
    ]
    assert train_affinity.subsampled(maps, (16, 16)).equal(maps)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("kind", "precision"), [("path", "float32"), ("path", "bf16"), ("zones", "float32")])
def test_boundaries_are_trained_and_resumed_bit_for_bit(root, whole, tmp_path, monkeypatch, kind, precision):
    config = tiny_config(precision=precision, affinity=replace(tiny_config().affinity, kind=kind, radius=3))
    unbroken, broken = (with_labels(open_run(root, tmp_path / name, config)) for name in ("unbroken", "broken"))
    for run in (unbroken, broken):
        shutil.copytree(whole.folder("train_cam"), run.folder("train_cam"))
    train_affinity.train_affinity(unbroken)
    log = saving.Log.write

    def stop(self, step, values):
        log(self, step, values)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(saving.Log, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            train_affinity.train_affinity(broken)
    train_affinity.train_affinity(broken)
    check_resumed(broken, unbroken, "train_affinity")
    assert len(metrics(unbroken, "train_affinity")) == STEPS

    backbone, head = load_trained(unbroken, "train_affinity")
    assert_close(backbone.backbone.state_dict(), load_trained(whole, "train_cam")[0].state_dict(), rtol=0, atol=0)
    torch.manual_seed(config.seed)
    start = build_affinity(config)[1].state_dict()
    assert not any(value.equal(start[name]) for name, value in head.state_dict().items() if name.endswith("weight"))


def test_zones_sum_to_the_loss_of_all_of_them():
    generator = torch.Generator().manual_seed(0)
    maps = torch.zeros(2, 2, 40, 40, dtype=torch.uint8)
    maps[:, :, :20] = 1
    maps[1, :, :, :20] += 1
    maps[0, 0, 5:9] = 0  # the two are not one there
    logits = torch.randn(2, 1, 5, 5, generator=generator)
    for stride in (1, 2):
        low, high = maps[:, :, stride // 2 :: stride, stride // 2 :: stride].long().unbind(1)
        zones = pixelss.boundary_mask(pixelss.confident_mask(low, high), 3)
        assert {0, 1, 2, 255} <= set(zones.unique().tolist())
        probability = bilinear(logits, zones.shape[-2:]).sigmoid()
        loss, parts = train_affinity.zone_by_zone(logits, maps, 3, stride)
        assert_close(loss, pixelss.boundary_loss(probability, zones), check_dtype=False)
        assert set(parts) == {"background", "foreground", "boundary"}
        assert all(part > 0 for part in parts.values())
