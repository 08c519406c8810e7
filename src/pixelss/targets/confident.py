"""Confident mask (IRN): of two label maps, one sure of its foreground and one of its background, a third."""

from __future__ import annotations

from torch import Tensor

from pixelss._checks import check_integer, check_tensor
from pixelss._maps import confident


def confident_mask(foreground: Tensor, background: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Return the class where `foreground` shows one, 0 where both label maps are 0, else void.

    So do IRN, AFA and ToCo. PSA and RRM differ where `foreground` shows a class and `background` is 0: there the
    background wins, `mask.where(background != 0, 0)`. Where `foreground` is void so is the result, if it holds
    `ignore_index` or a negative value there: another one is taken for a class. Void in `background` is not background.

    Args:
        foreground: label map whose classes are to be trusted: of a high threshold (or a low alpha).
        background: label map whose background is to be trusted: of a low threshold (or a high alpha).
        ignore_index: void value of the result; take one that is no class.

    Shape:
        (B, H, W), (B, H, W) -> (B, H, W) int64.

    Raises:
        TypeError, ValueError: label maps of another rank, size, dtype kind or device.

    Reference:
        Ahn 2019, "Weakly Supervised Learning of Instance Segmentation".

    Example:
        >>> import torch
        >>> high, low = torch.tensor([[[2, 0, 0]]]), torch.tensor([[[2, 1, 0]]])
        >>> confident_mask(high, low)
        tensor([[[  2, 255,   0]]])
    """
    B, H, W = check_tensor("foreground", foreground, "BHW", kind="integer")
    check_tensor("background", background, "BHW", kind="integer", like=foreground, B=B, H=H, W=W)
    check_integer("ignore_index", ignore_index)
    return confident(foreground, background, ignore_index)
