from __future__ import annotations

from itertools import product
from math import exp, log, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pixelss import RegionalContrastiveLoss, regional_contrastive_loss
from tests import oracles
from tests.blocks import Block
from tests.oracles import (
    assert_matches,
    bilinear,
    labelled,
    unit,
)
from tests.refusals import BAD_FEATURES_OR_MASK, FEATURES, MASK
from tests.strategies import SIZES, batches, make_batch

SIGNATURES = {
    "RegionalContrastiveLoss": "(temperature=0.5, *, form='infonce', reduction='mean', ignore_index=255)",
    "regional_contrastive_loss": "(features, mask, prototypes, filled=None, *, temperature=0.5, "
    "form='infonce', reduction='mean', ignore_index=255)",
}

BLOCKS = {
    "regional_contrastive_loss": Block(
        lambda b: regional_contrastive_loss(b.features, b.mask, b.prototypes, b.filled),
        lambda b: regional_contrastive_loss_by_loops(b.features, b.mask, b.prototypes, b.filled),
        inductor=True,
    ),
    "regional_contrastive_loss ratio": Block(
        lambda b: regional_contrastive_loss(b.features, b.mask, b.prototypes, b.filled, form="ratio"),
        lambda b: regional_contrastive_loss_by_loops(b.features, b.mask, b.prototypes, b.filled, form="ratio"),
    ),
    "RegionalContrastiveLoss": Block(
        lambda b: RegionalContrastiveLoss()(b.features, b.mask, b.prototypes, b.filled),
    ),
}

dtypes = pytest.mark.parametrize("dtype", oracles.TOLERANCE)
sizes = pytest.mark.parametrize(("feature_size", "image_size"), SIZES.values(), ids=SIZES)
both_forms = pytest.mark.parametrize("form", ["infonce", "ratio"])
forms = st.sampled_from(["infonce", "ratio"])
factors = st.floats(1e-3, 1e3)


def regional_contrastive_loss_by_loops(
    features: Tensor,
    mask: Tensor,
    prototypes: Tensor,
    filled: Tensor | None = None,
    *,
    temperature: float = 0.5,
    form: str = "infonce",
    reduction: str = "mean",
    ignore_index: int = 255,
) -> Tensor:
    """Yoon Eq. 4, Yoon Eq. 5: -log softmax or -softmax of z_pk = <x_p, pt_k> / T over the filled classes."""
    eps = torch.finfo(features.dtype).eps
    x = bilinear(features, mask.shape[1:])
    classes = [k for k in range(len(prototypes)) if filled is None or filled[k]]
    terms = {pixel: x.new_zeros(()) for pixel in product(*map(range, mask.shape))}
    valid, of_length_one = [], {k: unit(prototypes[k], eps) for k in classes}
    for b, i, j, label in labelled(mask, len(prototypes) - 1, ignore_index):
        if label in classes:
            pixel = unit(x[b, :, i, j], eps)
            z = {k: pixel @ of_length_one[k] / temperature for k in classes}
            probability = torch.exp(z[label]) / sum(torch.exp(other) for other in z.values())
            terms[b, i, j] = -torch.log(probability) if form == "infonce" else -probability
            valid.append((b, i, j))
    if reduction == "none":
        return torch.stack(list(terms.values())).view(mask.shape)
    total = sum(terms.values()) + 0 * (features.sum() + prototypes.sum())
    return total / max(len(valid), 1) if reduction == "mean" else total


def inputs(batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return batch.features, batch.mask, batch.prototypes, batch.filled


def assert_equals_the_loop(batch, dtype=torch.float64, device="cpu", **settings):
    assert_matches(
        lambda *args: regional_contrastive_loss(*args[:3], filled=args[3], **settings),
        lambda *args: regional_contrastive_loss_by_loops(*args, **settings),
        *inputs(batch),
        dtype=dtype,
        device=device,
    )


def at_image_size(features: Tensor, mask: Tensor, prototypes: Tensor, temperature: float = 0.5) -> Tensor:
    """The infonce form as the paper computes it: features of the image's size."""
    x = functional.interpolate(features, mask.shape[1:], mode="bilinear", align_corners=False)
    z = torch.einsum("bdhw,kd->bkhw", functional.normalize(x, dim=1), functional.normalize(prototypes, dim=1))
    return functional.cross_entropy(z / temperature, mask, ignore_index=255)


@sizes
@both_forms
@dtypes
def test_loss_equals_the_loop(feature_size, image_size, form, dtype, device):
    batch = make_batch(feature_size=feature_size, image_size=image_size)
    assert_equals_the_loop(batch, dtype, device, form=form)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("ignore_index", [255, 0, 3, -1])
@both_forms
def test_settings_equal_the_loop(reduction, ignore_index, form):
    settings = {"reduction": reduction, "ignore_index": ignore_index, "form": form, "temperature": 0.1}
    assert_equals_the_loop(make_batch(2), **settings)


@pytest.mark.parametrize("feature_size", [(6, 5), (3, 4), (9, 8)], ids=str)
def test_infonce_equals_cross_entropy(feature_size):
    batch = make_batch(feature_size=feature_size, image_size=(6, 5))
    mask = torch.where((batch.mask < 0) | (batch.mask > 3), 255, batch.mask)
    # Signed features too: the identity is exact for them, only float32 loses digits where neighbours cancel.
    features = batch.features - batch.features.mean()
    for x in (batch.features, features):
        actual = oracles.value_and_grads(regional_contrastive_loss, x, mask, batch.prototypes)
        expected = oracles.value_and_grads(at_image_size, x, mask, batch.prototypes)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_float32_at_the_size_of_a_training_crop():
    batch = make_batch(images=2, classes=20, dim=256, feature_size=(12, 12), image_size=(96, 96))
    mask = torch.where((batch.mask < 0) | (batch.mask > 20), 255, batch.mask)
    exact = (batch.features, mask, batch.prototypes)
    actual = oracles.value_and_grads(
        regional_contrastive_loss, *(x.float() if x.is_floating_point() else x for x in exact)
    )
    expected = oracles.value_and_grads(at_image_size, *exact)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, check_dtype=False)
    scale = expected[1].abs().max()  # gradients are small: relative to the largest
    assert (actual[1] - expected[1]).abs().max() < 1e-5 * scale


@both_forms
def test_loss_gradcheck(form):
    batch = make_batch(dim=3)
    features = (batch.features + 0.1).requires_grad_()
    prototypes = batch.prototypes.requires_grad_()

    def loss(features, prototypes):
        return regional_contrastive_loss(features, batch.mask, prototypes, filled=batch.filled, form=form)

    assert torch.autograd.gradcheck(loss, (features, prototypes))


def test_a_second_derivative_is_refused():
    features, mask, prototypes, _ = inputs(make_batch())
    loss = regional_contrastive_loss(features.requires_grad_(), mask, prototypes)
    (slope,) = torch.autograd.grad(loss**2, features, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


# properties


@given(batch=batches(), form=forms, factor=factors, data=st.data())
def test_loss_does_not_depend_on_lengths(batch, form, factor, data):
    K = len(batch.prototypes)
    lengths = torch.tensor(data.draw(st.lists(factors, min_size=K, max_size=K)), dtype=torch.float64)
    features, mask, prototypes, filled = inputs(batch)
    actual = regional_contrastive_loss(factor * features, mask, lengths[:, None] * prototypes, filled=filled, form=form)
    expected = regional_contrastive_loss(features, mask, prototypes, filled=filled, form=form)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@given(batch=batches(), only=st.integers(0, 4))
def test_one_filled_class_gives_no_contrast(batch, only):
    filled = torch.arange(len(batch.prototypes)) == only % len(batch.prototypes)
    features, mask, prototypes, _ = inputs(batch)
    seen = (mask == filled.nonzero().item()).double()
    for form, value in (("infonce", 0.0), ("ratio", -1.0)):
        loss = regional_contrastive_loss(features, mask, prototypes, filled=filled, form=form, reduction="none")
        torch.testing.assert_close(loss, value * seen)


@given(batch=batches(image_size=(5, 4), feature_size=(5, 4)), form=forms)
def test_ignored_pixels_get_no_gradient_and_no_loss(batch, form):
    features, mask, prototypes, filled = inputs(batch)
    loss = regional_contrastive_loss(
        features.requires_grad_(), mask, prototypes, filled=filled, form=form, reduction="none"
    )
    loss.sum().backward()
    K = len(filled)
    ignored = (mask < 0) | (mask >= K) | ~filled[mask.clamp(0, K - 1)]
    assert not loss[ignored].any()
    assert not features.grad.movedim(1, -1)[ignored].any()


@given(batch=batches(), form=forms)
def test_an_unfilled_row_has_no_influence(batch, form):
    features, mask, prototypes, filled = inputs(batch)
    prototypes.requires_grad_()
    loss = regional_contrastive_loss(features, mask, prototypes, filled=filled, form=form)
    loss.backward()
    assert not prototypes.grad[~filled].any()
    other = torch.where(filled[:, None], prototypes, 1 - prototypes)
    assert torch.equal(regional_contrastive_loss(features, mask, other, filled=filled, form=form), loss)


@given(batch=batches(classes=20), temperature=st.sampled_from([0.5, 1.0]))
def test_infonce_is_bounded_from_below(batch, temperature):
    features, mask, prototypes, _ = inputs(batch)
    loss = regional_contrastive_loss(features, mask, prototypes - 0.5, temperature=temperature, reduction="none")
    valid = (mask >= 0) & (mask <= 20)
    assert (loss[valid] >= log(1 + 20 * exp(-2 / temperature)) - 1e-12).all()


def test_infonce_bound_is_attained():
    prototypes = torch.tensor([[1.0, 2.0]] + 20 * [[-1.0, -2.0]])
    features = torch.tensor([3.0, 6.0]).view(1, 2, 1, 1)
    loss = regional_contrastive_loss(features, torch.zeros(1, 4, 4, dtype=torch.long), prototypes)
    assert loss.item() == pytest.approx(log(1 + 20 * exp(-4)), abs=1e-6)


@given(batch=batches(), temperature=st.floats(0.05, 5))
def test_ratio_lies_between_minus_one_and_zero(batch, temperature):
    loss = regional_contrastive_loss(*inputs(batch)[:3], form="ratio", temperature=temperature, reduction="none")
    assert ((loss >= -1 - 1e-12) & (loss <= 0)).all()


@given(batch=batches(), form=forms)
def test_reductions_agree(batch, form):
    features, mask, prototypes, filled = inputs(batch)
    none, total, mean = (
        regional_contrastive_loss(features, mask, prototypes, filled=filled, form=form, reduction=reduction)
        for reduction in ("none", "sum", "mean")
    )
    K = len(filled)
    valid = (mask >= 0) & (mask < K) & filled[mask.clamp(0, K - 1)]
    assert none.shape == mask.shape
    torch.testing.assert_close(total, none.sum())
    torch.testing.assert_close(mean, none.sum() / valid.sum().clamp(min=1))


@given(batch=batches())
def test_filled_none_means_all(batch):
    features, mask, prototypes, filled = inputs(batch)
    expected = regional_contrastive_loss(features, mask, prototypes, filled=torch.ones_like(filled))
    assert torch.equal(regional_contrastive_loss(features, mask, prototypes), expected)


# degenerate values


@dtypes
@pytest.mark.parametrize(("length", "counted"), [(0.0, False), (0.5, False), (3.0, True)])
@pytest.mark.parametrize(("form", "flat"), [("infonce", log(2)), ("ratio", -0.5)])
def test_zero_features_are_equally_far_from_all(length, counted, dtype, form, flat):
    features = torch.zeros(1, 2, 1, 1, dtype=dtype)
    features[0, 0] = length * torch.finfo(dtype).eps
    features.requires_grad_()
    prototypes = torch.eye(2, dtype=dtype, requires_grad=True)
    loss = regional_contrastive_loss(features, torch.zeros(1, 3, 3, dtype=torch.long), prototypes, form=form)
    assert (loss.item() == pytest.approx(flat)) == (not counted)
    loss.backward()
    assert prototypes.grad.isfinite().all()
    assert features.grad.isfinite().all()
    assert counted or not features.grad.any()


@both_forms
def test_zero_prototype_equals_the_loop(form):
    features, mask, prototypes, filled = inputs(make_batch())
    prototypes[0] = 0
    assert filled[0]
    assert_matches(
        lambda x: regional_contrastive_loss(x, mask, prototypes, filled=filled, form=form),
        lambda x: regional_contrastive_loss_by_loops(x, mask, prototypes, filled, form=form),
        features,
    )


@both_forms
def test_no_filled_class_gives_a_zero_on_the_graph(form):
    features, mask, prototypes, filled = inputs(make_batch())
    loss = regional_contrastive_loss(features.requires_grad_(), mask, prototypes, filled=filled & False, form=form)
    assert loss == 0
    loss.backward()
    assert not features.grad.any()


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float16, torch.float64), torch.float64),
        ((torch.float64, torch.float32), torch.float64),
    ],
    ids=str,
)
def test_features_and_prototypes_may_differ_in_dtype(dtypes, expected):
    features, mask, prototypes, _ = inputs(make_batch())
    features, prototypes = features.to(dtypes[0]), prototypes.to(dtypes[1])
    loss = regional_contrastive_loss(features, mask, prototypes)
    torch.testing.assert_close(loss, regional_contrastive_loss(features.to(expected), mask, prototypes.to(expected)))


# the module


@pytest.mark.parametrize("settings", [{}, {"form": "ratio", "reduction": "none", "ignore_index": 0}], ids=str)
def test_module_equals_the_function(settings):
    features, mask, prototypes, filled = inputs(make_batch())
    module = RegionalContrastiveLoss(0.3, **settings)
    assert torch.equal(
        module(features, mask, prototypes, filled),
        regional_contrastive_loss(features, mask, prototypes, filled=filled, temperature=0.3, **settings),
    )
    assert torch.equal(
        RegionalContrastiveLoss()(features, mask, prototypes),
        regional_contrastive_loss(features, mask, prototypes),
    )
    assert all(str(setting) in repr(module) for setting in (0.3, *settings.values()))
    assert module.state_dict() == {}


# refusals


PROTOTYPES = torch.rand(3, 4)


FILLED = torch.ones(3, dtype=torch.bool)


BAD_SETTINGS = [
    ("temperature", 0.0, ValueError),
    ("temperature", -0.5, ValueError),
    ("temperature", nan, ValueError),
    ("temperature", "0.5", TypeError),
    ("form", "info-nce", ValueError),
    ("reduction", "average", ValueError),
    ("ignore_index", "255", TypeError),
]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        *BAD_FEATURES_OR_MASK,
        ("prototypes", PROTOTYPES[0], ValueError),
        ("prototypes", PROTOTYPES[:, :3], ValueError),
        ("prototypes", PROTOTYPES[:0], ValueError),
        ("prototypes", PROTOTYPES.long(), TypeError),
        ("prototypes", PROTOTYPES.to("meta"), ValueError),
        ("filled", FILLED[:2], ValueError),
        ("filled", FILLED[None], ValueError),
        ("filled", FILLED.float(), TypeError),
        ("filled", FILLED.to("meta"), ValueError),
        ("filled", [True] * 3, TypeError),
        *BAD_SETTINGS,
    ],
)
def test_loss_refuses(name, value, error):
    arguments = {"features": FEATURES, "mask": MASK, "prototypes": PROTOTYPES, "filled": FILLED, name: value}
    with pytest.raises(error, match=rf"\b{name}\b"):
        regional_contrastive_loss(**arguments)


@pytest.mark.parametrize(("name", "value", "error"), BAD_SETTINGS)
def test_module_refuses(name, value, error):
    with pytest.raises(error, match=rf"\b{name}\b"):
        RegionalContrastiveLoss(**{name: value})
