"""Cross-entropy of a segmentation network trained at several scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pixelss._checks import check_choice, check_maps, check_number, check_tensor
from pixelss._dtype import promote
from pixelss._labels import mean_over, valid_pixels
from pixelss._resize import resize


def multi_scale_cross_entropy(logits: Sequence[Tensor], mask: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Return the sum of the cross-entropies of every scale's logits and of their element-wise maximum.

    Each map is bilinearly resized to the mask's size; each term is the mean over the valid pixels. For scales 1, .75
    and .5 that is CE(1) + CE(.75) + CE(.5) + CE(max); for a single map, plain cross-entropy.

    Args:
        logits: one map a training scale, of any size, finite.
        mask: pseudo-labels in 0..N; `ignore_index` and values out of range are void.
        ignore_index: the mask's void value.

    Shape:
        One (B, K, *, *) a scale, (B, H, W) -> scalar; float32 for half precision, zero on the graph if all is void.

    Raises:
        TypeError, ValueError: no map, maps or a mask of another rank, size, dtype kind or device.

    Reference:
        Chen 2016, "Attention to Scale", section 3, with the maximum over scales in place of the attention.

    Example:
        >>> logits = [torch.zeros(2, 21, side, side) for side in (41, 31, 21)]
        >>> multi_scale_cross_entropy(logits, torch.randint(0, 21, (2, 321, 321)))  # 4 log(21)
        tensor(12.1781)
    """
    hint = "Scales share the images and the classes, background included."
    B, K, _, _ = check_maps("logits", logits, "BKhw", shared="BK", hint=hint)
    _, H, W = check_tensor("mask", mask, "BHW", kind="integer", like=logits[0], B=B)

    maps = [resize(one, (H, W)) for one in logits]
    if len(maps) > 1:
        maps.append(torch.stack(maps).amax(0))
    label, valid = valid_pixels(mask, K, ignore_index)
    # nll_loss has no deterministic kernel on CUDA, gather has.
    log_p = torch.stack([one.log_softmax(1).gather(1, label[:, None]).squeeze(1) for one in maps]).sum(0)
    return mean_over(-log_p, valid)


def balanced_cross_entropy(logits: Tensor, mask: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Return the mean cross-entropy of the background's pixels plus that of the foreground's.

    A part without a pixel is 0, where the public codes give NaN. Halve it for ToCo's and AFA's.

    Args:
        logits: of every class, the background first, finite.
        mask: label map in 0..N; `ignore_index` and values out of range are void.
        ignore_index: the mask's void value.

    Shape:
        (B, K, H, W), (B, H, W) -> scalar; float32 for half precision.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device.

    Reference:
        Zhang 2020, "Reliability Does Matter", its joint loss.

    Example:
        >>> logits = torch.zeros(1, 2, 1, 4)
        >>> balanced_cross_entropy(logits, torch.tensor([[[0, 0, 0, 1]]]))  # 2 log(2), however few show the class
        tensor(1.3863)
    """
    loss, label, valid = _pixel_losses(logits, mask, ignore_index)
    return mean_over(loss, valid & (label == 0)) + mean_over(loss, valid & (label > 0))


def underfit_cross_entropy(
    logits: Tensor,
    mask: Tensor,
    *,
    start: float = 0.5,
    limit: float = 0.5,
    kind: Literal["clamp", "pow", "ignore"] = "clamp",
    ignore_index: int = 255,
) -> Tensor:
    """Return the mean cross-entropy; once it is below `start`, that of losses that are kept from being large.

    Pixels that a network which fits the rest does not fit are likely to be labelled wrongly. With l the loss of a
    pixel: "clamp" takes min(l, `limit`), so that a larger one has no gradient; "pow" takes (l + 1e-9)^`limit`;
    "ignore" takes 0 where l is larger. Void pixels have l = 0 and count in every mean, as in the public code.

    Args:
        logits: of every class, the background first, finite.
        mask: pseudo-labels in 0..N; `ignore_index` and values out of range are void.
        start: mean loss below which it begins; 0 is never, and the result then plain cross-entropy.
        limit: the largest loss of a pixel that counts, or for "pow" the power.
        kind: what becomes of the loss of a pixel.
        ignore_index: the mask's void value.

    Shape:
        (B, K, H, W), (B, H, W) -> scalar; float32 for half precision, zero on the graph if all is void.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; a setting out of range.

    Reference:
        Li 2021, "Pseudo-mask Matters", its pretended under-fitting.

    Example:
        >>> logits = torch.tensor([[4.0, 4.0, 4.0, 0.0], [0.0, 0.0, 0.0, 4.0]]).view(1, 2, 1, 4)
        >>> mask = torch.tensor([[[0, 0, 1, 255]]])  # the third is wrong: losses 0.0181, 0.0181, 4.0181, 0
        >>> underfit_cross_entropy(logits, mask)  # their mean, which is above 0.5
        tensor(1.0136)
        >>> underfit_cross_entropy(logits, mask, start=2.0)
        tensor(0.1341)
    """
    check_choice("kind", kind, ("clamp", "pow", "ignore"))
    largest = torch.finfo(torch.float32).max
    for name, value in (("start", start), ("limit", limit)):
        check_number(name, value, low=0, high=largest)
    loss, _, valid = _pixel_losses(logits, mask, ignore_index)
    loss = loss.where(valid, 0)
    count = max(1, loss.numel())
    mean = loss.sum() / count
    begun = (mean < start) & valid.any()
    if kind == "clamp":
        spared = loss.clamp(max=limit)
    elif kind == "pow":
        spared = (loss.where(begun, 0) + 1e-9) ** limit  # a large loss would overflow
    else:
        spared = loss.where(loss <= limit, 0)
    return torch.where(begun, spared.sum() / count, mean)


def _pixel_losses(logits: Tensor, mask: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cross-entropy of every pixel, its label and whether it is valid; what is void counts as background."""
    B, K, H, W = check_tensor("logits", logits, "BKHW")
    check_tensor("mask", mask, "BHW", kind="integer", like=logits, hint="Resize the logits to it.", B=B, H=H, W=W)
    label, valid = valid_pixels(mask, K, ignore_index)
    loss = -promote(logits).log_softmax(1).gather(1, label[:, None]).squeeze(1)
    return loss, label, valid
