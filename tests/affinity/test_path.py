"""IRNet's path affinity against a walk along every path, and what the public code returned."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pixelss import _pieces, affinity_labels, affinity_loss, pair_offsets, path_affinity, random_walk
from tests.blocks import Block
from tests.oracles import (
    BAD_RADII,
    assert_matches,
    assert_refuses,
    field,
    pair_offsets_by_loops,
    pairs,
    value_and_grads,
)
from tests.strategies import make_batch

SIGNATURES = {
    "path_affinity": "(boundary, *, radius=5)",
}

BLOCKS = {
    "path_affinity": Block(
        lambda b: path_affinity(b.probs[:, :1], radius=3),
        lambda b: path_affinity_by_loops(b.probs[:, :1], 3),
    ),
}

seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 7)


def path_affinity_by_loops(boundary: Tensor, radius: int) -> Tensor:
    B, _, h, w = boundary.shape
    offsets = pair_offsets_by_loops(radius)
    affinity = [[[[boundary.new_zeros(()) for _ in range(w)] for _ in range(h)] for _ in offsets] for _ in range(B)]
    for b, (o, y, x, v, u) in product(range(B), pairs(h, w, radius)):
        path = [
            boundary[b, 0, i, j]
            for i, j in product(range(min(y, v), max(y, v) + 1), range(min(x, u), max(x, u) + 1))
            if ((v - y) * (j - x) - (u - x) * (i - y)) ** 2 / ((v - y) ** 2 + (u - x) ** 2) < 1
        ]
        affinity[b][o][y][x] = 1 - torch.stack(path).amax()
    flat = [cell for image in affinity for maps in image for row in maps for cell in row]
    return torch.stack(flat).view(B, len(offsets), h, w) if flat else boundary.new_zeros(B, len(offsets), h, w)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (6, 2), (7, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_affinity_equals_the_loop(size, dtype, device):
    boundary = make_batch(image_size=size, images=1).probs[:, :1]
    assert_matches(path_affinity, lambda x: path_affinity_by_loops(x, 5), boundary, dtype=dtype, device=device)


@pytest.mark.parametrize(("radius", "cells"), [(5, 242), (10, 2134)])
def test_paths_have_as_many_cells_as_irnets(radius, cells):
    boundary = torch.zeros(1, 1, 41, 41)
    boundary[..., 20, 20] = 1  # on as many paths as there are cells on all paths from one cell
    affinity = path_affinity(boundary, radius=radius)[..., 10:-10, 10:-10]  # pairs inside the map
    assert (affinity == 0).sum() == cells


def test_all_affinities_are_irnets():
    golden = field("irn")
    affinity, dense = path_affinity(golden["edge"][None])[0], golden["dense_affinity"]
    inside = torch.zeros_like(affinity, dtype=torch.bool)
    h, w = affinity.shape[-2:]
    for o, y, x, v, u in pairs(h, w, 5):
        inside[o, y, x] = True
        assert abs(affinity[o, y, x] - dense[y * w + x, v * w + u]) < 1e-6
    assert not affinity[~inside].any()


def test_walks_are_irnets():
    golden = field("irn")
    boundary = golden["edge"][None]
    scores, affinity = golden["scores"][None] * (1 - boundary), path_affinity(boundary)
    for beta, log_steps in ((10, 8), (5, 3)):
        walk = random_walk(scores, affinity, beta=beta, log_steps=log_steps)[0]
        torch.testing.assert_close(walk, golden[f"walk_beta{beta}_exp{log_steps}"], rtol=0, atol=1e-4)


def test_the_training_loss_is_irnets():
    golden = field("irn")
    mask, logits = golden["train_segmentation"].long(), golden["train_edge_logits"].requires_grad_()
    radius, (h, w) = int(golden["train_radius"]), mask.shape[-2:]
    whole = torch.zeros(h, w, dtype=torch.bool)
    whole[: h - radius + 1, radius - 1 : w - radius + 1] = True  # theirs takes cells whose half-disc is inside, alone
    labels = affinity_labels(mask, mask, radius=radius).where(whole, 255)
    loss = affinity_loss(path_affinity(logits.sigmoid(), radius=radius), labels)
    loss.backward()
    torch.testing.assert_close(loss, (golden["train_pos_loss"] + golden["train_neg_loss"]) / 2, rtol=0, atol=2e-6)
    assert round(loss.item(), 6) == 0.778728
    torch.testing.assert_close(logits.grad, golden["train_grad_edge"], rtol=0, atol=2e-6)


@given(seed=seeds, h=sides, w=sides)
@settings(max_examples=20)
def test_affinity_is_equivariant_to_flips(seed, h, w):
    """A pair of the flipped map is a pair of the map, read from its other end where its offset points up."""
    boundary, offsets = make_batch(seed, image_size=(h, w)).probs[:, :1], pair_offsets(4)
    plain, flipped = path_affinity(boundary, radius=4), path_affinity(boundary.flip(-1), radius=4)
    for o, y, x, _, u in pairs(h, w, 4):
        dy, dx = offsets[o]
        ours = flipped[:, o, y, x]  # between columns w - 1 - x and w - 1 - u of the map
        if dy == 0:
            assert torch.equal(ours, plain[:, o, y, w - 1 - u])
        else:
            assert torch.equal(ours, plain[:, offsets.index((dy, -dx)), y, w - 1 - x])


@given(seed=seeds)
@settings(max_examples=10)
def test_a_higher_boundary_never_joins(seed):
    low, other = make_batch(seed).probs[:, :2].split(1, 1)
    assert (path_affinity(torch.maximum(low, other)) <= path_affinity(low)).all()


def test_a_wall_parts_what_lies_on_both_sides():
    boundary = torch.zeros(1, 1, 8, 9)
    boundary[..., 4] = 1
    affinity = path_affinity(boundary)
    for o, y, x, _, u in pairs(8, 9, 5):
        assert affinity[0, o, y, x] == (max(x, u) < 4 or min(x, u) > 4)


def test_gradient_is_that_of_finite_differences_at_the_default_radius():
    boundary = make_batch(image_size=(5, 6), images=1).probs[:, :1].clone().requires_grad_()
    assert torch.autograd.gradcheck(path_affinity, boundary, fast_mode=True)


BOUNDARY = torch.rand(2, 1, 4, 5)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("boundary", BOUNDARY[0], ValueError),
        ("boundary", BOUNDARY.expand(-1, 2, -1, -1), ValueError),
        ("boundary", BOUNDARY[..., :0], ValueError),
        ("boundary", BOUNDARY.long(), TypeError),
        ("boundary", None, TypeError),
        *BAD_RADII,
    ],
)
def test_affinity_refuses(name, value, error):
    assert_refuses(path_affinity, {"boundary": BOUNDARY}, name, value, error)


@pytest.mark.parametrize("entries", [1, 1000, 2**24])
def test_paths_at_a_time_change_nothing(monkeypatch, entries):
    boundary = make_batch(image_size=(5, 6)).probs[:, :1]
    whole = value_and_grads(path_affinity, boundary)
    monkeypatch.setattr(_pieces, "_CPU", entries)
    assert all(map(torch.equal, value_and_grads(path_affinity, boundary), whole))


def test_second_derivatives_are_those_of_finite_differences():
    boundary = make_batch(image_size=(3, 4), images=1).probs[:, :1].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: path_affinity(x, radius=3) ** 2, boundary)
