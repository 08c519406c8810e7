r"""Score what the modules would teach against the network that they teach it to.

A check of a minute, before any training:

    python headroom.py --data VOC2012 --config mini.yaml \
        --cam.start_from runs/start/train_cam

Takes the crops and scales that train_cam would train on, here of the list
data.score, for its masks; the finished network of cam.start_from is student and
teacher, as at the first step. Prints, as Markdown, the mIoU of its CAM at every
scale beside that of the targets of MMM and MAM for that scale, and that of
RCM's class region mask. A module pulls the CAM towards its target: where the
target is the worse of the two, expect it to do harm.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from batches import Samples
from data import open_data
from inference import autocast
from networks import build_cam, load_start
from parallel import process_group, rank, share
from plan import print_pace
from run import HERE, check, guarded, load_config
from runfolder import UserError
from stages import Run
from tqdm import tqdm
from train_cam import check_scales

import pixelss


class Headroom(NamedTuple):
    """What `headroom` finds: mIoU (%) by scale and by CAM, MMM, MAM; the scores of the class region mask."""

    scales: dict[str, dict[str, float]]
    mask: pixelss.SegmentationScores


@torch.inference_mode()
def headroom(run: Run) -> Headroom:
    """Score CAMs, targets and masks on one crop of every scored image."""
    config, N = run.config.cam, run.data.num_classes
    if config.start_from is None:
        raise UserError("cam.start_from must be a finished train_cam folder, but is null: its network is scored.")
    if run.config.data.score is None:
        raise UserError("data.score must name a list with masks, but is null.")
    check_scales(config)
    network = build_cam(replace(run.config, network=replace(run.config.network, weights=None)), N)
    load_start(network, config.start_from)
    network.eval().to(run.device).to(memory_format=torch.channels_last)
    samples = Samples(run.data, run.data.stems(run.config.data.score), run.config, config.augment, [None])
    rows = [f"x{scale:g}" for scale in config.scales]
    cells = [*((row, column) for row in rows for column in ("CAM", "MMM", "MAM")), ("all", "CAM")]
    thresholds = torch.arange(120) / 200  # all is halved, for MAM's targets reach 2
    sweeps = {cell: pixelss.ThresholdSweep(N, thresholds=thresholds).to(run.device) for cell in cells}
    region = pixelss.ConfusionMatrix(N + 1).to(run.device)
    steps = math.ceil(len(samples) / config.schedule.batch)
    batches = samples.batches(config.schedule.batch, 0, steps, pin=run.device.type == "cuda")
    bar = tqdm(batches, total=steps, desc="headroom", ncols=80, disable=rank() != 0)
    for step, batch in enumerate(bar):
        first = step * config.schedule.batch
        count = sum(p < len(samples) for p in share(range(first, first + config.schedule.batch)))
        if count == 0:  # the stream goes on with the first image again
            continue
        images, tags, maps, _ = (part[:count].to(run.device) for part in batch)
        truth = maps[:, 0]
        with autocast(run):
            x = images.to(memory_format=torch.channels_last)
            outputs = pixelss.multi_scale_forward(network, x, scales=config.scales)
        cams = [pixelss.normalize_cam(output.cam) for output in outputs]
        image, k = (tags > 0).nonzero(as_tuple=True)
        present = torch.stack([cam[image, k] for cam in cams])
        targets = {
            "CAM": present,
            "MMM": pixelss.attentive_target(present, present, attentive=False),
            "MAM": pixelss.attentive_target(present, present),
        }
        for column, of_scales in targets.items():
            for row, values in zip(rows, of_scales, strict=True):
                full = torch.zeros_like(cams[0])
                full[image, k] = values / 2
                sweeps[row, column].update(full, truth)
        together = pixelss.msinf_cam([output.cam for output in outputs], tags)
        sweeps["all", "CAM"].update(together / 2, truth)
        region.update(pixelss.class_region_mask(together, tags, threshold=config.threshold), truth)
    scales: dict[str, dict[str, float]] = defaultdict(dict)
    for (row, column), sweep in sweeps.items():
        scores = sweep.compute()
        scales[row][column] = 100 * scores.miou[scores.best].item()
    return Headroom(dict(scales), region.compute())


def as_markdown(found: Headroom, threshold: float) -> str:
    """Return a row a scale, the targets with their distance to the CAM."""
    lines = ["| scale | CAM | target of MMM | target of MAM |", "|---|---|---|---|"]
    for scale, columns in found.scales.items():
        cam = columns["CAM"]
        cells = [f"{columns[c]:.1f} ({columns[c] - cam:+.1f})" if c in columns else "" for c in ("MMM", "MAM")]
        lines.append(f"| {scale} | {cam:.1f} | {' | '.join(cells)} |")
    values = found.mask.miou, found.mask.precision.nanmean(), found.mask.recall.nanmean()
    miou, precision, recall = (f"{100 * value.item():.1f}" for value in values)
    lines += ["", f"RCM's mask at threshold {threshold:g}: mIoU {miou}, precision {precision}, recall {recall}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", required=True, help="a folder in the VOC layout")
    parser.add_argument("--config", type=Path, action="append", help="of settings; several: later ones on top")
    parser.add_argument("--debug", action="store_true", help="errors with a traceback, as PIXELSS_DEBUG=1")
    options, settings = parser.parse_known_args(sys.argv[1:])
    config = load_config(options.config or [HERE / "paper.yaml"], settings)
    with process_group(config.device if torch.cuda.is_available() else "cpu") as device:
        check(config, Path(options.data), ["score_cam"])
        run = Run(config, open_data(Path(options.data), config.data), Path(), device)
        found = headroom(run)
        if rank() == 0:
            print(as_markdown(found, config.cam.threshold), end="\n\n")
            print_pace(config.cam, len(run.data.stems(config.data.train)))


if __name__ == "__main__":
    guarded(main)
