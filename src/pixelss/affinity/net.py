"""AffinityNet: the affinities of neighbouring cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import elu

from pixelss._checks import check_counts, check_taps
from pixelss._dtype import promote
from pixelss._pairs import pair_offsets, shifted


class AffinityHead(nn.Module):
    """The head of AffinityNet: exp(-mean |f_p - f_q|) over channels, for the cells p and q of every pair.

    f = elu(conv1x1(concatenation of elu(conv1x1(tap)) over the taps)); no biases. Features of pairs are never
    stored: training keeps (B, O, h, w), not (B, D, O, h, w).

    Args:
        in_channels: channels of every tap; those of `ResNet38.forward_taps` by default.
        dims: channels that every tap is reduced to; f has their sum.
        radius: of `pair_offsets`.

    Shape:
        One (B, C_i, h, w) a tap, all of one size -> (B, O, h, w) in [0, 1], float32 for half precision: entry o at
        cell p is the affinity of p and p + pair_offsets(radius)[o], 0 where that lies outside the image.

    Raises:
        TypeError, ValueError: channel counts that are no positive ints or not one a tap, `radius` out of range;
            taps of another number, rank, size, channel count or device.

    Reference:
        Ahn 2018, "Learning Pixel-level Semantic Affinity", section 3.2.

    Example:
        >>> head = AffinityHead((8, 16), dims=(4, 6))
        >>> head([torch.rand(2, 8, 14, 14), torch.rand(2, 16, 14, 14)]).shape
        torch.Size([2, 34, 14, 14])
    """

    if TYPE_CHECKING:  # nn.Module's own call says Any
        __call__: Callable[..., Tensor]

    def __init__(
        self,
        in_channels: Sequence[int] = (512, 1024, 4096),
        *,
        dims: Sequence[int] = (64, 128, 256),
        radius: int = 5,
    ) -> None:
        super().__init__()
        check_counts("in_channels", in_channels, "ints, one a tap")
        check_counts("dims", dims, "ints, one a tap")
        if len(dims) != len(in_channels):
            raise ValueError(
                f"dims must have one entry a tap, as in_channels with {len(in_channels)}, but has {len(dims)}."
            )
        self.offsets = pair_offsets(radius)
        self.in_channels = tuple(in_channels)
        convs = [nn.Conv2d(channels, dim, 1, bias=False) for channels, dim in zip(in_channels, dims, strict=True)]
        self.reduce = nn.ModuleList(convs)
        self.mix = nn.Conv2d(sum(dims), sum(dims), 1, bias=False)
        for conv in convs:
            nn.init.kaiming_normal_(conv.weight)
        nn.init.xavier_uniform_(self.mix.weight, gain=4)  # far apart at first: affinities near 1 learn slowly

    def forward(self, taps: Sequence[Tensor]) -> Tensor:
        """Map the backbone's taps to affinities."""
        hint = "Taps share one size, and their channels are in_channels."
        check_taps(taps, self.in_channels, shared="Bhw", like=self.mix.weight, hint=hint)
        reduced = [elu(conv(tap)) for tap, conv in zip(taps, self.reduce, strict=True)]
        features = promote(elu(self.mix(torch.cat(reduced, 1))))  # (B, D, h, w)
        # The distance to infinity is infinite, its affinity 0. |a - b| as max - min: autograd then keeps the
        # two views, and not their difference for every offset.
        partners = shifted(features, self.offsets, outside=float("inf"))
        largest = torch.stack([torch.maximum(features, partner).mean(1) for partner in partners], 1)
        smallest = torch.stack([torch.minimum(features, partner).mean(1) for partner in partners], 1)  # (B, O, h, w)
        return (smallest - largest).exp()

    def extra_repr(self) -> str:
        """Return the number of offsets for the module's repr."""
        return f"offsets={len(self.offsets)}"
