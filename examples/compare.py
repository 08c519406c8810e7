"""A picture of what changes: control's CAM and mask, and where the masks of other rows are better or worse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import pixelss
from pixelss import viz

CELL, LINE = 120, 16  # width of a column, height of a line of text, in pixels
BETTER, WORSE = (0, 114, 178), (213, 94, 0)  # colour-blind eyes tell them apart
Pixels = NDArray[np.uint8]


class Compared(NamedTuple):
    """One image, its tags, its true mask (H, W), control's strongest CAM (H, W) and the mask (H, W) of every row."""

    image: Pixels
    tags: Sequence[str]
    truth: Tensor
    cam: Tensor
    masks: Mapping[str, Tensor]


def picture(compared: Sequence[Compared], classes: Sequence[str]) -> Pixels:
    """Return one line an image: tags, truth, control, and the other rows' gains and losses against it."""
    seen = {name for each in compared for name in each.tags}
    palette = viz.voc_palette()
    legend: dict[str, Any] = {name: palette[k] for k, name in enumerate(classes, start=1) if name in seen}
    legend |= {"void": palette[255], "better than control": BETTER, "worse than control": WORSE}
    others = [row for row in compared[0].masks if row != "control"]
    titles = ["image, its tags", "truth", "control: CAM", "control: mask", *others]
    lines = [_line(each, others, len(classes)) for each in compared]
    return viz.grid(lines, titles=titles, legend=legend, heat="CAM", cell=CELL)


def _line(each: Compared, others: Sequence[str], num_classes: int) -> list[Pixels]:
    iou = {}
    for row, mask in each.masks.items():
        metric = pixelss.ConfusionMatrix(num_classes + 1)
        metric.update(mask[None], each.truth[None])
        iou[row] = 100 * metric.compute().miou.item()
    cells = [
        _captioned(each.image, ", ".join(each.tags)),
        _captioned(viz.overlay_mask(each.image, each.truth)),
        _captioned(viz.overlay_cam(each.image, each.cam)),
        _captioned(viz.overlay_mask(each.image, each.masks["control"]), f"IoU {iou['control']:.1f}"),
    ]
    grey = np.asarray(Image.fromarray(each.image).convert("L").convert("RGB"))
    control_right = each.masks["control"] == each.truth  # never where the truth is void
    for row in others:
        right = each.masks[row] == each.truth
        change = torch.zeros_like(each.truth)
        change[right & ~control_right] = 1
        change[control_right & ~right] = 2
        marked = viz.overlay_mask(grey, change, palette=[(0, 0, 0), BETTER, WORSE], alpha=0.9)
        cells.append(_captioned(marked, f"IoU {iou[row]:.1f} ({iou[row] - iou['control']:+.1f})"))
    return cells


def _captioned(pixels: Pixels, text: str = "") -> Pixels:
    """Return the picture as wide as its column, with a line of text below, smaller where it would not fit."""
    image = Image.fromarray(pixels)
    image = image.resize((CELL, round(CELL * image.height / image.width)))
    cell = Image.new("RGB", (CELL, image.height + LINE), "white")
    cell.paste(image)
    wide = ImageFont.load_default(12).getlength(text)
    font = ImageFont.load_default(12 * min(1, 0.95 * CELL / max(wide, 1)))  # hinting makes small text wider
    ImageDraw.Draw(cell).text((CELL / 2, image.height + LINE / 2), text, "black", font, anchor="mm")
    return np.asarray(cell)
