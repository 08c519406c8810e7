"""Photographs in folders of your own, with a table of tags, by the names that a `VOCFolder` has."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pixels import Picture, first_file, opened_image, read_image, read_mask, read_size, resize_mask
from texts import SUFFIXES, BadFileError, Row, check_classes, multi_hot, read_classes, read_tags, without_suffix
from torch import Tensor

_FOREIGN = (".heic", ".heif", ".avif", ".gif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw", ".psd", ".svg")


class TaggedFolder:
    """Photographs anywhere below a folder, with tags from a table or from the folders that they lie in.

    The lists are `all`, and `masks`: those with a mask. An image's name is its path below `root` without the suffix.

    Args:
        root: holds the images.
        tags: a table with the columns image and tags; None: an image's tag is the name of the folder in `root` that
            holds it, and one that lies in `root` itself has none.
        classes: foreground class names in the masks' order; None reads classes.txt in `root`, or sorts the tags.
        masks: holds the masks, STEM.png; None: there are none.
        longest: images, and masks with them, are shrunk until no side is longer; None leaves them as they are.

    Attributes:
        unlisted: images below `root` that the table does not name.
        unread: pictures below `root` of a format that is not read.
    """

    def __init__(
        self,
        root: Path,
        tags: Path | None,
        *,
        classes: Sequence[str] | None = None,
        masks: Path | None = None,
        longest: int | None = None,
    ) -> None:
        root = Path(os.path.normpath(root))
        self.root, self.masks, self.longest = root, masks, longest
        if not root.is_dir():
            raise FileNotFoundError(f"--data must be a folder of images, but {root} is none.")
        if masks is not None and not masks.is_dir():
            raise FileNotFoundError(f"--masks must be a folder of PNGs, but {masks} is none.")
        found = _files(root, masks)
        images = [path for path in found if path.name.lower().endswith(SUFFIXES)]
        self.unread = [path for path in found if path.name.lower().endswith(_FOREIGN)]
        rows = read_tags(tags) if tags else [_by_folder(path, root) for path in images]
        if not rows:
            raise BadFileError(f"{root} holds no image ({', '.join(SUFFIXES)}).")
        self._table = tags or root
        self._rows: dict[str, Row] = {}
        self._paths: dict[str, Path] = {}
        names = _by_name(images, root)
        for row in rows:
            path = _find(row, root, names, self._table)
            stem = without_suffix(path.relative_to(root).as_posix())
            if stem in self._paths:
                raise BadFileError(f"{self._paths[stem]} and {path} must differ in more than the suffix: rename one.")
            self._rows[stem], self._paths[stem] = row, path
        self.unlisted = len(set(images) - set(self._paths.values()))
        listed = root / "classes.txt"
        self._source = "data.classes" if classes is not None else str(listed if listed.is_file() else self._table)
        if classes is None and listed.is_file():
            classes = read_classes(listed)
        self.classes = check_classes(classes or sorted({tag for row in rows for tag in row.tags}), self._source)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def missing_folders(self, kinds: Iterable[str]) -> list[str]:
        return []  # told when this was made

    def stems(self, name: str | None) -> list[str]:
        """Return the image names of a list; none of no list."""
        if name not in (None, "all", "masks"):
            raise BadFileError(f"A list of images with tags must be all or masks, but is {name}.")
        if name != "masks":
            return [] if name is None else list(self._paths)
        if found := [stem for stem in self._paths if any(path.is_file() for path in self.mask_paths(stem))]:
            return found
        raise BadFileError(f"--masks must hold STEM.png of some image, but {self.masks} holds none: {self._first()}.")

    def list_path(self, name: str) -> Path:
        return self._table

    def image_path(self, stem: str) -> Path:
        return self._paths[stem]

    def tags_path(self, stem: str) -> Path:
        return self._table

    def mask_paths(self, stem: str) -> list[Path]:
        name = stem.rpartition("/")[2]
        return [self.masks / f"{stem}.png", self.masks / f"{name}.png"] if self.masks else []

    def image(self, stem: str) -> NDArray[np.uint8]:
        return read_image(self.image_path(stem), self.longest)

    def opened(self, stem: str) -> AbstractContextManager[Picture]:
        return opened_image(self.image_path(stem), self.longest)

    def size(self, stem: str) -> tuple[int, int]:
        return read_size(self.image_path(stem), self.longest)

    def tags(self, stem: str) -> Tensor:
        row = self._rows[stem]
        where = f"{self._table}, line {row.line}," if row.line else str(self.image_path(stem).parent)
        return multi_hot(row.tags, self.classes, where, self._source)

    def mask(self, stem: str, *, folder: Path | None = None) -> NDArray[np.uint8]:
        if folder:
            return read_mask(first_file([folder / f"{stem}.png"]), self.size(stem), self.num_classes)
        truth = read_mask(first_file(self.mask_paths(stem)), read_size(self.image_path(stem)), self.num_classes)
        return resize_mask(truth, self.size(stem))

    def _first(self) -> str:
        places = " and ".join(map(str, self.mask_paths(next(iter(self._paths)))))
        return f"of the first image {places} are missing"


def _files(root: Path, masks: Path | None) -> list[Path]:
    """Return the files below a folder, in order; not those of the masks' folder, nor what is hidden."""
    found = []
    for folder, below, files in os.walk(root):
        here = Path(folder)
        below[:] = [
            name
            for name in below
            if name[0] != "." and not (masks and masks.is_dir() and (here / name).samefile(masks))
        ]
        found += [here / name for name in files if name[0] != "."]
    return sorted(found)


def _by_folder(path: Path, root: Path) -> Row:
    name, *inside = path.relative_to(root).parts
    return Row(0, path.relative_to(root).as_posix(), [name] if inside else [])


def _by_name(images: Iterable[Path], root: Path) -> Mapping[str, list[Path]]:
    """Return the images by whatever a table may call them: path or name, with or without a suffix."""
    names = defaultdict(list)
    for path in images:
        whole = (path.relative_to(root).as_posix(), path.name)
        for name in {*whole, *map(without_suffix, whole)}:
            names[_composed(name)].append(path)
    return names


def _find(row: Row, root: Path, names: Mapping[str, list[Path]], table: Path) -> Path:
    """Return the image that a row means; where there is none, the path where it should be."""
    path = Path(os.path.normpath(root / row.image.replace("\\", "/")))
    if not path.is_relative_to(root):
        raise BadFileError(f"{table}, line {row.line}, must name an image below {root}, but names {row.image}.")
    if path.is_file():
        return path
    found = names.get(_composed(path.relative_to(root).as_posix()), [])
    if len(found) > 1:
        raise BadFileError(
            f"{table}, line {row.line}, must name one image below {root}, but {row.image} may be {found[0]} or "
            f"{found[1]}: write the path."
        )
    return found[0] if found else path


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
