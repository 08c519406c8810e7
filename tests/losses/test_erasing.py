from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pixelss import class_erasing_loss, erasing_mask
from tests.blocks import Block
from tests.oracles import assert_refuses, field
from tests.strategies import Batch, batches, noise
from tests.targets.test_erasing import classify, first_tag

SIGNATURES = {
    "class_erasing_loss": "(logits, tags, chosen)",
}


def inputs(b: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return b.probs[:, 1:, 0, 0], b.tags, first_tag(b.tags)


BLOCKS = {
    "class_erasing_loss": Block(
        lambda b: class_erasing_loss(*inputs(b)), lambda b: class_erasing_loss_by_loops(*inputs(b))
    ),
}


def class_erasing_loss_by_loops(logits: Tensor, tags: Tensor, chosen: Tensor) -> Tensor:
    B, N = logits.shape
    total = logits.sum() * 0
    for b, n in product(range(B), range(N)):
        if any(tag > 0 for tag in tags[b]):
            found = 1 / (1 + torch.exp(-logits[b, n]))
            remains = tags[b, n] > 0 and not chosen[b, n] > 0
            total = total - torch.log(found if remains else 1 - found) / (B * N)
    return total


def test_losses_and_gradients_are_occses():
    """One step: the trained network's CAMs erase, the fixed one's logits tell what is left."""
    a = field("occse")
    trained = [a[name].requires_grad_() for name in ("er_conv_w", "er_fc_w")]
    cam = classify(a, "er", a["image"])
    logits = cam.mean((2, 3))
    torch.testing.assert_close(logits, a["logits_er"], rtol=2e-6, atol=2e-6)
    large = functional.interpolate(cam, a["image"].shape[-2:], mode="bilinear", align_corners=False)
    mask = erasing_mask(large, a["label_mask"], per_image=False, eps=1e-5)
    erased = classify(a, "cl", a["image"] * (1 - mask)).mean((2, 3))
    torch.testing.assert_close(erased, a["logits_cl"], rtol=2e-6, atol=2e-6)
    weight = 0.3 + 0.05 * a["epoch"]
    torch.testing.assert_close(weight, a["weight"])
    terms = (
        functional.binary_cross_entropy_with_logits(logits, a["tags"]),
        weight * class_erasing_loss(erased, a["tags"], a["label_mask"]),
    )
    for term, name in zip(terms, ("loss_all", "loss_select"), strict=True):
        torch.testing.assert_close(term, a[name], rtol=2e-6, atol=2e-6)
    gradients = torch.autograd.grad(sum(terms), [*trained, cam])
    for gradient, name in zip(gradients, ("er_conv_w", "er_fc_w", "cam_total"), strict=True):
        torch.testing.assert_close(gradient, a[f"grad_{name}"], rtol=2e-6, atol=2e-6)


@given(batch=batches())
def test_tagged_images_give_torchs_cross_entropy_of_the_remaining_tags(batch):
    logits, tags, _ = inputs(batch)
    tags = tags.clone()
    tags[:, 0] = 1
    chosen = first_tag(tags)
    expected = functional.binary_cross_entropy_with_logits(logits, (tags - chosen.long()).to(logits))
    torch.testing.assert_close(class_erasing_loss(logits, tags, chosen), expected)
    unerased = class_erasing_loss(logits, tags, 0 * chosen)
    torch.testing.assert_close(unerased, functional.binary_cross_entropy_with_logits(logits, tags.to(logits)))


@given(data=st.data(), batch=batches())
def test_the_order_of_images_and_classes_does_not_matter(data, batch):
    given_ = inputs(batch)
    images, classes = (torch.tensor(data.draw(st.permutations(range(size)))) for size in given_[0].shape)
    permuted = (x[images][:, classes] for x in given_)
    torch.testing.assert_close(class_erasing_loss(*permuted), class_erasing_loss(*given_))


@given(batch=batches(), images=st.integers(1, 3))
def test_images_without_a_tag_add_nothing_and_count_in_the_mean(batch, images):
    logits, tags, chosen = inputs(batch)
    B = len(tags)
    more = [torch.cat([x, x.new_zeros(images, x.shape[1])]) for x in (logits + 9, tags, chosen)]
    alone = class_erasing_loss(logits + 9, tags, chosen)
    torch.testing.assert_close(class_erasing_loss(*more), alone * B / (B + images))


def test_a_classifier_that_still_finds_the_erased_class_pays():
    tags, chosen = torch.tensor([[1, 1, 0]]), torch.tensor([[0, 1, 0]])
    for logit, expected in ((50.0, 50 / 3), (-50.0, 0.0), (0.0, math.log(2) / 3)):
        logits = torch.tensor([[50.0, logit, -50.0]])
        assert class_erasing_loss(logits, tags, chosen).item() == pytest.approx(expected, abs=1e-6)


def test_an_absent_class_that_was_chosen_is_absent():
    logits, tags = noise(2, 3), torch.tensor([[1, 0, 0], [0, 1, 1]])
    other = class_erasing_loss(logits, tags, torch.tensor([[0, 1, 0], [0, 0, 0]]))
    assert torch.equal(other, class_erasing_loss(logits, tags, torch.zeros(2, 3)))


@pytest.mark.parametrize("images", [0, 2])
def test_no_tag_or_no_image_gives_zero_on_the_graph(images):
    logits = torch.rand(images, 4, requires_grad=True)
    loss = class_erasing_loss(logits, torch.zeros(images, 4), torch.zeros(images, 4))
    assert loss == 0
    loss.backward()
    assert not logits.grad.any()


def test_gradcheck():
    tags = torch.tensor([[1, 0, 1], [0, 1, 0]])
    assert torch.autograd.gradcheck(
        lambda x: class_erasing_loss(x, tags, first_tag(tags)), noise(2, 3).requires_grad_()
    )


# refusals


LOGITS, TAGS = torch.rand(2, 3), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("logits", LOGITS[0], ValueError),
        ("logits", LOGITS.long(), TypeError),
        ("logits", None, TypeError),
        ("tags", TAGS[:, :2], ValueError),
        ("tags", TAGS.to("meta"), ValueError),
        ("chosen", TAGS[:1], ValueError),
        ("chosen", torch.tensor([0, 1]), ValueError),
        ("chosen", TAGS.to("meta"), ValueError),
    ],
)
def test_loss_refuses(name, value, error):
    assert_refuses(class_erasing_loss, {"logits": LOGITS, "tags": TAGS, "chosen": torch.eye(3)[:2]}, name, value, error)
