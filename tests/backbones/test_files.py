"""Weight files: what arrives is counted, prefixes and wrappers are dropped, errors tell a way out."""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pixelss.backbones.any_timm import timm_backbone
from pixelss.backbones.checkpoints import load_resnet38, resnet38
from pixelss.backbones.files import read_weights
from tests.backbones.test_checkpoints import filled
from tests.backbones.test_mxnet import META
from tests.lazily import Lazily

timm: Any = Lazily("timm")

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def weights() -> State:
    torch.manual_seed(7)
    return {
        k: torch.rand_like(v) if v.is_floating_point() else v
        for k, v in timm.create_model("resnet10t").state_dict().items()
    }


def prefixed(prefix: str) -> Callable[[State], Any]:
    return lambda state: {prefix + k: v for k, v in state.items()}


FILES: dict[str, Callable[[State], Any]] = {
    "as timm saves it": dict,
    "saved from a wrapper": prefixed("backbone."),
    "saved from timm_backbone": prefixed("net."),
    "saved from a network with a head": lambda s: {**prefixed("0.net.")(s), "1.classify.weight": torch.rand(2, 2)},
    "nested under teacher": lambda s: {"student": {k: v * 0 for k, v in s.items()}, "teacher": s},
    "nested twice": lambda s: {"model": {"state_dict": s}, "epoch": 3},
    "distributed and compiled": prefixed("module._orig_mod."),
    "checkpointed": lambda s: {k.replace("layer1.0", "layer1._checkpoint_wrapped_module.0"): v for k, v in s.items()},
    "with a trainer's arguments": lambda s: {"state_dict": s, "args": argparse.Namespace(lr=0.1)},
}


def load(path: Path, **kwargs: Any) -> Any:
    settings = {"output_stride": 32, "pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}, **kwargs}
    return timm_backbone("resnet10t", **settings)


def assert_arrived(net: Any, weights: State) -> None:
    state = net.net.state_dict()
    assert len(state) > 50
    assert not [k for k, v in state.items() if not torch.equal(v, weights[k])]


@pytest.mark.parametrize("case", FILES)
def test_files_of_a_timm_network_arrive(case: str, weights: State, tmp_path: Path) -> None:
    if "arguments" in case and not hasattr(torch.serialization, "safe_globals"):
        pytest.skip("torch 2.4 allows no Namespace in a file of weights")
    torch.save(FILES[case](weights), tmp_path / "w.pth")
    net = load(tmp_path / "w.pth")
    assert_arrived(net, weights)
    assert not [m for m in net.modules() if "state_dict" in (getattr(m, "pretrained_cfg", None) or {})]
    copy.deepcopy(net)


def test_other_sources_arrive(weights: State, tmp_path: Path) -> None:
    save_file(weights, tmp_path / "w.safetensors")
    assert_arrived(load(tmp_path / "w.safetensors"), weights)
    assert_arrived(load(tmp_path, pretrained_cfg_overlay={"state_dict": prefixed("net.")(weights)}), weights)


def test_a_state_dict_of_our_backbone_arrives_whatever_timm_calls_its_levels(tmp_path: Path) -> None:
    source = timm_backbone("lcnet_050", output_stride=16)
    assert any("blocks" in name for name in source.state_dict())
    torch.save({"student": source.state_dict()}, tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth")}
    net = timm_backbone("lcnet_050", output_stride=16, pretrained=True, pretrained_cfg_overlay=overlay)
    for name, value in source.state_dict().items():
        assert torch.equal(net.state_dict()[name], value)


def test_levels_that_timm_renames_arrive(tmp_path: Path) -> None:
    source = timm_backbone("convnext_atto", output_stride=16)
    assert any(name.startswith("net.stages_0") for name in source.state_dict())
    torch.save(source.state_dict(), tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth")}
    net = timm_backbone("convnext_atto", output_stride=16, pretrained=True, pretrained_cfg_overlay=overlay)
    for name, value in source.state_dict().items():
        assert torch.equal(net.state_dict()[name], value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda s: {}, "must hold the weights of resnet10t, but holds none of the tensors .*network's conv1.0.weight"),
        (
            lambda s: {f"x{i}": v for i, v in enumerate(s.values())},
            "holds 0 of .* names are x0, x1, the network",
        ),
        (lambda s: dict(list(s.items())[:20]), r"holds \d+ of the \d+ tensors"),
        (
            lambda s: timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=1, num_heads=2).state_dict(),
            r"holds \d of the 70 tensors",
        ),
    ],
    ids=["empty", "strangers", "a part", "another network"],
)
def test_files_that_do_not_fit(content: Any, message: str, weights: State, tmp_path: Path) -> None:
    torch.save(content(weights), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "w.pth")
    assert str(caught.value).startswith(str(tmp_path / "w.pth"))


def test_a_file_without_pretrained_is_no_silence(weights: State, tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="pretrained must be True where pretrained_cfg_overlay names weights"):
        load(tmp_path / "w.pth", pretrained=False)


@pytest.mark.parametrize("kwargs", [{"pretrained_cfg_overlay": {"file": "nope.pth"}}, {"checkpoint_path": "nope.pth"}])
def test_a_file_that_is_not_there(kwargs: dict[str, Any]) -> None:
    with pytest.raises(FileNotFoundError, match=r"nope\.pth"):
        timm_backbone("resnet10t", output_stride=32, pretrained=True, **kwargs)


def test_names_of_networks() -> None:
    with pytest.raises(TypeError, match="name must be a str, such as 'resnet18', but is of type int"):
        timm_backbone(18)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"name must carry a tag .* but is 'resnet18.nope': it has .*'a1_in1k'"):
        timm_backbone("resnet18.nope")
    assert timm_backbone("resnet10t.c3_in1k", output_stride=32).out_channels == 512


def test_positions_that_run_out() -> None:
    net = timm_backbone("mvitv2_tiny", output_stride=16)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"cannot take images of size \(64, 320\): resize"),
    ):
        net(torch.rand(1, 3, 64, 320))


# --- ResNet38 --------------------------------------------------------------------------------------------------

NAMES = list(META.state_dict())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return filled(0.0)


def small(model: nn.Module) -> State:
    return {k: v + 1 for k, v in model.state_dict().items() if v.numel() < 600}


@pytest.mark.filterwarnings("ignore:.*lacks .* tensors of ResNet38")
@pytest.mark.parametrize("wrapper", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"])
def test_wrappers_inside_the_names(wrapper: str, model: nn.Module, tmp_path: Path) -> None:
    state = small(model)
    torch.save(
        {k.replace(".", f".{wrapper}.", 1) if k.count(".") == 2 else k: v for k, v in state.items()}, tmp_path / "w"
    )
    report = load_resnet38(model, tmp_path / "w")
    assert set(report.loaded) == set(state)
    assert not report.skipped


@pytest.mark.usefixtures("no_draws")
def test_most_of_the_network_missing_is_said(model: nn.Module, tmp_path: Path) -> None:
    torch.save({"bn7.bias": torch.ones(4096), "fc8.weight": torch.ones(2, 2)}, tmp_path / "w")
    with pytest.warns(UserWarning, match=r"lacks 190 tensors of ResNet38: conv1a.weight.* It holds others: fc8.weight"):
        load_resnet38(model, tmp_path / "w")
    with pytest.warns(UserWarning, match="lacks 190 tensors") as told:
        resnet38(tmp_path / "w")
    assert len(told) == 1


def test_a_whole_file_is_no_warning(model: nn.Module, tmp_path: Path) -> None:
    torch.save({k: v.new_zeros(()).expand(v.shape) for k, v in model.state_dict().items()}, tmp_path / "w")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not load_resnet38(model, tmp_path / "w").missing


class Custom:
    """What a trainer may save beside the weights."""


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("extra", "named"), [(np.float64(0.61), "scalar"), (Custom(), "Custom")])
def test_other_objects_are_named(extra: object, named: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model": {"bn7.bias": torch.ones(4096)}, "x": extra}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=rf"rejects its \S*{named}.*save its state dict alone") as caught:
        read_weights(path)
    assert "damaged" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
