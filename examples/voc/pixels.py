"""Image files to arrays: as they are shown, not as they are stored; each error names its file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from texts import BadFileError, named

VOID = 255
_MOST_PIXELS = 178_956_970  # what Pillow refuses; here each file is named, and CAM files of many classes may be larger
Image.MAX_IMAGE_PIXELS = None


class Picture:
    """An image in an open file, as it is shown; what a JPEG file is not asked for it need not decode.

    Attributes:
        size: the (height, width) that `read_image` gives.
    """

    def __init__(self, path: Path, image: Image.Image, longest: int | None) -> None:
        self.size = _size(image, longest)
        self._path, self._image, self._longest = path, image, longest

    def part(self, box: tuple[float, float, float, float], size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return a box of the image at another (width, height), uint8 (3, height, width), RGB; once.

        Where that shrinks the image to a half or less, a JPEG is decoded at a half, a quarter or an eighth of its size.
        """
        (H, W), (left, top, right, bottom) = self.size, box
        levels = self.read((int(size[1] * H / (bottom - top)), int(size[0] * W / (right - left))))
        x, y = levels.width / W, levels.height / H
        inside = left * x, top * y, min(right * x, levels.width), min(bottom * y, levels.height)
        resized = levels.resize(size, Image.Resampling.BILINEAR, inside)
        lines = np.frombuffer(resized.tobytes("raw", "RGB;L"), np.uint8)  # each line's reds, greens and blues
        return lines.reshape(size[1], 3, size[0]).transpose(1, 0, 2)

    def read(self, least: tuple[int, int] | None = None) -> Image.Image:
        """Return the image, RGB, at its size or, of a JPEG, at a smaller one of at least that (height, width); once."""
        image, (H, W) = self._image, self.size
        if least:
            h, w = (max(1, min(sides)) for sides in zip(least, self.size, strict=True))
            image.draft(None, (h, w) if _lies(image) else (w, h))
        elif self._longest:
            image.draft(None, (max(H, W), max(H, W)))
        _turn_upright(image)
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
            levels = Image.fromarray((np.array(image).astype(np.uint32) * 255 // 65535).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise BadFileError(f"{self._path} has mode {image.mode}, of no known range: save it with 8 bits a channel.")
        else:
            levels = image
        if levels.has_transparency_data:
            levels = Image.alpha_composite(Image.new("RGBA", levels.size, "white"), levels.convert("RGBA"))
        if levels.mode != "RGB":
            levels = levels.convert("RGB")
        larger = levels.width > W or levels.height > H or (least is None and levels.size != (W, H))
        return levels.resize((W, H), Image.Resampling.BILINEAR) if larger else levels


@contextmanager
def opened_image(path: Path, longest: int | None = None) -> Iterator[Picture]:
    """Open an image whose pixels are read inside the context; with `longest`, no side is longer."""
    with _opened(path) as image:
        yield Picture(path, image, longest)


def read_image(path: Path, longest: int | None = None) -> NDArray[np.uint8]:
    """Return an image (H, W, 3), uint8 RGB, upright; with `longest`, no side is longer."""
    with opened_image(path, longest) as picture:
        return np.array(picture.read())


def read_size(path: Path, longest: int | None = None) -> tuple[int, int]:
    """Return the (height, width) that `read_image` gives, from the file's header alone."""
    with _opened(path) as image:
        return _size(image, longest)


def read_mask(path: Path, size: tuple[int, int], num_classes: int) -> NDArray[np.uint8]:
    """Return a mask (H, W) in 0..N or 255; raises unless it has the (height, width) of its image."""
    with _opened(path) as image:
        _turn_upright(image)
        if image.mode not in ("P", "L", "1"):
            raise BadFileError(
                f"{path} must hold class indices (an 8-bit palette or grey PNG), but has mode {image.mode}."
            )
        mask = np.array(image).astype(np.uint8)
    if mask.shape != size:
        raise BadFileError(f"{path} must have its image's size {size}, but has {mask.shape} (height, width).")
    if wrong := sorted(set(np.unique(mask).tolist()) - {*range(num_classes + 1), VOID}):
        raise BadFileError(f"{path} must hold 0 to {num_classes} or {VOID}, but holds {wrong}.")
    return mask


def resize_mask(mask: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return a mask at another (height, width), every pixel a copy of the nearest one."""
    return np.array(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))


def orientation(image: Image.Image) -> int:
    """Return how an image is to be turned, 1: not at all."""
    with suppress(Exception):  # a damaged EXIF block turns nothing
        return int(image.getexif().get(0x0112, 1))
    return 1


def _lies(image: Image.Image) -> bool:
    return orientation(image) in (5, 6, 7, 8)


def first_file(paths: Sequence[Path], *, hint: str = "") -> Path:
    """Return the first of the paths where a mask is; raises, with the hint, where there is none."""
    for path in paths:
        if path.is_file():
            return path
    raise BadFileError(f"{' and '.join(map(str, paths))}: no such mask. {hint}".strip())


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    with named(path, "cannot be read: it may be truncated, or no image; fetch it again"), Image.open(path) as image:
        if image.width * image.height > _MOST_PIXELS:
            raise BadFileError(
                f"{path} has {image.width} x {image.height} pixels, more than {_MOST_PIXELS:,}: shrink it, or cut it."
            )
        yield image


def _turn_upright(image: Image.Image) -> None:
    with suppress(Exception):  # a damaged EXIF block turns nothing, and a damaged image says so when it is read
        ImageOps.exif_transpose(image, in_place=True)


def _size(image: Image.Image, longest: int | None) -> tuple[int, int]:
    if image.format == "TIFF":  # which Pillow turns when it reads the pixels
        image.load()
        W, H = image.size
    else:
        W, H = image.size[::-1] if _lies(image) else image.size
    factor = min(1.0, longest / max(H, W)) if longest else 1.0
    return max(1, round(H * factor)), max(1, round(W * factor))
