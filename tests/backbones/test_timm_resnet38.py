"""ResNet38 among timm's models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pixelss.backbones.any_timm import timm_backbone
from pixelss.backbones.checkpoints import load_resnet38
from pixelss.backbones.resnet38 import ResNet38
from tests.lazily import Lazily

timm: Any = Lazily("timm")


@pytest.fixture(autouse=True)
def registered() -> None:
    import pixelss.backbones.timm_resnet38  # noqa: F401


def create(**kwargs: Any) -> Any:
    with torch.device("meta"):
        return timm.create_model("resnet38", **kwargs)


X = torch.zeros(2, 3, 65, 96, device="meta")


def test_classifier() -> None:
    net = create(num_classes=20, drop_rate=0.1).eval()
    assert net(X).shape == (2, 20)
    features = net.forward_features(X)
    assert features.shape == (2, 4096, 9, 12)
    assert net.forward_head(features).shape == (2, 20)
    assert net.forward_head(features, pre_logits=True).shape == (2, 4096)
    assert net.get_classifier().weight.shape == (20, 4096)
    net.reset_classifier(7)
    assert (net.num_classes, net(X).shape) == (7, (2, 7))
    net.reset_classifier(0, "")
    assert net(X).shape == (2, 4096, 9, 12)
    assert create()(X).shape == (2, 1000)
    assert create(num_classes=0).eval()(X).shape == (2, 4096)
    assert (net.num_features, net.head_hidden_size) == (4096, 4096)


def test_default_cfg() -> None:
    net = create()
    config = timm.data.resolve_data_config(net.default_cfg)
    assert config["input_size"] == (3, 224, 224)
    assert config["mean"] == (0.485, 0.456, 0.406)
    assert config["std"] == (0.229, 0.224, 0.225)
    assert isinstance(net.get_submodule(net.default_cfg["first_conv"]), nn.Conv2d)
    assert net.get_submodule(net.default_cfg["classifier"]) is net.get_classifier()
    assert "resnet38" in timm.list_models("resnet3*")


@pytest.mark.parametrize("indices", [None, (0, 1, 2, 3, 4), (4,), (-1, 0), (2, 3)])
def test_features_only(indices: tuple[int, ...] | None) -> None:
    net = create(features_only=True, **({} if indices is None else {"out_indices": indices})).eval()
    taken = indices or range(5)
    channels = [(128, 256, 512, 1024, 4096)[i] for i in taken]
    strides = [(2, 4, 8, 8, 8)[i] for i in taken]
    assert net.feature_info.channels() == channels
    assert net.feature_info.reduction() == strides
    shapes = [tuple(stage.shape) for stage in net(X)]
    expected = {(c, s): (2, c, -(-65 // s), -(-96 // s)) for c, s in zip(channels, strides, strict=True)}
    assert sorted(shapes) == sorted(expected.values())
    assert not [name for name, _ in net.named_parameters() if "head" in name]


def test_features_are_the_stages() -> None:
    net = create(features_only=True).eval()
    resnet38 = next(m for m in net.modules() if isinstance(m, ResNet38))
    for info in net.feature_info.info:
        assert net.model.get_submodule(info["module"]).num_features == info["num_chs"]
    assert [s.shape for s in net(X)] == [s.shape for s in resnet38.forward_stages(X)]
    final, stages = net.model.forward_intermediates(X, indices=2)
    assert (final.shape[1], [s.shape[1] for s in stages]) == (4096, [1024, 4096])


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"pretrained": True}, ValueError, r"pretrained must be False.*load_resnet38\(model, path\)"),
        ({"in_chans": 1}, ValueError, "in_chans must be 3"),
        ({"output_stride": 16}, TypeError, "output_stride"),
        ({"no_such_setting": 1}, TypeError, "no_such_setting"),
    ],
)
def test_unsupported(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        create(**kwargs)


def test_resnet38_as_backbone() -> None:
    with torch.device("meta"):
        net = timm_backbone("resnet38").eval()
        assert net(X).shape == (2, 4096, 9, 12)
        assert (net.out_channels, net.stride) == (4096, 8)
        with pytest.raises(ValueError, match=r"resnet38 gives stride 2, 4, 8; ask for output_stride=8"):
            timm_backbone("resnet38", output_stride=16)
        with pytest.raises(ValueError, match="pretrained must be False"):
            timm_backbone("resnet38", pretrained=True)


@pytest.mark.usefixtures("no_draws")
@pytest.mark.filterwarnings("ignore:.*lacks .* tensors of ResNet38")
def test_published_weights_load_into_the_classifier(tmp_path: Path) -> None:
    net = timm.create_model("resnet38", num_classes=2)
    torch.save({"bn7.bias": torch.full((4096,), 3.0), "fc8.weight": torch.zeros(2, 4096)}, tmp_path / "weights.pth")
    assert load_resnet38(net, tmp_path / "weights.pth").loaded == ("bn7.bias",)
    assert net.backbone.bn7.bias.eq(3).all()
