"""Centroids (IRNet): where every cell's displacement leads in the end, the middle of its object."""

from __future__ import annotations

import torch
from torch import Tensor

from pixelss._checks import check_integer, check_tensor
from pixelss._dtype import activation


@torch.no_grad()
def centroids(displacement: Tensor, *, iterations: int = 300) -> Tensor:
    """Return the cell that every cell arrives at when it follows the displacement again and again.

    Each step adds the displacement at the place reached, bilinearly sampled, and stays on the map.

    Args:
        displacement: in cells, (dy, dx); a non-finite one counts as none.
        iterations: steps.

    Shape:
        (B, 2, h, w) -> (B, 2, h, w) int64, (y, x).

    Raises:
        TypeError, ValueError: a displacement of another rank; `iterations` out of range.

    Reference:
        Ahn 2019, "Weakly Supervised Learning of Instance Segmentation", its centroids.

    Example:
        >>> to_the_left = torch.zeros(1, 2, 1, 4)
        >>> to_the_left[:, 1] = -1
        >>> centroids(to_the_left)[0, 1]
        tensor([[0, 0, 0, 0]])
    """
    B, _, h, w = check_tensor("displacement", displacement, "BChw", hint="Two channels, dy and dx.", C=2)
    check_integer("iterations", iterations, low=0, high=100_000)
    d = activation(displacement).flatten(2)  # (B, 2, hw)
    rows, columns = (torch.arange(side, dtype=d.dtype, device=d.device) for side in (h, w))
    y, x = (grid.flatten().expand(B, h * w) for grid in torch.meshgrid(rows, columns, indexing="ij"))

    def at(y: Tensor, x: Tensor) -> Tensor:
        cell = (y * w + x).long()
        return d.gather(2, cell[:, None].expand(B, 2, -1))

    for _ in range(iterations):
        top, left = y.floor(), x.floor()
        bottom, right = y.ceil(), x.ceil()
        down, along = (y - top)[:, None], (x - left)[:, None]
        above = at(top, left) * (1 - along) + at(top, right) * along
        below = at(bottom, left) * (1 - along) + at(bottom, right) * along
        step = above * (1 - down) + below * down  # (B, 2, hw)
        y, x = (y + step[:, 0]).clamp(0, h - 1), (x + step[:, 1]).clamp(0, w - 1)
    return torch.stack([y, x], 1).round().long().view(B, 2, h, w)
