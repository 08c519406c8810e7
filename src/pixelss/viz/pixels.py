"""What all pictures share: heat colours, and arrays checked and read as tensors."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from pixelss._checks import as_tensor, check_tensor

Pixels = NDArray[np.uint8]

# "Inferno" at 0, 1/16, ..., 1: lightness rises all the way, for colour-blind eyes and in grey print too.
_INFERNO = np.frombuffer(
    bytes.fromhex(
        "0000040b0724210c4a3c096557106d70196e89226aa32b61bb3755d14644e35932f1711ef98d0afcab0ff9ca32f2e865fcffa4"
    ),
    np.uint8,
).reshape(17, 3)
_IMAGE_HINT = "An RGB image: of a batch take one, put the channels last; of a grey one stack three."


def heat_map(values: ArrayLike) -> Pixels:
    """Return the colour of every value: black at 0, purple, orange, light yellow at 1.

    Lightness rises with the value, also for colour-blind eyes. What lies outside [0, 1] takes the nearer end.

    Args:
        values: of any shape; a value that is not a number counts as 0.

    Shape:
        (...) -> (..., 3) uint8.

    Raises:
        TypeError: values that are no numbers.

    Reference:
        Smith 2015, "A Better Default Colormap for Matplotlib": its "inferno", to 7 levels of 255.

    Example:
        >>> heat_map([0.0, 0.5, 1.0]).tolist()
        [[0, 0, 4], [187, 55, 85], [252, 255, 164]]
    """
    x = np.nan_to_num(as_tensor("values", values).double().numpy(), nan=0, posinf=1, neginf=0).clip(0, 1)
    anchors = np.linspace(0, 1, len(_INFERNO))
    return np.stack([np.interp(x, anchors, channel) for channel in _INFERNO.T], -1).round().astype(np.uint8)


def as_image(image: ArrayLike) -> Pixels:
    """Return an RGB image (H, W, 3) of levels, checked."""
    pixels = as_tensor("image", image)
    check_tensor("image", pixels, "HWC", kind="any", hint=_IMAGE_HINT, C=3)
    if pixels.dtype != torch.uint8:
        raise TypeError(f"image must be of dtype uint8 (levels 0 to 255), but is {pixels.dtype}. Undo scaling.")
    levels: Pixels = pixels.numpy()
    return levels


def as_levels(x: NDArray[np.float64]) -> Pixels:
    """Return numbers rounded to levels 0 to 255."""
    return x.round().clip(0, 255).astype(np.uint8)
