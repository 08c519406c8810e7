"""Arrays to pictures, numpy in and numpy out; only `grid` and `threshold_curves` need matplotlib."""

from pixelss._palette import voc_palette
from pixelss.viz.overlays import overlay_cam, overlay_mask, prototype_similarity
from pixelss.viz.pixels import heat_map
from pixelss.viz.plots import grid, threshold_curves

__all__ = [
    "grid",
    "heat_map",
    "overlay_cam",
    "overlay_mask",
    "prototype_similarity",
    "threshold_curves",
    "voc_palette",
]
