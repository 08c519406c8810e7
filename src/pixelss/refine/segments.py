"""Segments vote (SEPL): a pseudo-label takes the shapes of SAM's masks or of super-pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from pixelss._checks import check_count, check_number, check_tensor
from pixelss._labels import valid_pixels


def vote_segments(
    mask: Tensor,
    segments: Tensor,
    num_classes: int,
    *,
    share: float = 0.5,
    cover: float = 0.85,
    ignore_index: int = 255,
) -> Tensor:
    """Return the mask whose classes take whole segments: those that are mostly theirs, or that hold most of them.

    For each class n in turn: of the segments that no earlier class took, those are taken of which more than `share` is
    of class n, or which hold at least `cover` of its pixels. The class is then their union, and its own pixels that no
    segment not taken earlier covers. A later class goes before an earlier one.

    Args:
        mask: label map in 0..N; `ignore_index` and values out of range are void, and stay so outside of taken segments.
        segments: an index map, 0 or less for none, or one boolean map a segment, which may overlap.
        num_classes: foreground classes N.
        share: of a segment, in [0, 1].
        cover: of a class, in [0, 1].
        ignore_index: the mask's void value.

    Shape:
        (B, H, W), (B, H, W) integer or (B, P, H, W) bool -> (B, H, W) int64; P may be 0.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; a setting out of range.

    Reference:
        Chen 2023, "Segment Anything Model Enhanced Pseudo Labels", section 3.

    Example:
        >>> mask = torch.tensor([[[1, 1, 0, 0, 2]]])
        >>> vote_segments(mask, torch.tensor([[[7, 7, 7, 4, 4]]]), num_classes=2)
        tensor([[[1, 1, 1, 2, 2]]])
    """
    B, H, W = check_tensor("mask", mask, "BHW", kind="integer")
    if isinstance(segments, Tensor) and segments.ndim == 4:
        check_tensor("segments", segments, "BPHW", kind="bool", like=mask, B=B, H=H, W=W)
    else:
        hint = "An index map (B, H, W), or booleans (B, P, H, W)."
        check_tensor("segments", segments, "BHW", kind="integer", like=mask, hint=hint, B=B, H=H, W=W)
    check_count("num_classes", num_classes)
    check_number("share", share, low=0, high=1)
    check_number("cover", cover, low=0, high=1)
    label, valid = valid_pixels(mask, num_classes + 1, ignore_index)
    results = [_vote(*one, num_classes, share, cover) for one in zip(label, segments, strict=True)]
    voted = torch.stack(results) if results else label
    return voted.where(valid | (voted > 0), ignore_index)


def _vote(label: Tensor, segments: Tensor, num_classes: int, share: float, cover: float) -> Tensor:
    if segments.ndim == 2:
        ids = segments.unique()
        segments = segments == ids[ids > 0][:, None, None]
    flat = segments.flatten(1)  # (P, HW)
    sizes, free = flat.sum(1), torch.ones(len(flat), dtype=torch.bool, device=label.device)
    voted = torch.zeros_like(label).flatten()
    for n in range(1, num_classes + 1):
        own = label.flatten() == n
        shared = (flat & own).sum(1)
        taken = free & (own.sum() > 0) & ((shared > share * sizes) | (shared >= cover * own.sum()))
        won, covered = ((flat & chosen[:, None]).any(0) for chosen in (taken, free))  # flat[chosen] would wait
        voted = voted.masked_fill(won | (own & ~covered), n)
        free = free & ~taken
    return voted.view_as(label)
