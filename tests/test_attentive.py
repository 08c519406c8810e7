from __future__ import annotations

from math import nan

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_matches
from strategies import Batch, batches, make_batch
from torch import Tensor
from torch.nn import functional

from pixelss import (
    MultiScaleAttentiveLoss,
    attentive_target,
    multi_scale_attentive_loss,
    scale_dissimilarity,
)

dtypes = pytest.mark.parametrize("dtype", oracles.TOLERANCE)
image_sizes = pytest.mark.parametrize("size", [(7, 9), (5, 3), (1, 1)], ids=str)
numbers_of_scales = pytest.mark.parametrize("scales", [(3, 3), (1, 3), (3, 1), (2, 4)], ids=str)


def pairs(batch: Batch) -> tuple[Tensor, Tensor]:
    """All (image, class) pairs as present ones: (S, P, H, W) and (R, P, H, W)."""
    return torch.stack(batch.student).flatten(1, 2), torch.stack(batch.teacher).flatten(1, 2)


# Eq. 6


@dtypes
@image_sizes
@numbers_of_scales
def test_dissimilarity_equals_the_loop(size, scales, dtype, device):
    maps = pairs(make_batch(images=2, image_size=size, scales=scales))
    torch.testing.assert_close(scale_dissimilarity(*maps), oracles.scale_dissimilarity(*maps))
    away_from_zero = [cam + 0.1 for cam in maps]
    assert_matches(scale_dissimilarity, oracles.scale_dissimilarity, *away_from_zero, dtype=dtype, device=device)


def test_dissimilarity_equals_cosine_similarity():
    student, teacher = (maps.flatten(2) for maps in pairs(make_batch()))
    expected = 2 - functional.cosine_similarity(student[:, None], teacher[None], dim=-1)
    actual = scale_dissimilarity(*pairs(make_batch()))
    torch.testing.assert_close(actual, expected.permute(2, 0, 1))


def test_dissimilarity_gradcheck():
    student, teacher = (
        (maps + 0.1).requires_grad_() for maps in pairs(make_batch(images=1, image_size=(3, 4), scales=(2, 3)))
    )
    assert torch.autograd.gradcheck(scale_dissimilarity, (student, teacher))


@given(batch=batches(dtype=torch.float32))
def test_dissimilarity_of_activations_lies_between_one_and_two(batch):
    xi = scale_dissimilarity(*pairs(batch))
    assert ((xi >= 1 - 1e-6) & (xi <= 2 + 1e-6)).all()


@given(batch=batches())
def test_dissimilarity_of_a_map_to_itself_is_one(batch):
    student = pairs(batch)[0] + 0.1
    xi = scale_dissimilarity(student, student).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(xi, torch.ones_like(xi))


def test_dissimilarity_of_disjoint_or_zero_maps_is_two():
    student = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).view(2, 1, 1, 2)
    teacher = torch.tensor([[0.0, 0.5], [0.3, 0.0]]).view(2, 1, 1, 2)
    assert scale_dissimilarity(student, teacher).tolist() == [[[2.0, 1.0], [2.0, 2.0]]]


# Eq. 7


@dtypes
@image_sizes
@numbers_of_scales
@pytest.mark.parametrize("attentive", [True, False])
def test_target_equals_the_loop(size, scales, attentive, dtype, device):
    maps = pairs(make_batch(images=2, image_size=size, scales=scales))
    assert_matches(
        lambda *maps: attentive_target(*maps, attentive=attentive),
        lambda *maps: oracles.attentive_target(*maps, attentive),
        *maps,
        dtype=dtype,
        device=device,
    )


@given(batch=batches())
def test_target_without_attention_is_the_mean_of_the_teacher(batch):
    student, teacher = pairs(batch)
    target = attentive_target(student, teacher, attentive=False)
    torch.testing.assert_close(target, teacher.mean(0).expand_as(student))


@pytest.mark.parametrize("attentive", [True, False])
def test_target_carries_no_gradient(attentive):
    student, teacher = (maps.requires_grad_() for maps in pairs(make_batch()))
    assert not attentive_target(student, teacher, attentive=attentive).requires_grad


def test_target_is_not_clamped():
    left, right = torch.eye(2, dtype=torch.float64).view(2, 1, 1, 1, 2)
    assert attentive_target(left, right).flatten().tolist() == [0.0, 2.0]


# Eq. 8


def assert_loss_equals_the_loop(batch: Batch, dtype=torch.float64, device="cpu", **settings) -> None:
    S = len(batch.student)
    assert_matches(
        lambda tags, *cams: multi_scale_attentive_loss(cams[:S], cams[S:], tags, **settings),
        lambda tags, *cams: oracles.multi_scale_attentive_loss(cams[:S], cams[S:], tags, **settings),
        batch.tags,
        *batch.student,
        *batch.teacher,
        dtype=dtype,
        device=device,
    )


@dtypes
@image_sizes
@numbers_of_scales  # (1, 3) is SMM
@pytest.mark.parametrize("attentive", [True, False])
def test_loss_equals_the_loop(size, scales, attentive, dtype, device):
    assert_loss_equals_the_loop(make_batch(image_size=size, scales=scales), dtype, device, attentive=attentive)


@pytest.mark.parametrize("value", [nan, float("inf"), -float("inf")])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_non_finite_values_count_as_no_activation(value, reduction):
    batch = make_batch()
    batch.student[1][0, 0, 2, 3] = value
    batch.teacher[2][0, 0, 1] = value
    assert_loss_equals_the_loop(batch, reduction=reduction)


def test_loss_without_attention_is_an_l1_distance_to_the_mean():
    batch = make_batch()
    tags = torch.ones_like(batch.tags)
    target = torch.stack(batch.teacher).mean(0)
    for reduction in ("mean", "sum"):
        expected = sum(functional.l1_loss(cam, target, reduction=reduction) for cam in batch.student)
        actual = multi_scale_attentive_loss(batch.student, batch.teacher, tags, attentive=False, reduction=reduction)
        torch.testing.assert_close(actual, expected)


def test_loss_gradcheck_where_the_target_is_constant():
    batch = make_batch(image_size=(3, 4))
    students = [(cam + 0.01).requires_grad_() for cam in batch.student]
    assert torch.autograd.gradcheck(
        lambda *cams: multi_scale_attentive_loss(cams, batch.teacher, batch.tags, attentive=False), students
    )


@given(batch=batches())
def test_gradient_is_the_sign_of_the_distance_to_the_target(batch):
    students = [cam.requires_grad_() for cam in batch.student]
    multi_scale_attentive_loss(students, batch.teacher, batch.tags, reduction="sum").backward()
    student, teacher = pairs(batch)
    sign = (student - attentive_target(student, teacher)).sign() * batch.tags.flatten()[:, None, None]
    for cam, expected in zip(students, sign, strict=True):
        torch.testing.assert_close(cam.grad, expected.view(cam.shape))


@given(batch=batches(), attentive=st.booleans())
def test_loss_is_zero_where_all_maps_are_equal(batch, attentive):
    loss = multi_scale_attentive_loss([batch.cam] * 2, [batch.cam] * 3, batch.tags, attentive=attentive)
    assert loss.abs() < 1e-12


@given(batch=batches(), reduction=st.sampled_from(["mean", "sum"]))
def test_teacher_and_absent_classes_get_no_gradient_and_have_no_influence(batch, reduction):
    for cam in (*batch.student, *batch.teacher):
        cam.requires_grad_()
    loss = multi_scale_attentive_loss(batch.student, batch.teacher, batch.tags, reduction=reduction)
    loss.backward()
    assert all(cam.grad is None for cam in batch.teacher)
    assert not any(cam.grad[batch.tags == 0].any() for cam in batch.student)
    absent = (batch.tags == 0)[:, :, None, None]
    other = [[cam.masked_fill(absent, 0.5) for cam in cams] for cams in (batch.student, batch.teacher)]
    torch.testing.assert_close(multi_scale_attentive_loss(*other, batch.tags, reduction=reduction), loss)


@given(batch=batches())
def test_reductions_agree(batch):
    mean, total = (
        multi_scale_attentive_loss(batch.student, batch.teacher, batch.tags, reduction=reduction)
        for reduction in ("mean", "sum")
    )
    count = batch.tags.sum() * batch.cam[0, 0].numel()
    torch.testing.assert_close(mean, total / count.clamp(min=1))


def test_no_tag_at_all_gives_a_zero_on_the_graph():
    batch = make_batch()
    students = [cam.requires_grad_() for cam in batch.student]
    for reduction in ("mean", "sum"):
        loss = multi_scale_attentive_loss(students, batch.teacher, batch.tags * 0, reduction=reduction)
        assert loss == 0
        loss.backward()
    assert not any(cam.grad.any() for cam in students)


@pytest.mark.parametrize("settings", [{}, {"attentive": False, "reduction": "sum"}], ids=str)
def test_module_equals_the_function(settings):
    batch = make_batch()
    arguments = batch.student, batch.teacher, batch.tags
    module = MultiScaleAttentiveLoss(**settings)
    assert torch.equal(module(*arguments), multi_scale_attentive_loss(*arguments, **settings))
    assert all(f"{name}={value}" in repr(module).replace("'", "") for name, value in settings.items())
    assert module.state_dict() == {}


# refusals

MAPS = torch.rand(2, 4, 5, 6)
CAM = torch.rand(2, 3, 4, 5)
TAGS = torch.ones(2, 3)


@pytest.mark.parametrize("function", [scale_dissimilarity, attentive_target])
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("student", MAPS[0], ValueError),
        ("student", MAPS[..., :0], ValueError),
        ("student", MAPS[:0], ValueError),
        ("student", MAPS.long(), TypeError),
        ("student", [MAPS], TypeError),
        ("teacher", MAPS[0], ValueError),
        ("teacher", MAPS[:, :3], ValueError),
        ("teacher", MAPS[..., 1:], ValueError),
        ("teacher", MAPS.long(), TypeError),
        ("teacher", MAPS.to("meta"), ValueError),
    ],
)
def test_dissimilarity_and_target_refuse(function, name, value, error):
    with pytest.raises(error, match=rf"\b{name}\b"):
        function(**{"student": MAPS, "teacher": MAPS, name: value})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("student_cams", [], ValueError),
        ("student_cams", (cam for cam in [CAM]), TypeError),
        ("student_cams", [CAM, CAM[0]], ValueError),
        ("student_cams", [CAM, CAM[..., 1:]], ValueError),
        ("student_cams", [CAM, CAM.long()], TypeError),
        ("student_cams", [CAM, None], TypeError),
        ("teacher_cams", [], ValueError),
        ("teacher_cams", [CAM, CAM[:1]], ValueError),
        ("teacher_cams", [CAM[:, :2]] * 2, ValueError),
        ("teacher_cams", [CAM[..., 1:]] * 2, ValueError),
        ("teacher_cams", [CAM, CAM.to("meta")], ValueError),
        ("tags", TAGS[:1], ValueError),
        ("tags", TAGS[:, :2], ValueError),
        ("tags", TAGS[0], ValueError),
        ("tags", TAGS.to("meta"), ValueError),
        ("tags", [[1, 1, 1]] * 2, TypeError),
        ("reduction", "none", ValueError),
        ("attentive", "false", ValueError),
    ],
)
def test_loss_refuses(name, value, error):
    arguments = {"student_cams": [CAM] * 2, "teacher_cams": [CAM] * 2, "tags": TAGS, name: value}
    with pytest.raises(error, match=rf"\b{name}\b"):
        multi_scale_attentive_loss(**arguments)


@pytest.mark.parametrize(("name", "value"), [("reduction", "none"), ("attentive", "false")])
def test_module_refuses(name, value):
    with pytest.raises(ValueError, match=name):
        MultiScaleAttentiveLoss(**{name: value})
