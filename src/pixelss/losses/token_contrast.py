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
        (B, D, h, w), (B, h, w) -> scalar; float32 for half precision. The pairs of one image are held at a time, and
        none for the backward pass; there is no second derivative.

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
    """The loss; its gradient is computed image by image from the tokens, which are all that waits for it."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, cells: Tensor) -> Tensor:
        taken = ~torch.eye(cells.shape[1], dtype=torch.bool, device=cells.device)
        scales = _scales(cells, taken, features)
        total = features.new_zeros(())
        with full_precision(features):
            for tokens, one in zip(features, cells, strict=True):
                x, _ = _unit(tokens)
                total = total + ((x.mT @ x).abs() * _weights(one, taken, scales)).sum()
        ctx.save_for_backward(features, cells, taken, scales)
        return total + torch.where(scales[2] > 0, 0.5, 0.0).to(features.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]  # what is saved is a constant to autograd
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        features, cells, taken, scales = ctx.saved_tensors
        gradient = torch.zeros_like(features)
        with full_precision(features):
            for b, one in enumerate(cells):
                x, length = _unit(features[b])
                signs = (x.mT @ x).sign_().mul_(_weights(one, taken, scales))
                slope = 2 * grads[0] * (x @ signs)  # symmetric: p, q and q, p
                gradient[b] = (slope - x * (x * slope).sum(0)) / length  # of a zero token: 0, as its slope
        return gradient, None


def _unit(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return an image's tokens (D, P) at length 1, and their lengths."""
    length = tokens.norm(dim=0).clamp(min=1e-12)
    return tokens / length, length


def _scales(cells: Tensor, taken: Tensor, like: Tensor) -> Tensor:
    """Return what a pair of one class and another pair count in a loss, and how many the first are: (3,).

    Counted over all images first, which share the means.
    """
    same_pairs, other_pairs = like.new_zeros(()), like.new_zeros(())
    for one in cells:
        same, both = _pairs_of(one, taken)
        same_pairs, other_pairs = same_pairs + same.sum(), other_pairs + (both & ~same).sum()
    return torch.stack([-1 / (same_pairs + 1) / 2, 1 / (other_pairs + 1) / 2, same_pairs])


def _weights(cells: Tensor, taken: Tensor, scales: Tensor) -> Tensor:
    """Return what every pair of an image counts in a loss, (P, P)."""
    same, both = _pairs_of(cells, taken)
    return torch.where(same, scales[0], torch.where(both, scales[1], torch.zeros_like(scales[1])))


def _pairs_of(cells: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
    """Return which of the pairs taken of an image's cells (P,) are of one class, and which count, (P, P) each."""
    valid = cells >= 0
    both = valid[:, None] & valid & taken
    return both & (cells[:, None] == cells), both


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
    rows, columns = (torch.arange(side, device=mask.device) for side in (h, w))
    y, x = (grid.flatten() for grid in torch.meshgrid(rows, columns, indexing="ij"))
    near = ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)
    loss: Tensor = _TokenAffinity.apply(promote(affinity), cells, near)
    return loss


class _TokenAffinity(torch.autograd.Function):
    """The loss, linear in the affinities; its gradient is written image by image, and no pairs wait for it."""

    @staticmethod
    def forward(ctx: Any, affinity: Tensor, cells: Tensor, near: Tensor) -> Tensor:
        scales = _scales(cells, near, affinity)
        total = -scales[0] * scales[2]  # the ones of 1 - p
        for p, one in zip(affinity, cells, strict=True):
            weights = _weights(one, near, scales)
            total = total + (p * weights).where(weights != 0, 0).sum()  # a pair that does not count may hold anything
        ctx.save_for_backward(cells, near, scales)
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]  # what is saved is a constant to autograd
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cells, near, scales = ctx.saved_tensors
        gradient = scales.new_empty(len(cells), *near.shape)
        for b, one in enumerate(cells):
            gradient[b] = _weights(one, near, scales) * grads[0]
        return gradient, None, None
