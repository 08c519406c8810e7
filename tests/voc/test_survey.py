"""What is said of the data before a training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data import BadFileError, VOCFolder
from PIL import Image
from survey import mask_lines, tag_lines


def write_set(root: Path, classes: str, tags: list[str], masks: list[list[int]] | None = None) -> VOCFolder:
    """A folder of images `i0`, `i1`, ...; tags are words, masks a row of pixels."""
    for name in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(classes.split()))
    (root / "ImageSets/Segmentation/train.txt").write_text("".join(f"i{i}\n" for i in range(len(tags))))
    for i, words in enumerate(tags):
        objects = "".join(f"<object><name>{name}</name></object>" for name in words.split())
        (root / f"Annotations/i{i}.xml").write_text(f"<annotation>{objects}</annotation>")
        row = np.array([masks[i] if masks else [0, 0]], np.uint8)
        Image.fromarray(row).save(root / f"JPEGImages/i{i}.jpg")
        Image.fromarray(row).save(root / f"SegmentationClass/i{i}.png")
    return VOCFolder(root)


def test_images_a_class_and_what_has_none(tmp_path):
    data = write_set(tmp_path, "cat dog cow", ["cat dog", "", "cat", "", "", ""])
    assert tag_lines(data, "train", data.stems("train")) == [
        "Training list train: 6 images; 3 classes: cat 2, dog 1, cow 0.",
        "4 of 6 images have no tag: they show no class. (i1, i3, i4, ...)",
        "1 of 3 classes have no image, so their CAMs learn nothing. (cow)",
    ]


def test_a_list_without_any_tag_is_refused_whatever_the_reason(tmp_path):
    with pytest.raises(BadFileError, match=r"2 images of the list train have no tag at all: .*i0\.xml"):
        tag_lines(write_set(tmp_path, "cat", ["", ""]), "train", ["i0", "i1"])


def test_many_classes_are_counted_in_short(tmp_path):
    data = write_set(tmp_path, " ".join(f"c{i}" for i in range(50)), ["c1", "c1 c2"])
    first, absent = tag_lines(data, "train", data.stems("train"))
    assert first.endswith("50 classes: 0 to 2 images each.")
    assert absent.startswith("48 of 50 classes have no image")


def test_bad_tags_stop_or_are_counted(tmp_path):
    data = write_set(tmp_path, "cat", ["cat", "dragon"])
    with pytest.raises(BadFileError, match="dragon"):
        tag_lines(data, "train", data.stems("train"))
    assert "1 of 2 images have tags that cannot be read. (i1)" in tag_lines(
        data, "train", data.stems("train"), skips=True
    )


def test_masks_whose_objects_are_void(tmp_path):
    data = write_set(tmp_path, "thing", ["thing", "thing", "", "thing"], [[0, 255], [255, 255], [0, 0], [0, 1]])
    (line,) = mask_lines(data, "train", data.stems("train"))
    assert line.startswith("2 of 4 masks of the list train hold no pixel of a class, only 0 and 255. 255 is void")
    assert line.endswith("(i0, i1)")
    assert (
        "3 of 4" in mask_lines(data, "train", data.stems("train"), with_tags=False)[0]
    )  # nothing tells that i2 shows none


def test_masks_of_classes_in_another_order(tmp_path):
    data = write_set(tmp_path, "cat dog", ["cat", "dog", "cat dog"], [[0, 2], [255, 1], [1, 2]])
    (line,) = mask_lines(data, "train", data.stems("train"))
    assert line.startswith("2 of 3 masks of the list train show a class that their tags lack. Do they number")
    assert "cat, dog" in line


def test_masks_that_are_right_are_not_spoken_of(tmp_path):
    data = write_set(tmp_path, "cat dog", ["cat", "dog"], [[0, 1], [2, 255]])
    assert mask_lines(data, "train", data.stems("train")) == []


def test_where_no_tags_can_be_read_the_reason_is_told(tmp_path):
    data = write_set(tmp_path, "cat", ["cats", "cats"])
    with pytest.raises(BadFileError, match=r"i0\.xml names \['cats'\], but the classes are .*: correct .*classes\.txt"):
        tag_lines(data, "train", data.stems("train"), skips=True)
