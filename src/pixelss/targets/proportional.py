"""Proportional mask (PMM): where objects overlap, a pixel goes to the class of which it is the larger part."""

from __future__ import annotations

import torch
from torch import Tensor

from pixelss._checks import TAGS_HINT, check_tensor
from pixelss._dtype import activation


def proportional_mask(cam: Tensor, foreground: Tensor, tags: Tensor) -> Tensor:
    """Return the mask of classes that each claim a foreground: a pixel goes to the largest share of what is claimed.

    A pixel's share in class n is cam_n / (1 + the sum of cam_n over the foreground of n), so a small object goes before
    a large one. Only present classes claim; ties go to the lowest index. What no class claims is background, and so is
    a pixel where the CAMs of all that claim it are 0, as in the public code.

    Args:
        cam: normalised CAMs, before any smoothing; a non-finite or negative value counts as no activation.
        foreground: what each class claims, for instance where a CRF of it and the background gives it more than 0.5.
        tags: image-level labels, multi-hot of any dtype.

    Shape:
        (B, N, H, W), (B, N, H, W) bool, (B, N) -> (B, H, W) int64 with values 0 (background) to N.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device.

    Reference:
        Li 2021, "Pseudo-mask Matters", its proportional pseudo-mask generation.

    Example:
        >>> cam = torch.tensor([[[[1.0, 0.9, 0.9, 0.0]], [[0.0, 0.0, 0.6, 0.0]]]])  # 0.9 / 3.8 < 0.6 / 1.6
        >>> proportional_mask(cam, cam > 0.5, torch.ones(1, 2))
        tensor([[[1, 1, 2, 0]]])
    """
    B, N, H, W = check_tensor("cam", cam, "BNHW")
    check_tensor("foreground", foreground, "BNHW", kind="bool", like=cam, hint="One a class.", B=B, N=N, H=H, W=W)
    check_tensor("tags", tags, "BN", kind="any", like=cam, hint=TAGS_HINT, B=B, N=N)
    claimed = foreground & (tags > 0)[:, :, None, None]
    cam = activation(cam).relu().where(claimed, 0)
    share, index = (cam / (1 + cam.sum((2, 3), keepdim=True))).max(1)
    return torch.where(share > 0, index + 1, 0)
