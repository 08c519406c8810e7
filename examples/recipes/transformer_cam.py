"""A transformer of timm, its CAM, refined by its own attention, and a mask."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch.nn.functional import interpolate

import pixelss

sys.path.insert(0, str(Path(__file__).parent.parent))
from small import batch, scenes


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    # Yours: a trained classifier of pooled patch tokens, images and tags.
    model: Any = timm.create_model(
        "vit_tiny_patch16_224", img_size=96, num_classes=4, global_pool="avg"
    ).eval()
    images, tags, _ = batch(scenes(2, seed=0))

    with pixelss.vit_attention(model) as attention:
        tokens = model.forward_features(images)
    skip, grid = model.num_prefix_tokens, model.patch_embed.grid_size
    cam = model.head(model.fc_norm(tokens[:, skip:])).mT.unflatten(2, grid)  # (B, N, h, w)
    cam = pixelss.normalize_cam(cam) * tags[:, :, None, None]
    affinity = pixelss.sinkhorn_affinity(
        pixelss.attention_affinity(attention, skip=skip, layers=8)
    )
    refined = pixelss.refine_by_affinity(cam, affinity, inside=pixelss.cam_boxes(cam))
    refined = pixelss.normalize_cam(
        interpolate(refined, size=images.shape[2:], mode="bilinear")
    )
    mask = pixelss.class_region_mask(refined, tags, threshold=0.4)
    shapes = {"CAM": cam.shape, "affinity": affinity.shape, "mask": mask.shape}
    print(", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items()))


if __name__ == "__main__":
    main()
