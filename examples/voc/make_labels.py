"""Stage make_labels: the pseudo-labels; CAMs spread by a random walk on learned affinities, then a CRF or PAR."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from crf_labels import refined_masks, with_background
from evaluate import score_masks
from infer_cam import cam_path
from inference import autocast, cam_stems, pixels_inferred, shared_batches, to_input, writing
from networks import AFFINITIES, load_trained
from numpy.typing import NDArray
from parallel import barrier
from stages import IMAGES, MASKS, TAGS, Run, Stage
from storage import load_cam
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

import pixelss
from pixelss.io import write_mask

Array = NDArray[np.uint8]


@torch.inference_mode()
def make_labels(run: Run) -> None:
    """Write the pseudo-labels that are not there yet, and score them on the masks of data.score, if there are any."""
    config, affinities = run.config.make_labels, AFFINITIES[run.config.affinity.kind]
    walk = replace(run.config.affinity, radius=config.radius or run.config.affinity.radius)
    beta = affinities.beta if config.beta is None else config.beta
    network = load_trained(replace(run, config=replace(run.config, affinity=walk)), "train_affinity")
    folder = run.folder("make_labels")

    def read(stem: str) -> tuple[Array, Tensor, Tensor]:
        cam, tags = load_cam(cam_path(run, stem), run.data.num_classes)[None], run.data.tags(stem)
        scores = with_background(cam, tags, pixelss.background_score(cam, alpha=config.alpha))
        return run.data.image(stem), scores, tags

    def done(stem: str) -> bool:
        return (folder / f"{stem}.png").is_file()

    batches = shared_batches(run, cam_stems(run), read, desc="make_labels", done=done)
    with writing(run) as write:
        for ((stem, (image, scores, tags)),) in batches:
            with autocast(run):
                output = network(to_input(run, [image])[1])
            affinity = affinities.pairs(output, walk.radius)
            cells = affinities.walkers(adaptive_avg_pool2d(scores.to(run.device), output.shape[-2:]), output)
            walked = pixelss.random_walk(cells, affinity, beta=beta, log_steps=config.log_steps, radius=walk.radius)
            walked = interpolate(walked, image.shape[:2], mode="bilinear")
            (mask,) = refined_masks(image, walked, tags, config.par or config.crf)
            write(write_mask, folder / f"{stem}.png", mask)
    barrier()
    quality: dict[str, object] = {}
    if name := run.config.data.score:
        result, count = score_masks(run, folder, run.data.stems(name), "score_labels")
        quality = {"list": name, "scored": count, "miou": round(100 * result.miou.item(), 1)}
    run.finish("make_labels", images=len(cam_stems(run)), **quality)


STAGE = Stage(
    "make_labels",
    make_labels,
    memory="the size of the images",
    needs=("infer_cam", "train_affinity"),
    reads=lambda config: [
        (config.data.train, {**IMAGES, **TAGS}),
        (config.data.score, {**IMAGES, **TAGS, **MASKS}),
    ],
    settings=("make_labels",),
    pixels=lambda plan: pixels_inferred(plan.images(plan.config.data.train, plan.config.data.score), flip=False),
)
