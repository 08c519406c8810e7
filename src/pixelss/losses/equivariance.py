"""Equivariance (SEAM): the CAMs of an image and of the same image transformed, transformed alike, are the same."""

from __future__ import annotations

import torch
from torch import Tensor

from pixelss._checks import TAGS_HINT, check_number, check_tensor
from pixelss._dtype import activation
from pixelss._maps import strongest_alone


def equivariance_loss(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean distance of two views' CAMs, brought to one size and place.

    Args:
        first: normalised CAMs of a view, zero for absent classes; a non-finite value counts as no activation.
        second: of the other view. The gradient reaches both.

    Shape:
        (B, N, h, w), (B, N, h, w) -> scalar: the mean over all entries, those of absent classes too.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device.

    Reference:
        Wang 2020, "Self-supervised Equivariant Attention Mechanism", its ER.

    Example:
        >>> equivariance_loss(torch.zeros(1, 2, 2, 2), torch.full((1, 2, 2, 2), 0.5))
        tensor(0.5000)
    """
    B, N, h, w = check_tensor("first", first, "BNhw")
    check_tensor("second", second, "BNhw", like=first, hint="Resize one to the other.", B=B, N=N, h=h, w=w)
    distance = (activation(first) - activation(second)).abs()
    return distance.sum() / max(1, distance.numel())


def cross_equivariance_loss(refined: Tensor, cam: Tensor, *, ratio: float = 0.2) -> Tensor:
    """Return how far refined CAMs of one view are from what the plain CAMs of the other say, where they differ most.

    The target has the background 1 - max_n cam_n, and of the foreground what equals the pixel's maximum; it carries no
    gradient. Of the K h w distances of an image the largest `ratio` counts, by their mean. Use it both ways.

    Args:
        refined: normalised refined CAMs of a view, background first, as `PixelCorrelation` refines them.
        cam: normalised CAMs of the other view, zero for absent classes.
        ratio: share of the distances that counts, in (0, 1].

    Shape:
        (B, K, h, w), (B, N, h, w) -> scalar.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; `ratio` out of range.

    Reference:
        Wang 2020, "Self-supervised Equivariant Attention Mechanism", its ECR.

    Example:
        >>> cam = torch.tensor([[[[0.75, 0.0]]]])
        >>> cross_equivariance_loss(torch.tensor([[[[0.25, 0.0]], [[0.75, 0.5]]]]), cam, ratio=0.25)
        tensor(1.)
    """
    B, N, h, w = check_tensor("cam", cam, "BNhw")
    hint = "One map a class and the background's, at the CAMs' size."
    check_tensor("refined", refined, "BKhw", like=cam, hint=hint, B=B, K=N + 1, h=h, w=w)
    check_number("ratio", ratio, low=torch.finfo(torch.float32).tiny, high=1)
    target = strongest_alone(activation(cam.detach()))
    distances = (target - activation(refined)).abs().flatten(1)  # (B, K h w)
    hardest = distances.topk(max(1, int(ratio * distances.shape[1])), dim=1).values
    return hardest.sum() / max(1, hardest.numel())


def min_pooling_loss(cam: Tensor, tags: Tensor, *, ratio: float = 0.25) -> Tensor:
    """Return the mean activation of the pixels that are activated least: every image has a background.

    Args:
        cam: raw CAMs, foreground alone.
        tags: image-level labels, multi-hot of any dtype.
        ratio: share of an image's pixels that should be background, in (0, 1].

    Shape:
        (B, N, H, W), (B, N) -> scalar: over each image the `ratio` smallest of max_n(cam_n tags_n), negative ones as 0.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; `ratio` out of range.

    Reference:
        Wang 2020, "Self-supervised Equivariant Attention Mechanism": its code, the paper has no such term.

    Example:
        >>> min_pooling_loss(torch.tensor([[[[4.0, 3.0, 2.0, 1.0]]]]), torch.ones(1, 1), ratio=0.5)
        tensor(1.5000)
    """
    B, N, _, _ = check_tensor("cam", cam, "BNHW")
    check_tensor("tags", tags, "BN", kind="any", like=cam, hint=TAGS_HINT, B=B, N=N)
    check_number("ratio", ratio, low=torch.finfo(torch.float32).tiny, high=1)
    present = activation(cam).where((tags > 0)[:, :, None, None], 0)
    strongest = present.amax(1).flatten(1)  # (B, H W)
    weakest = strongest.topk(max(1, int(ratio * strongest.shape[1])), dim=1, largest=False).values.relu()
    return weakest.sum() / max(1, weakest.numel())
