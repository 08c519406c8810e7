"""Label maps on the training path: which pixels count, and the mean over them."""

from __future__ import annotations

import torch
from torch import Tensor

from pixelss._checks import check_void


def valid_pixels(mask: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return the classes of a label map, int64 with 0 at its void pixels, and where it is not void.

    Void is `ignore_index`, even where it lies in 0..K-1, and every value outside 0..K-1; K is `num_classes`.
    """
    check_void(ignore_index, num_classes)
    mask = mask.long()  # first: in uint8, -1 would compare equal to 255
    valid = (mask != ignore_index) & (mask >= 0) & (mask < num_classes)
    return mask.where(valid, 0), valid


def mean_over(values: Tensor, valid: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Return the mean of `values` where `valid`, along `dim` or of all: zero, on the graph, where that is nowhere."""
    return values.where(valid, 0).sum(dim) / valid.sum(dim).clamp(min=1)


def class_maps(label: Tensor, num_classes: int) -> Tensor:
    """Return where each class is, (B, K, H, W) bool, of a label map (B, H, W); K is `num_classes`."""
    return label[:, None] == torch.arange(num_classes, device=label.device)[:, None, None]
