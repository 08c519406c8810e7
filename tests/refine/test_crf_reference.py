"""The dense CRF against the C++ code itself, on photographs at their own resolution."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from pixelss import dense_crf

VOC_MINI = Path(
    os.environ.get("PIXELSS_VOC_MINI", Path(__file__).parent.parent.parent.parent / "shared/data/voc12-mini")
)
PHOTOGRAPHS = VOC_MINI.parent / "voc12-native"


def blurred_truth(mask: Tensor, K: int) -> Tensor:
    """Probabilities (K, H, W) as a CAM's: the truth, classes folded to K, blurred over 16 pixels, with noise."""
    H, W = mask.shape
    folded = mask.where(mask != 255, 0).long()
    folded = folded.where(folded == 0, (folded - 1) % (K - 1) + 1)
    truth = torch.nn.functional.one_hot(folded, K).movedim(-1, 0)[None].float()
    coarse = interpolate(truth, size=(-(-H // 16), -(-W // 16)), mode="area")
    scores = interpolate(coarse, size=(H, W), mode="bilinear")[0]
    return (3 * scores + torch.randn(K, H, W, generator=torch.Generator().manual_seed(0))).softmax(0)


def c_code(image: np.ndarray, probs: Tensor, iterations: int = 10) -> Tensor:
    densecrf = pytest.importorskip("pydensecrf.densecrf", reason="install the extra crf-reference")
    K, H, W = probs.shape
    crf = densecrf.DenseCRF2D(W, H, K)
    crf.setUnaryEnergy(-probs.clamp(1e-5, 1).log().flatten(1).numpy())
    crf.addPairwiseGaussian(sxy=3, compat=3)
    crf.addPairwiseBilateral(sxy=80, srgb=13, rgbim=image, compat=10)
    return torch.from_numpy(np.array(crf.inference(iterations), dtype=np.float32)).view(K, H, W)


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="no photographs: set PIXELSS_VOC_MINI (voc12-native beside it)")
@pytest.mark.parametrize("K", [2, 5, 21])
def test_labels_equal_the_c_code_s_on_photographs(K):
    stems = sorted(path.stem for path in (PHOTOGRAPHS / "SegmentationClass").glob("*.png"))
    equal, changed, pixels = 0, 0, 0
    for stem in stems:
        image = np.array(Image.open(PHOTOGRAPHS / "JPEGImages" / f"{stem}.jpg").convert("RGB"))
        probs = blurred_truth(
            torch.from_numpy(np.array(Image.open(PHOTOGRAPHS / "SegmentationClass" / f"{stem}.png"))), K
        )
        ours = dense_crf(torch.from_numpy(image).permute(2, 0, 1)[None], probs[None])[0]
        theirs = c_code(image, probs)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
        equal += int((ours.argmax(0) == theirs.argmax(0)).sum())
        changed += int((probs.argmax(0) != theirs.argmax(0)).sum())
        pixels += image.shape[0] * image.shape[1]
    assert len(stems) == 60
    assert changed > 0.01 * pixels, "the CRF must have something to do"
    assert pixels - equal <= 1e-6 * pixels  # a tie may fall either way
    print(f"K={K}: {pixels - equal} of {pixels} labels differ; the CRF changed {changed / pixels:.2%}")
