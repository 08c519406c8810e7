"""What the loop references of several test files share; a block's own stands in its test file, as `<name>_by_loops`.

They are written from the equations, one pixel, class or scale at a time: they resize features to the image's size
first, as the paper does, and are differentiable, so `assert_matches` compares values and gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
FIELD = Path(__file__).parent / "golden" / "field"


def field(name: str) -> dict[str, Tensor]:
    """Return what a method's public code returned, see golden/field/README.md."""
    with np.load(FIELD / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def value_and_grads(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Return `function(*inputs)` and the gradient of a weighted sum of it with respect to each floating input."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    value = function(*leaves)
    if value.requires_grad:
        weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=value.device)
        (value * weights.view(value.shape)).sum().backward()
    floating = [leaf for leaf in leaves if leaf.is_floating_point()]
    return [value.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in floating)]


def assert_matches(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    *inputs: Tensor,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> None:
    """Check value and gradients of `function` in `dtype` on `device` against `reference` in float64."""
    rounded = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    actual = value_and_grads(function, *(x.to(device) for x in rounded))
    expected = value_and_grads(reference, *(x.double() if x.is_floating_point() else x for x in rounded))
    if actual[0].is_floating_point():
        assert actual[0].dtype == dtype
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], check_dtype=False)


def neighbours(target: int, targets: int, sources: int) -> list[tuple[int, float]]:
    """Return the source cells, with weights, whose centres surround the centre of cell `target` of `targets`."""
    centre = min(max((target + 0.5) * sources / targets - 0.5, 0.0), sources - 1.0)
    low = math.floor(centre)
    return [(low, 1 - (centre - low)), (min(low + 1, sources - 1), centre - low)]


def bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (..., h, w) to (..., H, W), bilinear, align_corners False."""
    rows, columns = (torch.zeros(T, S).to(x) for T, S in zip(size, x.shape[-2:], strict=True))
    for weights in (rows, columns):
        for target in range(len(weights)):
            for cell, weight in neighbours(target, *weights.shape):
                weights[target, cell] += weight
    return rows @ x @ columns.mT


def active(cam: Tensor) -> Tensor:
    """Return the CAM with non-finite values as no activation."""
    return torch.where(cam.isfinite(), cam, 0.0)


def labelled(mask: Tensor, num_classes: int, ignore_index: int = 255) -> Iterator[tuple[int, int, int, int]]:
    """Yield (b, i, j, class) of each pixel that is not void: its class is in 0..num_classes."""
    for b, i, j in product(*map(range, mask.shape)):
        k = int(mask[b, i, j])
        if 0 <= k <= num_classes and k != ignore_index:
            yield b, i, j, k


def unit(x: Tensor, eps: float) -> Tensor:
    """Return x / |x|, or zeros where |x| <= eps."""
    return x / x.square().sum().sqrt() if x.square().sum() > eps**2 else x * 0


def interpolate(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as torch does, bilinear, align_corners False."""
    return functional.interpolate(x, size, mode="bilinear", align_corners=False)


def pair_offsets_by_loops(radius: int) -> list[tuple[int, int]]:
    right = [(0, dx) for dx in range(1, radius)]
    below = [(dy, dx) for dy in range(1, radius) for dx in range(-radius, radius + 1) if dx**2 + dy**2 < radius**2]
    return right + below


def pairs(h: int, w: int, radius: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (offset's index, y, x, v, u) of every pair of cells (y, x) and (v, u) inside the image."""
    for (o, (dy, dx)), y, x in product(enumerate(pair_offsets_by_loops(radius)), range(h), range(w)):
        if 0 <= y + dy < h and 0 <= x + dx < w:
            yield o, y, x, y + dy, x + dx


# refusals

BAD_RADII = [("radius", value, ValueError) for value in (1, 0, -5, 65)]
BAD_RADII += [("radius", value, TypeError) for value in (5.0, "5", True, None)]


def assert_refuses(function, arguments, name, value, error):
    function(**arguments)
    with pytest.raises(error, match=rf"\b{name}\b"):
        function(**arguments | {name: value})


# networks


def data_parallel_replica(module: nn.Module) -> nn.Module:
    """Return what `DataParallel` runs on one GPU of several: its weights are plain attributes, not parameters."""
    twin = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        setattr(twin, name, data_parallel_replica(child))
    twin._parameters = {name: None for name, parameter in module._parameters.items() if parameter is None}
    for name, parameter in module.named_parameters(recurse=False):
        setattr(twin, name, parameter * 1)
    return twin
