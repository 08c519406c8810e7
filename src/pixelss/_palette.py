"""The colours of masks, in pictures and in files."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pixelss._checks import as_tensor, check_tensor


def voc_palette() -> NDArray[np.uint8]:
    """Return PASCAL VOC's colours: class i has the bits of i spread over red, green and blue; 255 is void.

    It is the field's habit, not a colour-blind-safe one: give masks a legend with class names.

    Shape:
        (256, 3) uint8.

    Reference:
        Everingham 2015, "The PASCAL Visual Object Classes Challenge", the development kit's `VOClabelcolormap`.

    Example:
        >>> voc_palette()[[0, 1, 15, 255]].tolist()
        [[0, 0, 0], [128, 0, 0], [192, 128, 128], [224, 224, 192]]
    """
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        colours |= ((np.arange(256)[:, None] >> (3 * bit) >> np.arange(3) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def as_palette(palette: ArrayLike | None) -> NDArray[np.uint8]:
    """Return a palette (K, 3), checked; None stands for VOC's."""
    if palette is None:
        return voc_palette()
    colours = as_tensor("palette", palette)
    K, _ = check_tensor("palette", colours, "KC", kind="integer", hint="A row of RGB a class.", C=3)
    if K > 256:
        raise ValueError(f"palette must hold up to 256 colours, but holds {K}.")
    levels = colours.long().numpy()
    if levels.min() < 0 or levels.max() > 255:
        raise ValueError(f"palette must hold levels 0 to 255, but ranges from {levels.min()} to {levels.max()}.")
    return levels.astype(np.uint8)
