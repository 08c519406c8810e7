from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pixelss import cross_equivariance_loss, equivariance_loss, min_pooling_loss
from tests.blocks import Block
from tests.oracles import active, assert_refuses, field, value_and_grads
from tests.strategies import Batch, batches, make_batch

SIGNATURES = {
    "equivariance_loss": "(first, second)",
    "cross_equivariance_loss": "(refined, cam, *, ratio=0.2)",
    "min_pooling_loss": "(cam, tags, *, ratio=0.25)",
}


def maps_of(b: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The CAMs of two views, zero for absent classes, and refined ones: background alone where an image has no tag."""
    present = (b.tags > 0)[:, :, None, None]
    K = b.classes + 1
    halved = 0.5 ** torch.arange(K, device=b.tags.device).view(K, 1, 1).to(b.probs)  # sums of 1 would make ties
    background = torch.zeros_like(b.probs)
    background[:, 0] = 1
    refined = torch.where(present.any(1, keepdim=True), b.probs * halved, background)
    return b.student[0].where(present, 0), b.teacher[0].where(present, 0), refined


def both_views(loss: Callable[..., Tensor]) -> Callable[[Batch], Tensor]:
    return lambda b: loss(*maps_of(b)[:2])


def refined_and_cam(loss: Callable[..., Tensor]) -> Callable[[Batch], Tensor]:
    return lambda b: loss(maps_of(b)[2], maps_of(b)[0])


BLOCKS = {
    "equivariance_loss": Block(
        both_views(lambda *x: equivariance_loss(*x)),
        both_views(lambda *x: equivariance_loss_by_loops(*x)),
        but={"checks": "its entry makes the arguments of other tensors"},
    ),
    "cross_equivariance_loss": Block(
        refined_and_cam(lambda *x: cross_equivariance_loss(*x)),
        refined_and_cam(lambda *x: cross_equivariance_loss_by_loops(*x)),
        but={"gradient": "the target carries none", "checks": "its entry makes the arguments of other tensors"},
    ),
    "min_pooling_loss": Block(
        lambda b: min_pooling_loss(b.raw[2], b.tags), lambda b: min_pooling_loss_by_loops(b.raw[2], b.tags)
    ),
}

ratios = st.sampled_from([0.01, 0.2, 0.25, 0.5, 1.0])


def number(x: Tensor) -> float:
    return x.detach().item()


def equivariance_loss_by_loops(first: Tensor, second: Tensor) -> Tensor:
    places = list(product(*map(range, first.shape)))
    total = (first.sum() + second.sum()) * 0 if not places else 0
    for place in places:
        total = total + (active(first[place]) - active(second[place])).abs() / len(places)
    return total


def cross_equivariance_loss_by_loops(refined: Tensor, cam: Tensor, ratio: float = 0.2) -> Tensor:
    B, K, h, w = refined.shape
    total = refined.sum() * 0
    for b in range(B):
        distances = []
        for i, j in product(range(h), range(w)):
            scores = [active(cam[b, n, i, j]).item() for n in range(K - 1)]
            targets = [1 - max(scores), *(score if score == max(scores) else 0 for score in scores)]
            distances += [(target - active(refined[b, k, i, j])).abs() for k, target in enumerate(targets)]
        hardest = sorted(distances, key=number, reverse=True)[: max(1, int(ratio * (K * h * w)))]
        total = total + sum(hardest) / len(hardest) / B
    return total


def min_pooling_loss_by_loops(cam: Tensor, tags: Tensor, ratio: float = 0.25) -> Tensor:
    B, N, H, W = cam.shape
    total = cam.nan_to_num(0, 0, 0).sum() * 0
    for b in range(B):
        strongest = []
        for i, j in product(range(H), range(W)):
            values = [active(cam[b, n, i, j]) if tags[b, n] > 0 else cam.new_zeros(()) for n in range(N)]
            strongest.append(max(values, key=number))
        weakest = sorted(strongest, key=number)[: max(1, int(ratio * (H * W)))]
        total = total + sum(value.relu() for value in weakest) / len(weakest) / B
    return total


# What SEAM's own code returned. Its maps: min-max normalised, brought to the second view's size, absent classes zero.


def min_max(x: Tensor, eps: float = 1e-5) -> Tensor:
    x = x.relu()
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return (x - low - eps).relu() / (high - low + eps)


@pytest.fixture
def seam():
    """Its arrays; the raw maps as leaves, and as it compares them."""
    a = field("seam")
    raw = [a[name].requires_grad_() for name in ("loss_cam1", "loss_cam2", "loss_cam_rv1", "loss_cam_rv2")]
    size = raw[1].shape[-2:]
    present = functional.pad(a["loss_tags"], (1, 0), value=1)[:, :, None, None]
    maps = [functional.interpolate(min_max(x), size, mode="bilinear", align_corners=True) * present for x in raw]
    return a, raw, maps


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)


def test_equivariance_is_seams(seam):
    a, (cam1, cam2, *_), (first, second, *_) = seam
    loss = equivariance_loss(first[:, 1:], second[:, 1:])
    close(loss, a["loss_er"])
    for gradient, name in zip(torch.autograd.grad(loss, [cam1, cam2]), ("cam1", "cam2"), strict=True):
        close(gradient, a[f"loss_er_grad_{name}"])


def test_cross_equivariance_is_seams(seam):
    a, (_, _, rv1, rv2), (first, second, refined1, refined2) = seam
    ways = (
        (refined1, second, rv1, "loss_ecr1", "loss_ecr1_grad_cam_rv1"),
        (refined2, first, rv2, "loss_ecr2", "loss_ecr2_grad_cam_rv2"),
    )
    for refined, cam, leaf, value, gradient in ways:
        loss = cross_equivariance_loss(refined, cam[:, 1:])
        close(loss, a[value])
        close(torch.autograd.grad(loss, leaf)[0], a[gradient])


def test_min_pooling_is_seams(seam):
    a, (_, _, rv1, rv2), _ = seam
    loss = min_pooling_loss(rv1[:, 1:], a["loss_tags"])
    close(loss, a["loss_rvmin1"])
    close(torch.autograd.grad(loss, rv1)[0], a["loss_rvmin1_grad_cam_rv1"])
    close(min_pooling_loss(rv2[:, 1:], a["loss_tags"]), a["loss_rvmin2"])


def test_the_sum_of_the_terms_is_seams(seam):
    a, leaves, (first, second, refined1, refined2) = seam
    cams, rvs = leaves[:2], leaves[2:]
    scores = [cam[:, 1:].mean((2, 3)) for cam in cams]
    terms = [functional.multilabel_soft_margin_loss(score, a["loss_tags"]) / 2 for score in scores]
    terms += [min_pooling_loss(rv[:, 1:], a["loss_tags"]) / 2 for rv in rvs]
    terms.append(equivariance_loss(first[:, 1:], second[:, 1:]))
    terms += [cross_equivariance_loss(refined1, second[:, 1:]), cross_equivariance_loss(refined2, first[:, 1:])]
    loss = sum(terms)
    close(loss, a["loss_total"])
    for gradient, name in zip(torch.autograd.grad(loss, leaves), ("cam1", "cam2", "cam_rv1", "cam_rv2"), strict=True):
        close(gradient, a[f"grad_{name}"])


# What holds for any maps


@given(batch=batches())
def test_equivariance_is_torchs_l1_and_symmetric(batch):
    first, second = batch.student[0], batch.teacher[0]
    loss = equivariance_loss(first, second)
    torch.testing.assert_close(loss, functional.l1_loss(first, second))
    assert torch.equal(loss, equivariance_loss(second, first))
    assert equivariance_loss(first, first) == 0


@given(batch=batches(), ratio=ratios)
def test_any_ratio_equals_the_loops(batch, ratio):
    for ours, loops, maps in (
        (cross_equivariance_loss, cross_equivariance_loss_by_loops, (maps_of(batch)[2], maps_of(batch)[0])),
        (min_pooling_loss, min_pooling_loss_by_loops, (batch.raw[2], batch.tags)),
    ):
        actual = value_and_grads(lambda *x, f=ours: f(*x, ratio=ratio), *maps)
        expected = value_and_grads(lambda *x, f=loops: f(*x, ratio), *maps)
        torch.testing.assert_close(actual, expected)


@given(data=st.data(), batch=batches())
def test_the_order_of_the_classes_does_not_matter(data, batch):
    order = torch.tensor(data.draw(st.permutations(range(batch.classes))))
    refined = batch.probs[:, torch.cat([torch.zeros(1).long(), 1 + order])]
    cam, raw, tags = batch.cam[:, order], batch.raw[2][:, order], batch.tags[:, order]
    torch.testing.assert_close(cross_equivariance_loss(refined, cam), cross_equivariance_loss(batch.probs, batch.cam))
    torch.testing.assert_close(min_pooling_loss(raw, tags), min_pooling_loss(batch.raw[2], batch.tags))


@given(batch=batches(), ratio=ratios)
def test_a_flip_does_not_matter(batch, ratio):
    flip = batch.probs.flip(-1), batch.cam.flip(-1)
    expected = cross_equivariance_loss(batch.probs, batch.cam, ratio=ratio)
    torch.testing.assert_close(cross_equivariance_loss(*flip, ratio=ratio), expected)
    expected = min_pooling_loss(batch.raw[2], batch.tags, ratio=ratio)
    torch.testing.assert_close(min_pooling_loss(batch.raw[2].flip(-1), batch.tags, ratio=ratio), expected)


@given(batch=batches())
def test_fewer_hard_distances_cost_more_and_fewer_weak_pixels_less(batch):
    shares = (0.1, 0.4, 1.0)
    hard = [cross_equivariance_loss(batch.probs, batch.cam, ratio=share) for share in shares]
    weak = [min_pooling_loss(batch.raw[2], batch.tags, ratio=share) for share in shares]
    assert hard[0] >= hard[1] - 1e-12 >= hard[2] - 2e-12
    assert weak[0] <= weak[1] + 1e-12 <= weak[2] + 2e-12
    assert hard[2] >= 0
    assert hard[0] <= 1


def test_refined_maps_that_say_what_the_cams_say_cost_nothing():
    cam = make_batch().cam
    strongest = cam.amax(1, keepdim=True)
    target = torch.cat([1 - strongest, cam.where(cam == strongest, 0)], 1).requires_grad_()
    loss = cross_equivariance_loss(target, cam)
    assert loss == 0
    loss.backward()
    assert not target.grad.any()


def test_the_target_carries_no_gradient():
    batch = make_batch()
    cam, refined = batch.cam.requires_grad_(), batch.probs.requires_grad_()
    cross_equivariance_loss(refined, cam).backward()
    assert cam.grad is None
    assert refined.grad.any()


def test_a_quarter_of_background_costs_nothing():
    cam = torch.ones(2, 3, 4, 4)
    cam[:, :, 0] = -1
    assert min_pooling_loss(cam, torch.ones(2, 3)) == 0
    assert min_pooling_loss(cam, torch.ones(2, 3), ratio=0.5) == 0.5
    assert min_pooling_loss(torch.ones(2, 3, 4, 4), torch.zeros(2, 3)) == 0


def test_gradcheck():
    batch = make_batch(images=1, classes=2, image_size=(2, 3))
    first, second, refined = (x.requires_grad_() for x in (0.1 + batch.probs[:, 1:], batch.probs[:, :2], batch.probs))
    assert torch.autograd.gradcheck(equivariance_loss, (first, second))
    assert torch.autograd.gradcheck(lambda x: cross_equivariance_loss(x, batch.cam, ratio=0.5), refined)
    raw = batch.raw[2].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: min_pooling_loss(x, torch.ones(1, 2), ratio=0.5), raw)


# refusals


CAM, REFINED, TAGS = torch.rand(2, 3, 4, 5), torch.rand(2, 4, 4, 5), torch.ones(2, 3)
BAD_RATIOS = [("ratio", 0, ValueError), ("ratio", 1.1, ValueError), ("ratio", "0.2", TypeError)]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("first", CAM[0], ValueError),
        ("first", CAM.long(), TypeError),
        ("second", CAM[..., :4], ValueError),
        ("second", CAM[:1], ValueError),
        ("second", CAM.to("meta"), ValueError),
        ("second", None, TypeError),
    ],
)
def test_equivariance_refuses(name, value, error):
    assert_refuses(equivariance_loss, {"first": CAM, "second": CAM}, name, value, error)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("refined", CAM, ValueError),
        ("refined", REFINED[..., :4], ValueError),
        ("refined", REFINED.long(), TypeError),
        ("refined", REFINED.to("meta"), ValueError),
        ("cam", CAM[0], ValueError),
        ("cam", None, TypeError),
        *BAD_RATIOS,
    ],
)
def test_cross_equivariance_refuses(name, value, error):
    assert_refuses(cross_equivariance_loss, {"refined": REFINED, "cam": CAM, "ratio": 0.2}, name, value, error)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("cam", CAM[0], ValueError),
        ("cam", CAM.long(), TypeError),
        ("tags", TAGS[:, :2], ValueError),
        ("tags", TAGS[:1], ValueError),
        ("tags", TAGS.to("meta"), ValueError),
        *BAD_RATIOS,
    ],
)
def test_min_pooling_refuses(name, value, error):
    assert_refuses(min_pooling_loss, {"cam": CAM, "tags": TAGS, "ratio": 0.25}, name, value, error)
