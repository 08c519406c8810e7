"""Scores to better scores and label maps."""

from pixelss._lattice import PermutohedralLattice
from pixelss._maps import background_score, label_probs
from pixelss.refine.adaptive import PixelAdaptiveRefinement, pixel_adaptive_refinement
from pixelss.refine.attention import cam_boxes, refine_by_affinity
from pixelss.refine.centroids import centroids
from pixelss.refine.crf import DenseCRF, dense_crf
from pixelss.refine.difference import lost_classes, merge_by_difference
from pixelss.refine.labels import pseudo_labels
from pixelss.refine.segments import vote_segments
from pixelss.refine.smoothing import variation_smoothing
from pixelss.refine.walk import random_walk

__all__ = [
    "DenseCRF",
    "PermutohedralLattice",
    "PixelAdaptiveRefinement",
    "background_score",
    "cam_boxes",
    "centroids",
    "dense_crf",
    "label_probs",
    "lost_classes",
    "merge_by_difference",
    "pixel_adaptive_refinement",
    "pseudo_labels",
    "random_walk",
    "refine_by_affinity",
    "variation_smoothing",
    "vote_segments",
]
