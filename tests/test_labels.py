from __future__ import annotations

import pytest
import torch

from pixelss._labels import mean_over, valid_pixels
from tests.oracles import labelled, value_and_grads
from tests.strategies import make_batch, noise


@pytest.mark.parametrize("ignore_index", [255, 0, 2, -1])
def test_valid_pixels_equal_the_loop(ignore_index):
    mask = make_batch().mask
    label, valid = valid_pixels(mask, 4, ignore_index)
    expected = torch.full_like(mask, -1)
    for b, i, j, k in labelled(mask, 3, ignore_index):
        expected[b, i, j] = k
    assert torch.equal(valid, expected >= 0)
    assert torch.equal(label, expected.clamp(min=0))


def test_minus_one_is_not_255_in_uint8():
    label, valid = valid_pixels(torch.tensor([[[0, 1, 255]]], dtype=torch.uint8), 3, -1)
    assert label.dtype == torch.int64
    assert valid.tolist() == [[[True, True, False]]]


def test_mean_over_the_valid():
    values, valid = noise(3, 4), noise(3, 4) > 0.2
    mean, gradient = value_and_grads(lambda x: mean_over(x, valid), values)
    torch.testing.assert_close(mean, values[valid].mean())
    assert torch.equal(gradient != 0, valid)


def test_mean_over_nothing_is_zero_on_the_graph():
    values = torch.full((2, 3), torch.nan).requires_grad_()
    mean = mean_over(values, torch.zeros(2, 3, dtype=torch.bool))
    mean.backward()
    assert mean == 0
    assert not values.grad.any()
