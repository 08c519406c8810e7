"""The losses of train_cam, a function each, and what they share of a step.

The loss is the sum of weight * term over `TERMS`. A new loss is a function here that returns its `Term`, an entry in
`TERMS` under the name that its weight has in config.CAM and its value in metrics.jsonl, and a row in tables.ROWS. What
it learns beside the CAMs belongs into the network (networks.build_cam): the optimiser and inference find it there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from batches import Batch
from config import CAM, Config, Scales
from stages import Run
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from training import gate_step

import pixelss

Outputs = Mapping[float, pixelss.CAMOutput]  # by scale
Mean = tuple[Tensor, Tensor]  # this process's mean, and how many items it is the mean of, for `parallel.shared_mean`


class Views:
    """What the terms of a step see of its batch. Whatever no term asks for is not computed.

    Args:
        config: scales and threshold.
        network: the student, under its wrapper.
        ema: the teacher.
        batch: on the device, its tags on the CPU, where asking which classes are present waits for nothing.
        scales: of the student that terms ask for.
        refined: whether terms ask for the student's refined CAMs.

    Attributes:
        tags: on the device.
        cpu_tags: the same on the CPU.
        places: of the images in the training list, on the CPU.
    """

    def __init__(
        self, config: CAM, network: nn.Module, ema: nn.Module, batch: Batch, scales: Scales, *, refined: bool = False
    ) -> None:
        self.config, self.network, self.ema, self.scales, self._refined = config, network, ema, scales, refined
        self.images, self.cpu_tags, self.places = batch.images, batch.tags, batch.places
        self.tags = batch.tags.to(batch.images.device, non_blocking=True)
        self._cams: dict[float, Tensor] = {}

    @cached_property
    def student(self) -> Outputs:
        """The student's outputs, by scale."""
        classes = self.cpu_tags.shape[1]
        return {scale: output._replace(cam=output.cam[:, :classes]) for scale, output in self._passes.items()}

    @cached_property
    def _passes(self) -> Outputs:
        """The student's outputs, the refined CAMs behind the others where they are asked for."""
        return self._outputs(partial(self.network, correlate=True) if self._refined else self.network, self.scales)

    def refined(self, scale: float) -> Tensor:
        """Return the student's refined CAM of a scale, raw, the background first."""
        return self._passes[scale].cam[:, self.cpu_tags.shape[1] :]

    @cached_property
    def teacher(self) -> Outputs:
        """The teacher's outputs at all scales, without gradient."""
        return self._outputs(self.ema, self.config.scales)

    def cam(self, scale: float) -> Tensor:
        """Return the student's normalised CAM of a scale; all terms get the same tensor."""
        if scale not in self._cams:
            self._cams[scale] = pixelss.normalize_cam(self.student[scale].cam)
        return self._cams[scale]

    def comparable(self, cam: Tensor) -> Tensor:
        """Return raw CAMs as SEAM compares them: normalised by minimum and maximum, present classes alone.

        A background that comes first stays.
        """
        present = (self.tags > 0).float()
        if cam.shape[1] > present.shape[1]:
            present = torch.cat([torch.ones_like(present[:, :1]), present], 1)
        return pixelss.normalize_cam(cam, kind="minmax") * present[:, :, None, None]

    @property
    def head(self) -> Any:
        """The student's head, for what its pass does not ask of it."""
        network: Any = getattr(self.network, "module", self.network)  # DDP's hooks are the parameters'
        return network[-1]

    @cached_property
    def images_seen(self) -> Tensor:
        """How many images this process has."""
        return self.images.new_full((), len(self.images))

    @cached_property
    def targets(self) -> list[Tensor]:
        """The teacher's normalised CAMs, one a scale."""
        return [pixelss.normalize_cam(output.cam) for output in self.teacher.values()]

    @cached_property
    def mask(self) -> Tensor:
        """The class region mask of the teacher's CAMs."""
        together = pixelss.msinf_cam([output.cam for output in self.teacher.values()], self.tags)
        return pixelss.class_region_mask(together, self.tags, threshold=self.config.threshold)

    @cached_property
    def pairs(self) -> Tensor:
        """How many pixels the CAMs of the present classes have, (present pair, pixel)."""
        H, W = self.images.shape[2:]
        return self.images.new_full((), float((self.cpu_tags > 0).sum()) * H * W)

    def _outputs(self, model: Callable[..., pixelss.CAMOutput], scales: Scales) -> Outputs:
        return dict(zip(scales, pixelss.multi_scale_forward(model, self.images, scales=scales), strict=True))


@dataclass(frozen=True)
class Term:
    """One loss of the sum.

    Args:
        mean: returns this process's mean of the loss and the count that it is a mean over.
        scales: of the student that it asks for.
        start: steps before it starts.
        modules: what it keeps from step to step, by a name that no other term has: a checkpoint holds them.
        refined: whether it asks for the student's refined CAMs too.
        prepare: called once before the training, at every start; what it fills of `modules` is the same each time.
    """

    mean: Callable[[Views], Mean]
    scales: Scales
    start: int = 0
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    refined: bool = False
    prepare: Callable[[Run], None] = lambda run: None


def classification(config: Config, num_classes: int, images: int) -> Term:
    """L_cls: the tags, at every classification scale."""
    scales = config.cam.cls_scales
    return Term(lambda views: tags_mean(views.student, scales, views), scales)


def tags_mean(outputs: Outputs, scales: Scales, views: Views) -> Mean:
    """Return the classification loss of the student's or the teacher's outputs."""
    losses = [binary_cross_entropy_with_logits(outputs[scale].logits, views.tags) for scale in scales]
    return torch.stack(losses).mean(), views.images_seen


def contrastive(config: Config, num_classes: int, images: int) -> Term:
    """L_rcm (Yoon Eq. 4, Yoon Eq. 5): the pixels of a region of the mask, towards their class's prototype."""
    cam = config.cam
    bank = pixelss.PrototypeBank(num_classes, config.network.dim)
    loss = pixelss.RegionalContrastiveLoss(cam.temperature, form=cam.form)

    def mean(views: Views) -> Mean:
        bank.update(views.teacher[1.0].features, views.mask)
        value = loss(views.student[1.0].features, views.mask, bank.prototypes, bank.filled)
        return value, bank.filled[views.mask].sum()

    return Term(mean, (1.0,), gate_step(cam.rcm_gate, cam.schedule, images), {"bank": bank})


def direct(config: Config, num_classes: int, images: int) -> Term:
    """L_direct (Yoon Table 2, Exp. 1): the CAMs, towards the mask itself."""

    def mean(views: Views) -> Mean:
        return pixelss.direct_loss(views.cam(1.0), views.mask, views.tags), views.pairs

    return Term(mean, (1.0,), gate_step(config.cam.rcm_gate, config.cam.schedule, images))


def attentive(config: Config, num_classes: int, images: int) -> Term:
    """L_mam (Yoon Eq. 6, Yoon Eq. 7, Yoon Eq. 8): the CAM of a scale, towards the teacher's of all scales."""
    scales = config.cam.mam_student_scales or config.cam.scales
    loss = pixelss.MultiScaleAttentiveLoss(attentive=config.cam.attentive)

    def mean(views: Views) -> Mean:
        return loss([views.cam(scale) for scale in scales], views.targets, views.cpu_tags), views.pairs

    return Term(mean, scales, gate_step(config.cam.mam_gate, config.cam.schedule, images))


def equivariance(config: Config, num_classes: int, images: int) -> Term:
    """SEAM's ER: the CAMs of two scales, towards each other. SEAM compares at the smaller size, here at the images'."""
    scales = config.cam.view_scales

    def mean(views: Views) -> Mean:
        first, second = (views.comparable(views.student[scale].cam) for scale in scales)
        return pixelss.equivariance_loss(first, second), views.images_seen

    return Term(mean, scales)


def cross_equivariance(config: Config, num_classes: int, images: int) -> Term:
    """SEAM's ECR: the refined CAM of either scale, towards the other scale's CAM. This teaches the correlation."""
    scales = config.cam.view_scales

    def mean(views: Views) -> Mean:
        cams = [views.comparable(views.student[scale].cam) for scale in reversed(scales)]
        refined = [views.comparable(views.refined(scale)) for scale in scales]
        both = [pixelss.cross_equivariance_loss(*pair) for pair in zip(refined, cams, strict=True)]
        return both[0] + both[1], views.images_seen

    return Term(mean, scales, refined=True)


def min_pooling(config: Config, num_classes: int, images: int) -> Term:
    """SEAM's min-pooling: every image has a background, the pixels that are refined to the least."""
    scales = config.cam.view_scales

    def mean(views: Views) -> Mean:
        losses = [pixelss.min_pooling_loss(views.refined(scale)[:, 1:], views.tags) for scale in scales]
        return torch.stack(losses).mean(), views.images_seen

    return Term(mean, scales, refined=True)


# By the name of their weight in config.CAM; (config, foreground classes, length of the training list) -> term
TERMS: dict[str, Callable[[Config, int, int], Term]] = {
    "cls": classification,
    "rcm": contrastive,
    "direct": direct,
    "mam": attentive,
    "er": equivariance,
    "ecr": cross_equivariance,
    "minpool": min_pooling,
}
