"""A vision transformer from timm as the CAM network: patch tokens are the features."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

import pixelss


def main() -> None:
    # Stride 16, images of any size: the position embedding is resized.
    # Add pretrained=True for timm's weights.
    backbone: Any = pixelss.timm_backbone("vit_tiny_patch16_224", output_stride=16)
    model = nn.Sequential(backbone, pixelss.CAMHead(backbone.out_channels, num_classes=20))

    # Layer norms have no statistics: nothing to freeze. AdamW and a small rate are usual.
    groups = [
        {"params": backbone.parameters(), "lr": 1e-5},
        {"params": model[1].parameters(), "lr": 1e-4},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)

    images, tags = torch.rand(2, 3, 96, 128), torch.eye(20)[[14, 7]]
    outputs = pixelss.multi_scale_forward(model, images, scales=(1.0, 1.5))
    loss = torch.stack([bce(o.logits, tags) for o in outputs]).mean()
    loss.backward()
    optimizer.step()
    cam = pixelss.msinf_cam([o.cam for o in outputs], tags)
    print(f"{backbone.out_channels} channels, CAM {tuple(cam.shape)}")


if __name__ == "__main__":
    main()
