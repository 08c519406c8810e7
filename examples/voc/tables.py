r"""The paper's ablations and a table of the field's systems, a command each.

Of the paper: tables 1, 2, 4 and 5 and figure 7, its figures beside ours.

    python tables.py table1 --data VOC2012 --out runs/tables --seeds 0 1 2 \
        --network.weights resnet38.params

NAME is one of {names}, or all. Every row is
a run of its own, OUT/rows/ROW/seed-SEED, made by run.py's stages: a killed
table continues, and tables share rows. Rows differ in their losses alone: data,
schedule, classification scales and number of iterations are the config's. With
--start FILE every row of a seed continues from one network that is trained with
that config on top and without the modules. Writes OUT/NAME.md, .csv and .png,
and the CAMs' mIoU over thresholds as OUT/NAME-curves.png. The table field has
three more groups of rows (field.py).
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import statistics
import sys
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from config import Config
from costs import watched
from evaluate import paper_figures
from field import CAPTION, field_groups, write_field
from parallel import process_group, rank
from PIL import Image
from pipeline import STAGES
from run import add_options, check, data_root, default_config, execute, guarded, load_config
from runfolder import UserError, open_run
from stages import Run
from storage import remove_unfinished, save_png, write_atomic

from pixelss import viz

Figures = dict[str, dict[str, list[float]]]  # row, column, one percentage a seed
THRESHOLDS = [0.1, 0.15, 0.2, 0.25, 0.3, 0.35]
# What every row changes in the config's section cam, each value of its setting's type.
ROWS: dict[str, dict[str, Any]] = {
    "baseline": {"rcm": 0.0, "mam": 0.0},
    "SMM": {"rcm": 0.0, "attentive": False, "mam_student_scales": (1.0,)},
    "MMM": {"rcm": 0.0, "attentive": False},
    "MAM": {"rcm": 0.0},
    "RCM": {"mam": 0.0},
    "MMM+RCM": {"attentive": False},
    "MAM+RCM": {},
    "direct": {"rcm": 0.0, "mam": 0.0, "direct": 1.0},
    "weight sharing": {"mam": 0.0, "teacher_momentum": 0.0},
    "SEAM": {"rcm": 0.0, "mam": 0.0, "er": 1.0, "ecr": 1.0, "minpool": 1.0},
    "OC-CSE": {"rcm": 0.0, "mam": 0.0, "erase": 0.65},  # the mean of its weights, which rise from .3 to 1
    "CPN": {"rcm": 0.0, "mam": 0.0, "hide": 1.0},
    "Puzzle-CAM": {"rcm": 0.0, "mam": 0.0, "puzzle": 1.0},
    "PPC": {"rcm": 0.0, "mam": 0.0, "er": 1.0, "ecr": 1.0, "minpool": 1.0, "ppc": 1.0},
    "ICD": {"rcm": 0.0, "mam": 0.0, "icd": 1.0},
    "Sub-category": {"rcm": 0.0, "mam": 0.0, "subcategory": 5.0},
    "like ECS-Net": {"rcm": 0.0, "mam": 0.0, "ecs": 1.0},
    **{f"RCM t={t}": {"mam": 0.0, "threshold": t} for t in THRESHOLDS},
}


class Table(NamedTuple):
    """A table's title, rows, columns (of scores.json) and stages."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    stages: Sequence[str] = ("train_cam", "score_cam")


TABLES = {
    "table1": Table(
        "Table 1, CAMs with every combination of modules",
        ["baseline", "SMM", "MMM", "MAM", "RCM", "MMM+RCM", "MAM+RCM"],
        ["miou", "crf_miou", "par_miou"],
    ),
    "table2": Table(
        "Table 2, ways to learn from the class region masks",
        ["baseline", "direct", "weight sharing", "RCM", "MAM", "MAM+RCM"],
        ["miou", "precision", "recall"],
    ),
    "table4": Table("Table 4, class-wise IoU of the segmentation", ["MAM+RCM"], [], list(STAGES)),
    "table5": Table("Table 5, CAMs inferred at single scales", ["baseline", "MAM+RCM"], []),
    "fig7": Table(
        "Figure 7, RCM at several thresholds of the region mask",
        ["baseline", *(f"RCM t={t}" for t in THRESHOLDS)],
        ["miou", "precision", "recall"],
    ),
    "field": Table(
        "The paper's modules beside the losses of other systems",
        [
            *("baseline", "SEAM", "OC-CSE", "CPN", "Puzzle-CAM", "like ECS-Net", "PPC", "ICD", "Sub-category"),
            *("direct", "RCM", "MAM", "MAM+RCM"),
        ],
        ["miou", "precision", "recall"],
    ),
}


def changed(config: Config, row: str) -> Config:
    """Return the config of a row."""
    return replace(config, cam=replace(config.cam, **ROWS[row]))


def run_start(seed: int, options: argparse.Namespace, root: Path, device: torch.device) -> None:
    """Train, or reopen, the network that all rows of a seed continue from."""
    on_top = f"--config={options.start}"  # of this command's settings too, which are meant for the rows
    config = changed(load_config(options.config, [*options.settings, on_top, f"--seed={seed}"]), "baseline")
    check(config, root, ["train_cam"])
    execute(open_run(config, root, _folder(options.out, "start", seed), device), ["train_cam"])


def run_row(
    row: str, seed: int, stages: Sequence[str], options: argparse.Namespace, root: Path, device: torch.device
) -> Run:
    """Run, or reopen, one row of a table with one seed."""
    start = [f"--cam.start_from={_folder(options.out, 'start', seed) / 'train_cam'}"] if options.start else []
    given = load_config(options.config, [*options.settings, *start, f"--seed={seed}"])
    config = changed(given, row)
    same = next(name for name in ROWS if changed(given, name) == config)  # a threshold of fig7 may be that of RCM
    check(config, root, stages)
    run = open_run(config, root, _folder(options.out, same, seed), device)
    if not run.finished("train_cam"):
        with watched(run, "train_cam"):
            execute(run, ["train_cam"])
    execute(run, stages)
    return run


def _folder(out: Path, row: str, seed: int) -> Path:
    return out.resolve() / "rows" / row.replace(" ", "-") / f"seed-{seed}"


def figures_of(name: str, runs: dict[str, list[Run]]) -> Figures:
    """Return row, column, one percentage a seed; in table 4 the classes are the rows."""

    def scores(run: Run, stage: str) -> dict[str, Any]:
        return dict(json.loads((run.folder(stage) / "scores.json").read_text()))

    if name == "table4":
        ious = [scores(run, "evaluate")["iou"] for run in runs["MAM+RCM"]]
        percent = [{kind: math.nan if value is None else 100 * value for kind, value in iou.items()} for iou in ious]
        return {kind: {"iou": [one[kind] for one in percent]} for kind in percent[0]}
    figures: Figures = {}
    for row, of_seeds in runs.items():
        columns: dict[str, list[float]] = defaultdict(list)
        for run in of_seeds:
            cam = scores(run, "score_cam")
            if name == "table5":
                single = {scale: one["miou"] for scale, one in cam["single_scales"].items()}
                values = single | {"all": cam["miou"]}
                values |= {"mean": statistics.fmean(single.values()), "deviation": statistics.pstdev(single.values())}
            else:
                values = {column: cam[column] for column in TABLES[name].columns if column in cam}
            for column, value in values.items():
                columns[column].append(100 * value)
        figures[row] = columns
    return figures


def write_table(name: str, figures: Figures, caption: str, seeds: list[int], out: Path) -> str:
    """Write NAME.md and NAME.csv, the paper's figure beside each of ours; returns the Markdown."""
    paper = paper_figures().get(name, {})
    columns = list(next(iter(figures.values())))
    head = ["row", *(text for column in columns for text in (column, f"{column}, paper"))]
    lines, table = [head], io.StringIO()
    for row, of_columns in figures.items():
        pairs = [(_spread(of_columns[c]), str(paper.get(row, {}).get(c, "-"))) for c in columns]
        lines.append([row, *(text for pair in pairs for text in pair)])
    csv.writer(table).writerow(["row", "column", "seed", "value", "paper"])
    for row, of_columns in figures.items():
        for column, values in of_columns.items():
            for seed, value in zip(seeds, values, strict=True):
                csv.writer(table).writerow([row, column, seed, round(value, 2), paper.get(row, {}).get(column, "")])
    rule = ["---"] * len(head)
    text = f"{caption}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines[1:]))
    write_atomic(out / f"{name}.md", text)
    write_atomic(out / f"{name}.csv", table.getvalue())
    return text


def _spread(values: list[float]) -> str:
    """Return the mean over the seeds, and half their range where there are several."""
    mean = statistics.fmean(values)  # not a number where a class was never seen
    spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
    return "-" if math.isnan(mean) else f"{mean:.1f}{spread}"


def plot(name: str, figures: Figures, runs: dict[str, list[Run]], caption: str, path: Path) -> None:
    """Draw the first column, or the single scales of table 5; figure 7 over the threshold, the baseline as a line."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    figure.supxlabel(textwrap.fill(caption, 125), x=0.01, ha="left", fontsize=8)
    means = {row: {c: statistics.fmean(v) for c, v in columns.items()} for row, columns in figures.items()}
    if name == "fig7":
        thresholds = [of_seeds[0].config.cam.threshold for row, of_seeds in runs.items() if row != "baseline"]
        axes.plot(thresholds, [means[row]["miou"] for row in runs if row != "baseline"], marker="o", label="RCM")
        axes.axhline(means["baseline"]["miou"], color="grey", label="baseline")
        axes.set_xlabel("threshold of the region mask")
    elif name == "table5":
        for row, columns in means.items():
            scales = [column for column in columns if column not in ("all", "mean", "deviation")]
            axes.plot(scales, [columns[scale] for scale in scales], marker="o", label=row)
        axes.set_xlabel("scale of the inference")
    else:
        paper = paper_figures().get(name, {})
        column = next(iter(next(iter(means.values()))))
        places = range(len(means))
        axes.bar([i - 0.2 for i in places], [m[column] for m in means.values()], 0.4, label="ours")
        axes.bar([i + 0.2 for i in places], [paper.get(row, {}).get(column, 0) for row in means], 0.4, label="paper")
        axes.set_xticks(list(places), list(means), rotation=45 if len(means) > 6 else 0, ha="right")
    axes.set_ylabel("mIoU (%)" if name != "table4" else "IoU (%)")
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    plt.close(figure)
    write_atomic(path, picture.getvalue())


def plot_curves(runs: dict[str, list[Run]], path: Path) -> None:
    """Draw the CAMs' mIoU over the background threshold, a curve a row, of its first seed."""
    curves = {}
    for row, (run, *_) in runs.items():
        curve = json.loads((run.folder("score_cam") / "scores.json").read_text())["curve"]
        curves[f"{row}, seed {run.config.seed}"] = curve["thresholds"], curve["miou"]
    save_png(path, Image.fromarray(viz.threshold_curves(curves, width=800)))


def caption_of(name: str, run: Run, seeds: list[int]) -> str:
    """Return title, split, seeds and setting."""
    config, cam = run.config, run.config.cam
    split = config.data.val if name == "table4" else config.data.score
    length = f"{cam.schedule.iterations} iterations" if cam.schedule.iterations else f"{cam.schedule.epochs:g} epochs"
    spread = f"mean of seeds {', '.join(map(str, seeds))} ± half their range" if len(seeds) > 1 else f"seed {seeds[0]}"
    start = ", from a network trained before" if cam.start_from else ""
    ours = CAPTION.format(device=run.device.type) if name == "field" else "Paper: VOC 2012."
    return (
        f"{TABLES[name].title}: per cent on {split}.txt of {run.data.root.name} ({len(run.data.stems(split))} images), "
        f"{spread}; {config.network.backbone}, {length} of batch {cam.schedule.batch} at crop {cam.augment.crop}"
        f"{start}, classification loss at scales {', '.join(map(str, cam.cls_scales))}; CAM thresholds are the best on "
        f"the scored masks. {ours}"
    )


def parse_args(arguments: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """Return the options of this command, `tables` among them, and the config that the rows change."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").format(names=", ".join(TABLES)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", choices=[*TABLES, "all"], metavar="NAME", help="the table")
    add_options(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="every row once a seed (0)")
    parser.add_argument("--start", type=Path, help="a config of the network that all rows of a seed continue from")
    options, settings = parser.parse_known_args(arguments)
    if not (options.data and options.out):
        raise UserError("--data and --out are needed: see --help.")
    options.tables = list(TABLES) if options.name == "all" else [options.name]
    if "field" in options.tables and not options.start:
        raise UserError(
            "The table field needs --start FILE, the settings of a first training, as mini_start.yaml: its row OC-CSE "
            "shows erased images to that network."
        )
    options.config = options.config or default_config(options.data)
    options.settings = [*settings, "--infer_cam.single_scales=true"]  # for table 5, so that tables share rows
    config = load_config(options.config, settings)
    for field in ("score", "val") if "table4" in options.tables else ("score",):
        if getattr(config.data, field) is None:
            raise UserError(f"data.{field} must name a list with masks, but is null: the tables hold scores.")
    return options, config


def make_table(name: str, options: argparse.Namespace, root: Path, device: torch.device) -> None:
    """Run a table's rows and write it, its plot and its curves."""
    _, rows, _, stages = TABLES[name]
    for seed in options.seeds if options.start else ():
        run_start(seed, options, root, device)
    runs = {row: [run_row(row, seed, stages, options, root, device) for seed in options.seeds] for row in rows}
    groups = field_groups(runs) if name == "field" else {}
    if rank() == 0:
        figures = figures_of(name, runs)
        caption = caption_of(name, runs[rows[-1]][0], options.seeds)
        if groups:
            print(write_field(groups, caption, options.seeds, options.out))
        else:
            print(write_table(name, figures, caption, options.seeds, options.out))
        plot(name, figures, runs, caption, options.out / f"{name}.png")
        plot_curves(runs, options.out / f"{name}-curves.png")


def main() -> None:
    options, config = parse_args(sys.argv[1:])
    plt.switch_backend("agg")
    with process_group(config.device if torch.cuda.is_available() else "cpu") as device:
        root = data_root(options.data, options.out)
        if rank() == 0:
            remove_unfinished(options.out, below=False)  # of a killed process
        for name in options.tables:
            make_table(name, options, root, device)


if __name__ == "__main__":
    guarded(main)
