"""Stage train_cam: the student learns from tags, and its pixels from its own teacher (Eq. 9).

loss = cls * L_cls + rcm * L_rcm + mam * L_mam + direct * L_direct, each from its gate on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from batches import Batch, Samples
from config import CAM
from data import BadFileError
from networks import build_cam, to_tensor
from numpy.typing import NDArray
from parallel import shared_mean
from PIL import Image
from stages import Run
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from training import gate_step, train, train_mode

import pixelss
from pixelss import viz

STAGE = "train_cam"


def train_cam(run: Run) -> None:
    config = run.config.cam
    check_scales(config)
    torch.manual_seed(run.config.seed)
    student = build_cam(run.config, run.data.num_classes)
    if config.start_from is not None:
        student.load_state_dict(trained_weights(config.start_from))
    student.to(run.device)
    samples = Samples(run.data, run.data.stems(run.config.data.train), run.config, config.augment)
    bank = pixelss.PrototypeBank(run.data.num_classes, run.config.network.dim).to(run.device)
    objective = Objective(config, student, bank, len(samples))
    train(
        run,
        STAGE,
        student,
        samples,
        objective,
        companions={"teacher": objective.teacher, "bank": bank},
        after_step=lambda: objective.teacher.update(student),
        pictures=lambda: overlays(student, samples),
    )


class Objective:
    """The paper's losses of one step, and the teacher that makes their targets.

    Args:
        config: weights, gates, scales and forms.
        student: on its device; the teacher starts as its copy.
        bank: on the same device.
        images: length of the training list, for gates in epochs.
    """

    def __init__(self, config: CAM, student: nn.Sequential, bank: pixelss.PrototypeBank, images: int) -> None:
        self.config, self.bank = config, bank
        self.teacher = pixelss.EMATeacher(student, config.teacher_momentum)
        self.region = pixelss.ClassRegionMask(config.threshold)
        self.rcl = pixelss.RegionalContrastiveLoss(config.temperature, form=config.form)
        self.mal = pixelss.MultiScaleAttentiveLoss(attentive=config.attentive)
        self.rcm_start = gate_step(config.rcm_gate, config.schedule, images)
        self.mam_start = gate_step(config.mam_gate, config.schedule, images)
        self.mam_scales = config.mam_student_scales or config.scales

    def __call__(self, student: nn.Module, batch: Batch, step: int, report: bool) -> tuple[Tensor, dict[str, Tensor]]:
        config, images, tags = self.config, batch.images, batch.tags
        labels = tags.to(images.device, non_blocking=True)
        rcm, direct = (weight > 0 and step >= self.rcm_start for weight in (config.rcm, config.direct))
        mam = config.mam > 0 and step >= self.mam_start
        needed = {*config.cls_scales, *((1.0,) if rcm or direct else ()), *(self.mam_scales if mam else ())}
        outputs = pixelss.multi_scale_forward(student, images, scales=sorted(needed))
        out = dict(zip(sorted(needed), outputs, strict=True))
        # Counts, for shared_mean: of images, of pixels, of (present pair, pixel); no global mean is a mean of means.
        H, W = images.shape[2:]
        pairs = images.new_full((), float((tags > 0).sum()) * H * W)

        def classify(of_scales: Mapping[float, pixelss.CAMOutput]) -> Tensor:
            logits = [of_scales[scale].logits for scale in config.cls_scales]
            value = torch.stack([binary_cross_entropy_with_logits(x, labels) for x in logits]).mean()
            return shared_mean(value, images.new_full((), len(images)))

        parts = {"cls": classify(out)}
        loss = config.cls * parts["cls"]
        if not (rcm or direct or mam or report):
            return loss, parts

        # The teacher is asked where a loss needs it, and for the signals of a report.
        teacher = pixelss.multi_scale_forward(self.teacher, images, scales=config.scales)
        if rcm or direct:
            mask = self.region(pixelss.msinf_cam([o.cam for o in teacher], labels), labels)
        if rcm:
            middle = config.scales.index(1.0)
            self.bank.update(teacher[middle].features, mask)
            value = self.rcl(out[1.0].features, mask, self.bank.prototypes, self.bank.filled)
            parts["rcm"] = shared_mean(value, self.bank.filled[mask].sum())
            loss = loss + config.rcm * parts["rcm"]
        if direct:
            value = pixelss.direct_loss(pixelss.normalize_cam(out[1.0].cam), mask, labels)
            parts["direct"] = shared_mean(value, pairs)
            loss = loss + config.direct * parts["direct"]
        if not (mam or report):
            return loss, parts
        targets = [pixelss.normalize_cam(o.cam) for o in teacher]
        cams = {scale: pixelss.normalize_cam(o.cam) for scale, o in out.items()}
        if mam:
            parts["mam"] = shared_mean(self.mal([cams[scale] for scale in self.mam_scales], targets, tags), pairs)
            loss = loss + config.mam * parts["mam"]
        if report:
            parts["teacher_cls"] = classify(dict(zip(config.scales, teacher, strict=True)))
            parts |= collapse_signals(list(cams.values()), targets, tags)
        return loss, parts


@torch.no_grad()
def collapse_signals(student: list[Tensor], teacher: list[Tensor], tags: Tensor) -> dict[str, Tensor]:
    """Return what announces a collapse of the CAMs, over present classes: a gap well below 0, zeros rising, a low peak.

    `gap` is the mean of target - CAM where the CAM lives, `zeros` the share of exactly zero pixels, `peak` the mean
    over maps of the target's maximum; the target is that of Eq. 7.
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
    if 1.0 not in config.scales and (config.rcm or config.direct):
        raise ValueError(f"cam.scales must hold 1.0, the scale of prototypes and masks, but is {config.scales}.")


def trained_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of another run's finished train_cam folder."""
    path = folder / "model.pt"
    if not path.is_file():
        raise FileNotFoundError(f"cam.start_from must be a finished train_cam folder, but {path} is missing.")
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return weights


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
        labels = tags[None].to(next(student.parameters()).device)
        images = to_tensor(image, samples.config)[None].to(labels.device, memory_format=torch.channels_last)
        cam = pixelss.msinf_cam([student(images).cam], labels, size=(side, side)).amax(1)[0].cpu().numpy()
        pictures[f"cam/{stem}"] = viz.overlay_cam(image, cam)
    train_mode(student)
    return pictures
