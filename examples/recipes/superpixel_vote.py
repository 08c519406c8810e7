"""Super-pixels vote on blunt pseudo-labels (python -m pip install scikit-image)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from skimage.segmentation import slic

import pixelss

sys.path.insert(0, str(Path(__file__).parent.parent))
from small import batch, scenes


def main() -> None:
    # Yours: images, and pseudo-labels; these are the truth at every eighth pixel.
    pool = scenes(8, seed=0)
    truth = batch(pool)[2]
    blunt = truth[:, 4::8, 4::8].repeat_interleave(8, 1).repeat_interleave(8, 2)

    # SLIC counts from 1: 0 is no segment. Where compactness is low, segments swallow
    # objects here: look at them.
    found = [
        slic(scene.image, n_segments=150, compactness=30, start_label=1) for scene in pool
    ]
    voted = pixelss.vote_segments(blunt, torch.from_numpy(np.stack(found)), num_classes=4)

    for name, mask in (("pseudo-labels", blunt), ("after the vote", voted)):
        metric = pixelss.ConfusionMatrix(num_classes=5)
        metric.update(mask.where(mask != 255, 0), truth)
        print(f"{name}: mIoU {100 * metric.compute().miou:.1f}")


if __name__ == "__main__":
    main()
