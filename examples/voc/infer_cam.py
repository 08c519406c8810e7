"""Stage infer_cam: the CAMs of every training and scored image, over scales and flips, as one small PNG an image."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from data import BadFileError
from inference import autocast, cam_stems, pixels_inferred, shared_batches, to_input, writing
from networks import cam_inference
from numpy.typing import NDArray
from parallel import sum_over
from stages import IMAGES, TAGS, Run, Stage
from storage import load_cam, save_cam
from torch import Tensor

import pixelss

Item = tuple[NDArray[np.uint8], Tensor]  # image, tags


def cam_path(run: Run, stem: str, scale: float | None = None) -> Path:
    """Return where an image's CAMs lie: those of all scales together, or of a single one."""
    folder = run.folder("infer_cam")
    return (folder if scale is None else folder / f"scale-{scale:g}") / f"{stem}.png"


def infer_cam(run: Run) -> None:
    stems = cam_stems(run)
    speed = write_cams(run, stems)
    stored = sum(path.stat().st_size for stem in stems if (path := cam_path(run, stem)).is_file())
    run.finish("infer_cam", images=len(stems), megabytes=round(stored / 1e6, 1), images_per_second=round(speed, 1))


@torch.inference_mode()
def write_cams(run: Run, stems: Sequence[str]) -> float:
    """Write the CAMs that are not there yet, single scales only of scored images; returns the images a second."""
    config = run.config.infer_cam
    scored = set(run.data.stems(run.config.data.score))
    single = config.scales if config.single_scales else ()

    def paths(stem: str) -> dict[float | None, Path]:
        scales: list[float | None] = [None, *(single if stem in scored else ())]
        return {scale: cam_path(run, stem, scale) for scale in scales}

    def read(stem: str) -> Item:
        return run.data.image(stem), run.data.tags(stem)

    model = cam_inference(run)
    trained = (run.folder("train_cam") / "model.pt").stat().st_mtime_ns  # an earlier network's CAMs do not count

    def done(stem: str) -> bool:
        return all(_whole(run, path) and path.stat().st_mtime_ns >= trained for path in paths(stem).values())

    images, start = torch.zeros(1, device=run.device), time.perf_counter()
    with writing(run) as write:
        for batch in shared_batches(run, stems, read, desc="infer_cam", done=done, max_batch=config.max_batch):
            outputs = cams_of_scales(run, model, [image for _, (image, _) in batch])
            shown = torch.stack([tags for _, (_, tags) in batch]).to(run.device)
            together = pixelss.msinf_cam([cam for pair in outputs for cam in pair], shown)
            cams = {None: together} | {
                scale: pixelss.msinf_cam(pair, shown)
                for scale, pair in zip(config.scales, outputs, strict=True)
                if single
            }
            for i, (stem, (_, tags)) in enumerate(batch):
                for scale, path in paths(stem).items():
                    write(save_cam, path, cams[scale][i], tags)
            images += len(batch)
    return sum_over(images).item() / (time.perf_counter() - start)


def cams_of_scales(
    run: Run, model: Callable[[Tensor], pixelss.CAMOutput], images: list[NDArray[np.uint8]]
) -> list[tuple[Tensor, Tensor]]:
    """Return for every scale the raw CAMs (B, N, H, W) of the images and of their mirror images, mirrored back."""
    _, x = to_input(run, images)
    with autocast(run):
        outputs = pixelss.multi_scale_forward(model, torch.cat([x, x.flip(-1)]), scales=run.config.infer_cam.scales)
    return [(output.cam[: len(x)], output.cam[len(x) :].flip(-1)) for output in outputs]


def _whole(run: Run, path: Path) -> bool:
    """Tell whether a CAM file is there and readable; a damaged one is written again."""
    if not path.is_file():
        return False
    try:
        load_cam(path, run.data.num_classes)
    except BadFileError:
        return False
    return True


STAGE = Stage(
    "infer_cam",
    infer_cam,
    memory="infer_cam.max_batch",
    needs=("train_cam",),
    reads=lambda config: [(name, {**IMAGES, **TAGS}) for name in (config.data.train, config.data.score)],
    settings=("data.score", "infer_cam.scales", "infer_cam.single_scales"),
    pixels=lambda plan: pixels_inferred(
        plan.images(plan.config.data.train, plan.config.data.score), plan.config.infer_cam.scales
    ),
)
