"""Heat colours, for every eye."""

from __future__ import annotations

import numpy as np
import pytest

from pixelss import viz

SIGNATURES = {
    "heat_map": "(values)",
}

BLOCKS = {"heat_map": "a picture: numpy in and out"}

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
