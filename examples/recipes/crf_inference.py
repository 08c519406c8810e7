"""`crf_inference` and `crf_inference_label` of pydensecrf wrappers: numpy in, numpy out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import pixelss

sys.path.insert(0, str(Path(__file__).parent.parent))
from small import scenes


def levels(img: NDArray[np.uint8]) -> Tensor:
    """Return an image (H, W, 3) as (1, 3, H, W); a copy, since PIL's are read-only."""
    return torch.tensor(np.ascontiguousarray(img)).permute(2, 0, 1)[None]


def crf_inference(
    img: NDArray[np.uint8], probs: NDArray[np.float32], t: int = 10, scale_factor: float = 1
) -> NDArray[np.float32]:
    """Return the probabilities (K, H, W) after the CRF: settings of PSA and its heirs."""
    refined = pixelss.dense_crf(
        levels(img),
        torch.tensor(probs)[None],
        iterations=t,
        gaussian=(3 / scale_factor, 3),
        bilateral=(80 / scale_factor, 13, 10),
    )
    return refined[0].numpy()


def crf_inference_label(
    img: NDArray[np.uint8],
    labels: NDArray[np.integer[Any]],
    t: int = 10,
    n_labels: int = 21,
    gt_prob: float = 0.7,
) -> NDArray[np.int64]:
    """Return the map (H, W) after the CRF on one of 0..n_labels - 1: settings of IRN."""
    mask = torch.tensor(labels.astype(np.int64))[None]
    probs = pixelss.label_probs(mask, n_labels - 1, gt_prob=gt_prob)
    refined = pixelss.dense_crf(
        levels(img), probs, iterations=t, gaussian=(3, 3), bilateral=(50, 5, 10)
    )
    return refined[0].argmax(0).numpy()


def main() -> None:
    (scene,) = scenes(1, seed=0)
    rng = np.random.default_rng(0)
    noisy = np.where(
        rng.random(scene.mask.shape) < 0.3, rng.integers(0, 5, scene.mask.shape), scene.mask
    )
    refined = crf_inference_label(scene.image, noisy, n_labels=5)
    probs = np.stack([(noisy == k) * 0.6 + 0.1 for k in range(5)]).astype(np.float32)
    again = crf_inference(scene.image, probs, scale_factor=4).argmax(0)
    shares = [
        f"{100 * (labels == scene.mask).mean():.0f}%" for labels in (noisy, refined, again)
    ]
    print(
        "pixels right: {} before, {} after the label CRF, {} after that on scores".format(
            *shares
        )
    )


if __name__ == "__main__":
    main()
