"""Pixels counted over two label maps at once, and what every metric checks and computes of such counts."""

from __future__ import annotations

import torch
from torch import Tensor


def joint_counts(target: Tensor, num_classes: int, ignore_index: int, index: Tensor, size: int) -> tuple[Tensor, bool]:
    """Return the pixels of each class of `target` and each `index` in 0..size - 1, (K, size), and if an index is wrong.

    Void is left out. All is counted in one pass, with rows and columns of its own for what is out of range: picking the
    valid pixels first takes five times as long. Raises on a wrong target.
    """
    K = num_classes
    target, index = _signed(target), _signed(index)
    row = target.clamp(-1, K).int().masked_fill_(target == ignore_index, K + 1)  # -1..K + 1; clamped: a cast may wrap
    column = index.clamp(-1, size).int()  # -1..size
    cell = (row + 1).mul_(size + 2).add_(column).add_(1)
    table = torch.bincount(cell.flatten(), minlength=(K + 3) * (size + 2)).view(K + 3, size + 2)
    counted = table[1 : K + 1]
    wrong_target, wrong_index = torch.stack([table[[0, K + 1]].sum(), counted[:, [0, -1]].sum()]).tolist()
    if wrong_target:
        bad = (target != ignore_index) & ((target < 0) | (target >= K))
        wanted = f"classes in 0..{K - 1} or ignore_index={ignore_index}"
        hint = "num_classes counts the background. Is the value void? Pass it as ignore_index. Decode a colour mask."
        raise wrong_value("target", target[bad], wanted, hint)
    return counted[:, 1:-1], wrong_index > 0


def _signed(x: Tensor) -> Tensor:
    """Return integers in a type that holds -1 beside 255."""
    if x.dtype in (torch.int32, torch.int64):
        return x
    return x.int() if x.dtype.itemsize < 4 else x.long()


def union(counts: Tensor) -> Tensor:
    """Return TP + FP + FN of every class, (..., K), of confusion matrices (..., K, K)."""
    return counts.sum(-2) + counts.sum(-1) - counts.diagonal(dim1=-2, dim2=-1)


def errors(counts: Tensor, axis: int) -> Tensor:
    """Return false positives (axis 0) or false negatives (axis 1) of every class, as shares of the union."""
    return (counts.sum(axis) - counts.diagonal()) / union(counts)


def rates(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return IoU, precision and recall of every class, (..., K), of confusion matrices (..., K, K): rows the target."""
    counts = counts.double()
    hits = counts.diagonal(dim1=-2, dim2=-1)
    return hits / union(counts), hits / counts.sum(-2), hits / counts.sum(-1)


def wrong_value(name: str, values: Tensor, wanted: str, hint: str) -> ValueError:
    return ValueError(f"{name} must hold {wanted}, but holds {values[0].item()}. {hint}")
