"""Affinities from a vision transformer's attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pixelss._attention import joined_attention
from pixelss._checks import check_count, check_integer, check_tensor
from pixelss._dtype import full_precision, promote


def attention_affinity(
    attention: Tensor | Sequence[Tensor],
    *,
    skip: int = 1,
    layers: int | None = None,
    reduce: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Return the attention of patches to patches: heads averaged, layers averaged or added.

    Args:
        attention: of every layer, as `vit_attention` records it.
        skip: class and register tokens, which come first.
        layers: the last so many; None: all.
        reduce: "mean" over the layers, or "sum".

    Shape:
        (L, B, heads, T, T) -> (B, P, P), P = T - skip: row p is what patch p attends to; float32 for half precision.

    Raises:
        TypeError, ValueError: attention of another rank; a setting out of range.

    Reference:
        Xu 2022, "Multi-class Token Transformer", its patch affinity; Lin 2023, "CLIP is Also an Efficient Segmenter".

    Example:
        >>> attention_affinity(torch.rand(12, 2, 3, 197, 197).softmax(-1), layers=8).shape
        torch.Size([2, 196, 196])
    """
    joined = joined_attention(attention, layers=layers, reduce=reduce, hint="Of one head? Add an axis.")
    check_integer("skip", skip, low=0, high=joined.shape[-1] - 1)
    return joined[:, skip:, skip:]


def sinkhorn_affinity(affinity: Tensor, *, iterations: int = 3, power: int = 2) -> Tensor:
    """Return the affinity made nearly doubly stochastic, symmetric, and multiplied by itself.

    Args:
        affinity: positive, as `attention_affinity`.
        iterations: divisions by the sums of the columns, then by those of the rows.
        power: of the matrix at the end.

    Shape:
        (B, P, P) -> (B, P, P); float32 for half precision.

    Raises:
        TypeError, ValueError: an affinity of another rank; a setting out of range.

    Reference:
        Lin 2023, "CLIP is Also an Efficient Segmenter", its class-aware attention-based affinity.

    Example:
        >>> sinkhorn_affinity(torch.rand(1, 4, 4) + 0.1).sum(1).allclose(torch.ones(1, 4), atol=0.05)
        True
    """
    _, P, Q = check_tensor("affinity", affinity, "BPQ")
    if P != Q:
        raise ValueError(f"affinity must be square, but has shape {tuple(affinity.shape)}.")
    check_integer("iterations", iterations, low=0, high=1000)
    check_count("power", power)
    w = promote(affinity)
    for _ in range(iterations):
        w = w / w.sum(1, keepdim=True)
        w = w / w.sum(2, keepdim=True)
    w = (w + w.mT) / 2
    with full_precision(w):
        result: Tensor = torch.linalg.matrix_power(w, power)
    return result
