"""A folder in the VOC layout: lists, tags, images and masks, each error naming its file."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

VOID = 255
_AUG = (
    "The augmented set is VOC 2012 train + SBD (Hariharan et al. 2011): put its image list as "
    "ImageSets/Segmentation/train_aug.txt and its masks as SegmentationClassAug/*.png (only scoring needs masks)."
)


class BadFileError(ValueError):
    """A file of the data set that cannot be used; the message names it."""


class VOCFolder:
    """A data set in the VOC layout, read lazily.

    Args:
        root: holds JPEGImages, Annotations, ImageSets/Segmentation and, for scoring, SegmentationClass or
            SegmentationClassAug.
        classes: foreground class names in the masks' order; None reads classes.txt in `root`.
    """

    def __init__(self, root: Path, classes: Sequence[str] | None = None) -> None:
        self.root = root
        if not (root / "JPEGImages").is_dir():
            raise FileNotFoundError(f"--data must be a folder in the VOC layout, but {root}/JPEGImages is missing.")
        listed = root / "classes.txt"
        if classes is None and not listed.is_file():
            raise FileNotFoundError(
                f"The class names are missing: set data.classes in the config or write {listed}, one name a line, in "
                "the masks' order."
            )
        lines = listed.read_text().splitlines() if classes is None else classes
        self.classes = [name for line in lines if (name := line.strip())]
        self._source = "data.classes" if classes is not None else str(listed)
        self._index = {name: i for i, name in enumerate(self.classes)}

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def stems(self, name: str | None) -> list[str]:
        """Return the image names of a list, as `read_list`; none of no list."""
        return [] if name is None else read_list(self.root, name)

    def image_path(self, stem: str) -> Path:
        return self.root / "JPEGImages" / f"{stem}.jpg"

    def image(self, stem: str) -> NDArray[np.uint8]:
        """Return an image (H, W, 3), uint8 RGB."""
        return _pixels(self.image_path(stem), "RGB")[0]

    def size(self, stem: str) -> tuple[int, int]:
        """Return an image's (height, width) from its header alone."""
        with _named(self.image_path(stem)), Image.open(self.image_path(stem)) as image:
            return image.height, image.width

    def tags(self, stem: str) -> Tensor:
        """Return the image's tags (N,), float32, from the object names of its annotation."""
        names = read_names(path := self.root / "Annotations" / f"{stem}.xml")
        if unknown := sorted(names - self._index.keys()):
            raise BadFileError(f"{path} names {unknown}, but the classes are {self.classes}: correct {self._source}.")
        tags = torch.zeros(self.num_classes)
        tags[[self._index[name] for name in names]] = 1
        return tags

    def mask(self, stem: str, *, folder: Path | None = None) -> NDArray[np.uint8]:
        """Return a mask (H, W) in 0..N or 255, of the image's size; from `folder`, else the data set's truth."""
        folders = [folder] if folder else [self.root / name for name in ("SegmentationClass", "SegmentationClassAug")]
        path = next((f / f"{stem}.png" for f in folders if (f / f"{stem}.png").is_file()), None)
        if path is None:
            hint = "" if folder else f" {_AUG}"
            raise BadFileError(f"{' and '.join(str(f / f'{stem}.png') for f in folders)}: no such mask.{hint}")
        mask, mode = _pixels(path, None)
        if mode not in ("P", "L", "1"):
            raise BadFileError(f"{path} must hold class indices (an 8-bit palette or grey PNG), but has mode {mode}.")
        if mask.shape != (size := self.size(stem)):
            raise BadFileError(f"{path} must have its image's size {size}, but has {mask.shape} (height, width).")
        if wrong := sorted(set(np.unique(mask).tolist()) - {*range(self.num_classes + 1), VOID}):
            raise BadFileError(f"{path} must hold 0 to {self.num_classes} or {VOID}, but holds {wrong}.")
        return mask


def read_names(path: Path) -> set[str]:
    """Return the object names of an annotation."""
    try:
        return {str(name.text).strip() for name in ET.parse(path).iterfind("object/name")}
    except FileNotFoundError:
        raise BadFileError(f"{path} is missing: tags come from it.") from None
    except ET.ParseError as error:
        raise BadFileError(f"{path} is no readable XML: {error}.") from error


def read_list(root: Path, name: str) -> list[str]:
    """Return the image names of ImageSets/Segmentation/NAME.txt; lines may be names or paths of images."""
    path = root / "ImageSets" / "Segmentation" / f"{name}.txt"
    if not path.is_file():
        raise FileNotFoundError(f"The image list {path} is missing." + (f" {_AUG}" if "aug" in name else ""))
    stems = [Path(line.split()[0]).stem for line in path.read_text().splitlines() if line.strip()]
    if not stems:
        raise BadFileError(f"{path} lists no image.")
    return stems


def _pixels(path: Path, mode: str | None) -> tuple[NDArray[np.uint8], str]:
    with _named(path), Image.open(path) as image:
        return np.array(image if mode is None else image.convert(mode)).astype(np.uint8), image.mode


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise BadFileError(f"{path} is missing.") from None
    except (OSError, SyntaxError) as error:
        raise BadFileError(f"{path} cannot be read ({error}): it may be truncated; fetch it again.") from error
