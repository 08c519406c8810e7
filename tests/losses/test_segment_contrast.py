from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pixelss import segment_contrast
from tests.blocks import Block
from tests.oracles import assert_refuses, bilinear, field, unit
from tests.strategies import Batch, batches, make_batch, noise

SIGNATURES = {
    "segment_contrast": "(features, segments, *, temperature=0.5, background=False)",
}


def segments_of(b: Batch) -> Tensor:
    mask = b.mask.long()
    return mask.where((mask > 0) & (mask <= b.classes), 0)


BUT = dict.fromkeys(("compile", "no wait"), "counts the segments: their number decides a shape")
BUT |= {"gradient": "the segments' means carry none"}
BLOCKS = {
    "segment_contrast": Block(
        lambda b: segment_contrast(b.features, segments_of(b)),
        lambda b: segment_contrast_by_loops(b.features, segments_of(b)),
        but=BUT,
    ),
    "segment_contrast background": Block(
        lambda b: segment_contrast(b.features, segments_of(b), background=True),
        lambda b: segment_contrast_by_loops(b.features, segments_of(b), background=True),
        but=BUT,
    ),
}


def segment_contrast_by_loops(
    features: Tensor, segments: Tensor, temperature: float = 0.5, background: bool = False
) -> Tensor:
    eps = torch.finfo(features.dtype).eps
    losses = []
    for x, own in zip(bilinear(features, segments.shape[1:]).flatten(2), segments.flatten(1).tolist(), strict=True):
        directions = [unit(x[:, p], eps) for p in range(len(own))]
        means = {
            s: unit(sum(d for d, other in zip(directions, own, strict=True) if other == s).detach(), eps)
            for s in set(own)
            if s > 0 or background
        }
        for direction, s in zip(directions, own, strict=True):
            if s > 0:
                z = {other: direction @ mean / temperature for other, mean in means.items()}
                losses.append(torch.log(sum(torch.exp(value) for value in z.values())) - z[s])
    return features.sum() * 0 + sum(losses) / max(1, len(losses))


def test_loss_and_gradient_are_s2cs():
    """Its gradient is compared but at a cell that is all zero: there the public normalisation divides by 1e-12."""
    a = field("s2c")
    x = a["features"].requires_grad_()
    temperature = 1 / a["temperature_multiplier"].item()
    loss = segment_contrast(x, a["segments"], temperature=temperature, background=True)
    torch.testing.assert_close(loss, a["loss_ssc"], rtol=2e-6, atol=2e-6)
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 1
    sound = (a["grad_features"].abs().amax(1, keepdim=True) < 1).expand_as(gradient)
    assert (~sound).sum() <= 2 * x.shape[1]
    torch.testing.assert_close(gradient[sound], a["grad_features"][sound], rtol=1e-5, atol=2e-6)


def test_the_unsegmented_are_left_out_of_the_denominator():
    a = field("s2c")
    loss = segment_contrast(a["features"], a["segments"])
    assert loss < a["loss_ssc"]


@given(batch=batches(side=5), temperature=st.sampled_from([0.07, 0.5, 1.0]), background=st.booleans())
def test_any_settings_equal_the_loops(batch, temperature, background):
    settings = {"temperature": temperature, "background": background}
    actual = segment_contrast(batch.features, segments_of(batch), **settings)
    torch.testing.assert_close(actual, segment_contrast_by_loops(batch.features, segments_of(batch), **settings))


@given(data=st.data(), batch=batches())
def test_names_of_segments_do_not_matter(data, batch):
    names = torch.tensor([0, *data.draw(st.permutations([1, 2, 70, 1000]))])
    segments = segments_of(batch)
    expected = segment_contrast(batch.features, segments)
    torch.testing.assert_close(segment_contrast(batch.features, names[segments]), expected)


@given(batch=batches(), factor=st.floats(1e-3, 1e3))
def test_lengths_and_flips_do_not_matter(batch, factor):
    segments = segments_of(batch)
    expected = segment_contrast(batch.features, segments)
    actual = segment_contrast(factor * batch.features.flip(-1), segments.flip(-1))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@given(batch=batches())
def test_one_segment_has_nothing_to_be_told_from(batch):
    loss = segment_contrast(batch.features, segments_of(batch).clamp(max=1))
    torch.testing.assert_close(loss, torch.zeros_like(loss))


def test_segments_of_two_images_do_not_meet():
    features = noise(2, 4, 3, 3)
    segments = torch.arange(1, 10).view(1, 3, 3).expand(2, 3, 3)
    losses = [segment_contrast(features[b : b + 1], segments[b : b + 1]) for b in range(2)]
    torch.testing.assert_close(segment_contrast(features, segments), sum(losses) / 2)


def test_a_pixel_a_segment_is_torchs_cross_entropy():
    x = functional.normalize(noise(4, 6), dim=0)
    expected = functional.cross_entropy(x.mT @ x / 0.5, torch.arange(6))
    torch.testing.assert_close(segment_contrast(3 * x.view(1, 4, 2, 3), torch.arange(1, 7).view(1, 2, 3)), expected)


def test_more_segments_than_are_summed_at_a_time():
    features, segments = noise(1, 3, 9, 16), torch.arange(1, 145).view(1, 9, 16)
    expected = segment_contrast_by_loops(features, segments)
    torch.testing.assert_close(segment_contrast(features, segments), expected)


def test_gradient_with_the_means_held():
    batch = make_batch(image_size=(4, 5), feature_size=(4, 5))
    x, segments = noise(3, 5, 4, 5).requires_grad_(), segments_of(batch)
    actual = torch.autograd.grad(segment_contrast(x, segments), x)[0]
    expected = torch.autograd.grad(segment_contrast_by_loops(x, segments), x)[0]
    torch.testing.assert_close(actual, expected)
    # finite differences, the segments a pixel each at orthogonal features: there the means are the pixels' own
    y = noise(1, 3, 2, 2).requires_grad_()
    fixed = functional.normalize(y.detach().flatten(2)[0], dim=0)

    def held(y: Tensor) -> Tensor:
        return functional.cross_entropy(functional.normalize(y.flatten(2)[0], dim=0).mT @ fixed / 0.5, torch.arange(4))

    assert torch.autograd.gradcheck(held, y)
    ours = torch.autograd.grad(segment_contrast(y, torch.arange(1, 5).view(1, 2, 2)), y)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(held(y), y)[0])


@pytest.mark.parametrize("background", [True, False])
def test_negative_segments_are_unsegmented(background):
    batch = make_batch()
    segments = segments_of(batch)
    negative = segments.where(segments > 0, -batch.mask.abs())
    assert (negative < 0).any()
    actual, expected = (segment_contrast(batch.features, s, background=background) for s in (negative, segments))
    assert torch.equal(actual, expected)


# refusals


FEATURES, SEGMENTS = torch.rand(2, 3, 4, 5), torch.ones(2, 8, 9, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("features", FEATURES[0], ValueError),
        ("features", FEATURES.long(), TypeError),
        ("features", None, TypeError),
        ("segments", SEGMENTS[:1], ValueError),
        ("segments", SEGMENTS[:, None], ValueError),
        ("segments", SEGMENTS.float(), TypeError),
        ("segments", SEGMENTS.bool(), TypeError),
        ("segments", SEGMENTS.to("meta"), ValueError),
        ("temperature", 0, ValueError),
        ("temperature", "0.5", TypeError),
        ("background", "no", ValueError),
    ],
)
def test_loss_refuses(name, value, error):
    given_ = {"features": FEATURES, "segments": SEGMENTS, "temperature": 0.5}
    assert_refuses(segment_contrast, given_, name, value, error)
