"""Difference loss (SSDD): foresee, from an image and a label map, where a refinement changes the map."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from pixelss._checks import check_tensor
from pixelss._dtype import promote
from pixelss._labels import mean_over, valid_pixels


def difference_loss(logits: Tensor, knowledge: Tensor, advice: Tensor, flags: Tensor | None = None) -> Tensor:
    """Return the balanced binary cross-entropy of where two label maps differ, a mean over the images.

    Per image half the mean over the pixels where they are equal plus half that over those where they differ. A part
    without a pixel is 0, where the public code gives NaN. The logits are those of one side; call it for both.

    Args:
        logits: of "differs here", finite.
        knowledge: label map before a refinement; a pixel where either map is 255 or negative is void.
        advice: label map after it.
        flags: None, or `lost_classes` of the two: an image with a flag is left out, and so is one that is all void.
            With flags, K is known: labels from K on are void then, and 255 is a class if there are so many.

    Shape:
        (B, 1, h, w), (B, h, w), (B, h, w), (B, K) -> scalar; float32 for half precision.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device.

    Reference:
        Shimoda 2019, "Self-Supervised Difference Detection", as its code does it.

    Example:
        >>> import torch
        >>> knowledge, advice = torch.tensor([[[0, 1, 1]]]), torch.tensor([[[0, 1, 0]]])
        >>> difference_loss(torch.tensor([[[[-2.0, -2.0, 2.0]]]]), knowledge, advice)
        tensor(0.1269)
    """
    B, _, h, w = check_tensor("logits", logits, "BChw", hint="One channel: differs here.", C=1)
    for name, mask in (("knowledge", knowledge), ("advice", advice)):
        check_tensor(name, mask, "Bhw", kind="integer", like=logits, hint="Resize it to the logits.", B=B, h=h, w=w)
    if flags is not None:
        check_tensor("flags", flags, "BK", kind="any", like=logits, hint="As lost_classes gives them.", B=B)
    K = 255 if flags is None else flags.shape[1]
    (before, known), (after, advised) = (valid_pixels(mask, K, -1) for mask in (knowledge, advice))
    valid, differ = known & advised, before != after
    z = promote(logits)[:, 0]
    loss = binary_cross_entropy_with_logits(z, differ.to(z.dtype), reduction="none")
    equal, other = (mean_over(loss, part, (1, 2)) for part in (valid & ~differ, valid & differ))  # (B,) each
    counted = valid.any(2).any(1)
    if flags is not None:
        counted = counted & ~(flags > 0).any(1)
    return mean_over((equal + other) / 2, counted)
