"""The table of the field: losses while training, CAM inference and refinement, in three groups under one caption.

tables.py trains the rows of the first group. The other two start from the first of them, the baseline: AdvCAM looks at
its network, and every refinement at its CAMs. A new refinement is an entry in `refinements`. What a killed table has
scored stands in field/ of the row's folder and is not scored again.
"""

from __future__ import annotations

import csv
import filecmp
import io
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from config import CRF, PAR, Affinity
from costs import megabytes, seconds_a_step
from crf_labels import refined_masks
from infer_cam import cam_path
from inference import shared_batches, to_input
from networks import AFFINITIES, load_trained
from numpy.typing import NDArray
from parallel import barrier, rank
from run import execute
from runfolder import open_run
from score_cam import sweep_cams
from stages import Run
from storage import load_cam, save_cam, write_atomic
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

import pixelss

Values = dict[str, float]
Rows = dict[str, list[Values]]  # by the row's name, one a seed
_FEW = 20  # scored images that are climbed on, evenly spaced in their list
_THRESHOLDS = [t / 100 for t in range(100)]  # up to 0.99: what a row does to its CAMs may put the best one anywhere
_BACKGROUNDS = [t / 100 for t in range(10, 75, 5)]  # that CRF and PAR are swept over
_SCORES = ("miou", "precision", "recall", "threshold")
_COLUMNS = {
    "miou": "mIoU",
    "precision": "precision",
    "recall": "recall",
    "threshold": "threshold",
    "few": f"mIoU of {_FEW} images",
    "seconds": "seconds",
    "megabytes": "peak MB",
}
CAPTION = (
    f"Thresholds go to {_THRESHOLDS[-1]:g}. The {_FEW} images are evenly spaced in the list. Seconds are clocked on "
    "{device}, of steps the median over the reports, loading included, of refinements with reading and scoring. Peak "
    "MB is the process's while the row trains, torch's own on CUDA. CRF and PAR stand beside a constant background, "
    f"the best of {_BACKGROUNDS[0]:g}, {_BACKGROUNDS[1]:g} to {_BACKGROUNDS[-1]:g}; what walks are the CAMs alone, "
    "normalised after it."
)
_PERCENT = ("miou", "precision", "recall", "few")


def field_groups(runs: dict[str, list[Run]]) -> dict[str, Rows]:
    """Return the rows of the three groups, by the group's title, from finished rows of which the first is plain."""
    baselines = next(iter(runs.values()))
    refined: Rows = {}
    for run in baselines:
        for name, make in refinements(run).items():
            refined.setdefault(name, []).append(_kept(run, name, make))
    return {
        "losses while training (seconds a step)": {row: [_trained(run) for run in of] for row, of in runs.items()},
        "inference of the baseline's network (seconds an image)": {
            "AdvCAM": [_kept(run, "AdvCAM", partial(_climbed, run)) for run in baselines]
        },
        "refinement of the baseline's CAMs (seconds an image)": refined,
    }


def refinements(run: Run) -> dict[str, Callable[[], Values]]:
    """Return what scores each refinement of a run's CAMs."""
    config = run.config.infer_cam

    def smoothed(stem: str) -> Tensor:
        return pixelss.variation_smoothing(_cam(run, stem)[None])[0]

    return {
        "none": lambda: _swept(run, lambda stem: _cam(run, stem)),
        "dense CRF": lambda: _masked(run, config.crf or CRF()),
        "PAR": lambda: _masked(run, config.par or PAR()),
        "PMM's smoothing": lambda: _swept(run, smoothed),
        "walk, AffinityNet": lambda: _swept(run, _walk(_with_affinities(run, "features"))),
        "walk, IRNet": lambda: _swept(run, _walk(_with_affinities(run, "path"))),
    }


def _trained(run: Run) -> Values:
    scores = _kept(run, "all", lambda: _swept(run, lambda stem: _cam(run, stem)))
    few = _kept(run, "few", lambda: _swept(run, lambda stem: _cam(run, stem), few=True))["few"]
    cost = {"seconds": seconds_a_step(run, "train_cam"), "megabytes": megabytes(run, "train_cam")}
    return {**{name: scores[name] for name in _SCORES}, "few": few, **cost}


def _scored(run: Run, *, few: bool) -> Sequence[str]:
    stems = run.data.stems(run.config.data.score)
    return stems[:: max(1, len(stems) // _FEW)][:_FEW] if few else stems


def _cam(run: Run, stem: str) -> Tensor:
    return load_cam(cam_path(run, stem), run.data.num_classes)


def _kept(run: Run, name: str, make: Callable[[], Values]) -> Values:
    """Return what `make` gives, or what it gave before, unless the run's network has been trained anew since."""
    path = run.out / "field" / f"{'-'.join(re.findall(r'[A-Za-z]+', name))}.json"
    trained = (run.folder("train_cam") / "model.pt").stat().st_mtime_ns
    if path.is_file() and path.stat().st_mtime_ns >= trained:
        return dict(json.loads(path.read_text()))
    values = make()
    barrier()
    if rank() == 0:
        write_atomic(path, json.dumps(values, indent=1) + "\n")
    barrier()
    return values


def _swept(run: Run, cam_of: Callable[[str], Tensor], *, few: bool = False) -> Values:
    """Score CAMs at their best threshold."""
    stems, start = _scored(run, few=few), time.perf_counter()
    scores: dict[str, Any] = sweep_cams(run, stems, cam_of, desc="field", thresholds=_THRESHOLDS)
    if few:
        return {"few": scores["miou"]}
    seconds = (time.perf_counter() - start) / len(stems)
    return {**{name: scores[name] for name in _SCORES}, "seconds": seconds}


def _masked(run: Run, settings: CRF | PAR) -> Values:
    """Score what a CRF or PAR makes of the CAMs beside a constant background, at the best of several."""
    stems, start = _scored(run, few=False), time.perf_counter()
    matrices = [pixelss.ConfusionMatrix(run.data.num_classes + 1).to(run.device) for _ in _BACKGROUNDS]

    def read(stem: str) -> tuple[NDArray[np.uint8], Tensor, Tensor, NDArray[np.uint8]]:
        return run.data.image(stem), _cam(run, stem), run.data.tags(stem), run.data.mask(stem)

    for ((_, (image, cam, tags, truth)),) in shared_batches(run, stems, read, desc="field"):
        present = cam[tags > 0].to(run.device)
        sets = torch.stack([torch.cat([torch.full_like(cam[:1], b).to(present), present]) for b in _BACKGROUNDS])
        target = torch.from_numpy(truth)[None].to(run.device)
        for matrix, mask in zip(matrices, refined_masks(image, sets, tags, settings), strict=True):
            matrix.update(torch.from_numpy(mask)[None].to(run.device), target)
    scores = [matrix.compute() for matrix in matrices]
    threshold, best = max(zip(_BACKGROUNDS, scores, strict=True), key=lambda pair: pair[1].miou.item())
    values = {name: getattr(best, name).nanmean().item() for name in ("miou", "precision", "recall")}
    return {**values, "threshold": threshold, "seconds": (time.perf_counter() - start) / len(stems) / len(_BACKGROUNDS)}


def _climbed(run: Run) -> Values:
    """Score AdvCAM on a few images: 27 iterations at every scale of the inference, 13 below the images' size."""
    network, folder = load_trained(run, "train_cam"), run.out / "field" / "climbed"
    trained = (run.folder("train_cam") / "model.pt").stat().st_mtime_ns
    stems, spent = _scored(run, few=True), run.out / "field" / "climbed" / "seconds.json"
    seconds: dict[str, float] = json.loads(spent.read_text()) if spent.is_file() else {}

    def done(stem: str) -> bool:
        path = folder / f"{stem}.png"
        return path.is_file() and path.stat().st_mtime_ns >= trained

    def read(stem: str) -> tuple[NDArray[np.uint8], Tensor]:
        return run.data.image(stem), run.data.tags(stem)

    for ((stem, (image, tags)),) in shared_batches(run, stems, read, desc="AdvCAM", done=done):
        start = time.perf_counter()
        x, shown, cams = to_input(run, [image])[1], tags[None].to(run.device), []
        for scale in run.config.infer_cam.scales:
            sides = [max(1, int(side * scale + 0.5)) for side in image.shape[:2]]
            scaled = interpolate(x, (sides[0], sides[1]), mode="bilinear")
            cams.append(pixelss.climb_cam(network, scaled, shown, iterations=13 if scale < 1 else 27))
        cam = pixelss.msinf_cam(cams, shown, size=(image.shape[0], image.shape[1]))[0]
        save_cam(folder / f"{stem}.png", cam, tags)
        seconds[stem] = time.perf_counter() - start
        if rank() == 0:
            write_atomic(spent, json.dumps(seconds))
    barrier()

    def climbed(stem: str) -> Tensor:
        return load_cam(folder / f"{stem}.png", run.data.num_classes)

    return {**_swept(run, climbed, few=True), "seconds": sum(seconds.values()) / max(1, len(seconds))}


def _with_affinities(run: Run, kind: str) -> Run:
    """Return a run with the network and the CAMs of `run`, copied, that has learned affinities of a kind."""
    execute(run, ["infer_cam"])  # of the images that the affinities are trained on too
    out = run.out.parent.parent / f"walk-{kind}" / run.out.name
    if rank() == 0:
        own = out / "train_cam" / "model.pt"
        if own.is_file() and not filecmp.cmp(own, run.folder("train_cam") / "model.pt", shallow=False):
            shutil.rmtree(out)  # of a network that was trained before this one
        for stage in ("train_cam", "infer_cam"):
            _copy(run.folder(stage), out / stage)
    barrier()
    affinity: Affinity = replace(run.config.affinity, kind=kind)  # type: ignore[arg-type]
    copied = open_run(replace(run.config, affinity=affinity), run.data.root, out, run.device)
    execute(copied, ["train_affinity"])
    return copied


def _copy(source: Path, target: Path) -> None:
    if not target.is_dir():
        unfinished = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(source, unfinished)
        unfinished.rename(target)


def _walk(run: Run) -> Callable[[str], Tensor]:
    """Return what walks an image's CAMs, no background beside them, on the affinities that the run has learned."""
    affinities, radius = AFFINITIES[run.config.affinity.kind], run.config.affinity.radius
    beta, log_steps = run.config.make_labels.beta or affinities.beta, run.config.make_labels.log_steps
    network = load_trained(run, "train_affinity")

    @torch.inference_mode()
    def walked(stem: str) -> Tensor:
        image, cam = run.data.image(stem), _cam(run, stem)[None].to(run.device)
        output = network(to_input(run, [image])[1])
        h, w = output.shape[-2:]
        cells = affinities.walkers(adaptive_avg_pool2d(cam, (h, w)), output)
        pairs = affinities.pairs(output, radius)
        scores = pixelss.random_walk(cells, pairs, beta=beta, log_steps=log_steps, radius=radius)
        return pixelss.normalize_cam(interpolate(scores, image.shape[:2], mode="bilinear"))[0]

    return walked


def write_field(groups: dict[str, Rows], caption: str, seeds: Sequence[int], out: Path) -> str:
    """Write field.md and field.csv; returns the Markdown."""
    head = ["row", *_COLUMNS.values()]
    lines, table = [head, ["---"] * len(head)], io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["group", "row", "column", "seed", "value"])
    for group, rows in groups.items():
        lines.append([f"**{group}**", *("" for _ in _COLUMNS)])
        for row, of_seeds in rows.items():
            lines.append([row, *(_shown(column, [values.get(column) for values in of_seeds]) for column in _COLUMNS)])
            for seed, values in zip(seeds, of_seeds, strict=True):
                for column in values:
                    writer.writerow([group, row, column, seed, values[column]])
    text = f"{caption}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_atomic(out / "field.md", text)
    write_atomic(out / "field.csv", table.getvalue())
    return text


def _shown(column: str, values: Sequence[float | None]) -> str:
    """Return the mean over the seeds, and half their range where there are several."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known or len(known) < len(values):
        return ""
    mean, half = sum(known) / len(known), (max(known) - min(known)) / 2
    if column in _PERCENT:
        return f"{100 * mean:.1f}" + (f" ± {100 * half:.1f}" if len(known) > 1 else "")
    return f"{mean:.0f}" if column == "megabytes" else f"{mean:.2g}"
