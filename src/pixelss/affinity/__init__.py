"""Affinities of pairs of cells, and the labels to learn them from."""

from pixelss._pairs import pair_offsets
from pixelss.affinity.attention import attention_affinity, sinkhorn_affinity
from pixelss.affinity.boundary import BoundaryHead
from pixelss.affinity.labels import affinity_labels
from pixelss.affinity.net import AffinityHead
from pixelss.affinity.path import path_affinity

__all__ = [
    "AffinityHead",
    "BoundaryHead",
    "affinity_labels",
    "attention_affinity",
    "pair_offsets",
    "path_affinity",
    "sinkhorn_affinity",
]
