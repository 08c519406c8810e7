from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pixelss import difference_loss, lost_classes
from tests.blocks import Block
from tests.oracles import assert_refuses, field, value_and_grads
from tests.strategies import Batch, batches, make_batch, noise

SIGNATURES = {"difference_loss": "(logits, knowledge, advice, flags=None)"}


def given_of(b: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return b.raw[2][:, :2][:, -1:], b.mask, b.mask.flip(2)  # the second class's, where there are two


def flags_of(b: Batch) -> Tensor:
    return torch.cat([torch.zeros_like(b.tags[:, :1]), b.tags], 1)


FINITE = {"finite": "takes logits, which must be finite"}
BLOCKS = {
    "difference_loss": Block(
        lambda b: difference_loss(*given_of(b)),
        lambda b: difference_loss_by_loops(*given_of(b)),
        but=FINITE | {"void": "without flags it does not know N, and only 255 and negative values are void"},
    ),
    "difference_loss flags": Block(
        lambda b: difference_loss(*given_of(b), flags_of(b)),
        lambda b: difference_loss_by_loops(*given_of(b), flags_of(b)),
        but=FINITE,
    ),
}


def difference_loss_by_loops(logits: Tensor, knowledge: Tensor, advice: Tensor, flags: Tensor | None = None) -> Tensor:
    B, H, W = knowledge.shape
    images = []
    for b in range(B):
        if flags is not None and any(flags[b, k] > 0 for k in range(flags.shape[1])):
            continue
        parts: dict[bool, list[Tensor]] = {True: [], False: []}
        for i, j in product(range(H), range(W)):
            before, after = int(knowledge[b, i, j]), int(advice[b, i, j])
            if all(0 <= k < (255 if flags is None else flags.shape[1]) for k in (before, after)):
                p = 1 / (1 + torch.exp(-logits[b, 0, i, j]))
                parts[before != after].append(-torch.log(p if before != after else 1 - p))
        if parts[True] or parts[False]:
            images.append(sum(sum(part) / len(part) / 2 for part in parts.values() if part))
    return logits.sum() * 0 + (sum(images) / len(images) if images else 0)


# What SSDD's own code returned


def test_loss_and_gradient_are_ssdds():
    a = field("ssdd")
    logits = a["dd_knowledge"].requires_grad_()
    loss = difference_loss(logits, a["knowledge"], a["advice"])
    torch.testing.assert_close(loss[None], a["loss_noflags"], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], a["grad_noflags"], rtol=2e-6, atol=2e-6)


def test_loss_without_the_flagged_images_is_ssdds():
    a = field("ssdd")
    for flags in (a["ignore_flags"], lost_classes(a["knowledge"], a["advice"], 20)):
        loss = difference_loss(a["dd_knowledge"], a["knowledge"], a["advice"], flags)
        torch.testing.assert_close(loss[None], a["loss_flags"], rtol=2e-6, atol=2e-6)


# What holds for any maps


@given(batch=batches(), data=st.data())
def test_any_loss_equals_the_loops(batch, data):
    shape = len(batch.mask), batch.classes + 1
    flags = torch.tensor(data.draw(st.lists(st.sampled_from([0, 0, 0, 1]), min_size=shape[0] * shape[1])))
    for given_flags in (None, flags[: shape[0] * shape[1]].view(shape)):
        actual = value_and_grads(lambda *x, f=given_flags: difference_loss(*x, f), *given_of(batch))
        expected = value_and_grads(lambda *x, f=given_flags: difference_loss_by_loops(*x, f), *given_of(batch))
        torch.testing.assert_close(actual, expected)


@given(batch=batches())
def test_which_map_was_first_does_not_matter(batch):
    logits, knowledge, advice = given_of(batch)
    expected = difference_loss(logits, knowledge, advice)
    torch.testing.assert_close(difference_loss(logits, advice, knowledge), expected)


@given(batch=batches())
def test_an_equal_pair_of_maps_is_half_of_binary_cross_entropy(batch):
    logits, mask, _ = given_of(batch)
    mask = mask.clamp(0, batch.classes)
    for other, target in ((mask, torch.zeros_like(logits)), (mask + 1, torch.ones_like(logits))):
        expected = functional.binary_cross_entropy_with_logits(logits, target) / 2
        torch.testing.assert_close(difference_loss(logits, mask, other), expected)


def test_a_flagged_image_has_no_influence():
    logits, knowledge, advice = noise(3, 1, 4, 5).requires_grad_(), torch.zeros(3, 4, 5).long(), make_batch().mask
    advice = advice[:, :4, :5].clamp(0, 3)
    flags = torch.zeros(3, 4, dtype=torch.bool)
    flags[1, 2] = True
    loss = difference_loss(logits, knowledge, advice, flags)
    rest = [0, 2]
    torch.testing.assert_close(loss, difference_loss(logits[rest], knowledge[rest], advice[rest]))
    loss.backward()
    assert not logits.grad[1].any()
    assert logits.grad[rest].abs().flatten(1).any(1).all()


def test_an_image_that_is_void_does_not_count():
    batch = make_batch()
    logits, knowledge, advice = given_of(batch)
    knowledge, advice = knowledge.clone(), advice.clone()
    knowledge[0], advice[2] = -1, 255
    assert difference_loss(logits, knowledge, advice) == 0
    advice[2] = knowledge[2] = 3
    torch.testing.assert_close(
        difference_loss(logits, knowledge, advice), difference_loss(logits[2:], knowledge[2:], advice[2:])
    )


def test_void_of_either_map_is_left_out():
    logits = noise(1, 1, 2, 3)
    knowledge, advice = torch.tensor([[[0, 1, 1], [255, 2, 0]]]), torch.tensor([[[0, 1, 2], [1, 255, -1]]])
    expected = difference_loss(logits[..., :1, :], knowledge[:, :1], advice[:, :1])
    torch.testing.assert_close(difference_loss(logits, knowledge, advice), expected)


@pytest.mark.parametrize("sign", [-1, 1])
def test_large_logits_have_a_finite_loss_and_gradient(sign):
    logits = torch.full((1, 1, 1, 2), 1000.0 * sign, requires_grad=True)
    loss = difference_loss(logits, torch.tensor([[[0, 1]]]), torch.tensor([[[0, 2]]]))
    assert loss == 500
    loss.backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.any()


def test_gradcheck():
    logits = noise(2, 1, 2, 3).requires_grad_()
    maps = torch.tensor([[[0, 1, 255], [2, 0, 1]], [[1, 1, 1], [2, 0, 1]]]), torch.zeros(2, 2, 3).long()
    assert torch.autograd.gradcheck(lambda x: difference_loss(x, *maps), logits)


LOGITS, MASK, FLAGS = torch.rand(2, 1, 4, 5), torch.zeros(2, 4, 5).long(), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("logits", LOGITS[:, 0], ValueError),
        ("logits", LOGITS.expand(-1, 2, -1, -1), ValueError),
        ("logits", LOGITS.long(), TypeError),
        ("logits", None, TypeError),
        ("knowledge", MASK[..., :4], ValueError),
        ("knowledge", MASK.float(), TypeError),
        ("advice", MASK[:1], ValueError),
        ("advice", MASK.to("meta"), ValueError),
        ("flags", FLAGS[:1], ValueError),
        ("flags", FLAGS[0], ValueError),
        ("flags", FLAGS.to("meta"), ValueError),
    ],
)
def test_loss_refuses(name, value, error):
    arguments = {"logits": LOGITS, "knowledge": MASK, "advice": MASK, "flags": FLAGS}
    assert_refuses(difference_loss, arguments, name, value, error)
