"""timm: any of its networks as a backbone, and ResNet38 among its models (importing this module registers it)."""

from __future__ import annotations

import difflib
from functools import partial
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.classifier import ClassifierHead
from timm.layers.helpers import to_2tuple
from timm.models import build_model_with_cfg, register_model
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn

from pixelss._checks import check_choice, check_count, check_tensor
from pixelss.backbones.resnet38 import ResNet38

# What lets a plain transformer (its last norm applied) and a windowed one take images of any size.
_PLAIN = {"dynamic_img_size": True, "dynamic_img_pad": True, "feature_cls": partial(FeatureGetterNet, norm=True)}
_WINDOWED = {"strict_img_size": False}


def timm_backbone(name: str, *, output_stride: int = 8, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a timm network that maps images to one feature map of the stride asked for.

    A convolutional network that can dilate does so. Any other network gives its deepest feature map of that
    stride and, where timm can, leaves out what follows. A vision transformer gives the patch tokens of its last
    block without class and register tokens; after the last norm if it is one for images of any size (ViT, DeiT, EVA).

    Args:
        name: a name from `timm.list_models()`, which may carry a weights tag ("resnet18.a1_in1k").
        output_stride: image pixels per cell of the feature map, along one axis.
        pretrained: fetch timm's weights; for a file on disk add `pretrained_cfg_overlay={"file": path}`.
        **kwargs: passed to `timm.create_model`, for example `img_size` or `drop_path_rate`.

    Shape:
        The module maps (B, 3, H, W) to (B, C, h, w) with C = `.out_channels` and stride `.stride`. Most
        networks and all plain transformers give h = ceil(H / stride), some (ConvNeXt, VGG) the floor; windowed
        transformers and a few others take only sizes that are multiples of their patch or of their largest stride.

    Raises:
        ValueError: timm has no such network, or it cannot give this stride (the message lists those it has); when
            called, the network cannot take images of this size (the message tells which it takes).
        TypeError: the network does not know one of `kwargs`.

    Reference:
        Wightman, "PyTorch Image Models" (timm).

    Example:
        >>> net = timm_backbone("resnet18")
        >>> net.out_channels, net.stride
        (512, 8)
        >>> net(torch.rand(1, 3, 65, 96)).shape
        torch.Size([1, 512, 9, 12])
    """
    check_count("output_stride", output_stride)
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()."
        raise ValueError(f"name must be one of timm's networks, but is {name!r}: {hint}")
    strides: set[int] = set()
    refusal: Exception | None = None
    offers: tuple[dict[str, Any], ...] = ({"output_stride": output_stride}, _PLAIN, _WINDOWED, {})
    for offer in offers:  # the first that the network accepts and that gives the stride
        settings = {**offer, **kwargs}
        try:
            probe: Any = timm.create_model(name, features_only=True, **settings)
        except (AssertionError, TypeError) as error:  # how networks of timm refuse a setting
            if not offer:
                raise
            refusal = error  # told where no offer gives the stride
            continue
        reductions = [level["reduction"] for level in probe.feature_info.info]
        if output_stride in reductions:
            level = len(reductions) - 1 - reductions[::-1].index(output_stride)
            # Built again without the levels beyond, whose weights would lie idle.
            net = timm.create_model(name, pretrained, features_only=True, out_indices=(level,), **settings)
            return _TimmBackbone(net, name, settings)
        strides.update(reductions)
    given = ", ".join(map(str, sorted(strides))) + (" only" if len(strides) == 1 else "")
    nearest = min(strides, key=lambda stride: abs(stride - output_stride))
    raise ValueError(
        f"{name} gives stride {given}; ask for output_stride={nearest} instead of {output_stride}."
    ) from refusal


class _TimmBackbone(nn.Module):
    """The one feature map of a timm feature extractor, checked and in (B, C, h, w)."""

    def __init__(self, net: Any, name: str, settings: dict[str, Any]) -> None:
        super().__init__()
        self.net = net
        self.name = name
        self.in_channels: int = settings.get("in_chans", 3)
        self.out_channels: int = net.feature_info.channels()[0]
        self.stride: int = net.feature_info.reduction()[0]
        self.channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"
        flexible = settings.get("dynamic_img_size") or settings.get("strict_img_size") is False
        size = settings.get("img_size") or net.pretrained_cfg["input_size"][-2:]
        fixed = net.pretrained_cfg["fixed_input_size"] and not flexible
        self.fixed_size = to_2tuple(size) if fixed else None

    def forward(self, images: Tensor) -> Tensor:
        weight = next(self.net.parameters())
        _, _, H, W = check_tensor("images", images, "BCHW", like=weight, C=self.in_channels)
        try:
            (features,) = self.net(images)
            output: Tensor = features.permute(0, 3, 1, 2) if self.channels_last else features
            if output.shape[1] != self.out_channels:
                raise RuntimeError(f"its feature map has {output.shape[1]} channels, not {self.out_channels}")
        except torch.cuda.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError) as error:
            if images.dtype != weight.dtype:
                raise
            if self.fixed_size not in (None, (H, W)):
                fix = f"resize them to {self.fixed_size}, or build it with img_size=({H}, {W}) if it knows img_size"
            elif H % 32 or W % 32:
                fix = "pad or resize them to multiples of 32"
            else:
                raise
            raise ValueError(f"{self.name} cannot take images of size ({H}, {W}): {fix}.") from error
        return output


class _Classifier(nn.Module):
    """ResNet38 with a pooled classifier, under the names of attributes and methods that timm calls."""

    def __init__(
        self, num_classes: int = 1000, in_chans: int = 3, global_pool: str = "avg", drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        if in_chans != 3:
            raise ValueError(f"in_chans must be 3, for ResNet38 takes RGB images, but is {in_chans}.")
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = ResNet38.out_channels
        channels, strides = (128, 256, 512, 1024, 4096), (2, 4, 8, 8, 8)
        modules = ("b3.bn_branch2a", "b4.bn_branch2a", "b5.bn_branch2a", "b6.bn_branch2a", "bn7")
        self.feature_info = [
            {"num_chs": c, "reduction": s, "module": f"backbone.{m}"}
            for c, s, m in zip(channels, strides, modules, strict=True)
        ]
        self.backbone = ResNet38()
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        features: Tensor = self.backbone(x)
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        output: Tensor = self.head(x, pre_logits=pre_logits)
        return output

    def get_classifier(self) -> nn.Module:
        classifier: nn.Module = self.head.fc
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the stages at `indices`; `norm` and `stop_early` change nothing: every stage is normalised."""
        check_choice("output_fmt", output_fmt, ("NCHW",))
        stages = self.backbone.forward_stages(x)
        taken, _ = feature_take_indices(len(stages), indices)
        chosen = [stages[i] for i in taken]
        return chosen if intermediates_only else (stages[-1], chosen)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the classifier, which intermediates do not need; returns `indices` counted from the front."""
        if prune_head:
            self.reset_classifier(0, "")
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        return taken


default_cfgs = {
    "resnet38": {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (28, 28),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "backbone.conv1a",
        "classifier": "head.fc",
    }
}


@register_model
def resnet38(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Entry point of `timm.create_model("resnet38")`.

    Args:
        pretrained: must be False, for timm hosts no weights of it.
        **kwargs: `num_classes` (0 gives pooled features), `global_pool`, `drop_rate`, `features_only`, `out_indices`.

    Raises:
        ValueError: `pretrained` is True, or `in_chans` is not 3.
        TypeError: a setting that ResNet38 does not have.

    Example:
        >>> with torch.device("meta"):
        ...     net = timm.create_model("resnet38", features_only=True)
        >>> net.feature_info.channels(), net.feature_info.reduction()
        ([128, 256, 512, 1024, 4096], [2, 4, 8, 8, 8])
    """
    if pretrained:
        raise ValueError(
            "pretrained must be False for resnet38, whose weights timm does not host: load a published file with "
            "pixelss.backbones.checkpoints.load_resnet38(model, path)."
        )
    features = {"out_indices": (0, 1, 2, 3, 4), "feature_cls": "getter"}
    return build_model_with_cfg(_Classifier, "resnet38", False, feature_cfg=features, **kwargs)
