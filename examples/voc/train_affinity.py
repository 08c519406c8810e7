"""Stage train_affinity: AffinityNet learns from the pixels that two CRF results agree on (Ahn and Kwak, CVPR 2018).

It starts from the CAM network's backbone, whatever that was started from. With `affinity.kind: path` IRNet's boundaries
learn from the same pairs (Ahn et al., CVPR 2019), with `zones` BES's from the zones of the same labels (Chen et al.,
ECCV 2020); networks.AFFINITIES has what differs.
"""

from __future__ import annotations

from typing import Any

import torch
from batches import Batch, Samples
from crf_labels import write_crf_labels
from data import VOID
from networks import AFFINITIES, build_affinity, load_trained
from parallel import shared_mean, world_size
from stages import IMAGES, TAGS, Run, Stage
from torch import Tensor, nn
from torch.nn.functional import interpolate
from training import pixels_trained, train

import pixelss


def train_affinity(run: Run) -> None:
    write_crf_labels(run)
    config = run.config.affinity
    kind = AFFINITIES[config.kind]
    torch.manual_seed(run.config.seed)
    network = build_affinity(run.config)
    taps: Any = network[0]
    taps.backbone.load_state_dict(load_trained(run, "train_cam")[0].state_dict())
    network.to(run.device)
    folders = [run.folder(STAGE.name) / "labels" / name for name in ("low", "high")]
    stems = run.data.stems(run.config.data.train)
    samples = Samples(run.data, stems, run.config, config.augment, folders)

    def loss(affinity_net: nn.Module, batch: Batch, step: int, report: bool) -> tuple[Tensor, dict[str, Tensor]]:
        output = affinity_net(batch.images)
        if kind.zones:
            return zone_by_zone(output, batch.maps, run.data.num_classes, config.zone_stride)
        affinity = kind.pairs(output, config.radius)
        low, high = (subsampled(batch.maps[:, i], affinity.shape[-2:]) for i in range(2))
        labels = pixelss.affinity_labels(low, high, radius=config.radius)
        return kind_by_kind(affinity, labels)

    train(run, STAGE, network, samples, loss)


def subsampled(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return the masks (B, H, W) at the centres of size (h, w) cells."""
    rows, columns = (
        ((torch.arange(cells, device=maps.device) + 0.5) * side / cells).long()
        for cells, side in zip(size, maps.shape[-2:], strict=True)
    )
    return maps[:, rows[:, None], columns]


def kind_by_kind(affinity: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return `pixelss.affinity_loss`, each kind of pair averaged over all processes' pairs of that kind."""
    parts = {}
    for kind, name in enumerate(("different", "background", "foreground")):
        only = labels.where(labels == kind, 255)
        parts[name] = shared_mean(pixelss.affinity_loss(affinity, only), (labels == kind).sum())
    return torch.stack(list(parts.values())).sum(), parts


def zone_by_zone(boundary: Tensor, maps: Tensor, num_classes: int, stride: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return `pixelss.boundary_loss` at the zones' size, each zone averaged over all processes' pixels of that zone.

    Args:
        boundary: logits (B, 1, *, *).
        maps: masks (B, 2, H, W), the first sure of its foreground and the second of its background.
        num_classes: foreground classes N.
        stride: of the zones.
    """
    size = [-(-side // stride) for side in maps.shape[-2:]]
    low, high = (subsampled(maps[:, i], tuple(size)).long() for i in range(2))
    zones = pixelss.boundary_mask(pixelss.confident_mask(low, high), num_classes)
    probability = interpolate(boundary, (size[0], size[1]), mode="bilinear").sigmoid()
    parts = {}
    for name, kinds in {"background": (0,), "foreground": (1,), "boundary": (2, 3)}.items():
        chosen = torch.isin(zones, torch.tensor(kinds, device=zones.device))
        total = pixelss.boundary_loss(probability, zones.where(chosen, VOID)) * (chosen.sum() + 1)  # undo its mean
        count = chosen.sum() + 1 / world_size()  # of all processes together one more than there are
        parts[name] = shared_mean(total / count, count)
    return torch.stack(list(parts.values())).sum(), parts


STAGE = Stage(
    "train_affinity",
    train_affinity,
    memory="affinity.schedule.batch or affinity.augment.crop",
    needs=("infer_cam",),
    reads=lambda config: [(config.data.train, {**IMAGES, **TAGS})],
    settings=("affinity",),
    section="affinity",
    pixels=lambda plan: pixels_trained(
        plan,
        plan.config.affinity.schedule,
        plan.config.affinity.augment,
        (1.0,),
        passes=3 if AFFINITIES[plan.config.affinity.kind].trains_backbone else 1,
    ),
)
