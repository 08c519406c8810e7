"""Files to arrays: what other code bases wrote, what is refused, masks whole or absent, names in their order."""

from __future__ import annotations

import inspect
import os
import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pixelss import io, viz
from tests.processes import run_script
from tests.test_unpickle import save

SIGNATURES = {
    "read_cam": "(path, num_classes, *, maps=None, background=False)",
    "read_mask": "(path, *, palette=None)",
    "write_mask": "(path, mask, *, palette=None)",
}

BLOCKS = {
    "read_cam": "reads files, numpy out",
    "read_mask": "reads files, numpy out",
    "write_mask": "writes files, numpy in",
}

MAPS = np.random.default_rng(0).random((2, 4, 5)).astype(np.float32)


def expected(classes=(3, 7), num_classes=20):
    cam = np.zeros((num_classes, 4, 5), np.float32)
    for n, one in zip(classes, MAPS, strict=True):
        cam[n] = one
    return cam


FILES = {
    "PSA": {3: MAPS[0], 7: MAPS[1]},
    "numpy keys": {np.int64(3): MAPS[0], np.int64(7): MAPS[1]},
    "tensors": {3: torch.from_numpy(MAPS[0]), 7: torch.from_numpy(MAPS[1])},
    "IRN": {"keys": torch.tensor([3, 7]), "cam": torch.zeros(2, 1, 2), "high_res": MAPS},
    "IRN, lists": {"keys": [3, 7], "cam": torch.zeros(2, 1, 2), "high_res": MAPS},
    "Puzzle": {"keys": np.array([0, 4, 8]), "cam": torch.zeros(2, 1, 2), "hr_cam": MAPS},
    "CLIP-ES": {"keys": np.array([3, 7]), "attn_highres": MAPS},
    "Fortran": {3: np.asfortranarray(MAPS[0]), 7: MAPS[1][::-1][::-1]},
}


@pytest.mark.parametrize("protocol", [None, *range(6)])
@pytest.mark.parametrize("name", FILES)
def test_cam_files_of_other_code(name, protocol, tmp_path):
    cam = io.read_cam(save(tmp_path / "x.pkl", FILES[name], protocol), 20)
    assert cam.dtype == np.float32
    assert (cam == expected()).all()
    torch.from_numpy(cam)  # writeable, else it warns


def test_other_maps_of_a_file(tmp_path):
    path = save(tmp_path / "x", {"keys": np.array([1]), "cam": torch.full((1, 2, 3), 0.5)}, None)
    assert io.read_cam(path, 2, maps="cam")[1].tolist() == [[0.5] * 3] * 2
    with pytest.raises(ValueError, match=r"no maps at full size. Pass maps=, one of 'cam'"):
        io.read_cam(path, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_maps_of_other_dtypes(dtype, tmp_path):
    path = save(tmp_path / "x", {0: torch.full((2, 3), 0.25, dtype=dtype)}, 2)
    assert io.read_cam(path, 1).tolist() == [[[0.25] * 3] * 2]


def test_background_of_crf_scores(tmp_path):
    path = save(tmp_path / "x", {0: MAPS[0], 20: MAPS[1]}, None)
    with pytest.raises(ValueError, match=r"classes in 0..19, but holds 20. .* Pass background=True"):
        io.read_cam(path, 20)
    assert (io.read_cam(path, 20, background=True) == expected((0, 20), 21)).all()


def test_settings_of_the_other_kind_of_file_are_refused(tmp_path):
    keys, classes = save(tmp_path / "a", FILES["IRN"], None), save(tmp_path / "b", FILES["PSA"], None)
    with pytest.raises(ValueError, match=r"a.* has keys, .* Pass background=False"):
        io.read_cam(keys, 20, background=True)
    with pytest.raises(ValueError, match=r"b.* has no keys, .* Pass maps=None, not 'cam'"):
        io.read_cam(classes, 20, maps="cam")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no map, as of an image without tags"),
        ({"keys": np.zeros(0, int), "high_res": np.zeros((0, 4, 5))}, "holds no map"),
        ({20: MAPS[0]}, r"classes in 0..19, but holds 20"),
        ({-1: MAPS[0]}, r"classes in 0..19, but holds -1"),
        ({"cat": MAPS[0]}, r"classes in 0..19, but holds 'cat'"),
        ({1: MAPS}, r"maps \(H, W\) of one size, but class 1 has shape \(2, 4, 5\)"),
        ({1: MAPS[0], 2: MAPS[0, 1:]}, r"class 2 has shape \(3, 5\)"),
        ({1: ["a"]}, "must hold maps of numbers"),
        ({"keys": [1, 2, 3], "high_res": MAPS}, "holds 3 keys and 2 maps"),
        ([MAPS], "must hold a dict of CAMs, but holds list"),
        (MAPS, r"must hold a dict of CAMs, but holds an array of shape \(2, 4, 5\)"),
    ],
)
def test_files_that_are_refused(content, message, tmp_path):
    path = save(tmp_path / "x", content, 4)
    with pytest.raises(ValueError, match=message) as caught:
        io.read_cam(path, 20)
    assert str(path) in str(caught.value)


def test_damaged_files(tmp_path):
    whole = save(tmp_path / "x", FILES["IRN"], None).read_bytes()
    for content in (b"", b"\x93NUMPY", whole[: len(whole) // 2], b"no pickle", whole[:-1]):
        (tmp_path / "y").write_bytes(content)
        with pytest.raises(ValueError, match=r"is no file of np.save or pickle, or is damaged"):
            io.read_cam(tmp_path / "y", 20)
    with pytest.raises(FileNotFoundError):
        io.read_cam(tmp_path / "absent.npy", 20)
    np.save(tmp_path / "plain.npy", MAPS)  # needs no pickle
    with pytest.raises(ValueError, match="holds an array of shape"):
        io.read_cam(tmp_path / "plain.npy", 20)


# masks

label_maps = arrays.arrays(
    np.int64, arrays.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.integers(0, 255)
)


@given(label_maps, st.sampled_from([np.uint8, np.uint16, np.int16, ">i4", np.int64]))
def test_masks_come_back(tmp_path_factory, mask, dtype):
    path = tmp_path_factory.mktemp("masks") / "new" / "a.png"
    io.write_mask(path, mask.astype(dtype))
    again = io.read_mask(path)
    assert again.dtype == np.int64
    assert (again == mask).all()
    io.write_mask(path, torch.from_numpy(mask))
    assert (io.read_mask(path) == mask).all()
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_a_mask_is_what_others_read(tmp_path):
    image = pytest.importorskip("PIL.Image")
    io.write_mask(tmp_path / "a.png", [[0, 1, 255]])
    with image.open(tmp_path / "a.png") as png:
        assert png.mode == "P"
        assert png.convert("RGB").getpixel((2, 0)) == (224, 224, 192)
        assert np.array(png).tolist() == [[0, 1, 255]]
        assert (np.array(png.getpalette()).reshape(-1, 3) == viz.voc_palette()).all()
    io.write_mask(tmp_path / "a.png", [[0, 1]], palette=[[1, 2, 3], [4, 5, 6]])
    with image.open(tmp_path / "a.png") as png:
        assert np.array(png.convert("RGB")).tolist() == [[[1, 2, 3], [4, 5, 6]]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16"])
def test_modes_that_hold_indices(mode, tmp_path):
    image = pytest.importorskip("PIL.Image")
    mask = np.array([[0, 1], [1, 0]]) if mode == "1" else np.array([[0, 300 if mode == "I;16" else 3]])
    dtype = {"1": bool, "I;16": np.uint16}.get(mode, np.uint8)
    picture = image.fromarray(mask.astype(dtype))
    if mode == "P":
        picture.putpalette([0, 0, 0] * 256)
    assert picture.mode == mode
    picture.save(tmp_path / "a.png")
    assert (io.read_mask(tmp_path / "a.png") == mask).all()


@given(label_maps)
def test_colours_are_read_by_their_palette(tmp_path_factory, mask):
    image = pytest.importorskip("PIL.Image")
    path = tmp_path_factory.mktemp("masks") / "a.png"
    image.fromarray(viz.voc_palette()[mask]).save(path)
    with pytest.raises(
        ValueError, match=r"a.png must hold class indices .* holds colours \(RGB\). .* Pass palette=pixelss"
    ):
        io.read_mask(path)
    assert (io.read_mask(path, palette=viz.voc_palette()) == mask).all()


def test_colours_that_no_class_has(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.full((2, 2, 3), 7, np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"holds the colour \(7, 7, 7\), which palette does not"):
        io.read_mask(tmp_path / "a.png", palette=viz.voc_palette())
    image.new("LA", (2, 2)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="has mode LA"):
        io.read_mask(tmp_path / "b.png")


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([[0, 256]], ValueError, "mask must hold 0 to 255, but holds 256. 8 bits hold no more: keep it by np.save"),
        ([[0, -1]], ValueError, r"but holds -1. Void is 255 in such files: mask.where\(mask >= 0, 255\)"),
        ([[0.0, 1.0]], TypeError, "mask must be of integer dtype, but is torch.float64"),
        ([[True]], TypeError, "mask must be of integer dtype, but is torch.bool"),
        ([["cat"]], TypeError, "mask must hold numbers, but is an array of dtype <U3"),
        (torch.zeros(1, 2).bfloat16(), TypeError, "mask must be of integer dtype, but is torch.bfloat16"),
        ([[[0]]], ValueError, r"mask must have shape \(H, W\), .* of a batch take one"),
        (np.zeros((0, 3), int), ValueError, "H is 0"),
    ],
)
def test_masks_that_are_refused(mask, error, message, tmp_path):
    with pytest.raises(error, match=message):
        io.write_mask(tmp_path / "a.png", mask)
    assert not list(tmp_path.iterdir())


def test_other_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in .png, which keeps every value"):
        io.write_mask(tmp_path / "a.jpg", [[0]])


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    io.write_mask(path, [[1]])

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        io.write_mask(path, [[2]])
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert io.read_mask(path).tolist() == [[1]]


def test_read_only_arrays_cause_no_warning(tmp_path):
    image, mask, cam = np.zeros((4, 5, 3), np.uint8), np.ones((4, 5), ">i2"), np.full((2, 3), 0.5, ">f4")
    palette = viz.voc_palette()
    for array in (image, mask, cam, palette):
        array.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        viz.overlay_cam(image, cam)
        viz.overlay_mask(image[:, ::-1], mask[:, ::-1], palette=palette)
        viz.heat_map(cam)
        viz.prototype_similarity(np.broadcast_to(cam, (2, 2, 3)), cam[:, :2])
        io.write_mask(tmp_path / "a.png", mask, palette=palette)
        io.write_mask(tmp_path / "a.png", np.broadcast_to(np.int64(3), (4, 5)))


# names


def test_class_names():
    assert len(set(io.VOC_CLASSES)) == len(io.VOC_CLASSES) == 20
    assert tuple(sorted(io.VOC_CLASSES)) == io.VOC_CLASSES  # VOC's order is the alphabet's
    assert io.VOC_CLASSES[14] == "person"
    assert len(set(io.COCO_CLASSES)) == len(io.COCO_CLASSES) == 80
    # Category ids 1 to 90 with the ten gaps of the published annotations.
    gaps = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    ids = [i for i in range(1, 91) if i not in gaps]
    names = dict(zip(ids, io.COCO_CLASSES, strict=True))
    known = {1: "person", 13: "stop sign", 27: "backpack", 31: "handbag", 44: "bottle", 46: "wine glass", 62: "chair"}
    known |= {67: "dining table", 70: "toilet", 72: "tv", 82: "refrigerator", 84: "book", 90: "toothbrush"}
    assert {i: names[i] for i in known} == known


def test_every_function_is_documented():
    for name in io.__all__:
        if callable(function := getattr(io, name)):
            doc = inspect.getdoc(function)
            assert not [s for s in ("Args:", "Shape:", "Raises:", "Reference:", "Example:", ">>> ") if s not in doc]
            for argument in inspect.signature(function).parameters:
                assert re.search(rf"^ +{argument}: ", doc, re.MULTILINE), (name, argument)
    assert io.__all__ == sorted(io.__all__)


@pytest.mark.processes
def test_pillow_is_needed_by_masks_alone(tmp_path):
    script = tmp_path / "without.py"
    script.write_text(f"""
import sys
sys.modules["PIL"] = None
from pixelss import io
print(io.VOC_CLASSES[0])
try:
    io.write_mask({str(tmp_path / "a.png")!r}, [[0]])
except ImportError as error:
    print(error)
""")
    assert run_script(script).stdout == 'aeroplane\nMasks as files need Pillow: python -m pip install "pixelss[viz]".\n'


def test_a_mask_that_cannot_be_written_names_its_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    io.write_mask(path, torch.tensor([[1]]))

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"could not write .*x\.png \(No space left on device\); nothing was changed"):
        io.write_mask(path, torch.tensor([[2]]))
    monkeypatch.undo()
    assert io.read_mask(path).tolist() == [[1]]
    assert [one.name for one in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.parametrize("refused", ["open", "mkdir"])
def test_a_read_only_disk_is_told_naming_the_file(tmp_path, monkeypatch, refused):
    def read_only(*_, **__):
        raise OSError(30, "Read-only file system", "the temporary file")

    for name in (refused, "unlink"):  # there, not even what is absent can be removed
        monkeypatch.setattr(io.Path, name, read_only)
    with pytest.raises(OSError, match=r"could not write .*a\.png \(Read-only file system\); nothing was changed"):
        io.write_mask(tmp_path / "a.png", [[1]])
