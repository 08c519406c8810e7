"""IRNet's affinity: two cells belong together unless a boundary lies on the path between them."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from pixelss._checks import check_tensor
from pixelss._dtype import promote
from pixelss._pairs import Offsets, pair_offsets, shifted
from pixelss._pieces import entries_at_a_time


def path_affinity(boundary: Tensor, *, radius: int = 5) -> Tensor:
    """Return 1 - the largest boundary on the path between the cells of every pair.

    The path holds the cells of the pair's bounding box that lie less than 1 from the straight line between the two,
    ends included. Outside the map is boundary: affinity 0.

    Args:
        boundary: probability that a cell lies on a boundary between classes, in [0, 1].
        radius: of `pair_offsets`; IRNet trains with 10 and walks with 5.

    Shape:
        (B, 1, h, w) -> (B, O, h, w): entry o at cell p is the affinity of p and p + pair_offsets(radius)[o], as
        `affinity_loss` and `random_walk` take it; float32 for half precision. IRNet walks with scores times
        (1 - boundary), beta 10, 2^8 steps.

    Raises:
        TypeError, ValueError: a boundary of another rank or dtype; `radius` out of range.

    Reference:
        Ahn 2019, "Weakly Supervised Learning of Instance Segmentation", its affinity.

    Example:
        >>> boundary = torch.tensor([[[[0.0, 0.1, 0.9, 0.0]]]])
        >>> path_affinity(boundary, radius=2)[0, 0, 0]  # with the cell to the right
        tensor([0.9000, 0.1000, 0.1000, 0.0000])
    """
    paths = tuple(_path(dy, dx) for dy, dx in pair_offsets(radius))
    check_tensor("boundary", boundary, "BChw", hint="One channel: take its sigmoid if it holds logits.", C=1)
    affinity: Tensor = _PathAffinity.apply(promote(boundary)[:, 0], paths, radius)
    return affinity


class _PathAffinity(torch.autograd.Function):
    """The affinities; what waits for the gradient is where on its path every pair has its maximum, a byte a pair."""

    @staticmethod
    def forward(ctx: Any, boundary: Tensor, paths: tuple[Offsets, ...], radius: int) -> Tensor:
        cells = _cells(radius)
        at = dict(zip(cells, shifted(boundary, cells, outside=1.0), strict=True))
        largest, places = [boundary] * len(paths), [boundary] * len(paths)
        for length in {len(path) for path in paths}:  # paths of one length are looked at together
            those = [o for o, path in enumerate(paths) if len(path) == length]
            count = max(1, entries_at_a_time(boundary) // max(1, length * boundary.numel()))
            for some in (those[i : i + count] for i in range(0, len(those), count)):
                values = torch.stack([at[cell] for o in some for cell in paths[o]])
                maxima, indices = values.view(len(some), length, *boundary.shape).max(1)
                for o, maximum, index in zip(some, maxima, indices.to(torch.uint8), strict=True):
                    largest[o], places[o] = maximum, index
        ctx.paths, ctx.radius = paths, radius
        ctx.save_for_backward(torch.stack(places))
        return 1 - torch.stack(largest, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (places,), paths, radius = ctx.saved_tensors, ctx.paths, ctx.radius
        B, _, h, w = grads[0].shape
        number = {cell: i for i, cell in enumerate(_cells(radius))}
        longest = max(map(len, paths))
        table = torch.tensor([[number[cell] for cell in path] + [0] * (longest - len(path)) for path in paths])
        table = table.to(places.device, non_blocking=True)  # numbers of the paths' cells
        slopes = grads[0].new_zeros(len(number), B, h, w)
        count = max(1, entries_at_a_time(slopes) // max(1, longest * B * h * w))
        pieces = (x.split(count) for x in (table, places.flatten(1), grads[0].transpose(0, 1)))
        for numbers, place, grad in zip(*pieces, strict=True):
            at = numbers.gather(1, place.long()).view(grad.shape)
            for cell, slope in zip(at.split(1), grad.split(1), strict=True):
                slopes.scatter_add_(0, cell, slope)  # a path's do not meet: the order is fixed
        slopes = slopes.view(radius, 2 * radius - 1, B, h, w)
        by_row = slopes.new_zeros(radius, B, h, w + 2 * radius - 2)
        for i, column in enumerate(slopes.unbind(1)):
            by_row[..., i : i + w] += column
        gradient = slopes.new_zeros(B, h + radius - 1, w)
        for i, row in enumerate(by_row[..., radius - 1 : radius - 1 + w]):
            gradient[:, i : i + h] += row
        return -gradient[:, :h], None, None


def _cells(radius: int) -> Offsets:
    """Return the cells of all paths."""
    return tuple(product(range(radius), range(1 - radius, radius)))


def _path(dy: int, dx: int) -> Offsets:
    """Return the cells between (0, 0) and (dy, dx), both included."""
    rows, columns = range(dy + 1), range(min(0, dx), max(0, dx) + 1)
    return tuple((y, x) for y, x in product(rows, columns) if (dy * x - dx * y) ** 2 < dy**2 + dx**2)
