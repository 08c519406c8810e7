"""Draw docs/field.png: the CAMs or masks of every row of the field's table, on four images.

    python docs/field_picture.py examples/voc/runs/field

The argument is the --out of `tables.py field`, whose first seed is drawn. The images are those with the most tags among
the twenty that AdvCAM ran on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "examples"), str(ROOT / "examples" / "voc")]

import field  # noqa: E402
from config import Scales  # noqa: E402
from data import open_data  # noqa: E402
from field_refiners import BACKGROUNDS, CAMS, MASKS, plain  # noqa: E402
from inference import to_input  # noqa: E402
from networks import load_trained  # noqa: E402
from run import load_config  # noqa: E402
from stages import Run  # noqa: E402
from storage import load_cam  # noqa: E402
from tables import TABLES  # noqa: E402

import pixelss  # noqa: E402
from pixelss import viz  # noqa: E402
from pixelss.viz.pixels import Pixels  # noqa: E402

PALETTE = viz.voc_palette()
PALETTE[1:5] = (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0)  # VOC's own would be lost on these images
IMAGES, CELL, GAP, NAMES, TEXT = 4, 112, 6, 176, 24  # a phone shows it at .6 of its size
Shown = Callable[[str], Pixels]  # an image's name -> what a row makes of it


def reopened(folder: Path, row: str) -> Run:
    """Return a row's run as it lies there; nothing is written."""
    (out, *_) = sorted((folder.resolve() / "rows" / row.replace(" ", "-")).glob("seed-*"))
    config = load_config([out / "config.yaml"])
    data = json.loads((out / "environment.json").read_text(encoding="utf-8"))["data"]
    return Run(config, open_data(Path(data), config.data), out, torch.device("cpu"))


def drawn(folder: Path) -> dict[str, Shown]:
    """Return what draws every row, by its name in the table."""
    base = reopened(folder, "baseline")

    def over(cams: Callable[[str], torch.Tensor]) -> Shown:
        return lambda stem: viz.overlay_cam(base.data.image(stem), cams(stem).amax(0).cpu())

    def painted(masks: Callable[[str], Any]) -> Shown:
        def paint(stem: str) -> Pixels:
            mask = np.asarray(masks(stem))
            return viz.overlay_mask(base.data.image(stem), np.where(mask == 255, 0, mask), alpha=0.7, palette=PALETTE)

        return paint

    def refined(name: str) -> Callable[[str], Pixels]:
        masks = MASKS[name].make(base)
        best = json.loads(field.kept_path(base, f"refined {name}").read_text())["threshold"]

        def mask(stem: str) -> Pixels:
            tags = base.data.tags(stem)
            sets = field.background_sets(base, plain(base)(stem), tags)
            made: Pixels = masks(base.data.image(stem), sets, tags)[BACKGROUNDS.index(best)]
            return made

        return mask

    def segmented(name: str) -> Callable[[str], torch.Tensor]:
        run = reopened(folder, name)
        network, scales = load_trained(run, "train_seg"), run.config.seg.test_scales
        return lambda stem: segment(run, network, stem, scales)

    climbed = field.climbed_folder(base)
    rows: dict[str, Shown] = {"image": base.data.image, "truth": painted(base.data.mask)}
    rows |= {row: over(plain(reopened(folder, row))) for row in TABLES["field"].rows}
    rows["AdvCAM"] = over(lambda stem: load_cam(climbed / f"{stem}.png", base.data.num_classes))
    rows |= {name: over(refiner.make(base)) for name, refiner in CAMS.items() if name != "none"}
    rows |= {name: painted(refined(name)) for name in MASKS}
    return rows | {name: painted(segmented(row.folder)) for name, row in field.SEGMENTATIONS.items()}


@torch.inference_mode()
def segment(run: Run, network: torch.nn.Module, stem: str, scales: Scales) -> torch.Tensor:
    return pixelss.multi_scale_inference(network, to_input(run, [run.data.image(stem)])[1], scales=scales)[0].argmax(0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw docs/field.png.")
    parser.add_argument("folder", type=Path, help="the --out of tables.py field")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "field.png")
    args = parser.parse_args()
    rows, base = drawn(args.folder), reopened(args.folder, "baseline")
    few = sorted(path.stem for path in field.climbed_folder(base).glob("*.png"))
    stems = sorted(few, key=lambda stem: -int(base.data.tags(stem).sum()))[:IMAGES]
    size = NAMES + len(stems) * (CELL + GAP), len(rows) * (CELL + GAP)
    picture, font = Image.new("RGB", size, "white"), ImageFont.load_default(TEXT)
    draw = ImageDraw.Draw(picture)
    for i, (name, show) in enumerate(rows.items()):
        top = i * (CELL + GAP)
        draw.text((4, top + CELL // 2), name, "black", font, anchor="lm")
        for j, stem in enumerate(stems):
            cell = Image.fromarray(show(stem)).resize((CELL, CELL))
            picture.paste(cell, (NAMES + j * (CELL + GAP), top))
    picture.quantize(64).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
