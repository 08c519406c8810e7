"""The permutohedral lattice: Gaussian filtering in a space of a few dimensions, in pure torch."""

from __future__ import annotations

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
            keys, shifts = _pack_keys(corner[:d].long(), rank[:d])
            ordered, order = keys.flatten().sort()
            cells, position, counts = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
        M = len(cells)
        counts = torch.cat([counts, counts.new_zeros(1)])  # one more cell, empty: row M is 0
        self.part_offsets, self.splat_offsets = _parts(counts)
        # Sorted by cell: the points of a cell lie together. M cells, d + 1 corners a point.
        self.splat_points, self.splat_weights = order % P, weights.flatten()[order]  # ((d + 1) P,) each
        corner_cells = torch.empty_like(order).index_put_((order,), position)  # ((d + 1) P,)
        self.slice_cells = corner_cells.view(d + 1, P).mT.contiguous()  # (P, d + 1)
        self.slice_weights = weights.mT.contiguous() / (1 + 2.0**-d)
        self.blur_cells = torch.stack([_neighbours(cells, shift) for shift in shifts])  # (d + 1, M + 1, 3)
        self.blur_weights = weights.new_tensor([1.0, 0.5, 0.5]).repeat(M + 1, 1)

    def filter(self, values: Tensor) -> Tensor:
        """Return the filtered values, (P, C) -> (P, C), differentiable, in float32 for half precision."""
        hint = "One row a point of the features."
        check_tensor("values", values, "PC", like=self.slice_weights, hint=hint, P=len(self.slice_cells))
        filtered: Tensor = _Filter.apply(promote(values), self, False)
        return filtered


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
    down, up = (point / (d + 1)).floor() * (d + 1), (point / (d + 1)).ceil() * (d + 1)
    corner = torch.where(up - point < point - down, up, down)
    rest = point - corner
    first = torch.ones(d + 1, d + 1, dtype=torch.bool, device=point.device).tril(-1)[:, :, None]  # of equal ones
    before = (rest > rest[:, None]) | ((rest == rest[:, None]) & first)  # (d + 1, d + 1, P)
    off_plane = (corner.sum(0) / (d + 1)).round().long()  # (P,): by so many steps rounding left it
    rank = before.sum(1) + off_plane
    wrap = (d + 1) * ((rank < 0).long() - (rank > d).long())
    return corner + wrap, rank + wrap


def _barycentric_weights(point: Tensor, corner: Tensor, rank: Tensor) -> Tensor:
    """Return the weights of the corners of remainder 0 to d: differences of the rests, in the order of their ranks."""
    d = len(point) - 1
    ordered = torch.empty_like(point).scatter_(0, d - rank, (point - corner) / (d + 1))
    weights = ordered - ordered.roll(1, 0)
    weights[0] += 1
    return weights


def _pack_keys(corner: Tensor, rank: Tensor) -> tuple[Tensor, list[int]]:
    """Return one int64 for each corner of each simplex (d + 1, P), and what a step along each axis adds to it."""
    d = len(corner)
    margin = 2 * (d + 1)  # room for the other corners and their neighbours: no two cells share a key
    lowest, highest = corner.amin(1) - margin, corner.amax(1) + margin
    spans = (highest - lowest + 1).tolist()
    if prod(spans) >= 2**63:
        raise ValueError(
            f"features must span few enough cells that their keys fit 63 bits, but span {spans}: "
            "divide them by larger scales (sxy, srgb)."
        )
    strides = [prod(spans[:k]) for k in range(d)]
    stride = torch.tensor(strides, device=corner.device)[:, None]
    origin = ((corner - lowest[:, None]) * stride).sum(0)
    keys = [origin + r * sum(strides) - (d + 1) * (stride * (rank > d - r)).sum(0) for r in range(d + 1)]
    return torch.stack(keys), [(d + 1) * s - sum(strides) for s in [*strides, 0]]


def _parts(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the offsets of the parts in every cell, and of the points in every part, each with its end.

    Ten thousand points may fall into one cell of a smooth image, and a GPU has one thread for each sum.
    """
    parts = (counts + _PART - 1) // _PART
    offsets = torch.cat([parts.new_zeros(1), parts.cumsum(0)])
    cell = torch.repeat_interleave(parts)
    before = torch.arange(len(cell), device=counts.device) - offsets[cell]
    ends = counts.cumsum(0)
    return offsets, torch.cat([(ends - counts)[cell] + _PART * before, ends[-1:]])


def _neighbours(cells: Tensor, shift: int) -> Tensor:
    """Return rows (M + 1, 3): the cell and its two neighbours, M where there is none."""
    M = len(cells)
    wanted = torch.stack([cells, cells + shift, cells - shift], dim=1)
    found = torch.searchsorted(cells, wanted).clamp(max=M - 1)
    rows = found.where(cells[found] == wanted, M)
    return torch.cat([rows, rows.new_full((1, 3), M)])
