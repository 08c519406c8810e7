"""Generated scenes in memory, and a small CAM network trained on their tags: for notebooks and the docs' pictures.

`trained()` takes half a minute the first time and is kept in runs/small.pth; `batch(scenes(8, seed=1))` gives images,
tags and masks.
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

import pixelss

CACHE = Path(__file__).parent.parent / "runs" / "small.pth"


class Scene(NamedTuple):
    """One generated image: RGB levels, its label map (0 background, 255 void) and its objects' names."""

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    names: list[str]


def scenes(count: int, *, seed: int, size: int = 96) -> list[Scene]:
    """Draw `count` scenes; the same seed gives the same ones."""
    rng = np.random.default_rng(seed)
    return [Scene(*draw_image(rng, size)) for _ in range(count)]


def batch(chosen: Sequence[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """Return normalised images (B, 3, H, W), tags (B, N) and label maps (B, H, W)."""
    images = torch.from_numpy(np.stack([scene.image for scene in chosen])).permute(0, 3, 1, 2)
    tags = torch.tensor([[float(name in scene.names) for name in CLASSES] for scene in chosen])
    return (images / 255 - 0.45) / 0.25, tags, torch.from_numpy(np.stack([scene.mask for scene in chosen])).long()


def network(num_classes: int = len(CLASSES)) -> nn.Sequential:
    """Return five convolutions of stride 8 and a `CAMHead`, untrained."""
    layers: list[nn.Module] = []
    for c_in, c_out, stride in ((3, 32, 2), (32, 64, 2), (64, 128, 2), (128, 128, 1), (128, 128, 1)):
        conv = nn.Conv2d(c_in, c_out, 3, stride, 3 - stride, 3 - stride, bias=False)
        layers += [conv, nn.GroupNorm(8, c_out), nn.ReLU()]
    return nn.Sequential(nn.Sequential(*layers), pixelss.CAMHead(128, num_classes))


def trained(steps: int = 200, *, cache: Path | None = CACHE) -> nn.Sequential:
    """Return the network after `steps` of plain classification, from `cache` where it was kept."""
    model = network()
    if cache and cache.exists() and (kept := torch.load(cache, weights_only=True))["steps"] == steps:
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
        loss = nn.functional.binary_cross_entropy_with_logits(model(images).logits, tags)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if cache:
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"steps": steps, "model": model.state_dict()}, cache)
    return model.eval()
