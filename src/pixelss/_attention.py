"""A transformer's attention as recorded layer by layer: checked, and joined to one map of tokens by tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pixelss._checks import check_choice, check_integer, check_maps, check_sequence, check_tensor
from pixelss._dtype import promote


def joined_attention(
    attention: Tensor | Sequence[Tensor],
    *,
    layers: int | None,
    reduce: str,
    like: Tensor | None = None,
    hint: str = "",
    **sizes: int,
) -> Tensor:
    """Return the attention of the last `layers`, heads averaged, layers averaged or added; float32 for half precision.

    Args:
        attention: of every layer, (L, B, heads, T, T) or L of (B, heads, T, T).
        layers: the last so many; None: all.
        reduce: "mean" or "sum".
        like: a tensor whose device it must share.
        hint: the likely fix of a wrong size.
        **sizes: B and T where they are known.
    """
    if not isinstance(attention, Tensor):
        check_sequence("attention", attention, "tensors, one a layer")
        check_maps("attention", attention, "BATS", shared="BATS", like=like, hint=hint, **sizes)
        attention = torch.stack(list(attention))
    L, _, _, T, _ = check_tensor("attention", attention, "LBATS", kind="floating", like=like, hint=hint, **sizes)
    check_tensor("attention", attention, "LBATS", hint="Of every token to every other.", S=T)
    check_choice("reduce", reduce, ("mean", "sum"))
    if layers is not None:
        check_integer("layers", layers, low=1, high=L)
    last = promote(attention[L - (layers or L) :]).mean(2)  # (layers, B, T, T)
    return last.mean(0) if reduce == "mean" else last.sum(0)
