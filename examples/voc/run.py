"""Run the pipeline, or some of its stages, on a folder in the VOC layout.

    python run.py --data VOC2012 --out runs/paper --network.weights resnet38.params
    python run.py --data demo --out runs/demo                 # generated images, CPU, a few minutes
    torchrun --nproc-per-node 4 run.py --data VOC2012 --out runs/paper --network.weights resnet38.params

Stages: {stages}.
A finished stage is skipped; a killed one continues where it was. Any setting of the config can be given here, as
--cam.schedule.epochs 10. `run.py --help` lists them all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import timm
import torch
import yaml
from config import Config
from data import VOCFolder
from evaluate import evaluate
from export_test import export_test
from infer_cam import infer_cam
from infer_seg import infer_seg
from make_labels import make_labels
from parallel import barrier, process_group, rank, world_size
from plan import missing, print_plan
from score_cam import score_cam
from stages import Run
from storage import write_atomic
from train_affinity import train_affinity
from train_cam import train_cam
from train_seg import train_seg

import pixelss

HERE = Path(__file__).parent
# Every stage, the stages whose results it reads, and the settings that lower its memory.
STAGES: dict[str, tuple[Callable[[Run], None], tuple[str, ...], str]] = {
    "train_cam": (train_cam, (), "cam.schedule.batch or cam.augment.crop"),
    "infer_cam": (infer_cam, ("train_cam",), "infer_cam.max_batch"),
    "score_cam": (score_cam, ("infer_cam",), "infer_cam.max_batch"),
    "train_affinity": (train_affinity, ("infer_cam",), "affinity.schedule.batch or affinity.augment.crop"),
    "make_labels": (make_labels, ("infer_cam", "train_affinity"), "the size of the images"),
    "train_seg": (train_seg, ("make_labels",), "seg.schedule.batch or seg.augment.crop"),
    "infer_seg": (infer_seg, ("train_seg",), "seg.max_batch or seg.tile"),
    "evaluate": (evaluate, ("infer_seg",), "nothing: it holds two masks at a time"),
    "export_test": (export_test, ("infer_seg",), "nothing: it holds the archive alone"),
}
# Settings that change speed, memory or reports, not results: they may differ when a run continues.
FREE = {"device", "workers", "compile", "tensorboard", "max_batch", "checkpoint_every", "log_every", "on_bad_file"}


class UserError(Exception):
    """What the user can mend; printed without a traceback."""


def load_config(files: Sequence[Path], settings: Sequence[str] = ()) -> Config:
    """Return the settings of the files, later ones on top, with --NAME VALUE settings on top of those."""
    parser = _settings_parser()
    arguments = [word for file in files for word in ("--config", str(file))]
    try:
        values = parser.instantiate(parser.parse_args([*arguments, *settings]))
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        raise UserError(str(error)) from error
    return Config(**{name: value for name, value in vars(values).items() if name != "config"})


def _settings_parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Config)
    return parser


def flatten(tree: Any, name: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries under dotted names."""
    if not isinstance(tree, dict):
        return {name: tree}
    return {k: v for key, branch in tree.items() for k, v in flatten(branch, f"{name}.{key}".strip(".")).items()}


def open_run(config: Config, root: Path, out: Path, device: torch.device) -> Run:
    """Make or reopen a run folder; one that was made with other settings is refused, naming them."""
    plain = json.loads(json.dumps(asdict(config), default=str))  # tuples to lists, paths to strings
    kept, environment = out / "config.yaml", out / "environment.json"
    if kept.is_file():
        before, after = flatten(yaml.safe_load(kept.read_text())), flatten(plain)
        before["--data"], after["--data"] = json.loads(environment.read_text())["data"], str(root.resolve())
        names = sorted(n for n in before.keys() | after.keys() if n.rsplit(".", 1)[-1] not in FREE)
        if changed := [f"  {n}: {before.get(n)} -> {after.get(n)}" for n in names if before.get(n) != after.get(n)]:
            raise UserError(
                f"{out} was made with other settings; name another --out, or remove it:\n" + "\n".join(changed)
            )
    barrier()  # every process has compared before one writes
    if rank() == 0:
        write_atomic(environment, json.dumps(_environment(root, device), indent=1) + "\n")
        write_atomic(kept, yaml.safe_dump(plain, sort_keys=False))
    barrier()
    return Run(config, VOCFolder(root, config.data.classes), out, device)


def _environment(root: Path, device: torch.device) -> dict[str, Any]:
    modules = {module.__name__: module.__version__ for module in (pixelss, torch, timm, np, jsonargparse)}
    git = subprocess.run(["git", "-C", str(HERE), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "data": str(root.resolve()),
        "command": sys.argv,
        "git_revision": git.stdout.strip() or None,
        "python": platform.python_version(),
        **modules,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "processes": world_size(),
    }


def execute(run: Run, stages: Sequence[str]) -> None:
    """Run the stages that are not finished, in order."""
    for stage in stages:
        function, needs, memory = STAGES[stage]
        if run.finished(stage):
            continue
        if absent := [need for need in needs if not run.finished(need)]:
            raise UserError(f"{stage} needs {' and '.join(absent)}, not finished in {run.out}: add to --stages.")
        start = time.perf_counter()
        try:
            function(run)
        except torch.OutOfMemoryError as error:
            raise UserError(f"Out of memory in {stage}: lower {memory}. ({error})") from error
        if rank() == 0:
            seconds = round(time.perf_counter() - start, 1)
            with (run.out / "stages.jsonl").open("a") as log:
                log.write(json.dumps({"stage": stage, "seconds": seconds, "processes": world_size()}) + "\n")


def print_table(run: Run) -> None:
    """Print every finished stage with the seconds of its last start and its results, in 80 columns."""
    log = run.out / "stages.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    seconds = {line["stage"]: line["seconds"] for line in lines}
    print(f"{'stage':15}{'seconds':>8}  results (scores in %)")
    for stage in filter(run.finished, STAGES):
        results = json.loads((run.folder(stage) / "done.json").read_text())
        text = ", ".join(f"{name} {value}" for name, value in results.items())
        while len(text) > 54:  # a long report goes on below
            cut = text.rfind(", ", 0, 54) + 1 or 54
            print(f"{stage:15}{seconds.get(stage, ''):>8}  {text[:cut].strip()}")
            stage, text = "", text[cut:].strip()
        print(f"{stage:15}{seconds.get(stage, ''):>8}  {text}")


def demo_folder(out: Path) -> Path:
    """Write the generated images once, beside the stages."""
    sys.path.append(str(HERE.parent))
    from shapes import write_shapes

    if rank() == 0:
        write_shapes(out / "shapes")
    barrier()
    return out / "shapes"


def parse_args(arguments: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """Return the options of this command and the resolved config."""
    text = (__doc__ or "").format(stages=", ".join(STAGES))
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, add_help=False)
    add_options(parser)
    parser.add_argument("--stages", default="all", help="all, names with commas, or from:NAME")
    parser.add_argument("--dry-run", action="store_true", help="print plan, estimated cost and what is missing")
    options, settings = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(settings):
        parser.print_help()
        _settings_parser().print_help()
        raise SystemExit
    if not (options.data and options.out):
        raise UserError("--data and --out are needed: see --help.")
    names = list(STAGES)
    if options.stages.startswith("from:"):
        wanted = options.stages.removeprefix("from:").split(",")
        options.stages = names[names.index(wanted[0]) :] if wanted[0] in names else wanted
    else:
        options.stages = names if options.stages == "all" else options.stages.split(",")
    if unknown := [name for name in options.stages if name not in names]:
        raise UserError(f"--stages must be all, from:NAME or names of {', '.join(names)}, but has {unknown}.")
    options.stages.sort(key=names.index)
    return options, load_config(options.config or default_config(options.data), settings)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what run.py and tables.py share."""
    parser.add_argument("--data", help="a folder in the VOC layout, or demo for generated images")
    parser.add_argument("--out", type=Path, help="the run folder")
    parser.add_argument("--config", type=Path, action="append", help="of settings; several: later ones on top")
    parser.add_argument("--debug", action="store_true", help="errors with a traceback, as PIXELSS_DEBUG=1")


def default_config(data: str) -> list[Path]:
    return [HERE / ("demo.yaml" if data == "demo" else "paper.yaml")]


def main() -> None:
    options, config = parse_args(sys.argv[1:])
    if options.dry_run:
        raise SystemExit(dry_run(options, config))
    with process_group(config.device if torch.cuda.is_available() else "cpu") as device:
        root = demo_folder(options.out) if options.data == "demo" else Path(options.data)
        check(config, root, options.stages)
        run = open_run(config, root, options.out, device)
        execute(run, options.stages)
        if rank() == 0:
            print_table(run)


def check(config: Config, root: Path, stages: list[str]) -> None:
    """Raise with everything that is missing, before hours are spent."""
    if faults := missing(config, root, stages):
        raise UserError("This is missing:\n" + "\n".join(f"- {fault}" for fault in faults))


def dry_run(options: argparse.Namespace, config: Config) -> int:
    """Print the plan and what is missing; returns the exit code. Nothing is written, the demo's images aside."""
    root = demo_folder(options.out) if options.data == "demo" else Path(options.data)
    faults = missing(config, root, options.stages)
    finished = [name for name in options.stages if (options.out / name / "done.json").is_file()]
    print_plan(config, None if faults else VOCFolder(root, config.data.classes), options.stages, finished)
    print("\n".join(["Missing:", *(f"- {fault}" for fault in faults)] if faults else ["Nothing is missing."]))
    return 1 if faults else 0


def guarded(main: Callable[[], None]) -> None:
    """Call `main`; errors that tell the user what to do are one message, with a traceback only in debug mode."""
    try:
        main()
    except (UserError, OSError, ValueError, RuntimeError) as error:
        if "--debug" in sys.argv or os.environ.get("PIXELSS_DEBUG"):
            raise
        prefix = "" if world_size() == 1 else f"process {rank()}: "
        raise SystemExit(f"{prefix}{error}\n(--debug or PIXELSS_DEBUG=1 shows where)") from None


if __name__ == "__main__":
    guarded(main)
