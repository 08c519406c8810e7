"""Contrasts of a vision transformer's tokens: patches (ToCo), class tokens (MCTformer+), affinities (AFA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from pixelss._checks import TAGS_HINT, check_count, check_integer, check_positive, check_tensor
from pixelss._dtype import full_precision, promote
from pixelss._labels import mean_over
from pixelss._pieces import entries_at_a_time


def patch_token_contrast(features: Tensor, mask: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Return how unlike the tokens of one class are, and how alike those of different classes, by |cos|.

    With S_pq = |cos(x_p, x_q)| over the pairs p != q of one image whose cells are not void, and means over all images'
    pairs that divide by their number plus 1: half of 1 - the mean of S over pairs of one class, plus half the mean over
    the others. A batch without a pair of one class has no first half.

    Args:
        features: patch tokens as a map.
        mask: label map at the tokens' size; `ignore_index` and negative values are void, the background is a class.
        ignore_index: the mask's void value.

    Shape:
        (B, D, h, w), (B, h, w) -> scalar; float32 for half precision. The pairs of one image are held at a time, on a
        GPU those of 2^24 entries, and none for the backward pass; there is no second derivative.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device.

    Reference:
        Ru 2023, "Token Contrast for Weakly-Supervised Semantic Segmentation", its patch token contrast.

    Example:
        >>> features = torch.tensor([[[[1.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]]]])
        >>> patch_token_contrast(features, torch.tensor([[[1, 1, 0]]]))
        tensor(0.1667)
    """
    B, _, h, w = check_tensor("features", features, "BDhw")
    check_tensor("mask", mask, "Bhw", kind="integer", like=features, hint="One class a token.", B=B, h=h, w=w)
    check_integer("ignore_index", ignore_index)
    cells = mask.long().flatten(1)
    cells = cells.masked_fill(cells == ignore_index, -1)  # negative: void
    loss: Tensor = _PatchContrast.apply(promote(features).flatten(2), cells)
    return loss


class _PatchContrast(torch.autograd.Function):
    """The loss; its gradient is computed piece by piece from the tokens, which are all that waits for it."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, cells: Tensor) -> Tensor:
        taken = ~torch.eye(cells.shape[1], dtype=torch.bool, device=cells.device)
        tally = features.new_zeros(2, 2)
        with full_precision(features):
            for tokens, some in zip(_pieces(features, cells), _pieces(cells, cells), strict=True):
                x, _ = _unit(tokens)
                tally += _tally((x.mT @ x).abs_(), some, taken)
        scales = _scales(tally)
        ctx.save_for_backward(features, cells, taken, scales)
        return (tally[0] * scales).sum() + (tally[1, 0] > 0) * 0.5

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]  # what is saved is a constant to autograd
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        features, cells, taken, scales = ctx.saved_tensors
        gradient = torch.empty_like(features)
        with full_precision(features):
            for tokens, some, out in zip(*(_pieces(x, cells) for x in (features, cells, gradient)), strict=True):
                x, length = _unit(tokens)
                slope = x @ _weigh((x.mT @ x).sign_(), some, taken, scales * (2 * grads[0]))  # symmetric: p, q and q, p
                along = (x * slope).sum(1, keepdim=True)
                out.copy_(slope.addcmul_(x, along, value=-1).div_(length))  # of a zero token: 0, as its slope
        return gradient, None


def _pieces(x: Tensor, cells: Tensor) -> tuple[Tensor, ...]:
    """Return `x` (B, ...) in pieces of as many images as have their pairs of cells (B, P) worked on at a time."""
    pieces: tuple[Tensor, ...] = x.split(max(1, entries_at_a_time(x) // max(1, cells.shape[1] ** 2)))
    return pieces


def _unit(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return images' tokens (n, D, P) at length 1, and their lengths."""
    length = tokens.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return tokens / length, length


def _tally(values: Tensor, cells: Tensor, taken: Tensor) -> Tensor:
    """Return the sums of the pairs' values (n, P, P) and their numbers, (2, 2): of one class, and of different ones."""
    same, both = _pairs_of(cells, taken)
    kinds = same, both.logical_xor_(same)
    sums = [values.where(kind, 0).sum() for kind in kinds]  # a pair that does not count may hold anything
    return torch.stack([*sums, *(kind.sum().to(values.dtype) for kind in kinds)]).view(2, 2)


def _scales(tally: Tensor) -> Tensor:
    """Return what a pair of one class and another pair count in a loss, (2,): all images share the means."""
    scales = 0.5 / (tally[1] + 1)
    scales[0].neg_()
    return scales


def _weigh(values: Tensor, cells: Tensor, taken: Tensor, scales: Tensor) -> Tensor:
    """Multiply in place every pair's value (n, P, P) by what the pair counts."""
    same, both = _pairs_of(cells, taken)
    return values.mul_(torch.where(same, scales[0], scales[1])).masked_fill_(~both, 0)


def _pairs_of(cells: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
    """Return which of the pairs taken of images' cells (n, P) are of one class, and which count, (n, P, P) each."""
    valid = cells >= 0
    both = (valid[:, :, None] & valid[:, None]).logical_and_(taken)
    return (cells[:, :, None] == cells[:, None]).logical_and_(both), both


def class_token_contrast(tokens: Tensor, tags: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return the cross-entropy that tells every class token of an image from the others, over the present classes.

    Args:
        tokens: class tokens of every layer that takes part.
        tags: image-level labels, multi-hot of any dtype.
        temperature: that cosines are divided by.

    Shape:
        (L, B, N, D), (B, N) -> scalar: the mean over an image's present classes, then over images and layers.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; `temperature` out of range.

    Reference:
        Xu 2023, "MCTformer+: Multi-Class Token Transformer", its contrastive-class-token module.

    Example:
        >>> class_token_contrast(torch.eye(3).view(1, 1, 3, 3), torch.tensor([[1, 0, 1]]))
        tensor(0.5514)
    """
    _, B, N, _ = check_tensor("tokens", tokens, "LBND")
    check_tensor("tags", tags, "BN", kind="any", like=tokens, hint=TAGS_HINT, B=B, N=N)
    check_positive("temperature", temperature)
    x = normalize(promote(tokens), dim=-1)
    with full_precision(x):
        cosine = x @ x.mT / temperature  # (L, B, N, N)
    loss = -cosine.log_softmax(-1).diagonal(dim1=-2, dim2=-1)  # (L, B, N)
    means = mean_over(loss, tags > 0, dim=-1)  # (L, B)
    return means.sum() / max(1, means.numel())


def token_affinity_loss(affinity: Tensor, mask: Tensor, *, radius: int = 8, ignore_index: int = 255) -> Tensor:
    """Return half the mean of 1 - p over pairs of one class, and half that of p over others, within a square.

    A cell makes a pair with itself too; means are over the pairs of all images, and divide by their number plus 1.

    Args:
        affinity: of every two cells of an image, in [0, 1].
        mask: label map at the cells' size; `ignore_index` and negative values are void, the background is a class.
        radius: pairs with |dy| and |dx| up to it count.
        ignore_index: the mask's void value.

    Shape:
        (B, P, P), (B, h, w), P = h w -> scalar; float32 for half precision. No pairs are held for the backward pass;
        there is no second derivative.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; `radius` out of range.

    Reference:
        Ru 2022, "Learning Affinity from Attention", its affinity loss.

    Example:
        >>> affinity = torch.tensor([[[1.0, 0.5], [0.5, 1.0]]])
        >>> token_affinity_loss(affinity, torch.tensor([[[1, 0]]]))
        tensor(0.1667)
    """
    B, h, w = check_tensor("mask", mask, "Bhw", kind="integer")
    hint = "A row and a column a cell of the mask."
    check_tensor("affinity", affinity, "BPQ", like=mask, hint=hint, B=B, P=h * w, Q=h * w)
    check_count("radius", radius)
    check_integer("ignore_index", ignore_index)
    cells = mask.long().flatten(1)
    cells = cells.masked_fill(cells == ignore_index, -1)
    y, x = (torch.arange(side, device=mask.device) for side in (h, w))
    near_y, near_x = ((side[:, None] - side).abs() <= radius for side in (y, x))
    near = (near_y[:, None, :, None] & near_x[:, None]).view(h * w, h * w)
    loss: Tensor = _TokenAffinity.apply(promote(affinity), cells, near)
    return loss


class _TokenAffinity(torch.autograd.Function):
    """The loss, linear in the affinities; its gradient is written piece by piece, and no pairs wait for it."""

    @staticmethod
    def forward(ctx: Any, affinity: Tensor, cells: Tensor, near: Tensor) -> Tensor:
        tally = affinity.new_zeros(2, 2)
        for p, some in zip(_pieces(affinity, cells), _pieces(cells, cells), strict=True):
            tally += _tally(p, some, near)
        scales = _scales(tally)
        ctx.save_for_backward(cells, near, scales)
        return (tally[0] * scales).sum() - tally[1, 0] * scales[0]  # the ones of 1 - p

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]  # what is saved is a constant to autograd
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cells, near, scales = ctx.saved_tensors
        gradient = scales.new_ones(len(cells), *near.shape)
        for out, some in zip(_pieces(gradient, cells), _pieces(cells, cells), strict=True):
            _weigh(out, some, near, scales * grads[0])
        return gradient, None, None
