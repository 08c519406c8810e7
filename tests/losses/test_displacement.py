from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import Tensor

from pixelss import affinity_labels, displacement_loss
from tests.blocks import Block
from tests.oracles import assert_refuses, field, pair_offsets_by_loops, pairs
from tests.strategies import batches, make_maps, make_pairs, noise

SIGNATURES = {
    "displacement_loss": "(displacement, labels)",
}


def within(labels: Tensor, radius: int) -> Tensor:
    """Return the labels with 255 where the partner lies outside, as `affinity_labels` has it."""
    inside = torch.zeros(labels.shape[1:], dtype=torch.bool)
    for o, y, x, _, _ in pairs(*labels.shape[2:], radius):
        inside[o, y, x] = True
    return labels.where(inside.to(labels.device, non_blocking=True), 255)


BLOCKS = {
    "displacement_loss": Block(
        lambda b: displacement_loss(4 * b.affinity[:, :2], within(b.pairs, 3)),
        lambda b: displacement_loss_by_loops(4 * b.affinity[:, :2], within(b.pairs, 3), 3),
        but={"checks": "its entry makes the arguments of other tensors"},
    ),
}


def displacement_loss_by_loops(displacement: Tensor, labels: Tensor, radius: int) -> Tensor:
    total, count = {1: displacement.sum() * 0, 2: displacement.sum() * 0}, {1: 0, 2: 0}
    for b in range(len(labels)):
        for o, y, x, v, u in pairs(*labels.shape[2:], radius):
            if (kind := int(labels[b, o, y, x])) in (1, 2):
                dy, dx = displacement[b, :, y, x] - displacement[b, :, v, u]
                between = (v - y, u - x) if kind == 2 else (0, 0)
                total[kind] = total[kind] + (dy - between[0]).abs() + (dx - between[1]).abs()
                count[kind] += 1
    return sum(total[kind] / (2 * count[kind] + 1e-5) for kind in (1, 2)) / 2


def test_loss_and_gradient_are_irns():
    """Its pairs start where the whole half-disc lies inside: the others are void here."""
    a = field("irn")
    mask, radius = a["train_segmentation"].long(), a["train_radius"].item()
    H, W = mask.shape[-2:]
    inside = torch.zeros(H, W, dtype=torch.bool)
    inside[: H - radius + 1, radius - 1 : W - radius + 1] = True
    labels = torch.where(inside, affinity_labels(mask, mask, radius=radius), 255)
    d = a["train_displacement"].requires_grad_()
    loss = displacement_loss(d, labels)
    torch.testing.assert_close(loss, (a["train_dp_fg"] + a["train_dp_bg"]) / 2, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, d)[0], a["train_grad_dp"], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("radius", [2, 3, 5, 10])
def test_the_radius_is_told_by_the_labels(radius):
    _, labels = make_pairs(size=(7, 6), images=1, radius=radius)
    labels, d = within(labels, radius), 3 * noise(1, 2, 7, 6)
    torch.testing.assert_close(displacement_loss(d, labels), displacement_loss_by_loops(d, labels, radius))


def to_the_middle(h: int, w: int) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(h) - (h - 1) / 2, torch.arange(w) - (w - 1) / 2, indexing="ij")
    return -torch.stack([rows, columns])[None].double()


def test_cells_that_point_to_the_middle_of_their_object_cost_nothing():
    mask = torch.ones(1, 6, 7).long()
    d = to_the_middle(6, 7)
    assert displacement_loss(d, affinity_labels(mask, mask)) == 0
    assert displacement_loss(-d, affinity_labels(mask, mask)) > 1
    assert displacement_loss(torch.full_like(d, 3), affinity_labels(mask * 0, mask * 0)) == 0


@given(batch=batches())
def test_moving_all_ends_alike_changes_nothing(batch):
    d, labels = batch.affinity[:, :2], within(batch.pairs, 3)
    moved = d + torch.tensor([2.5, -1.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(displacement_loss(moved, labels), displacement_loss(d, labels), rtol=1e-6, atol=1e-6)


def test_a_flip_of_the_image_and_of_dx_changes_nothing():
    mask, _ = make_maps()
    d = noise(2, 2, 6, 7)
    flipped, mirror = mask.flip(-1), torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    expected = displacement_loss(d, affinity_labels(mask, mask))
    actual = displacement_loss(d.flip(-1) * mirror, affinity_labels(flipped, flipped))
    torch.testing.assert_close(actual, expected)


def test_pairs_across_classes_and_unknown_ones_have_no_influence():
    _, labels = make_pairs(radius=3)
    labels, d = within(labels, 3), noise(2, 2, 6, 7)
    known = labels.where((labels == 1) | (labels == 2), 0)
    assert torch.equal(displacement_loss(d, labels), displacement_loss(d, known))


def test_gradcheck():
    _, labels = make_pairs(size=(3, 2), images=1, radius=3)
    d = noise(1, 2, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda d: displacement_loss(d, within(labels, 3)), d)


# refusals


FIELD, LABELS = torch.rand(2, 2, 4, 5), torch.zeros(2, 34, 4, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("displacement", FIELD[0], ValueError),
        ("displacement", FIELD[:, :1], ValueError),
        ("displacement", FIELD.long(), TypeError),
        ("displacement", None, TypeError),
        ("labels", LABELS[:, :33], ValueError),
        ("labels", LABELS[:1], ValueError),
        ("labels", LABELS[..., :4], ValueError),
        ("labels", LABELS.float(), TypeError),
        ("labels", LABELS.to("meta"), ValueError),
    ],
)
def test_loss_refuses(name, value, error):
    assert len(pair_offsets_by_loops(5)) == LABELS.shape[1]
    assert_refuses(displacement_loss, {"displacement": FIELD, "labels": LABELS}, name, value, error)
