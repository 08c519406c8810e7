from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelss import centroids
from tests.blocks import Block
from tests.oracles import assert_refuses, field

SIGNATURES = {"centroids": "(displacement, *, iterations=300)"}


def centroids_by_loops(displacement: Tensor, *, iterations: int = 300) -> Tensor:
    B, _, h, w = displacement.shape
    displacement = displacement.detach()
    places = torch.zeros(B, 2, h, w, dtype=torch.int64)
    for b, i, j in product(range(B), range(h), range(w)):
        y, x = float(i), float(j)
        for _ in range(iterations):
            corners = [
                ((1 - abs(y - v)) * (1 - abs(x - u)), v, u)
                for v, u in product({math.floor(y), math.ceil(y)}, {math.floor(x), math.ceil(x)})
            ]
            dy, dx = (sum(a * float(displacement[b, c, v, u]) for a, v, u in corners) for c in range(2))
            y, x = min(max(y + dy, 0.0), h - 1.0), min(max(x + dx, 0.0), w - 1.0)
        places[b, :, i, j] = torch.tensor([round(y), round(x)])
    return places


BLOCKS = {
    "centroids": Block(
        lambda b: centroids(b.affinity[:, :2], iterations=4),
        lambda b: centroids_by_loops(b.affinity[:, :2], iterations=4),
    )
}


@pytest.mark.parametrize("iterations", [1, 20, 300])
def test_equals_the_public_code(iterations, device):
    golden = field("irn")
    actual = centroids(golden["displacement"][None].to(device), iterations=iterations)[0]
    assert torch.equal(actual.cpu(), golden[f"centroids_it{iterations}"].long())


def make_displacement(seed: int, images: int, h: int, w: int, strength: float) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return strength * torch.randn(images, 2, h, w, generator=g, dtype=torch.float64)


displacements = st.builds(
    make_displacement, st.integers(0, 10_000), st.integers(0, 2), st.integers(1, 5), st.integers(1, 5), st.floats(0, 9)
)


@given(displacement=displacements, iterations=st.integers(0, 6))
def test_equals_loops(displacement, iterations):
    actual, expected = (f(displacement, iterations=iterations) for f in (centroids, centroids_by_loops))
    assert torch.equal(actual, expected)


@given(displacement=displacements)
def test_a_place_is_on_the_map(displacement):
    y, x = centroids(displacement, iterations=7).unbind(1)
    assert ((y >= 0) & (y < displacement.shape[2])).all()
    assert ((x >= 0) & (x < displacement.shape[3])).all()


@given(h=st.integers(1, 6), w=st.integers(1, 6), data=st.data())
def test_all_cells_arrive_where_all_displacements_point(h, w, data):
    y, x = data.draw(st.integers(0, h - 1)), data.draw(st.integers(0, w - 1))
    rows, columns = torch.arange(h).view(h, 1).expand(h, w), torch.arange(w).expand(h, w)
    towards = torch.stack([y - rows, x - columns]).double()[None]
    for share, iterations in ((1.0, 1), (0.5, 30)):
        places = centroids(share * towards, iterations=iterations)
        assert torch.equal(places, torch.tensor([y, x]).view(1, 2, 1, 1).expand(1, 2, h, w))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_cells_stand_still_without_displacement(value):
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij")
    expected = torch.stack([rows, columns])[None]
    assert torch.equal(centroids(torch.full((1, 2, 4, 5), value)), expected)
    assert torch.equal(centroids(torch.ones(1, 2, 4, 5), iterations=0), expected)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("displacement", torch.zeros(1, 3, 4, 5), ValueError),
        ("displacement", torch.zeros(2, 4, 5), ValueError),
        ("displacement", torch.zeros(1, 2, 4, 5).long(), TypeError),
        ("iterations", -1, ValueError),
        ("iterations", 1.5, TypeError),
    ],
)
def test_centroids_refuses(name, value, error):
    assert_refuses(centroids, {"displacement": torch.zeros(1, 2, 4, 5), "iterations": 2}, name, value, error)
