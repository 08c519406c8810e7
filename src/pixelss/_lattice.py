"""The permutohedral lattice: Gaussian filtering in a space of a few dimensions, in pure torch."""

from __future__ import annotations

from copy import copy
from itertools import combinations
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from pixelss._checks import check_tensor
from pixelss._dtype import promote

_PART = 64  # points that are summed one after the other


class PermutohedralLattice:
    """Gaussian filter of unit standard deviation in a feature space, in time linear in the points.

    Points are splatted with barycentric weights onto the d + 1 corners of their simplex, corners are blurred by
    [1/2, 1, 1/2] along the d + 1 axes, and points read back, times 1 / (1 + 2^-d). Not normalised: divide by the
    response to ones, or as `dense_crf` does. Build it once; `filter` any values at the same points.

    Args:
        features: the points, finite, each coordinate divided by the standard deviation wanted along it.

    Shape:
        (P, d); `filter` takes (P, C) -> (P, C).

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; no point; features that are not
            finite, or span so many cells that their keys do not fit 63 bits.

    Reference:
        Adams 2010, "Fast High-Dimensional Filtering Using the Permutohedral Lattice".

    Example:
        >>> lattice = PermutohedralLattice(torch.rand(50, 5))
        >>> values = torch.rand(50, 3)
        >>> (lattice.filter(values) / lattice.filter(torch.ones(50, 1))).shape
        torch.Size([50, 3])
    """

    def __init__(self, features: Tensor) -> None:
        P, d = check_tensor("features", features, "Pd")
        if P == 0:
            raise ValueError(f"features must hold at least one point, but has shape {tuple(features.shape)}.")
        features = promote(features.detach())
        limit = 0.01 / torch.finfo(features.dtype).eps  # beyond, rounding eats the barycentric weights
        if not (features.abs() <= limit).all():
            largest = features.abs().max().item()
            raise ValueError(
                f"features must be finite and within +-{limit:.3g}, but reach {largest:.3g}: "
                "divide them by larger scales (sxy, srgb)."
            )
        with torch.no_grad():
            corner, rank, weights = _enclosing_simplex(features)
            strides, shifts = _strides(corner[:d])
            # A corner of remainder 0 and the ranks name a simplex; many points share one. U simplices, M cells.
            order, simplex, sizes, _ = _group(_keys(corner[:d] + rank[:d], strides))
            one = order[sizes.cumsum(0) - sizes]  # a point of each
            keys = _corner_keys(corner.index_select(1, one), rank.index_select(1, one), strides)  # (d + 1, U)
            pairs, cell, shared, cells = _group(keys.flatten())  # pairs of a remainder and a simplex, by cell
        entry, ends = _by_cell(sizes, pairs, P)
        self.splat_points = order.repeat(d + 1).index_select(0, entry)  # ((d + 1) P,)
        self.splat_weights = weights.index_select(1, order).flatten().index_select(0, entry)
        ends = torch.cat([ends.new_zeros(1), ends[shared.cumsum(0) - 1], ends[-1:]])  # one more cell, empty: row M is 0
        self.part_offsets, self.splat_offsets = _parts(ends)
        corner_cells = torch.empty_like(cell).index_put_((pairs,), cell).view_as(keys).mT.contiguous()
        self.slice_cells = corner_cells.index_select(0, torch.empty_like(order).index_put_((order,), simplex))
        self.slice_weights = weights.mT.contiguous() / (1 + 2.0**-d)  # (P, d + 1)
        self.blur_cells = torch.stack([_neighbours(cells, shift) for shift in shifts])  # (d + 1, M + 1, 3)
        self.blur_weights = weights.new_tensor([1.0, 0.5, 0.5]).repeat(len(cells) + 1, 1)

    def filter(self, values: Tensor) -> Tensor:
        """Return the filtered values, (P, C) -> (P, C), differentiable, in float32 for half precision."""
        hint = "One row a point of the features."
        check_tensor("values", values, "PC", like=self.slice_weights, hint=hint, P=len(self.slice_cells))
        filtered: Tensor = _Filter.apply(promote(values), self, False)
        return filtered

    def scaled(self, scale: Tensor) -> PermutohedralLattice:
        """Return the lattice that scales its values by `scale` (P,), before it filters them and after."""
        lattice = copy(self)
        lattice.splat_weights = self.splat_weights * scale[self.splat_points]
        lattice.slice_weights = self.slice_weights * scale[:, None]
        return lattice


class _Filter(torch.autograd.Function):
    """The filter is slice @ blur @ splat; its transpose is the same with the axes' order reversed."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, lattice: PermutohedralLattice, reverse: bool) -> Tensor:
        ctx.lattice, ctx.reverse = lattice, reverse
        splat, blur, cut = (
            w.to(values.dtype) for w in (lattice.splat_weights, lattice.blur_weights, lattice.slice_weights)
        )
        points, offsets = lattice.splat_points, lattice.splat_offsets
        parts = embedding_bag(
            points, values.contiguous(), offsets, mode="sum", per_sample_weights=splat, include_last_offset=True
        )
        rows = torch.arange(len(parts), device=parts.device)
        table = embedding_bag(rows, parts, lattice.part_offsets, mode="sum", include_last_offset=True)  # (M + 1, C)
        for cells in lattice.blur_cells.flip(0) if reverse else lattice.blur_cells:
            table = embedding_bag(cells, table, mode="sum", per_sample_weights=blur)
        return embedding_bag(lattice.slice_cells, table, mode="sum", per_sample_weights=cut)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad: Tensor = _Filter.apply(grads[0], ctx.lattice, not ctx.reverse)
        return grad, None, None


def _enclosing_simplex(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return remainder-0 corner, ranks and barycentric weights, each (d + 1, P), of the simplex around every point."""
    point = _elevate(features)
    corner, rank = _nearest_corner(point)
    return corner, rank, _barycentric_weights(point, corner, rank)


def _elevate(features: Tensor) -> Tensor:
    """Return the points (P, d) on the plane of d + 1 coordinates that sum to 0, (d + 1, P)."""
    d = features.shape[1]
    total = torch.zeros_like(features[:, 0])
    elevated = [total] * (d + 1)
    for j in range(d, 0, -1):
        # In this order, as the C++ code: a sum rounded otherwise may fall into another simplex.
        scaled = features[:, j - 1] * ((2 / 3) ** 0.5 * (d + 1) / (j * (j + 1)) ** 0.5)
        elevated[j] = total - j * scaled
        total = total + scaled
    elevated[0] = total
    return torch.stack(elevated)


def _nearest_corner(point: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest corner whose coordinates are multiples of d + 1, and each coordinate's rank by its rest."""
    d = len(point) - 1
    corner, rest = torch.empty_like(point), torch.empty_like(point)
    for j, coordinate in enumerate(point):  # one by one: what is at work fits a cache
        scaled = coordinate / (d + 1)
        down, up = scaled.floor() * (d + 1), scaled.ceil() * (d + 1)
        torch.where(up - coordinate < coordinate - down, up, down, out=corner[j])
        torch.sub(coordinate, corner[j], out=rest[j])
    off_plane = (corner.sum(0) / (d + 1)).round().to(torch.int8)  # by so many steps rounding left it
    rank = off_plane + torch.arange(d + 1, dtype=torch.int8, device=point.device)[:, None]
    for i, j in combinations(range(d + 1), 2):
        later = (rest[j] > rest[i]).view(torch.int8)  # of equal ones the first is before
        rank[i] += later
        rank[j] -= later
    wrap = (d + 1) * ((rank < 0).view(torch.int8) - (rank > d).view(torch.int8))
    return corner.add_(wrap), rank.add_(wrap)


def _barycentric_weights(point: Tensor, corner: Tensor, rank: Tensor) -> Tensor:
    """Return the weights of the corners of remainder 0 to d: differences of the rests, in the order of their ranks."""
    d = len(point) - 1
    ordered = torch.empty_like(point).scatter_(0, (d - rank).long(), (point - corner) / (d + 1))
    weights = ordered - ordered.roll(1, 0)
    weights[0] += 1
    return weights


def _strides(corner: Tensor) -> tuple[list[int], list[int]]:
    """Return what each of d coordinates counts in a cell's key, and what a step along each of d + 1 axes adds to it."""
    d = len(corner)
    margin = 2 * (d + 1)  # room for the other corners and their neighbours: no two cells share a key
    lowest, highest = corner.amin(1) - margin, corner.amax(1) + margin
    spans = (highest - lowest + 1).long().tolist()
    if prod(spans) >= 2**63:
        raise ValueError(
            f"features must span few enough cells that their keys fit 63 bits, but span {spans}: "
            "divide them by larger scales (sxy, srgb)."
        )
    strides = [prod(spans[:k]) for k in range(d)]
    return strides, [(d + 1) * s - sum(strides) for s in [*strides, 0]]


def _keys(corner: Tensor, strides: list[int]) -> Tensor:
    """Return an int64 for the coordinates (d, P) of each of P cells."""
    key = torch.zeros(corner.shape[1], dtype=torch.long, device=corner.device)
    for coordinate, stride in zip(corner, strides, strict=True):
        key += (coordinate - coordinate.min()).long() * stride
    return key


def _corner_keys(corner: Tensor, rank: Tensor, strides: list[int]) -> Tensor:
    """Return an int64 for each corner, by remainder, of each simplex, (d + 1, U)."""
    d = len(strides)
    # From remainder r to r + 1 all coordinates grow by 1, and that of rank d - r falls by d + 1.
    steps = sum(strides) - (d + 1) * torch.tensor([*strides, 0], device=corner.device)[:, None].expand(rank.shape)
    keys = torch.empty(rank.shape, dtype=torch.long, device=corner.device)
    keys.scatter_(0, torch.where(rank > 0, d + 1 - rank, 0).long(), steps)
    keys[0] = _keys(corner[:d], strides)
    return keys.cumsum(0)


def _group(keys: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the order that sorts the keys, the group of each in that order, and each group's size and key."""
    ordered, order = keys.sort()
    groups, position, sizes = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    return order, position, sizes, groups


def _by_cell(sizes: Tensor, pairs: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Return, cell after cell, which of remainder * points + (place of a point sorted by simplex) lie in it.

    Args:
        sizes: points of each of U simplices.
        pairs: remainder * U + simplex, by cell.
        points: of all simplices.

    Returns:
        The entries, and where the run of each pair ends among them.
    """
    remainder = pairs.div(len(sizes), rounding_mode="floor")
    simplex = pairs - remainder * len(sizes)
    counts = sizes[simplex]
    ends = counts.cumsum(0)
    begins = (sizes.cumsum(0) - sizes)[simplex] + remainder * points
    steps = torch.ones(points * (len(pairs) // len(sizes)), dtype=torch.long, device=sizes.device)
    steps[ends - counts] = begins - torch.cat([begins.new_zeros(1), (begins + counts - 1)[:-1]])
    return torch.cumsum(steps, 0, out=steps), ends


def _parts(ends: Tensor) -> tuple[Tensor, Tensor]:
    """Return the offsets of the parts in every cell, and of the points in every part, each with its end.

    Ten thousand points may fall into one cell of a smooth image, and a GPU has one thread for each sum.

    Args:
        ends: where the points of a cell begin, and where those of the last end.
    """
    parts = (ends.diff() + _PART - 1) // _PART
    offsets = torch.cat([parts.new_zeros(1), parts.cumsum(0)])
    cell = torch.repeat_interleave(parts)
    before = torch.arange(len(cell), device=ends.device) - offsets[cell]
    return offsets, torch.cat([ends[cell] + _PART * before, ends[-1:]])


def _neighbours(cells: Tensor, shift: int) -> Tensor:
    """Return rows (M + 1, 3): the cell and its two neighbours, M where there is none."""
    M = len(cells)
    rows = torch.arange(M + 1, device=cells.device)
    found = torch.searchsorted(cells, cells + shift).clamp(max=M - 1)
    after = rows.new_full((M + 1,), M)
    after[:M] = found.where(cells[found] == cells + shift, M)
    before = torch.full_like(after, M).index_put_((after,), rows)
    before[M] = M  # where those without a neighbour wrote
    return torch.stack([rows, after, before], dim=1)
