"""CAMs from class tokens (MCTformer): what each class token attends to, times the patches' own CAM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from pixelss._attention import joined_attention
from pixelss._checks import check_choice, check_tensor
from pixelss._dtype import activation


def class_token_cam(
    attention: Tensor | Sequence[Tensor],
    patch_cam: Tensor,
    *,
    layers: int = 3,
    reduce: Literal["sum", "mean"] = "sum",
    root: bool = False,
) -> Tensor:
    """Return m relu(P): the attention m of class tokens to patches, heads averaged, and the patches' CAM P.

    Args:
        attention: of every layer of a transformer with one class token a class, which come first.
        patch_cam: raw CAMs of the patch tokens; a non-finite value counts as no activation.
        layers: the last so many take part.
        reduce: "sum" over them as MCTformer-V2, or "mean" as MCTformer+.
        root: True takes the square root, as MCTformer+; its slope at 0 is infinite.

    Shape:
        (L, B, heads, T, T) with T = N + h w, (B, N, h, w) -> (B, N, h, w); float32 for half precision.

    Raises:
        TypeError, ValueError: arguments of another rank, size or device; a setting out of range.

    Reference:
        Xu 2022, "Multi-class Token Transformer", its fused maps; Xu 2023, "MCTformer+: Multi-Class Token Transformer".

    Example:
        >>> import torch
        >>> attention = torch.rand(12, 1, 3, 20 + 196, 20 + 196).softmax(-1)
        >>> class_token_cam(attention, torch.rand(1, 20, 14, 14)).shape
        torch.Size([1, 20, 14, 14])
    """
    B, N, h, w = check_tensor("patch_cam", patch_cam, "BNhw")
    T, hint = N + h * w, "N class tokens, then a token a patch."
    joined = joined_attention(attention, layers=layers, reduce=reduce, like=patch_cam, hint=hint, B=B, T=T)
    check_choice("root", root, (True, False))
    seen = joined[:, :N, N:].reshape(B, N, h, w)
    fused = seen * activation(patch_cam).relu()
    return fused.sqrt() if root else fused
