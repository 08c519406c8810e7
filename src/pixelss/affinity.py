"""AffinityNet: affinities of neighbouring cells, and the labels and the loss to learn them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import elu

from pixelss._checks import check_count, check_integer, check_tensor
from pixelss._pairs import pair_offsets, shifted
from pixelss._resize import promote

_DIFFERENT, _BACKGROUND, _FOREGROUND, _IGNORED = 0, 1, 2, 255


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
        Ahn and Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly Supervised
        Semantic Segmentation", CVPR 2018, section 3.2.

    Example:
        >>> head = AffinityHead((8, 16), dims=(4, 6))
        >>> head([torch.rand(2, 8, 14, 14), torch.rand(2, 16, 14, 14)]).shape
        torch.Size([2, 34, 14, 14])
    """

    def __init__(
        self,
        in_channels: Sequence[int] = (512, 1024, 4096),
        *,
        dims: Sequence[int] = (64, 128, 256),
        radius: int = 5,
    ) -> None:
        super().__init__()
        _check_channels("in_channels", in_channels)
        _check_channels("dims", dims)
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
        if not isinstance(taps, Sequence):
            raise TypeError(f"taps must be a sequence of tensors, one a layer, but is of type {type(taps).__name__}.")
        if len(taps) != len(self.reduce):
            raise ValueError(f"taps must hold {len(self.reduce)} tensors, as in_channels, but holds {len(taps)}.")
        like, hint = self.mix.weight, "Taps share one size, and their channels are in_channels."
        sizes: dict[str, int] = {}
        for i, (tap, C) in enumerate(zip(taps, self.in_channels, strict=True)):
            B, _, h, w = check_tensor(f"taps[{i}]", tap, "BChw", kind="floating", like=like, hint=hint, C=C, **sizes)
            sizes = {"B": B, "h": h, "w": w}
        reduced = [elu(conv(tap)) for tap, conv in zip(taps, self.reduce, strict=True)]
        features = promote(elu(self.mix(torch.cat(reduced, 1))))
        # The distance to infinity is infinite, its affinity 0. |a - b| as max - min: autograd then keeps the
        # two views, and not their difference for every offset.
        partners = shifted(features, self.offsets, outside=float("inf"))
        largest = torch.stack([torch.maximum(features, partner).mean(1) for partner in partners], 1)
        smallest = torch.stack([torch.minimum(features, partner).mean(1) for partner in partners], 1)
        return (smallest - largest).exp()

    def extra_repr(self) -> str:
        """Return the number of offsets for the module's repr."""
        return f"offsets={len(self.offsets)}"


def _check_channels(name: str, channels: Sequence[int]) -> None:
    if not isinstance(channels, Sequence) or len(channels) == 0:
        raise TypeError(f"{name} must be a sequence of one int or more, one a tap, but is {channels!r}.")
    for i, count in enumerate(channels):
        check_count(f"{name}[{i}]", count)


def affinity_labels(low: Tensor, high: Tensor, *, radius: int = 5, ignore_index: int = 255) -> Tensor:
    """Return whether the cells of every pair show the same class, from two label maps of different caution.

    A cell is background where `high` says so, else of the foreground class of `low`, else unknown.

    Args:
        low: label map whose foreground is reliable: the CRF's result with the low alpha of the background score.
        high: label map whose background is reliable: the CRF's result with the high alpha.
        radius: of `pair_offsets`.
        ignore_index: the maps' void value, not 0; negative values are void too.

    Shape:
        (B, h, w), (B, h, w) -> (B, O, h, w) int64: 0 different, 1 both background, 2 the same foreground class,
        255 (whatever `ignore_index`) where a cell is unknown or outside the image.

    Raises:
        TypeError, ValueError: maps of another rank, size, dtype kind or device; a setting out of range.

    Reference:
        Ahn and Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly Supervised
        Semantic Segmentation", CVPR 2018, section 3.2.

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
    cells = low.where((low > 0) & (low != ignore_index), -1).where(high != 0, 0)
    partners = torch.stack(shifted(cells, pair_offsets(radius), outside=-1), 1)
    cells = cells[:, None]
    same = (cells > 0).long() * (_FOREGROUND - _BACKGROUND) + _BACKGROUND
    labels = same.where(cells == partners, _DIFFERENT)
    return labels.where((cells >= 0) & (partners >= 0), _IGNORED)


def affinity_loss(affinity: Tensor, labels: Tensor) -> Tensor:
    """Return AffinityNet's loss: background / 4 + foreground / 4 + different / 2.

    Each is the mean over its pairs of -log(p + 1e-5), or of -log(1 - p + 1e-5) for different; a kind without a pair
    gives 0 on the graph.

    Args:
        affinity: as `AffinityHead`, in [0, 1].
        labels: as `affinity_labels`; values other than 0, 1 and 2 are ignored.

    Shape:
        (B, O, h, w), (B, O, h, w) -> scalar; float32 for half-precision input.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device.

    Reference:
        Ahn and Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly Supervised
        Semantic Segmentation", CVPR 2018, section 3.2.

    Example:
        >>> affinity_loss(torch.ones(1, 34, 5, 5), torch.full((1, 34, 5, 5), 2)).abs() < 1e-4
        tensor(True)
    """
    B, O, h, w = check_tensor("affinity", affinity, "BOhw")  # noqa: E741
    hint = "Build both with the same radius."
    check_tensor("labels", labels, "BOhw", kind="integer", like=affinity, hint=hint, B=B, O=O, h=h, w=w)
    p = promote(affinity)

    def mean(kind: int) -> Tensor:
        pairs = labels == kind
        agreement = (1 - p if kind == _DIFFERENT else p).where(pairs, 1)
        return -(agreement + 1e-5).log().where(pairs, 0).sum() / pairs.sum().clamp(min=1)

    return mean(_BACKGROUND) / 4 + mean(_FOREGROUND) / 4 + mean(_DIFFERENT) / 2
