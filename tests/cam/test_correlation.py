"""SEAM's pixel correlation against loops over all pairs of pixels, and what the public code returned."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from pixelss import PixelCorrelation, _pieces, pixel_correlation
from tests.blocks import Block
from tests.oracles import active, assert_matches, assert_refuses, bilinear, field, value_and_grads
from tests.strategies import Batch, make_batch, noise

SIGNATURES = {
    "PixelCorrelation": "(in_channels, *, dims=(64, 128), dim=192)",
    "pixel_correlation": "(embedding, scores, *, eps=1e-05)",
}


def inputs(b: Batch) -> tuple[list[Tensor], Tensor, Tensor]:
    return [b.features, b.features.flip(-1)], b.images.to(b.features.dtype) / 255, b.raw[0]


BLOCKS = {
    "pixel_correlation": Block(
        lambda b: pixel_correlation(b.features, b.raw[0]),
        lambda b: pixel_correlation_by_loops(b.features, b.raw[0]),
        but={"finite": "scores are no CAMs: what is spread is taken as it is"},
    ),
    "PixelCorrelation": Block(
        lambda b, head: head(*inputs(b)),
        lambda b, head: refined_by_loops(*inputs(b), head).detach(),
        make=lambda b: PixelCorrelation(2 * b.features.shape[1:2], dims=(2, 3), dim=4),
        but={
            "half": "convolutions run in the user's precision",
            "gradient": "taps, images and CAMs are taken as they are: gradients reach the convolutions alone",
        },
    ),
}

seeds = st.integers(0, 2**32 - 1)


def pixel_correlation_by_loops(embedding: Tensor, scores: Tensor, eps: float = 1e-5) -> Tensor:
    B, _, h, w = embedding.shape
    images = []
    for b in range(B):
        cells = [embedding[b, :, y, x] for y, x in product(range(h), range(w))]
        values = [scores[b, :, y, x] for y, x in product(range(h), range(w))]
        unit = [e / (e.norm() + eps) for e in cells]
        for q in unit:
            weights = [(p * q).sum().relu() for p in unit]
            total = sum(weights) + eps
            images.append(sum(a * weight / total for a, weight in zip(values, weights, strict=True)))
    return torch.stack(images).view(B, h, w, -1).movedim(-1, 1) if B else scores + 0 * embedding.sum()


def refined_by_loops(taps: list[Tensor], images: Tensor, cam: Tensor, head: PixelCorrelation) -> Tensor:
    B, N, h, w = cam.shape
    parts = [bilinear(images, (h, w)) if B else images.new_zeros(0, 3, h, w)]
    parts += [
        torch.einsum("dc,bchw->bdhw", conv.weight[:, :, 0, 0], tap).relu()
        for tap, conv in zip(taps, head.reduce, strict=True)
    ]
    embedding = torch.einsum("dc,bchw->bdhw", head.embed.weight[:, :, 0, 0], torch.cat(parts, 1))
    spread = cam.new_zeros(B, N + 1, h, w)
    for b in range(B):
        maps = active(cam[b]).relu()
        maps = [(one - 1e-5).relu() / (one.amax() + 1e-5) for one in maps]
        for y, x in product(range(h), range(w)):
            strongest = max(one[y, x] for one in maps)
            spread[b, 0, y, x] = 1 - strongest
            for n, one in enumerate(maps):
                spread[b, n + 1, y, x] = one[y, x] if one[y, x] == strongest else 0
    return pixel_correlation_by_loops(embedding.detach(), spread)


def corners(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as the public code does."""
    return functional.interpolate(x, size, mode="bilinear", align_corners=True)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_correlation_equals_the_loop(size, dtype, device):
    embedding, scores = noise(2, 4, *size), noise(2, 3, *size, seed=1)
    assert_matches(pixel_correlation, pixel_correlation_by_loops, embedding, scores, dtype=dtype, device=device)


def test_values_and_gradients_are_seams():
    golden = field("seam")
    features, cam, weight = (golden[key].requires_grad_() for key in ("pcm_f", "pcm_cam", "pcm_weight_f9"))
    out = pixel_correlation(functional.conv2d(features, weight), corners(cam, features.shape[-2:]))
    torch.testing.assert_close(out, golden["pcm_out"], rtol=0, atol=2e-6)
    (out * golden["pcm_grad_seed"]).sum().backward()
    for leaf, key in ((features, "pcm_grad_f"), (cam, "pcm_grad_cam"), (weight, "pcm_grad_f9")):
        torch.testing.assert_close(leaf.grad, golden[key], rtol=1e-5, atol=2e-6)


def test_the_head_is_seams():
    golden = field("seam")
    head = PixelCorrelation((6, 7), dims=(4, 5), dim=10)
    keys = {"reduce.0.weight": "fwd_f8_3", "reduce.1.weight": "fwd_f8_4", "embed.weight": "fwd_f9"}
    head.load_state_dict({name: golden[key] for name, key in keys.items()})
    cam = functional.conv2d(golden["fwd_conv6"], golden["fwd_fc8"])[:, 1:]
    refined = head([golden["fwd_conv4"], golden["fwd_conv5"]], corners(golden["fwd_x"], (5, 6)), cam)
    torch.testing.assert_close(refined, golden["fwd_pcm_out"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("entries", [1, 40, 100])
def test_blocks_of_columns_change_nothing(monkeypatch, entries):
    embedding, scores = noise(2, 3, 4, 5), noise(2, 2, 4, 5, seed=1)
    whole = value_and_grads(pixel_correlation, embedding, scores)
    monkeypatch.setattr(_pieces, "_CPU", entries)
    torch.testing.assert_close(value_and_grads(pixel_correlation, embedding, scores), whole)


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        self.numel = max([self.numel, *(x.numel() for x in [out] if isinstance(x, Tensor))])
        return out


def test_the_matrix_of_all_pixels_is_never_held(monkeypatch):
    monkeypatch.setattr(_pieces, "_CPU", 1000)
    embedding, scores = (x.requires_grad_() for x in (noise(1, 2, 10, 10), noise(1, 2, 10, 10)))
    with Largest() as largest:
        pixel_correlation(embedding, scores).sum().backward()
    assert largest.numel == 1000  # of 10000


@given(seed=seeds, value=st.floats(-3, 3))
@settings(max_examples=20)
def test_constant_scores_stay(seed, value):
    embedding, scores = noise(2, 3, 4, 5, seed=seed), torch.full((2, 2, 4, 5), value, dtype=torch.float64)
    torch.testing.assert_close(pixel_correlation(embedding, scores, eps=0), scores)


@given(seed=seeds, factor=st.floats(0.1, 10))
@settings(max_examples=20)
def test_the_length_of_an_embedding_does_not_matter(seed, factor):
    embedding, scores = noise(2, 3, 4, 5, seed=seed), noise(2, 2, 4, 5)
    out = pixel_correlation(embedding, scores, eps=0)
    torch.testing.assert_close(pixel_correlation(factor * embedding, scores, eps=0), out)


@given(seed=seeds, axes=st.sampled_from([(2,), (3,), (2, 3)]))
@settings(max_examples=20)
def test_correlation_is_equivariant_to_flips(seed, axes):
    embedding, scores = noise(2, 3, 4, 5, seed=seed), noise(2, 2, 4, 5)
    flipped = pixel_correlation(embedding.flip(axes), scores.flip(axes))
    torch.testing.assert_close(flipped, pixel_correlation(embedding, scores).flip(axes))


def test_a_pixel_without_features_gets_nothing():
    embedding = noise(1, 3, 2, 3)
    embedding[..., 0, 0] = 0
    out, gradient, _ = value_and_grads(pixel_correlation, embedding, torch.ones(1, 1, 2, 3, dtype=torch.float64))
    assert out[0, 0, 0, 0] == 0
    assert gradient.isfinite().all()


def test_gradients_reach_the_convolutions_alone():
    batch = make_batch(dtype=torch.float32)
    head = PixelCorrelation((5, 5), dims=(2, 3), dim=4)
    (first, second), images, cam = inputs(batch)
    leaves = [x.clone().requires_grad_() for x in (first, second, images, cam)]
    head(leaves[:2], *leaves[2:]).square().sum().backward()
    assert all(x.grad is None for x in leaves)
    assert all(p.grad.any() for p in head.parameters())
    assert isinstance(head.reduce, nn.ModuleList)
    assert all(conv.bias is None for conv in [*head.reduce, head.embed])


MAPS = torch.rand(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("embedding", MAPS[0], ValueError),
        ("embedding", MAPS.long(), TypeError),
        ("embedding", None, TypeError),
        ("scores", MAPS[:1], ValueError),
        ("scores", MAPS[..., :3], ValueError),
        ("scores", MAPS.to("meta"), ValueError),
        ("eps", -1e-5, ValueError),
        ("eps", "0", TypeError),
    ],
)
def test_correlation_refuses(name, value, error):
    assert_refuses(pixel_correlation, {"embedding": MAPS, "scores": MAPS}, name, value, error)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("taps", MAPS, TypeError, "taps"),
        ("taps", [MAPS], ValueError, "taps must hold 2 tensors, as in_channels, but holds 1"),
        ("taps", [MAPS, MAPS[:, :2]], ValueError, r"taps\[1\].*C"),
        ("taps", [MAPS, MAPS[..., :4]], ValueError, r"taps\[1\].*w"),
        ("images", MAPS[:1], ValueError, "images.*B.*The images that the taps are of"),
        ("images", MAPS[:, :1], ValueError, "images.*C"),
        ("cam", MAPS.long(), TypeError, "cam"),
        ("cam", MAPS[0], ValueError, "cam"),
    ],
)
def test_head_refuses(name, value, error, message):
    arguments = {"taps": [MAPS, MAPS], "images": torch.rand(2, 3, 16, 20), "cam": MAPS}
    head = PixelCorrelation((3, 3), dims=(2, 2), dim=4)
    head(**arguments)
    with pytest.raises(error, match=message):
        head(**arguments | {name: value})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"in_channels": (3,)}, ValueError, "dims must have one entry a tap, as in_channels with 1, but has 2"),
        ({"in_channels": (3, 0)}, ValueError, r"in_channels\[1\] must be at least 1"),
        ({"dims": (3, 2.0)}, TypeError, r"dims\[1\] must be an int"),
        ({"dim": 0}, ValueError, "dim must be at least 1"),
    ],
)
def test_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        PixelCorrelation(**{"in_channels": (3, 3), **settings})
