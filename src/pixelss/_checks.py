"""Argument checks whose messages carry every fact: the argument, what it must be, what it was, the fix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

TAGS_HINT = "Tags are multi-hot over the foreground classes, without a background column."
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
    fix = f" {hint}" if hint else ""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, but is of type {type(value).__name__}.")
    expected = ", ".join(f"{a}={sizes[a]}" if a in sizes else a for a in axes)
    if value.ndim != len(axes):
        raise ValueError(f"{name} must have shape ({expected}), but has shape {tuple(value.shape)}.{fix}")
    for axis, size in zip(axes, value.shape, strict=True):
        if size != sizes.get(axis, size) or (size == 0 and axis not in "BP"):
            was = f"has shape {tuple(value.shape)}: {axis} is {size}"
            raise ValueError(f"{name} must have shape ({expected}), but {was}.{fix}")
    if not _is_kind(value.dtype, kind):
        raise TypeError(f"{name} must be of {kind} dtype, but is {value.dtype}.{_CASTS[kind]}")
    if like is not None and value.device != like.device:
        raise ValueError(
            f"{name} must lie on {like.device}, but lies on {value.device}: move it, or what it meets, by .to(device)."
        )
    return tuple(value.shape)


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
    shapes = []
    for i, one in enumerate(maps):
        shape = check_tensor(f"{name}[{i}]", one, axes, kind="floating", like=like, hint=hint, **sizes)
        sizes |= {axis: size for axis, size in zip(axes, shape, strict=True) if axis in shared}
        like = one
        shapes.append(shape)
    return shapes[0]


def check_sequence(name: str, value: Sequence[object], of: str) -> None:
    """Raise unless `value` is a sequence with an entry or more; `of` says of what, as in "ints, one a tap"."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be a sequence of {of}, but is of type {type(value).__name__}.")
    if len(value) == 0:
        raise ValueError(f"{name} must be a sequence of {of}, but is empty.")


def check_scales(scales: Sequence[float]) -> None:
    """Raise unless `scales` holds one positive factor of the image size or more."""
    check_sequence("scales", scales, "factors of the image size")
    for i, scale in enumerate(scales):
        check_number(f"scales[{i}]", scale, low=1e-3, high=1e3)


def _is_kind(dtype: torch.dtype, kind: str) -> bool:
    is_bool, is_floating = dtype == torch.bool, dtype.is_floating_point
    is_integer = not (is_bool or is_floating or dtype.is_complex)
    kinds = {"floating": is_floating, "integer": is_integer, "bool": is_bool, "any": not dtype.is_complex}
    return kinds[kind]


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, but is {value!r}.")


def check_number(name: str, value: float, *, low: float, high: float) -> None:
    """Raise unless `value` is a number with low <= value <= high (NaN fails)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, but is of type {type(value).__name__}.")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, but is {value}.")


def check_integer(name: str, value: int) -> None:
    """Raise unless `value` is an integer."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, but is of type {type(value).__name__}.")


def check_count(name: str, value: int) -> None:
    """Raise unless `value` is an integer of at least 1."""
    check_integer(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, but is {value}.")
