"""PASCAL VOC's colours, by the bits of the class: what its development kit says in a loop."""

from __future__ import annotations

import numpy as np
import pytest

from pixelss import io, viz
from pixelss._palette import voc_palette

SIGNATURES = {"voc_palette": "()"}
BLOCKS = {"voc_palette": "a picture's colours, no tensors"}


def colour_by_loops(index):
    channels = [0, 0, 0]
    for level in range(7, -1, -1):
        for channel in range(3):
            channels[channel] |= (index >> channel & 1) << level
        index >>= 3
    return channels


def test_palette():
    assert voc_palette().tolist() == [colour_by_loops(index) for index in range(256)]


@pytest.mark.parametrize(
    ("palette", "error", "message"),
    [
        ([1, 2, 3], ValueError, r"must have shape \(K, C=3\)"),
        ([[0, 0, 300]], ValueError, "must hold levels 0 to 255, but ranges from 0 to 300"),
        ([[0, -1, 0]], ValueError, "must hold levels 0 to 255, but ranges from -1 to 0"),
        (np.zeros((257, 3), int), ValueError, "must hold up to 256 colours, but holds 257"),
        ([[0.1, 0, 0]], TypeError, "must be of integer dtype, but is torch.float64"),
        ([["red"] * 3], TypeError, "must hold numbers, but is an array of dtype <U3"),
    ],
)
def test_palettes_that_are_refused(palette, error, message, tmp_path):
    with pytest.raises(error, match=f"palette {message}"):
        io.write_mask(tmp_path / "a.png", [[0]], palette=palette)
    with pytest.raises(error, match=f"palette {message}"):
        viz.overlay_mask(np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1), int), palette=palette)
    assert not list(tmp_path.iterdir())
