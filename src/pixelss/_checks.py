"""Argument checks whose messages carry every fact: the argument, what it must be, what it was, the fix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

TAGS_HINT = "Tags are multi-hot over the CAMs' foreground classes, without a background column."
_EPS, _MAX = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).max  # numbers: torch 2.4 traces no finfo
_SLACK = 0.01
_CASTS = {
    "floating": " Images? Divide by 255 and normalise.",
    "integer": " Class scores? Take their argmax. A label map? Cast it by .long().",
    "bool": " Compare it with a threshold first.",
    "any": "",
}


def check_tensor(
    name: str,
    value: Tensor,
    axes: str,
    *,
    kind: str = "floating",
    like: Tensor | None = None,
    hint: str = "",
    **sizes: int,
) -> tuple[int, ...]:
    """Raise unless `value` is a tensor with one dimension per letter of `axes`; returns its shape.

    Args:
        name: the argument's name, for the message.
        value: the tensor to check.
        axes: one letter a dimension, as in the notation table; only "B" and "P" may have size 0.
        kind: "floating", "integer" (no bool), "bool" or "any" (but complex).
        like: a tensor whose device `value` must share.
        hint: the likely fix of a wrong rank or size.
        **sizes: the size that a letter of `axes` must have.

    Raises:
        TypeError: `value` is no tensor, or its dtype is not of `kind`.
        ValueError: its rank, a size or its device is wrong.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, but is {_not_a_tensor(name, value, axes, sizes)}.")
    if value.ndim != len(axes):
        was = f"has shape {tuple(value.shape)}"
        fix = _fix(name, value, axes, sizes, hint)
        raise ValueError(f"{name} must have shape {_wanted(axes, sizes)}, but {was}.{fix}")
    for axis, size in zip(axes, value.shape, strict=True):
        if size != sizes.get(axis, size) or (size == 0 and axis not in "BP"):
            was = f"has shape {tuple(value.shape)}: {axis} is {size}"
            fix = _fix(name, value, axes, sizes, hint)
            raise ValueError(f"{name} must have shape {_wanted(axes, sizes)}, but {was}.{fix}")
    if not _is_kind(value.dtype, kind):
        raise TypeError(f"{name} must be of {kind} dtype, but is {value.dtype}.{_CASTS[kind]}")
    if like is not None and value.device != like.device:
        raise ValueError(
            f"{name} must lie on {like.device}, but lies on {value.device}: move it, or what it meets, by .to(device)."
        )
    return tuple(value.shape)


def _wanted(axes: str, sizes: dict[str, int]) -> str:
    """Write the wanted shape: for a message alone, since torch.compile takes a size that is printed for a constant."""
    return f"({', '.join(f'{axis}={sizes[axis]}' if axis in sizes else axis for axis in axes)})"


def _not_a_tensor(name: str, value: object, axes: str, sizes: dict[str, int]) -> str:
    """Say what `value` is and, of a numpy array, the call that makes a tensor of it."""
    if isinstance(value, (list, tuple)):
        stacked = value and all(isinstance(one, Tensor) for one in value)
        return f"of type {type(value).__name__}. Pass torch.{'stack' if stacked else 'tensor'}({name})"
    if not isinstance(value, np.ndarray):
        return f"of type {type(value).__name__}"
    channels_last = len(axes) == 4 and value.ndim == 3 and value.shape[-1] <= 4 < min(value.shape[:2])
    call = ".permute(2, 0, 1)[None]" if channels_last else _missing_call(value.shape, axes, sizes)
    strict = not value.flags.writeable or min(value.strides, default=0) < 0  # torch warns of these, or refuses them
    return f"a numpy array of shape {value.shape}. Pass torch.from_numpy({name}{'.copy()' * strict}){call}"


def _fix(name: str, value: Tensor, axes: str, sizes: dict[str, int], hint: str) -> str:
    """Return the likely fix of a wrong rank or size: an axis that is missing or lies elsewhere, else the hint."""
    if call := _missing_call(value.shape, axes, sizes):
        return f" Pass {name}{call}."
    return f" {hint}" if hint else ""


def _missing_call(shape: Sequence[int], axes: str, sizes: dict[str, int]) -> str:
    """Return the call that gives `shape` the order of `axes`, "" where the known sizes do not show that one would."""
    calls = {"[None]": [1, *shape]}
    if len(axes) == 4:
        calls[".permute(2, 0, 1)[None]"] = [1, *shape[2:], *shape[:2]]
        calls[".permute(0, 3, 1, 2)"] = [*shape[:1], *shape[3:], *shape[1:3]]
    known = [i for i, axis in enumerate(axes) if axis in sizes]
    for call, moved in calls.items():
        fits = len(moved) == len(axes) and len(shape) == len(axes) - ("[None]" in call)
        if fits and axes[0] == "B" and max(known, default=0) > 0 and all(moved[i] == sizes[axes[i]] for i in known):
            return call
    return ""


def channels_hint(images: Tensor) -> str:
    """Return the call that puts channels first, for a message, where the shape looks as if they were last."""
    last = images.ndim == 4 and images.shape[-1] <= 4 < images.shape[1]
    return " Do channels come last? Pass images.permute(0, 3, 1, 2)." if last else ""


def check_maps(
    name: str,
    maps: Sequence[Tensor],
    axes: str,
    *,
    shared: str,
    like: Tensor | None = None,
    hint: str = "",
    **sizes: int,
) -> tuple[int, ...]:
    """Raise unless `maps` holds one floating tensor of `axes` a scale, which agree on the axes `shared`.

    A tensor with one axis more, the scales, will do. Returns the first one's shape.
    """
    if getattr(maps, "ndim", None) != len(axes) + 1:
        check_sequence(name, maps, "tensors, one a scale")
    elif len(maps) == 0:
        raise ValueError(f"{name} must hold a tensor a scale or more, but holds none.")
    shapes = []
    for i, one in enumerate(maps):
        shape = check_tensor(f"{name}[{i}]", one, axes, kind="floating", like=like, hint=hint, **sizes)
        sizes |= {axis: size for axis, size in zip(axes, shape, strict=True) if axis in shared}
        like = one
        shapes.append(shape)
    return shapes[0]


def check_sequence(name: str, value: object, of: str) -> None:
    """Raise unless `value` is a sequence with an entry or more; `of` says of what, as in "ints, one a tap"."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        fix = f" Of one alone pass [{name}]." if isinstance(value, Tensor) else ""
        raise TypeError(f"{name} must be a sequence of {of}, but is of type {type(value).__name__}.{fix}")
    if len(value) == 0:
        raise ValueError(f"{name} must be a sequence of {of}, but is empty.")


def check_scales(scales: Sequence[float]) -> None:
    """Raise unless `scales` holds one positive factor of the image size or more."""
    check_sequence("scales", scales, "factors of the image size")
    for i, scale in enumerate(scales):
        check_scale(f"scales[{i}]", scale)


def check_scale(name: str, value: float) -> None:
    """Raise unless `value` is a positive factor of the image size."""
    check_number(name, value, low=1e-3, high=1e3)


def _is_kind(dtype: torch.dtype, kind: str) -> bool:
    is_bool, is_floating = dtype == torch.bool, dtype.is_floating_point
    is_integer = not (is_bool or is_floating or dtype.is_complex)
    kinds = {"floating": is_floating, "integer": is_integer, "bool": is_bool, "any": not dtype.is_complex}
    return kinds[kind]


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, but is {value!r}.")


def check_images(images: Tensor, *, hint: str = "") -> tuple[int, int, int]:
    """Raise unless `images` are RGB levels (B, 3, H, W), uint8; returns B, H, W."""
    B, _, H, W = check_tensor("images", images, "BCHW", kind="any", hint=hint, C=3)
    if images.dtype != torch.uint8:
        raise TypeError(
            f"images must be of dtype torch.uint8 (levels 0 to 255), but is {images.dtype}. Of values in [0, 1] pass "
            "(images * 255).round().to(torch.uint8), of levels images.round().to(torch.uint8); normalised ones undone."
        )
    return B, H, W


def check_multi_hot(tags: Tensor) -> None:
    """Raise where a tag lies between 0 and 1, as probabilities do; it waits for the device."""
    between = (tags > 0) & (tags < 1)
    if bool(between.any()):
        raise ValueError(
            f"tags must be multi-hot, but hold {tags[between][0].item():.4g}. Probabilities? Pass tags > 0.5."
        )


def check_no_class(ignore_index: int, num_classes: int) -> None:
    """Raise unless `ignore_index` is an integer and no class 0..N, so that what is void can be told from a class."""
    check_integer("ignore_index", ignore_index)
    if 0 <= ignore_index <= num_classes:
        raise ValueError(
            f"ignore_index must be no class (0 to {num_classes}), but is {ignore_index}. Pass ignore_index=-1."
        )


def check_number(name: str, value: float, *, low: float, high: float) -> None:
    """Raise unless `value` is a number with low <= value <= high (NaN fails)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, but is of type {type(value).__name__}.")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, but is {value}.")


def check_positive(name: str, value: float) -> None:
    """Raise unless `value` is a number above 0 that float32 can divide by."""
    check_number(name, value, low=_EPS, high=_MAX)


def check_nonnegative(name: str, value: float) -> None:
    """Raise unless `value` is 0 or a number above that float32 holds."""
    check_number(name, value, low=0, high=_MAX)


def check_integer(name: str, value: int, *, low: int | None = None, high: int | None = None) -> None:
    """Raise unless `value` is an integer, and between `low` and `high` where both are given."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, but is of type {type(value).__name__}.")
    if low is not None and high is not None:
        check_number(name, value, low=low, high=high)


def check_void(ignore_index: int, num_classes: int) -> None:
    """Raise unless `ignore_index` is an integer that may be void beside K classes: 255, the default, may be a class."""
    check_integer("ignore_index", ignore_index)
    if ignore_index == 255 and num_classes > 255:
        raise ValueError(
            f"ignore_index must be no class, but 255, the default, is one of {num_classes}. Pass ignore_index=-1."
        )


def check_count(name: str, value: int) -> None:
    """Raise unless `value` is an integer of at least 1."""
    check_integer(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, but is {value}.")


def check_counts(name: str, values: Sequence[int], of: str) -> None:
    """Raise unless `values` is a sequence of integers of at least 1; `of` says of what, as in "ints, one a tap"."""
    check_sequence(name, values, of)
    for i, value in enumerate(values):
        check_count(f"{name}[{i}]", value)


def check_taps(
    taps: Sequence[Tensor], channels: Sequence[int], *, shared: str, like: Tensor, hint: str = "", **sizes: int
) -> None:
    """Raise unless `taps` holds a map (B, C, h, w) of each of the `channels`; they agree on the axes `shared`."""
    check_sequence("taps", taps, "tensors, one a layer")
    if len(taps) != len(channels):
        raise ValueError(f"taps must hold {len(channels)} tensors, as in_channels, but holds {len(taps)}.")
    for i, (tap, C) in enumerate(zip(taps, channels, strict=True)):
        shape = check_tensor(f"taps[{i}]", tap, "BChw", kind="floating", like=like, hint=hint, **sizes | {"C": C})
        sizes |= {axis: size for axis, size in zip("BChw", shape, strict=True) if axis in shared}


def outside_unit(x: Tensor) -> Tensor:
    """Return where x leaves [0, 1] by more than the rounding of half precision or of a resize, or is no number."""
    return ~((x >= -_SLACK) & (x <= 1 + _SLACK))


def as_tensor(name: str, value: ArrayLike | Tensor) -> Tensor:
    """Return what numpy makes of `value`, as a tensor of its own on the CPU; raises TypeError unless it is numbers."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    array = np.array(value)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold numbers, but is an array of dtype {array.dtype}.")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))  # PNGs of 16 bits may differ
