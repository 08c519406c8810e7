"""The quickstart reads what the pipeline reads."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from data import BadFileError
from PIL import Image
from quickstart import Data, read_data

from tests.voc.test_survey import write_set


def read(root: Path) -> Data:
    return read_data(Namespace(data=root, backbone="small", score_images=2))


@pytest.mark.parametrize("content", [b"cat\ndog\n", b"cat \ndog \n", b"\xef\xbb\xbfcat\ndog\n", b"cat\r\ndog\r\n\r\n"])
@pytest.mark.parametrize("line", ["i0", "/JPEGImages/i0.jpg /SegmentationClassAug/i0.png", "i0  1", "\ufeffi0"])
def test_class_names_and_lists(tmp_path, content, line):
    write_set(tmp_path, "", ["cat"], [[0, 1]])
    (tmp_path / "classes.txt").write_bytes(content)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text(line + "\n", encoding="utf-8")
    data = read(tmp_path)
    assert data.trained == data.scored == ["i0"]
    assert data.folder.classes == ["cat", "dog"]
    assert data.tags["i0"].tolist() == [1, 0]


def test_a_class_that_is_not_listed_is_refused_and_background_is_none(tmp_path):
    write_set(tmp_path, "cat", ["cat dragon"], [[0, 1]])
    with pytest.raises(BadFileError, match=r"i0\.xml names \['dragon'\]"):
        read(tmp_path)
    (tmp_path / "classes.txt").write_text("background\ncat\ndragon\n")
    with pytest.raises(BadFileError, match="foreground classes alone"):
        read(tmp_path)


def test_what_is_odd_is_said_of_the_images_that_are_used(tmp_path, capsys):
    write_set(tmp_path, "cat dog", ["cat", "", "cat"], [[0, 255], [0, 0], [0, 0]])
    (tmp_path / "SegmentationClass/i2.png").unlink()  # not among the scored
    read(tmp_path)
    said = " ".join(capsys.readouterr().err.split())
    assert "cat 2, dog 0." in said
    assert "1 of 3 images have no tag" in said
    assert "1 of 2 masks of the list train hold no pixel of a class, only 0 and 255" in said


def test_images_are_upright(tmp_path):
    data = write_set(tmp_path, "cat", ["cat"], [[0, 1]])
    tag = Image.Exif()
    tag[0x0112] = 6
    Image.fromarray(np.zeros((2, 1, 3), np.uint8)).save(tmp_path / "JPEGImages/i0.jpg", exif=tag)
    assert read(tmp_path).folder.image("i0").shape == (*data.mask("i0").shape, 3)
