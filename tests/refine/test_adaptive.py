from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelss import PixelAdaptiveRefinement, pixel_adaptive_refinement
from pixelss.refine import adaptive
from tests.blocks import Block
from tests.oracles import assert_refuses, bilinear, field, value_and_grads
from tests.strategies import Batch, batches, make_batch

SIGNATURES = {
    "PixelAdaptiveRefinement": "(*, dilations=(1, 2, 4, 8, 12, 24), iterations=10, size=None, normalize=True)",
    "pixel_adaptive_refinement": (
        "(images, scores, *, dilations=(1, 2, 4, 8, 12, 24), iterations=10, size=None, normalize=True)"
    ),
}

SMALL = {"dilations": (1, 6), "iterations": 2}


def refinement_by_loops(
    images: Tensor, scores: Tensor, *, dilations=(1, 2, 4, 8, 12, 24), iterations: int = 10, normalize: bool = True
) -> Tensor:
    B, _, H, W = scores.shape
    ring = [(dy, dx) for dy, dx in product((-1, 0, 1), repeat=2) if (dy, dx) != (0, 0)]
    offsets = [(d * dy, d * dx) for d, (dy, dx) in product(dilations, ring)]
    distance = torch.tensor([d * (dy**2 + dx**2) ** 0.5 for d, (dy, dx) in product(dilations, ring)]).double()
    near = (-((distance / distance.std() / 0.3) ** 2)).softmax(0)

    def around(y: int, x: int) -> list[tuple[int, int]]:
        return [(min(max(y + dy, 0), H - 1), min(max(x + dx, 0), W - 1)) for dy, dx in offsets]

    def weights(image: Tensor, y: int, x: int) -> Tensor:
        colours = torch.stack([image[:, v, u] for v, u in around(y, x)])  # (O, 3)
        steps = (colours - image[:, y, x]) / (colours.std(0) + 1e-8) / 0.3
        w = (-steps.square().mean(1)).softmax(0) + 0.01 * near
        return w / w.sum() if normalize else w

    w = {(b, y, x): weights(images[b].double(), y, x) for b, y, x in product(range(B), range(H), range(W))}
    for _ in range(iterations):
        moved = [
            sum(w_q * scores[b, :, v, u] for w_q, (v, u) in zip(w[b, y, x], around(y, x), strict=True))
            for b, y, x in product(range(B), range(H), range(W))
        ]
        scores = torch.stack(moved).view(B, H, W, -1).permute(0, 3, 1, 2) if moved else scores
    return scores


BLOCKS = {
    "pixel_adaptive_refinement": Block(
        lambda b: pixel_adaptive_refinement(b.images, b.probs, **SMALL),
        lambda b: refinement_by_loops(b.images, b.probs, **SMALL),
        compiled_by="pixel_adaptive_refinement size",
    ),
    "pixel_adaptive_refinement size": Block(
        lambda b: pixel_adaptive_refinement(b.images, b.probs, size=0.5, **SMALL),
    ),
    "PixelAdaptiveRefinement": Block(lambda b: PixelAdaptiveRefinement(**SMALL)(b.images, b.probs)),
}


# the public code


def with_corners(x: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=True)


@pytest.mark.parametrize(
    ("key", "settings"), [("par_out", {}), ("par_small_out", {"dilations": (1, 2), "iterations": 3})]
)
def test_equals_the_public_code(key, settings, device):
    golden = field("afa")
    scores = with_corners(golden["par_masks"], golden["par_image"].shape[2:])
    actual = pixel_adaptive_refinement(golden["par_image"].to(device), scores.to(device), normalize=False, **settings)
    torch.testing.assert_close(actual.cpu(), golden[key], rtol=0, atol=2e-6)


def test_equals_the_public_code_at_the_scores_size(device):
    golden = field("afa")
    images = with_corners(golden["par_image"], golden["par_masks"].shape[2:])
    actual = pixel_adaptive_refinement(
        images.to(device), golden["par_masks"].to(device), iterations=20, normalize=False
    )
    torch.testing.assert_close(actual.cpu(), golden["weclip_par_out"], rtol=0, atol=2e-6)


def test_equals_the_public_code_on_a_flat_image(device):
    golden = field("afa")
    scores = with_corners(golden["par_masks"][:1], golden["par_image"].shape[2:])
    flat = torch.full_like(golden["par_image"][:1], 128.0)
    actual = pixel_adaptive_refinement(flat.to(device), scores.to(device), normalize=False)
    torch.testing.assert_close(actual.cpu(), golden["par_flat_out"], rtol=0, atol=2e-6)


# properties


@given(batch=batches(), data=st.data())
def test_probabilities_remain_probabilities_and_constant_maps_remain(batch: Batch, data):
    probs = pixel_adaptive_refinement(batch.images, batch.probs, **SMALL)
    assert (probs >= 0).all()
    torch.testing.assert_close(probs.sum(1), torch.ones_like(probs[:, 0]))
    value = data.draw(st.floats(-5, 5))
    constant = torch.full_like(batch.probs, value)
    torch.testing.assert_close(pixel_adaptive_refinement(batch.images, constant), constant)


@given(batch=batches(), data=st.data())
def test_classes_and_images_do_not_meet(batch: Batch, data):
    refined = pixel_adaptive_refinement(batch.images, batch.probs, **SMALL)
    order = data.draw(st.permutations(range(batch.probs.shape[1])))
    torch.testing.assert_close(
        pixel_adaptive_refinement(batch.images, batch.probs[:, order], **SMALL), refined[:, order]
    )
    b = data.draw(st.integers(0, len(refined) - 1))
    alone = pixel_adaptive_refinement(batch.images[b : b + 1], batch.probs[b : b + 1], **SMALL)
    torch.testing.assert_close(alone, refined[b : b + 1])


@given(batch=batches())
def test_flips_commute(batch: Batch):
    refined = pixel_adaptive_refinement(batch.images, batch.probs, **SMALL)
    for axis in (-1, -2):
        flipped = pixel_adaptive_refinement(batch.images.flip(axis), batch.probs.flip(axis), **SMALL)
        torch.testing.assert_close(flipped, refined.flip(axis))


@given(batch=batches())
def test_levels_and_normalised_images_are_the_same(batch: Batch):
    levels = pixel_adaptive_refinement(batch.images, batch.probs, **SMALL)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    normalised = (batch.images.double() / 255 - mean) / std
    # deviations of a flat surrounding are a rounding, and epsilon is in the image's units
    torch.testing.assert_close(pixel_adaptive_refinement(normalised, batch.probs, **SMALL), levels, rtol=0, atol=1e-4)


def test_published_weights_sum_to_a_hundredth_more():
    batch = make_batch()
    ours = pixel_adaptive_refinement(batch.images, batch.probs)
    published = pixel_adaptive_refinement(batch.images, batch.probs, normalize=False)
    torch.testing.assert_close(published, ours * 1.01**10)


def test_no_iteration_returns_the_scores():
    batch = make_batch()
    assert torch.equal(pixel_adaptive_refinement(batch.images, batch.probs, iterations=0), batch.probs)


def test_half_size_is_a_resize_before_and_after():
    batch = make_batch(image_size=(8, 10))
    small = pixel_adaptive_refinement(bilinear(batch.images.double(), (4, 5)), bilinear(batch.probs, (4, 5)), **SMALL)
    actual = pixel_adaptive_refinement(batch.images, batch.probs, size=0.5, **SMALL)
    torch.testing.assert_close(actual, bilinear(small, (8, 10)))


def test_a_seed_fills_its_half_and_no_more():
    images = torch.zeros(1, 3, 12, 12)
    images[..., 6:] = 1
    scores = torch.zeros(1, 2, 12, 12)
    scores[:, 0, 5:7, :2] = scores[:, 1, 5:7, 10:] = 1
    label = pixel_adaptive_refinement(images, scores, dilations=(1, 2, 4)).argmax(1)[0]
    assert (label[:, :6] == 0).all()
    assert (label[:, 6:] == 1).all()


def test_images_take_no_gradient():
    batch = make_batch()
    images, scores = batch.images.double().requires_grad_(), batch.probs.clone().requires_grad_()
    pixel_adaptive_refinement(images, scores, **SMALL).sum().backward()
    assert images.grad is None
    assert scores.grad.any()


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("images", torch.zeros(2, 1, 4, 5), ValueError),
        ("scores", torch.zeros(2, 2, 8, 10), ValueError),
        ("images", None, TypeError),
        ("scores", torch.zeros(2, 4, 5), ValueError),
        ("scores", torch.zeros(2, 2, 4, 5).long(), TypeError),
        ("dilations", (), ValueError),
        ("dilations", 3, TypeError),
        ("dilations", (1, 0), ValueError),
        ("dilations", (1, 2.5), TypeError),
        ("iterations", -1, ValueError),
        ("iterations", 2.5, TypeError),
        ("size", 0, ValueError),
        ("size", "half", TypeError),
        ("normalize", "no", ValueError),
    ],
)
def test_refuses(name, value, error):
    arguments = {"images": torch.zeros(2, 3, 4, 5), "scores": torch.zeros(2, 2, 4, 5)}
    settings = {"dilations": (1, 2), "iterations": 1, "size": None, "normalize": True}
    assert_refuses(pixel_adaptive_refinement, arguments | settings, name, value, error)
    if name in settings:
        assert_refuses(PixelAdaptiveRefinement, settings, name, value, error)


def test_repr_shows_the_settings():
    assert "dilations=(1, 2), iterations=3, size=0.5" in repr(
        PixelAdaptiveRefinement(dilations=[1, 2], iterations=3, size=0.5)
    )


@pytest.mark.parametrize("dilations", [(1,), (2, 1, 5)])
def test_a_ring_at_a_time_changes_nothing(monkeypatch, dilations):
    batch = make_batch()

    def refine(scores: Tensor) -> Tensor:
        return pixel_adaptive_refinement(batch.images, scores, dilations=dilations, iterations=3)

    whole = value_and_grads(refine, batch.probs)
    rings = []
    monkeypatch.setattr(adaptive, "launches_cost", lambda x: rings.append(True) or True)
    torch.testing.assert_close(value_and_grads(refine, batch.probs), whole)
    assert rings
