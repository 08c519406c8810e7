"""Where objects end (BES): boundaries seen in a confident mask, with what is surely inside or outside."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from pixelss._checks import check_count, check_no_class, check_number, check_tensor
from pixelss._labels import class_maps, valid_pixels


def boundary_mask(
    mask: Tensor,
    num_classes: int,
    *,
    window: int = 13,
    share: float = 0.3,
    difference: float = 0.1,
    ignore_index: int = 255,
) -> Tensor:
    """Return the zone of every pixel: sure background 0 or foreground 1, a boundary to either 2 or 3, else void.

    With the shares of the window around the pixel: b of the background, f >= g of the two most frequent classes. Zone 2
    (background and object) where f and b exceed `share` and differ by less than `difference`; zone 3 (two objects)
    where g exceeds it and f - g is less. Zone 0 where b exceeds twice `share` and f by twice `difference` or more,
    zone 1 where f does so against b. A later rule goes before an earlier one, in the order 0, 1, 2, 3.

    Args:
        mask: confident label map in 0..N; `ignore_index` and values out of range are void.
        num_classes: foreground classes N.
        window: its side in pixels, odd; outside the map nothing is counted.
        share: of the window that each side of a boundary takes.
        difference: of the shares at a boundary.
        ignore_index: void in the mask and in the result; no zone, 0 to 3.

    Shape:
        (B, H, W) -> (B, H, W) int64.

    Raises:
        TypeError, ValueError: a mask of another rank or dtype kind; a setting out of range.

    Reference:
        Chen 2020, "Weakly Supervised Semantic Segmentation with Boundary Exploration", its boundary labels.

    Example:
        >>> mask = torch.tensor([[[0, 0, 0, 255, 1, 1, 1]]])
        >>> boundary_mask(mask, 1, window=7)[0, 0]
        tensor([  0, 255, 255,   2, 255, 255,   1])
    """
    check_tensor("mask", mask, "BHW", kind="integer")
    check_count("num_classes", num_classes)
    check_count("window", window)
    if window % 2 == 0:
        raise ValueError(f"window must be odd, to have a middle, but is {window}.")
    check_number("share", share, low=0, high=1)
    check_number("difference", difference, low=0, high=1)
    check_no_class(ignore_index, 3)  # a zone would be void, and void a zone
    label, valid = valid_pixels(mask, num_classes + 1, ignore_index)
    members = class_maps(label, num_classes + 1) & valid[:, None]  # (B, K, H, W)
    shares = avg_pool2d(members.float(), window, 1, window // 2, count_include_pad=False)
    background, foreground = shares[:, 0], shares[:, 1:]
    first = foreground.amax(1)
    second = foreground.topk(2, dim=1).values[:, 1] if num_classes > 1 else torch.zeros_like(first)
    zones = torch.full_like(label, ignore_index)
    rules = (
        (background > 2 * share) & (background - first >= 2 * difference),
        (first > 2 * share) & (first - background >= 2 * difference),
        (torch.minimum(first, background) > share) & ((first - background).abs() < difference),
        (second > share) & (first - second < difference),
    )
    for zone, rule in enumerate(rules):
        zones = zones.masked_fill(rule, zone)
    return zones
