from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelss import affinity_labels
from tests.blocks import Block
from tests.oracles import BAD_RADII, assert_refuses, pair_offsets_by_loops, pairs
from tests.strategies import make_maps

SIGNATURES = {
    "affinity_labels": "(low, high, *, radius=5, ignore_index=255)",
}

BLOCKS = {
    "affinity_labels": Block(
        lambda b: affinity_labels(b.mask, b.mask.flip(-1), radius=3),
        lambda b: affinity_labels_by_loops(b.mask, b.mask.flip(-1), 3),
        but={"void": "it is told no number of classes: every positive value is one"},
    ),
}

SIZES = [(1, 1), (2, 3), (1, 7), (6, 2), (6, 7)]
sizes = pytest.mark.parametrize("size", SIZES, ids=str)
seeds = st.integers(0, 2**32 - 1)


def affinity_labels_by_loops(low: Tensor, high: Tensor, radius: int, void: int = 255) -> Tensor:
    B, h, w = low.shape
    labels = torch.full((B, len(pair_offsets_by_loops(radius)), h, w), 255)

    def kind(b: int, y: int, x: int) -> int | None:
        if high[b, y, x] == 0:
            return 0
        return None if low[b, y, x] in (0, void) or low[b, y, x] < 0 else int(low[b, y, x])

    for b in range(B):
        for o, y, x, v, u in pairs(h, w, radius):
            first, second = kind(b, y, x), kind(b, v, u)
            if first is not None and second is not None:
                labels[b, o, y, x] = 0 if first != second else 1 if first == 0 else 2
    return labels


@sizes
@pytest.mark.parametrize("radius", [2, 5])
@pytest.mark.parametrize("void", [255, 2, -1])
def test_labels_equal_the_loop(size, radius, void, device):
    low, high = make_maps(size=size)
    labels = affinity_labels(low.to(device), high.to(device), radius=radius, ignore_index=void)
    assert torch.equal(labels.cpu(), affinity_labels_by_loops(low, high, radius, void))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_label_maps_of_any_integer_dtype(dtype):
    low, high = (x.clamp(0, 100) for x in make_maps())
    expected = affinity_labels(low, high, ignore_index=100)
    assert torch.equal(affinity_labels(low.to(dtype), high.to(dtype), ignore_index=100), expected)


@given(seed=seeds, permutation=st.permutations([1, 2, 3]))
def test_labels_do_not_depend_on_the_names_of_classes(seed, permutation):
    low, high = make_maps(seed)
    names = torch.tensor([0, *permutation])
    renamed = [torch.where((x > 0) & (x < 4), names[x.clamp(0, 3)], x) for x in (low, high)]
    assert torch.equal(affinity_labels(*renamed), affinity_labels(low, high))


# refusals


MAP = torch.zeros(2, 4, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("low", MAP[0], ValueError),
        ("low", MAP[:, :0], ValueError),
        ("low", MAP.float(), TypeError),
        ("low", MAP.bool(), TypeError),
        ("low", None, TypeError),
        ("high", MAP[:1], ValueError),
        ("high", MAP[:, :3], ValueError),
        ("high", MAP.float(), TypeError),
        ("high", MAP.to("meta"), ValueError),
        ("ignore_index", 0, ValueError),
        ("ignore_index", 255.0, TypeError),
        *BAD_RADII,
    ],
)
def test_labels_refuse(name, value, error):
    assert_refuses(affinity_labels, {"low": MAP, "high": MAP}, name, value, error)
