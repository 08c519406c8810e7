"""What all stages share: the record that tells of a stage, and the run that they are functions of."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from config import Config
from data import DataFolder
from parallel import barrier, rank
from storage import remove_unfinished, write_atomic
from texts import named

# What an image needs -> the places where that may lie, of a data set and an image's name.
Files = Mapping[str, Callable[[DataFolder, str], Sequence[Path]]]
IMAGES: Files = {"images": lambda data, stem: [data.image_path(stem)]}
TAGS: Files = {"annotations": lambda data, stem: [data.tags_path(stem)]}
MASKS: Files = {"masks": lambda data, stem: data.mask_paths(stem)}


@dataclass(frozen=True)
class Stage:
    """All that the pipeline knows of a stage. Each stage's file ends with its record; pipeline.py has them in order.

    Args:
        name: of the stage and of its folder.
        function: does its work and finishes it.
        memory: the settings that lower its memory, as the message says that tells of too little.
        needs: the stages whose results it cannot do without.
        uses: those whose results it reads where they are.
        reads: returns the image lists that it reads (None: the config names none) and what each of their images needs.
        settings: the starts of names of settings that decide this stage and no earlier one; the longest start wins, and
            settings that no stage names decide the first one.
        section: of the config that says how it trains; None: it trains nothing.
        pixels: returns how many pixels pass forward through the backbone, for the plan; None: hardly any.
    """

    name: str
    function: Callable[[Run], None]
    memory: str
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    reads: Callable[[Config], Sequence[tuple[str | None, Files]]] = lambda config: ()
    settings: tuple[str, ...] = ()
    section: str | None = None
    pixels: Callable[[Plan], float] | None = None


@dataclass(frozen=True)
class Plan:
    """What a run would do: its settings, its data and the names of the stages that are asked for."""

    config: Config
    data: DataFolder
    stages: Sequence[str]

    def images(self, *lists: str | None) -> int:
        """Return how many images the lists hold together."""
        return len({stem for name in lists for stem in self.data.stems(name)})


@dataclass
class Run:
    """One run of the pipeline: its settings, data, results and device; every stage is a function of it.

    Results, each in a folder of its own under `out`: train_cam/ train_affinity/ train_seg/ (checkpoints, model.pt,
    metrics.jsonl), infer_cam/STEM.png, score_cam/scores.json, make_labels/STEM.png,
    export_labels/VOCdevkit/VOC2012/, infer_seg/val/STEM.png and
    infer_seg/test/STEM.png, evaluate/scores.json, export_test/results.tar.gz.
    """

    config: Config
    data: DataFolder
    out: Path
    device: torch.device

    def folder(self, stage: str) -> Path:
        return self.out / stage

    def finished(self, stage: str) -> bool:
        return (self.folder(stage) / "done.json").is_file()

    def results(self, stage: str) -> dict[str, Any]:
        """Return what a finished stage reported."""
        path = self.folder(stage) / "done.json"
        with named(path, f"is damaged: remove it, then run {stage} again"):
            return dict(json.loads(path.read_text(encoding="utf-8")))

    def finish(self, stage: str, **results: object) -> None:
        """Mark a stage as done, after every process has reached this line."""
        barrier()
        if rank() == 0:
            remove_unfinished(self.folder(stage))
            write_atomic(self.folder(stage) / "done.json", json.dumps(results, indent=1) + "\n")
        barrier()
