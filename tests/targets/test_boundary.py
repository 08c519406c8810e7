from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pixelss import boundary_mask
from tests.blocks import Block
from tests.oracles import assert_refuses, field
from tests.strategies import batches, make_batch

SIGNATURES = {
    "boundary_mask": "(mask, num_classes, *, window=13, share=0.3, difference=0.1, ignore_index=255)",
}

# At window 3 no share of a window is exactly a limit, in any precision.
BLOCKS = {
    "boundary_mask": Block(
        lambda b: boundary_mask(b.mask, b.classes, window=3),
        lambda b: boundary_mask_by_loops(b.mask, b.classes, 3),
    ),
}


def boundary_mask_by_loops(mask: Tensor, num_classes: int, window: int, void: int = 255) -> Tensor:
    B, H, W = mask.shape
    zones = torch.full((B, H, W), void)
    half, share, difference = window // 2, 0.3, 0.1
    for b, y, x in product(range(B), range(H), range(W)):
        around = [
            int(mask[b, i, j])
            for i, j in product(range(y - half, y + half + 1), range(x - half, x + half + 1))
            if 0 <= i < H and 0 <= j < W
        ]
        counts = [around.count(k) / len(around) if k != void else 0.0 for k in range(num_classes + 1)]
        background, (first, second) = counts[0], sorted([*counts[1:], 0.0], reverse=True)[:2]
        if background > 2 * share and background - first >= 2 * difference:
            zones[b, y, x] = 0
        if first > 2 * share and first - background >= 2 * difference:
            zones[b, y, x] = 1
        if min(first, background) > share and abs(first - background) < difference:
            zones[b, y, x] = 2
        if second > share and first - second < difference:
            zones[b, y, x] = 3
    return zones


@given(batch=batches(), void=st.sampled_from([255, -1, 7]))
@settings(max_examples=20)
def test_zones_equal_the_loop(batch, void):
    zones = boundary_mask(batch.mask, batch.classes, window=3, ignore_index=void)
    assert torch.equal(zones, boundary_mask_by_loops(batch.mask, batch.classes, 3, void))


def test_zones_are_those_of_the_public_code():
    golden = field("bes")
    settings = {"window": int(golden["window"]), "share": float(golden["theta_scale"])}
    mask = golden["confident_label"][None]
    zones = boundary_mask(mask, 20, difference=float(golden["theta_diff"]), **settings)
    assert zones.dtype == torch.int64
    assert torch.equal(zones[0], golden["boundary_label"].long())
    assert torch.equal(boundary_mask(mask, 20), zones)  # its settings are the defaults
    assert set(zones.unique().tolist()) == {0, 1, 2, 3, 255}


@given(batch=batches(), data=st.data(), axes=st.sampled_from([(1,), (2,), (1, 2)]))
@settings(max_examples=20)
def test_zones_know_no_names_and_no_direction(batch, data, axes):
    names = torch.tensor([0, *data.draw(st.permutations(range(1, batch.classes + 1)))])
    inside = (batch.mask >= 0) & (batch.mask <= batch.classes)
    renamed = names[batch.mask.where(inside, 0)].where(inside, 255)
    zones = boundary_mask(batch.mask, batch.classes, window=5)
    assert torch.equal(boundary_mask(renamed, batch.classes, window=5), zones)
    assert torch.equal(boundary_mask(batch.mask.flip(axes), batch.classes, window=5), zones.flip(axes))


@pytest.mark.parametrize(("value", "zone"), [(0, 0), (1, 1), (2, 1), (255, 255), (3, 255)])
def test_a_map_of_one_class_has_one_zone(value, zone):
    assert (boundary_mask(torch.full((1, 6, 7), value), 2) == zone).all()


def test_between_two_halves_lies_a_boundary():
    mask = torch.zeros(1, 20, 40, dtype=torch.int64)
    mask[..., 20:] = 1
    assert (boundary_mask(mask, 2)[..., 19:21] == 2).all()
    assert (boundary_mask(mask + 1, 2)[..., 19:21] == 3).all()


def test_the_zones_do_not_depend_on_the_batch():
    mask = make_batch().mask
    zones = boundary_mask(mask, 3, window=3)
    assert all(torch.equal(boundary_mask(mask[b : b + 1], 3, window=3)[0], zones[b]) for b in range(3))


MASK = torch.zeros(2, 4, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("mask", MASK[0], ValueError),
        ("mask", MASK[:, :0], ValueError),
        ("mask", MASK.float(), TypeError),
        ("mask", None, TypeError),
        ("num_classes", 0, ValueError),
        ("num_classes", 2.0, TypeError),
        ("window", 4, ValueError),
        ("window", 0, ValueError),
        ("window", 3.0, TypeError),
        ("share", -0.1, ValueError),
        ("share", "0.3", TypeError),
        ("difference", 1.1, ValueError),
        ("ignore_index", 255.0, TypeError),
        ("ignore_index", 0, ValueError),
        ("ignore_index", 3, ValueError),
    ],
)
def test_zones_refuse(name, value, error):
    assert_refuses(boundary_mask, {"mask": MASK, "num_classes": 2}, name, value, error)
