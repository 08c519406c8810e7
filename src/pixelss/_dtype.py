"""Floating-point habits of every block: float32 for half precision, no autocast inside, finite activations."""

from __future__ import annotations

import torch
from torch import Tensor


def promote(x: Tensor) -> Tensor:
    """Return `x` in float32, or unchanged where it is float32 or float64 already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def full_precision(x: Tensor) -> torch.autocast:
    """Return a context in which the user's autocast does not round products on `x`'s device."""
    return torch.autocast(x.device.type, enabled=False)


def activation(cam: Tensor) -> Tensor:
    """Return `cam`, promoted, with 0 where it is not finite: such a value is no activation."""
    return promote(cam).nan_to_num(0, 0, 0)
