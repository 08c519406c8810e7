"""Cross-entropy of a segmentation network trained at several scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pixelss._checks import check_integer, check_maps, check_tensor
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
    check_integer("ignore_index", ignore_index)

    maps = [resize(one, (H, W)) for one in logits]
    if len(maps) > 1:
        maps.append(torch.stack(maps).amax(0))
    label, valid = valid_pixels(mask, K, ignore_index)
    # nll_loss has no deterministic kernel on CUDA, gather has.
    log_p = torch.stack([one.log_softmax(1).gather(1, label[:, None]).squeeze(1) for one in maps]).sum(0)
    return mean_over(-log_p, valid)
