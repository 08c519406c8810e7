from __future__ import annotations

from itertools import product
from math import log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pixelss import intra_class_loss
from tests.blocks import Block
from tests.oracles import active, assert_refuses, value_and_grads
from tests.strategies import Batch, batches, make_batch

SIGNATURES = {"intra_class_loss": "(logits, scores, tags, *, threshold=0.2)"}


def signed(b: Batch) -> Tensor:
    """Every other pixel on the negative side."""
    size = b.cam.shape[2:]
    signs = 1 - 2 * (torch.arange(size.numel(), device=b.cam.device) % 2)
    return b.cam * signs.view(size)


BLOCKS = {
    "intra_class_loss": Block(
        lambda b: intra_class_loss(b.raw[2], signed(b), b.tags),
        lambda b: intra_class_loss_by_loops(b.raw[2], signed(b), b.tags),
    )
}


def intra_class_loss_by_loops(logits: Tensor, scores: Tensor, tags: Tensor, threshold: float = 0.2) -> Tensor:
    B, N, h, w = logits.shape
    total = logits.nan_to_num(0, 0, 0).sum() * 0
    for b, n in product(range(B), range(N)):
        if tags[b, n] <= 0:
            continue
        values = {(i, j): active(scores[b, n, i, j]).item() for i, j in product(range(h), range(w))}
        highest, lowest = max(values.values()), min(values.values())
        for (i, j), score in values.items():
            if score == 0:
                continue
            if abs(score) / (highest if score > 0 else -lowest) > threshold:
                p = active(logits[b, n, i, j]).sigmoid()
                total = total - (p.log() if score > 0 else (1 - p).log()) / (B * h * w)
    return total


@given(batch=batches(side=5), threshold=st.sampled_from([0.0, 0.5, 0.9]))
def test_any_threshold_equals_the_loops(batch, threshold):
    scores = signed(batch)
    actual = value_and_grads(lambda x: intra_class_loss(x, scores, batch.tags, threshold=threshold), batch.raw[2])
    expected = value_and_grads(lambda x: intra_class_loss_by_loops(x, scores, batch.tags, threshold), batch.raw[2])
    torch.testing.assert_close(actual, expected)


def test_the_gradient_is_the_published_one():
    """Sigmoid minus target, of sure pixels of present classes, over the cells of a map; of the mean over the images."""
    batch = make_batch()
    logits, scores = batch.raw[2].requires_grad_(), signed(batch)
    intra_class_loss(logits, scores, batch.tags).backward()
    positive = scores.relu() / scores.amax((2, 3), keepdim=True).clamp(min=1e-5)
    negative = (-scores).relu() / (-scores).amax((2, 3), keepdim=True).clamp(min=1e-5)
    sure = (positive + negative > 0.2) * (batch.tags > 0)[:, :, None, None]
    expected = (logits.sigmoid() - (scores > 0).double()) * sure / scores[0, 0].numel() / len(scores)
    torch.testing.assert_close(logits.grad, expected)


def test_all_sure_is_torchs_cross_entropy():
    logits, scores = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    target = (scores > 0).float()
    expected = 3 * functional.binary_cross_entropy_with_logits(logits, target)
    torch.testing.assert_close(intra_class_loss(logits, scores, torch.ones(2, 3), threshold=0), expected)


@given(batch=batches(side=5), up=st.floats(0.01, 100), down=st.floats(0.01, 100))
def test_each_side_is_measured_by_its_own_extreme(batch, up, down):
    scores = signed(batch)
    scaled = torch.where(scores > 0, up * scores, down * scores)
    loss = intra_class_loss(batch.raw[2], scores, batch.tags, threshold=0.35)
    torch.testing.assert_close(intra_class_loss(batch.raw[2], scaled, batch.tags, threshold=0.35), loss)


@given(batch=batches(side=5))
def test_signs_and_logits_turned_together_cost_the_same(batch):
    loss = intra_class_loss(batch.raw[2], signed(batch), batch.tags)
    torch.testing.assert_close(intra_class_loss(-batch.raw[2], -signed(batch), batch.tags), loss)


def test_unsure_pixels_and_absent_classes_cost_nothing():
    scores = torch.tensor([1.0, 0.1, 0.0, -0.3, -2.0]).view(1, 1, 1, 5).expand(1, 2, 1, 5)
    logits = torch.zeros(1, 2, 1, 5, requires_grad=True)
    loss = intra_class_loss(logits, scores, torch.tensor([[1, 0]]))
    assert loss.item() == pytest.approx(2 * log(2) / 5)
    loss.backward()
    assert logits.grad.bool().tolist() == [[[[True, False, False, False, True]], [[False] * 5]]]
    assert intra_class_loss(logits, 0 * scores, torch.ones(1, 2)) == 0


def test_scores_carry_no_gradient():
    scores = torch.randn(1, 2, 3, 3, requires_grad=True)
    intra_class_loss(torch.randn(1, 2, 3, 3, requires_grad=True), scores, torch.ones(1, 2)).backward()
    assert scores.grad is None


def test_gradcheck():
    batch = make_batch(images=2, classes=2, image_size=(3, 4))
    scores = signed(batch)
    assert torch.autograd.gradcheck(
        lambda x: intra_class_loss(x, scores, torch.ones(2, 2)), batch.raw[2].requires_grad_()
    )


LOGITS, TAGS = torch.rand(2, 3, 4, 5), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("logits", LOGITS[0], ValueError),
        ("logits", LOGITS.long(), TypeError),
        ("scores", LOGITS[..., :4], ValueError),
        ("scores", LOGITS[:, :2], ValueError),
        ("scores", LOGITS > 0, TypeError),
        ("scores", LOGITS.to("meta"), ValueError),
        ("tags", TAGS[:, :2], ValueError),
        ("tags", TAGS.to("meta"), ValueError),
        ("threshold", -0.1, ValueError),
        ("threshold", 1.0, ValueError),
        ("threshold", "0.2", TypeError),
    ],
)
def test_loss_refuses(name, value, error):
    arguments = {"logits": LOGITS, "scores": LOGITS, "tags": TAGS, "threshold": 0.2}
    assert_refuses(intra_class_loss, arguments, name, value, error)
