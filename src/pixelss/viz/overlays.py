"""CAMs, masks and similarities as pictures over their image."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.nn.functional import normalize

from pixelss._checks import as_tensor, check_number, check_tensor
from pixelss._dtype import activation, promote
from pixelss._palette import as_palette
from pixelss._resize import resize
from pixelss.viz.pixels import Pixels, as_image, as_levels, heat_map


def overlay_cam(image: ArrayLike, cam: ArrayLike, *, alpha: float = 0.65) -> Pixels:
    """Return the heat map of one class over the image in grey.

    Args:
        image: RGB levels 0 to 255.
        cam: one normalised CAM, or any map in [0, 1], as of `prototype_similarity`; bilinearly resized to the image.
        alpha: share of the heat map in the mixture.

    Shape:
        (H, W, 3) uint8, (h, w) -> (H, W, 3) uint8.

    Raises:
        TypeError, ValueError: arrays of another rank, size or dtype; `alpha` outside [0, 1].

    Reference:
        Zhou 2016, "Learning Deep Features for Discriminative Localization", whose figures show CAMs so.

    Example:
        >>> image = np.full((4, 6, 3), 200, dtype=np.uint8)
        >>> overlay_cam(image, np.eye(2), alpha=0.5).shape
        (4, 6, 3)
    """
    pixels = as_image(image)
    values = as_tensor("cam", cam)
    check_tensor("cam", values, "hw", hint="One class: take cam[0, k].")
    check_number("alpha", alpha, low=0, high=1)
    grey = (pixels @ np.array([0.299, 0.587, 0.114]))[..., None]
    heat = heat_map(resize(activation(values), (len(pixels), len(pixels[0]))))
    return as_levels((1 - alpha) * grey + alpha * heat)


def overlay_mask(image: ArrayLike, mask: ArrayLike, *, alpha: float = 0.6, palette: ArrayLike | None = None) -> Pixels:
    """Return a label map's colours over the image; the background, 0, shows the image as it is.

    Args:
        image: RGB levels 0 to 255.
        mask: classes, 0 to 255, as `class_region_mask` gives or as stored in a PNG; 255 is void.
        alpha: share of the colours in the mixture.
        palette: a colour a class, background first; None stands for `voc_palette`.

    Shape:
        (H, W, 3) uint8, (H, W) integer, (K, 3) uint8 -> (H, W, 3) uint8.

    Raises:
        TypeError, ValueError: arrays of another rank, size or dtype; a class without a colour; `alpha` outside [0, 1].

    Reference:
        Everingham 2015, "The PASCAL Visual Object Classes Challenge", for the colours.

    Example:
        >>> overlay_mask(np.zeros((1, 2, 3), dtype=np.uint8), np.array([[0, 1]]), alpha=1).tolist()
        [[[0, 0, 0], [128, 0, 0]]]
    """
    pixels = as_image(image)
    labels = as_tensor("mask", mask)
    H, W = pixels.shape[:2]
    check_tensor("mask", labels, "HW", kind="integer", hint="The image's size, one label map.", H=H, W=W)
    check_number("alpha", alpha, low=0, high=1)
    colours, index = as_palette(palette), labels.long().numpy()
    K = len(colours)
    if index.min() < 0 or index.max() >= K:
        was = f"from {index.min()} to {index.max()}"
        raise ValueError(f"mask must hold classes in 0..{K - 1}, one a row of palette, but ranges {was}.")
    blend = np.where(index > 0, alpha, 0)[..., None]
    return as_levels((1 - blend) * pixels + blend * colours[index])


def prototype_similarity(features: ArrayLike, prototypes: ArrayLike) -> NDArray[np.float32]:
    """Return the cosine of one image's features and every prototype, cell by cell: what RCM compares, T aside.

    Args:
        features: pixel features X of one image.
        prototypes: one row a class, as `PrototypeBank.prototypes`; a row of zeros, not filled yet, gives 0.

    Shape:
        (D, h, w), (K, D) -> (K, h, w) float32 in [-1, 1]; in [0, 1] for features after a ReLU, as `CAMHead` gives.

    Raises:
        TypeError, ValueError: arrays of another rank, size or dtype.

    Reference:
        Yoon 2021, "Exploring Pixel-level Self-supervision", section 3.3.

    Example:
        >>> features = np.array([[[1.0, 1.0]], [[0.0, 1.0]]])
        >>> prototype_similarity(features, [[2.0, 0.0]]).tolist()
        [[[1.0, 0.7071067690849304]]]
    """
    cells, rows = as_tensor("features", features), as_tensor("prototypes", prototypes)
    D, h, w = check_tensor("features", cells, "Dhw", hint="One image: take features[b].")
    check_tensor("prototypes", rows, "KD", hint="One row a class, as wide as the features.", D=D)
    directions, towards = normalize(promote(cells).float().flatten(1), dim=0), normalize(promote(rows).float(), dim=1)
    similarity: NDArray[np.float32] = (towards @ directions).view(-1, h, w).clamp(-1, 1).numpy()
    return similarity
