"""Bilinear resize (align_corners=False) as two matrix products: deterministic, and easy to transpose."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pixelss._dtype import full_precision, promote


def scaled_side(side: int, scale: float) -> int:
    """Return how many pixels a side of an image has at `scale`: rounded, halves up, at least 1."""
    return max(1, int(side * scale + 0.5))


def resize_matrix(source: int, target: int, like: Tensor) -> Tensor:
    """Return the (target, source) matrix of a bilinear resize along one axis, in `like`'s dtype and device.

    Row p holds the weights of the two source cells nearest to the centre of target cell p; rows sum to 1. It is shared
    by later calls: do not write to it.
    """
    return kept(_resize_matrix, source, target, like)


def _resize_matrix(source: int, target: int, like: Tensor) -> Tensor:
    # Positions in float64: in float32 they drift by 1e-5 of a cell at 500 pixels.
    center = (torch.arange(target, device=like.device, dtype=torch.float64) + 0.5) * (source / target) - 0.5
    center = center.clamp(0, source - 1)
    cells = torch.arange(source, device=like.device, dtype=torch.float64)
    return (1 - (center[:, None] - cells).abs()).clamp(min=0).to(like.dtype)


_Build = Callable[[int, int, Tensor], Tensor]
_KEPT: dict[tuple[_Build, int, int, torch.dtype, torch.device], Tensor] = {}


def kept(build: _Build, source: int, target: int, like: Tensor) -> Tensor:
    """Return `build(source, target, like)`, a matrix of these sizes, dtype and device, and keep it for later calls.

    On a GPU its dozen small kernels would cost more than the product with it.
    """
    if torch.compiler.is_compiling() or type(like) not in (Tensor, nn.Parameter):  # tracing, a FakeTensor
        return build(source, target, like)
    key = (build, source, target, like.dtype, like.device)
    matrix = _KEPT.get(key)
    if matrix is None:
        with torch.inference_mode(False):  # else autograd would refuse it later
            matrix = build(source, target, like)
        # What belongs to a transform of torch.func, a dispatch mode or a CUDA graph does not outlive it.
        inside = type(matrix) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(matrix)
        if not inside and not (like.is_cuda and torch.cuda.is_current_stream_capturing()):
            if len(_KEPT) >= 64:  # images of any size
                _KEPT.clear()
            _KEPT[key] = matrix
    return matrix


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (..., h, w) to (..., H, W), in float32 for half-precision input.

    The numbers are those of `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`; unlike
    its CUDA backward, this one is deterministic. A non-finite value spreads over its whole map.
    """
    x = promote(x)
    (h, w), (H, W) = x.shape[-2:], size
    with full_precision(x):
        if w != W:
            x = x @ resize_matrix(w, W, x).mT
        if h != H:
            x = multiply_rows(resize_matrix(h, H, x), x)
    return x


def resize_back(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the transpose of a `resize` from `size`, of (..., H, W): its gradient."""
    (H, W), (h, w) = x.shape[-2:], size
    with full_precision(x):
        if h != H:
            x = multiply_rows(resize_matrix(h, H, x).mT, x)
        if w != W:
            x = x @ resize_matrix(w, W, x)
    return x


def multiply_rows(matrix: Tensor, x: Tensor) -> Tensor:
    """Return `matrix @ x` of a matrix (H, h) and (..., h, W), which matmul would transpose and copy."""
    maps = x.flatten(0, -3) if x.ndim > 2 else x[None]
    return torch.bmm(matrix.expand(len(maps), -1, -1), maps).view(*x.shape[:-2], *matrix.shape[:1], x.shape[-1])
