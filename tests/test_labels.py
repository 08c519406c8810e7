from __future__ import annotations

import pytest
import torch

from pixelss import (
    ConfusionMatrix,
    PrototypeBank,
    ThresholdSweep,
    balanced_cross_entropy,
    boundary_mask,
    class_prototypes,
    direct_loss,
    label_probs,
    multi_scale_cross_entropy,
    regional_contrastive_loss,
)
from pixelss._labels import class_maps, mean_over, valid_pixels
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


def test_means_along_an_axis():
    values, valid = noise(2, 3, 4), noise(3, 4) > 0
    valid[1] = False
    expected = [[one[row].mean() if row.any() else 0 for one, row in zip(x, valid, strict=True)] for x in values]
    expected = torch.tensor(expected, dtype=values.dtype)
    torch.testing.assert_close(mean_over(values, valid, dim=-1), expected)
    square = (one.reshape(2, 3, 2, 2) for one in (values, valid.expand_as(values)))
    torch.testing.assert_close(mean_over(*square, dim=(2, 3)), expected)


def test_class_maps_are_one_hot():
    label, _ = valid_pixels(make_batch().mask, 4, 255)
    expected = torch.nn.functional.one_hot(label, 4).movedim(-1, 1).bool()
    assert torch.equal(class_maps(label, 4), expected)


IMAGE = torch.zeros(1, 1, 1, dtype=torch.int64)
OF_256_CLASSES = {  # what takes both a number of classes and a void value
    "class_prototypes": lambda **void: class_prototypes(torch.ones(1, 2, 1, 1), IMAGE, 255, **void),
    "PrototypeBank": lambda **void: PrototypeBank(255, 2, **void),
    "boundary_mask": lambda **void: boundary_mask(IMAGE, 255, **void),
    "label_probs": lambda **void: label_probs(IMAGE, 255, **void),
    "direct_loss": lambda **void: direct_loss(torch.ones(1, 255, 1, 1), IMAGE, torch.ones(1, 255), **void),
    "regional_contrastive_loss": lambda **void: regional_contrastive_loss(
        torch.ones(1, 2, 1, 1), IMAGE, torch.ones(256, 2), **void
    ),
    "multi_scale_cross_entropy": lambda **void: multi_scale_cross_entropy([torch.ones(1, 256, 1, 1)], IMAGE, **void),
    "balanced_cross_entropy": lambda **void: balanced_cross_entropy(torch.ones(1, 256, 1, 1), IMAGE, **void),
    "ConfusionMatrix": lambda **void: ConfusionMatrix(256, **void),
    "ThresholdSweep": lambda **void: ThresholdSweep(255, **void),
}


@pytest.mark.parametrize("name", OF_256_CLASSES)
def test_the_default_void_value_is_refused_where_it_is_a_class(name):
    with pytest.raises(ValueError, match=r"ignore_index must be no class, but 255.* Pass ignore_index=-1"):
        OF_256_CLASSES[name]()
    OF_256_CLASSES[name](ignore_index=-1)


def test_255_classes_leave_255_void():
    assert not valid_pixels(IMAGE + 255, 255, 255)[1].any()
    assert valid_pixels(IMAGE + 255, 256, -1)[1].all()
