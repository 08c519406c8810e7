from __future__ import annotations

import pytest
import torch
from hypothesis import given

from pixelss._resize import resize, resize_matrix
from tests import oracles
from tests.oracles import interpolate
from tests.strategies import SIZES, image_sizes, noise

pairs = pytest.mark.parametrize(("source", "target"), SIZES.values(), ids=SIZES)


@pairs
@pytest.mark.parametrize("dtype", oracles.TOLERANCE)
def test_resize_equals_the_loop(source, target, dtype, device):
    oracles.assert_matches(
        lambda x: resize(x, target),
        lambda x: oracles.bilinear(x, target),
        noise(2, 3, *source),
        dtype=dtype,
        device=device,
    )


@given(source=image_sizes, target=image_sizes)
def test_resize_equals_interpolate(source, target):
    x = noise(2, 3, *source)
    torch.testing.assert_close(resize(x, target), interpolate(x, target), rtol=1e-12, atol=1e-12)


def test_resize_of_a_large_map_in_float32():
    x = noise(1, 1, 63, 47)
    error = resize(x.float(), (500, 375)).double() - interpolate(x, (500, 375))
    assert error.abs().max() < 1e-6


@pytest.mark.parametrize("leading", [(), (2,), (2, 1, 3), (0, 3)], ids=str)
def test_resize_keeps_leading_dimensions(leading):
    x = noise(*leading, 3, 4)
    expected = interpolate(x.reshape(-1, 1, 3, 4), (5, 2)).view(*leading, 5, 2)
    torch.testing.assert_close(resize(x, (5, 2)), expected)


def test_resize_to_the_same_size_is_the_identity():
    x = noise(2, 3, 4, 5)
    assert torch.equal(resize(x, (4, 5)), x)


@given(sizes=image_sizes)
def test_rows_of_the_matrix_are_convex_weights(sizes):
    matrix = resize_matrix(*sizes, noise(1))
    assert matrix.shape == (sizes[1], sizes[0])
    assert (matrix >= 0).all()
    assert ((matrix > 0).sum(1) <= 2).all()
    torch.testing.assert_close(matrix.sum(1), torch.ones(sizes[1], dtype=torch.float64))


def test_resize_gradcheck():
    x = noise(2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: resize(x, (5, 3)), x)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_resized_in_float32(half):
    x = noise(2, 3, 4, dtype=torch.float32).to(half)
    with torch.autocast("cpu", torch.bfloat16):
        actual = resize(x, (7, 9))
    assert actual.dtype == torch.float32
    assert torch.equal(actual, resize(x.float(), (7, 9)))
