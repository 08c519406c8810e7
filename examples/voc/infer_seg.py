"""Stage infer_seg: label maps of the val and test lists, from several scales and flips, then a CRF."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import torch
from data import voc_palette
from inference import autocast, shared_batches, to_input
from networks import load_trained
from stages import Run
from storage import save_mask

import pixelss


@torch.inference_mode()
def infer_seg(run: Run) -> None:
    """Write the label maps that are not there yet."""
    config = run.config.seg
    network = load_trained(run, "train_seg")
    counts = {}
    for split, name in (("val", run.config.data.val), ("test", run.config.data.test)):
        if name is None:
            continue
        folder, stems = run.folder("infer_seg") / split, run.data.stems(name)
        todo = [stem for stem in stems if not (folder / f"{stem}.png").is_file()]
        for batch in shared_batches(run, todo, run.data.image, desc=f"infer_seg {split}", max_batch=config.max_batch):
            levels, x = to_input(run, [image for _, image in batch])
            with autocast(run):
                logits = pixelss.multi_scale_inference(network, x, scales=config.test_scales, tile=config.tile)
            probs = logits.softmax(1)
            if config.crf:
                probs = pixelss.dense_crf(levels, probs, **asdict(config.crf))
            for (stem, _), labels in zip(batch, probs.argmax(1).to(torch.uint8).cpu().numpy(), strict=True):
                save_mask(folder / f"{stem}.png", np.ascontiguousarray(labels), voc_palette())
        counts[split] = len(stems)
    run.finish("infer_seg", **counts)
