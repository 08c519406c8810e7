from __future__ import annotations

import os
from itertools import product
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelss import (
    background_score,
    label_probs,
    msinf_cam,
    normalize_cam,
)
from tests import oracles
from tests.blocks import Block
from tests.oracles import (
    active,
    assert_matches,
    labelled,
)
from tests.strategies import SIZES, batches, make_batch

SIGNATURES = {
    "background_score": "(cam, *, alpha)",
    "label_probs": "(mask, num_classes, *, gt_prob=0.7, ignore_index=255)",
    "normalize_cam": "(cam, *, kind='max', eps=1e-05)",
}

BLOCKS = {
    "normalize_cam": Block(lambda b: normalize_cam(b.raw[2]), lambda b: normalize_cam_by_loops(b.raw[2])),
    "background_score": Block(
        lambda b: background_score(b.cam, alpha=4), lambda b: background_score_by_loops(b.cam, alpha=4)
    ),
    "label_probs": Block(
        lambda b: label_probs(b.mask, b.classes),
        lambda b: label_probs_by_loops(b.mask, b.classes),
        but={"dtype": "a label map has none: float32"},
    ),
}

dtypes = pytest.mark.parametrize("dtype", oracles.TOLERANCE)
image_sizes = pytest.mark.parametrize("size", [target for _, target in SIZES.values()], ids=SIZES)


def normalize_cam_by_loops(cam: Tensor, eps: float = 1e-5) -> Tensor:
    """CAM: relu(A) / max over pixels where that maximum is > eps, else zeros."""
    maps = []
    for one in active(cam).flatten(0, 1):
        values = [torch.relu(value) for value in one.flatten()]
        peak = max(values)
        maps += [value / peak if peak > eps else value * 0 for value in values]
    return torch.stack(maps).view(cam.shape)


def background_score_by_loops(cam: Tensor, alpha: float) -> Tensor:
    """(1 - the largest activation of a pixel, in [0, 1]) ** alpha."""
    B, N, H, W = cam.shape
    scores = []
    for b, i, j in product(range(B), range(H), range(W)):
        strongest = torch.stack([active(cam[b, k, i, j]) for k in range(N)]).amax()
        scores.append((1 - strongest.clamp(0, 1)) ** alpha)
    return torch.stack(scores).view(B, 1, H, W)


def label_probs_by_loops(mask: Tensor, num_classes: int, gt_prob: float = 0.7, ignore_index: int = 255) -> Tensor:
    """gt_prob at the class of the mask, the rest shared by the others; void pixels know nothing."""
    K = num_classes + 1
    probs = torch.full((len(mask), K, *mask.shape[1:]), 1 / K)
    for b, i, j, label in labelled(mask, num_classes, ignore_index):
        for k in range(K):
            probs[b, k, i, j] = gt_prob if k == label else (1 - gt_prob) / num_classes
    return probs


# normalize_cam


@dtypes
@image_sizes
def test_normalize_cam_equals_the_loop(size, dtype, device):
    cam = make_batch(image_size=size).raw[2]
    cam[0, 0] = -1.0
    assert_matches(normalize_cam, normalize_cam_by_loops, cam, dtype=dtype, device=device)


def test_normalize_cam_gradcheck():
    # Peaks and zeros lie further from their neighbours than the step of the differences.
    cam = make_batch(image_size=(3, 4)).raw[2].requires_grad_()
    assert torch.autograd.gradcheck(normalize_cam, cam)


def test_gradient_of_a_normalised_map_flows_through_its_maximum():
    cam = torch.tensor([1.0, 2.0, -3.0, 4.0], dtype=torch.float64).view(1, 1, 2, 2).requires_grad_()
    normalize_cam(cam).sum().backward()
    # sum_p a_p / m with m = 4: 1/m elsewhere, -(1 + 2) / m^2 at the maximum, 0 under the ReLU
    torch.testing.assert_close(cam.grad.flatten(), torch.tensor([0.25, 0.25, 0, -3 / 16], dtype=torch.float64))


@given(batch=batches(dtype=torch.float32), scale=st.floats(1e-4, 1e30), shift=st.floats(-4, 4, allow_subnormal=False))
def test_normalised_maximum_is_exactly_one_or_the_map_is_zero(batch, scale, shift):
    cam = normalize_cam((batch.raw[2] + shift) * scale)
    peaks = cam.amax((2, 3))
    assert ((cam >= 0) & (cam <= 1)).all()
    assert ((peaks == 1) | (peaks == 0)).all()


@given(batch=batches())
def test_normalising_twice_changes_nothing(batch):
    cam = normalize_cam(batch.raw[2])
    assert torch.equal(normalize_cam(cam), cam)


@pytest.mark.parametrize(("peak", "kept"), [(0.25, False), (0.26, True), (0.0, False), (-1.0, False)])
def test_maximum_up_to_eps_gives_zeros(peak, kept):
    cam = torch.full((1, 1, 2, 2), -2.0).index_fill_(3, torch.tensor([0]), peak).requires_grad_()
    actual = normalize_cam(cam, eps=0.25)
    assert actual.amax() == kept
    actual.sum().backward()
    assert cam.grad.isfinite().all()
    assert kept or not cam.grad.any()


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_non_finite_value_counts_as_no_activation(value):
    batch = make_batch()
    broken, zeroed = batch.raw[2].clone(), batch.raw[2].clone()
    broken[0, 0, 1, 2], zeroed[0, 0, 1, 2] = value, 0.0
    broken[0, 1], zeroed[0, 1] = value, 0.0
    broken.requires_grad_()
    actual = normalize_cam(broken)
    assert torch.equal(actual, normalize_cam(zeroed))
    (actual**2).sum().backward()
    assert broken.grad.isfinite().all()
    fused = [msinf_cam([*batch.raw[:2], cam], batch.tags, size=(4, 4)) for cam in (broken, zeroed)]
    assert torch.equal(*fused)


# refusals


RAW = torch.rand(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("cam", "error"),
    [(None, TypeError), (RAW.long(), TypeError), (RAW[0], ValueError), (RAW[..., :0], ValueError)],
    ids=["type", "dtype", "rank", "empty"],
)
def test_normalize_cam_refuses(cam, error):
    with pytest.raises(error, match=r"\bcam\b"):
        normalize_cam(cam)


@pytest.mark.parametrize("eps", [-1.0, nan])
def test_normalize_cam_refuses_eps(eps):
    with pytest.raises(ValueError, match=r"\beps\b"):
        normalize_cam(RAW, eps=eps)


# Outputs of the C++ code, written by golden/make_crf.py; the variable names another such file.
GOLDEN = Path(os.environ.get("PIXELSS_CRF_GOLDEN", Path(__file__).parent / "golden" / "crf.npz"))


seeds = st.integers(0, 10_000)


@pytest.mark.parametrize(("labels", "shift", "N"), [("lab", 0, 3), ("lab_unsure", 1, 4)])
def test_label_probs_equal_the_c_code(labels, shift, N):
    with np.load(GOLDEN) as data:
        values = torch.from_numpy(data[labels]) - shift  # "unsure" is -1: out of range
        expected = torch.from_numpy(data[f"unary_from_labels{'_unsure' * shift}_gt0.7"])
    torch.testing.assert_close(-label_probs(values[None], N)[0].log(), expected)


@given(
    data=st.data(),
    N=st.integers(1, 4),
    gt_prob=st.floats(0, 1, allow_subnormal=False),
    ignore_index=st.sampled_from([255, 0, 2, -1]),
)
def test_label_probs_equal_the_loop(data, N, gt_prob, ignore_index):
    values = data.draw(st.lists(st.sampled_from([-1, *range(N + 3), 255]), min_size=12, max_size=12))
    mask = torch.tensor(values).view(2, 2, 3)
    actual = label_probs(mask, N, gt_prob=gt_prob, ignore_index=ignore_index)
    torch.testing.assert_close(actual, label_probs_by_loops(mask, N, gt_prob, ignore_index), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_label_probs_of_any_integer_dtype(dtype, device):
    mask = torch.tensor([[[0, 1, 2, 7, 255]]], device=device)
    assert torch.equal(label_probs(mask.to(dtype), 2), label_probs(mask, 2))


@given(seed=seeds, alpha=st.floats(0.5, 32, allow_subnormal=False))
def test_background_score_equals_the_loop(seed, alpha):
    cam = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    score = background_score(cam, alpha=alpha)
    assert score.shape == (2, 1, 4, 5)
    torch.testing.assert_close(score, background_score_by_loops(cam, alpha))


def test_background_score_at_the_ends():
    cam = torch.tensor([[0.0, 1.0, nan, inf, -inf, 1 + 1e-6], [0.0, 0.5, 0.5, 0.5, 0.0, 0.0]]).view(1, 2, 1, 6)
    score = background_score(cam, alpha=2.5).flatten()
    torch.testing.assert_close(score, torch.tensor([1.0, 0.0, 0.5**2.5, 0.5**2.5, 1.0, 0.0]))
    assert background_score(cam.half(), alpha=4).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("mask", torch.zeros(2, 2, dtype=torch.int64), ValueError),
        ("mask", torch.zeros(1, 2, 2), TypeError),
        ("num_classes", 0, ValueError),
        ("num_classes", 2.0, TypeError),
        ("gt_prob", 1.5, ValueError),
        ("gt_prob", nan, ValueError),
        ("ignore_index", "255", TypeError),
    ],
)
def test_label_probs_refuses(name, value, error):
    with pytest.raises(error, match=rf"\b{name}\b"):
        label_probs(**{"mask": torch.zeros(1, 2, 2, dtype=torch.int64), "num_classes": 3, name: value})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("cam", torch.rand(3, 4, 5), ValueError),
        ("cam", torch.zeros(1, 3, 4, 5, dtype=torch.uint8), TypeError),
        ("alpha", -1, ValueError),
        ("alpha", nan, ValueError),
        ("alpha", "4", TypeError),
    ],
)
def test_background_score_refuses(name, value, error):
    with pytest.raises(error, match=rf"\b{name}\b"):
        background_score(**{"cam": torch.rand(1, 3, 4, 5), "alpha": 4, name: value})
