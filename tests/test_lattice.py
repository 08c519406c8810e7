from __future__ import annotations

from math import inf, nan

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelss import PermutohedralLattice
from pixelss._lattice import _places, _sorted
from tests.blocks import Block
from tests.strategies import Batch

SIGNATURES = {
    "PermutohedralLattice": "(features)",
}


def filtered(b: Batch) -> Tensor:
    """All maps of probabilities over the pixels' positions, a channel each, and one more: a batch may be empty."""
    position = torch.cartesian_prod(*map(torch.arange, b.probs.shape[2:])).to(b.probs)
    values = torch.cat([position[:, :1], b.probs.flatten(0, 1).flatten(1).mT], 1)
    return PermutohedralLattice(position / 2).filter(values)[:, 1:]


COUNTS = "counts its cells: their number decides a shape, and meta has none"

BLOCKS = {
    "PermutohedralLattice": Block(filtered, but=dict.fromkeys(("compile", "no wait", "checks"), COUNTS)),
}

seeds = st.integers(0, 10_000)


def slow_lattice(features: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The paper, section 3, one point and one corner at a time; corners are full (d + 1)-tuples in a dict."""
    d = features.shape[1]
    elevation = np.zeros((d + 1, d))
    for j in range(d):
        elevation[: j + 1, j], elevation[j + 1, j] = 1, -(j + 1)
        elevation[:, j] *= np.sqrt(2 / 3) * (d + 1) / np.sqrt((j + 1) * (j + 2))
    corners, cells = [], {}
    for point, value in zip(features @ elevation.T, values, strict=True):
        below = np.floor(point / (d + 1)) * (d + 1)
        nearest = np.where(point - below > (d + 1) / 2, below + d + 1, below)
        order = np.argsort(-(point - nearest), kind="stable")
        excess = round(nearest.sum() / (d + 1))
        if excess > 0:
            nearest[order[d + 1 - excess :]] -= d + 1
        elif excess < 0:
            nearest[order[:-excess]] += d + 1
        order = np.roll(order, excess)
        vertices = []
        for r in range(d + 1):
            vertex = nearest + r
            vertex[order[d + 1 - r :]] -= d + 1
            vertices.append(vertex)
        system = np.vstack([np.array(vertices).T, np.ones(d + 1)])
        weights = np.linalg.lstsq(system, np.append(point, 1), rcond=None)[0]
        assert weights.min() > -1e-9
        keys = [tuple(vertex.round().astype(int)) for vertex in vertices]
        corners.append(list(zip(keys, weights, strict=True)))
        for key, weight in corners[-1]:
            cells[key] = cells.get(key, 0) + weight * value
    for axis in range(d + 1):
        step = np.full(d + 1, -1)
        step[axis] = d
        cells = {
            key: cell + sum(cells.get(tuple(np.array(key) + sign * step), 0) for sign in (1, -1)) / 2
            for key, cell in cells.items()
        }
    return np.array([sum(w * cells[key] for key, w in point) for point in corners]) / (1 + 2.0**-d)


@pytest.mark.parametrize("d", [1, 2, 3, 5])
@pytest.mark.parametrize(("P", "spread"), [(40, 0.1), (40, 1.0), (40, 30.0), (1, 1.0)])
def test_lattice_equals_the_slow_one(P, d, spread, device):
    g = torch.Generator().manual_seed(d)
    features = spread * torch.randn(P, d, generator=g, dtype=torch.float64)
    values = torch.rand(P, 3, generator=g, dtype=torch.float64)
    expected = torch.from_numpy(slow_lattice(features.numpy(), values.numpy()))
    actual = PermutohedralLattice(features.to(device)).filter(values.to(device))
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-9, atol=1e-9)
    actual = PermutohedralLattice(features.float().to(device)).filter(values.float().to(device))
    torch.testing.assert_close(actual.cpu(), expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("d", [2, 5])
def test_lattice_is_near_the_gaussian(d):
    g = torch.Generator().manual_seed(0)
    features = torch.rand(400, d, generator=g) * torch.tensor([4.0, 4.0, 1.0, 1.0, 1.0])[:d]
    values = features.sin()
    gaussian = (-torch.cdist(features, features).square() / 2).exp()
    expected = gaussian @ values / gaussian.sum(1, keepdim=True)
    lattice = PermutohedralLattice(features)
    actual = lattice.filter(values) / lattice.filter(torch.ones(400, 1))
    error = (actual - expected).square().mean().sqrt()
    assert error < 0.06
    assert error < 0.25 * (values - expected).square().mean().sqrt()  # values left alone are not near


@pytest.mark.parametrize("d", [2, 5])
def test_lattice_gradcheck(d):
    lattice = PermutohedralLattice(torch.randn(7, d, dtype=torch.float64))
    values = torch.rand(7, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lattice.filter, values)
    assert torch.autograd.gradgradcheck(lambda x: lattice.filter(x).square(), values)


@given(seed=seeds, d=st.integers(1, 5), factor=st.floats(-3, 3, allow_subnormal=False))
def test_lattice_is_linear_and_positive(seed, d, factor):
    g = torch.Generator().manual_seed(seed)
    lattice = PermutohedralLattice(3 * torch.randn(20, d, generator=g))
    one, two = torch.rand(2, 20, 2, generator=g, dtype=torch.float64)
    torch.testing.assert_close(
        lattice.filter(one + factor * two), lattice.filter(one) + factor * lattice.filter(two), rtol=1e-6, atol=1e-6
    )
    assert (lattice.filter(one) >= 0).all()


def test_lattice_of_far_points_does_not_mix():
    lattice = PermutohedralLattice(torch.tensor([[0.1, 0.2], [5000.0, -5000.0]]))
    mixed = lattice.filter(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert mixed[0, 1] == mixed[1, 0] == 0
    assert mixed[0, 0] > 0


def test_a_channel_alone_is_filtered_as_among_others(device):
    g = torch.Generator().manual_seed(0)
    lattice = PermutohedralLattice(torch.randn(3000, 3, generator=g).to(device))  # cells of more points than a part
    values = torch.rand(3000, 2, generator=g).to(device)
    torch.testing.assert_close(
        torch.cat([lattice.filter(one[:, None]) for one in values.unbind(1)], 1), lattice.filter(values)
    )


def test_cells_are_summed_by_parts_as_on_a_gpu(monkeypatch):
    g = torch.Generator().manual_seed(0)
    points, values = torch.randn(3000, 3, generator=g), torch.rand(3000, 2, generator=g)
    whole = PermutohedralLattice(points)
    monkeypatch.setattr("pixelss._lattice.launches_cost", lambda x: True)
    lattice = PermutohedralLattice(points)
    of_parts, ends = lattice.parts
    assert whole.parts is None
    assert ends.diff().max() == 64
    assert of_parts.diff().max() > 1
    torch.testing.assert_close(lattice.filter(values), whole.filter(values))


@given(cells=st.lists(st.integers(0, 50), min_size=1, unique=True), shift=st.integers(-60, 60))
def test_places_are_those_of_a_search(cells, shift):
    cells = torch.tensor(sorted(cells))
    assert torch.equal(_places(cells, cells + shift), torch.searchsorted(cells, cells + shift))


@given(
    keys=st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 20), min_size=1, max_size=40),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_keys_are_sorted_however_long(keys, dtype):
    keys = torch.tensor(keys).bitwise_and(torch.iinfo(dtype).max).to(dtype)
    ordered, order = _sorted(keys)
    expected, stable = keys.sort(stable=True)
    assert ordered.tolist() == expected.tolist()
    assert order.tolist() == stable.tolist()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_short_keys_are_sorted_by_numpy(dtype, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "sort", None)
    ordered, order = _sorted(torch.tensor([5, 3, 5, 2**30], dtype=dtype))
    assert (ordered.tolist(), order.tolist()) == ([3, 5, 5, 2**30], [1, 0, 2, 3])


@pytest.mark.parametrize(
    ("features", "error"),
    [
        (torch.rand(4), ValueError),
        (torch.rand(0, 2), ValueError),
        (torch.rand(4, 0), ValueError),
        (1e4 * torch.rand(4, 60), ValueError),  # their keys exceed a float
        (torch.zeros(4, 2, dtype=torch.int64), TypeError),
        (torch.tensor([[0.0, nan]]), ValueError),
        (torch.tensor([[0.0, inf]]), ValueError),
        (1e8 * torch.rand(4, 5), ValueError),
        (torch.tensor([[1e38, -1e38]]), ValueError),
        ([[0.0]], TypeError),
    ],
    ids=range(10),
)
def test_lattice_refuses_features(features, error):
    with pytest.raises(error, match=r"\bfeatures\b"):
        PermutohedralLattice(features)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (torch.rand(4), ValueError),
        (torch.rand(3, 2), ValueError),
        (torch.zeros(4, 2, dtype=torch.int64), TypeError),
        (torch.rand(4, 2, device="meta"), ValueError),
    ],
    ids=range(4),
)
def test_lattice_refuses_values(values, error):
    with pytest.raises(error, match=r"\bvalues\b"):
        PermutohedralLattice(torch.rand(4, 2)).filter(values)
