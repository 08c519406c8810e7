"""Pseudo-labels from CAMs: every refiner at every background score.

    python benchmarks/labels.py      # generated images, the examples' network
    python benchmarks/labels.py RUN  # photographs, by a run of examples/voc

RUN is a run folder with train_cam in it; its photographs are those of
PIXELSS_VOC_MINI, whose masks score and teach nothing. One core, no random
choices. Prints Markdown: the mIoU over all images in per cent, and the median
of a refiner's CPU seconds over all its calls.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import pixelss

ROOT = Path(__file__).parent.parent
VOC = ROOT / "examples" / "voc"
sys.path[:0] = [str(VOC), str(ROOT / "examples")]

from data import VOCFolder  # noqa: E402
from infer_cam import cams_of_scales  # noqa: E402
from networks import cam_inference  # noqa: E402
from run import load_config  # noqa: E402
from small import batch, scenes, trained  # noqa: E402
from stages import Run  # noqa: E402

PHOTOGRAPHS = Path(os.environ.get("PIXELSS_VOC_MINI", ROOT.parent / "shared/data/voc12-mini"))


class Item(NamedTuple):
    """An image: levels (1, 3, H, W), CAMs (1, N, H, W), tags (1, N), mask (1, H, W)."""

    levels: Tensor
    cam: Tensor
    tags: Tensor
    truth: Tensor


class Setup(NamedTuple):
    """Background scores, as arguments of `pseudo_labels`, and refiners."""

    backgrounds: dict[str, Any]
    refiners: dict[str, Any]


ON_PHOTOGRAPHS = Setup(
    {"threshold 0.2": {"threshold": 0.2}, "threshold 0.3": {"threshold": 0.3}, "alpha 6": {"alpha": 6}},
    {
        "none": None,
        "label CRF": "label_crf",
        "PAR": pixelss.PixelAdaptiveRefinement(size=0.5),  # as AFA runs it
        "CRF": "crf",
    },
)
ON_GENERATED = Setup(  # of 96 pixels
    {"threshold 0.3": {"threshold": 0.3}, "alpha 2": {"alpha": 2}},
    {"none": None, "PAR": pixelss.PixelAdaptiveRefinement(), "CRF": pixelss.DenseCRF(bilateral=(20, 13, 10))},
)


def photographs(folder: Path, settings: list[str], config: Path, name: str, every: int) -> tuple[str, Iterator[Item]]:
    """Return what the images are, and the images, their CAMs as examples/voc infers them."""
    known = load_config([config], [*settings, "--device=cpu"])
    run = Run(known, VOCFolder(PHOTOGRAPHS, known.data.classes), folder, torch.device("cpu"))
    model, stems = cam_inference(run), run.data.stems(name)[::every]

    def items() -> Iterator[Item]:
        for stem in tqdm(stems, ncols=80):
            image, tags = run.data.image(stem), run.data.tags(stem)[None]
            with torch.inference_mode():
                cams = [cam for pair in cams_of_scales(run, model, [image]) for cam in pair]
            levels, truth = torch.from_numpy(image).permute(2, 0, 1)[None], torch.from_numpy(run.data.mask(stem))[None]
            yield Item(levels, pixelss.msinf_cam(cams, tags), tags, truth)

    return f"{len(stems)} photographs (lines 1, {1 + every}, ... of {name}.txt of {PHOTOGRAPHS.name})", items()


def generated(count: int = 60) -> tuple[str, Iterator[Item]]:
    """Return what the images are, and the images, their CAMs those of the small network at three scales."""
    model = trained()

    def items() -> Iterator[Item]:
        for scene in tqdm(scenes(count, seed=1), ncols=80):
            images, tags, truth = batch([scene])
            with torch.inference_mode():
                cams = [output.cam for output in pixelss.multi_scale_forward(model, images)]
            levels = torch.from_numpy(scene.image).permute(2, 0, 1)[None]
            yield Item(levels, pixelss.msinf_cam(cams, tags), tags, truth)

    return f"{count} generated images of 96 x 96 (seed 1)", items()


def table(what: str, items: Iterator[Item], setup: Setup) -> str:
    """Score every refiner at every background; returns Markdown."""
    cells: dict[tuple[str, str], pixelss.ConfusionMatrix] = {}
    seconds: dict[str, list[float]] = defaultdict(list)
    for levels, cam, tags, truth in items:
        for row, background in setup.backgrounds.items():
            for name, refine in setup.refiners.items():
                start = time.process_time()
                mask = pixelss.pseudo_labels(levels, cam, tags, refine=refine, **background)
                seconds[name].append(time.process_time() - start)
                cells.setdefault((row, name), pixelss.ConfusionMatrix(tags.shape[1] + 1)).update(mask, truth)
    names = list(setup.refiners)
    lines = [f"| mIoU (%), {what} | {' | '.join(names)} |", f"|{'---|' * (len(names) + 1)}"]
    for row in setup.backgrounds:
        lines.append(
            f"| {row} | {' | '.join(f'{100 * cells[row, name].compute().miou.item():.1f}' for name in names)} |"
        )
    lines.append(
        f"| CPU seconds an image | {' | '.join(f'{statistics.median(seconds[name]):.3f}' for name in names)} |"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="a run folder whose train_cam is finished")
    parser.add_argument("--config", type=Path, default=VOC / "mini.yaml", help="what it was made with")
    parser.add_argument("--list", default="even", help="of photographs with masks")
    parser.add_argument("--every", type=int, default=8, help="take one photograph of so many")
    options, settings = parser.parse_known_args()
    torch.set_num_threads(1)
    if options.run is None:
        print(table(*generated(), ON_GENERATED))
    else:
        images = photographs(options.run, settings, options.config, options.list, options.every)
        print(table(*images, ON_PHOTOGRAPHS))


if __name__ == "__main__":
    main()
