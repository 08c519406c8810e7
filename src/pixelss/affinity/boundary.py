"""IRNet's boundary head: where one class ends and another begins, seen in the taps of any network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pixelss._checks import check_count, check_sequence, check_tensor
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
        Ahn 2019, "Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations", section 3.1.

    Example:
        >>> head = BoundaryHead((8, 16), dim=4)
        >>> head([torch.rand(2, 8, 14, 16), torch.rand(2, 16, 7, 8)]).shape
        torch.Size([2, 1, 14, 16])
    """

    def __init__(self, in_channels: Sequence[int], *, dim: int = 32) -> None:
        super().__init__()
        check_sequence("in_channels", in_channels, "ints, one a tap")
        for i, count in enumerate(in_channels):
            check_count(f"in_channels[{i}]", count)
        check_count("dim", dim)
        if dim % 4:
            raise ValueError(f"dim must be a multiple of 4, the groups of the norms, but is {dim}.")
        self.in_channels = tuple(in_channels)
        reduced = [nn.Sequential(nn.Conv2d(count, dim, 1, bias=False), nn.GroupNorm(4, dim)) for count in in_channels]
        self.reduce = nn.ModuleList(reduced)
        self.join = nn.Conv2d(dim * len(reduced), 1, 1)

    def forward(self, taps: Sequence[Tensor]) -> Tensor:
        """Map the backbone's taps to boundary logits."""
        check_sequence("taps", taps, "tensors, one a layer")
        if len(taps) != len(self.reduce):
            raise ValueError(f"taps must hold {len(self.reduce)} tensors, as in_channels, but holds {len(taps)}.")
        hint = "Its channels are in_channels."
        B, _, _, _ = check_tensor("taps[0]", taps[0], "BChw", like=self.join.weight, hint=hint)
        for i, (tap, C) in enumerate(zip(taps, self.in_channels, strict=True)):
            check_tensor(f"taps[{i}]", tap, "BChw", like=self.join.weight, hint=hint, B=B, C=C)
        finest = max((tap.shape[-2:] for tap in taps), key=lambda size: size[0] * size[1])
        size = finest[0], finest[1]
        maps = [resize(layer(tap.detach()), size).relu() for tap, layer in zip(taps, self.reduce, strict=True)]
        return promote(self.join(torch.cat(maps, 1).to(self.join.weight.dtype)))
