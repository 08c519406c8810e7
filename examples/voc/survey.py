"""What the files of a data set hold, told once, with counts, before a training starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from config import Config
from data import VOID, BadFileError, DataFolder
from stages import Files
from tagged import TaggedFolder

T = TypeVar("T")
_SHOWN = 40  # more classes than that are not listed one by one


def survey(config: Config, data: DataFolder, reads: Sequence[tuple[str | None, Files]]) -> list[str]:
    """Return what there is to say about the lists that stages read, a paragraph each.

    Args:
        config: its data section counts.
        data: the data set.
        reads: lists, and what their images need, as the stages' records name them.

    Raises:
        BadFileError: no image of the training list has a tag; or, unless data.on_bad_file is skip, a file is bad.
    """
    tagged = dict.fromkeys(name for name, files in reads if name and "annotations" in files)
    masked = dict.fromkeys(name for name, files in reads if name and "masks" in files)
    skips = config.data.on_bad_file == "skip"
    lines = []
    if config.data.train in tagged:
        lines += tag_lines(data, config.data.train, data.stems(config.data.train), skips=skips)
    for name in masked:
        lines += mask_lines(data, name, data.stems(name), with_tags=name in tagged, skips=skips)
    return lines


def tag_lines(data: DataFolder, name: str, stems: Sequence[str], *, skips: bool = False) -> list[str]:
    """Return how many images show each class, and which images and classes have none."""
    tags = _readable(stems, data.tags, skips=skips)
    counts = torch.stack(list(tags.values())).sum(0).int().tolist() if tags else [0] * data.num_classes
    if not any(counts):
        for stem in stems:
            data.tags(stem)  # raises where the tags cannot be read, which is then the reason
        raise BadFileError(f"{len(stems)} images of the list {name} have no tag at all: {data.tags_path(stems[0])}.")
    pairs = [f"{kind} {count}" for kind, count in zip(data.classes, counts, strict=True)]
    span = f"{min(counts)} to {max(counts)} images each"
    shown = ", ".join(pairs) if len(pairs) <= _SHOWN else span
    lines = [f"Training list {name}: {len(stems)} images; {data.num_classes} classes: {shown}."]
    lines += _told(stems, [stem for stem in stems if stem not in tags], "images", "have tags that cannot be read")
    lines += _told(stems, [s for s, row in tags.items() if not row.any()], "images", "have no tag: they show no class")
    absent = [kind for kind, count in zip(data.classes, counts, strict=True) if not count]
    lines += _told(data.classes, absent, "classes", "have no image, so their CAMs learn nothing")
    if isinstance(data, TaggedFolder):
        if data.unlisted:
            table = data.tags_path(stems[0])
            lines.append(f"{data.unlisted} images below {data.root} are left out: {table} has no row of them.")
        if data.unread:
            ends = ", ".join(sorted({path.suffix for path in data.unread}))
            lines.append(f"{len(data.unread)} pictures below {data.root} are not read ({ends}): convert them to JPEG.")
    return lines


def mask_lines(
    data: DataFolder, name: str, stems: Sequence[str], *, with_tags: bool = True, skips: bool = False
) -> list[str]:
    """Return what is odd about the masks of a list: objects that are all void, classes that the tags do not name."""

    def values_of(stem: str) -> set[int]:
        return set(np.unique(data.mask(stem)).tolist())

    values = _readable(stems, values_of, skips=skips)
    tags = _readable(stems, data.tags, skips=skips) if with_tags else {}
    empty = [s for s, found in values.items() if not found - {0, VOID} and (s not in tags or tags[s].any())]
    why = "hold no pixel of a class"
    if any(VOID in values[stem] for stem in empty):
        why += ", only 0 and 255. 255 is void, which no score counts: where it is an object, write its class, 1 to N"
    lines = _told(stems, empty, f"masks of the list {name}", why)
    shown = {stem: {1 + k for k in row.nonzero().flatten().tolist()} for stem, row in tags.items()}
    strange = [s for s, found in values.items() if s in shown and found - {0, VOID} - shown[s]]
    order = f"number their classes as {', '.join(data.classes[:3])}, ... are listed"
    return lines + _told(
        stems, strange, f"masks of the list {name}", f"show a class that their tags lack. Do they {order}?"
    )


def _readable(stems: Sequence[str], read: Callable[[str], T], *, skips: bool) -> dict[str, T]:
    """Return what `read` gives of every image; without the bad ones, where they are to be skipped."""

    def one(stem: str) -> T | None:
        try:
            return read(stem)
        except BadFileError:
            if not skips:
                raise
            return None

    with ThreadPoolExecutor(8) as pool:  # decoding a PNG leaves the interpreter free
        return {stem: found for stem, found in zip(stems, pool.map(one, stems), strict=True) if found is not None}


def _told(whole: Sequence[str], part: Sequence[str], kind: str, fault: str) -> list[str]:
    some = ", ".join(part[:3]) + (", ..." if len(part) > 3 else "")
    return [f"{len(part)} of {len(whole)} {kind} {fault}{'' if fault[-1] in '.?' else '.'} ({some})"] if part else []
