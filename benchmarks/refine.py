"""Time and peak memory of the refinement blocks against what the field uses.

    python benchmarks/refine.py --device cpu --out refine.json
    python benchmarks/refine.py --device cuda

The CRF is compared with the C++ code (pip install -e ".[crf-reference]") on one
core, on photographs where PIXELSS_VOC_MINI has them, else on generated images;
the random walk with the power of the dense matrix, by squaring; the others with
what the public code writes.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from paired import Groups, Step, Unavailable, run
from PIL import Image
from torch import Tensor, nn

import pixelss

ROOT = Path(__file__).parent.parent
PHOTOGRAPHS = Path(os.environ.get("PIXELSS_VOC_MINI", ROOT.parent / "shared/data/voc12-mini")).parent / "voc12-native"
H, W, ITERATIONS = 375, 500, 10


def images(count: int) -> Tensor:
    """Return (count, 3, 375, 500) uint8: photographs of that size, else generated ones."""
    found: list[np.ndarray] = []
    for path in sorted(PHOTOGRAPHS.glob("JPEGImages/*.jpg")):
        with Image.open(path) as image:
            if image.size == (W, H) and len(found) < count:
                found.append(np.array(image.convert("RGB")))
    if not found:
        sys.path.insert(0, str(ROOT / "examples"))
        from shapes import draw_image

        found = [draw_image(np.random.default_rng(i), max(H, W))[0][:H, :W] for i in range(min(count, 4))]
    return torch.from_numpy(np.stack([found[i % len(found)] for i in range(count)])).permute(0, 3, 1, 2).contiguous()


def probabilities(count: int, K: int) -> Tensor:
    """Return noisy coarse maps, as a CAM's: (count, K, 375, 500)."""
    coarse = torch.rand(count, K, H // 16, W // 16)
    scores = nn.functional.interpolate(coarse, size=(H, W), mode="bilinear")
    return (6 * scores + torch.randn(count, K, H, W)).softmax(1)


def c_crf(K: int, count: int, device: str) -> Step:
    try:
        from pydensecrf.densecrf import DenseCRF2D
    except ImportError:
        raise Unavailable('pydensecrf2 is missing: pip install -e ".[crf-reference]"') from None
    pixels, probs = images(count).permute(0, 2, 3, 1).contiguous().numpy(), probabilities(count, K)

    def step() -> None:
        for image, p in zip(pixels, probs, strict=True):
            crf = DenseCRF2D(W, H, K)
            crf.setUnaryEnergy(-p.clamp(1e-5, 1).log().flatten(1).numpy())
            crf.addPairwiseGaussian(sxy=3, compat=3)
            crf.addPairwiseBilateral(sxy=80, srgb=13, rgbim=image, compat=10)
            np.array(crf.inference(ITERATIONS))

    return step


def use_one_core(device: str) -> None:
    if device != "cpu":
        raise Unavailable("for a CPU")
    torch.set_num_threads(1)


def torch_crf(K: int, count: int, one_core: bool, device: str) -> Step:
    if one_core:
        use_one_core(device)
    pixels, probs = images(count).to(device), probabilities(count, K).to(device)
    return lambda: pixelss.dense_crf(pixels, probs, iterations=ITERATIONS)


def walk_inputs(h: int, w: int, device: str) -> tuple[Tensor, Tensor]:
    return torch.rand(1, 21, h, w, device=device), torch.rand(1, 34, h, w, device=device)


def dense_walk(h: int, w: int, device: str) -> Step:
    """The field's way: the matrix of all cells, squared log_steps times."""
    scores, affinity = walk_inputs(h, w, device)
    cells = torch.arange(h * w, device=device).view(h, w)

    def step() -> Tensor:
        matrix = torch.eye(h * w, device=device)
        for (dy, dx), a in zip(pixelss.pair_offsets(5), affinity[0], strict=True):
            here = (slice(0, h - dy), slice(max(0, -dx), w - max(0, dx)))
            there = (slice(dy, h), slice(max(0, dx), w + min(0, dx)))
            p, q = cells[here].flatten(), cells[there].flatten()
            matrix[p, q] = matrix[q, p] = a[here].flatten() ** 8
        matrix /= matrix.sum(0)
        for _ in range(8):
            matrix = matrix @ matrix
        return scores.flatten(2) @ matrix

    return step


def sparse_walk(h: int, w: int, one_core: bool, device: str) -> Step:
    if one_core:
        use_one_core(device)
    scores, affinity = walk_inputs(h, w, device)
    return lambda: pixelss.random_walk(scores, affinity)


def adaptive_inputs(device: str) -> tuple[Tensor, Tensor]:
    pixels = nn.functional.interpolate(images(2).float(), size=(160, 160), mode="bilinear")
    return pixels.to(device), torch.rand(2, 21, 160, 160, device=device).softmax(1)


def stacked_adaptive(one_core: bool, device: str) -> Step:
    """The literal way: all 48 neighbours of every map side by side, in each iteration."""
    if one_core:
        use_one_core(device)
    pixels, probs = adaptive_inputs(device)
    offsets = [(d * dy, d * dx) for d in (1, 2, 4, 8, 12, 24) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    distance = torch.tensor([max(abs(dy), abs(dx)) * (1.0 if dy * dx == 0 else 2**0.5) for dy, dx in offsets])
    near = (-(distance / distance.std() / 0.3).square()).softmax(0).to(device)[:, None, None]

    def neighbours(x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        padded = nn.functional.pad(x, (24, 24, 24, 24), mode="replicate")
        return torch.stack([padded[..., 24 + dy : 24 + dy + h, 24 + dx : 24 + dx + w] for dy, dx in offsets], 2)

    def step() -> Tensor:
        around, scores = neighbours(pixels), probs
        steps = (around - pixels[:, :, None]) / (around.std(2, keepdim=True) + 1e-8) / 0.3
        weights = (-steps.square().mean(1, keepdim=True)).softmax(2) + 0.01 * near
        for _ in range(ITERATIONS):
            scores = (neighbours(scores) * weights).sum(2)
        return scores

    return step


def adaptive(one_core: bool, device: str) -> Step:
    if one_core:
        use_one_core(device)
    pixels, probs = adaptive_inputs(device)
    return lambda: pixelss.pixel_adaptive_refinement(pixels, probs, normalize=False, iterations=ITERATIONS)


def correlation_inputs(device: str) -> tuple[Tensor, Tensor]:
    embedding = torch.randn(2, 192, 56, 56, device=device, requires_grad=True)
    return embedding, torch.rand(2, 21, 56, 56, device=device)


def dense_correlation(device: str) -> Step:
    """The literal way: the matrix of all pairs of an image's cells."""
    embedding, scores = correlation_inputs(device)

    def step() -> tuple[Tensor, ...]:
        e = embedding.flatten(2)
        e = e / (e.norm(dim=1, keepdim=True) + 1e-5)
        similarity = (e.mT @ e).relu()
        spread = scores.flatten(2) @ (similarity / (similarity.sum(1, keepdim=True) + 1e-5))
        return torch.autograd.grad(spread.square().sum(), embedding)

    return step


def correlation(device: str) -> Step:
    embedding, scores = correlation_inputs(device)
    return lambda: torch.autograd.grad(pixelss.pixel_correlation(embedding, scores).square().sum(), embedding)


def boundary_input(device: str) -> Tensor:
    return torch.rand(2, 1, 94, 125, device=device, requires_grad=True)


def gathered_paths(radius: int, device: str) -> Step:
    """The literal way: the boundary at all cells of all paths side by side, then the maximum of every path."""
    boundary = boundary_input(device)
    h, w = boundary.shape[2:]
    cells = torch.arange((h + radius) * (w + 2 * radius), device=device).view(h + radius, w + 2 * radius)
    paths = []
    for dy, dx in pixelss.pair_offsets(radius):
        box = [(y, x) for y in range(dy + 1) for x in range(min(0, dx), max(0, dx) + 1)]
        on = [(y, x) for y, x in box if (dy * x - dx * y) ** 2 < dy**2 + dx**2]
        windows = [cells[y : y + h, radius + x : radius + x + w].flatten() for y, x in on]
        paths.append(torch.stack(windows))  # (cells of the path, h w)

    def step() -> tuple[Tensor, ...]:
        flat = nn.functional.pad(boundary, (radius, radius, 0, radius), value=1.0).flatten(2)
        affinity = torch.cat([1 - flat[:, :, path].amax(2) for path in paths], 1)
        return torch.autograd.grad(affinity.square().sum(), boundary)

    return step


def paths(radius: int, device: str) -> Step:
    boundary = boundary_input(device)
    return lambda: torch.autograd.grad(pixelss.path_affinity(boundary, radius=radius).square().sum(), boundary)


def inference(tile: int, device: str) -> Step:
    """Multi-scale flip inference of a large image by a small network at stride 8."""
    layers: list[nn.Module] = []
    for c_in, c_out in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(c_in, c_out, 3, 2, 1), nn.ReLU()]
    model = nn.Sequential(*layers, pixelss.LargeFOV(128, 20)).to(device).eval()
    pixels = torch.rand(1, 3, 1500, 2000, device=device)
    return lambda: pixelss.multi_scale_inference(model, pixels, tile=tile)


GROUPS: Groups = {
    **{
        f"dense CRF, {count} image{'s' * (count > 1)} of {H} x {W}, {K} classes, {ITERATIONS} iterations": {
            "pydensecrf2": partial(c_crf, K, count),
            "pixelss, 1 core": partial(torch_crf, K, count, True),
            "pixelss": partial(torch_crf, K, count, False),
        }
        for count in (1, 4, 16)
        for K in (2, 5, 21)
    },
    **{
        f"random walk, {h} x {w} cells, 21 classes, radius 5, 256 steps": {
            "dense matrix": partial(dense_walk, h, w),
            "pixelss, 1 core": partial(sparse_walk, h, w, True),
            "pixelss": partial(sparse_walk, h, w, False),
        }
        for h, w in ((47, 63), (94, 125))
    },
    f"pixel-adaptive refinement, 2 x 21 x 160 x 160, {ITERATIONS} iterations": {
        "all neighbours side by side, 1 core": partial(stacked_adaptive, True),
        "all neighbours side by side": partial(stacked_adaptive, False),
        "pixelss, 1 core": partial(adaptive, True),
        "pixelss": partial(adaptive, False),
    },
    "pixel correlation, 2 x 21 x 56 x 56, D 192, forward and backward": {
        "dense matrix": dense_correlation,
        "pixelss": correlation,
    },
    **{
        f"path affinity, 2 x 94 x 125, radius {radius}, forward and backward": {
            "gathered": partial(gathered_paths, radius),
            "pixelss": partial(paths, radius),
        }
        for radius in (5, 10)
    },
    "multi-scale flip inference, 1500 x 2000, 21 classes, small network": {
        "one tile": partial(inference, 10_000),
        "pixelss": partial(inference, 1024),
    },
}

if __name__ == "__main__":
    source = "photographs" if PHOTOGRAPHS.is_dir() else "generated images"
    run(__doc__, GROUPS, source)
