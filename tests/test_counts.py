"""Joint counts against NumPy's and a loop over the pixels, rates against the textbook's words."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pixelss._counts import joint_counts, rates, union

INTEGERS = [torch.uint8, torch.int16, torch.int32, torch.int64]


@given(
    seed=st.integers(0, 2**32 - 1),
    num_classes=st.integers(1, 5),
    size=st.integers(1, 5),
    dtypes=st.tuples(st.sampled_from(INTEGERS), st.sampled_from(INTEGERS)),
)
def test_counts_equal_numpys(seed, num_classes, size, dtypes):
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, num_classes, (2, 5, 4), generator=g)
    index = torch.randint(0, size, (2, 5, 4), generator=g)
    void = torch.rand(target.shape, generator=g) < 0.2
    target[void] = 200
    index[void] = 77  # whatever stands under void
    counts, wrong = joint_counts(target.to(dtypes[0]), num_classes, 200, index.to(dtypes[1]), size)
    expected = np.bincount((target * size + index)[~void].numpy(), minlength=num_classes * size)
    assert counts.tolist() == expected.reshape(num_classes, size).tolist()
    assert not wrong


@pytest.mark.parametrize("index", [-1, 3, 2**32, 2**40 + 1, -(2**33)])  # the last three wrap in a smaller type
def test_a_wrong_index_is_told_unless_void_lies_over_it(index):
    target = torch.tensor([[0, 1, 255]])
    for place, told in ((0, True), (2, False)):
        wrong = torch.ones(1, 3, dtype=torch.int64)
        wrong[0, place] = index
        assert joint_counts(target, 2, 255, wrong, 3)[1] is told


@pytest.mark.parametrize("value", [-1, 2, 254, 2**32, 2**40 + 1, -(2**33)])
def test_a_wrong_target_is_refused(value):
    target = torch.tensor([[0, value, 255]])
    with pytest.raises(ValueError, match=rf"target must hold classes in 0..1 or ignore_index=255, but holds {value}\."):
        joint_counts(target, 2, 255, torch.zeros(1, 3, dtype=torch.uint8), 2)


def test_rates_of_two_matrices_at_once():
    counts = torch.tensor([[[3, 1], [2, 4]], [[5, 0], [0, 0]]])  # rows the target
    assert union(counts).tolist() == [[3 + 1 + 2, 4 + 1 + 2], [5, 0]]
    iou, precision, recall = rates(counts)
    assert iou[0].tolist() == [3 / 6, 4 / 7]
    assert precision[0].tolist() == [3 / 5, 4 / 5]
    assert recall[0].tolist() == [3 / 4, 4 / 6]
    for rate in (iou, precision, recall):
        assert rate[1, 0] == 1
        assert math.isnan(rate[1, 1])  # of a class that is nowhere
