"""AffinityNet: affinities of neighbouring cells, labels and loss to learn them, the random walk that uses them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, embedding_bag, pad

from pixelss._checks import check_count, check_integer, check_number, check_tensor
from pixelss._resize import promote

Offsets = tuple[tuple[int, int], ...]

_DIFFERENT, _BACKGROUND, _FOREGROUND, _IGNORED = 0, 1, 2, 255


def pair_offsets(radius: int = 5) -> Offsets:
    """Return the offsets (dy, dx) from a cell to its partners: half a disc, so that every pair comes once.

    First (0, 1), ..., (0, radius - 1), then dy = 1, ..., radius - 1 with dx ascending; dx^2 + dy^2 < radius^2.

    Args:
        radius: in cells, 2 to 64; 5 gives 34 offsets.

    Raises:
        TypeError, ValueError: `radius` is no int or out of range.

    Reference:
        Ahn and Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly Supervised
        Semantic Segmentation", CVPR 2018, section 3.2.

    Example:
        >>> pair_offsets(2)
        ((0, 1), (1, -1), (1, 0), (1, 1))
        >>> len(pair_offsets(5))
        34
    """
    check_integer("radius", radius)
    check_number("radius", radius, low=2, high=64)
    half_plane = ((dy, dx) for dy in range(radius) for dx in range(1 - radius, radius) if dy > 0 or dx > 0)
    return tuple((dy, dx) for dy, dx in half_plane if dy**2 + dx**2 < radius**2)


def _shifted(x: Tensor, offsets: Offsets, *, outside: float) -> list[Tensor]:
    """Return one view of the padded (..., h, w) an offset: at cell p the value of x at p + offset."""
    h, w = x.shape[-2:]
    margin = max(abs(side) for offset in offsets for side in offset)
    padded = pad(x, 4 * [margin], value=outside)
    return [padded[..., margin + dy : margin + dy + h, margin + dx : margin + dx + w] for dy, dx in offsets]


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
        partners = _shifted(features, self.offsets, outside=float("inf"))
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
    partners = torch.stack(_shifted(cells, pair_offsets(radius), outside=-1), 1)
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


def random_walk(scores: Tensor, affinity: Tensor, *, beta: float = 8.0, log_steps: int = 8, radius: int = 5) -> Tensor:
    """Return scores @ T^(2^log_steps) for every image: scores spread to the cells that look alike.

    T holds affinity^beta of every pair in both directions and 1 on its diagonal, its columns divided by their sums:
    a result is a weighted mean of its map, and is kept between the map's minimum and maximum against rounding.

    T is never stored as a matrix of all cells, and few of the 2^log_steps products are computed: with the Chebyshev
    polynomials C_j, T^n = sum_j P(|S_n| = j) C_j(T), where S_n is a walk of n steps +-1, and terms below the
    dtype's precision are left out. At n = 256 that is 88 products in float32, 132 in float64. T is similar to a
    symmetric matrix with eigenvalues in [-1, 1], so the terms are bounded.

    Differentiable in both arguments, in float32 to about 1e-4; autograd keeps the scores of every product, at
    n = 256 88 times (B, K, h, w).

    Args:
        scores: class scores, with a background, finite.
        affinity: as `AffinityHead`, in [0, 1]; entries outside the image have no influence.
        beta: exponent > 0; a larger one leaves less between unlike cells.
        log_steps: logarithm to base 2 of the number of steps, 0 to 16.
        radius: of `pair_offsets`, the one that `affinity` was built with.

    Shape:
        (B, K, h, w), (B, O, h, w) -> (B, K, h, w); float32 for half-precision input.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; a setting out of range.

    Reference:
        Ahn and Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly Supervised
        Semantic Segmentation", CVPR 2018, section 3.3; Sachdeva and Vishnoi, "Faster Algorithms via Approximation
        Theory", 2014, chapter 3, for the powers.

    Example:
        >>> scores = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]])
        >>> affinity = torch.zeros(1, 4, 1, 4)
        >>> affinity[0, 0, 0] = torch.tensor([1.0, 0.0, 1.0, 0.0])  # the left two are alike, and the right two
        >>> random_walk(scores, affinity, radius=2)
        tensor([[[[0.5000, 0.5000, 0.0000, 0.0000]]]])
    """
    offsets = pair_offsets(radius)
    B, K, h, w = check_tensor("scores", scores, "BKhw", hint="One map a class, background included.")
    hint = f"radius={radius} has {len(offsets)} offsets; the size is that of the scores."
    check_tensor("affinity", affinity, "BOhw", like=scores, hint=hint, B=B, O=len(offsets), h=h, w=w)
    limits = torch.finfo(torch.float32)
    check_number("beta", beta, low=limits.eps, high=limits.max)
    check_integer("log_steps", log_steps)
    check_number("log_steps", log_steps, low=0, high=16)

    dtype = torch.promote_types(promote(scores).dtype, promote(affinity).dtype)
    scores = scores.to(dtype)
    # Columns are normalised in float64: many steps multiply what their sums lack to 1.
    sources, weights = _transition(affinity.double(), offsets, beta)
    weights = weights.to(dtype)

    def product(x: Tensor) -> Tensor:
        return embedding_bag(sources, x, per_sample_weights=weights, mode="sum")

    shares = _chebyshev_shares(2**log_steps, torch.finfo(dtype).eps)
    previous = scores.movedim(1, -1).reshape(B * h * w, K)
    current = product(previous)
    total = shares[0] * previous + shares[1] * current
    for share in shares[2:]:
        previous, current = current, 2 * product(current) - previous
        total = total.add(current, alpha=share) if share else total
    result = total.view(B, h, w, K).movedim(-1, 1)
    bounded = result.clamp(scores.amin((2, 3), keepdim=True), scores.amax((2, 3), keepdim=True))
    return result + (bounded - result).detach()  # the bound moves rounding only: the gradient goes past it


def _transition(affinity: Tensor, offsets: Offsets, beta: float) -> tuple[Tensor, Tensor]:
    """Return T by columns: of each cell of the batch the cells that it receives from, and their weights."""
    B, _, h, w = affinity.shape
    backward = tuple((-dy, -dx) for dy, dx in offsets)
    cells = torch.arange(h * w, device=affinity.device).view(h, w)
    partners = torch.stack([cells, *_shifted(cells, offsets + backward, outside=-1)])
    inside = partners >= 0
    sources = partners.where(inside, cells).flatten(1).T + h * w * torch.arange(B, device=cells.device)[:, None, None]

    own = inside[1 : 1 + len(offsets)]
    ahead = affinity.where(own, 1).pow(beta).where(own, 0)  # 1 and not 0: the gradient of a power at 0 may be infinite
    behind = [view[:, o] for o, view in enumerate(_shifted(ahead, backward, outside=0))]
    weights = torch.cat([torch.ones_like(ahead[:, :1]), ahead, torch.stack(behind, 1)], 1)
    weights = weights / weights.sum(1, keepdim=True)
    return sources.flatten(0, 1).contiguous(), weights.flatten(2).mT.flatten(0, 1).contiguous()


def _chebyshev_shares(steps: int, eps: float) -> list[float]:
    """Return P(|S| = j), j = 0, 1, ..., of a walk S of `steps` steps +-1, up to `eps` of the largest."""
    shares: list[float] = []
    binomial = 1.0  # in units of the middle one
    for j in range(steps % 2, steps + 1, 2):
        shares += [0.0] * (j - len(shares)) + [2 * binomial if j else binomial]
        behind = (steps - j) // 2
        binomial *= behind / (steps - behind + 1)
        if binomial < eps:
            break
    total = sum(shares)
    return [share / total for share in shares]
