from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pixelss import complementary_loss, min_pooling_loss, normalize_cam
from tests.blocks import Block
from tests.oracles import active, assert_refuses, field, value_and_grads
from tests.strategies import Batch, batches, make_batch, noise

SIGNATURES = {
    "complementary_loss": "(full, kept, hidden, share, *, through='full')",
}


def maps_of(b: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CAMs of an image and of its two parts, zero for absent classes, and a share of every image."""
    present = (b.tags > 0)[:, :, None, None]
    cams = (x.where(present, 0) for x in (b.student[0], b.teacher[0], b.probs[:, 1:]))
    return *cams, b.images.float().mean((1, 2, 3)) / 255


def on_maps(loss: Callable[..., Tensor], **settings: str) -> Callable[[Batch], Tensor]:
    return lambda b: loss(*maps_of(b), **settings)


BLOCKS = {
    "complementary_loss": Block(
        on_maps(lambda *x: complementary_loss(*x)),
        on_maps(lambda *x: complementary_loss_by_loops(*x)),
        but={"gradient": "the parts' maps carry none", "checks": "its entry makes the arguments of other tensors"},
    ),
    "complementary_loss all": Block(
        on_maps(lambda *x, **s: complementary_loss(*x, **s), through="all"),
        on_maps(lambda *x, **s: complementary_loss_by_loops(*x, **s), through="all"),
        but={"checks": "its entry makes the arguments of other tensors"},
    ),
}


def complementary_loss_by_loops(
    full: Tensor, kept: Tensor, hidden: Tensor, share: Tensor, through: str = "full"
) -> Tensor:
    if through == "full":
        kept, hidden = kept.detach(), hidden.detach()
    places = list(product(*map(range, full.shape)))
    total = full.sum() * 0 if not places else 0
    for place in places:
        r = share[place[0]].detach()
        together = r * active(kept[place]) + (1 - r) * active(hidden[place])
        total = total + (together - active(full[place])).abs() / len(places)
    return total


# What CPN's own code returned: min-max normalised maps, absent classes zero, background first


NAMES = [f"cam_{refined}{part}" for refined in ("", "refined_") for part in ("full", "keep", "hide")]


@pytest.fixture
def cpn():
    """Its arrays; the raw maps as leaves, and as it compares them."""
    a = field("cpn")
    raw = [a[name].requires_grad_() for name in NAMES]
    present = functional.pad(a["tags"], (1, 0), value=1)[:, :, None, None]
    return a, raw, [normalize_cam(x, kind="minmax") * present for x in raw]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)


def regularisers(a: dict[str, Tensor], maps: list[Tensor]) -> tuple[Tensor, Tensor]:
    foreground = [x[:, 1:] for x in maps]
    plain = complementary_loss(*foreground[:3], a["keep_rate"])
    return plain, complementary_loss(*foreground[3:], a["keep_rate"], through="all")


def test_both_losses_are_cpns(cpn):
    a, _, maps = cpn
    plain, refined = regularisers(a, maps)
    close(plain, a["loss_tcp"])
    close(refined, a["loss_tcp_improved"])


def cross_losses(a: dict[str, Tensor], maps: list[Tensor]) -> list[Tensor]:
    """Its cross terms, which the library leaves out: what a part's CAM misses, against the other's refined map."""
    r = a["keep_rate"][:, None, None, None]
    scaled = [weight * x for weight, x in zip(2 * [1, r, 1 - r], maps, strict=True)]
    full, kept, hidden, _, kept_refined, hidden_refined = (
        torch.cat([1 - x[:, 1:].amax(1, keepdim=True), x[:, 1:]], 1) for x in scaled
    )
    losses = []
    for missed, refined in ((full - kept, hidden_refined), (full - hidden, kept_refined)):
        target = missed.where(missed == missed.amax(1, keepdim=True), 0).detach()
        distances = (target - refined).abs().flatten(1)
        losses.append(distances.topk(int(0.2 * distances.shape[1]), dim=1).values.mean())
    return losses


def test_the_sum_of_the_terms_is_cpns(cpn):
    a, leaves, maps = cpn
    logits = [cam[:, 1:].mean((2, 3)) for cam in leaves[:3]]
    cls = sum(functional.multilabel_soft_margin_loss(x, a["tags"]) for x in logits) / 3
    cls = cls + sum(min_pooling_loss(cam[:, 1:], a["tags"]) for cam in leaves[3:]) / 3
    close(cls, a["loss_cls"])
    cross = cross_losses(a, maps)
    close(sum(cross), a["loss_cpcr"])
    loss = cls + sum(regularisers(a, maps)) + sum(cross)
    close(loss, a["loss"])
    for gradient, name in zip(torch.autograd.grad(loss, leaves), NAMES, strict=True):
        close(gradient, a[f"grad_{name}"])


# What holds for any maps


@given(batch=batches(), through=st.sampled_from(["full", "all"]))
def test_any_setting_equals_the_loops(batch, through):
    *cams, share = maps_of(batch)
    actual = value_and_grads(lambda *x: complementary_loss(*x, share, through=through), *cams)
    expected = value_and_grads(lambda *x: complementary_loss_by_loops(*x, share, through), *cams)
    torch.testing.assert_close(actual, expected)
    assert actual[2].any() <= (through == "all")


@given(batch=batches())
def test_an_image_that_is_shown_whole_gives_torchs_l1(batch):
    full, kept, hidden, share = maps_of(batch)
    for shown, r in ((kept, 1), (hidden, 0)):
        loss = complementary_loss(full, kept, hidden, torch.full_like(share, r))
        torch.testing.assert_close(loss, functional.l1_loss(full, shown))


@given(batch=batches())
def test_the_parts_may_change_places(batch):
    full, kept, hidden, share = maps_of(batch)
    expected = complementary_loss(full, kept, hidden, share)
    torch.testing.assert_close(complementary_loss(full, hidden, kept, 1 - share), expected)


@given(data=st.data(), batch=batches())
def test_the_order_of_images_and_classes_does_not_matter(data, batch):
    *cams, share = maps_of(batch)
    images, classes = (torch.tensor(data.draw(st.permutations(range(size)))) for size in cams[0].shape[:2])
    permuted = complementary_loss(*(x[images][:, classes].flip(-1) for x in cams), share[images])
    torch.testing.assert_close(permuted, complementary_loss(*cams, share))


def test_parts_that_make_up_the_whole_cost_nothing():
    _, kept, hidden, share = maps_of(make_batch())
    r = share[:, None, None, None]
    assert complementary_loss(r * kept + (1 - r) * hidden, kept, hidden, share) == 0


@pytest.mark.parametrize("through", ["full", "all"])
def test_where_the_gradient_goes(through):
    *cams, share = (x.requires_grad_() for x in maps_of(make_batch()))
    complementary_loss(*cams, share, through=through).backward()
    assert [x.grad is not None for x in (*cams, share)] == [True, through == "all", through == "all", False]


def test_shares_in_half_precision_weigh_in_float32():
    cams = [torch.rand(2, 3, 4, 5) for _ in range(3)]
    share = torch.tensor([0.3, 0.7]).half()
    loss = complementary_loss(*cams, share)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, complementary_loss(*cams, share.float()))


def test_gradcheck():
    full, kept, hidden = (noise(2, 2, 2, 3, seed=i).requires_grad_() for i in range(3))
    share = torch.tensor([0.3, 0.6], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: complementary_loss(x, kept, hidden, share), full)
    assert torch.autograd.gradcheck(lambda *x: complementary_loss(*x, share, through="all"), (full, kept, hidden))


# refusals


CAM = torch.rand(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("full", CAM[0], ValueError),
        ("full", CAM.long(), TypeError),
        ("kept", CAM[..., :4], ValueError),
        ("kept", CAM.to("meta"), ValueError),
        ("hidden", CAM[:1], ValueError),
        ("hidden", None, TypeError),
        ("share", torch.rand(3), ValueError),
        ("share", torch.rand(2, 1), ValueError),
        ("share", torch.ones(2).long(), TypeError),
        ("share", 0.5, TypeError),
        ("share", torch.rand(2).to("meta"), ValueError),
        ("through", "kept", ValueError),
    ],
)
def test_loss_refuses(name, value, error):
    given_ = {"full": CAM, "kept": CAM, "hidden": CAM, "share": torch.rand(2), "through": "full"}
    assert_refuses(complementary_loss, given_, name, value, error)
