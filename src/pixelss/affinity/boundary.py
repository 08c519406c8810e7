"""IRNet's boundary head: where one class ends and another begins, seen in the taps of any network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pixelss._checks import check_count, check_counts, check_taps
from pixelss._dtype import promote
from pixelss._resize import resize


class BoundaryHead(nn.Module):
    """Boundary logits at the size of the finest tap: relu(norm(1x1 convolution)) of every tap, joined by a 1x1 one.

    Taps are taken as they are: no gradient reaches the backbone. The sigmoid of the logits is the boundary that
    `path_affinity` takes.

    Args:
        in_channels: channels of every tap.
        dim: channels that every tap is reduced to, a multiple of 4, for group norms of 4 groups.

    Shape:
        One (B, C_i, *, *) a tap -> (B, 1, h, w), float32 for half precision; h x w is the largest tap's.

    Raises:
        TypeError, ValueError: channel counts that are no positive ints, a `dim` that 4 does not divide; taps of another
            number, rank, channel count or device.

    Reference:
        Ahn 2019, "Weakly Supervised Learning of Instance Segmentation", its class boundaries.

    Example:
        >>> head = BoundaryHead((8, 16), dim=4)
        >>> head([torch.rand(2, 8, 14, 16), torch.rand(2, 16, 7, 8)]).shape
        torch.Size([2, 1, 14, 16])
    """

    if TYPE_CHECKING:  # nn.Module's own call says Any
        __call__: Callable[..., Tensor]

    def __init__(self, in_channels: Sequence[int], *, dim: int = 32) -> None:
        super().__init__()
        check_counts("in_channels", in_channels, "ints, one a tap")
        check_count("dim", dim)
        if dim % 4:
            raise ValueError(f"dim must be a multiple of 4, the groups of the norms, but is {dim}.")
        self.in_channels = tuple(in_channels)
        reduced = [nn.Sequential(nn.Conv2d(count, dim, 1, bias=False), nn.GroupNorm(4, dim)) for count in in_channels]
        self.reduce = nn.ModuleList(reduced)
        self.join = nn.Conv2d(dim * len(reduced), 1, 1)

    def forward(self, taps: Sequence[Tensor]) -> Tensor:
        """Map the backbone's taps to boundary logits."""
        hint = "Its channels are in_channels."
        check_taps(taps, self.in_channels, shared="B", like=self.join.weight, hint=hint)
        finest = max((tap.shape[-2:] for tap in taps), key=lambda size: size[0] * size[1])
        size = finest[0], finest[1]
        maps = [resize(layer(tap.detach()), size).relu() for tap, layer in zip(taps, self.reduce, strict=True)]
        return promote(self.join(torch.cat(maps, 1).to(self.join.weight.dtype)))
