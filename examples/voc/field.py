"""The table of the field: losses while training, CAM inference, refinement and segmentation, under one caption.

tables.py trains the rows of the first group. The others start from the first of them, the baseline: AdvCAM looks at its
network, every refinement (field_refiners.py) at its CAMs, and a segmentation network learns from labels of those. What
a killed table has scored stands in field/ of the row's folder and is not scored again.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from costs import code_lines, megabytes, seconds_a_step, watched
from crf_labels import refined_masks
from field_refiners import BACKGROUNDS, CAMS, MASKS, Array, Cams, Masks, by_crf, derived, plain, write_reliable
from inference import shared_batches, to_input
from networks import load_trained
from numpy.typing import NDArray
from parallel import barrier, rank
from run import execute
from score_cam import sweep_cams
from stages import Run
from storage import load_cam, save_cam, write_atomic
from torch import Tensor, nn
from torch.nn.functional import interpolate
from train_cam import TERMS
from train_seg import energy_of

import pixelss

Values = dict[str, float]
Rows = dict[str, list[Values]]  # by the row's name, one a seed
_FEW = 20  # scored images that are climbed on, evenly spaced in their list
_THRESHOLDS = [t / 100 for t in range(100)]  # up to 0.99: what a row does to its CAMs may put the best one anywhere
_ENERGY, _ENERGY_CROP = 1e-7, 321  # RRM's weight, and the crop that it is for
_SCORES = {
    "miou": "CAM mIoU",
    "mask": "mask mIoU",
    "precision": "precision",
    "recall": "recall",
    "threshold": "t",
}
_COSTS = {
    "few": f"CAM mIoU of {_FEW}",
    "seconds": "seconds",
    "megabytes": "peak MB",
    "lines": "lines",
}
CAPTION = (
    "CAM mIoU is at the best threshold t of a sweep to "
    f"{_THRESHOLDS[-1]:g}, mask mIoU after the one dense CRF beside a constant background, the best of "
    f"{BACKGROUNDS[0]:g}, {BACKGROUNDS[1]:g} to {BACKGROUNDS[-1]:g}; a row without CAMs has t, precision and recall of "
    "its masks, a segmentation its own labels' in the place of the CAMs'. What walks are the CAMs alone. The "
    f"{_FEW} images are evenly spaced in the list. Seconds are clocked on "
    "{device}, of steps the median over the reports, loading included, of refinements with reading and scoring. Peak "
    "MB is the process's while the row trains, torch's own on CUDA. Lines are those of the row's own code in "
    "examples/voc, without the library's and without what rows share."
)
_PERCENT = ("miou", "mask", "precision", "recall", "few")


def field_groups(runs: dict[str, list[Run]]) -> dict[str, Rows]:
    """Return the rows of the four groups, by the group's title, from finished rows of which the first is plain."""
    baselines = next(iter(runs.values()))
    return {
        "losses while training (seconds a step)": {row: [_trained(run) for run in of] for row, of in runs.items()},
        "inference of the baseline's network (seconds an image)": {
            "AdvCAM": [
                {**_kept(run, "AdvCAM", partial(_climbed, run)), "lines": code_lines(climbed_cam)} for run in baselines
            ]
        },
        "refinement of the baseline's CAMs (seconds an image)": {
            name: [_refined(run, name) for run in baselines] for name in (*CAMS, *MASKS)
        },
        "segmentation on RRM's reliable labels (seconds a step)": {
            name: [_segmented(run, one) for run in baselines] for name, one in SEGMENTATIONS.items()
        },
    }


def _trained(run: Run) -> Values:
    cams, weights = plain(run), {name: getattr(run.config.cam, name) for name in TERMS}
    scores = _kept(run, "all", lambda: _swept(run, cams))
    mask = _kept(run, "mask", lambda: _masked(run, cams, by_crf(run)))["mask"]
    few = _kept(run, "few", lambda: _swept(run, cams, few=True))["few"]
    own = [TERMS[name] for name, weight in weights.items() if weight > 0 and name != "cls"]
    return {
        **scores,
        "mask": mask,
        "few": few,
        "seconds": seconds_a_step(run, "train_cam"),
        "megabytes": megabytes(run, "train_cam"),
        "lines": code_lines(*own),
    }


def _refined(run: Run, name: str) -> Values:
    def cams_and_masks() -> Values:
        cams = CAMS[name].make(run)
        return {**_swept(run, cams), "mask": _masked(run, cams, by_crf(run))["mask"]}

    make = cams_and_masks if name in CAMS else lambda: _masked(run, plain(run), MASKS[name].make(run))
    return {**_kept(run, f"refined {name}", make), "lines": code_lines(*(CAMS | MASKS)[name].code)}


def _scored(run: Run, *, few: bool) -> Sequence[str]:
    stems = run.data.stems(run.config.data.score)
    return stems[:: max(1, len(stems) // _FEW)][:_FEW] if few else stems


def kept_path(run: Run, name: str) -> Path:
    """Return where `_kept` keeps what it has by a name."""
    return run.out / "field" / f"{'-'.join(re.findall(r'[A-Za-z]+', name))}.json"


def _kept(run: Run, name: str, make: Callable[[], Values]) -> Values:
    """Return what `make` gives, or what it gave before, unless the run's network has been trained anew since."""
    path = kept_path(run, name)
    trained = (run.folder("train_cam") / "model.pt").stat().st_mtime_ns
    if path.is_file() and path.stat().st_mtime_ns >= trained:
        return dict(json.loads(path.read_text()))
    values = make()
    barrier()
    if rank() == 0:
        write_atomic(path, json.dumps(values, indent=1) + "\n")
    barrier()
    return values


def _swept(run: Run, cams: Cams, *, few: bool = False) -> Values:
    """Score CAMs at their best threshold."""
    stems, start = _scored(run, few=few), time.perf_counter()
    scores = sweep_cams(run, stems, cams, desc="field", thresholds=_THRESHOLDS)
    if few:
        return {"few": scores["miou"]}
    seconds = (time.perf_counter() - start) / len(stems)
    return {**{name: scores[name] for name in ("miou", "precision", "recall", "threshold")}, "seconds": seconds}


@torch.inference_mode()
def _masked(run: Run, cams: Cams, masks: Masks) -> Values:
    """Score the masks of CAMs beside a constant background, at the best of several."""
    stems, start = _scored(run, few=False), time.perf_counter()
    matrices = [pixelss.ConfusionMatrix(run.data.num_classes + 1).to(run.device) for _ in BACKGROUNDS]

    def read(stem: str) -> tuple[Array, Tensor, Tensor, Array]:
        return run.data.image(stem), cams(stem), run.data.tags(stem), run.data.mask(stem)

    for ((_, (image, cam, tags, truth)),) in shared_batches(run, stems, read, desc="field"):
        for matrix, mask in zip(matrices, masks(image, background_sets(run, cam, tags), tags), strict=True):
            matrix.update(_on_device(run, mask), _on_device(run, truth))
    scores = [matrix.compute() for matrix in matrices]
    threshold, best = max(zip(BACKGROUNDS, scores, strict=True), key=lambda pair: pair[1].miou.item())
    seconds = (time.perf_counter() - start) / len(stems) / len(BACKGROUNDS)
    return {**_values(best, "mask"), "threshold": threshold, "seconds": seconds}


def background_sets(run: Run, cam: Tensor, tags: Tensor) -> Tensor:
    """Return CAMs (N, H, W) of the present classes beside each background, (S, 1 + P, H, W)."""
    present = cam[tags > 0].to(run.device)
    return torch.stack([torch.cat([torch.full_like(cam[:1], b).to(present), present]) for b in BACKGROUNDS])


def _values(scores: pixelss.SegmentationScores, name: str) -> Values:
    """Return mIoU, under a name, precision and recall."""
    parts = {name: scores.miou, "precision": scores.precision, "recall": scores.recall}
    return {key: value.nanmean().item() for key, value in parts.items()}


def _on_device(run: Run, mask: Array) -> Tensor:
    return torch.from_numpy(mask)[None].to(run.device)


def _climbed(run: Run) -> Values:
    """Score AdvCAM on a few images."""
    network, folder = load_trained(run, "train_cam"), climbed_folder(run)
    trained = (run.folder("train_cam") / "model.pt").stat().st_mtime_ns
    stems, spent = _scored(run, few=True), folder / "seconds.json"
    seconds: dict[str, float] = json.loads(spent.read_text()) if spent.is_file() else {}

    def done(stem: str) -> bool:
        path = folder / f"{stem}.png"
        return path.is_file() and path.stat().st_mtime_ns >= trained

    def read(stem: str) -> tuple[NDArray[np.uint8], Tensor]:
        return run.data.image(stem), run.data.tags(stem)

    for ((stem, (image, tags)),) in shared_batches(run, stems, read, desc="AdvCAM", done=done):
        start = time.perf_counter()
        save_cam(folder / f"{stem}.png", climbed_cam(run, network, image, tags), tags)
        seconds[stem] = time.perf_counter() - start
        if rank() == 0:
            write_atomic(spent, json.dumps(seconds))
    barrier()
    scores = _swept(run, lambda stem: load_cam(folder / f"{stem}.png", run.data.num_classes), few=True)
    return {**scores, "seconds": sum(seconds.values()) / max(1, len(seconds))}


def climbed_folder(run: Run) -> Path:
    """Return where AdvCAM's CAMs of a run's network lie."""
    return run.out / "field" / "climbed"


def climbed_cam(run: Run, network: nn.Module, image: NDArray[np.uint8], tags: Tensor) -> Tensor:
    """AdvCAM: 27 iterations at every scale of the inference, 13 below the image's size; CAMs (N, H, W)."""
    x, shown, cams = to_input(run, [image])[1], tags[None].to(run.device), []
    for scale in run.config.infer_cam.scales:
        sides = [max(1, int(side * scale + 0.5)) for side in image.shape[:2]]
        scaled = interpolate(x, (sides[0], sides[1]), mode="bilinear")
        cams.append(pixelss.climb_cam(network, scaled, shown, iterations=13 if scale < 1 else 27))
    return pixelss.msinf_cam(cams, shown, size=(image.shape[0], image.shape[1]))[0]


def energy_weight(run: Run) -> float:
    """Return RRM's weight, raised for smaller crops as the number of pairs of pixels falls, which it sums over."""
    return _ENERGY * (_ENERGY_CROP / run.config.seg.augment.crop) ** 4


class Segmentation(NamedTuple):
    """The folder of a segmentation's runs, its weight of the dense energy, and the functions that are its code."""

    folder: str
    energy: Callable[[Run], float]
    code: tuple[Callable[..., object], ...] = ()


SEGMENTATIONS = {
    "cross-entropy": Segmentation("seg-plain", lambda run: 0.0),
    "RRM's energy": Segmentation("seg-energy", energy_weight, (energy_of,)),
}


def _segmented(run: Run, row: Segmentation) -> Values:
    """Score a segmentation network that learns from RRM's reliable masks."""

    def score() -> Values:
        labels = run.out / "field" / "reliable"
        write_reliable(run, labels)
        config = replace(run.config, seg=replace(run.config.seg, energy=row.energy(run)))
        trained = derived(run, row.folder, config, {"train_cam": run.folder("train_cam"), "make_labels": labels})
        if not trained.finished("make_labels"):
            trained.finish("make_labels")
        if not trained.finished("train_seg"):
            with watched(trained, "train_seg"):
                execute(trained, ["train_seg"])
        cost = {"seconds": seconds_a_step(trained, "train_seg"), "megabytes": megabytes(trained, "train_seg")}
        return {**_segmentation_scores(trained), **cost}

    return {**_kept(run, row.folder, score), "lines": code_lines(*row.code)}


@torch.inference_mode()
def _segmentation_scores(run: Run) -> Values:
    """Score a segmentation network's masks, and the same after the CRF; no tags are known."""
    config, crf, everything = run.config.seg, by_crf(run), torch.ones(run.data.num_classes)
    network = load_trained(run, "train_seg")
    matrices = [pixelss.ConfusionMatrix(run.data.num_classes + 1).to(run.device) for _ in range(2)]

    def read(stem: str) -> tuple[Array, Array]:
        return run.data.image(stem), run.data.mask(stem)

    for ((_, (image, truth)),) in shared_batches(run, _scored(run, few=False), read, desc="field"):
        x = to_input(run, [image])[1]
        probs = pixelss.multi_scale_inference(network, x, scales=config.test_scales, tile=config.tile).softmax(1)
        masks = *refined_masks(image, probs, everything, None), *crf(image, probs, everything)
        for matrix, mask in zip(matrices, masks, strict=True):
            matrix.update(_on_device(run, mask), _on_device(run, truth))
    own, refined = (matrix.compute() for matrix in matrices)
    return {**_values(own, "miou"), "mask": refined.miou.item()}


def write_field(groups: dict[str, Rows], caption: str, seeds: Sequence[int], out: Path) -> str:
    """Write field.md, a table of scores and one of costs, and field.csv; returns the Markdown."""
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["group", "row", "column", "seed", "value"])
    for group, rows in groups.items():
        for row, of_seeds in rows.items():
            for seed, values in zip(seeds, of_seeds, strict=True):
                for column in values:
                    writer.writerow([group, row, column, seed, values[column]])
    text = "\n\n".join([caption, *("\n".join(_table(groups, columns)) for columns in (_SCORES, _COSTS))]) + "\n"
    write_atomic(out / "field.md", text)
    write_atomic(out / "field.csv", table.getvalue())
    return text


def _table(groups: dict[str, Rows], columns: Mapping[str, str]) -> list[str]:
    """Return the lines of a Markdown table."""
    head = ["row", *columns.values()]
    lines = [head, ["---"] * len(head)]
    for group, rows in groups.items():
        lines.append([f"**{group}**", *("" for _ in columns)])
        for row, of_seeds in rows.items():
            lines.append([row, *(_shown(column, [values.get(column) for values in of_seeds]) for column in columns)])
    return [f"| {' | '.join(line)} |" for line in lines]


def _shown(column: str, values: Sequence[float | None]) -> str:
    """Return the mean over the seeds, and half their range where there are several."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known or len(known) < len(values):
        return ""
    mean, half = sum(known) / len(known), (max(known) - min(known)) / 2
    if column in _PERCENT:
        return f"{100 * mean:.1f}" + (f" ± {100 * half:.1f}" if len(known) > 1 else "")
    return f"{mean:.0f}" if column in ("megabytes", "lines") else f"{mean:.2g}"
