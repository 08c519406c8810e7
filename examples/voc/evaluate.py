"""Stage evaluate: the segmentation's class-wise IoU on data.val, the paper's beside ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import yaml
from inference import shared_batches
from numpy.typing import NDArray
from parallel import rank, sum_over
from stages import IMAGES, MASKS, Run, Stage
from storage import write_atomic

import pixelss

Array = NDArray[np.uint8]


def score_masks(run: Run, folder: Path, stems: list[str], desc: str) -> tuple[pixelss.SegmentationScores, int]:
    """Return the scores of the masks in `folder` against the data set's, and how many were scored."""
    matrix = pixelss.ConfusionMatrix(run.data.num_classes + 1)

    def read(stem: str) -> tuple[Array, Array]:
        return run.data.mask(stem, folder=folder), run.data.mask(stem)

    count = torch.zeros((), device=run.device)
    for ((_, masks),) in shared_batches(run, stems, read, desc=desc):
        matrix.update(*(torch.from_numpy(mask)[None] for mask in masks))
        count += 1
    return matrix.to(run.device).compute(), int(sum_over(count).item())


def by_class(run: Run, iou: torch.Tensor) -> dict[str, float | None]:
    """Return the IoU of every class by name, None where neither truth nor prediction shows it: JSON has no NaN."""
    names = ["background", *run.data.classes]
    return {name: None if value != value else value for name, value in zip(names, iou.tolist(), strict=True)}


def evaluate(run: Run) -> None:
    """Score infer_seg's masks; write scores.json and table.md."""
    name = run.config.data.val
    if name is None:
        run.finish("evaluate", skipped="data.val is null")
        return
    scores, count = score_masks(run, run.folder("infer_seg") / "val", run.data.stems(name), "evaluate")
    ours = {"mean": scores.miou.item(), **by_class(run, scores.iou)}
    if rank() == 0:
        folder = run.folder("evaluate")
        write_atomic(folder / "scores.json", json.dumps({"list": name, "iou": ours}, indent=1) + "\n")
        write_atomic(folder / "table.md", class_table(ours, f"IoU (%) of the segmentation on {name}.txt"))
    run.finish("evaluate", list=name, images=count, miou=round(100 * scores.miou.item(), 1))


def class_table(ours: Mapping[str, float | None], caption: str) -> str:
    """Return a Markdown table of the classes' IoU, with the paper's (VOC val) for classes of the same name."""
    paper = paper_figures()["table4"]
    lines = [f"{caption}; the paper's: VOC 2012 val, its Table 4.", "", "| class | ours | paper |", "|---|---|---|"]
    for name, iou in ours.items():
        figure = "-" if iou is None else f"{100 * iou:.1f}"
        lines.append(f"| {name} | {figure} | {paper.get(name, {}).get('iou', '-')} |")
    return "\n".join(lines) + "\n"


def paper_figures() -> dict[str, dict[str, dict[str, float]]]:
    """Return the paper's figures, table by table, row by row."""
    figures: dict[str, dict[str, dict[str, float]]] = yaml.safe_load(
        (Path(__file__).parent / "paper_figures.yaml").read_text()
    )
    return figures


STAGE = Stage(
    "evaluate",
    evaluate,
    memory="the size of the images",
    needs=("infer_seg",),
    reads=lambda config: [(config.data.val, {**IMAGES, **MASKS})],
)
