"""Generated scenes in memory, and the small CAM network of all examples; for notebooks and pictures, trained.

`trained()` takes half a minute the first time and is kept beside this file, in runs/small.pth;
`batch(scenes(8, seed=1))` gives images, tags and masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from shapes import CLASSES, draw_image
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

import pixelss

CACHE = Path(__file__).parent / "runs" / "small.pth"


class Scene(NamedTuple):
    """One generated image: RGB levels, its mask (0 background, 255 void) and its objects' names."""

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    names: list[str]


def scenes(count: int, *, seed: int, size: int = 96) -> list[Scene]:
    """Draw `count` scenes; the same seed gives the same ones."""
    rng = np.random.default_rng(seed)
    return [Scene(*draw_image(rng, size)) for _ in range(count)]


def batch(chosen: Sequence[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """Return normalised images (B, 3, H, W), tags (B, N) and masks (B, H, W)."""
    images = torch.from_numpy(np.stack([scene.image for scene in chosen])).permute(0, 3, 1, 2)
    tags = torch.tensor([[float(name in scene.names) for name in CLASSES] for scene in chosen])
    return (images / 255 - 0.45) / 0.25, tags, torch.from_numpy(np.stack([scene.mask for scene in chosen])).long()


class Backbone(nn.Module):
    """Five convolutions, stride 8 in all; the last three are the taps of an affinity head."""

    out_channels, stride = 128, 8

    def __init__(self) -> None:
        super().__init__()
        layers = []
        for c_in, c_out, stride in ((3, 32, 2), (32, 64, 2), (64, 128, 2), (128, 128, 1), (128, 128, 1)):
            dilation = 3 - stride  # 2 where there is no stride: cells stay small, the view grows
            conv = nn.Conv2d(c_in, c_out, 3, stride, dilation, dilation, bias=False)
            layers.append(nn.Sequential(conv, nn.GroupNorm(8, c_out), nn.ReLU()))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_taps(x)[-1]

    def forward_taps(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return tuple(outputs[-3:])


def network(num_classes: int = len(CLASSES)) -> nn.Sequential:
    """Return the backbone and a `CAMHead`, untrained."""
    return nn.Sequential(Backbone(), pixelss.CAMHead(Backbone.out_channels, num_classes))


def trained(steps: int = 200, *, cache: Path | None = CACHE) -> nn.Sequential:
    """Return the network after `steps` of plain classification, from `cache` where it was kept."""
    model = network()
    if cache and cache.exists():
        kept = torch.load(cache, weights_only=True)
        if kept["steps"] == steps and kept["model"].keys() == model.state_dict().keys():
            model.load_state_dict(kept["model"])
            return model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = network()
    pool = scenes(320, seed=0)
    rng = np.random.default_rng(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    for _ in range(steps):
        images, tags, _ = batch([pool[i] for i in rng.choice(len(pool), 16, replace=False)])
        top, left = rng.integers(0, 17, 2)
        images = images[:, :, top : top + 80, left : left + 80]
        images = images.flip(-1) if rng.random() < 0.5 else images
        loss = bce(model(images).logits, tags)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if cache:
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"steps": steps, "model": model.state_dict()}, cache)
    return model.eval()
