"""Any network of timm as a backbone."""

from __future__ import annotations

import difflib
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pixelss._checks import check_count, check_tensor


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
        Wightman 2019, "PyTorch Image Models".

    Example:
        >>> net = timm_backbone("resnet18")
        >>> net.out_channels, net.stride
        (512, 8)
        >>> net(torch.rand(1, 3, 65, 96)).shape
        torch.Size([1, 512, 9, 12])
    """
    import timm  # here: it takes seconds, and most users of the blocks never ask for it
    from timm.models._features import FeatureGetterNet

    import pixelss.backbones.timm_resnet38  # noqa: F401  # so that timm knows "resnet38"

    check_count("output_stride", output_stride)
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()."
        raise ValueError(f"name must be one of timm's networks, but is {name!r}: {hint}")
    # What lets a plain transformer (its last norm applied) and a windowed one take images of any size.
    normed = partial(FeatureGetterNet, norm=True)
    plain = {"dynamic_img_size": True, "dynamic_img_pad": True, "feature_cls": normed}
    windowed = {"strict_img_size": False}
    offers: tuple[dict[str, Any], ...] = ({"output_stride": output_stride}, plain, windowed, {})
    strides: set[int] = set()
    refusal: Exception | None = None
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
        pair: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        self.fixed_size = pair if fixed else None

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
