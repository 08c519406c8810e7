"""Draw docs/first-screen.png: from a tag to a mask on a photograph, and on a generated image beside its truth.

    python docs/first_screen.py examples/voc/runs/start/train_cam/model.pt

The argument is the CAM network of the first command of examples/voc/RESULTS.md (mini.yaml with mini_start.yaml:
tf_efficientnet_lite0 at stride 16, VOC's 20 classes); it is not in the repository. The photograph is scikit-image's
astronaut (NASA, public domain), which the network was not trained on. The generated image and its network come from
examples/small.py. Both images, the threshold and the CRF's settings were chosen by eye: a picture, not a measurement.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from skimage.data import astronaut
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "examples")]

from shapes import CLASSES  # noqa: E402
from small import batch, scenes, trained  # noqa: E402

import pixelss  # noqa: E402
from pixelss import viz  # noqa: E402
from pixelss.viz.pixels import Pixels  # noqa: E402

PERSON = 15  # in VOC's order, background 0
PALETTE = viz.voc_palette()
# Okabe and Ito's colours; VOC's own would be lost on an orange suit and on these textures.
PALETTE[1:5] = (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0)
PALETTE[PERSON] = 0, 100, 230
SCALES, THRESHOLD, SCENE, CELL = (1.0, 1.5, 2.0), 0.5, 32, 216


@torch.no_grad()
def seed(model: nn.Module, images: Tensor, tags: Tensor) -> Tensor:
    """Return CAMs (B, N, H, W) in [0, 1] over scales and mirror images."""
    plain = [output.cam for output in pixelss.multi_scale_forward(model, images, scales=SCALES)]
    mirrored = [output.cam.flip(-1) for output in pixelss.multi_scale_forward(model, images.flip(-1), scales=SCALES)]
    return pixelss.msinf_cam(plain + mirrored, tags)


def refined(image: Pixels, cam: Tensor) -> Tensor:
    """Return where (H, W) the CRF sees the class of one CAM (H, W), against a constant background."""
    scores = torch.stack([torch.full_like(cam, THRESHOLD), cam])
    levels = torch.from_numpy(image).permute(2, 0, 1)
    probs = scores / scores.sum(0)
    return pixelss.dense_crf(levels[None], probs[None], gaussian=(3, 1), bilateral=(40, 10, 2))[0].argmax(0)


def paint(image: Pixels, mask: Tensor) -> Pixels:
    return viz.overlay_mask(image, mask.where(mask != 255, 0), alpha=0.7, palette=PALETTE)


def photograph_row(weights: Path) -> Pixels:
    backbone: Any = pixelss.timm_backbone("tf_efficientnet_lite0", output_stride=16)
    model = nn.Sequential(backbone, pixelss.CAMHead(backbone.out_channels, num_classes=20)).eval()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    photograph = Image.fromarray(astronaut())  # type: ignore[no-untyped-call]
    image = np.array(photograph.resize((320, 320), Image.Resampling.LANCZOS))  # the size of those it was trained on
    tags = torch.eye(20)[[PERSON - 1]]
    cam = seed(model, torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1, tags)
    mask = pixelss.class_region_mask(cam, tags, threshold=THRESHOLD)[0]
    crf = refined(image, cam[0, PERSON - 1]) * PERSON
    row = [image, viz.overlay_cam(image, cam[0, PERSON - 1]), paint(image, mask), paint(image, crf)]
    return viz.grid([row], titles=["photograph, tag: person", "CAM", "mask", "after the CRF"], cell=CELL)


def generated_row() -> Pixels:
    scene = scenes(SCENE + 1, seed=1)[SCENE]
    images, tags, truth = batch([scene])
    cam = seed(trained(600, cache=ROOT / "runs" / "first_screen.pth"), images, tags)
    mask = pixelss.class_region_mask(cam, tags, threshold=THRESHOLD)[0]
    shown = [k for k in range(1, len(CLASSES) + 1) if tags[0, k - 1]]
    row = [scene.image, viz.overlay_cam(scene.image, cam[0].amax(0)), paint(scene.image, mask)]
    titles = [f"generated, tags: {', '.join(CLASSES[k - 1] for k in shown)}", "CAMs", "mask", "truth"]
    legend = {"person": PALETTE[PERSON]} | {CLASSES[k - 1]: PALETTE[k] for k in shown}
    return viz.grid([[*row, paint(scene.image, truth[0])]], titles=titles, legend=legend, heat="CAM", cell=CELL)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw docs/first-screen.png.")
    parser.add_argument("weights", type=Path, help="model.pt of train_cam with mini.yaml and mini_start.yaml")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "first-screen.png")
    args = parser.parse_args()
    picture = np.concatenate([photograph_row(args.weights), generated_row()])
    coarse = (np.round(picture / 255 * 63) * 255 / 63).astype(np.uint8)  # no eye sees the last two bits, the file does
    Image.fromarray(coarse).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
