"""The permutohedral lattice: Gaussian filtering in a space of a few dimensions, in pure torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixelss._checks import check_tensor
from pixelss._dtype import promote
from pixelss._graphs import outside_graphs
from pixelss._pieces import launches_cost
from pixelss._simplices import corner_keys, enclosing_simplex, narrow, simplex_keys, strides_of_keys
from pixelss._sums import offsets_of, sums

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
        P, _ = check_tensor("features", features, "Pd")
        if P == 0:
            raise ValueError(f"features must hold at least one point, but has shape {tuple(features.shape)}.")
        features = promote(features.detach())
        limit = 0.01 / torch.finfo(features.dtype).eps  # beyond, rounding eats the barycentric weights
        if not torch.stack([-features.amin(), features.amax()]).max() <= limit:  # of a NaN too
            largest = features.abs().max().item()
            raise ValueError(
                f"features must be finite and within +-{limit:.3g}, but reach {largest:.3g}: "
                "divide them by larger scales (sxy, srgb)."
            )
        self._build(features)

    @outside_graphs  # it takes a minute, and gains nothing
    def _build(self, features: Tensor) -> None:
        P, d = features.shape
        corner, rank, weights = enclosing_simplex(features)
        # A corner of remainder 0 and the ranks name a simplex; many points share one. U simplices, M cells.
        order, simplex, sizes, _ = _group(simplex_keys(corner[:d], rank[:d]))
        one = order.index_select(0, sizes.cumsum(0) - sizes)  # a point of each
        *strides, count = strides_of_keys(corner[:d])
        shifts = [(d + 1) * stride - sum(strides) for stride in [*strides, 0]]  # of keys, along d + 1 axes
        keys = corner_keys(corner.index_select(1, one), rank.index_select(1, one), strides, count)  # (d + 1, U)
        del corner, rank, one  # a quarter of what is at hand
        pairs, cell, shared, cells = _group(keys.flatten())  # pairs of a remainder and a simplex, by cell
        self.slice_weights = torch.div(weights.mT, 1 + 2.0**-d, out=weights.new_empty(P, d + 1))
        weights = weights.index_select(1, order)
        entry, ends = _by_cell(sizes, pairs, P)
        index = entry.dtype
        self.splat_weights = weights.flatten().index_select(0, entry)  # ((d + 1) P,)
        del weights
        self.splat_points = order.to(index).repeat(d + 1).index_select(0, entry)
        del entry
        ends = torch.cat([ends.new_zeros(1), ends[shared.cumsum(0) - 1], ends[-1:]])  # one more cell, empty: row M is 0
        self.cell_offsets = ends
        self.parts = _parts(ends) if launches_cost(features) else None
        corner_cells = torch.empty_like(cell).index_copy_(0, pairs, cell).to(index).view_as(keys).mT.contiguous()
        self.slice_cells = corner_cells.index_select(0, torch.empty_like(order).index_copy_(0, order, simplex))
        self.slice_offsets = offsets_of(self.slice_cells)
        self.blur_cells = [_neighbours(cells, shift, index) for shift in shifts]  # d + 1 of (M + 1, 3)

    def filter(self, values: Tensor) -> Tensor:
        """Return the filtered values, (P, C) -> (P, C), differentiable, in float32 for half precision."""
        hint = "One row a point of the features."
        check_tensor("values", values, "PC", like=self.slice_weights, hint=hint, P=len(self.slice_cells))
        return filtered(self, promote(values))

    def scale_(self, scale: Tensor) -> None:
        """Let the lattice scale its values by `scale` (P,), before it filters them and after."""
        self.splat_weights *= scale.index_select(0, self.splat_points)
        self.slice_weights *= scale[:, None]


def filtered(lattice: PermutohedralLattice, values: Tensor, reverse: bool = False) -> Tensor:
    """Return what the lattice's filter, or its transpose, makes of the values (P, C), differentiable."""
    result: Tensor = _Filter.apply(values, lattice, reverse)
    return result


def joined(lattices: Sequence[PermutohedralLattice]) -> PermutohedralLattice:
    """Return the lattice whose filter is the sum of theirs, at one set of points, and takes less time.

    Of several that of most axes becomes it, array by array: what it held is free for the next.
    """
    lattices = sorted(lattices, key=lambda lattice: len(lattice.blur_cells), reverse=True)
    lattice = lattices[0]
    if len(lattices) == 1:
        return lattice
    sizes = [len(one.cell_offsets) - 1 for one in lattices]  # cells, each with its empty one
    before = [sum(sizes[:i]) for i in range(len(sizes))]
    index = narrow(sum(len(one.splat_points) for one in lattices))
    lattice.splat_points = torch.cat([one.splat_points for one in lattices]).to(index)
    lattice.splat_weights = torch.cat([one.splat_weights for one in lattices])
    lattice.cell_offsets = _chain([one.cell_offsets for one in lattices]).to(index)
    of_all = [one.parts for one in lattices if one.parts]
    if of_all:
        of_parts, offsets = (_chain(list(of_each)).to(index) for of_each in zip(*of_all, strict=True))
        lattice.parts = of_parts, offsets
    cells = (one.slice_cells + n if n else one.slice_cells for one, n in zip(lattices, before, strict=True))
    lattice.slice_cells = torch.cat(list(cells), dim=1).to(index)
    lattice.slice_weights = torch.cat([one.slice_weights for one in lattices], dim=1)
    lattice.slice_offsets = offsets_of(lattice.slice_cells)
    # Those of most axes are first, so that the other axes blur the first rows of the table alone.
    axes = zip_longest(*(one.blur_cells for one in lattices))
    lattice.blur_cells = [
        torch.cat([cells + n for cells, n in zip(axis, before, strict=True) if cells is not None]).to(index)
        for axis in axes
    ]
    return lattice


class _Filter(torch.autograd.Function):
    """The filter is slice @ blur @ splat; its transpose is the same with the axes' order reversed."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, lattice: PermutohedralLattice, reverse: bool) -> Tensor:
        ctx.lattice, ctx.reverse = lattice, reverse
        return _read(lattice, _blurred(lattice, values, reverse))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return filtered(ctx.lattice, grads[0], not ctx.reverse), None, None


def _blurred(lattice: PermutohedralLattice, values: Tensor, reverse: bool) -> Tensor:
    """Return the table of the lattice's M cells, and of an empty one, of the values (P, C), (M + 1, C)."""
    weights = lattice.splat_weights.to(values.dtype)
    if lattice.parts:
        of_parts, offsets = lattice.parts
        parts = sums(values.contiguous(), lattice.splat_points, offsets, weights)
        table = sums(parts, torch.arange(len(parts), dtype=of_parts.dtype, device=parts.device), of_parts)
    else:
        table = sums(values.contiguous(), lattice.splat_points, lattice.cell_offsets, weights)
    weights = values.new_full((len(table), 3), 0.5)
    weights[:, 0] = 1
    offsets = offsets_of(lattice.blur_cells[0])  # no later axis has more cells
    for cells in reversed(lattice.blur_cells) if reverse else lattice.blur_cells:
        n = len(cells)
        blurred = sums(table[:n], cells.view(-1), offsets[: n + 1], weights[:n].view(-1))
        if n == len(table):
            table = blurred
        else:
            table[:n] = blurred
    return table


def _read(lattice: PermutohedralLattice, table: Tensor) -> Tensor:
    """Return what the points read from the table, (P, C)."""
    weights = lattice.slice_weights.to(table.dtype)
    return sums(table, lattice.slice_cells.view(-1), lattice.slice_offsets, weights.view(-1))


def _group(keys: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the order that sorts the keys, the group of each in that order, and each group's size and key."""
    ordered, order = _sorted(keys)
    groups, position, sizes = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    return order, position, sizes, groups


def _sorted(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys, none below 0, sorted, and the order that sorts them."""
    bits = len(keys).bit_length()
    if keys.device.type != "cpu" or keys.max().item() >= 2 ** (63 - bits):
        return keys.sort(stable=True)
    # numpy sorts 64 bits, the key's and the place's, in a fifth of the time that torch takes.
    both = (keys.long() << bits).add_(torch.arange(len(keys), device=keys.device))
    both.numpy().sort()
    return both >> bits, both & 2**bits - 1


def _by_cell(sizes: Tensor, pairs: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Return, cell after cell, which of remainder * points + (place of a point sorted by simplex) lie in it.

    Args:
        sizes: points of each of U simplices.
        pairs: remainder * U + simplex, by cell.
        points: of all simplices.

    Returns:
        The entries, and where the run of each pair ends among them.
    """
    total = points * (len(pairs) // len(sizes))
    pairs, sizes = (x.to(narrow(max(total, len(pairs)))) for x in (pairs, sizes))
    remainder = pairs.div(len(sizes), rounding_mode="floor")
    simplex = pairs - remainder * len(sizes)
    counts = sizes.index_select(0, simplex)
    ends = counts.cumsum(0, dtype=counts.dtype)
    begins = (sizes.cumsum(0, dtype=sizes.dtype) - sizes).index_select(0, simplex) + remainder * points
    steps = torch.ones(total, dtype=counts.dtype, device=sizes.device)
    jumps = begins - torch.cat([begins.new_zeros(1), (begins + counts - 1)[:-1]])
    return torch.cumsum(steps.index_copy_(0, (ends - counts).long(), jumps), 0, out=steps), ends


def _parts(ends: Tensor) -> tuple[Tensor, Tensor]:
    """Return the offsets of the parts in every cell, and of the points in every part, each with its end.

    Ten thousand points may fall into one cell of a smooth image, and a GPU has one thread for each sum.

    Args:
        ends: where the points of a cell begin, and where those of the last end.
    """
    parts = (ends.diff() + _PART - 1) // _PART
    offsets = torch.cat([parts.new_zeros(1), parts.cumsum(0, dtype=parts.dtype)])
    cell = torch.repeat_interleave(parts)
    before = torch.arange(len(cell), dtype=ends.dtype, device=ends.device) - offsets.index_select(0, cell)
    return offsets, torch.cat([ends.index_select(0, cell) + _PART * before, ends[-1:]])


def _chain(offsets: list[Tensor]) -> Tensor:
    """Return one list of offsets, each with its end, of several whose bags come one after the other."""
    ends = torch.stack([one[-1] for one in offsets]).cumsum(0)  # in 64 bits
    starts = [one[:-1] + (end - one[-1]) for one, end in zip(offsets, ends, strict=True)]
    return torch.cat([*starts, ends[-1:]])


def _neighbours(cells: Tensor, shift: int, index: torch.dtype) -> Tensor:
    """Return rows (M + 1, 3): the cell and its two neighbours, M where there is none."""
    M = len(cells)
    rows = torch.arange(M + 1, dtype=index, device=cells.device)
    neighbours = torch.stack([rows, torch.full_like(rows, M), torch.full_like(rows, M)], dim=1)
    sought = cells + shift
    found = _places(cells, sought).clamp_(max=M - 1)
    after = torch.where(cells.index_select(0, found) == sought, found, M)
    neighbours[:M, 1] = after
    neighbours[:, 2].index_copy_(0, after, rows[:M])
    neighbours[M, 2] = M  # where those without a neighbour wrote
    return neighbours


def _places(cells: Tensor, sought: Tensor) -> Tensor:
    """Return how many cells are below each of the sought keys; both ascend."""
    if cells.device.type != "cpu":
        return torch.searchsorted(cells, sought)
    # numpy's stable sort merges two ascending runs, in a third of the time of as many searches.
    order = np.concatenate([sought.numpy(), cells.numpy()]).argsort(kind="stable")
    return torch.from_numpy(np.flatnonzero(order < len(sought))) - torch.arange(len(sought), device="cpu")
