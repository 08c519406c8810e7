"""Any timm network as a backbone, against timm itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pixelss.backbones.any_timm import timm_backbone
from pixelss.backbones.norms import freeze_norm
from tests.lazily import Lazily
from tests.oracles import data_parallel_replica

timm: Any = Lazily("timm")

SIGNATURES = {
    "timm_backbone": "(name, *, output_stride=8, pretrained=False, **kwargs)",
}

BLOCKS = {"timm_backbone": "timm's networks, with what timm promises"}

SWIN = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)}
VIT = {"embed_dim": 24, "depth": 3, "num_heads": 2}
# name, kwargs, stride, (H, W), (C, h, w)
MATRIX = [
    *(("resnet18", {}, s, (65, 97), (512, -(-65 // s), -(-97 // s))) for s in (8, 16, 32)),
    *(("tf_efficientnet_lite0", {}, s, (65, 97), (320, -(-65 // s), -(-97 // s))) for s in (8, 16, 32)),
    ("resnet18", {}, 4, (64, 64), (64, 16, 16)),  # a stride no dilation gives: an early level
    ("mobilenetv3_small_050", {}, 8, (64, 96), (288, 8, 12)),
    ("convnext_atto", {}, 8, (64, 96), (320, 8, 12)),
    ("convnext_atto", {}, 8, (65, 97), (320, 8, 12)),  # cuts into whole patches
    ("regnety_002", {}, 16, (33, 47), (368, 3, 3)),
    ("ghostnet_050", {}, 8, (64, 64), (20, 8, 8)),  # refuses output_stride=8
    ("pvt_v2_b0", {}, 8, (64, 96), (64, 8, 12)),
    ("mambaout_femto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, 8, (64, 96), (16, 8, 12)),  # NHWC
    ("swin_tiny_patch4_window7_224", SWIN, 8, (64, 96), (48, 8, 12)),  # NHWC, any size
    ("swinv2_tiny_window8_256", SWIN, 32, (96, 64), (192, 3, 2)),
    ("vit_tiny_patch16_224", VIT, 16, (64, 96), (24, 4, 6)),
    ("vit_tiny_patch16_224", VIT, 16, (65, 97), (24, 5, 7)),  # padded
    ("deit_tiny_distilled_patch16_224", VIT, 16, (48, 32), (24, 3, 2)),  # two prefix tokens
    ("vit_small_patch14_reg4_dinov2", VIT, 14, (56, 70), (24, 4, 5)),  # registers
    ("eva02_tiny_patch14_224", VIT, 14, (57, 70), (24, 5, 5)),  # rotary
    ("beit_base_patch16_224", {**VIT, "img_size": (32, 48)}, 16, (32, 48), (24, 2, 3)),
    ("mixer_s32_224", {"img_size": 64}, 32, (64, 64), (512, 2, 2)),
    ("coatnet_nano_cc_224", {"img_size": 64}, 16, (64, 64), (256, 4, 4)),  # hybrid
]


@pytest.mark.parametrize(("name", "kwargs", "stride", "size", "shape"), MATRIX)
@torch.no_grad()
def test_matrix(
    name: str, kwargs: dict[str, Any], stride: int, size: tuple[int, int], shape: tuple[int, int, int]
) -> None:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    net = timm_backbone(name, output_stride=stride, **kwargs).eval()
    features = net(torch.randn(2, 3, *size))
    assert features.shape == (2, *shape)
    assert (net.out_channels, net.stride) == (shape[0], stride)
    assert features.isfinite().all()
    assert features.std(dim=(2, 3)).amax() > 0


def with_weights_of(net: nn.Module, other: nn.Module) -> nn.Module:
    """Give `other` the weights that it shares with timm's extractor inside `net`; all of these must exist there."""
    state = {name.removeprefix("model."): tensor for name, tensor in net.net.state_dict().items()}
    assert not other.load_state_dict(state, strict=False).unexpected_keys
    return other.eval()


@torch.no_grad()
def test_numbers_of_a_dilated_network_are_timms() -> None:
    net = timm_backbone("resnet18").eval()
    reference = with_weights_of(net, timm.create_model("resnet18", output_stride=8))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(net(x), reference.forward_features(x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_numbers_of_a_transformer_are_its_normalised_patch_tokens(name: str) -> None:
    net = timm_backbone(name, output_stride=16, img_size=(32, 48), **VIT).eval()
    reference = with_weights_of(net, timm.create_model(name, img_size=(32, 48), **VIT))
    x = torch.randn(2, 3, 32, 48)
    tokens = reference.forward_features(x)[:, reference.num_prefix_tokens :]
    assert tokens.shape == (2, 6, 24)
    torch.testing.assert_close(net(x), tokens.transpose(1, 2).unflatten(2, (2, 3)))


@torch.no_grad()
def test_numbers_of_a_channels_last_network_are_timms() -> None:
    name, size = "swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2, **SWIN}
    net = timm_backbone(name, output_stride=32, **size).eval()
    reference = timm.create_model(name, features_only=True, **size).eval()
    reference.load_state_dict(net.net.state_dict())
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(net(x), reference(x)[-1].permute(0, 3, 1, 2))


def test_no_weights_lie_idle() -> None:
    for name, kwargs, stride in [("ghostnet_050", {}, 8), ("lcnet_050", {}, 8), ("vit_tiny_patch16_224", VIT, 16)]:
        net = timm_backbone(name, output_stride=stride, **kwargs).train()
        net(torch.randn(2, 3, 64, 64)).square().mean().backward()
        idle = [n for n, p in net.named_parameters() if p.grad is None]
        assert all("cls_token" in n for n in idle), name


@pytest.mark.slow  # .ci/run runs it
@torch.no_grad()
def test_compiles_in_one_graph() -> None:
    net = timm_backbone("lcnet_050").eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(torch.compile(net, fullgraph=True, backend="eager")(x), net(x))


def test_freeze_norm() -> None:
    net = freeze_norm(timm_backbone("mobilenetv3_small_050", drop_path_rate=0.0)).train()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(net(x), net.eval()(x))


@torch.no_grad()
def test_kwargs_reach_timm(tmp_path: Path) -> None:
    net = timm_backbone("resnet18", output_stride=32, in_chans=1).eval()
    assert net(torch.randn(1, 1, 32, 32)).shape == (1, 512, 1, 1)
    with pytest.raises(ValueError, match=r"images must have shape \(B, C=1, H, W\)"):
        net(torch.randn(1, 3, 32, 32))
    source = timm.create_model("resnet18")
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    loaded = timm_backbone("resnet18", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(loaded.net.conv1.weight, source.conv1.weight)


@pytest.mark.parametrize(
    ("name", "stride", "message"),
    [
        ("vit_tiny_patch16_224", 8, "vit_tiny_patch16_224 gives stride 16 only; ask for output_stride=16 instead of 8"),
        ("resnet18", 64, "resnet18 gives stride 2, 4, 8, 16, 32; ask for output_stride=32 instead of 64"),
        ("resnt18", 8, r"is 'resnt18': did you mean .*resnet18"),
        ("???", 8, r"see timm.list_models\(\)"),
        ("resnet18", 0, "output_stride must be at least 1, but is 0"),
    ],
)
def test_bad_names_and_strides(name: str, stride: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm_backbone(name, output_stride=stride)


@pytest.mark.parametrize("kwargs", [{"no_such_setting": 1}, {"features_only": False}, {"out_indices": (0,)}])
def test_bad_kwargs(kwargs: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(kwargs))):
        timm_backbone("resnet18", **kwargs)


def test_fixed_size() -> None:
    net = timm_backbone("beit_base_patch16_224", output_stride=16, **VIT, img_size=32)
    message = r"beit_base_patch16_224 cannot take images of size \(64, 96\): resize them to \(32, 32\), or build it"
    with pytest.raises(ValueError, match=rf"{message} with img_size=\(64, 96\)"):
        net(torch.randn(1, 3, 64, 96))
    with pytest.raises(RuntimeError, match="double"):  # an error that the size does not explain
        net(torch.randn(1, 3, 32, 32, dtype=torch.float64))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "hrnet_w18_small"])
def test_sizes_that_must_be_multiples(name: str) -> None:
    net = timm_backbone(name, **(SWIN if "swin" in name else {}))
    with pytest.raises(
        ValueError, match=r"cannot take images of size \(65, 97\): pad or resize them to multiples of 32"
    ):
        net(torch.randn(1, 3, 65, 97))


def test_a_misshapen_feature_map_is_no_result() -> None:
    with torch.device("meta"):  # timm 1.0.31 folds two rows of these tokens into the channels
        net = timm_backbone("vit_base_r26_s32_224", output_stride=32)
        with pytest.raises(ValueError, match="multiples of 32"):
            net(torch.zeros(1, 3, 65, 97))
        assert net(torch.zeros(1, 3, 64, 96)).shape == (1, 768, 2, 3)


@pytest.mark.parametrize(
    ("images", "error"), [(torch.zeros(3, 8, 8), ValueError), (torch.zeros(1, 3, 8, 8).int(), TypeError)]
)
def test_bad_images(images: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="images must"):
        timm_backbone("lcnet_050")(images)


def test_a_stride_nobody_gives_tells_why_a_setting_was_refused():
    with pytest.raises(ValueError, match="gives stride 16") as caught:
        timm_backbone("vit_tiny_patch16_224", output_stride=8)
    assert isinstance(caught.value.__cause__, TypeError)


@torch.no_grad()
def test_a_replica_of_data_parallel_runs():
    net, images = timm_backbone("resnet18").eval(), torch.randn(1, 3, 33, 40)
    replica = data_parallel_replica(net)
    assert not list(replica.parameters())
    assert torch.equal(replica(images), net(images))
