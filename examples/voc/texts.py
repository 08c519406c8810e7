"""Text files of a data set: class names, image lists, annotations, tables of tags. The one parser of all examples.

Text is UTF-8, with or without a byte order mark; blanks around a name, empty lines and Windows' line ends mean nothing.
Every error names its file.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_MOST_CLASSES = 254  # label maps are 8-bit PNGs, whose 255 is void
_NO_CLASS = {"background", "ignore", "void", "unlabeled", "unlabelled"}  # in whatever underscores
AUGMENTED = (
    "The augmented set is VOC 2012 train + SBD (Hariharan et al. 2011): put its image list as "
    "ImageSets/Segmentation/train_aug.txt and its masks as SegmentationClassAug/*.png (only scoring needs masks)."
)
# An image's path and a mask's, as SBD lists them; a name and whether it shows the class, as ImageSets/Main lists them.
_COLUMNS = re.compile(rf"(.+?(?:{'|'.join(map(re.escape, SUFFIXES))}))\s+\S.*|(.+?)\s+(?:-1|0|1)", re.IGNORECASE)


class BadFileError(ValueError):
    """A file of the data set that cannot be used; the message names it."""


class Row(NamedTuple):
    """A line of a table of tags."""

    line: int
    image: str
    tags: Sequence[str]


@contextmanager
def named(path: Path, fault: str) -> Iterator[None]:
    """Turn whatever the reader of a file raises into a `BadFileError` that says: path, fault, the reader's words."""
    try:
        yield
    except (BadFileError, MemoryError):
        raise
    except FileNotFoundError:
        raise BadFileError(f"{path} is missing.") from None
    except Exception as error:  # a damaged file makes readers raise nearly anything
        raise BadFileError(f"{path} {fault} ({error}).") from error


def read_classes(path: Path) -> list[str]:
    """Return the foreground class names of a file, one a line, in the masks' order."""
    return check_classes(_lines(path), str(path))


def check_classes(names: Sequence[str], source: str) -> list[str]:
    """Return class names without blanks around them; raises unless they are foreground classes, each named once."""
    classes = [_clean(name) for name in names]
    if wrong := [name for name in classes if name.casefold().strip("_ ") in _NO_CLASS]:
        raise BadFileError(
            f"{source} must name foreground classes alone, in the order of the masks' 1, 2, ..., but has {wrong}: "
            "take that out. An image without any class has no tags."
        )
    times = Counter(name.casefold() for name in classes)
    if repeated := [name for name in classes if times[name.casefold()] > 1]:
        raise BadFileError(f"{source} must name every class once, in one spelling, but has {repeated}.")
    if not classes or not all(classes):
        raise BadFileError(f"{source} must name one class or more, but has {classes}.")
    if len(classes) > _MOST_CLASSES:
        raise BadFileError(
            f"{source} names {len(classes)} classes, but label maps are 8-bit PNGs with 255 for void: "
            f"{_MOST_CLASSES} at most."
        )
    return classes


def list_path(root: Path, name: str) -> Path:
    return root / "ImageSets" / "Segmentation" / f"{name}.txt"


def read_list(root: Path, name: str) -> list[str]:
    """Return the image names of ImageSets/Segmentation/NAME.txt in a folder in the VOC layout.

    A line is a name or a path of an image, which may hold blanks, dots and folders, alone or with a second column.
    """
    path = list_path(root, name)
    if not path.is_file():
        raise FileNotFoundError(f"The image list {path} is missing." + (f" {AUGMENTED}" if "aug" in name else ""))
    stems = [_stem(line, root / "JPEGImages") for line in _lines(path)]
    if not stems:
        raise BadFileError(f"{path} lists no image.")
    if repeated := [stem for stem, times in Counter(stems).items() if times > 1]:
        raise BadFileError(f"{path} must list every image once, but lists {len(repeated)} more often: {repeated[0]!r}.")
    if outside := [stem for stem in stems if ".." in stem.split("/")]:
        raise BadFileError(f"{path} must list images below JPEGImages, but lists {outside[0]!r}.")
    return stems


def _stem(line: str, images: Path) -> str:
    if (images / f"{line}.jpg").is_file():
        return line
    line = line.replace("\\", "/")
    if columns := _COLUMNS.fullmatch(line):
        line = columns[1] or columns[2]
    inside = line.rpartition("JPEGImages/")[2]
    if inside == line and re.match(r"/|[A-Za-z]:/", line):  # a path on another machine
        inside = line.rpartition("/")[2]
    return without_suffix(inside)


def without_suffix(name: str) -> str:
    """Return a file's name without a suffix of images; other dots are part of a name."""
    end = next((end for end in SUFFIXES if name.lower().endswith(end)), "")
    return name[: len(name) - len(end)]


def read_names(path: Path) -> set[str]:
    """Return the object names of an annotation, in whatever XML namespace and encoding."""
    if not path.is_file():
        raise BadFileError(f"{path} is missing: tags come from it.")
    with named(path, "is no readable XML"):
        content = path.read_bytes()
        try:
            root = ET.fromstring(content)
        except ValueError:  # Python knows encodings that its XML parser does not
            encoding = re.search(rb"""encoding=["']([\w.-]+)""", content[:200])
            if encoding is None:
                raise
            root = ET.fromstring(content.decode(encoding[1].decode()))
        names = [_clean(item.findtext("{*}name") or "") for item in root.iterfind(".//{*}object")]
        if not all(names):
            raise BadFileError(f"{path} must name every object, but one has no name.")
        return set(names)


def read_tags(path: Path) -> list[Row]:
    """Return the rows of a table with the columns image and tags, parted by commas, semicolons or tabs.

    Tags of one image stand in one cell, with commas or semicolons between them: "polar bear, dog". In a table
    without any of those in its cells blanks part them: "cat dog".
    """
    text = _text(path)
    first = text.partition("\n")[0].strip()
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True)
    header: list[str] = []
    found: dict[str, Row] = {}
    with named(path, "is no readable table"):
        for cells in rows:
            where = f"{path}, line {rows.line_num}"
            if not header:
                header = [cell.strip().casefold() for cell in cells]
                if not {"image", "tags"} <= set(header):
                    raise BadFileError(
                        f"{path} must begin with a header with image and tags, but begins with {first!r}."
                    )
                continue
            while len(cells) > len(header) and not cells[-1].strip():  # as spreadsheets pad
                cells.pop()
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise BadFileError(
                    f"{where} has {len(cells)} cells, but the header {first!r} has {len(header)}. Several tags stand "
                    'in one cell, with blanks between them or in quotes: "cat, dog".'
                )
            values = dict(zip(header, cells, strict=True))
            image = values["image"].strip()
            if not image:
                raise BadFileError(f"{where} must name an image, but is {cells}.")
            if image in found:
                raise BadFileError(f"{where} repeats the image {image} of line {found[image].line}.")
            found[image] = Row(rows.line_num, image, [values["tags"]])
    if not found:
        raise BadFileError(f"{path} lists no image.")
    parted = r"[,;]" if any(re.search(r"[,;]", row.tags[0]) for row in found.values()) else r"\s"
    return [row._replace(tags=_names(re.split(parted, row.tags[0]))) for row in found.values()]


def multi_hot(names: Collection[str], classes: Sequence[str], where: str, source: str) -> Tensor:
    """Return tags (N,), float32; `where` names them and `source` lists the classes, for the message."""
    if unknown := sorted(set(names) - set(classes)):
        raise BadFileError(f"{where} names {unknown}, but the classes are {list(classes)}: correct {source}.")
    return torch.tensor([float(name in names) for name in classes])


def _names(parts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(" ".join(name.split()) for part in parts if (name := _clean(part))))


def _lines(path: Path) -> list[str]:
    return [line for raw in _text(path).splitlines() if (line := raw.strip())]


def _text(path: Path) -> str:
    with named(path, "must be text in UTF-8: save it so"):
        return path.read_text(encoding="utf-8-sig")


def _clean(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip())  # two systems write one accent in two ways
