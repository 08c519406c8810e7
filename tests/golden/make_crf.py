"""Write crf.npz beside this file: outputs of the C++ dense CRF (the extra crf-reference) on a generated image."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pydensecrf.densecrf as dcrf
from pydensecrf.utils import unary_from_labels

GOLDEN = Path(__file__).parent
sys.path.insert(0, str(GOLDEN.parent.parent / "examples"))

from shapes import draw_image  # noqa: E402

K, H, W = 4, 40, 56


def inference(img, p, iterations, bilateral):
    crf = dcrf.DenseCRF2D(W, H, K)
    crf.setUnaryEnergy(np.ascontiguousarray(-np.log(p.clip(1e-5, 1)).reshape(K, -1), dtype=np.float32))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    if bilateral:
        sxy, srgb, compat = bilateral
        crf.addPairwiseBilateral(sxy=sxy, srgb=srgb, rgbim=img, compat=compat)
    return np.array(crf.inference(iterations), dtype=np.float32).reshape(K, H, W)


def main():
    rng = np.random.default_rng(3)
    img, mask, _ = (x[:H, :W] if isinstance(x, np.ndarray) else x for x in draw_image(rng, 64))
    img = np.ascontiguousarray(img)
    lab = np.where(mask == 255, 0, mask).clip(0, K - 1).astype(np.int64)
    scores = rng.random((K, H, W)) + 0.6 * np.eye(K)[lab].transpose(2, 0, 1)
    p = (scores**3 / (scores**3).sum(0)).astype(np.float32)
    lab_unsure = np.where(rng.random((H, W)) < 0.3, 0, lab + 1)
    out = {"img": img, "p": p, "lab": lab, "lab_unsure": lab_unsure}
    for bilateral in ((80, 13, 10), (50, 5, 10), (20, 13, 10)):
        for iterations in (1, 10):
            name = "q_b{}_{}_{}_t{}".format(*bilateral, iterations)
            out[name] = inference(img, p, iterations, bilateral)
    out["q_gauss_only_t5"] = inference(img, p, 5, None)
    sure = unary_from_labels(lab, K, gt_prob=0.7, zero_unsure=False)
    out["unary_from_labels_gt0.7"] = sure.reshape(K, H, W)
    out["unary_from_labels_unsure_gt0.7"] = unary_from_labels(lab_unsure, 5, gt_prob=0.7).reshape(5, H, W)
    np.savez_compressed(GOLDEN / "crf.npz", **out)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
