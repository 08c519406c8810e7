from __future__ import annotations

from math import inf, nan

import pytest
import torch

from pixelss._dtype import activation, full_precision, promote
from tests.strategies import noise

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", FLOATS)
def test_promote(dtype):
    x = noise(3, dtype=dtype)
    assert promote(x).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (promote(x) is x) == (dtype in (torch.float32, torch.float64))


def test_full_precision_holds_inside_autocast_and_no_longer(device):
    x = noise(3, 3, dtype=torch.float32).to(device)
    with torch.autocast(device, torch.bfloat16):
        with full_precision(x):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_non_finite_value_is_no_activation(dtype):
    cam = torch.tensor([-2.0, nan, inf, -inf, 0.5], dtype=dtype)
    assert activation(cam).tolist() == [-2.0, 0.0, 0.0, 0.0, 0.5]
    assert activation(cam).dtype == promote(cam).dtype
