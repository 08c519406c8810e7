from __future__ import annotations

from itertools import product
from math import inf, nan

import pytest
import torch
from hypothesis import given
from torch import Tensor

from pixelss import PrototypeBank, class_prototypes
from tests import oracles
from tests.blocks import Block
from tests.oracles import (
    assert_matches,
    bilinear,
    labelled,
)
from tests.refusals import BAD_FEATURES_OR_MASK, FEATURES, MASK
from tests.strategies import SIZES, Batch, batches, make_batch

SIGNATURES = {
    "PrototypeBank": "(num_classes, dim=256, *, ignore_index=255)",
    "class_prototypes": "(features, mask, num_classes, *, ignore_index=255)",
}


def updated(b: Batch, bank: PrototypeBank) -> Tensor:
    bank.update(b.features, b.mask)
    return bank.prototypes.clone()


BLOCKS = {
    "class_prototypes": Block(
        lambda b: class_prototypes(b.features, b.mask, b.classes)[0],
        lambda b: class_prototypes_by_loops(b.features, b.mask, b.classes)[0],
        inductor=True,
    ),
    "PrototypeBank": Block(
        updated,
        make=lambda b: PrototypeBank(b.classes, b.features.shape[1]).float(),
        but={"dtype": "the bank keeps its own", "gradient": "the bank carries none"},
    ),
}

dtypes = pytest.mark.parametrize("dtype", oracles.TOLERANCE)
sizes = pytest.mark.parametrize(("feature_size", "image_size"), SIZES.values(), ids=SIZES)


def class_prototypes_by_loops(
    features: Tensor, mask: Tensor, num_classes: int, ignore_index: int = 255
) -> tuple[Tensor, Tensor]:
    """Yoon Eq. 3 for one image: the mean feature over each class's region, and the region's pixels."""
    B, D, K = *features.shape[:2], num_classes + 1
    x = bilinear(features, mask.shape[1:])
    regions = {(b, k): [] for b, k in product(range(B), range(K))}
    for b, i, j, k in labelled(mask, num_classes, ignore_index):
        regions[b, k].append(x[b, :, i, j])
    means = [sum(region) / len(region) if region else torch.zeros(D).to(x) for region in regions.values()]
    counts = [len(region) for region in regions.values()]
    return torch.stack(means).view(B, K, D), torch.tensor(counts).view(B, K)


def updated_bank(prototypes: Tensor, filled: Tensor, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Yoon Eq. 3 over images: the mean over those that show the class; a class shown by none keeps its row."""
    means, counts = class_prototypes_by_loops(features, mask, len(prototypes) - 1)
    prototypes, filled = prototypes.clone(), filled.clone()
    for k in range(len(prototypes)):
        shown = [mean[k] for mean, count in zip(means, counts, strict=True) if count[k] > 0]
        if shown:
            prototypes[k], filled[k] = sum(shown) / len(shown), True
    return prototypes, filled


def bank_of(batch: Batch, *updates: Batch, **settings: int) -> PrototypeBank:
    """Return a bank of the batch's sizes after the updates."""
    K, D = batch.prototypes.shape
    bank = PrototypeBank(K - 1, D, **settings).to(batch.features.dtype)
    for update in updates:
        bank.update(update.features, update.mask)
    return bank


def assert_same_bank(actual: PrototypeBank, expected: PrototypeBank) -> None:
    torch.testing.assert_close(actual.prototypes, expected.prototypes, rtol=1e-12, atol=1e-12)
    assert torch.equal(actual.filled, expected.filled)


# class_prototypes


@dtypes
@sizes
def test_prototypes_equal_the_loop(feature_size, image_size, dtype, device):
    batch = make_batch(feature_size=feature_size, image_size=image_size)
    assert_matches(
        lambda *inputs: class_prototypes(*inputs, 3)[0],
        lambda *inputs: class_prototypes_by_loops(*inputs, 3)[0],
        batch.features,
        batch.mask,
        dtype=dtype,
        device=device,
    )
    counts = class_prototypes(batch.features.to(device), batch.mask.to(device), 3)[1]
    expected = class_prototypes_by_loops(batch.features, batch.mask, 3)[1]
    torch.testing.assert_close(counts.cpu(), expected, check_dtype=False)


@pytest.mark.parametrize("ignore_index", [0, 2, -1, 4])
def test_any_index_can_be_void(ignore_index):
    batch = make_batch()
    actual = class_prototypes(batch.features, batch.mask, 3, ignore_index=ignore_index)
    expected = class_prototypes_by_loops(batch.features, batch.mask, 3, ignore_index)
    torch.testing.assert_close(actual, expected, check_dtype=False)


def test_prototypes_are_masked_means_at_equal_sizes():
    batch = make_batch(feature_size=(6, 5), image_size=(6, 5))
    prototypes, counts = class_prototypes(batch.features, batch.mask, 3)
    for b, k in ((0, 0), (0, 3), (2, 1)):
        region = batch.features[b, :, batch.mask[b] == k]
        torch.testing.assert_close(prototypes[b, k], region.mean(1))
        assert counts[b, k] == region.shape[1]


def test_prototypes_gradcheck():
    batch = make_batch()
    features = batch.features.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: class_prototypes(x, batch.mask, 3)[0], features)


@given(batch=batches())
def test_prototypes_lie_between_the_smallest_and_largest_feature(batch):
    prototypes, counts = class_prototypes(batch.features, batch.mask, batch.tags.shape[1])
    low, high = batch.features.amin((2, 3)), batch.features.amax((2, 3))
    inside = (prototypes >= low[:, None] - 1e-12) & (prototypes <= high[:, None] + 1e-12)
    assert inside[counts > 0].all()
    assert not prototypes[counts == 0].any()


@given(batch=batches())
def test_counts_are_pixels(batch):
    counts = class_prototypes(batch.features, batch.mask, batch.tags.shape[1])[1]
    valid = (batch.mask >= 0) & (batch.mask <= batch.tags.shape[1])
    torch.testing.assert_close(counts.sum(1), valid.sum((1, 2)), check_dtype=False)


# PrototypeBank


def test_new_bank_is_empty():
    bank = PrototypeBank(20)
    assert bank.prototypes.shape == (21, 256)
    assert bank.prototypes.dtype == torch.float32
    assert bank.filled.shape == (21,)
    assert bank.filled.dtype == torch.bool
    assert not bank.filled.any()
    assert not bank.prototypes.any()
    assert not list(bank.parameters())


@dtypes
@sizes
def test_bank_equals_the_loop_over_updates(feature_size, image_size, dtype, device):
    steps = [make_batch(seed, feature_size=feature_size, image_size=image_size, dtype=dtype) for seed in range(3)]
    bank = bank_of(steps[0]).to(device)
    prototypes = torch.zeros_like(steps[0].prototypes).double()
    filled = torch.zeros(len(prototypes), dtype=torch.bool)
    for step in steps:
        bank.update(step.features.to(device), step.mask.to(device))
        prototypes, filled = updated_bank(prototypes, filled, step.features.double(), step.mask)
        tolerance = oracles.TOLERANCE[dtype]
        torch.testing.assert_close(bank.prototypes.cpu().double(), prototypes, rtol=tolerance, atol=tolerance)
        assert torch.equal(bank.filled.cpu(), filled)


def test_bank_averages_images_not_pixels():
    features = torch.tensor([1.0, 4.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    mask = torch.tensor([[[1, 1], [1, 1]], [[1, 0], [0, 0]]])
    bank = PrototypeBank(1, 1)
    bank.update(features, mask)
    assert bank.prototypes.flatten().tolist() == [4.0, 2.5]


@given(batch=batches(images=3))
def test_bank_does_not_depend_on_the_order_of_images(batch):
    order = torch.tensor([2, 0, 1])
    shuffled = batch._replace(features=batch.features[order], mask=batch.mask[order])
    assert_same_bank(bank_of(batch, shuffled), bank_of(batch, batch))


@given(batch=batches())
def test_class_without_a_pixel_keeps_its_row(batch):
    bank = bank_of(batch, batch)
    before, filled = bank.prototypes.clone(), bank.filled.clone()
    bank.update(batch.features + 1, torch.where(batch.mask == 1, batch.mask, 255))
    changed = torch.arange(len(before)) == 1
    changed &= (batch.mask == 1).any()
    assert torch.equal(bank.prototypes[~changed], before[~changed])
    assert not torch.isclose(bank.prototypes[changed], before[changed]).any()
    assert torch.equal(bank.filled, filled)


@given(batch=batches())
def test_filled_are_the_classes_seen(batch):
    bank = bank_of(batch, batch)
    seen = [(batch.mask == k).any() for k in range(len(bank.filled))]
    assert torch.equal(bank.filled, torch.stack(seen))
    assert not bank.prototypes[~bank.filled].any()


@pytest.mark.parametrize("value", [nan, inf])
def test_non_finite_row_is_not_taken(value):
    first = make_batch(feature_size=(7, 9))
    second = make_batch(1, feature_size=(7, 9))
    second.features.movedim(1, -1)[second.mask == 2] = value
    bank, expected = bank_of(first, first, second), bank_of(first, first)
    row = expected.prototypes[2].clone()
    assert torch.equal(bank.prototypes[2], row)
    assert bank.filled.all()
    assert bank.prototypes.isfinite().all()
    assert not bank_of(first, second).filled[2]


def test_non_finite_image_holds_back_its_own_classes_only():
    features = torch.tensor([1.0, 2.0, nan]).view(3, 1, 1, 1)
    mask = torch.tensor([0, 1, 2]).view(3, 1, 1).expand(3, 4, 4)
    prototypes, counts = class_prototypes(features, mask, 2)
    assert not prototypes[counts == 0].any()
    bank = PrototypeBank(2, 1)
    bank.update(features, mask)
    assert bank.prototypes.flatten().tolist() == [1.0, 2.0, 0.0]
    assert bank.filled.tolist() == [True, True, False]


def test_update_is_in_place_and_keeps_no_graph():
    batch = make_batch(dtype=torch.float32)
    bank = bank_of(batch)
    prototypes, filled = bank.prototypes, bank.filled
    features = batch.features.requires_grad_()
    assert bank.update(features, batch.mask) is None
    assert bank.prototypes is prototypes
    assert bank.filled is filled
    assert filled.any()
    assert not prototypes.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_bank_keeps_its_dtype_whatever_the_features(dtype):
    batch = make_batch(dtype=torch.float32)
    bank = bank_of(batch)
    features = batch.features.to(dtype)
    bank.update(features, batch.mask)
    assert bank.prototypes.dtype == torch.float32
    expected = bank_of(batch, batch._replace(features=features.float()))
    torch.testing.assert_close(bank.prototypes, expected.prototypes)


def test_bank_ignores_its_ignore_index():
    batch = make_batch()
    bank = bank_of(batch, batch, ignore_index=2)
    assert bank.filled.tolist() == [True, True, False, True]


def test_reset_empties_the_bank():
    batch = make_batch()
    bank = bank_of(batch, batch)
    assert bank.reset() is None
    assert_same_bank(bank, bank_of(batch))


def test_resumed_bank_equals_an_uninterrupted_one():
    steps = [make_batch(seed) for seed in range(3)]
    saved = bank_of(steps[0], *steps[:2]).state_dict()
    assert set(saved) == {"prototypes", "filled"}
    resumed = bank_of(steps[0])
    resumed.load_state_dict({name: value.clone() for name, value in saved.items()}, strict=True)
    # Only class 1 in the last step: the other rows come from the state dict.
    last = steps[2]._replace(mask=steps[2].mask.where(steps[2].mask == 1, 255))
    resumed.update(last.features, last.mask)
    assert_same_bank(resumed, bank_of(steps[0], *steps[:2], last))


def test_bank_repr_shows_its_settings():
    assert all(text in repr(PrototypeBank(20, 64, ignore_index=-1)) for text in ("20", "64", "ignore_index=-1"))


# refusals


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        *BAD_FEATURES_OR_MASK,
        ("num_classes", 0, ValueError),
        ("num_classes", -1, ValueError),
        ("num_classes", 2.5, TypeError),
    ],
)
def test_prototypes_refuse(name, value, error):
    with pytest.raises(error, match=rf"\b{name}\b"):
        class_prototypes(**{"features": FEATURES, "mask": MASK, "num_classes": 2, name: value})


@pytest.mark.parametrize(("name", "value", "error"), [*BAD_FEATURES_OR_MASK, ("features", FEATURES[:, :3], ValueError)])
def test_bank_refuses_and_stays_as_it_is(name, value, error):
    bank = PrototypeBank(2, 4)
    with pytest.raises(error, match=rf"\b{name}\b"):
        bank.update(**{"features": FEATURES, "mask": MASK, name: value})
    assert_same_bank(bank, PrototypeBank(2, 4))


def test_bank_refuses_another_device():
    with pytest.raises(ValueError, match=r"\bfeatures\b"):
        PrototypeBank(2, 4).update(FEATURES.to("meta"), MASK.to("meta"))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("num_classes", 0, ValueError),
        ("num_classes", "2", TypeError),
        ("dim", 0, ValueError),
        ("dim", 4.0, TypeError),
        ("ignore_index", None, TypeError),
    ],
)
def test_bank_refuses_settings(name, value, error):
    with pytest.raises(error, match=rf"\b{name}\b"):
        PrototypeBank(**{"num_classes": 2, "dim": 4, name: value})
