from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixelss import pair_offsets
from tests.oracles import BAD_RADII, assert_refuses, pair_offsets_by_loops

SIGNATURES = {
    "pair_offsets": "(radius=5)",
}

BLOCKS = {"pair_offsets": "Python ints, no tensor"}


@pytest.mark.parametrize("radius", [2, 3, 4, 5, 6, 9])
def test_offsets_equal_the_loop(radius):
    assert list(pair_offsets(radius)) == pair_offsets_by_loops(radius)


def test_offsets_of_the_paper():
    offsets = pair_offsets()
    assert len(offsets) == 34
    assert offsets[:5] == ((0, 1), (0, 2), (0, 3), (0, 4), (1, -4))


@given(radius=st.integers(2, 12))
def test_offsets_and_their_opposites_are_the_disc(radius):
    offsets = pair_offsets(radius)
    both = {*offsets, *((-dy, -dx) for dy, dx in offsets)}
    square = product(range(-radius, radius + 1), repeat=2)
    assert len(both) == 2 * len(offsets)
    assert both == {(y, x) for y, x in square if 0 < y**2 + x**2 < radius**2}


@pytest.mark.parametrize(("name", "value", "error"), BAD_RADII)
def test_offsets_refuse(name, value, error):
    assert_refuses(pair_offsets, {}, name, value, error)
