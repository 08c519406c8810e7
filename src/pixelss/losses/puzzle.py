"""Puzzle-CAM: the CAMs of an image's tiles, put together, are the CAM of the image."""

from __future__ import annotations

from torch import Tensor

from pixelss._checks import TAGS_HINT, check_count, check_tensor
from pixelss._dtype import activation


def split_tiles(images: Tensor, pieces: int = 2) -> Tensor:
    """Return the tiles of every image, as a batch: tile 0 of all images first, then tile 1, row by row.

    Args:
        images: images, or maps of them, of any dtype.
        pieces: tiles along a side: 2 gives 4 tiles an image. Both sides must be multiples of it.

    Shape:
        (B, C, H, W) -> (pieces pieces B, C, H / pieces, W / pieces).

    Raises:
        TypeError, ValueError: images of another rank, or of a side that `pieces` does not divide.

    Reference:
        Jo 2021, "Puzzle-CAM: Improved Localization via Matching Partial and Full Features", its tiling.

    Example:
        >>> import torch
        >>> split_tiles(torch.arange(8).view(1, 1, 2, 4)).flatten(1)
        tensor([[0, 1],
                [2, 3],
                [4, 5],
                [6, 7]])
    """
    B, C, H, W = check_tensor("images", images, "BCHW", kind="any")
    check_count("pieces", pieces)
    if H % pieces or W % pieces:
        raise ValueError(
            f"images must have sides that pieces={pieces} divides, but are {H} x {W}. Crop or resize them first."
        )
    tiles = images.reshape(B, C, pieces, H // pieces, pieces, W // pieces).permute(2, 4, 0, 1, 3, 5)
    return tiles.reshape(pieces * pieces * B, C, H // pieces, W // pieces)


def merge_tiles(maps: Tensor, pieces: int = 2) -> Tensor:
    """Return the maps of whole images, put together from those of their tiles: `split_tiles` undone.

    Args:
        maps: CAMs of the tiles, or any maps of them, in the order of `split_tiles`.
        pieces: tiles along a side.

    Shape:
        (pieces pieces B, N, h, w) -> (B, N, pieces h, pieces w).

    Raises:
        TypeError, ValueError: maps of another rank, or of a number that is no multiple of pieces * pieces.

    Reference:
        Jo 2021, "Puzzle-CAM: Improved Localization via Matching Partial and Full Features", its merging.

    Example:
        >>> import torch
        >>> merge_tiles(torch.tensor([1, 2, 3, 4]).view(4, 1, 1, 1))[0, 0]
        tensor([[1, 2],
                [3, 4]])
    """
    tiles, N, h, w = check_tensor("maps", maps, "BNhw", kind="any")
    check_count("pieces", pieces)
    if tiles % (pieces * pieces):
        raise ValueError(
            f"maps must hold pieces * pieces = {pieces * pieces} tiles an image, but hold {tiles} in all. "
            "Pass the pieces that split_tiles had."
        )
    B = tiles // (pieces * pieces)
    rows = maps.reshape(pieces, pieces, B, N, h, w).permute(2, 3, 0, 4, 1, 5)
    return rows.reshape(B, N, pieces * h, pieces * w)


def reconstruction_loss(cam: Tensor, merged: Tensor, tags: Tensor) -> Tensor:
    """Return the mean distance of the images' CAMs from those merged of their tiles; absent classes count as equal.

    Args:
        cam: raw CAMs of whole images; a non-finite value counts as no activation.
        merged: raw CAMs of their tiles, put together by `merge_tiles`. The gradient reaches both.
        tags: image-level labels, multi-hot of any dtype.

    Shape:
        (B, N, h, w), (B, N, h, w), (B, N) -> scalar: the mean over all entries, those of absent classes too.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device.

    Reference:
        Jo 2021, "Puzzle-CAM: Improved Localization via Matching Partial and Full Features", its reconstruction loss.

    Example:
        >>> import torch
        >>> cam, merged = torch.full((1, 2, 2, 2), 3.0), torch.ones(1, 2, 2, 2)
        >>> reconstruction_loss(cam, merged, torch.tensor([[1, 0]]))
        tensor(1.)
    """
    B, N, h, w = check_tensor("cam", cam, "BNhw")
    hint = "The CAMs' size: tiles whose sides the network's stride divides."
    check_tensor("merged", merged, "BNhw", like=cam, hint=hint, B=B, N=N, h=h, w=w)
    check_tensor("tags", tags, "BN", kind="any", like=cam, hint=TAGS_HINT, B=B, N=N)
    distance = (activation(cam) - activation(merged)).abs().where((tags > 0)[:, :, None, None], 0)
    return distance.sum() / max(1, distance.numel())
