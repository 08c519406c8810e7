from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pixelss import reactivation_loss
from tests.blocks import Block
from tests.oracles import active, assert_refuses, field
from tests.strategies import batches, make_batch, noise

SIGNATURES = {
    "reactivation_loss": "(features, cam, classifier_weight, tags)",
}

BLOCKS = {
    "reactivation_loss": Block(
        lambda b: reactivation_loss(b.features, b.raw[0], b.prototypes[1:], b.tags),
        lambda b: reactivation_loss_by_loops(b.features, b.raw[0], b.prototypes[1:], b.tags),
    ),
}


def reactivation_loss_by_loops(features: Tensor, cam: Tensor, classifier_weight: Tensor, tags: Tensor) -> Tensor:
    B, N, h, w = cam.shape
    total = (features.sum() + active(cam).sum() + classifier_weight.sum()) * 0
    for b in range(B):
        present = [n for n in range(N) if tags[b, n] > 0]
        for n in present:
            gathered = sum(active(cam[b, n, i, j]) * features[b, :, i, j] for i in range(h) for j in range(w)) / (h * w)
            scores = [weight @ gathered for weight in classifier_weight]
            total = total + (torch.log(sum(torch.exp(s) for s in scores)) - scores[n]) / len(present) / B
    return total


def test_loss_and_gradients_are_recams():
    """Its CAMs are of the first classifier, divided by maximum + 1e-5; its gradients with the first loss besides."""
    a = field("recam")
    features, first, second = (a[name].requires_grad_() for name in ("features", "classifier_w", "predictor_w"))
    raw = functional.conv2d(features, first).relu()
    cam = raw / (raw.amax((2, 3), keepdim=True) + 1e-5)
    loss = reactivation_loss(features, cam, second.flatten(1), a["tags"])
    torch.testing.assert_close(loss, a["loss_ce"], rtol=2e-6, atol=2e-6)
    logits = functional.conv2d(features.mean((2, 3), keepdim=True), first).flatten(1)
    torch.testing.assert_close(logits, a["logits"], rtol=2e-6, atol=2e-6)
    tags_loss = functional.multilabel_soft_margin_loss(logits, a["tags"])
    torch.testing.assert_close(tags_loss, a["loss_cls"], rtol=2e-6, atol=2e-6)
    gradients = torch.autograd.grad(loss + tags_loss, (features, second, first))
    for gradient, name in zip(gradients, ("features", "predictor", "classifier"), strict=True):
        torch.testing.assert_close(gradient, a[f"grad_{name}"], rtol=2e-6, atol=2e-6)


@given(data=st.data(), batch=batches())
def test_the_order_of_the_classes_does_not_matter(data, batch):
    order = torch.tensor(data.draw(st.permutations(range(batch.classes))))
    inputs = batch.features, batch.raw[0], batch.prototypes[1:], batch.tags
    permuted = batch.features, batch.raw[0][:, order], batch.prototypes[1:][order], batch.tags[:, order]
    torch.testing.assert_close(reactivation_loss(*permuted), reactivation_loss(*inputs))


@given(batch=batches())
def test_where_the_cells_lie_does_not_matter(batch):
    flipped = batch.features.flip(-1), batch.raw[0].flip(-1), batch.prototypes[1:], batch.tags
    expected = reactivation_loss(batch.features, batch.raw[0], batch.prototypes[1:], batch.tags)
    torch.testing.assert_close(reactivation_loss(*flipped), expected)
    assert expected >= 0


@given(batch=batches())
def test_cams_of_absent_classes_have_no_influence(batch):
    absent = (batch.tags <= 0)[:, :, None, None]
    other = batch.raw[0] + 9 * absent
    weight = batch.prototypes[1:]
    expected = reactivation_loss(batch.features, batch.raw[0], weight, batch.tags)
    assert torch.equal(reactivation_loss(batch.features, other, weight, batch.tags), expected)


def test_a_cam_of_ones_and_one_tag_is_cross_entropy_of_pooled_features():
    features, weight, target = noise(4, 6, 3, 5), noise(3, 6, seed=1), torch.tensor([0, 2, 1, 1])
    expected = functional.cross_entropy(features.mean((2, 3)) @ weight.mT, target)
    cam = torch.ones(4, 3, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(reactivation_loss(features, cam, weight, torch.eye(3)[target]), expected)


@pytest.mark.parametrize("classes", [1, 4, 20])
def test_a_cam_of_zeros_gives_log_n(classes):
    cam, tags = torch.zeros(2, classes, 3, 3), torch.ones(2, classes)
    loss = reactivation_loss(torch.rand(2, 5, 3, 3), cam, torch.rand(classes, 5), tags)
    assert loss.item() == pytest.approx(math.log(classes))


def test_an_image_without_tags_adds_nothing_and_counts_in_the_mean():
    batch = make_batch(images=2)
    inputs = batch.features, batch.raw[0], batch.prototypes[1:]
    alone = reactivation_loss(inputs[0][:1], inputs[1][:1], inputs[2], batch.tags[:1])
    torch.testing.assert_close(reactivation_loss(*inputs, batch.tags), alone / 2)


def test_gradcheck():
    leaves = [noise(*shape).requires_grad_() for shape in ((2, 3, 2, 2), (2, 2, 2, 2), (2, 3))]
    tags = torch.tensor([[1, 1], [0, 1]])
    assert torch.autograd.gradcheck(lambda *x: reactivation_loss(*x, tags), leaves)


# refusals


FEATURES, CAM, WEIGHT, TAGS = torch.rand(2, 5, 3, 4), torch.rand(2, 6, 3, 4), torch.rand(6, 5), torch.ones(2, 6)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("features", FEATURES[0], ValueError),
        ("features", FEATURES.long(), TypeError),
        ("cam", CAM[:1], ValueError),
        ("cam", CAM[..., :3], ValueError),
        ("cam", CAM.to("meta"), ValueError),
        ("classifier_weight", WEIGHT[:, :, None, None], ValueError),
        ("classifier_weight", WEIGHT[:5], ValueError),
        ("classifier_weight", WEIGHT[:, :4], ValueError),
        ("classifier_weight", None, TypeError),
        ("tags", TAGS[:, :5], ValueError),
        ("tags", TAGS.to("meta"), ValueError),
    ],
)
def test_loss_refuses(name, value, error):
    given_ = {"features": FEATURES, "cam": CAM, "classifier_weight": WEIGHT, "tags": TAGS}
    assert_refuses(reactivation_loss, given_, name, value, error)


@pytest.mark.parametrize("double", range(3))
def test_inputs_may_differ_in_dtype(double):
    inputs = [x.double() if i == double else x for i, x in enumerate((FEATURES, CAM, WEIGHT))]
    loss = reactivation_loss(*inputs, TAGS)
    torch.testing.assert_close(loss, reactivation_loss(*(x.double() for x in inputs), TAGS))
