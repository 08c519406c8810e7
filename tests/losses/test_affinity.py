from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pixelss import affinity_loss
from tests.blocks import Block
from tests.oracles import assert_matches, assert_refuses, value_and_grads
from tests.strategies import make_pairs

SIGNATURES = {
    "affinity_loss": "(affinity, labels)",
}

BLOCKS = {
    "affinity_loss": Block(
        lambda b: affinity_loss(b.affinity, b.pairs), lambda b: affinity_loss_by_loops(b.affinity, b.pairs)
    ),
}

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
halves = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
SIZES = [(1, 1), (2, 3), (1, 7), (6, 2), (6, 7)]
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def affinity_loss_by_loops(affinity: Tensor, labels: Tensor) -> Tensor:
    terms = {0: [], 1: [], 2: []}
    for p, label in zip(affinity.flatten(), labels.flatten().tolist(), strict=True):
        if label in terms:
            terms[label].append(-torch.log((p if label else 1 - p) + 1e-5))
    different, background, foreground = (sum(t) / len(t) if t else affinity.sum() * 0 for t in terms.values())
    return background / 4 + foreground / 4 + different / 2


@sizes
@dtypes
def test_loss_equals_the_loop(size, dtype, device):
    assert_matches(affinity_loss, affinity_loss_by_loops, *make_pairs(size=size), dtype=dtype, device=device)


def test_loss_equals_binary_cross_entropy():
    affinity, _ = make_pairs()
    labels = torch.arange(affinity.numel()).view(affinity.shape) % 3
    bce = torch.nn.functional.binary_cross_entropy
    means = [bce(affinity[labels == kind], (labels[labels == kind] > 0).double()) for kind in range(3)]
    expected = means[0] / 2 + means[1] / 4 + means[2] / 4
    torch.testing.assert_close(affinity_loss(affinity, labels), expected, rtol=1e-3, atol=0)  # the 1e-5 inside


@pytest.mark.parametrize("kept", [(), (0,), (1,), (2,), (0, 2)], ids=str)
def test_an_empty_group_gives_zero_on_the_graph(kept):
    affinity, labels = make_pairs()
    labels = torch.where(sum(labels == kind for kind in (*kept, -9)) > 0, labels, 255)
    assert_matches(affinity_loss, affinity_loss_by_loops, affinity, labels)
    loss = affinity_loss(affinity.requires_grad_(), labels)
    assert loss.requires_grad
    assert bool(loss > 0) == bool(kept)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_certain_affinities_have_a_finite_loss(value):
    affinity, labels = make_pairs(dtype=torch.float32)
    loss, gradient = value_and_grads(affinity_loss, torch.full_like(affinity, value), labels)
    assert loss.item() == pytest.approx(-math.log(1e-5) / 2, rel=0.01)
    assert gradient.isfinite().all()


def test_ignored_pairs_have_no_influence():
    affinity, labels = make_pairs()
    ignored = (labels < 0) | (labels > 2)
    other = affinity.masked_fill(ignored, math.nan)
    actual, expected = (value_and_grads(affinity_loss, x, labels) for x in (other, affinity))
    assert all(map(torch.equal, actual, expected))


def test_loss_gradcheck():
    affinity, labels = make_pairs(size=(3, 2), images=1)
    assert torch.autograd.gradcheck(lambda x: affinity_loss(x, labels), affinity.requires_grad_())


@halves
def test_loss_is_computed_in_float32(half, device):
    affinity, labels = (x.to(device) for x in make_pairs(dtype=half))
    actual = value_and_grads(affinity_loss, affinity, labels)
    expected = value_and_grads(affinity_loss, affinity.float(), labels)
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1].to(half))


@pytest.mark.slow  # .ci/run runs it
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_loss_equals_eager(dtype, device):
    torch.compiler.reset()
    inputs = [x.to(device) for x in make_pairs(dtype=dtype)]
    compiled = torch.compile(affinity_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_grads(compiled, *inputs), value_and_grads(affinity_loss, *inputs))


# refusals


MAP = torch.zeros(2, 4, 5, dtype=torch.int64)


AFFINITY = torch.rand(2, 34, 4, 5)


LABELS = torch.zeros(2, 34, 4, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("affinity", AFFINITY[0], ValueError),
        ("affinity", AFFINITY[:, :0], ValueError),
        ("affinity", LABELS, TypeError),
        ("affinity", None, TypeError),
        ("labels", LABELS[:, :12], ValueError),
        ("labels", LABELS[:1], ValueError),
        ("labels", LABELS[..., :4], ValueError),
        ("labels", MAP, ValueError),
        ("labels", AFFINITY, TypeError),
        ("labels", LABELS.to("meta"), ValueError),
    ],
)
def test_loss_refuses(name, value, error):
    assert_refuses(affinity_loss, {"affinity": AFFINITY, "labels": LABELS}, name, value, error)
