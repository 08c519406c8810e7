"""Displacement loss (IRNet): every cell points to the middle of its object."""

from __future__ import annotations

import torch
from torch import Tensor

from pixelss._checks import check_tensor
from pixelss._dtype import promote
from pixelss._pairs import BACKGROUND, FOREGROUND, pair_offsets, shifted


def displacement_loss(displacement: Tensor, labels: Tensor) -> Tensor:
    """Return half of the foreground's and half of the background's mean L1 distance over pairs and both directions.

    Two cells of one class differ in where they point by what lies between them, d(p) - d(p + o) = o; in the background
    they do not differ. Each mean is the sum divided by twice the pairs plus 1e-5.

    Args:
        displacement: in cells, (dy, dx).
        labels: as `affinity_labels`, whose radius is told by their number; only codes 1 and 2 count.

    Shape:
        (B, 2, h, w), (B, O, h, w) -> scalar; float32 for half precision.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; an O of no radius.

    Reference:
        Ahn 2019, "Weakly Supervised Learning of Instance Segmentation", its displacement field.

    Example:
        >>> to_the_left = torch.stack([torch.zeros(1, 4), -torch.arange(4.0)[None]])[None]  # dy, dx
        >>> labels = torch.tensor([[2, 255, 255, 255]] * 4).view(1, 4, 1, 4)  # a pair of one object, to the right
        >>> labels[:, 1:] = 255
        >>> displacement_loss(to_the_left, labels)
        tensor(0.)
    """
    B, _, h, w = check_tensor("displacement", displacement, "BChw", hint="Two channels, dy and dx.", C=2)
    _, O, _, _ = check_tensor("labels", labels, "BOhw", kind="integer", like=displacement, B=B, h=h, w=w)  # noqa: E741
    offsets = next((found for r in range(2, 65) if len(found := pair_offsets(r)) >= O), ())
    if len(offsets) != O:
        raise ValueError(
            f"labels must have as many offsets as a radius gives, but have {O}. Build them by affinity_labels."
        )
    d = promote(displacement)
    difference = torch.stack([d - partner for partner in shifted(d, offsets, outside=0)], 1)  # (B, O, 2, h, w)
    # Filled, for a tensor copied to the device would wait for it.
    between = torch.stack([torch.stack([d.new_full((1, 1), v) for v in o]) for o in offsets])  # (O, 2, 1, 1)

    def mean(distance: Tensor, pairs: Tensor) -> Tensor:
        return distance.sum(2).where(pairs, 0).sum() / (2 * pairs.sum() + 1e-5)

    foreground = mean((difference - between).abs(), labels == FOREGROUND)
    background = mean(difference.abs(), labels == BACKGROUND)
    return (foreground + background) / 2
