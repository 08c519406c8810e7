"""Stage train_affinity: kinds of pairs, and masks at the centres of cells."""

from __future__ import annotations

import torch
import train_affinity
from torch.testing import assert_close

import pixelss


def test_kinds_of_pairs_sum_to_the_loss():
    maps = torch.randint(0, 3, (2, 9, 9))
    labels = pixelss.affinity_labels(maps, maps, radius=3)
    affinity = torch.rand(labels.shape)
    loss, parts = train_affinity.kind_by_kind(affinity, labels)
    assert_close(loss, pixelss.affinity_loss(affinity, labels), check_dtype=False)
    assert set(parts) == {"different", "background", "foreground"}


def test_label_maps_are_read_at_the_centres_of_cells():
    maps = torch.arange(16 * 16).view(1, 16, 16)
    assert train_affinity.subsampled(maps, (2, 2)).tolist() == [
        [[4 * 16 + 4, 4 * 16 + 12], [12 * 16 + 4, 12 * 16 + 12]]
    ]
    assert train_affinity.subsampled(maps, (16, 16)).equal(maps)
