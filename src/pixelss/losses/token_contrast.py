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
        same_pairs, other_pairs = features.new_zeros(()), features.new_zeros(())
        for one in cells:  # counted first: the pairs of all images share a mean
            same, both = _pairs_of(one)
            same_pairs, other_pairs = same_pairs + same.sum(), other_pairs + (both & ~same).sum()
        total = features.new_zeros(())
        with full_precision(features):
            for tokens, one in zip(features, cells, strict=True):
                x, _ = _unit(tokens)
                total = total + ((x.mT @ x).abs() * _weights(one, same_pairs, other_pairs)).sum()
        ctx.save_for_backward(features, cells, same_pairs, other_pairs)
        return total + torch.where(same_pairs > 0, 0.5, 0.0).to(features.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]  # what is saved is a constant to autograd
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        features, cells, same_pairs, other_pairs = ctx.saved_tensors
        gradient = torch.zeros_like(features)
        with full_precision(features):
            for b, one in enumerate(cells):
                x, length = _unit(features[b])
                signs = (x.mT @ x).sign_().mul_(_weights(one, same_pairs, other_pairs))
                slope = 2 * grads[0] * (x @ signs)  # symmetric: p, q and q, p
                gradient[b] = (slope - x * (x * slope).sum(0)) / length  # of a zero token: 0, as its slope
        return gradient, None


def _unit(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return an image's tokens (D, P) at length 1, and their lengths."""
    length = tokens.norm(dim=0).clamp(min=1e-12)
    return tokens / length, length


def _weights(cells: Tensor, same_pairs: Tensor, other_pairs: Tensor) -> Tensor:
    """Return what every pair of an image counts in the loss, (P, P)."""
    same, both = _pairs_of(cells)
    zero = torch.zeros_like(same_pairs)
    return torch.where(same, -1 / (same_pairs + 1) / 2, torch.where(both, 1 / (other_pairs + 1) / 2, zero))


def _pairs_of(cells: Tensor) -> tuple[Tensor, Tensor]:
    """Return which pairs of an image's cells (P,) are of one class, and which count at all, (P, P) each."""
    valid = cells >= 0
    both = valid[:, None] & valid
    both = both & ~torch.eye(len(cells), dtype=torch.bool, device=cells.device)
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
        (B, P, P), (B, h, w), P = h w -> scalar; float32 for half precision.

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
    p = promote(affinity)
    sums: list[Tensor] = []
    for one, image in zip(cells, p.unbind(), strict=True):  # p[b] would have a gradient of all images for each
        valid = (one >= 0)[:, None] & (one >= 0) & near
        same = valid & (one[:, None] == one)
        other = valid & ~same
        parts = (1 - image).where(same, 0).sum(), same.sum(), image.where(other, 0).sum(), other.sum()
        sums.append(torch.stack([part.to(p.dtype) for part in parts]))
    alike, same_pairs, unlike, other_pairs = (torch.stack(sums).sum(0) if sums else p.sum().expand(4)).unbind()
    loss: Tensor = alike / (same_pairs + 1) / 2 + unlike / (other_pairs + 1) / 2
    return loss
