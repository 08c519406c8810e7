"""Any network of timm as a backbone."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from pixelss._checks import channels_hint, check_count, check_tensor
from pixelss.backbones.files import read_weights, under_prefixes, unwrapped


def timm_backbone(name: str, *, output_stride: int = 8, pretrained: bool = False, **kwargs: Any) -> TimmBackbone:
    """Build a timm network that maps images to one feature map of the stride asked for.

    A convolutional network that can dilate does so. Any other network gives its deepest feature map of that
    stride and, where timm can, leaves out what follows. A vision transformer gives the patch tokens of its last
    block without class and register tokens; after the last norm if it is one for images of any size (ViT, DeiT, EVA).

    Args:
        name: a name from `timm.list_models()`, which may carry a weights tag ("resnet18.a1_in1k").
        output_stride: image pixels per cell of the feature map, along one axis.
        pretrained: fetch timm's weights; for a file on disk add `pretrained_cfg_overlay={"file": path}`. Of its names a
            common prefix is dropped ("backbone.", "net.") and what wrappers put in; a state dict may lie
            under a key ("model", "teacher"). Warns where the file lacks some of the network's tensors.
        **kwargs: passed to `timm.create_model`, for example `img_size` or `drop_path_rate`.

    Shape:
        The module maps (B, 3, H, W) to (B, C, h, w) with C = `.out_channels` and stride `.stride`. Most
        networks and all plain transformers give h = ceil(H / stride), some (ConvNeXt, VGG) the floor; windowed
        transformers and a few others take only sizes that are multiples of their patch or of their largest stride.

    Raises:
        ValueError: timm has no such network or weights tag, or it cannot give this stride (the message lists those it
            has); less than half of the network's tensors are in the file; when called, the network cannot take
            images of this size (the message tells which it takes).
        FileNotFoundError: there is no such weight file.
        TypeError: `name` is no str, or the network does not know one of `kwargs`.

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
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, such as 'resnet18', but is of type {type(name).__name__}.")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()."
        raise ValueError(f"name must be one of timm's networks, but is {name!r}: {hint}")
    _check_tag(name)
    weights = _given_weights(name, pretrained, kwargs)
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
            build = partial(timm.create_model, name, pretrained, features_only=True, out_indices=(level,), **settings)
            net = build() if weights is None else _build_with(build, name, weights, kwargs)
            return TimmBackbone(net, name, settings)
        strides.update(reductions)
    given = ", ".join(map(str, sorted(strides))) + (" only" if len(strides) == 1 else "")
    nearest = min(strides, key=lambda stride: abs(stride - output_stride))
    raise ValueError(
        f"{name} gives stride {given}; ask for output_stride={nearest} instead of {output_stride}."
    ) from refusal


class _Weights(NamedTuple):
    source: str  # for messages
    tensors: Mapping[str, Tensor]


def _check_tag(name: str) -> None:
    import timm

    arch, _, tag = name.partition(".")
    known = timm.list_pretrained(f"{arch}.*")
    if tag and name not in known and arch in timm.list_models():
        tags = ", ".join(repr(one.partition(".")[2]) for one in known) or "none"
        raise ValueError(f"name must carry a tag of timm's weights for {arch}, but is {name!r}: it has {tags}.")


def _given_weights(name: str, pretrained: bool, kwargs: Mapping[str, Any]) -> _Weights | None:
    """Return the weights that the user's overlay names, if it does."""
    checkpoint = kwargs.get("checkpoint_path")
    if checkpoint and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"checkpoint_path must be a file, but {checkpoint} is none.")
    overlay: Mapping[str, Any] = kwargs.get("pretrained_cfg_overlay") or {}
    path, state = Path(overlay.get("file") or ""), overlay.get("state_dict")
    if not overlay.get("file") and state is None:
        return None
    if not pretrained:
        raise ValueError("pretrained must be True where pretrained_cfg_overlay names weights, but is False.")
    if state is not None:
        return _Weights("pretrained_cfg_overlay['state_dict']", state)
    if overlay.get("custom_load") or path.suffix == ".npz":  # a format that timm's network reads itself
        if not path.is_file():
            raise FileNotFoundError(f"pretrained_cfg_overlay['file'] must be a file, but {path} is none.")
        return None
    return _Weights(str(path), read_weights(path))


def _build_with(build: Callable[..., Any], name: str, weights: _Weights, kwargs: Mapping[str, Any]) -> Any:
    """Build the network with weights from a file; raises unless at least half of its tensors are in it."""
    import timm

    own_settings = {key: value for key, value in kwargs.items() if key != "pretrained_cfg_overlay"}
    own = {_canonical(key): key for key in timm.create_model(name, **own_settings).state_dict()}
    prefixes = under_prefixes(weights.source, {key: _canonical(unwrapped(key)) for key in weights.tensors}, own)
    best = max(prefixes.values(), key=len, default={})
    tensors = {own[key]: weights.tensors[theirs] for key, theirs in best.items()}
    if not tensors:  # another code's names, which timm may know to translate
        tensors = dict(weights.tensors)
    if tensors:
        overlay = {**kwargs["pretrained_cfg_overlay"], "state_dict": tensors, "source": ""}
        net = build(pretrained_cfg_overlay=overlay)
        for module in net.modules():
            config = getattr(module, "pretrained_cfg", None)
            if isinstance(config, dict):
                config.pop("state_dict", None)  # or each copy of the network would carry the weights twice
        there = {_fingerprint(value, dtype) for value in weights.tensors.values() for dtype in (None, torch.float32)}
        needed = {key: value for key, value in net.state_dict().items() if value.is_floating_point()}
        arrived = sum(_fingerprint(value) in there for value in needed.values())
        if 2 * arrived >= len(needed):
            names = {key: _canonical(key.removeprefix("model.")) for key in needed}
            if best and (lacking := [key for key, whole in names.items() if whole in own and whole not in best]):
                lacks = f"{weights.source} lacks {len(lacking)} of the {len(needed)} tensors of {name}"
                warnings.warn(f"{lacks}: {', '.join(lacking[:3])}, ... They keep their initial values.", stacklevel=3)
            return net
        share = f"{arrived} of the {len(needed)} tensors"
    else:
        share = "none of the tensors"
    theirs, ours = (", ".join(list(names)[:2]) or "absent" for names in (weights.tensors, own.values()))
    raise ValueError(
        f"{weights.source} must hold the weights of {name}, but holds {share} (classifier aside): its names are "
        f"{theirs}, the network's {ours}. Save this network's own state dict, under any one prefix."
    )


def _canonical(name: str) -> str:
    """Return a tensor's name as timm has it in the whole network: its extractors write stages_0 for stages.0."""
    return re.sub(r"_(\d+)(?=\.)", r".\1", name)


def _fingerprint(value: Tensor, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """Return what tells a tensor from others, whatever its name and shape: its size and first values."""
    return value.numel(), *value.detach().flatten()[:8].to("cpu", dtype or value.dtype).tolist()


class TimmBackbone(nn.Module):
    """What `timm_backbone` returns: the one feature map of a timm feature extractor, checked and in (B, C, h, w).

    Attributes:
        out_channels: channels C of the feature map.
        stride: image pixels per cell, along one axis.
        net: timm's extractor.
    """

    if TYPE_CHECKING:  # nn.Module's own call says Any
        __call__: Callable[..., Tensor]

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
        self.size = pair
        self.fixed_size = pair if fixed else None

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, C, h, w) of images (B, 3, H, W)."""
        weight = next(self.net.parameters(), images)  # a replica of DataParallel has none
        _, _, H, W = check_tensor("images", images, "BCHW", like=weight, C=self.in_channels)
        try:
            (features,) = self.net(images)
            output: Tensor = features.permute(0, 3, 1, 2) if self.channels_last else features
            if output.shape[1] != self.out_channels:
                raise RuntimeError(f"its feature map has {output.shape[1]} channels, not {self.out_channels}")
        except torch.cuda.OutOfMemoryError:
            raise
        except (AssertionError, IndexError, RuntimeError) as error:
            if images.dtype != weight.dtype:
                raise
            if self.fixed_size not in (None, (H, W)):
                fix = f"resize them to {self.fixed_size}, or build it with img_size=({H}, {W}) if it knows img_size"
            elif H % 32 or W % 32:
                fix = "pad or resize them to multiples of 32"
            elif isinstance(error, IndexError):  # a table of positions that is too small
                fix = f"resize them to {self.size}, or build it with img_size=({H}, {W}) if it knows img_size"
            else:
                raise
            fix += "." + channels_hint(images)
            raise ValueError(f"{self.name} cannot take images of size ({H}, {W}): {fix}") from error
        return output
