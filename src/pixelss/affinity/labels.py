"""What AffinityNet learns from: which pairs of cells show the same class."""

from __future__ import annotations

import torch
from torch import Tensor

from pixelss._checks import check_integer, check_tensor
from pixelss._pairs import BACKGROUND, DIFFERENT, FOREGROUND, UNKNOWN, pair_offsets, shifted


def affinity_labels(low: Tensor, high: Tensor, *, radius: int = 5, ignore_index: int = 255) -> Tensor:
    """Return whether the cells of every pair show the same class, from two masks of different caution.

    A cell is background where `high` says so, else of the foreground class of `low`, else unknown.

    Args:
        low: mask whose foreground is reliable: the CRF's result with the low alpha of the background score.
        high: mask whose background is reliable: the CRF's result with the high alpha.
        radius: of `pair_offsets`.
        ignore_index: the masks' void value, not 0; negative values are void too.

    Shape:
        (B, h, w), (B, h, w) -> (B, O, h, w) int64: 0 different, 1 both background, 2 the same foreground class,
        255 (whatever `ignore_index`) where a cell is unknown or outside the image.

    Raises:
        TypeError, ValueError: masks of another rank, size, dtype kind or device; a setting out of range.

    Reference:
        Ahn 2018, "Learning Pixel-level Semantic Affinity", section 3.2.

    Example:
        >>> low = torch.tensor([[[3, 3, 0, 0]]])
        >>> high = torch.tensor([[[3, 3, 3, 0]]])
        >>> affinity_labels(low, high)[0, :3, 0]
        tensor([[  2, 255, 255, 255],
                [255,   0, 255, 255],
                [  0, 255, 255, 255]])
    """
    B, h, w = check_tensor("low", low, "Bhw", kind="integer")
    check_tensor("high", high, "Bhw", kind="integer", like=low, B=B, h=h, w=w)
    check_integer("ignore_index", ignore_index)
    if ignore_index == 0:
        raise ValueError("ignore_index must not be 0, which is the background.")
    low, high = low.long(), high.long()
    foreground = low.where((low > 0) & (low != ignore_index), -1)  # -1: unknown
    cells = foreground.where(high != 0, 0)  # (B, h, w)
    partners = torch.stack(shifted(cells, pair_offsets(radius), outside=-1), 1)  # (B, O, h, w)
    cells = cells[:, None]
    labels = torch.where(cells > 0, FOREGROUND, BACKGROUND).where(cells == partners, DIFFERENT)
    return labels.where((cells >= 0) & (partners >= 0), UNKNOWN)
