"""Stage train_cam: the student learns from tags, and its pixels from its own teacher (Yoon Eq. 9).

loss = cls * L_cls + rcm * L_rcm + mam * L_mam + direct * L_direct + ..., each from its gate on; terms.py has them.
"""

from __future__ import annotations

from functools import reduce

import numpy as np
import torch
from batches import Batch, Samples
from config import CAM, Config
from data import BadFileError
from field_terms import FIELD_TERMS
from frozen import share_frozen_layers
from networks import build_cam, load_start, to_tensor
from numpy.typing import NDArray
from parallel import shared_mean
from PIL import Image
from stages import IMAGES, TAGS, Run, Stage
from terms import TERMS as OWN_TERMS
from terms import Views, tags_mean
from torch import Tensor, nn
from training import pixels_trained, train, train_mode

import pixelss
from pixelss import viz

TERMS = OWN_TERMS | FIELD_TERMS  # by the name of their weight in config.CAM


def train_cam(run: Run) -> None:
    config = run.config.cam
    check_scales(config)
    torch.manual_seed(run.config.seed)
    student = build_cam(run.config, run.data.num_classes)
    if config.start_from is not None:
        load_start(student, config.start_from)
    student.to(run.device)
    samples = Samples(run.data, run.data.stems(run.config.data.train), run.config, config.augment)
    objective = Objective(run.config, student, run.data.num_classes, len(samples))
    objective.prepare(run)
    train(
        run,
        STAGE,
        student,
        samples,
        objective,
        companions=objective.modules,
        after_step=lambda: objective.teacher.update(student),
        pictures=lambda: overlays(student, samples),
    )


class Objective:
    """The weighted sum of the terms that have a weight, and the teacher that makes their targets.

    Args:
        config: weights, gates, scales and forms.
        student: on its device; the teacher starts as its copy.
        num_classes: foreground classes N.
        images: length of the training list, for gates in epochs.

    Attributes:
        modules: what a checkpoint must hold, by name: the teacher and what terms keep.
    """

    def __init__(self, config: Config, student: nn.Sequential, num_classes: int, images: int) -> None:
        self.config = config.cam
        self.weights: dict[str, float] = {name: getattr(self.config, name) for name in TERMS}
        # Every report shows the classification, whatever its weight.
        wanted = [name for name, weight in self.weights.items() if weight > 0 or name == "cls"]
        self.terms = {name: TERMS[name](config, num_classes, images) for name in wanted}
        self.teacher = pixelss.EMATeacher(student, self.config.teacher_momentum)
        self.modules: dict[str, nn.Module] = {"teacher": self.teacher}
        device = next(student.parameters()).device
        taught = any(weight > 0 for name, weight in self.weights.items() if name != "cls")
        eager_cpu = device.type == "cpu" and not config.compile
        self.unshared = taught and eager_cpu
        for name, term in self.terms.items():
            if shared := self.modules.keys() & term.modules.keys():
                raise ValueError(f"The term {name} must name its modules as no other does, but has {sorted(shared)}.")
            self.modules |= {key: module.to(device) for key, module in term.modules.items()}

    def prepare(self, run: Run) -> None:
        """Let the terms look at the training list."""
        for term in self.terms.values():
            term.prepare(run)

    def __call__(self, student: nn.Module, batch: Batch, step: int, report: bool) -> tuple[Tensor, dict[str, Tensor]]:
        if self.unshared:  # now that checkpoints are loaded and norms set
            share_frozen_layers(getattr(student, "module", student), self.teacher.module)
            self.unshared = False
        active = {name: term for name, term in self.terms.items() if step >= term.start}
        scales = sorted({scale for term in active.values() for scale in term.scales})
        refined = any(term.refined for term in active.values())
        views = Views(self.config, student, self.teacher, batch, tuple(scales), refined=refined)
        parts = {name: shared_mean(*term.mean(views)) for name, term in active.items()}
        loss = reduce(torch.add, [self.weights[name] * value for name, value in parts.items()])
        if report:
            parts["teacher_cls"] = shared_mean(*tags_mean(views.teacher, self.config.cls_scales, views))
            parts |= collapse_signals([views.cam(scale) for scale in scales], views.targets, views.cpu_tags)
        return loss, parts


@torch.no_grad()
def collapse_signals(student: list[Tensor], teacher: list[Tensor], tags: Tensor) -> dict[str, Tensor]:
    """Return what announces a collapse of the CAMs, over present classes: a gap well below 0, zeros rising, a low peak.

    `gap` is the mean of target - CAM where the CAM lives, `zeros` the share of exactly zero pixels, `peak` the mean
    over maps of the target's maximum; the target is that of Yoon Eq. 7.
    """
    image, k = (tags > 0).nonzero().to(student[0].device, non_blocking=True).unbind(1)
    cams, sources = (torch.stack([cam[image, k] for cam in side]) for side in (student, teacher))
    target = pixelss.attentive_target(cams, sources)
    live = cams > 0
    gap = shared_mean(((target - cams) * live).sum() / live.sum().clamp(min=1), live.sum())
    zeros = shared_mean(1 - live.sum() / max(1, live.numel()), target.new_full((), live.numel()))
    peaks = target.flatten(2).amax(-1) if target.numel() else target.new_zeros(1)
    peak = shared_mean(peaks.mean(), target.new_full((), live.numel()))
    return {"gap": gap, "zeros": zeros, "peak": peak}


def check_scales(config: CAM) -> None:
    """Refuse scales that do not fit together, before hours of training."""
    for name in ("cls_scales", "mam_student_scales"):
        if extra := set(getattr(config, name) or ()) - set(config.scales):
            raise ValueError(
                f"cam.{name} must be a part of cam.scales {config.scales}, but has {sorted(extra)} besides."
            )
    if not config.cls_scales:
        raise ValueError("cam.cls_scales must hold one scale or more, but is empty.")
    first, second = config.view_scales
    if first == second:
        raise ValueError(f"cam.view_scales must be two different scales, or both views are one, but is {first} twice.")
    if 1.0 not in config.scales and (config.rcm or config.direct):
        raise ValueError(f"cam.scales must hold 1.0, the scale of prototypes and masks, but is {config.scales}.")


@torch.no_grad()
def overlays(student: nn.Sequential, samples: Samples, *, count: int = 4) -> dict[str, NDArray[np.uint8]]:
    """Return the CAMs of the present classes over the training list's first images, squeezed to the crop."""
    side = samples.augment.crop
    pictures = {}
    student.eval()
    for stem in samples.stems[:count]:
        try:
            pixels, tags = samples.data.image(stem), samples.data.tags(stem)
        except BadFileError:  # stops, or is told and passed over, where it is to be trained on
            continue
        image = np.asarray(Image.fromarray(pixels).resize((side, side)))
        shown = tags[None].to(next(student.parameters()).device)
        images = to_tensor(image, samples.config)[None].to(shown.device, memory_format=torch.channels_last)
        cam = pixelss.msinf_cam([student(images).cam], shown, size=(side, side)).amax(1)[0].cpu().numpy()
        pictures[f"cam/{stem}"] = viz.overlay_cam(image, cam)
    train_mode(student)
    return pictures


STAGE = Stage(
    "train_cam",
    train_cam,
    memory="cam.schedule.batch or cam.augment.crop",
    reads=lambda config: [(config.data.train, {**IMAGES, **TAGS})],
    settings=("cam",),
    section="cam",
    pixels=lambda plan: pixels_trained(  # the student forward and backward, and the teacher forward
        plan, plan.config.cam.schedule, plan.config.cam.augment, plan.config.cam.scales, passes=4
    ),
)
