"""Curves and grids, checked on pixels."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from pixelss import viz
from pixelss.viz import plots

SIGNATURES = {
    "grid": "(rows, *, titles=(), names=(), legend=None, heat='', cell=160)",
    "threshold_curves": "(curves, *, ylabel='mIoU (%)', width=560)",
}

BLOCKS = dict.fromkeys(("grid", "threshold_curves"), "a picture: numpy in and out")

IMAGE = np.random.default_rng(0).integers(0, 256, (12, 18, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
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
