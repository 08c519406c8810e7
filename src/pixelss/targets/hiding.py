"""Complementary patches (CPN): what one image of a pair hides, the other shows."""

from __future__ import annotations

import torch
from torch import Tensor

from pixelss._checks import check_count, check_number, check_tensor
from pixelss._random import uniform


def complementary_pair(
    images: Tensor, *, share: float = 0.5, patch: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return images with some patches of a grid kept, the same with the others kept, and the share kept in the first.

    Every patch of every image is kept with probability `share`, whatever the others are. What is hidden is 0, in
    normalised images the mean colour; both results add up to the images.

    Args:
        images: normalised images; the gradient reaches them.
        share: probability of keeping a patch in the first result, in [0, 1].
        patch: side of a patch in pixels, the same whatever the images' size; the last ones are cut at the border.
        generator: of the draws, on any device; None: torch's own.

    Shape:
        (B, C, H, W) -> (B, C, H, W), (B, C, H, W), (B,): the share of the pixels, float32 for half-precision images.

    Raises:
        TypeError, ValueError: images of another rank or dtype kind; a setting out of range; another generator
            than torch's.

    Reference:
        Zhang 2021, "Complementary Patch for Weakly Supervised Semantic Segmentation", its CP pair.

    Example:
        >>> images = torch.arange(1.0, 9.0).view(1, 1, 1, 8)
        >>> kept, hidden, share = complementary_pair(images, patch=4, generator=torch.Generator().manual_seed(0))
        >>> kept[0, 0, 0], hidden[0, 0, 0], share
        (tensor([1., 2., 3., 4., 0., 0., 0., 0.]), tensor([0., 0., 0., 0., 5., 6., 7., 8.]), tensor([0.5000]))
    """
    B, _, H, W = check_tensor("images", images, "BCHW")
    check_number("share", share, low=0, high=1)
    check_count("patch", patch)
    grid = uniform(B, -(-H // patch), -(-W // patch), like=images, generator=generator) < share
    rows, columns = (torch.arange(side, device=images.device) // patch for side in (H, W))
    keep = grid[:, rows][:, :, columns][:, None]  # (B, 1, H, W)
    share_kept = keep.to(torch.promote_types(images.dtype, torch.float32)).mean((1, 2, 3))
    return images.where(keep, 0), images.where(~keep, 0), share_kept
