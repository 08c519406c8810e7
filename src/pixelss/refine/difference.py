"""Merge by difference (SSDD): of two label maps, at each pixel the one whose difference is the harder to foresee."""

from __future__ import annotations

import torch
from torch import Tensor

from pixelss._checks import check_count, check_number, check_tensor
from pixelss._dtype import promote
from pixelss._labels import class_maps, valid_pixels

_HINT = "Two label maps of the same images, before and after."


def lost_classes(
    knowledge: Tensor, advice: Tensor, num_classes: int, *, share: float = 0.5, ignore_index: int = 255
) -> Tensor:
    """Return the classes that shrink to less than `share` of their area from one label map to the next, a CRF's say.

    Where they lie does not matter. The background counts as a class; one that `knowledge` lacks has lost nothing.

    Args:
        knowledge: label map in 0..N, before; `ignore_index` and values out of range are void, and no class has them.
        advice: after.
        num_classes: foreground classes N.
        share: of its area that must be left to a class, in [0, 1].
        ignore_index: void in both.

    Shape:
        (B, H, W), (B, H, W) -> (B, K) bool.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; a setting out of range.

    Reference:
        Shimoda 2019, "Self-Supervised Difference Detection", the flags of its code.

    Example:
        >>> lost_classes(torch.tensor([[[0, 1, 1, 1]]]), torch.tensor([[[0, 0, 0, 1]]]), 2)
        tensor([[False,  True, False]])
    """
    B, H, W = check_tensor("knowledge", knowledge, "BHW", kind="integer")
    check_tensor("advice", advice, "BHW", kind="integer", like=knowledge, hint=_HINT, B=B, H=H, W=W)
    check_count("num_classes", num_classes)
    check_number("share", share, low=0, high=1)

    def areas(mask: Tensor) -> Tensor:
        label, valid = valid_pixels(mask, num_classes + 1, ignore_index)
        return (class_maps(label, num_classes + 1) & valid[:, None]).sum((2, 3)).double()  # (B, K)

    return areas(advice) < share * areas(knowledge)


def merge_by_difference(
    knowledge: Tensor,
    advice: Tensor,
    knowledge_logits: Tensor,
    advice_logits: Tensor,
    flags: Tensor | None = None,
    *,
    bias: float = 0.4,
    background: float = 0.0,
) -> Tensor:
    """Return the advice where sigmoid(d_knowledge) - sigmoid(d_advice) + `bias` is not negative, else the knowledge.

    Before it is compared, `background` is taken off where the knowledge is background and put on where the advice is;
    and 1 is taken off where the knowledge is a flagged class, and put on where the advice is one.

    Args:
        knowledge: label map before a refinement.
        advice: label map after it. Labels are returned as they are, void ones too.
        knowledge_logits: of how likely the two differ, told from the knowledge; finite.
        advice_logits: the same, told from the advice.
        flags: None, or the classes that the advice has lost, from `lost_classes`; flagged where > 0.
        bias: in favour of the advice, in [-1, 1].
        background: in favour of the background, in whichever map it is, in [-1, 1].

    Shape:
        (B, H, W), (B, H, W), (B, 1, H, W), (B, 1, H, W), (B, K) -> (B, H, W) int64.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; a setting out of range.

    Reference:
        Shimoda 2019, "Self-Supervised Difference Detection", as its code does it.

    Example:
        >>> knowledge, advice = torch.tensor([[[1, 1, 1]]]), torch.tensor([[[0, 0, 2]]])
        >>> logits = torch.tensor([[[[2.0, -2.0, 0.0]]]])
        >>> merge_by_difference(knowledge, advice, logits, -logits)
        tensor([[[0, 1, 2]]])
    """
    B, H, W = check_tensor("knowledge", knowledge, "BHW", kind="integer")
    check_tensor("advice", advice, "BHW", kind="integer", like=knowledge, hint=_HINT, B=B, H=H, W=W)
    for name, logits in (("knowledge_logits", knowledge_logits), ("advice_logits", advice_logits)):
        hint = "One channel, at the masks' size."
        check_tensor(name, logits, "BCHW", like=knowledge, hint=hint, B=B, C=1, H=H, W=W)
    if flags is not None:
        check_tensor("flags", flags, "BK", kind="any", like=knowledge, hint="As lost_classes gives them.", B=B)
    for name, value in (("bias", bias), ("background", background)):
        check_number(name, value, low=-1, high=1)
    knowledge, advice = knowledge.long(), advice.long()
    foreseen = [promote(logits)[:, 0].sigmoid() for logits in (knowledge_logits, advice_logits)]
    weight = foreseen[0] - foreseen[1] + bias
    weight = weight - background * (knowledge == 0) + background * (advice == 0)
    if flags is not None:
        weight = weight - _flagged(knowledge, flags) + _flagged(advice, flags)
    return torch.where(weight >= 0, advice, knowledge)


def _flagged(mask: Tensor, flags: Tensor) -> Tensor:
    """Return 1 where a pixel's class is flagged, else 0; a label that is no class is none."""
    label, valid = valid_pixels(mask, flags.shape[1], -1)
    return ((flags > 0).gather(1, label.flatten(1)).view_as(label) & valid).int()
