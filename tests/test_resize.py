from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch._subclasses.fake_tensor import FakeTensorMode

from pixelss._resize import _KEPT, resize, resize_matrix
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


@pytest.fixture
def nothing_kept():
    _KEPT.clear()
    yield
    _KEPT.clear()


def test_a_matrix_is_kept(nothing_kept):
    matrix = resize_matrix(3, 5, noise(1))
    assert resize_matrix(3, 5, noise(2)) is matrix
    for source, target, dtype in ((5, 3, torch.float64), (3, 5, torch.float32)):
        other = resize_matrix(source, target, noise(1, dtype=dtype))
        assert (*other.shape, other.dtype) == (target, source, dtype)


def test_no_more_matrices_are_kept_than_a_few(nothing_kept):
    for target in range(1, 200):
        resize_matrix(3, target, noise(1))
    assert 0 < len(_KEPT) <= 64


def within_inference_mode(x):
    with torch.inference_mode():
        resize(x, (7, 9))


def within_a_gradient_transform(x):
    torch.func.grad(lambda x: resize(x, (7, 9)).square().sum())(x)


def within_a_map(x):
    torch.func.vmap(lambda x: resize(x, (7, 9)))(x)


def within_fake_tensors(x):
    with FakeTensorMode(allow_non_fake_inputs=True):
        resize(x, (7, 9))
    with FakeTensorMode() as mode:
        resize(mode.from_tensor(x), (7, 9))


def compiled(x):
    torch.compiler.reset()
    torch.compile(lambda x: resize(x, (7, 9)), backend="aot_eager", fullgraph=True)(x)


@pytest.mark.parametrize(
    "before", [within_inference_mode, within_a_gradient_transform, within_a_map, within_fake_tensors, compiled]
)
def test_what_is_kept_serves_any_later_call(before, nothing_kept):
    x = noise(2, 3, 4)
    before(x)
    resize(x.clone().requires_grad_(), (7, 9)).sum().backward()
    for later in (before, within_a_gradient_transform, within_a_map, within_fake_tensors, compiled):
        later(x)
    torch.testing.assert_close(resize(x, (7, 9)), interpolate(x[None], (7, 9))[0])
    assert all(matrix.data_ptr() for matrix in _KEPT.values()), "of the transform, it has no data of its own"
