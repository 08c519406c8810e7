"""Stage infer_seg: masks of the val and test lists, from several scales and flips, then a CRF."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import torch
from inference import autocast, pixels_inferred, shared_batches, to_input, writing
from networks import load_trained
from stages import IMAGES, Run, Stage
from torch import nn

import pixelss
from pixelss.io import write_mask


def infer_seg(run: Run) -> None:
    """Write the masks that are not there yet."""
    network = load_trained(run, "train_seg")
    lists = {"val": run.config.data.val, "test": run.config.data.test}
    counts = {split: _segment(run, network, split, run.data.stems(name)) for split, name in lists.items() if name}
    run.finish("infer_seg", **counts)


@torch.inference_mode()
def _segment(run: Run, network: nn.Module, split: str, stems: list[str]) -> int:
    config, folder = run.config.seg, run.folder("infer_seg") / split

    def done(stem: str) -> bool:
        return (folder / f"{stem}.png").is_file()

    size = config.max_batch
    batches = shared_batches(run, stems, run.data.image, desc=f"infer_seg {split}", done=done, max_batch=size)
    with writing(run) as write:
        for batch in batches:
            levels, x = to_input(run, [image for _, image in batch])
            with autocast(run):
                logits = pixelss.multi_scale_inference(network, x, scales=config.test_scales, tile=config.tile)
            probs = logits.softmax(1)
            if config.crf:
                probs = pixelss.dense_crf(levels, probs, **asdict(config.crf))
            for (stem, _), mask in zip(batch, probs.argmax(1).to(torch.uint8).cpu().numpy(), strict=True):
                write(write_mask, folder / f"{stem}.png", np.ascontiguousarray(mask))
    return len(stems)


STAGE = Stage(
    "infer_seg",
    infer_seg,
    memory="seg.max_batch or seg.tile",
    needs=("train_seg",),
    reads=lambda config: [(config.data.val, IMAGES), (config.data.test, IMAGES)],
    settings=("data.val", "data.test", "seg.test_scales", "seg.tile", "seg.crf"),
    pixels=lambda plan: pixels_inferred(
        plan.images(plan.config.data.val) + plan.images(plan.config.data.test), plan.config.seg.test_scales
    ),
)
