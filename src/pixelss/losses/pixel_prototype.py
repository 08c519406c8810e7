"""Pixel-to-prototype contrast (PPC): pixels of one view against the prototypes of both, as either view labels them."""

from __future__ import annotations

import torch
from torch import Tensor

from pixelss._checks import TAGS_HINT, check_number, check_sequence, check_tensor
from pixelss._dtype import activation
from pixelss._prototypes import score_prototypes
from pixelss.losses.contrastive import regional_contrastive_loss


def pixel_prototype_loss(
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    tags: Tensor,
    *,
    share: float = 0.125,
    background: float = 0.2,
    temperature: float = 0.1,
) -> Tensor:
    """Return how far the pixels of two views are from the prototypes of either view, labelled by either view.

    A view's labels y are its strongest present class where that exceeds `background`; its prototypes pt are those of
    `score_prototypes`, with the constant `background` as the score of class 0. Neither carries a gradient. With
    L(X, y, pt) = `regional_contrastive_loss`, and ' the other view, the loss is 0.1 times the sum of two means over
    the views: across prototypes, of L(X, y, pt'), and across labels, of L(X, y', pt).

    Args:
        first: features X and scores S of a view: its CAMs, normalised and refined where there is a refinement. A
            background that stands in front of them is not read; a non-finite score counts as 0.
        second: those of the other view, brought to the same size and place.
        tags: image-level labels, multi-hot of any dtype. They mask the labels alone: pixels are compared with the
            prototype of a class without a tag too, unless its scores are zero.
        share: of an image's cells that make a prototype, in (0, 1].
        background: the background's score everywhere, in (0, 1].
        temperature: that cosines are divided by.

    Shape:
        ((B, D, h, w), (B, N, h, w) or (B, K, h, w)) twice, (B, N) -> scalar; zero on the graph of an empty batch.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; a view that is no pair; a setting
            out of range.

    Reference:
        Du 2022, "Pixel-to-Prototype Contrast", its cross-view terms.

    Example:
        >>> features, scores = torch.rand(2, 2, 8, 4, 4), torch.rand(2, 2, 3, 4, 4)
        >>> first, second = zip(features, scores)
        >>> pixel_prototype_loss(first, second, torch.tensor([[1, 0, 0], [0, 1, 1]])).shape
        torch.Size([])
    """
    limits = torch.finfo(torch.float32)
    check_number("background", background, low=limits.tiny, high=1)
    check_number("temperature", temperature, low=limits.eps, high=limits.max)
    sizes: dict[str, int] = {}
    targets = []
    for name, view in (("first", first), ("second", second)):
        check_sequence(name, view, "two tensors, features and scores")
        if len(view) != 2:
            raise ValueError(f"{name} must be a pair (features, scores), but has {len(view)} entries.")
        features, scores = view
        hint = "Features and scores of both views share their cells: resize them to one size."
        B, D, h, w = check_tensor(f"{name}[0]", features, "BDhw", kind="floating", like=first[0], hint=hint, **sizes)
        sizes = {"B": B, "D": D, "h": h, "w": w}
        _, N = check_tensor("tags", tags, "BN", kind="any", like=features, hint=TAGS_HINT, B=B)
        _, channels, _, _ = check_tensor(f"{name}[1]", scores, "BKhw", like=features, hint=hint, B=B, h=h, w=w)
        if channels not in (N, N + 1):
            raise ValueError(f"{name}[1] must hold {N} maps, as tags do, or {N + 1}, but holds {channels}. {TAGS_HINT}")
        targets.append(_labels_and_prototypes(features, scores[:, -N:], tags, share, background))

    def contrast(features: Tensor, labels_of: int, prototypes_of: int) -> Tensor:
        labels, (prototypes, filled) = targets[labels_of][0], targets[prototypes_of][1]
        # nothing is void: 255, the default, may be a class
        return regional_contrastive_loss(features, labels, prototypes, filled, temperature=temperature, ignore_index=-1)

    across_prototypes = contrast(first[0], 0, 1) + contrast(second[0], 1, 0)
    across_labels = contrast(first[0], 1, 0) + contrast(second[0], 0, 1)
    return 0.1 * (across_prototypes + across_labels) / 2


def _labels_and_prototypes(
    features: Tensor, scores: Tensor, tags: Tensor, share: float, background: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the label map (B, h, w) of a view, and its prototypes with which of them are filled."""
    scores = activation(scores.detach())
    constant = torch.full_like(scores[:, :1], background)
    strongest, index = scores.where((tags > 0)[:, :, None, None], 0).max(1)
    labels = torch.where(strongest > background, index + 1, 0)
    return labels, score_prototypes(features, torch.cat([constant, scores], 1), share=share)
