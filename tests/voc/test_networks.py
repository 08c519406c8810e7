"""The networks: shared tensors, frozen parts, refused settings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from config import Network
from networks import IMAGENET, build_affinity, build_cam, load_trained, normalisation
from torch.testing import assert_close
from training import train_mode

import pixelss
from tests.voc.trainings import open_run, tiny_config


def test_a_stage_that_is_not_trained_is_named(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="run stage train_cam first"):
        load_trained(open_run(root, tmp_path), "train_cam")


def test_timm_backbone_shares_its_tensors_with_the_affinity_network():
    config = tiny_config(network=Network("resnet18", output_stride=16, dim=8))
    cam, affinity = build_cam(config, 2), build_affinity(config)
    affinity[0].backbone.load_state_dict(cam[0].state_dict())
    images = torch.rand(1, 3, 64, 48)
    assert affinity.eval()(images).shape == (1, len(pixelss.pair_offsets(5)), 4, 3)
    assert_close(affinity[0](images)[-1], cam[0].eval()(images))
    assert normalisation(config) == IMAGENET


def test_given_weights_freeze_the_norms(tmp_path):
    import timm

    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "weights.pth")
    config = tiny_config(network=Network("resnet18", weights=tmp_path / "weights.pth", output_stride=16, dim=8))
    for network in (build_cam(config, 2), build_affinity(config)):
        norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert norms
        assert not any(p.requires_grad for norm in norms for p in norm.parameters())
        train_mode(network.eval())
        assert not any(norm.training for norm in norms)
        assert all(module.training for module in network.modules() if module not in norms)
    with pytest.raises(ValueError, match=r"network\.weights must be null"):
        build_cam(tiny_config(network=Network("small", weights=tmp_path / "weights.pth")), 2)


def test_frozen_parts_are_not_trained_and_unknown_ones_named():
    network = Network("resnet18", frozen=("net.conv1", "net.layer1"), output_stride=16, dim=8)
    for build in (lambda config: build_cam(config, 2), build_affinity):
        backbone = build(tiny_config(network=network))[0]
        frozen = {name for name, weight in backbone.named_parameters() if not weight.requires_grad}
        parts = ("net.conv1.", "net.layer1.", "backbone.net.conv1.", "backbone.net.layer1.")
        assert frozen == {name for name, _ in backbone.named_parameters() if name.startswith(parts)}
        assert frozen
    with pytest.raises(ValueError, match=r"network\.frozen must name modules of resnet18 \(.*net\.layer1.*'layer1'"):
        build_cam(tiny_config(network=replace(network, frozen=("layer1",))), 2)


@pytest.mark.parametrize("backbone", ["small", "resnet38"])
def test_a_stride_that_a_backbone_has_not_is_refused(backbone):
    with pytest.raises(ValueError, match=rf"network\.output_stride must be 8 for {backbone}, but is 16"):
        build_cam(tiny_config(network=Network(backbone, output_stride=16)), 2)
