"""Photographs in folders of one's own, with a table of tags or a folder a class."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from config import Data
from data import BadFileError, VOCFolder, open_data
from PIL import Image
from survey import tag_lines
from tagged import TaggedFolder


def write_images(root: Path, *names: str, size: tuple[int, int] = (6, 4)) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (200, 100, 50)).save(root / name)


def folder_of(root: Path, table: str, **options) -> TaggedFolder:
    (root / "tags.csv").write_text(table, encoding="utf-8")
    return TaggedFolder(root, root / "tags.csv", **options)


def test_images_anywhere_are_found_by_path_or_name_with_or_without_suffix(tmp_path):
    write_images(tmp_path, "a.v1.jpg", "in/b 2.PNG", "in/deep/c.jpeg", "d.webp", "in/e.bmp", "other.jpg", ".hidden.jpg")
    (tmp_path / "in/phone.HEIC").touch()
    write_images(tmp_path, "in/K\u00e4fer.jpg", ".cache/x.jpg")
    table = "image,tags\na.v1,cat\nb 2.PNG,dog\nin\\deep\\c.jpeg,cat dog\n./d.webp,\nin/e,cow\nKa\u0308fer.jpg,cow\n"
    data = folder_of(tmp_path, table)
    assert data.stems("all") == ["a.v1", "in/b 2", "in/deep/c", "d", "in/e", "in/K\u00e4fer"]
    assert data.classes == ["cat", "cow", "dog"]
    assert data.tags("in/deep/c").tolist() == [1, 0, 1]
    assert data.tags("d").tolist() == [0, 0, 0]
    assert data.image("in/b 2").shape == (4, 6, 3)
    assert data.image_path("in/b 2") == tmp_path / "in/b 2.PNG"
    assert data.unlisted == 1
    assert [path.name for path in data.unread] == ["phone.HEIC"]
    lines = tag_lines(data, "all", data.stems("all"))
    assert lines[-2].startswith(f"1 images below {tmp_path} are left out: {tmp_path}/tags.csv has no row of them")
    assert lines[-1].startswith(f"1 pictures below {tmp_path} are not read (.HEIC)")
    assert data.stems(None) == []
    with pytest.raises(BadFileError, match="some image, but None holds none"):
        data.stems("masks")
    assert torch.equal(pickle.loads(pickle.dumps(data)).tags("in/e"), data.tags("in/e"))  # as workers get it
    with pytest.raises(BadFileError, match="must be all or masks, but is train"):
        data.stems("train")


@pytest.mark.parametrize(("stored", "written"), [("K\u00e4fer", "Ka\u0308fer"), ("Ka\u0308fer", "K\u00e4fer")])
def test_two_systems_write_one_accent_in_two_ways(tmp_path, stored, written):
    write_images(tmp_path, f"in/{stored}.jpg")
    data = folder_of(tmp_path, f"image,tags\n{written}.jpg,{written}\n")
    assert data.image(f"in/{stored}").shape == (4, 6, 3)
    assert data.classes == ["K\u00e4fer"]


def test_rows_that_cannot_be_meant_name_their_line(tmp_path):
    write_images(tmp_path, "one/a.jpg", "two/a.jpg", "b.jpg", "b.png")
    for rows, message in (
        ("a.jpg,cat", r"line 2, must name one image below .*, but a\.jpg may be .*one/a\.jpg or .*two/a\.jpg"),
        ("../x.jpg,cat", r"line 2, must name an image below"),
        ("/x.jpg,cat", r"line 2, must name an image below"),
        ("b.jpg,cat\nb.png,cat", r"b\.jpg and .*b\.png must differ in more than the suffix"),
        (
            "one/a.jpg,Cat\ntwo/a.jpg,cat",
            r"tags\.csv must name every class once, in one spelling, but has \['Cat', 'cat'\]",
        ),
        ("one/a.jpg,background", r"tags\.csv must name foreground classes alone"),
        ("one/a.jpg,", r"tags\.csv must name one class or more"),
    ):
        with pytest.raises(BadFileError, match=message):
            folder_of(tmp_path, f"image,tags\n{rows}\n")
    data = folder_of(tmp_path, f"image,tags\n{tmp_path}/one/a.jpg,cat\nnone.jpg,cat\n")
    assert data.stems("all") == ["one/a", "none"]
    with pytest.raises(BadFileError, match=r"none\.jpg is missing"):
        data.image("none")
    data = folder_of(tmp_path, "image,tags\none/a.jpg,cat\ntwo/a.jpg,hot dog\n", classes=["cat", "hot dog"])
    with pytest.raises(BadFileError, match=r"tags\.csv, line 3, names \['dog', 'hot'\], but the classes are"):
        data.tags("two/a")


def test_a_folder_a_class(tmp_path):
    write_images(tmp_path, "cat/1.jpg", "cat/deep/2.jpg", "dog/1.jpg", "none.jpg", "masks/cat/1.png")
    data = TaggedFolder(tmp_path, None, masks=tmp_path / "masks")
    assert data.classes == ["cat", "dog"]
    assert data.stems("all") == ["cat/1", "cat/deep/2", "dog/1", "none"]
    assert [data.tags(stem).tolist() for stem in data.stems("all")] == [[1, 0], [1, 0], [0, 1], [0, 0]]
    write_images(tmp_path, "background/3.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadFileError, match=r"foreground classes alone.*An image without any class has no tags"):
        TaggedFolder(tmp_path, None, masks=tmp_path / "masks")
    with pytest.raises(BadFileError, match="holds no image"):
        TaggedFolder(tmp_path / "empty", None)


def test_masks_are_found_checked_and_shrunk_with_their_images(tmp_path):
    write_images(tmp_path, "in/a.jpg", "in/b.jpg", "c.jpg", size=(64, 40))
    (tmp_path / "masks/in").mkdir(parents=True)
    mask = np.zeros((40, 64), np.uint8)
    mask[:, 32:] = 2
    for name in ("in/a.png", "c.png"):
        Image.fromarray(mask).save(tmp_path / "masks" / name)
    table = "image,tags\nin/a.jpg,cat\nin/b.jpg,dog\nc.jpg,dog\n"
    data = folder_of(tmp_path, table, masks=tmp_path / "masks", longest=32)
    assert data.stems("masks") == ["in/a", "c"]
    assert data.image("c").shape[:2] == data.size("c") == (20, 32)
    assert np.array_equal(data.mask("c"), mask[::2, ::2])
    Image.fromarray(mask[::2, ::2]).save(tmp_path / "c.png")
    assert np.array_equal(data.mask("c", folder=tmp_path), mask[::2, ::2])  # as the stages write them
    Image.fromarray(mask[:20]).save(tmp_path / "masks/c.png")
    with pytest.raises(BadFileError, match=r"its image's size \(40, 64\), but has \(20, 64\)"):
        data.mask("c")
    with pytest.raises(BadFileError, match="no such mask"):
        data.mask("in/b")
    with pytest.raises(BadFileError, match=r"--masks must hold .*in/a\.png and .*a\.png are missing"):
        folder_of(tmp_path, table, masks=tmp_path / "in").stems("masks")
    assert folder_of(tmp_path, table).mask_paths("c") == []


def test_class_names_in_the_folder_give_the_order(tmp_path):
    write_images(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    assert folder_of(tmp_path, "image,tags\na,cat\nb,dog\n").classes == ["dog", "cat"]
    assert folder_of(tmp_path, "image,tags\na,cat\nb,dog\n", classes=["cat", "dog"]).classes == ["cat", "dog"]


def test_the_settings_choose_the_data_set(tmp_path, monkeypatch):
    write_images(tmp_path, "photographs/cat/a.jpg")
    root = tmp_path / "photographs"
    (root / "tags.csv").write_text("image,tags\na,dog\n")
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_data(root, Data()), VOCFolder)
    for tags, name in (("tags.csv", "dog"), ("photographs/tags.csv", "dog"), ("folders", "cat")):
        assert open_data(Path("photographs/../photographs"), Data(tags=tags)).classes == [name]
    for settings, error, message in (
        (Data(tags="none.csv"), FileNotFoundError, r"--tags must be a table, or the word folders.*none\.csv"),
        (Data(tags="folders", masks=Path("none")), FileNotFoundError, "--masks must be a folder"),
        (Data(longest=5), ValueError, "give data.tags too"),
    ):
        with pytest.raises(error, match=message):
            open_data(root, settings)
    with pytest.raises(FileNotFoundError, match="--data must be a folder of images"):
        open_data(tmp_path / "none", Data(tags="folders"))
