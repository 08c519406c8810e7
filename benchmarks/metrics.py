"""Time and peak memory of the metrics against numpy and torchmetrics.

    python benchmarks/metrics.py
    python benchmarks/metrics.py --device cuda --out metrics.json

In one run: an image of 375 x 500 at N = 20, two classes of them in its CAM; 61
thresholds. A CPU works on one core. torchmetrics is measured where it is
installed; numpy works on the CPU whatever the device.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from paired import Groups, Step, Unavailable, run
from torch import Tensor

import pixelss

N, H, W, VOID = 20, 375, 500, 255
K = N + 1


def inputs(device: str) -> tuple[Tensor, Tensor]:
    """Return a CAM (1, N, 375, 500) and a mask (1, 375, 500) with a void border."""
    torch.set_num_threads(1)
    coarse = torch.rand(1, N, H // 16, W // 16)
    coarse[:, 2:] = 0
    cam = torch.nn.functional.interpolate(coarse, size=(H, W), mode="bilinear")
    target = torch.randint(0, 3, (1, H, W))
    target[:, :8] = VOID
    return cam.to(device), target.to(device)


def counted(pred: NDArray[np.int64], target: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a confusion matrix as the field's scripts count it."""
    valid = target != VOID
    return np.bincount(K * target[valid] + pred[valid], minlength=K * K).reshape(K, K)


def torchmetrics_matrix(device: str) -> Any:
    try:
        from torchmetrics.classification import MulticlassConfusionMatrix
    except ImportError:
        raise Unavailable("torchmetrics is missing: pip install torchmetrics") from None
    return MulticlassConfusionMatrix(K, ignore_index=VOID).to(device)


def numpy_sweep(device: str) -> Step:
    """The field's way: argmax over threshold and CAM, and a matrix, once a threshold."""
    cam, target = (x[0].cpu().numpy() for x in inputs(device))
    totals = np.zeros((61, K, K), np.int64)

    def step() -> None:
        for i, threshold in enumerate(np.arange(61) / 100):
            padded = np.pad(cam, ((1, 0), (0, 0), (0, 0)), constant_values=threshold)
            totals[i] += counted(padded.argmax(0), target)

    return step


def torchmetrics_sweep(device: str) -> Step:
    """A matrix of torchmetrics a threshold; the strongest class is found once."""
    cam, target = inputs(device)
    matrices = [torchmetrics_matrix(device) for _ in range(61)]

    def step() -> None:
        strongest, best = cam.max(1)
        for i, matrix in enumerate(matrices):
            matrix.update(torch.where(strongest > i / 100, best + 1, 0), target)

    return step


def sweep(device: str) -> Step:
    cam, target = inputs(device)
    metric = pixelss.ThresholdSweep(N).to(device)
    return lambda: metric.update(cam, target)


def numpy_matrix(device: str) -> Step:
    cam, target = inputs(device)
    pred, truth = (cam.argmax(1) + 1).cpu().numpy(), target.cpu().numpy()
    total = np.zeros((K, K), np.int64)
    return lambda: np.add(total, counted(pred, truth), out=total)


def matrix(way: str, device: str) -> Step:
    cam, target = inputs(device)
    pred = cam.argmax(1) + 1
    metric: Any = torchmetrics_matrix(device) if way == "torchmetrics" else pixelss.ConfusionMatrix(K).to(device)
    return lambda: metric.update(pred, target)


GROUPS: Groups = {
    f"threshold sweep, {H} x {W}, N {N}, 61 thresholds": {
        "numpy": numpy_sweep,
        "torchmetrics": torchmetrics_sweep,
        "pixelss": sweep,
    },
    f"confusion matrix, {H} x {W}, K {K}": {
        "numpy": numpy_matrix,
        "torchmetrics": partial(matrix, "torchmetrics"),
        "pixelss": partial(matrix, "pixelss"),
    },
}

if __name__ == "__main__":
    run(__doc__, GROUPS, "generated CAMs")
