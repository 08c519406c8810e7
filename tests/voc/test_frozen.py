"""The frozen beginning that student and teacher share: run once, and every number as without it."""

from __future__ import annotations

import frozen
import pytest
import torch
from batches import Batch
from frozen import frozen_layers, share_frozen_layers
from torch import Tensor, nn
from torch.testing import assert_close
from train_cam import Objective

from pixelss import CAMHead, EMATeacher, freeze_norm
from tests.voc.trainings import tiny_config


class Counted(nn.Conv2d):
    """A convolution that counts the passes of all of its kind."""

    passes = 0

    def forward(self, image: Tensor) -> Tensor:
        Counted.passes += 1
        return super().forward(image)


def network() -> nn.Sequential:
    stem = nn.Sequential(Counted(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU())
    backbone = freeze_norm(nn.Sequential(stem, nn.Conv2d(4, 6, 3, stride=4), nn.BatchNorm2d(6)))
    stem.requires_grad_(False)
    return nn.Sequential(backbone, CAMHead(6, 2, dim=16))


def test_frozen_layers_are_the_largest_modules_that_stay_as_they_are() -> None:
    model = network()
    stem = model[0][0]
    assert [name for name, _ in frozen_layers(model)] == ["0.0", "0.2"]
    stem[1].train()
    assert [name for name, _ in frozen_layers(model)] == ["0.0.0", "0.2"]
    stem[1].eval()
    stem.append(nn.Dropout())
    assert [name for name, _ in frozen_layers(model)] == ["0.0.0", "0.0.1", "0.2"]


def trained() -> list[Tensor]:
    """Return the losses of three steps and the weights after them."""
    torch.manual_seed(3)
    student = network()
    objective = Objective(tiny_config(), student, 2, 8)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    values = []
    for step in range(3):
        batch = Batch(torch.rand(4, 3, 24, 24), torch.eye(2).repeat(2, 1), torch.zeros(4, 0, 24, 24))
        value, _ = objective(student, batch, step, report=True)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        objective.teacher.update(student)
        values.append(value.detach())
    return [*values, *student.parameters(), *objective.teacher.parameters()]


def test_the_stem_runs_once_and_every_number_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    once = len(tiny_config().cam.scales) * 3
    monkeypatch.setattr(Counted, "passes", 0)
    found = trained()
    assert Counted.passes == once
    monkeypatch.setattr(frozen, "_take", lambda seen, name, forward, x: forward(x))
    assert_close(found, trained(), rtol=0, atol=0)
    assert Counted.passes == once + 2 * once


def test_images_of_the_same_size_are_not_taken_for_those_seen() -> None:
    student = network()
    teacher = EMATeacher(student)
    kept = share_frozen_layers(student, teacher.module)
    seen, other = torch.rand(2, 2, 3, 24, 24)
    expected = teacher(other)
    student(seen)
    assert {name for name, _ in kept} == {"0.0"}  # norms behind trained layers keep nothing
    assert_close(teacher(other), expected, rtol=0, atol=0)
    assert not kept
    with torch.no_grad():
        student.eval()(seen)
    assert not kept


def test_a_teacher_of_other_weights_is_refused() -> None:
    student = network()
    teacher = EMATeacher(student)
    student[0][0][0].weight.mul_(2)
    with pytest.raises(ValueError, match=r"teacher must be a copy of student, but differs from it in 0\.0\."):
        share_frozen_layers(student, teacher.module)


def test_what_was_written_to_in_place_is_not_taken() -> None:
    layers = [nn.Conv2d(3, 4, 3).requires_grad_(False), nn.SiLU(inplace=True), nn.Conv2d(4, 2, 3)]
    student = nn.Sequential(*layers)
    teacher = EMATeacher(student)
    images = torch.rand(2, 3, 8, 8)
    expected = teacher(images)
    share_frozen_layers(student, teacher.module)
    out = student(images)
    assert_close(teacher(images), expected, rtol=0, atol=0)
    out.sum().backward()  # nothing that it saved was written to
    student(images)
    images.mul_(2)
    doubled = teacher(images)
    assert_close(doubled, teacher(images), rtol=0, atol=0)


def test_the_teacher_may_write_to_what_it_takes() -> None:
    student = nn.Sequential(nn.Conv2d(3, 4, 3).requires_grad_(False), nn.Conv2d(4, 2, 3))
    teacher = EMATeacher(student)
    share_frozen_layers(student, teacher.module)
    teacher.module[0].register_forward_hook(lambda module, args, out: out.zero_())
    images = torch.rand(2, 3, 8, 8)
    out = student(images)
    teacher(images)
    out.sum().backward()
