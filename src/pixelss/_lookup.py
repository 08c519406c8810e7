"""The strongest class of every pixel and the thresholds below it, on a CPU a vector of pixels at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_CELLS = 1024  # of equal width, in which thresholds are looked up


def strongest_class(cam: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maximum over the classes of CAMs (B, N, H, W) and the lowest class that has it, (B, H, W) each."""
    if cam.device.type != "cpu":
        return cam.max(1)
    B, N, H, W = cam.shape
    columns = cam.reshape(B, N, 1, H * W).permute(0, 3, 1, 2)  # pixels as channels, last in memory
    # Its code for channels that lie last works on a vector of pixels at a time, that of max on one: nine times as long.
    values, classes = nn.functional.max_pool2d(columns, (N, 1), return_indices=True)
    return values.view(B, H, W), classes.view(B, H, W)


def below(thresholds: Tensor, values: Tensor) -> Tensor:
    """Return how many of the ascending thresholds lie below each value, int32 of the values' shape."""
    if values.device.type == "cpu":
        cells = _cells(thresholds)
        counts = torch.bincount(cells, minlength=_CELLS)
        if counts.max() == 1:  # one comparison is left, a third of the time of a search for each value
            lower = (counts.cumsum(0) - counts).int()  # thresholds in the cells before
            edges = thresholds.new_full((_CELLS,), torch.inf).index_copy_(0, cells.long(), thresholds)
            place = _cells(values.flatten())
            return lower.index_select(0, place).add_(edges.index_select(0, place) < values.flatten()).view_as(values)
    return torch.searchsorted(thresholds, values, out_int32=True)


def _cells(x: Tensor) -> Tensor:
    """Return the cell of each number, int32: a larger number never lies in a cell before."""
    return (x * _CELLS).int().clamp_(0, _CELLS - 1)
