"""Pairs of neighbouring cells: what AffinityNet and the random walk share."""

from __future__ import annotations

from itertools import product

from torch import Tensor
from torch.nn.functional import pad

from pixelss._checks import check_integer

Offsets = tuple[tuple[int, int], ...]
DIFFERENT, BACKGROUND, FOREGROUND, UNKNOWN = 0, 1, 2, 255  # the codes of `affinity_labels`


def pair_offsets(radius: int = 5) -> Offsets:
    """Return the offsets (dy, dx) from a cell to its partners: half a disc, so that every pair comes once.

    First (0, 1), ..., (0, radius - 1), then dy = 1, ..., radius - 1 with dx ascending; dx^2 + dy^2 < radius^2.

    Args:
        radius: in cells, 2 to 64; 5 gives 34 offsets.

    Raises:
        TypeError, ValueError: `radius` is no int or out of range.

    Reference:
        Ahn 2018, "Learning Pixel-level Semantic Affinity", section 3.2.

    Example:
        >>> pair_offsets(2)
        ((0, 1), (1, -1), (1, 0), (1, 1))
        >>> len(pair_offsets(5))
        34
    """
    check_integer("radius", radius, low=2, high=64)
    square = product(range(radius), range(1 - radius, radius))
    return tuple((dy, dx) for dy, dx in square if (dy > 0 or dx > 0) and dy**2 + dx**2 < radius**2)


def shifted(x: Tensor, offsets: Offsets, *, outside: float) -> list[Tensor]:
    """Return one view of the padded (..., h, w) an offset: at cell p the value of x at p + offset."""
    h, w = x.shape[-2:]
    margin = max(abs(side) for offset in offsets for side in offset)
    padded = pad(x, 4 * [margin], value=outside)
    return [padded[..., margin + dy : margin + dy + h, margin + dx : margin + dx + w] for dy, dx in offsets]
