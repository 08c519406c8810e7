"""What the tests of runs share: a tiny setting, commands, run folders."""

from __future__ import annotations

import copy
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from config import Config
from data import VOCFolder
from infer_cam import cam_path
from networks import build_cam
from run import load_config
from stages import Run
from storage import load_cam, save_cam
from torch import Tensor

from tests.processes import run_script
from tests.voc import VOC

VOC_MINI = Path(os.environ.get("PIXELSS_VOC_MINI", VOC.parent.parent.parent / "shared/data/voc12-mini"))
Call = Callable[..., str]
Again = Callable[[str], tuple[Path, dict[str, bytes], tuple[object, ...]]]
TINY = """
cam:
  schedule: {iterations: 2, batch: 2, checkpoint_every: 1, log_every: 1}
  augment: {crop: 32}
  rcm_gate: {iterations: 1}
  mam_gate: {iterations: 1}
infer_cam: {scales: [0.5, 1.0], crf: {iterations: 1}, max_batch: 2}
affinity: {radius: 2, crf: {iterations: 1}, schedule: {iterations: 2, batch: 2}, augment: {crop: 32}}
make_labels: {log_steps: 1, crf: {iterations: 1}}
seg: {test_scales: [1.0], crf: {iterations: 1}, max_batch: 2, schedule: {iterations: 2, batch: 2}, augment: {crop: 32}}
"""


def command(script: str, *arguments: object, fault: tuple[object, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, with a fault of faulty.py."""
    words = (Path(__file__).with_name("faulty.py"), *fault) if fault else ()
    return run_script(*words, VOC / script, *arguments)


_known: dict[tuple[object, ...], Config] = {}


def load_once(files: Sequence[Path], settings: Sequence[str] = ()) -> Config:
    """Return settings as `run.load_config`, which takes longer than small stages, from its first call with them."""
    key = (*((file, file.is_file() and file.read_text()) for file in files), *settings)
    if key not in _known:
        _known[key] = load_config(files, settings)
    return copy.deepcopy(_known[key])


def config(**changes: Any) -> Config:
    settings = [f"--{name}={value}" for name, value in changes.items()]
    return load_once([VOC / "demo.yaml"], settings)


def new_run(root: Path, out: Path, *, weights: bool = True, settings: Config | None = None) -> Run:
    """A run folder with an untrained CAM network in it."""
    settings = settings or config()
    made = Run(settings, VOCFolder(root, settings.data.classes), out, torch.device("cpu"))
    if weights:
        torch.manual_seed(0)
        network = build_cam(settings, made.data.num_classes)
        made.folder("train_cam").mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), made.folder("train_cam") / "model.pt")
    return made


def cam_of(stem: str, made: Run) -> Tensor:
    return load_cam(cam_path(made, stem), made.data.num_classes)


def write_random_cams(made: Run, name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for stem in made.data.stems(name):
        cam = torch.rand(made.data.num_classes, *made.data.size(stem), generator=generator)
        save_cam(cam_path(made, stem), cam, made.data.tags(stem))


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a stage by its name, without figures of speed."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): re.sub(rb'"images_per_s\w*": [\d.]+', b"", p.read_bytes()) for p in files}


def unfinished(folder: Path) -> list[Path]:
    return list(folder.rglob(".*.tmp"))
