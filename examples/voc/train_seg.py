"""Stage train_seg: DeepLab-LargeFOV learns from the pseudo-labels of make_labels, at several scales."""

from __future__ import annotations

import torch
from batches import Batch, Samples
from networks import build_segmentation, load_trained, normalisation
from parallel import shared_mean
from stages import IMAGES, TAGS, Run, Stage
from torch import Tensor, nn
from torch.nn.functional import interpolate
from training import pixels_trained, train

import pixelss


def train_seg(run: Run) -> None:
    config = run.config.seg
    torch.manual_seed(run.config.seed)
    network = build_segmentation(run.config, run.data.num_classes)
    if config.from_cam:
        network[0].load_state_dict(load_trained(run, "train_cam")[0].state_dict())
    network.to(run.device)
    stems = run.data.stems(run.config.data.train)
    samples = Samples(run.data, stems, run.config, config.augment, [run.folder("make_labels")])

    def loss(segmentation: nn.Module, batch: Batch, step: int, report: bool) -> tuple[Tensor, dict[str, Tensor]]:
        mask = batch.maps[:, 0].long()
        logits = [segmentation(rescaled(batch.images, scale)) for scale in config.scales]
        parts = {"ce": pixelss.multi_scale_cross_entropy(logits, mask)}
        parts["ce"] = shared_mean(parts["ce"], (mask <= run.data.num_classes).sum())
        if config.energy > 0:
            energy = energy_of(run, batch.images, logits[0], mask)
            parts["energy"] = config.energy * shared_mean(energy, energy.new_full((), len(mask)))
        return torch.stack(list(parts.values())).sum(), parts

    train(run, STAGE, network, samples, loss)


def energy_of(run: Run, images: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    """Return RRM's dense energy of logits over normalised images; padding, which is zero, lies outside."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in normalisation(run.config))
    levels, inside = (images * std + mean) * 255, (images != 0).any(1)
    return pixelss.dense_energy_loss(levels, logits, mask=mask, region=inside)


def rescaled(images: Tensor, scale: float) -> Tensor:
    size = [max(1, int(side * scale + 0.5)) for side in images.shape[-2:]]
    return images if scale == 1 else interpolate(images, size, mode="bilinear", align_corners=False)


STAGE = Stage(
    "train_seg",
    train_seg,
    memory="seg.schedule.batch or seg.augment.crop",
    needs=("make_labels",),
    reads=lambda config: [(config.data.train, {**IMAGES, **TAGS})],
    settings=("seg",),
    section="seg",
    pixels=lambda plan: pixels_trained(
        plan, plan.config.seg.schedule, plan.config.seg.augment, plan.config.seg.scales, passes=3
    ),
)
