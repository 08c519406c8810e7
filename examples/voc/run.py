r"""Run the pipeline, or some of its stages.

The data are a folder in the VOC layout, or photographs with tags.

    python run.py --data VOC2012 --out runs/paper \
        --network.weights resnet38.params
    python run.py --data photographs --tags tags.csv --out runs/own
    python run.py --data demo --out runs/demo   # generated images, CPU, minutes
    torchrun --nproc-per-node 4 run.py ...      # the same arguments

Stages:
    {stages}.
A finished stage is skipped; a killed one continues where it was. Any setting
of the config can be given here, as --cam.schedule.epochs 10; they are listed
below.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import jsonargparse
import torch
from config import Config
from data import BadFileError, open_data
from parallel import barrier, process_group, rank
from pipeline import LAST_OF_LABELS, STAGES
from plan import missing, print_plan, tell
from runfolder import UserError, log_stage, open_run, print_results, refuse_changes
from stages import Run
from storage import remove_checkpoints

HERE = Path(__file__).parent
_NO_MEMORY = ("can't allocate memory", "is killed by signal: Killed", "Bus error")  # of the CPU, a worker, its pipe


def load_config(files: Sequence[Path], settings: Sequence[str] = ()) -> Config:
    """Return the settings of the files, later ones on top, with --NAME VALUE settings on top of those."""
    parser = _settings_parser()
    arguments = [word for file in files for word in ("--config", str(file))]
    try:
        values = parser.instantiate(parser.parse_args([*arguments, *settings]))
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        raise UserError(str(error)) from error
    config = Config(**{name: value for name, value in vars(values).items() if name != "config"})
    given = {word.removeprefix("--").partition("=")[0] for word in settings}
    for section in ("cam", "affinity", "seg"):
        epochs, replaced = f"{section}.schedule.epochs", f"{section}.schedule.iterations"
        iterations = getattr(config, section).schedule.iterations
        if epochs in given and replaced not in given and iterations is not None:
            raise UserError(
                f"--{epochs} must be given with --{replaced} null, or the latter alone: the config sets it to "
                f"{iterations}, which takes the place of epochs."
            )
    return config


@cache
def _settings_parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Config)
    return parser


def execute(run: Run, stages: Sequence[str]) -> None:
    """Run the stages that are not finished, in order."""
    for stage in (STAGES[name] for name in stages):
        if run.finished(stage.name):
            if rank() == 0:
                remove_checkpoints(run.folder(stage.name))  # of a run that was killed right after its last step
            continue
        if absent := [need for need in stage.needs if not run.finished(need)]:
            raise UserError(f"{stage.name} needs {' and '.join(absent)}, not finished in {run.out}: add to --stages.")
        start = time.perf_counter()
        try:
            stage.function(run)
        except (MemoryError, RuntimeError) as error:
            known = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
            if not known and not any(words in str(error) for words in _NO_MEMORY):
                raise
            raise UserError(f"Out of memory in {stage.name}: lower {stage.memory}; or workers. ({error})") from error
        if rank() == 0:
            log_stage(run.out, stage.name, time.perf_counter() - start)


def data_root(data: str, out: Path) -> Path:
    """Return the data set's folder; for demo the generated images, written once beside the stages."""
    if data != "demo":
        return Path(data)
    sys.path.append(str(HERE.parent))
    from shapes import write_shapes

    if rank() == 0:
        write_shapes(out / "shapes")
    barrier()
    return out / "shapes"


def parse_args(arguments: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """Return the options of this command and the resolved config."""
    text = (__doc__ or "").format(stages="\n    ".join(textwrap.wrap(", ".join(STAGES), 72)))
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, add_help=False
    )
    add_options(parser)
    parser.add_argument("--tags", help="table of tags (columns image, tags), or folders: a class each; lists are set")
    parser.add_argument("--masks", help="with --tags, a folder of masks to score with")
    parser.add_argument(
        "--stages", help="all (the default; with --tags to export_labels), names with commas, from:NAME"
    )
    parser.add_argument("--dry-run", action="store_true", help="print plan, estimated cost and what is missing")
    options, settings = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(settings):
        parser.print_help()
        _settings_parser().print_help()
        raise SystemExit
    if not (options.data and options.out):
        raise UserError("--data and --out are needed: see --help.")
    names = list(STAGES)
    if options.stages is None:
        options.stages = ",".join(names[: names.index(LAST_OF_LABELS) + 1] if options.tags else names)
    wanted = options.stages.removeprefix("from:").split(",") if options.stages != "all" else names
    if unknown := [name for name in wanted if name not in STAGES]:
        raise UserError(f"--stages must be all, from:NAME or names of {', '.join(STAGES)}, but has {unknown}.")
    if options.stages.startswith("from:") and len(wanted) > 1:
        raise UserError(f"--stages from:NAME takes one name, but has {wanted}.")
    chosen = names[names.index(wanted[0]) :] if options.stages.startswith("from:") else wanted
    options.stages = [name for name in names if name in chosen]
    files = options.config or default_config("own" if options.tags else options.data)
    return options, load_config(files, [*_tagged(options), *settings])


def _tagged(options: argparse.Namespace) -> list[str]:
    """Return the settings that --tags and --masks stand for."""
    if not options.tags:
        if options.masks:
            raise UserError("--masks is for images with --tags.")
        return []
    if options.out.resolve().is_relative_to(Path(options.data).resolve()):
        raise UserError(f"--out must lie outside of --data, whose images are searched for, but is {options.out}.")
    lists = {"train": "all", "score": "masks" if options.masks else "null", "val": "null", "test": "null"}
    values = {"tags": options.tags, **({"masks": options.masks} if options.masks else {}), **lists}
    return [f"--data.{name}={value}" for name, value in values.items()]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what run.py and tables.py share."""
    parser.add_argument("--data", help="a folder in the VOC layout, or demo for generated images")
    parser.add_argument("--out", type=Path, help="the run folder")
    parser.add_argument("--config", type=Path, action="append", help="of settings; several: later ones on top")
    parser.add_argument("--debug", action="store_true", help="errors with a traceback, as PIXELSS_DEBUG=1")


def default_config(data: str) -> list[Path]:
    return [HERE / (f"{data}.yaml" if data in ("demo", "own") else "paper.yaml")]


def main() -> None:
    options, config = parse_args(sys.argv[1:])
    with process_group(config.device if torch.cuda.is_available() else "cpu") as device:
        root = data_root(options.data, options.out)
        if options.dry_run:
            faults = dry_run(options, config, root)
        else:
            faults = []
            check(config, root, options.stages)
            run = open_run(config, root, options.out, device)
            tell(config, run.data, [name for name in options.stages if not run.finished(name)])
            execute(run, options.stages)
            if rank() == 0:
                print_results(run, list(STAGES))
    if faults:
        raise SystemExit(1)


def check(config: Config, root: Path, stages: Sequence[str]) -> None:
    """Raise with everything that is missing, before hours are spent."""
    if faults := missing(config, root, stages):
        raise UserError("This is missing:\n" + "\n".join(f"- {fault}" for fault in faults))


def dry_run(options: argparse.Namespace, config: Config, root: Path) -> list[str]:
    """Print the plan and what is missing, which it returns. Nothing is written, the demo's images aside."""
    faults = missing(config, root, options.stages)
    data = None if faults else open_data(root, config.data)
    if rank() == 0:
        finished = [name for name in options.stages if (options.out / name / "done.json").is_file()]
        print_plan(config, data, options.stages, finished)
        try:
            tell(config, data, [name for name in options.stages if name not in finished])
            if data:
                refuse_changes(config, data, root, options.out)
        except (BadFileError, UserError) as error:
            faults.append(str(error))
        print("\n".join(["Missing:", *(f"- {fault}" for fault in faults)] if faults else ["Nothing is missing."]))
    return faults


def guarded(main: Callable[[], None]) -> None:
    """Call `main`; errors that tell the user what to do are one message, with a traceback only in debug mode."""
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("Stopped. The same command continues where it was.") from None
    except (UserError, OSError, ValueError, RuntimeError) as error:
        if "--debug" in sys.argv or os.environ.get("PIXELSS_DEBUG"):
            raise
        raise SystemExit(f"{error}\n(--debug or PIXELSS_DEBUG=1 shows where)") from None


if __name__ == "__main__":
    guarded(main)
