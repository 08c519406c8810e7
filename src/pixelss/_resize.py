"""Bilinear resize (align_corners=False) as two matrix products: deterministic, and easy to transpose."""

from __future__ import annotations

import torch
from torch import Tensor

from pixelss._dtype import full_precision, promote


def scaled_side(side: int, scale: float) -> int:
    """Return how many pixels a side of an image has at `scale`: rounded, halves up, at least 1."""
    return max(1, int(side * scale + 0.5))


def resize_matrix(source: int, target: int, like: Tensor) -> Tensor:
    """Return the (target, source) matrix of a bilinear resize along one axis, in `like`'s dtype and device.

    Row p holds the weights of the two source cells nearest to the centre of target cell p; rows sum to 1.
    """
    # Positions in float64: in float32 they drift by 1e-5 of a cell at 500 pixels.
    center = (torch.arange(target, device=like.device, dtype=torch.float64) + 0.5) * (source / target) - 0.5
    center = center.clamp(0, source - 1)
    cells = torch.arange(source, device=like.device, dtype=torch.float64)
    return (1 - (center[:, None] - cells).abs()).clamp(min=0).to(like.dtype)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (..., h, w) to (..., H, W), in float32 for half-precision input.

    The numbers are those of `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`; unlike
    its CUDA backward, this one is deterministic. A non-finite value spreads over its whole map.
    """
    x = promote(x)
    (h, w), (H, W) = x.shape[-2:], size
    with full_precision(x):
        if h != H:
            x = resize_matrix(h, H, x) @ x
        if w != W:
            x = x @ resize_matrix(w, W, x).mT
    return x
