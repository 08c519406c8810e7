"""Segment contrast (S2C): every pixel is nearer to its own segment than to the image's others, whatever the class."""

from __future__ import annotations

import torch
from einops import einsum
from torch import Tensor

from pixelss._checks import check_choice, check_positive, check_tensor
from pixelss._dtype import full_precision, promote
from pixelss._resize import resize_matrix
from pixelss.losses.contrastive import regional_contrastive_loss, resized_square_norm


def segment_contrast(
    features: Tensor, segments: Tensor, *, temperature: float = 0.5, background: bool = False
) -> Tensor:
    """Return the contrastive loss of pixels against the mean directions of the segments of their image.

    Features are compared as if resized to the segments' size and normalised, but no resized feature is stored. The
    segments' means carry no gradient. Counting the segments of each image waits for the device.

    Args:
        features: pixel features, of any size against the segments'.
        segments: an index map, of SAM or of super-pixels; 0 and less is unsegmented and never a target.
        temperature: that cosines are divided by.
        background: True keeps the mean of the unsegmented among those that a pixel is compared with, as published.

    Shape:
        (B, D, h, w), (B, H, W) -> scalar: the mean over the batch's pixels within segments; float32 for half precision.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; `temperature` out of range.

    Reference:
        Kweon 2024, "From SAM to CAMs", its SAM-segment contrasting.

    Example:
        >>> features = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
        >>> segment_contrast(features, torch.tensor([[[1, 2]]]), temperature=1.0)
        tensor(0.3133)
    """
    B, _, _, _ = check_tensor("features", features, "BDhw")
    check_tensor("segments", segments, "BHW", kind="integer", like=features, B=B)
    check_positive("temperature", temperature)
    check_choice("background", background, (True, False))
    features, index = promote(features), segments.long().clamp(min=0)
    total = features.sum() * 0
    for one, own in zip(features, index, strict=True):
        ids, own = own.unique(return_inverse=True)
        means = _directions(one.detach(), own, len(ids))
        target = own.where(ids[own] > 0, -1)
        filled = (ids > 0) | background
        total = total + regional_contrastive_loss(
            one[None], target[None], means, filled, temperature=temperature, reduction="sum", ignore_index=-1
        )
    return total / (index > 0).sum().clamp(min=1)


def _directions(x: Tensor, own: Tensor, count: int) -> Tensor:
    """Return the sum of the normalised resized features over every segment, (S, D), of one image's x (D, h, w)."""
    (_, h, w), (H, W) = x.shape, own.shape
    square = resized_square_norm(x[None], (H, W))[0]
    scale = torch.where(square > torch.finfo(x.dtype).eps ** 2, square, torch.inf).rsqrt()  # (H, W)
    rows, columns = resize_matrix(h, H, x), resize_matrix(w, W, x)
    sums = []
    with full_precision(x):
        for start in range(0, count, 64):  # so many maps at a time
            members = own == torch.arange(start, min(start + 64, count), device=x.device)[:, None, None]
            weights = rows.mT @ (members * scale) @ columns  # (S, h, w): pulled back to the features' cells
            sums.append(einsum(weights, x, "s h w, d h w -> s d"))
    return torch.cat(sums)
