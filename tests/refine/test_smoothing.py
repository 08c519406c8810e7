from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelss import dense_crf, variation_smoothing
from tests.blocks import Block
from tests.oracles import active, assert_matches, assert_refuses, field
from tests.strategies import batches, make_batch

SIGNATURES = {"variation_smoothing": "(cam, *, threshold=0.05, strength=0.3)"}
BLOCKS = {
    "variation_smoothing": Block(lambda b: variation_smoothing(b.cam), lambda b: variation_smoothing_by_loops(b.cam)),
}

thresholds, strengths = st.sampled_from([0.0, 0.05, 0.3, 1.0]), st.sampled_from([0.0, 0.3, 1.0, 4.0])


def variation_smoothing_by_loops(cam: Tensor, threshold: float = 0.05, strength: float = 0.3) -> Tensor:
    B, N, H, W = cam.shape
    smoothed = cam.nan_to_num(0, 0, 0) * 0
    for b, n in product(range(B), range(N)):
        one = {(i, j): active(cam[b, n, i, j]) for i, j in product(range(H), range(W))}
        counting = [value for value in one.values() if value > threshold]
        variation = 0.0
        if counting:
            mean = sum(counting) / len(counting)
            variance = sum((value - mean) ** 2 for value in counting) / len(counting)
            variation = strength * variance**0.5 / mean if variance > 0 else 0.0
            variation = variation if variation < 1 else 1.0
        for (i, j), value in one.items():
            if value >= threshold and value > 0:
                smoothed[b, n, i, j] = value ** (1 - variation)
    return smoothed


# What PMM's own code returned


def test_maps_are_pmms():
    a = field("pmm")
    settings = {"threshold": float(a["threshold"]), "strength": float(a["scale"])}
    smoothed = variation_smoothing(a["cams"][None], **settings)
    torch.testing.assert_close(smoothed[0], a["smoothed"], rtol=2e-6, atol=2e-6)
    assert torch.equal(variation_smoothing(a["cams"][None]), smoothed)  # its settings are the defaults


def test_the_power_is_pmms():
    a = field("pmm")
    for strength, name in ((float(a["scale"]), "cov"), (1.0, "cov_unscaled")):
        for cam, variation in zip(a["cams"], a[name], strict=True):
            cam = cam.double()
            smoothed = variation_smoothing(cam[None, None], strength=strength)[0, 0]
            measured = 1 - smoothed.log() / cam.log()
            torch.testing.assert_close(measured[cam > 0.1], variation.expand(cam.shape)[cam > 0.1], rtol=2e-6, atol=0)
    assert a["cov_empty"] == 0


def test_the_crf_of_what_is_smoothed_claims_what_pmms_does():
    a = field("pmm")
    smoothed = variation_smoothing(a["cams"][:, None])
    probs = torch.cat([(1 - smoothed) ** int(a["alpha"]), smoothed], 1)
    images = a["image"].permute(2, 0, 1).expand(len(probs), -1, -1, -1)
    refined = dense_crf(images, probs, gaussian=(3.0, 10.0))[:, 1]
    torch.testing.assert_close(refined, a["crf_fg"], rtol=0, atol=3e-3)
    assert torch.equal(refined > 0.5, a["crf_fg"] > 0.5)


# What holds for any maps


@given(batch=batches(), threshold=thresholds, strength=strengths)
def test_any_settings_equal_the_loops(batch, threshold, strength):
    assert_matches(
        lambda x: variation_smoothing(x, threshold=threshold, strength=strength),
        lambda x: variation_smoothing_by_loops(x, threshold, strength),
        batch.cam.clamp(max=0.99),
    )


@given(batch=batches(), threshold=thresholds, strength=strengths)
def test_nothing_that_stays_is_lowered_and_the_order_stays(batch, threshold, strength):
    smoothed = variation_smoothing(batch.cam, threshold=threshold, strength=strength)
    kept = batch.cam >= threshold
    assert (smoothed >= batch.cam - 1e-12)[kept].all()
    assert (smoothed <= 1).all()
    assert not smoothed[~kept].any()
    before, after = (x.flatten(2) for x in (batch.cam, smoothed))
    rising = before.sort(-1).indices
    assert (after.gather(-1, rising).diff() >= -1e-12).all()


@given(batch=batches(), data=st.data())
def test_maps_do_not_know_of_each_other(batch, data):
    smoothed = variation_smoothing(batch.cam)
    order = torch.tensor(data.draw(st.permutations(range(batch.classes))))
    torch.testing.assert_close(variation_smoothing(batch.cam[:, order]), smoothed[:, order])
    torch.testing.assert_close(variation_smoothing(batch.cam.flip(2, 3)), smoothed.flip(2, 3))
    torch.testing.assert_close(variation_smoothing(batch.cam[:1, :1]), smoothed[:1, :1])


@given(batch=batches())
def test_without_strength_the_threshold_is_all(batch):
    smoothed = variation_smoothing(batch.cam, threshold=0.3, strength=0)
    assert torch.equal(smoothed, batch.cam.where(batch.cam >= 0.3, 0))


def test_an_even_map_stays_and_an_uneven_one_is_lifted():
    cam = torch.full((1, 3, 2, 2), 0.5, dtype=torch.float64)
    cam[0, 1] = torch.tensor([[1.0, 0.1], [0.1, 0.1]])
    cam[0, 2] = torch.tensor([[1.0, 0.4], [0.4, 0.4]])
    smoothed = variation_smoothing(cam)
    assert torch.equal(smoothed[:, 0], cam[:, 0])
    power = smoothed.log() / cam.log()  # the more uneven map is lifted more
    assert power[0, 1, 0, 1] < power[0, 2, 0, 1] < 1


def test_a_value_at_the_threshold_stays_and_does_not_count():
    cam = torch.tensor([[[[0.25, 0.5, 1.0]]]])
    alone = variation_smoothing(torch.tensor([[[[0.5, 1.0]]]]), threshold=0.25)
    smoothed = variation_smoothing(cam, threshold=0.25)
    torch.testing.assert_close(smoothed[..., 1:], alone)
    assert smoothed[..., 0] > 0.25


@pytest.mark.parametrize("cam", [torch.zeros(1, 1, 2, 3), torch.full((1, 1, 2, 3), 0.04), -torch.ones(1, 1, 2, 3)])
def test_a_map_below_the_threshold_is_zeros_with_a_gradient(cam):
    cam.requires_grad_()
    smoothed = variation_smoothing(cam)
    assert not smoothed.any()
    smoothed.sum().backward()
    assert not cam.grad.any()


@pytest.mark.parametrize("value", [0.05, 0.5, 1.0])
def test_the_gradient_of_an_even_map_is_one(value):
    cam = torch.full((1, 1, 2, 3), value, dtype=torch.float64, requires_grad=True)
    variation_smoothing(cam, threshold=0.01).sum().backward()
    torch.testing.assert_close(cam.grad, torch.ones_like(cam))


def test_the_power_is_never_negative():
    cam = torch.full((1, 1, 10, 10), 0.06)
    cam[..., 0, 0], cam[..., 0, 1] = 1, 0
    smoothed = variation_smoothing(cam, strength=5)
    assert torch.equal(smoothed, (cam > 0).float())


def test_gradcheck():
    cam = (0.1 + 0.8 * make_batch().cam[:1]).requires_grad_()
    assert torch.autograd.gradcheck(variation_smoothing, cam)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("cam", torch.rand(3, 4, 5), ValueError),
        ("cam", torch.rand(2, 0, 4, 5), ValueError),
        ("cam", torch.ones(2, 3, 4, 5).long(), TypeError),
        ("cam", None, TypeError),
        ("threshold", -0.1, ValueError),
        ("threshold", 1.1, ValueError),
        ("threshold", "0.05", TypeError),
        ("strength", -1, ValueError),
        ("strength", float("nan"), ValueError),
        ("strength", None, TypeError),
    ],
)
def test_smoothing_refuses(name, value, error):
    arguments = {"cam": torch.rand(2, 3, 4, 5), "threshold": 0.05, "strength": 0.3}
    assert_refuses(variation_smoothing, arguments, name, value, error)
