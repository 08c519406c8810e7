"""Masks from CAMs by a CRF or by pixel-adaptive refinement."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from config import CRF, PAR
from crf_labels import refined_masks, with_background, write_crf_labels

import pixelss
from tests.voc.runs import cam_of, new_run, write_random_cams


def test_crf_labels_of_one_lattice_equal_separate_ones(shapes: Path, tmp_path: Path) -> None:
    made = new_run(shapes, tmp_path / "run", weights=False)
    write_random_cams(made, "train")
    write_crf_labels(made)
    crf = made.config.affinity.crf
    for stem in made.data.stems("train"):
        cam, tags = cam_of(stem, made)[None], made.data.tags(stem)
        levels = torch.from_numpy(made.data.image(stem)).permute(2, 0, 1)[None].contiguous()
        for name, alpha in (("low", made.config.affinity.alpha_low), ("high", made.config.affinity.alpha_high)):
            present = [0, *(1 + c for c in range(4) if tags[c])]
            probs = torch.cat([(1 - cam.amax(1, keepdim=True)) ** alpha, cam], 1)[:, present]
            result = pixelss.dense_crf(
                levels, probs, iterations=crf.iterations, gaussian=crf.gaussian, bilateral=crf.bilateral
            )
            wanted = torch.tensor(present)[result[0].argmax(0)]
            found = made.data.mask(stem, folder=made.folder("train_affinity") / "labels" / name)
            assert (torch.from_numpy(found) == wanted).all()


def test_label_maps_without_a_tag_are_background() -> None:
    image, tags = np.zeros((5, 6, 3), np.uint8), torch.zeros(3)
    scores = with_background(torch.zeros(1, 3, 5, 6), tags, torch.ones(1, 1, 5, 6))
    for settings in (None, CRF(iterations=1), PAR(iterations=1)):
        (labels,) = refined_masks(image, scores, tags, settings)
        assert labels.dtype == np.uint8
        assert labels.shape == (5, 6)
        assert not labels.any()
