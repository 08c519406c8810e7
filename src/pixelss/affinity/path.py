"""IRNet's affinity: two cells belong together unless a boundary lies on the path between them."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from pixelss._checks import check_tensor
from pixelss._dtype import promote
from pixelss._pairs import Offsets, pair_offsets, shifted


def path_affinity(boundary: Tensor, *, radius: int = 5) -> Tensor:
    """Return 1 - the largest boundary on the path between the cells of every pair.

    The path holds the cells of the pair's bounding box that lie less than 1 from the straight line between the two,
    ends included. Outside the map is boundary: affinity 0.

    Args:
        boundary: probability that a cell lies on a boundary between classes, in [0, 1].
        radius: of `pair_offsets`; IRNet trains with 10 and walks with 5.

    Shape:
        (B, 1, h, w) -> (B, O, h, w): entry o at cell p is the affinity of p and p + pair_offsets(radius)[o], as
        `affinity_loss` and `random_walk` take it; float32 for half precision. IRNet walks with scores times
        (1 - boundary), beta 10, 2^8 steps.

    Raises:
        TypeError, ValueError: a boundary of another rank or dtype; `radius` out of range.

    Reference:
        Ahn 2019, "Weakly Supervised Learning of Instance Segmentation", its affinity.

    Example:
        >>> boundary = torch.tensor([[[[0.0, 0.1, 0.9, 0.0]]]])
        >>> path_affinity(boundary, radius=2)[0, 0, 0]  # with the cell to the right
        tensor([0.9000, 0.1000, 0.1000, 0.0000])
    """
    offsets = pair_offsets(radius)
    check_tensor("boundary", boundary, "BChw", hint="One channel: take its sigmoid if it holds logits.", C=1)
    paths = [_path(dy, dx) for dy, dx in offsets]
    cells = tuple(product(range(radius), range(1 - radius, radius)))  # of all paths
    at = dict(zip(cells, shifted(promote(boundary)[:, 0], cells, outside=1.0), strict=True))
    # The maximum's index is kept for the gradient, not the path's cells.
    return torch.stack([1 - torch.stack([at[cell] for cell in path]).max(0).values for path in paths], 1)


def _path(dy: int, dx: int) -> Offsets:
    """Return the cells between (0, 0) and (dy, dx), both included."""
    rows, columns = range(dy + 1), range(min(0, dx), max(0, dx) + 1)
    return tuple((y, x) for y, x in product(rows, columns) if (dy * x - dx * y) ** 2 < dy**2 + dx**2)
