"""The attention of a vision transformer, recorded while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from pixelss._checks import check_integer, check_sequence

# Other classes of these names attend within windows (SAM), or to fewer keys (PVT).
_GLOBAL = {"Attention", "AttentionRope", "EvaAttention", "RelPosAttention"}
_HOMES = {"layers.attention", *(f"models.{name}" for name in ("beit", "eva", "vision_transformer"))}
_HOMES |= {"models.vision_transformer_relpos"}


@contextmanager
def vit_attention(model: nn.Module, *, blocks: Sequence[int] | None = None) -> Iterator[list[Tensor]]:
    """Record the attention weights of a timm vision transformer while it runs.

    timm's fused attention never makes the weights: within the context the blocks compute them, which changes the output
    by rounding alone. Afterwards the model is as it was.

    Args:
        model: a timm network of the ViT, DeiT, DINOv2 or EVA kind, wherever it stands in a larger module.
        blocks: indices of the blocks to record, each once, negative ones from the end; None: all.

    Shape:
        Yields a list that each forward pass fills anew, one (B, heads, T, T) a block, rows summing to 1:
        `torch.stack` makes (L, B, heads, T, T) of it.

    Raises:
        TypeError, ValueError: `model` has no block whose attention can be recorded; `blocks` out of range.

    Reference:
        Wightman 2019, "PyTorch Image Models".

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32)
        >>> with vit_attention(model, blocks=(-1,)) as attention:
        ...     _ = model(torch.rand(1, 3, 32, 32))
        >>> torch.stack(attention).shape
        torch.Size([1, 1, 3, 5, 5])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is of type {type(model).__name__}.")
    found: list[Any] = [m for m in model.modules() if hasattr(m, "attn_drop")]
    others = {kind for kind in map(type, found) if not _is_global(kind)}
    if not found or others:
        was = ", ".join(sorted(f"{kind.__module__}.{kind.__name__}" for kind in others)) or "no attention of timm"
        raise ValueError(
            f"model must attend from every token to every other in all blocks, but {type(model).__name__} has {was}. "
            f"A ViT, DeiT, DINOv2, BEiT or EVA will do."
        )
    if blocks is None:
        blocks = range(len(found))
    check_sequence("blocks", blocks, "indices of blocks")
    for i, block in enumerate(blocks):
        check_integer(f"blocks[{i}]", block)
        if not -len(found) <= block < len(found):
            raise ValueError(f"blocks[{i}] must be one of the model's {len(found)} blocks, but is {block}.")
    chosen = [found[i] for i in sorted({block % len(found) for block in blocks})]
    if len(chosen) != len(blocks):
        raise ValueError(f"blocks must name each block once, but are {tuple(blocks)}, of {len(found)}.")
    recorded: list[Tensor] = []

    def keep(attention: Any, position: int) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if position == 0:
                recorded.clear()
            recorded.append(arguments[0])

        return attention.attn_drop.register_forward_pre_hook(hook)

    with ExitStack() as stack:
        for position, attention in enumerate(chosen):
            stack.callback(setattr, attention, "fused_attn", attention.fused_attn)
            attention.fused_attn = False
            stack.enter_context(keep(attention, position))
        yield recorded


def _is_global(kind: type) -> bool:
    return kind.__name__ in _GLOBAL and kind.__module__.removeprefix("timm.") in _HOMES
