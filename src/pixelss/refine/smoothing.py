"""Smoothing by variation (PMM): a CAM is lifted the more, the more unevenly it is spread."""

from __future__ import annotations

import torch
from torch import Tensor

from pixelss._checks import check_number, check_tensor
from pixelss._dtype import activation
from pixelss._labels import mean_over


def variation_smoothing(cam: Tensor, *, threshold: float = 0.05, strength: float = 0.3) -> Tensor:
    """Return CAMs to the power 1 - c, with c = `strength` * std / mean of a map's values above `threshold`.

    Values below the threshold become 0, and so does a map without a value above it. Where c would be more than 1 it is
    1: every value that stays is then 1. A non-finite value counts as no activation.

    Args:
        cam: normalised CAMs in [0, 1]; a map of zeros, as of an absent class, stays one.
        threshold: of the values that count, in [0, 1].
        strength: share of the coefficient of variation; 0 changes nothing above the threshold.

    Shape:
        (B, N, H, W) -> (B, N, H, W); float32 for half precision. The gradient flows through c too.

    Raises:
        TypeError, ValueError: CAMs of another rank or dtype kind; a setting out of range.

    Reference:
        Li 2021, "Pseudo-mask Matters", its coefficient of variation smoothing.

    Example:
        >>> variation_smoothing(torch.tensor([[[[1.0, 0.25, 0.25, 0.01]]]]))
        tensor([[[[1.0000, 0.3355, 0.3355, 0.0000]]]])
    """
    check_tensor("cam", cam, "BNHW")
    check_number("threshold", threshold, low=0, high=1)
    check_number("strength", strength, low=0, high=torch.finfo(torch.float32).max)
    cam = activation(cam)
    seen = cam > threshold
    mean = mean_over(cam, seen, (2, 3))[:, :, None, None]
    variance = mean_over((cam - mean).square(), seen, (2, 3))[:, :, None, None]
    uneven = variance > 0  # the root of 0 has no gradient
    deviation = variance.where(uneven, 1).sqrt().where(uneven, 0)
    variation = (strength * deviation / mean.where(mean > 0, 1)).clamp(max=1)
    kept = (cam >= threshold) & (cam > 0)
    return (cam.where(kept, 1) ** (1 - variation)).where(kept, 0)
