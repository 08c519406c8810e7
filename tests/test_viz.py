"""Pictures: colours, mixtures and layout, checked on pixels."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pixelss import viz
from pixelss.viz import plots

IMAGE = np.random.default_rng(0).integers(0, 256, (12, 18, 3)).astype(np.uint8)
# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
EYES = {
    "all cones": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lightness(colours, eyes="all cones"):
    """CIE L* of sRGB levels, seen by the given eyes."""
    x = colours / 255
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    y = (linear @ np.array(EYES[eyes]).T).clip(0, 1) @ [0.2126, 0.7152, 0.0722]
    return np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y)


def test_palette_is_pascal_voc():
    palette = viz.voc_palette()
    assert palette.shape == (256, 3)
    assert palette.dtype == np.uint8
    assert palette[[0, 1, 2, 3, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192],
    ]  # fmt: skip
    assert len(np.unique(palette, axis=0)) == 256


@pytest.mark.parametrize("eyes", EYES)
def test_heat_gets_lighter_for_every_eye(eyes):
    steps = np.diff(lightness(viz.heat_map(np.linspace(0, 1, 41)), eyes))
    assert steps.min() > 0.5
    assert lightness(viz.heat_map([0.0, 1.0]), eyes)[1] > 90


def test_heat_is_matplotlibs_inferno():
    matplotlib = pytest.importorskip("matplotlib")
    inferno = 255 * np.array(matplotlib.colormaps["inferno"].colors)
    assert np.abs(viz.heat_map(np.linspace(0, 1, 256)) - inferno).max() <= 7


def test_heat_of_what_lies_outside():
    values = np.array([np.nan, -np.inf, -2, 7, np.inf])
    assert (viz.heat_map(values) == viz.heat_map([0, 0, 0, 1, 1])).all()
    assert viz.heat_map(np.zeros((2, 3, 4))).shape == (2, 3, 4, 3)
    with pytest.raises(TypeError, match="values must hold numbers"):
        viz.heat_map(["a"])


def test_overlay_cam_at_both_ends_of_alpha():
    cam = np.random.default_rng(1).random((12, 18))
    assert (viz.overlay_cam(IMAGE, cam, alpha=1) == viz.heat_map(cam)).all()
    grey = viz.overlay_cam(IMAGE, cam, alpha=0)
    assert (grey == grey[..., :1]).all()
    assert np.abs(grey[..., 0] - IMAGE @ [0.299, 0.587, 0.114]).max() <= 0.5


def test_overlay_cam_resizes_as_torch_does():
    cam = np.random.default_rng(1).random((3, 4))
    size = {"size": (12, 18), "mode": "bilinear", "align_corners": False}
    large = torch.nn.functional.interpolate(torch.tensor(cam)[None, None], **size)[0, 0].numpy()
    assert np.abs(viz.overlay_cam(IMAGE, cam).astype(int) - viz.overlay_cam(IMAGE, large)).max() <= 1


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 255))
def test_overlay_cam_shows_more_activation_lighter(low, high, level):
    low, high = sorted((low, high))
    image = np.full((1, 1, 3), level, dtype=np.uint8)
    dark, light = (lightness(viz.overlay_cam(image, [[value]]))[0, 0] for value in (low, high))
    assert dark <= light + 0.5  # rounding to levels
    assert high - low < 0.05 or dark < light


def test_overlay_mask_leaves_the_background_and_paints_the_rest():
    mask = np.zeros((12, 18), dtype=np.uint8)
    mask[2, 3], mask[4, 5] = 1, 255
    picture = viz.overlay_mask(IMAGE, mask, alpha=1)
    assert picture[2, 3].tolist() == [128, 0, 0]
    assert picture[4, 5].tolist() == [224, 224, 192]
    assert (picture == IMAGE)[mask == 0].all()
    half = viz.overlay_mask(IMAGE, mask, alpha=0.5)[2, 3]
    assert np.abs(half - (IMAGE[2, 3] + np.array([128, 0, 0])) / 2).max() <= 0.5
    own = viz.overlay_mask(IMAGE, np.ones_like(mask), alpha=1, palette=[[0, 0, 0], [1, 2, 3]])
    assert (own == [1, 2, 3]).all()


@pytest.mark.parametrize(("value", "palette"), [(-1, None), (256, None), (2, [[0, 0, 0], [9, 9, 9]])])
def test_a_class_without_a_colour_raises(value, palette):
    mask = np.zeros((12, 18), dtype=np.int64)
    mask[0, 0] = value
    with pytest.raises(ValueError, match=f"mask must hold classes in .*{value}"):
        viz.overlay_mask(IMAGE, mask, palette=palette)


def test_prototype_similarity_is_the_cosine():
    rng = np.random.default_rng(2)
    features, prototypes = rng.random((5, 3, 4)), rng.standard_normal((2, 5))
    expected = [
        [
            [f @ p / np.linalg.norm(f) / np.linalg.norm(p) for f in features[:, y].T]
            for y in range(3)
        ]
        for p in prototypes
    ]  # fmt: skip
    result = viz.prototype_similarity(features, prototypes)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=1e-6)
    assert not viz.prototype_similarity(features, np.zeros((1, 5))).any()


def test_tensors_are_taken_too_and_nothing_is_changed():
    image, cam = torch.from_numpy(IMAGE.copy()), torch.rand(3, 4, requires_grad=True)
    read_only = IMAGE.copy()
    read_only.setflags(write=False)
    assert (viz.overlay_cam(image, cam) == viz.overlay_cam(read_only, cam.detach().numpy())).all()
    assert (image.numpy() == IMAGE).all()
    assert viz.prototype_similarity(torch.rand(5, 3, 4).half(), torch.rand(2, 5).bfloat16()).shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: viz.overlay_cam(IMAGE / 255, [[1.0]]), TypeError, "image must be of dtype uint8"),
        (lambda: viz.overlay_cam(IMAGE[..., 0], [[1.0]]), ValueError, "image must have shape .*channels last"),
        (lambda: viz.overlay_cam(IMAGE, np.zeros((2, 3, 4))), ValueError, r"cam must have shape .*cam\[0, k\]"),
        (lambda: viz.overlay_cam(IMAGE, [[1.0]], alpha=2), ValueError, "alpha must be between 0 and 1"),
        (lambda: viz.overlay_mask(IMAGE, np.zeros((2, 3), dtype=int)), ValueError, "mask must have shape"),
        (lambda: viz.overlay_mask(IMAGE, np.zeros((12, 18))), TypeError, "mask must be of integer dtype"),
        (lambda: viz.prototype_similarity(np.zeros((5, 3, 4)), np.zeros((2, 4))), ValueError, "D is 4"),
        (lambda: viz.grid([]), ValueError, "rows must hold one image or more"),
        (lambda: viz.grid([[IMAGE], [IMAGE, IMAGE]]), ValueError, r"rows\[0\] has 1 images and rows\[1\] 2"),
        (lambda: viz.grid([[IMAGE]], titles=["a", "b"]), ValueError, "titles must be empty or 1 texts, but are 2"),
        (lambda: viz.grid([[IMAGE]], names=["a", "b"]), ValueError, "names must be empty or 1 texts"),
        (lambda: viz.grid([[IMAGE]], cell=1), ValueError, "cell must be between 40"),
        (lambda: viz.threshold_curves({}), ValueError, "curves must map one name or more"),
        (lambda: viz.threshold_curves({"a": ([0, 1], [1.0])}), ValueError, "scores must have shape .*T=2"),
        (lambda: viz.threshold_curves({"a": ([0.0], [np.nan])}), ValueError, "must hold a finite value"),
    ],
)
def test_bad_input_raises(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_grid_puts_every_image_in_its_place():
    pytest.importorskip("matplotlib")
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 99, 199]]], dtype=np.uint8)
    images = [[np.broadcast_to(colour, (50, 100, 3)) for colour in row] for row in colours]
    picture = viz.grid(images, cell=100)
    assert picture.shape == (6 + 2 * 56, 6 + 2 * 106, 3)
    assert picture.dtype == np.uint8
    for i in range(2):
        for j in range(2):
            y, x = 6 + 56 * i, 6 + 106 * j
            inside = picture[y + 2 : y + 48, x + 2 : x + 98]
            assert (inside == colours[i, j]).all()
    assert (picture[:, :4] == 255).all()


def test_grid_writes_titles_names_legend_and_bar():
    pytest.importorskip("matplotlib")
    plain = viz.grid([[IMAGE, IMAGE]])
    legend = {"cat": viz.voc_palette()[8], "a very long name of a class": (0, 0, 250), "dog": (0, 250, 0)}
    full = viz.grid([[IMAGE, IMAGE]], titles=["image", "x" * 60], names=["one"], legend=legend, heat="CAM")
    assert full.shape[1] == plain.shape[1] + 22
    assert full.shape[0] > plain.shape[0] + 22 + 2 * 22
    for colour in legend.values():
        assert (full == np.asarray(colour, dtype=np.uint8)).all(-1).sum() >= 100
    assert (full[:, :4] == 255).all()
    assert (full[:, -4:] == 255).all()  # no text is cut off
    assert (full[:2] == 255).all()
    assert (full[-2:] == 255).all()


def test_threshold_curves_marks_the_best(monkeypatch):
    pytest.importorskip("matplotlib")
    t = np.linspace(0, 0.6, 61)
    score = 0.5 - (t - 0.2) ** 2
    with monkeypatch.context() as patch:
        patch.setattr(plots, "_render", lambda figure: figure)
        (axes,) = viz.threshold_curves({"a": (t, np.where(t < 0.1, np.nan, score))}).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a: 50.0 at 0.20"]
    assert axes.lines[0].get_markevery() == [20]
    one, two = viz.threshold_curves({"a": (t, score)}), viz.threshold_curves({"a": (t, score), "b": (t, score + 0.1)})
    assert one.shape == (367, 560, 3)
    assert (one != two).any()
    narrow = viz.threshold_curves({"a": (t, 0.1 + t / 50), "b": (t, 1 - t / 50)})
    assert (narrow[:, :4] == 255).all()  # "12.25" as a tick pushes no label out
    assert (viz.threshold_curves({"a": (t, 0.1 + t / 50)})[:, :4] == 255).all()
    assert viz.threshold_curves({"a": (torch.tensor(t), torch.tensor(score))}, width=300).shape == (206, 300, 3)
    assert viz.threshold_curves({"a": (t, np.where(t > 0.5, np.nan, score))}).shape == (367, 560, 3)


def test_no_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pixelss\[viz\]"):
        viz.grid([[IMAGE]])
    assert viz.overlay_cam(IMAGE, [[1.0]]).shape == IMAGE.shape
