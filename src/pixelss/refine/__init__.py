"""Scores to better scores and label maps."""

from pixelss._lattice import PermutohedralLattice
from pixelss._maps import background_score, label_probs
from pixelss.refine.crf import DenseCRF, dense_crf
from pixelss.refine.labels import pseudo_labels
from pixelss.refine.walk import random_walk

__all__ = [
    "DenseCRF",
    "PermutohedralLattice",
    "background_score",
    "dense_crf",
    "label_probs",
    "pseudo_labels",
    "random_walk",
]
