"""Simplices and their keys; the lattice's own test compares all of it with a slow one."""

from __future__ import annotations

from math import sqrt

import pytest
import torch

from pixelss._simplices import corner_keys, enclosing_simplex, keys_of, strides_of_keys


def corners(corner: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """Return the coordinates (remainder, d + 1, P): from corner to corner all grow by 1, one falls by d + 1."""
    d = len(corner) - 1
    return torch.stack([corner + r - (d + 1) * (rank > d - r) for r in range(d + 1)])


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("spread", [0.3, 20.0])
def test_points_are_the_weighted_means_of_their_corners(d, spread):
    features = spread * torch.randn(200, d, dtype=torch.float64)
    corner, rank, weights = enclosing_simplex(features)
    assert (weights > -1e-9).all()
    torch.testing.assert_close(weights.sum(0), torch.ones(200, dtype=torch.float64))
    assert (rank.sort(0).values == torch.arange(d + 1)[:, None]).all()
    at = corners(corner, rank.long())
    assert (at.sum(1) == 0).all()  # on the plane
    assert (at % (d + 1) == torch.arange(d + 1)[:, None, None]).all()
    mean = (weights[:, None] * at).sum(0)
    # An isometry of the features, times (d + 1) sqrt(2 / 3)
    torch.testing.assert_close(torch.pdist(mean.T), (d + 1) * sqrt(2 / 3) * torch.pdist(features))


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("spread", range(1, 7))
def test_a_cell_has_one_key_and_a_key_one_cell(d, spread):
    corner, rank, _ = enclosing_simplex(spread * torch.rand(3000, d))  # most cells of a box
    *strides, count = strides_of_keys(corner[:d])
    keys = corner_keys(corner, rank, strides, count).flatten()
    cells = corners(corner, rank.long()).transpose(1, 2).flatten(0, 1).long()
    both = torch.cat([keys[:, None], cells], dim=1)
    assert len(both.unique(dim=0)) == len(keys.unique()) == len(cells.unique(dim=0))
    assert keys.max() < count


def test_keys_are_as_wide_as_the_cells_need():
    side = 50_000  # between 2^31 and 2^32 cells
    place = torch.tensor([[0.0, side], [0.0, side]])
    assert keys_of(place, [1, side + 1], (side + 1) ** 2).tolist() == [0, side + (side + 1) * side]
    assert keys_of(place, [1, 2], 4 * side).dtype == torch.int32
