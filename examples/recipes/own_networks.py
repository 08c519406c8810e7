"""Your own CAM network, and a segmentation network of your own trained on its masks."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import pixelss

sys.path.insert(0, str(Path(__file__).parent.parent))
from small import batch, scenes, trained


class MyCAMNetwork(nn.Module):
    """Any network that returns a CAMOutput: (B, D, h, w), (B, N, h, w) and (B, N)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        first, second = nn.Conv2d(3, 64, 8, stride=8), nn.Conv2d(64, 256, 3, padding=1)
        self.features = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
        self.classify = nn.Conv2d(256, num_classes, 1, bias=False)

    def forward(self, images: Tensor) -> pixelss.CAMOutput:
        features = self.features(images)
        cam = self.classify(features)
        return pixelss.CAMOutput(features, cam, cam.mean((-2, -1)))


@torch.no_grad()
def masks_of(model: nn.Module, images: Tensor, levels: Tensor, tags: Tensor) -> Tensor:
    """Return masks (B, H, W): CAMs of present classes, CRF, 255 where neither is sure."""
    outputs = pixelss.multi_scale_forward(model, images)
    cam = pixelss.msinf_cam([o.cam for o in outputs], tags)
    crf = pixelss.DenseCRF(gaussian=(3, 3), bilateral=(20, 13, 10))  # of images this small
    return pixelss.pseudo_labels(levels, cam, tags, void=(0.3, 0.5), refine=crf)


def main(steps: int = 12) -> None:
    pool = scenes(8, seed=0)
    images, tags, truth = batch(pool)
    levels = torch.stack(
        [torch.from_numpy(scene.image).permute(2, 0, 1) for scene in pool]
    )  # uint8
    print("CAM of a network of your own:", tuple(MyCAMNetwork(4)(images).cam.shape))
    target = masks_of(trained(), images, levels, tags)

    # Any segmentation network with K = N + 1 outputs; the background is class 0.
    backbone = pixelss.timm_backbone("resnet10t", output_stride=8)
    net = nn.Sequential(backbone, nn.Conv2d(512, 5, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(steps):
        logits = interpolate(net(images), size=target.shape[1:], mode="bilinear")
        loss = cross_entropy(logits, target, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for name, mask in (
        ("pseudo-labels", target.where(target != 255, 0)),
        ("network", logits.argmax(1)),
    ):
        metric = pixelss.ConfusionMatrix(num_classes=5)
        metric.update(mask, truth)
        print(f"{name} on the trained images: mIoU {100 * metric.compute().miou:.1f}")


if __name__ == "__main__":
    main()
