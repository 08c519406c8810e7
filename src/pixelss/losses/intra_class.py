"""Discrimination within a class (ICD): a classifier of pixels learns the sure signs of scores along a direction."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from pixelss._checks import TAGS_HINT, check_number, check_tensor
from pixelss._dtype import activation


def intra_class_loss(logits: Tensor, scores: Tensor, tags: Tensor, *, threshold: float = 0.2) -> Tensor:
    """Return the cross-entropy of pixels' logits against [score > 0], of present classes where the score is sure.

    A positive score is sure where it exceeds `threshold` of its map's highest, a negative one where it is below
    `threshold` of the lowest. Other pixels count as nothing, and the sum is divided by all pixels and images.

    Args:
        logits: of a classifier of pixels, one a class; a non-finite one counts as 0.
        scores: signed, as `IntraClassDirection` gives; they carry no gradient, and a non-finite one counts as 0.
        tags: image-level labels, multi-hot of any dtype.
        threshold: of a map's extremes, in [0, 1).

    Shape:
        (B, N, h, w), (B, N, h, w), (B, N) -> scalar: sum / (B h w); zero on the graph where nothing is sure.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; `threshold` out of range.

    Reference:
        Fan 2020, "Intra-Class Discriminator", its top-down branch.

    Example:
        >>> logits, scores = torch.zeros(1, 1, 1, 4), torch.tensor([[[[2.0, 0.1, -0.1, -5.0]]]])
        >>> intra_class_loss(logits, scores, torch.ones(1, 1))  # log 2 at two pixels of four
        tensor(0.3466)
    """
    B, N, h, w = check_tensor("logits", logits, "BNhw")
    hint = "Resize the scores to the logits, or the other way."
    check_tensor("scores", scores, "BNhw", like=logits, hint=hint, B=B, N=N, h=h, w=w)
    check_tensor("tags", tags, "BN", kind="any", like=logits, hint=TAGS_HINT, B=B, N=N)
    check_number("threshold", threshold, low=0, high=1 - torch.finfo(torch.float32).eps)
    logits, scores = activation(logits), activation(scores.detach())
    highest, lowest = (side.relu().amax((-2, -1), keepdim=True) for side in (scores, -scores))
    sure = scores.abs() > threshold * torch.where(scores > 0, highest, lowest)
    target = (scores > 0).to(logits.dtype)
    loss = binary_cross_entropy_with_logits(logits, target, reduction="none")
    return loss.where(sure & (tags > 0)[:, :, None, None], 0).sum() / (max(1, B) * h * w)
