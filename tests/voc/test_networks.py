"""The networks: shared tensors, frozen parts, refused settings."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from config import Network
from networks import (
    IMAGENET,
    Correlated,
    build_affinity,
    build_cam,
    cam_inference,
    check_report,
    load_trained,
    normalisation,
)
from quickstart import build_model
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


@pytest.mark.usefixtures("no_draws")
@pytest.mark.parametrize(
    ("outer", "prefix"),
    [*((None, prefix) for prefix in ("", "backbone.", "net.")), ("teacher", "backbone."), ("teacher", "module.net.")],
)
def test_weights_arrive_whatever_they_were_saved_from(tmp_path, prefix, outer):
    import timm

    path = tmp_path / "weights.pth"
    names = timm.create_model("resnet18").state_dict()
    weights = {prefix + name: torch.full_like(value, 0.125) for name, value in names.items()}
    torch.save({outer: weights} if outer else weights, path)
    for built in (build_cam(with_weights(path), 2)[0], quickstart_model(path)[0]):
        floats = [value for value in built.state_dict().values() if value.is_floating_point()]
        assert all((value == 0.125).all() for value in floats)
        assert len(floats) == 100


@pytest.mark.usefixtures("no_draws")
@pytest.mark.parametrize("kept", [0, 12, 90])
def test_weights_that_fit_little_are_refused_and_gaps_are_told(tmp_path, kept):
    import timm

    path = tmp_path / "weights.pth"
    names = [n for n, value in timm.create_model("resnet18").state_dict().items() if value.is_floating_point()]
    whole = {
        name: torch.rand_like(value)
        for name, value in timm.create_model("resnet18").state_dict().items()
        if name in names
    }
    torch.save(dict(list(whole.items())[:kept]), path)
    for build in (lambda: build_cam(with_weights(path), 2), lambda: quickstart_model(path)):
        if kept == 90:
            with pytest.warns(
                UserWarning, match=r"weights\.pth lacks 10 of the 100 tensors of resnet18: .* initial values"
            ):
                build()
        else:
            with pytest.raises(
                ValueError, match=r"weights\.pth must hold the weights of resnet18, but holds (none|12)"
            ):
                build()


def test_the_affinity_network_takes_its_weights_from_the_cam_network_alone(tmp_path):
    """The file may be gone by then, and a loader that is not strict would say nothing."""
    network = build_affinity(with_weights(tmp_path / "gone.pth"))
    assert not any(p.requires_grad for name, p in network.named_parameters() if ".bn" in name)


def test_resnet38_weights_that_fit_little_are_refused_and_gaps_are_told():
    report = pixelss.LoadReport(tuple("abc"), ("fc.weight",), ("d",))
    with pytest.warns(UserWarning, match=r"w\.pth holds 3 of the 4 tensors of resnet38; d, \.\.\. are missing"):
        check_report(report, Path("w.pth"))
    with pytest.raises(
        ValueError, match=r"must fit the network, but w\.pth holds 1 of the 4 .*\('fc\.weight',\) instead"
    ):
        check_report(pixelss.LoadReport(("a",), ("fc.weight",), tuple("bcd")), Path("w.pth"))
    check_report(pixelss.LoadReport(("a",), ("fc.weight",), ()), Path("w.pth"))


def with_weights(path):
    return tiny_config(network=Network("resnet18", weights=path, output_stride=16, dim=8))


def quickstart_model(path):
    return build_model(Namespace(backbone="resnet18", weights=path), 2)


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


def affinity_config(backbone: str, **changes):
    affinity = replace(tiny_config().affinity, kind="path", **changes)
    stride = 8 if backbone == "small" else 16
    return tiny_config(network=Network(backbone, output_stride=stride, dim=8), affinity=affinity)


def test_boundaries_lie_at_the_finest_tap_of_a_backbone_that_stays():
    for backbone, size in (("small", (8, 6)), ("resnet18", (8, 6))):  # taps of stride 8, and of 8, 16, 16
        network = build_affinity(affinity_config(backbone, radius=10))
        images = torch.rand(2, 3, 64, 48)
        logits = network(images)
        assert logits.shape == (2, 1, *size)
        train_mode(network)
        before = {name: value.clone() for name, value in network[0].state_dict().items()}
        pixelss.path_affinity(network(images).sigmoid(), radius=10).mean().backward()
        assert not any(weight.requires_grad for weight in network[0].parameters())
        assert all(weight.grad is not None for weight in network[1].parameters())
        assert_close(network[0].state_dict(), before, rtol=0, atol=0)  # statistics of norms too


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize("backbone", ["small", "resnet18", "vit_tiny_patch16_224", "resnet38"])
def test_correlation_refines_the_cams_of_any_backbone(backbone):
    stride = 8 if backbone in ("small", "resnet38") else 16
    config = tiny_config(network=Network(backbone, output_stride=stride, dim=8))
    torch.manual_seed(0)
    plain = build_cam(config, 3).eval()
    torch.manual_seed(0)
    config.cam.ecr = 1.0
    network = build_cam(config, 3).eval()
    images = torch.rand(2, 3, 4 * stride, 3 * stride)
    extra = {name for name in network.state_dict() if name not in plain.state_dict()}
    assert {name.split(".")[1] for name in extra} == {"correlation"}
    assert_close({name: value for name, value in network.state_dict().items() if name not in extra}, plain.state_dict())
    with torch.no_grad():
        output, both, refined = network(images), network(images, correlate=True), network.refine(images)
        assert_close(output, plain(images))
        if backbone in ("small", "resnet38"):
            *taps, _ = network[0].forward_taps(images)
        else:
            taps = [network[0](images)]
        wanted = network[1].correlation(taps, images, output.cam)  # (B, K, h, w)
    assert len(taps) == (2 if backbone in ("small", "resnet38") else 1)
    assert_close(both.cam, torch.cat([output.cam, wanted], 1))
    assert_close(refined.cam, wanted[:, 1:])
    assert_close((both.features, both.logits, refined.logits), (output.features, output.logits, output.logits))


def test_cams_are_inferred_refined_where_a_correlation_was_learned(root, tmp_path):
    run = open_run(root, tmp_path)
    run.config.cam.ecr = 1.0
    run.folder("train_cam").mkdir()
    network = build_cam(run.config, run.data.num_classes).eval()
    torch.save(network.state_dict(), run.folder("train_cam") / "model.pt")
    images = torch.rand(1, 3, 40, 32)
    with torch.no_grad():
        assert_close(cam_inference(run)(images).cam, network.refine(images).cam)
    assert isinstance(load_trained(run, "train_cam"), Correlated)
