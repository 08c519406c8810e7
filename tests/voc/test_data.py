"""Lists and class names of a folder in the VOC layout."""

from __future__ import annotations

import pytest
from data import BadFileError, VOCFolder


def test_lists_may_hold_paths_and_missing_ones_say_what_to_get(own_root):
    lists = own_root / "ImageSets/Segmentation"
    (lists / "odd.txt").write_text("/JPEGImages/a_b.jpg /SegmentationClassAug/a_b.png\n\nc\n")
    data = VOCFolder(own_root)
    assert data.stems("odd") == ["a_b", "c"]
    with pytest.raises(FileNotFoundError, match=r"train_aug\.txt is missing.*SBD"):
        data.stems("train_aug")
    (lists / "empty.txt").write_text("\n")
    with pytest.raises(BadFileError, match="lists no image"):
        data.stems("empty")


def test_names_of_classes_may_hold_spaces(own_root):
    (own_root / "classes.txt").write_text("traffic light\n dog \n\n")
    assert VOCFolder(own_root).classes == ["traffic light", "dog"]
