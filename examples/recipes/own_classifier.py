"""The classifier that you have, to CAMs, masks and their score."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import timm
import torch

import pixelss

sys.path.insert(0, str(Path(__file__).parent.parent))
from shapes import CLASSES
from small import scenes


def main() -> None:
    model = timm.create_model(
        "resnet18", num_classes=len(CLASSES), output_stride=8
    )  # yours, with its weights
    network = pixelss.classifier_cam(model).eval()
    pool = scenes(4, seed=0)
    levels = torch.stack(
        [torch.from_numpy(scene.image).permute(2, 0, 1) for scene in pool]
    )  # uint8, for the CRF
    config: Any = model.default_cfg
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    tags = torch.tensor(
        [[float(name in scene.names) for name in CLASSES] for scene in pool]
    )
    truth = torch.stack([torch.from_numpy(scene.mask).long() for scene in pool])

    with torch.no_grad():
        outputs = pixelss.multi_scale_forward(
            network, (levels / 255 - mean) / std, scales=(0.5, 1.0, 1.5), flip=True
        )
    cam = pixelss.msinf_cam([output.cam for output in outputs], tags)
    sweep = pixelss.ThresholdSweep(len(CLASSES))  # where there are masks: which threshold?
    sweep.update(cam, truth)
    scores = sweep.compute()
    threshold = scores.thresholds[scores.best].item()
    mask = pixelss.pseudo_labels(levels, cam, tags, threshold=threshold)
    metric = pixelss.ConfusionMatrix(len(CLASSES) + 1)
    metric.update(mask, truth)
    best = 100 * scores.miou[scores.best].item()
    print(f"CAMs {best:.1f} at {threshold:.2f}; after the CRF:")
    print(metric.table(["background", *CLASSES]))


if __name__ == "__main__":
    main()
