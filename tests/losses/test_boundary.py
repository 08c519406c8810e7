from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from torch import Tensor

from pixelss import boundary_loss
from tests.blocks import Block
from tests.oracles import assert_refuses, field
from tests.strategies import batches, make_batch, noise

SIGNATURES = {
    "boundary_loss": "(boundary, zones, *, ignore_index=255)",
}

BLOCKS = {
    "boundary_loss": Block(
        lambda b: boundary_loss(b.probs[:, :1], b.mask),
        lambda b: boundary_loss_by_loops(b.probs[:, :1], b.mask),
        but={"gradient": "the square root, a weight, carries none"},
    ),
}


def boundary_loss_by_loops(boundary: Tensor, zones: Tensor) -> Tensor:
    terms = {"background": [], "foreground": [], "boundary": []}
    for b, i, j in product(*map(range, zones.shape)):
        p = boundary[b, 0, i, j].clamp(1e-4, 1 - 1e-4)
        zone = int(zones[b, i, j])
        if zone in (0, 1):
            terms["foreground" if zone else "background"].append(-torch.log(1 - p))
        elif zone in (2, 3):
            terms["boundary"].append(-torch.log(p) * p.detach() ** 0.5)
    background, foreground, edge = ((boundary.sum() * 0 + sum(t)) / (len(t) + 1) for t in terms.values())
    return background / 2 + foreground / 2 + edge


def test_loss_and_gradient_are_bes():
    a = field("bes")
    p = a["prediction"].requires_grad_()
    loss = boundary_loss(p, a["loss_label"])
    torch.testing.assert_close(loss, a["loss"], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, p)[0], a["grad"], rtol=2e-6, atol=2e-6)


def test_the_parts_are_bes():
    a = field("bes")
    zones = a["loss_label"].long()
    ground = boundary_loss(a["prediction"], zones.where(zones < 2, 255))
    torch.testing.assert_close(ground, a["loss_ground"], rtol=2e-6, atol=2e-6)
    edge = boundary_loss(a["prediction"], zones.where(zones > 1, 255))
    torch.testing.assert_close(edge, a["loss_boundary"], rtol=2e-6, atol=2e-6)


@given(batch=batches())
def test_both_kinds_of_boundary_count_alike_and_both_sides_may_change_places(batch):
    p, zones = batch.probs[:, :1], batch.mask
    loss = boundary_loss(p, zones)
    assert torch.equal(boundary_loss(p, zones.where(zones != 3, 2)), loss)
    swapped = torch.where((zones == 0) | (zones == 1), 1 - zones, zones)
    torch.testing.assert_close(boundary_loss(p, swapped), loss)


@given(batch=batches())
def test_a_flip_does_not_matter(batch):
    p, zones = batch.probs[:, :1], batch.mask
    torch.testing.assert_close(boundary_loss(p.flip(-1), zones.flip(-1)), boundary_loss(p, zones))


@given(batch=batches())
def test_void_cells_have_no_influence(batch):
    p, void = batch.probs[:, :1], (batch.mask < 0) | (batch.mask > 3)
    assert torch.equal(boundary_loss(p.masked_fill(void[:, None], 0.9), batch.mask), boundary_loss(p, batch.mask))


def test_what_the_zones_say_costs_next_to_nothing():
    zones = make_batch().mask
    right = ((zones == 2) | (zones == 3))[:, None].double()
    assert boundary_loss(right, zones) < 3e-4
    assert boundary_loss(1 - right, zones) > 4  # of sides: a missed boundary weighs sqrt(1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_certain_boundaries_have_a_finite_loss_and_gradient(value):
    p = torch.full((1, 1, 4, 4), value, requires_grad=True)
    loss = boundary_loss(p, torch.arange(16).view(1, 4, 4) % 4)
    loss.backward()
    assert 0 < loss < -math.log(1e-4)
    assert p.grad.isfinite().all()


@pytest.mark.parametrize("void", [0, 1, 2, 3, -1])
def test_any_value_can_be_void(void):
    batch = make_batch()
    p, zones = batch.probs[:, :1], batch.mask
    assert torch.equal(boundary_loss(p, zones, ignore_index=void), boundary_loss(p, zones.where(zones != void, 255)))


def test_gradcheck_of_the_sides():
    p = noise(1, 1, 2, 3).sigmoid().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: boundary_loss(p, torch.tensor([[[0, 1, 255], [1, 0, 0]]])), p)


# refusals


BOUNDARY, ZONES = torch.rand(2, 1, 3, 4), torch.zeros(2, 3, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("boundary", BOUNDARY[:, 0], ValueError),
        ("boundary", BOUNDARY.expand(2, 2, 3, 4), ValueError),
        ("boundary", BOUNDARY.long(), TypeError),
        ("boundary", None, TypeError),
        ("zones", ZONES[:1], ValueError),
        ("zones", ZONES[..., :3], ValueError),
        ("zones", ZONES.float(), TypeError),
        ("zones", ZONES.to("meta"), ValueError),
        ("ignore_index", "255", TypeError),
    ],
)
def test_loss_refuses(name, value, error):
    assert_refuses(boundary_loss, {"boundary": BOUNDARY, "zones": ZONES}, name, value, error)
