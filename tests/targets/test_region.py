from __future__ import annotations

from itertools import product
from math import nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelss import ClassRegionMask, class_region_mask, direct_loss
from tests import oracles
from tests.blocks import Block
from tests.oracles import active
from tests.refusals import BAD_CAM_OR_LABELS, CAM, TAGS
from tests.strategies import SIZES, batches, make_batch

SIGNATURES = {
    "ClassRegionMask": "(threshold=0.2)",
    "class_region_mask": "(cam, tags, *, threshold=0.2)",
}

BLOCKS = {
    "class_region_mask": Block(
        lambda b: class_region_mask(b.cam, b.tags),
        lambda b: class_region_mask_by_loops(b.cam.detach(), b.tags, 0.2),
        inductor=True,
    ),
    "ClassRegionMask": Block(lambda b: ClassRegionMask()(b.cam, b.tags)),
}

dtypes = pytest.mark.parametrize("dtype", oracles.TOLERANCE)
image_sizes = pytest.mark.parametrize("size", [target for _, target in SIZES.values()], ids=SIZES)
thresholds = st.floats(0, 1, allow_subnormal=False)


def class_region_mask_by_loops(cam: Tensor, tags: Tensor, threshold: float) -> Tensor:
    """Yoon Eq. 1, Yoon Eq. 2: the present class of the largest activation (the lowest on a tie) where > t, else 0."""
    B, N, H, W = cam.shape
    mask = torch.zeros(B, H, W, dtype=torch.int64)
    for b, i, j in product(range(B), range(H), range(W)):
        present = [k for k in range(N) if tags[b, k] > 0]
        values = [float(active(cam[b, k, i, j])) for k in present]
        if values and max(values) > threshold:
            mask[b, i, j] = 1 + present[values.index(max(values))]
    return mask


@dtypes
@image_sizes
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.7])
def test_mask_equals_the_loop(size, threshold, dtype, device):
    batch = make_batch(image_size=size, dtype=dtype)
    mask = class_region_mask(batch.cam.to(device), batch.tags.to(device), threshold=threshold)
    assert mask.dtype == torch.int64
    assert torch.equal(mask.cpu(), class_region_mask_by_loops(batch.cam, batch.tags, threshold))


@given(batch=batches(classes=4), threshold=st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_ties_go_to_the_lowest_class(batch, threshold):
    cam = (2 * batch.cam).round() / 2
    mask = class_region_mask(cam, batch.tags, threshold=threshold)
    assert torch.equal(mask, class_region_mask_by_loops(cam, batch.tags, threshold))


def test_an_activation_at_the_threshold_is_background():
    cam = torch.tensor([0.5, 0.25, 0.2500001, 1.0]).view(1, 1, 2, 2)
    assert class_region_mask(cam, torch.ones(1, 1), threshold=0.25).flatten().tolist() == [1, 0, 1, 1]
    assert not class_region_mask(cam, torch.ones(1, 1), threshold=1.0).any()


@given(batch=batches(), threshold=thresholds)
def test_mask_partitions_the_pixels(batch, threshold):
    mask = class_region_mask(batch.cam, batch.tags, threshold=threshold)
    regions = torch.stack([mask == k for k in range(batch.tags.shape[1] + 1)])
    assert (regions.sum(0) == 1).all()


@given(batch=batches(), threshold=thresholds)
def test_absent_classes_never_appear(batch, threshold):
    mask = class_region_mask(batch.cam, batch.tags, threshold=threshold)
    for one, tags in zip(mask, batch.tags, strict=True):
        assert set(one.unique().tolist()) <= {0, *(tags.nonzero().flatten() + 1).tolist()}


@given(batch=batches(), pair=st.tuples(thresholds, thresholds).map(sorted))
def test_a_higher_threshold_only_moves_pixels_to_the_background(batch, pair):
    low, high = (class_region_mask(batch.cam, batch.tags, threshold=t) for t in pair)
    assert ((high == low) | (high == 0)).all()


@given(batch=batches(), axes=st.sampled_from([(1,), (2,), (1, 2)]))
def test_mask_is_equivariant_to_flips(batch, axes):
    flipped = class_region_mask(batch.cam.flip([axis + 1 for axis in axes]), batch.tags)
    assert torch.equal(flipped, class_region_mask(batch.cam, batch.tags).flip(axes))


@given(batch=batches(), data=st.data())
def test_mask_is_equivariant_to_class_permutations(batch, data):
    # The maximum is unique where it is positive: the maps are random reals. Peaks, all 1, are made so too.
    order = data.draw(st.permutations(range(batch.cam.shape[1])))
    cam = batch.cam * torch.linspace(0.9, 1, len(order))[:, None, None]
    permuted = class_region_mask(cam[:, order], batch.tags[:, order])
    assert torch.equal(torch.tensor([0, *(k + 1 for k in order)])[permuted], class_region_mask(cam, batch.tags))


@given(batch=batches())
def test_absent_classes_are_removed_before_the_arg_max(batch):
    louder = torch.where(batch.tags[:, :, None, None] > 0, batch.cam, 1.0)
    assert torch.equal(class_region_mask(louder, batch.tags), class_region_mask(batch.cam, batch.tags))


@pytest.mark.parametrize("value", [nan, float("inf"), -float("inf")])
def test_non_finite_activation_is_none(value):
    batch = make_batch()
    broken, zeroed = batch.cam.clone(), batch.cam.clone()
    broken[:, :, 1:3, 2], zeroed[:, :, 1:3, 2] = value, 0.0
    assert torch.equal(class_region_mask(broken, batch.tags), class_region_mask(zeroed, batch.tags))
    loss = [direct_loss(cam, batch.mask, batch.tags) for cam in (broken, zeroed)]
    assert torch.equal(*loss)


def test_mask_module_equals_the_function():
    batch = make_batch()
    module = ClassRegionMask(0.4)
    assert torch.equal(module(batch.cam, batch.tags), class_region_mask(batch.cam, batch.tags, threshold=0.4))
    assert torch.equal(ClassRegionMask()(batch.cam, batch.tags), class_region_mask(batch.cam, batch.tags))
    assert "threshold=0.4" in repr(module)
    assert module.state_dict() == {}


# refusals


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        *BAD_CAM_OR_LABELS,
        ("threshold", -0.1, ValueError),
        ("threshold", 1.1, ValueError),
        ("threshold", nan, ValueError),
        ("threshold", "0.2", TypeError),
    ],
)
def test_mask_refuses(name, value, error):
    with pytest.raises(error, match=rf"\b{name}\b"):
        class_region_mask(**{"cam": CAM, "tags": TAGS, name: value})


@pytest.mark.parametrize("threshold", [-0.1, nan])
def test_mask_module_refuses_a_threshold_at_the_latest_when_it_is_used(threshold):
    with pytest.raises(ValueError, match="threshold"):
        ClassRegionMask(threshold)(CAM, TAGS)
