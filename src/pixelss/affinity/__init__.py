"""Affinities of pairs of cells, and the labels to learn them from."""

from pixelss._pairs import pair_offsets
from pixelss.affinity.labels import affinity_labels
from pixelss.affinity.net import AffinityHead

__all__ = ["AffinityHead", "affinity_labels", "pair_offsets"]
