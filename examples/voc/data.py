"""A folder in the VOC layout, and the choice between it and a `TaggedFolder`: stages see either by the same names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from config import Data
from numpy.typing import NDArray
from pixels import VOID as VOID
from pixels import Picture, first_file, opened_image, read_image, read_mask, read_size
from tagged import TaggedFolder
from texts import AUGMENTED, check_classes, list_path, multi_hot, read_classes, read_list, read_names
from texts import BadFileError as BadFileError
from torch import Tensor


class VOCFolder:
    """A data set in the VOC layout, read lazily.

    Args:
        root: holds JPEGImages, Annotations, ImageSets/Segmentation and, for scoring, SegmentationClass or
            SegmentationClassAug.
        classes: foreground class names in the masks' order; None reads classes.txt in `root`.
    """

    def __init__(self, root: Path, classes: Sequence[str] | None = None) -> None:
        self.root = root
        self._given = classes
        self._tags: dict[str, list[float]] = {}  # no tensors: a spawned process would be sent a file each

    @cached_property
    def classes(self) -> list[str]:
        listed = self.root / "classes.txt"
        if self._given is not None:
            return check_classes(self._given, "data.classes")
        if not listed.is_file():
            raise FileNotFoundError(
                f"The class names are missing: set data.classes in the config or write {listed}, one name a line, in "
                "the masks' order."
            )
        return read_classes(listed)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def missing_folders(self, kinds: Iterable[str]) -> list[str]:
        """Return a sentence for every folder that is not there and holds files of these kinds."""
        folders = {
            "images": ("JPEGImages", "the images, STEM.jpg"),
            "annotations": ("Annotations", "the tags, STEM.xml"),
            "masks": ("SegmentationClass", "the masks for scoring, STEM.png"),
        }
        places = [(self.root / name, what) for kind, (name, what) in folders.items() if kind in {"images", *kinds}]
        return [f"{path} is missing: it holds {what}." for path, what in places if not path.is_dir()]

    def stems(self, name: str | None) -> list[str]:
        """Return the image names of a list, as `read_list`; none of no list."""
        return [] if name is None else read_list(self.root, name)

    def list_path(self, name: str) -> Path:
        return list_path(self.root, name)

    def image_path(self, stem: str) -> Path:
        return self.root / "JPEGImages" / f"{stem}.jpg"

    def tags_path(self, stem: str) -> Path:
        return self.root / "Annotations" / f"{stem}.xml"

    def mask_paths(self, stem: str) -> list[Path]:
        """Return the places where an image's mask may lie, the first that is there being taken."""
        return [self.root / name / f"{stem}.png" for name in ("SegmentationClass", "SegmentationClassAug")]

    def image(self, stem: str) -> NDArray[np.uint8]:
        """Return an image (H, W, 3), uint8 RGB."""
        return read_image(self.image_path(stem))

    def opened(self, stem: str) -> AbstractContextManager[Picture]:
        """Open an image, to read a part of it."""
        return opened_image(self.image_path(stem))

    def size(self, stem: str) -> tuple[int, int]:
        """Return an image's (height, width) from its header alone."""
        return read_size(self.image_path(stem))

    def tags(self, stem: str) -> Tensor:
        """Return the image's tags (N,), float32, from the object names of its annotation."""
        if stem not in self._tags:
            path = self.tags_path(stem)
            source = "data.classes" if self._given is not None else str(self.root / "classes.txt")
            self._tags[stem] = multi_hot(read_names(path), self.classes, str(path), source).tolist()
        return torch.tensor(self._tags[stem])

    def mask(self, stem: str, *, folder: Path | None = None) -> NDArray[np.uint8]:
        """Return a mask (H, W) in 0..N or 255, of the image's size; from `folder`, else the data set's truth."""
        path = first_file([folder / f"{stem}.png"]) if folder else first_file(self.mask_paths(stem), hint=AUGMENTED)
        return read_mask(path, self.size(stem), self.num_classes)


DataFolder = VOCFolder | TaggedFolder


def open_data(root: Path, settings: Data) -> DataFolder:
    """Return the data set in `root`: with data.tags photographs and their tags, else a folder in the VOC layout."""
    if settings.tags is None:
        if settings.masks or settings.longest:
            raise ValueError("data.masks and data.longest are for photographs with tags: give data.tags too.")
        return VOCFolder(root, settings.classes)

    def inside(path: Path | None) -> Path | None:
        """Return a path as it is or, where nothing is there, as one in `root`."""
        return path if path is None or path.exists() else root / path

    tags = None if settings.tags == "folders" else inside(Path(settings.tags))
    if tags is not None and not tags.is_file():
        raise FileNotFoundError(
            f"--tags must be a table, or the word folders, but {settings.tags} and {tags} are none."
        )
    return TaggedFolder(root, tags, classes=settings.classes, masks=inside(settings.masks), longest=settings.longest)
