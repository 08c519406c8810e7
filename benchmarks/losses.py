"""Time and peak memory of the losses against their literal implementations.

    python benchmarks/losses.py --device cpu
    python benchmarks/losses.py --device cuda --out losses.json

Forward and backward, in one run. Ratios are the literal way divided by ours;
paired.py says what is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from paired import Step, Unavailable, run
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, interpolate, normalize

import pixelss

B, D, N, CELLS, PIXELS, SCALES = 16, 256, 20, 24, 192, 3
COMPILED = {"compiled": "default", "CUDA graphs": "reduce-overhead"}


def literal_contrastive(features: Tensor, mask: Tensor, prototypes: Tensor) -> Tensor:
    """Upsample, normalise, softmax: Yoon Eq. 4, Yoon Eq. 5 as written."""
    pixels = normalize(interpolate(features, mask.shape[-2:], mode="bilinear", align_corners=False), dim=1)
    z = torch.einsum("bdhw,kd->bkhw", pixels, normalize(prototypes, dim=1)) / 0.5
    return cross_entropy(z, mask)


def literal_attentive(student: list[Tensor], teacher: list[Tensor], tags: Tensor) -> Tensor:
    """Yoon Eq. 6, Yoon Eq. 7, Yoon Eq. 8 over all N classes, the absent ones multiplied by zero."""
    loss = student[0].new_zeros(())
    for a in student:
        with torch.no_grad():
            xi = [2 - cosine_similarity(a.flatten(2), g.flatten(2), dim=-1)[:, :, None, None] for g in teacher]
            target = sum(x * g for x, g in zip(xi, teacher, strict=True)) / len(teacher)
        loss = loss + ((a - target).abs() * tags[:, :, None, None]).sum()
    return loss / (tags.sum() * student[0][0, 0].numel())


def contrastive_step(way: str, device: str) -> Step:
    features = torch.rand(B, D, CELLS, CELLS, device=device, requires_grad=True)
    mask = torch.randint(0, N + 1, (B, PIXELS, PIXELS), device=device)
    prototypes = torch.rand(N + 1, D, device=device)
    loss: Callable[..., Tensor] = literal_contrastive if way == "literal" else pixelss.regional_contrastive_loss
    if way in COMPILED:
        if not device.startswith("cuda"):
            raise Unavailable("on CUDA only: compiling raises a process's own peak")
        loss = torch.compile(loss, fullgraph=True, mode=COMPILED[way])
        loss(features, mask, prototypes).backward()  # compiling takes memory of its own
    return lambda: torch.autograd.grad(loss(features, mask, prototypes), features)


def attentive_step(way: str, classes: int, pairs: int, device: str) -> Step:
    tags = torch.zeros(B, classes)
    tags[:, :pairs] = 1
    cams = [torch.rand(B, classes, PIXELS, PIXELS, device=device) for _ in range(2 * SCALES)]
    student, teacher = [cam.requires_grad_() for cam in cams[:SCALES]], cams[SCALES:]
    loss = literal_attentive if way == "literal" else pixelss.multi_scale_attentive_loss
    tags = tags.to(device) if way == "literal" else tags
    return lambda: torch.autograd.grad(loss(student, teacher, tags), student)


def literal_patch_contrast(features: Tensor, mask: Tensor) -> Tensor:
    """Every pair of every image at a time, as published."""
    x, cells = normalize(features.flatten(2), dim=1), mask.flatten(1)
    cosine = (x.mT @ x).abs()
    both = (cells[:, :, None] != 255) & (cells[:, None] != 255)
    both = both & ~torch.eye(cells.shape[1], dtype=torch.bool, device=cells.device)
    same = both & (cells[:, :, None] == cells[:, None])
    other = both & ~same
    positive, negative = (cosine * same).sum() / (same.sum() + 1), (cosine * other).sum() / (other.sum() + 1)
    return 0.5 * (1 - positive) + 0.5 * negative


def patch_step(way: str, device: str) -> Step:
    features = torch.randn(8, 768, 28, 28, device=device, requires_grad=True)
    mask = torch.randint(0, N + 1, (8, 28, 28), device=device)
    loss = literal_patch_contrast if way == "literal" else pixelss.patch_token_contrast
    return lambda: torch.autograd.grad(loss(features, mask), features)


def literal_token_affinity(affinity: Tensor, mask: Tensor) -> Tensor:
    """The labels of all pairs of all images, then the sums, as published."""
    (B, h, w), cells = mask.shape, mask.flatten(1)
    y, x = torch.arange(h * w, device=mask.device) // w, torch.arange(h * w, device=mask.device) % w
    near = ((y[:, None] - y).abs() <= 8) & ((x[:, None] - x).abs() <= 8)
    labels = (cells[:, :, None] == cells[:, None]).long()
    labels[~near.expand(B, -1, -1)] = 255
    labels[(cells == 255)[:, :, None].expand_as(labels)] = 255
    labels[(cells == 255)[:, None].expand_as(labels)] = 255
    same, other = (labels == 1).float(), (labels == 0).float()
    return 0.5 * ((1 - affinity) * same).sum() / (same.sum() + 1) + 0.5 * (affinity * other).sum() / (other.sum() + 1)


def token_affinity_step(way: str, device: str) -> Step:
    affinity = torch.rand(8, 784, 784, device=device, requires_grad=True)
    mask = torch.randint(0, N + 1, (8, 28, 28), device=device)
    loss = literal_token_affinity if way == "literal" else pixelss.token_affinity_loss
    return lambda: torch.autograd.grad(loss(affinity, mask), affinity)


def energy_step(way: str, device: str) -> Step:
    """Smooth images, as photographs are more than noise; the published filter is C++ that nobody can build."""
    coarse = 255 * torch.rand(8, 3, 10, 10, device=device)
    images = interpolate(coarse, (160, 160), mode="bilinear", align_corners=False)
    logits = torch.randn(8, N + 1, 160, 160, device=device, requires_grad=True)
    mask = torch.randint(0, N + 1, (8, 160, 160), device=device)
    lattices = pixelss.energy_lattices(images) if way == "lattices given" else None
    return lambda: torch.autograd.grad(pixelss.dense_energy_loss(images, logits, mask=mask, lattices=lattices), logits)


GROUPS = {
    "regional contrastive loss, 24 x 24 -> 192 x 192, D 256, K 21": {
        way: partial(contrastive_step, way) for way in ("literal", "pixelss", *COMPILED)
    },
    **{
        f"multi-scale attentive loss, N {classes}, {pairs} present of each image": {
            way: partial(attentive_step, way, classes, pairs) for way in ("literal", "pixelss")
        }
        for classes, pairs in ((20, 1), (20, 2), (20, 4), (80, 2))
    },
    "patch-token contrast, batch 8, 784 tokens, D 768": {
        way: partial(patch_step, way) for way in ("literal", "pixelss")
    },
    "token affinity, batch 8, 784 tokens, radius 8": {
        way: partial(token_affinity_step, way) for way in ("literal", "pixelss")
    },
    "dense energy, batch 8, 160 x 160 at scale 0.5, K 21": {
        way: partial(energy_step, way) for way in ("lattices built", "lattices given")
    },
}

if __name__ == "__main__":
    run(__doc__, GROUPS, f"batch {B} where none is named, forward and backward")
