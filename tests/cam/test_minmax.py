"""`normalize_cam(kind="minmax")`, against a loop and against numbers of the public code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pixelss import normalize_cam

GOLDEN = Path(__file__).parents[1] / "golden" / "seam_minmax.npz"


def loop(cam: Tensor, eps: float) -> Tensor:
    out = torch.zeros_like(cam)
    for b in range(cam.shape[0]):
        for n in range(cam.shape[1]):
            a = [max(float(v), 0.0) for v in cam[b, n].flatten()]
            low, high = min(a), max(a)
            values = [max(v - low - eps, 0.0) / (high - low + eps) for v in a]
            out[b, n] = torch.tensor(values, dtype=cam.dtype).view_as(out[b, n])
    return out


@pytest.mark.parametrize("eps", [1e-5, 0.25])
def test_minmax_equals_a_loop(eps: float) -> None:
    cam = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    cam[0, 1] = -1  # no activation
    cam[1, 0] = 3  # constant
    cam[1, 2] += 9  # a large minimum
    actual = normalize_cam(cam, kind="minmax", eps=eps)
    torch.testing.assert_close(actual, loop(cam, eps))
    assert not actual[0, 1].any()
    assert not actual[1, 0].any()
    assert 0.5 < actual[1, 2].max() < 1
    assert actual.min() == 0


def test_minmax_is_that_of_the_public_code() -> None:
    with np.load(GOLDEN) as golden:
        cam, expected = (torch.from_numpy(golden[name]) for name in ("maxnorm_in", "maxnorm_out"))
    torch.testing.assert_close(normalize_cam(cam, kind="minmax"), expected, rtol=0, atol=2e-6)


def test_minmax_gradient() -> None:
    cam = torch.rand(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: normalize_cam(x, kind="minmax"), cam)


def test_minmax_of_values_that_are_not_finite() -> None:
    cam = torch.tensor([[[[torch.nan, 1.0, 3.0, torch.inf]]]])
    torch.testing.assert_close(
        normalize_cam(cam, kind="minmax"), torch.tensor([[[[0.0, 1 / 3, 1.0, 0.0]]]]), rtol=0, atol=1e-5
    )


def test_the_default_kind_is_max() -> None:
    cam = torch.randn(2, 3, 5, 4)
    expected = cam.relu() / cam.relu().amax((-2, -1), keepdim=True)
    assert torch.equal(normalize_cam(cam), expected)
    assert torch.equal(normalize_cam(cam, kind="max"), expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"kind": "min"}, "kind must be one of 'max', 'minmax'"), ({"kind": "minmax", "eps": 0.0}, "eps must be between")],
)
def test_settings(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalize_cam(torch.rand(1, 1, 2, 2), **kwargs)
