"""CAMs, masks and similarities over their image, checked on pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pixelss import viz
from tests.viz.test_pixels import lightness

SIGNATURES = {
    "overlay_cam": "(image, cam, *, alpha=0.65)",
    "overlay_mask": "(image, mask, *, alpha=0.6, palette=None)",
    "prototype_similarity": "(features, prototypes)",
}

PICTURES = "overlay_cam", "overlay_mask", "prototype_similarity"
BLOCKS = dict.fromkeys(PICTURES, "a picture: numpy in and out")

IMAGE = np.random.default_rng(0).integers(0, 256, (12, 18, 3)).astype(np.uint8)


def test_palette_is_pascal_voc():
    palette = viz.voc_palette()
    assert palette.shape == (256, 3)
    assert palette.dtype == np.uint8
    assert palette[[0, 1, 2, 3, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192],
    ]  # fmt: skip
    assert len(np.unique(palette, axis=0)) == 256


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
    ],
)
def test_bad_input_raises(call, error, message):
    with pytest.raises(error, match=message):
        call()
