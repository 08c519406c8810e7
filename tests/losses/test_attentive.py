from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pixelss import (
    MultiScaleAttentiveLoss,
    attentive_target,
    multi_scale_attentive_loss,
    scale_dissimilarity,
)
from tests import oracles
from tests.blocks import Block
from tests.oracles import active, assert_matches
from tests.strategies import Batch, batches, make_batch

SIGNATURES = {
    "MultiScaleAttentiveLoss": "(*, attentive=True, reduction='mean')",
    "attentive_target": "(student, teacher, *, attentive=True)",
    "multi_scale_attentive_loss": "(student_cams, teacher_cams, tags, *, attentive=True, reduction='mean')",
    "scale_dissimilarity": "(student, teacher)",
}


def away_from_zero(b: Batch) -> tuple[Tensor, Tensor]:
    """All pairs; the cosine of a map of zeros has no gradient."""
    student, teacher = pairs(b)
    return student + (student == 0) / 16, teacher + (teacher == 0) / 16


CALLER = "the loss, which calls it, has replaced them"

BLOCKS = {
    "scale_dissimilarity": Block(
        lambda b: scale_dissimilarity(*away_from_zero(b)),
        lambda b: scale_dissimilarity_by_loops(*away_from_zero(b)),
        but={"finite": CALLER},
    ),
    "attentive_target": Block(
        lambda b: attentive_target(*pairs(b)),
        lambda b: attentive_target_by_loops(*pairs(b)),
        but={"finite": CALLER, "gradient": "a target carries none"},
        inductor=True,
    ),
    "multi_scale_attentive_loss": Block(
        lambda b: multi_scale_attentive_loss(b.student, b.teacher, b.tags),
        lambda b: multi_scale_attentive_loss_by_loops(b.student, b.teacher, b.tags),
        but={
            "no wait": "gathers the present pairs: how many there are decides a shape, known on the CPU",
            "gradient": "the target counts as constant",
        },
    ),
    "MultiScaleAttentiveLoss": Block(lambda b: MultiScaleAttentiveLoss()(b.student, b.teacher, b.tags)),
}

dtypes = pytest.mark.parametrize("dtype", oracles.TOLERANCE)
image_sizes = pytest.mark.parametrize("size", [(7, 9), (5, 3), (1, 1)], ids=str)
numbers_of_scales = pytest.mark.parametrize("scales", [(3, 3), (1, 3), (3, 1), (2, 4)], ids=str)


def scale_dissimilarity_by_loops(student: Tensor, teacher: Tensor) -> Tensor:
    """Yoon Eq. 6: xi_ij = 2 - cos(A_i, A_j) over pixels, (S,P,H,W), (R,P,H,W) -> (P,S,R)."""
    xi = []
    for p, i, j in product(range(student.shape[1]), range(len(student)), range(len(teacher))):
        a, b = student[i, p].flatten(), teacher[j, p].flatten()
        dot = (a * b).sum()
        norms = torch.sqrt((a * a).sum()) * torch.sqrt((b * b).sum())
        xi.append(2 - (dot / norms if norms > 0 else dot * 0))
    return torch.stack(xi).view(student.shape[1], len(student), len(teacher))


def attentive_target_by_loops(student: Tensor, teacher: Tensor, attentive: bool = True) -> Tensor:
    """Yoon Eq. 7: target_i = 1/R sum_j xi_ij A_j, without gradient; xi = 1 where not attentive."""
    student, teacher = student.detach(), teacher.detach()
    xi = scale_dissimilarity_by_loops(student, teacher) if attentive else None
    target = torch.zeros_like(student)
    for i, p, j in product(range(len(student)), range(student.shape[1]), range(len(teacher))):
        target[i, p] += (xi[p, i, j] if attentive else 1.0) * teacher[j, p] / len(teacher)
    return target


def multi_scale_attentive_loss_by_loops(
    student_cams: Sequence[Tensor],
    teacher_cams: Sequence[Tensor],
    tags: Tensor,
    *,
    attentive: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Yoon Eq. 8: L1 distance to the target, summed over student scales; mean over (present pair, pixel) or sum."""
    total, count = sum(active(cam).sum() for cam in student_cams) * 0, 0
    for b, k in tags.gt(0).nonzero().tolist():
        student = torch.stack([active(cam[b, k]) for cam in student_cams])[:, None]
        teacher = torch.stack([active(cam[b, k]) for cam in teacher_cams])[:, None]
        target = attentive_target_by_loops(student, teacher, attentive)
        for i in range(len(student)):
            total = total + torch.abs(student[i, 0] - target[i, 0]).sum()
        count += student[0].numel()
    return total / max(count, 1) if reduction == "mean" else total


def pairs(batch: Batch) -> tuple[Tensor, Tensor]:
    """All (image, class) pairs as present ones: (S, P, H, W) and (R, P, H, W)."""
    return torch.stack(batch.student).flatten(1, 2), torch.stack(batch.teacher).flatten(1, 2)


# Yoon Eq. 6


@dtypes
@image_sizes
@numbers_of_scales
def test_dissimilarity_equals_the_loop(size, scales, dtype, device):
    maps = pairs(make_batch(images=2, image_size=size, scales=scales))
    torch.testing.assert_close(scale_dissimilarity(*maps), scale_dissimilarity_by_loops(*maps))
    away_from_zero = [cam + 0.1 for cam in maps]
    assert_matches(scale_dissimilarity, scale_dissimilarity_by_loops, *away_from_zero, dtype=dtype, device=device)


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


# Yoon Eq. 7


@dtypes
@image_sizes
@numbers_of_scales
@pytest.mark.parametrize("attentive", [True, False])
def test_target_equals_the_loop(size, scales, attentive, dtype, device):
    maps = pairs(make_batch(images=2, image_size=size, scales=scales))
    assert_matches(
        lambda *maps: attentive_target(*maps, attentive=attentive),
        lambda *maps: attentive_target_by_loops(*maps, attentive),
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


# Yoon Eq. 8


def assert_loss_equals_the_loop(batch: Batch, dtype=torch.float64, device="cpu", **settings) -> None:
    S = len(batch.student)
    assert_matches(
        lambda tags, *cams: multi_scale_attentive_loss(cams[:S], cams[S:], tags, **settings),
        lambda tags, *cams: multi_scale_attentive_loss_by_loops(cams[:S], cams[S:], tags, **settings),
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
        lambda *cams: multi_scale_attentive_loss(cams, batch.teacher, batch.tags, attentive=False),
        students,
        fast_mode=True,
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


@pytest.mark.parametrize("attentive", [True, False])
def test_student_and_teacher_may_differ_in_dtype(attentive):
    student, teacher = pairs(make_batch())
    for mixed in ((student.float(), teacher), (student, teacher.bfloat16())):
        exact = [x.double() for x in mixed]
        torch.testing.assert_close(scale_dissimilarity(*mixed), scale_dissimilarity(*exact))
        actual = attentive_target(*mixed, attentive=attentive)
        torch.testing.assert_close(actual, attentive_target(*exact, attentive=attentive))


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
