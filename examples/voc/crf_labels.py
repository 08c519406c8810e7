"""Masks from CAMs by a CRF or PAR: the two of the affinities' training, and the steps that other stages share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from config import CRF, PAR
from infer_cam import cam_path
from inference import shared_batches, writing
from numpy.typing import NDArray
from parallel import barrier
from stages import Run
from storage import load_cam
from torch import Tensor

import pixelss
from pixelss.io import write_mask

Array = NDArray[np.uint8]
# By the type of its settings; (levels (S, 3, H, W), scores (S, K, H, W), ...) -> refined scores
REFINERS: dict[type, Callable[..., Tensor]] = {CRF: pixelss.dense_crf, PAR: pixelss.pixel_adaptive_refinement}


@torch.inference_mode()
def write_crf_labels(run: Run) -> None:
    """Write two masks of every training image: low's foreground and high's background are to be trusted."""
    config = run.config.affinity

    def paths(stem: str) -> list[Path]:
        return [run.folder("train_affinity") / "labels" / name / f"{stem}.png" for name in ("low", "high")]

    def read(stem: str) -> tuple[Array, Tensor, Tensor]:
        cam, tags = load_cam(cam_path(run, stem), run.data.num_classes)[None], run.data.tags(stem)
        alphas = config.alpha_low, config.alpha_high
        both = [with_background(cam, tags, pixelss.background_score(cam, alpha=alpha)) for alpha in alphas]
        return run.data.image(stem), torch.cat(both), tags

    def done(stem: str) -> bool:
        return all(path.is_file() for path in paths(stem))

    stems = run.data.stems(run.config.data.train)
    with writing(run) as write:
        for ((stem, (image, both, tags)),) in shared_batches(run, stems, read, desc="crf_labels", done=done):
            masks = refined_masks(image, both.to(run.device), tags, config.crf)
            for path, mask in zip(paths(stem), masks, strict=True):
                write(write_mask, path, mask)
    barrier()


def with_background(cam: Tensor, tags: Tensor, background: Tensor) -> Tensor:
    """Return the background's score (1, 1, H, W) and the CAMs of the present classes, (1, 1 + P, H, W)."""
    return torch.cat([background, cam[:, tags > 0]], 1)


def refined_masks(image: Array, scores: Tensor, tags: Tensor, settings: CRF | PAR | None) -> Sequence[Array]:
    """Return the masks (H, W) of S sets of scores (S, 1 + P, H, W) of one image, which share a CRF's lattice."""
    if settings:
        levels = torch.from_numpy(image).to(scores.device).permute(2, 0, 1).expand(len(scores), -1, -1, -1)
        scores = REFINERS[type(settings)](levels, scores, **asdict(settings))
    classes = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + tags.nonzero().flatten()])
    return [mask.numpy() for mask in classes[scores.argmax(1).cpu()].to(torch.uint8)]
