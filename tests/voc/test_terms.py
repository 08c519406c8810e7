"""The objective of train_cam as a list of terms: what it computes, and what adding one takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import train_cam
from batches import Batch
from config import CAM, Gate
from networks import build_cam
from tables import ROWS, changed
from terms import Term, Views
from torch import nn
from train_cam import TERMS, Objective

import pixelss
from tests.oracles import bilinear
from tests.voc.runs import VOC, load_once
from tests.voc.trainings import tiny_config

N = 3


def build(row: str, **changes: object) -> tuple[Objective, nn.Sequential]:
    config = changed(tiny_config(cam=CAM(rcm_gate=Gate(iterations=2), mam_gate=Gate(iterations=4))), row)
    config.cam = replace(config.cam, **changes)
    torch.manual_seed(0)
    student = build_cam(config, N)
    return Objective(config, student, N, 100), student


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 32, 32, generator=generator)
    tags, maps = torch.tensor([[1.0, 0, 1], [0, 1, 0]]), torch.zeros(2, 0, 32, 32, dtype=torch.uint8)
    return Batch(images, tags, maps, torch.tensor([4, 1]))


def calls_of(monkeypatch, name):
    """Count the calls of a function of the library."""
    counted, whole = [], getattr(pixelss, name)
    monkeypatch.setattr(pixelss, name, lambda *args, **kwargs: counted.append(args[0]) or whole(*args, **kwargs))
    return counted


@pytest.mark.parametrize(
    ("row", "step", "report", "forwards", "masks"),
    [
        ("baseline", 9, False, 1, 0),
        ("baseline", 9, True, 2, 0),  # the teacher's, for its signals
        ("MAM", 3, False, 1, 0),  # the gate is closed
        ("MAM", 4, False, 2, 0),
        ("RCM", 1, False, 1, 0),
        ("RCM", 2, False, 2, 1),
        ("direct", 2, False, 2, 1),
        ("MAM+RCM", 4, True, 2, 1),
        ("SEAM", 0, False, 1, 0),
    ],
)
def test_what_no_term_asks_for_is_not_computed(monkeypatch, batch, row, step, report, forwards, masks):
    objective, student = build(row)
    passes, regions = calls_of(monkeypatch, "multi_scale_forward"), calls_of(monkeypatch, "class_region_mask")
    objective(student, batch, step, report)
    assert len(passes) == forwards
    assert len(regions) == masks
    assert getattr(passes[0], "func", passes[0]) is student
    assert all(model is objective.teacher for model in passes[1:])


def test_scales_of_the_student_are_those_that_terms_ask_for(monkeypatch, batch):
    for row, cls_scales, step, wanted in (
        ("baseline", (0.5,), 9, (0.5,)),
        ("RCM", (0.5,), 2, (0.5, 1.0)),
        ("SMM", (2.0,), 4, (1.0, 2.0)),
        ("SEAM", (0.5,), 4, (0.3, 0.5, 1.0)),
    ):
        objective, student = build(row, cls_scales=cls_scales)
        seen = []
        student.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].shape[-1]))
        objective(student, batch, step, False)
        assert seen == [int(32 * scale + 0.5) for scale in wanted]


def test_loss_is_the_weighted_sum_of_its_parts(batch):
    weights = {"cls": 0.5, "rcm": 0.25, "direct": 2.0, "mam": 3.0}
    objective, student = build("MAM+RCM", **weights)
    loss, parts = objective(student, batch, 4, False)
    assert list(parts) == list(weights)
    torch.testing.assert_close(loss, sum(weights[name] * part for name, part in parts.items()))


@pytest.mark.parametrize("row", {tuple(changes): row for row, changes in ROWS.items()}.values())
def test_every_row_takes_a_step_at_its_own_settings(batch, row, tmp_path):
    """The loss is that of its terms, finite, and every weight that is trained gets a gradient."""
    config = changed(load_once([VOC / "demo.yaml"]), row)
    config.cam.start_from = tmp_path
    torch.manual_seed(0)
    student = build_cam(config, N)
    torch.save(student.state_dict(), tmp_path / "model.pt")  # what OC-CSE shows the erased images
    loss, parts = Objective(config, student, N, 100)(student, batch, 240, True)  # gates are open
    weights = {name: getattr(config.cam, name) for name in TERMS}
    assert parts.keys() - {"gap", "zeros", "peak", "teacher_cls"} == {
        name for name, weight in weights.items() if weight
    }
    torch.testing.assert_close(loss, sum(weights[name] * parts[name] for name in weights if name in parts))
    assert loss.isfinite()
    loss.backward()
    assert all(weight.grad is not None for weight in student.parameters())


def seam_by_loops(config, student, batch):
    """SEAM's three losses, image by image, class by class, from what the network gives at either scale."""
    plain, refined = [], []
    for scale in config.cam.view_scales:
        side = int(32 * scale + 0.5)
        output = student(bilinear(batch.images, (side, side)))
        spread = student(bilinear(batch.images, (side, side)), correlate=True).cam[:, N:]
        plain.append(bilinear(output.cam, (32, 32)))
        refined.append(bilinear(spread, (32, 32)))

    def normalised(cam):
        cam = cam.clamp(min=0)
        return (cam - cam.min() - 1e-5).clamp(min=0) / (cam.max() - cam.min() + 1e-5)

    er, ecr, pool = 0, 0, 0
    for b in range(2):
        present = batch.tags[b]
        cams = [torch.stack([normalised(cam[b, k]) * present[k] for k in range(N)]) for cam in plain]
        spread = [
            torch.stack([normalised(cam[b, k]) * (present[k - 1] if k else 1) for k in range(N + 1)]) for cam in refined
        ]
        er = er + (cams[0] - cams[1]).abs().mean() / 2
        for i in range(2):
            other = cams[1 - i].detach()
            strongest = other.max(0).values
            target = torch.cat([1 - strongest[None], other * (other == strongest)])
            hardest = (target - spread[i]).abs().flatten().sort(descending=True).values
            ecr = ecr + hardest[: int(0.2 * (N + 1) * 32 * 32)].mean() / 2
            live = torch.stack([refined[i][b, k + 1] * present[k] for k in range(N)]).max(0).values
            weakest = live.flatten().sort().values[: 32 * 32 // 4]
            pool = pool + weakest.clamp(min=0).mean() / 4
    return {"er": er, "ecr": ecr, "minpool": pool}


def test_seam_s_terms_are_its_losses(batch):
    objective, student = build("SEAM", view_scales=(1.0, 0.5), cls_scales=(1.0,))
    with torch.no_grad():
        student[1].classify.weight *= 30
    objective.teacher.forward = None  # no term asks for it
    _, parts = objective(student, batch, 0, False)
    wanted = seam_by_loops(replace(tiny_config(), cam=objective.config), student, batch)
    for name, value in wanted.items():
        torch.testing.assert_close(parts[name].float(), value, rtol=1e-5, atol=1e-6)
        assert value > 1e-3
    names, weights = zip(*student.named_parameters(), strict=True)
    for name in wanted:
        got, loops = (
            [torch.zeros_like(w) if grad is None else grad for w, grad in zip(weights, grads, strict=True)]
            for grads in (
                torch.autograd.grad(parts[name], weights, retain_graph=True, allow_unused=True),
                torch.autograd.grad(wanted[name], weights, retain_graph=True, allow_unused=True),
            )
        )
        torch.testing.assert_close(got, loops, rtol=1e-3, atol=1e-5)
        for weight, grad in zip(names, got, strict=True):
            assert (
                bool(grad.any())
                == {  # refined CAMs teach the correlation alone
                    "er": "correlation" not in weight,
                    "ecr": "correlation" in weight,
                    "minpool": "correlation" in weight,
                }[name]
            )


def test_equivariance_alone_takes_no_correlation_into_the_network():
    assert build("baseline", er=1.0)[1].state_dict().keys() == build("baseline")[1].state_dict().keys()


def test_only_a_term_that_is_asked_for_has_its_modules_saved():
    assert build("baseline")[0].modules.keys() == {"teacher"}
    assert build("RCM")[0].modules.keys() == {"teacher", "bank"}


def test_a_new_term_is_one_entry(monkeypatch, batch):
    """Its weight lies in config.CAM; loop and objective know nothing of it."""
    memory = nn.BatchNorm1d(N)

    def tagged(config, num_classes, images):
        def mean(views: Views) -> tuple[torch.Tensor, torch.Tensor]:
            assert views.student.keys() == {0.5, 1.0, 2.0}
            return memory(views.student[2.0].logits).square().mean(), views.images.new_full((), 2.0)

        return Term(mean, (2.0,), 3, {"memory": memory})

    monkeypatch.setitem(TERMS, "tagged", tagged)
    monkeypatch.setattr(CAM, "tagged", 0.0, raising=False)
    assert "memory" not in build("baseline")[0].modules
    monkeypatch.setattr(CAM, "tagged", 7.0)
    objective, student = build("baseline", cls_scales=(0.5, 1.0, 2.0))
    assert objective.modules.keys() == {"teacher", "memory"}
    assert list(objective(student, batch, 2, False)[1]) == ["cls"]
    loss, parts = objective(student, batch, 3, False)
    assert list(parts) == ["cls", "tagged"]
    torch.testing.assert_close(loss, parts["cls"] + 7 * parts["tagged"])


def test_two_terms_may_not_keep_modules_under_one_name(monkeypatch):
    monkeypatch.setitem(TERMS, "mam", lambda *args: Term(lambda views: None, (1.0,), 0, {"bank": nn.ReLU()}))
    with pytest.raises(ValueError, match=r"The term mam must name its modules as no other does, but has \['bank'\]"):
        build("MAM+RCM")


def test_every_term_has_a_weight_in_the_config():
    assert all(isinstance(getattr(CAM(), name), float) for name in TERMS)
    assert train_cam.STAGE.section == "cam"
