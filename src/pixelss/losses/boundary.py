"""Boundary loss (BES): predict boundaries from the zones of a confident mask."""

from __future__ import annotations

from torch import Tensor

from pixelss._checks import check_tensor
from pixelss._dtype import promote
from pixelss._labels import valid_pixels


def boundary_loss(boundary: Tensor, zones: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Return the cross-entropy of boundaries: half for either side's inside, and the boundaries' own.

    With p clamped to [1e-4, 1 - 1e-4], and means that divide by the count plus 1: half the mean of -log(1 - p) over
    sure background, half of that over sure foreground, and the mean of -log(p) sqrt(p) over boundaries; the square
    root, a weight, carries no gradient.

    Args:
        boundary: probability of a boundary, in [0, 1].
        zones: as `boundary_mask`: 0 background, 1 foreground, 2 and 3 boundaries; any other value is void.
        ignore_index: void too, even where it is a zone.

    Shape:
        (B, 1, h, w), (B, h, w) -> scalar; float32 for half precision.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device.

    Reference:
        Chen 2020, "Weakly Supervised Semantic Segmentation with Boundary Exploration", its boundary loss.

    Example:
        >>> import torch
        >>> boundary_loss(torch.full((1, 1, 1, 3), 0.5), torch.tensor([[[0, 2, 1]]]))
        tensor(0.5916)
    """
    B, _, h, w = check_tensor("boundary", boundary, "BChw", hint="One channel of probabilities.", C=1)
    check_tensor("zones", zones, "Bhw", kind="integer", like=boundary, B=B, h=h, w=w)
    zone, valid = valid_pixels(zones, 4, ignore_index)
    p = promote(boundary)[:, 0].clamp(1e-4, 1 - 1e-4)

    def mean(values: Tensor, where: Tensor) -> Tensor:
        where = where & valid
        return values.where(where, 0).sum() / (where.sum() + 1)

    outside = -(1 - p).log()
    weighted = -p.log() * p.detach().sqrt()
    return mean(outside, zone == 0) / 2 + mean(outside, zone == 1) / 2 + mean(weighted, zone >= 2)
