"""What all stages share: where their results lie, and when one is finished."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from config import Config
from data import VOCFolder
from parallel import barrier, rank
from storage import remove_unfinished, write_atomic

# Every stage, in order, and the stages whose results it cannot do without.
NEEDS: dict[str, tuple[str, ...]] = {
    "train_cam": (),
    "infer_cam": ("train_cam",),
    "score_cam": ("train_cam",),
    "train_affinity": ("infer_cam",),
    "make_labels": ("infer_cam", "train_affinity"),
    "train_seg": ("make_labels",),
    "infer_seg": ("train_seg",),
    "evaluate": ("infer_seg",),
    "export_test": ("infer_seg",),
}


@dataclass
class Run:
    """One run of the pipeline: its settings, data, results and device; every stage is a function of it.

    Results, each in a folder of its own under `out`: train_cam/ train_affinity/ train_seg/ (checkpoints, model.pt,
    metrics.jsonl), infer_cam/STEM.png, score_cam/scores.json, make_labels/STEM.png, infer_seg/val/STEM.png and
    infer_seg/test/STEM.png, evaluate/scores.json, export_test/results.tar.gz.
    """

    config: Config
    data: VOCFolder
    out: Path
    device: torch.device

    def folder(self, stage: str) -> Path:
        return self.out / stage

    def finished(self, stage: str) -> bool:
        return (self.folder(stage) / "done.json").is_file()

    def results(self, stage: str) -> dict[str, Any]:
        """Return what a finished stage reported."""
        return dict(json.loads((self.folder(stage) / "done.json").read_text()))

    def finish(self, stage: str, **results: object) -> None:
        """Mark a stage as done, after every process has reached this line."""
        barrier()
        if rank() == 0:
            remove_unfinished(self.folder(stage))
            write_atomic(self.folder(stage) / "done.json", json.dumps(results, indent=1) + "\n")
        barrier()
