"""Stage score_cam: mIoU, precision and recall of the CAMs at the best threshold, plain and after a CRF or PAR."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from crf_labels import refined_masks, with_background
from evaluate import by_class
from infer_cam import cam_path, write_cams
from inference import pixels_inferred, shared_batches
from numpy.typing import NDArray
from parallel import barrier, rank
from PIL import Image
from stages import IMAGES, MASKS, TAGS, Run, Stage
from storage import load_cam, remove_unfinished, save_png, write_atomic
from torch import Tensor

import pixelss
from pixelss import viz

Array = NDArray[np.uint8]


@torch.inference_mode()
def score_cam(run: Run) -> None:
    """Score on the masks of data.score, which no training sees; void is ignored.

    The threshold is the best on those masks, as everywhere in the field. The CRF's background is that threshold as a
    constant, so that CAMs and CRF are compared at one setting, or the background score where crf_alpha is given.
    Without infer_cam, the CAMs of the scored images alone are inferred: all that a table of CAMs needs.
    """
    config, stems = run.config.infer_cam, run.data.stems(run.config.data.score)
    if run.config.data.score is None:
        run.finish("score_cam", skipped="data.score is null")
        return
    if not run.finished("infer_cam"):
        write_cams(run, stems)
        barrier()
        if rank() == 0:
            remove_unfinished(run.folder("infer_cam"))
    scores = _sweep(run, None)
    threshold = scores["threshold"]
    refiners = {name: settings for name in ("crf", "par") if (settings := getattr(config, name))}
    counts = {name: pixelss.ConfusionMatrix(run.data.num_classes + 1).to(run.device) for name in ("plain", *refiners)}

    def read(stem: str) -> tuple[Array, Tensor, Array, Tensor]:
        cam = load_cam(cam_path(run, stem), run.data.num_classes)
        return run.data.image(stem), cam, run.data.mask(stem), run.data.tags(stem)

    for ((_, (image, cams, mask, tags)),) in shared_batches(run, stems, read, desc="score_cam"):
        cam, truth = cams[None].to(run.device), _on_device(run, mask)
        counts["plain"].update(pixelss.class_region_mask(cam, tags[None].to(run.device), threshold=threshold), truth)
        if config.crf_alpha is None:
            background = torch.full_like(cam[:, :1], threshold)
        else:
            background = pixelss.background_score(cam, alpha=config.crf_alpha)
        for name, settings in refiners.items():
            (result,) = refined_masks(image, with_background(cam, tags, background), tags, settings)
            counts[name].update(_on_device(run, result), truth)
    scores["iou"] = by_class(run, counts["plain"].compute().iou)
    scores |= {f"{name}_miou": counts[name].compute().miou.item() for name in refiners}
    if config.single_scales:
        scores["single_scales"] = {str(scale): _sweep(run, scale) for scale in config.scales}
    if rank() == 0:
        write_atomic(run.folder("score_cam") / "scores.json", json.dumps(scores, indent=1) + "\n")
        named = {"all scales": scores, **{f"x{k}": one for k, one in scores.get("single_scales", {}).items()}}
        curves = {name: (one["curve"]["thresholds"], one["curve"]["miou"]) for name, one in named.items()}
        save_png(run.folder("score_cam") / "curve.png", Image.fromarray(viz.threshold_curves(curves)))
    names = ["miou", "precision", "recall", *(f"{name}_miou" for name in refiners)]
    shown = {name: round(100 * scores[name], 1) for name in names}
    run.finish("score_cam", list=run.config.data.score, **shown, threshold=threshold)


def _sweep(run: Run, scale: float | None) -> dict[str, Any]:
    name = "all scales" if scale is None else f"scale {scale:g}"
    stems = run.data.stems(run.config.data.score)
    return sweep_cams(run, stems, lambda stem: load_cam(cam_path(run, stem, scale), run.data.num_classes), desc=name)


def sweep_cams(
    run: Run,
    stems: Sequence[str],
    cam_of: Callable[[str], Tensor],
    *,
    desc: str,
    thresholds: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Return the scores over all thresholds, and at the best one precision and recall (means over classes)."""
    sweep = pixelss.ThresholdSweep(run.data.num_classes, thresholds=thresholds).to(run.device)

    def read(stem: str) -> tuple[Tensor, Array]:
        return cam_of(stem), run.data.mask(stem)

    for ((_, (cam, mask)),) in shared_batches(run, stems, read, desc=desc):
        sweep.update(cam[None].to(run.device), _on_device(run, mask))
    scores = sweep.compute()
    best = {k: getattr(scores, k)[scores.best].item() for k in ("miou", "precision", "recall")}
    curve = {k: getattr(scores, k).tolist() for k in ("thresholds", "miou", "precision", "recall")}
    return {**best, "threshold": scores.thresholds[scores.best].item(), "curve": curve}


def _on_device(run: Run, mask: Array) -> Tensor:
    return torch.from_numpy(mask)[None].to(run.device)


STAGE = Stage(
    "score_cam",
    score_cam,
    memory="infer_cam.max_batch",
    needs=("train_cam",),
    uses=("infer_cam",),
    reads=lambda config: [(config.data.score, {**IMAGES, **TAGS, **MASKS})],
    settings=("infer_cam", "data.masks"),
    pixels=lambda plan: (
        0
        if "infer_cam" in plan.stages
        else pixels_inferred(plan.images(plan.config.data.score), plan.config.infer_cam.scales)
    ),
)
