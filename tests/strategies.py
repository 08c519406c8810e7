"""Random inputs of every block: `make_batch` builds one from a seed and sizes, `batches` lets hypothesis draw them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pixelss import pair_offsets

Size = tuple[int, int]

# (h, w) of the features, (H, W) of the image
SIZES = {
    "equal": ((4, 5), (4, 5)),
    "smaller": ((3, 4), (7, 9)),
    "larger": ((8, 7), (3, 5)),
    "mixed": ((2, 7), (5, 3)),
    "from-1x1": ((1, 1), (5, 4)),
    "to-1x1": ((5, 3), (1, 1)),
}


class Batch(NamedTuple):
    """Inputs of one training step; the letters are those of the notation table."""

    features: Tensor  # (B, D, h, w), >= 0 with exact zeros
    mask: Tensor  # (B, H, W), 0..N, void (255) and out-of-range values
    tags: Tensor  # (B, N)
    prototypes: Tensor  # (K, D)
    filled: Tensor  # (K,), not all
    raw: tuple[Tensor, ...]  # raw CAMs (B, N, *, *) of three sizes
    student: tuple[Tensor, ...]  # S normalised CAMs (B, N, H, W), some maps all zero
    teacher: tuple[Tensor, ...]  # R of them
    images: Tensor  # (B, 3, H, W) uint8
    probs: Tensor  # (B, K, H, W), sum 1
    affinity: Tensor  # (B, O, h, w) of radius 3, noise outside the image too
    pairs: Tensor  # (B, O, h, w), labels of all kinds

    @property
    def cam(self) -> Tensor:
        """One normalised CAM."""
        return self.student[0]

    @property
    def classes(self) -> int:
        """N."""
        return self.prototypes.shape[-2] - 1


def make_batch(seed: int = 0, **settings: Any) -> Batch:
    """Build a batch; image 1 is void and the last of several images has no tag. Settings are those of `_draw`."""
    with _disable_current_modes(), torch.device("cpu"):  # real, whoever asks first
        batch = _draw(seed, **settings)
    return map_batch(torch.clone, batch)


@lru_cache(64)
def _draw(
    seed: int,
    *,
    images: int = 3,
    classes: int = 3,
    dim: int = 5,
    feature_size: Size = (3, 4),
    image_size: Size = (7, 9),
    scales: tuple[int, int] = (3, 3),
    dtype: torch.dtype = torch.float64,
) -> Batch:
    """Draw what `make_batch` copies."""
    g = torch.Generator().manual_seed(seed)
    B, N, D = images, classes, dim
    (h, w), (H, W) = feature_size, image_size

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g, dtype=torch.float64)

    def normalised() -> Tensor:
        cam = (uniform(B, N, H, W) - 0.2).clamp(min=0) * (uniform(B, N, 1, 1) > 0.15)
        return cam / cam.amax((2, 3), keepdim=True).clamp(min=1e-9)

    mask = torch.randint(0, N + 1, (B, H, W), generator=g)
    for value, share in ((255, 0.1), (-1, 0.05), (N + 1, 0.05)):
        mask[uniform(B, H, W) < share] = value
    mask[1:2] = 255
    tags = (uniform(B, N) < 0.6).long()
    tags[:1, :1] = 1
    tags[max(1, B - 1) :] = 0
    filled = uniform(N + 1) < 0.7
    filled[:3] = torch.tensor([True, False, True])[: N + 1]
    batch = Batch(
        features=(uniform(B, D, h, w) - 0.3).clamp(min=0),
        mask=mask,
        tags=tags,
        prototypes=uniform(N + 1, D),
        filled=filled,
        raw=tuple(4 * uniform(B, N, *size) - 2 for size in ((h, w), (2 * h, 2 * w + 1), (H, W))),
        student=tuple(normalised() for _ in range(scales[0])),
        teacher=tuple(normalised() for _ in range(scales[1])),
        images=torch.randint(0, 256, (B, 3, H, W), generator=g, dtype=torch.uint8),
        probs=(4 * uniform(B, N + 1, H, W)).softmax(1),
        affinity=0.01 + 0.98 * uniform(B, len(pair_offsets(3)), h, w),
        pairs=torch.tensor([0, 1, 2, 255, 3, -1])[torch.randint(0, 6, (B, len(pair_offsets(3)), h, w), generator=g)],
    )
    return convert(batch, dtype)


def map_batch(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Apply a function to every tensor."""
    return Batch(*(tuple(map(function, x)) if isinstance(x, tuple) else function(x) for x in batch))


def convert(batch: Batch, to: torch.dtype | str) -> Batch:
    """Move every tensor to a device, or every floating one to a dtype."""
    return map_batch(lambda x: x.to(to) if isinstance(to, str) or x.is_floating_point() else x, batch)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_maps(seed: int = 0, size: tuple[int, int] = (6, 7), images: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    values = torch.tensor([0, 0, 1, 2, 2, 3, 255, -1])
    return tuple(values[torch.randint(0, len(values), (images, *size), generator=g)] for _ in range(2))


def make_pairs(
    seed: int = 0, size: tuple[int, int] = (6, 7), images: int = 2, radius: int = 5, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Return affinities in [0, 1], noise outside the image too, and labels of all kinds."""
    g = torch.Generator().manual_seed(seed)
    shape = (images, len(pair_offsets(radius)), *size)
    labels = torch.tensor([0, 1, 2, 255, 3, -1])[torch.randint(0, 6, shape, generator=g)]
    return (0.01 + 0.98 * torch.rand(shape, generator=g, dtype=torch.float64)).to(dtype), labels


sides = st.integers(1, 9)
image_sizes = st.tuples(sides, sides)


@st.composite
def batches(draw: st.DrawFn, *, side: int = 9, **fixed: object) -> Batch:
    """Draw a batch: feature and image sizes equal, smaller or larger, odd or 1; few images and classes."""
    sides = st.integers(1, side)
    image_size = draw(st.tuples(sides, sides))
    drawn = {
        "images": draw(st.integers(1, 3)),
        "classes": draw(st.integers(1, 4)),
        "dim": draw(st.integers(1, 6)),
        "feature_size": draw(st.just(image_size) | st.tuples(sides, sides)),
        "image_size": image_size,
        "scales": draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
    }
    return make_batch(draw(st.integers(0, 2**32 - 1)), **(drawn | fixed))
