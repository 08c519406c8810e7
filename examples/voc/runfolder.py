"""The run folder: the config as resolved, the environment, and a table of what the stages gave."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import timm
import torch
import yaml
from config import Config, decisive
from data import BadFileError, DataFolder, open_data
from parallel import barrier, rank, world_size
from pipeline import FIRST, STAGES
from stages import Run
from storage import remove_unfinished, write_atomic
from texts import named

import pixelss

_INPUTS = "inputs.json"


class UserError(Exception):
    """What the user can mend; printed without a traceback."""


def open_run(config: Config, root: Path, out: Path, device: torch.device) -> Run:
    """Make or reopen a run folder; another setting than a stage has begun with is refused, and named."""
    if config.deterministic:  # cuBLAS reads it at its first product, in whatever stage this start begins
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    environment = _environment(root, device)
    data = open_data(root, config.data)
    settings, inputs = refuse_changes(config, data, root, out)
    barrier()  # every process has compared before one writes
    if rank() == 0:
        remove_unfinished(out, below=False)  # of a killed process; a stage clears its own folder
        write_atomic(out / "environment.json", json.dumps(environment, indent=1) + "\n")
        write_atomic(out / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
        write_atomic(out / _INPUTS, json.dumps(inputs, indent=1) + "\n")
    barrier()
    return Run(config, data, out, device)


def refuse_changes(config: Config, data: DataFolder, root: Path, out: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return settings and inputs as a run folder records them; raises where a stage in it has begun with others."""
    settings = json.loads(json.dumps(asdict(config), default=str))  # tuples as lists, paths as strings
    inputs = _inputs(config, data)
    record = out / _INPUTS
    kept = _read(record) if record.is_file() else {}
    if (out / "config.yaml").is_file():
        before = decisive(_read(out / "config.yaml"))
        after = decisive(settings) | {"--data": str(root.resolve())}
        before["--data"] = _read(out / "environment.json").get("data")
        both = kept.keys() & inputs.keys()  # what is absent now can have changed nothing
        before |= {name: kept[name] for name in both}
        after |= {name: inputs[name] for name in both}
        changed = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
        begun = {name: _begun_with(out, name) for name in changed}
        if refused := [name for name in changed if begun[name]]:
            lines = [f"  {name}: {before.get(name)} -> {after.get(name)}" for name in refused]
            made = sorted({stage for name in refused for stage in begun[name]}, key=list(STAGES).index)
            remove = "it" if made[0] == FIRST else f"{', '.join(made)} in it"
            raise UserError(
                f"{out} was made with other settings, say config.yaml, environment.json and {_INPUTS} in it; name "
                f"another --out, or remove {remove}:\n" + "\n".join(lines)
            )
    return settings, kept | inputs


def _read(record: Path) -> dict[str, Any]:
    with named(record, "is damaged: name another --out, or remove the run folder"):
        parse = yaml.safe_load if record.suffix == ".yaml" else json.loads
        return dict(parse(record.read_text(encoding="utf-8")))


def _inputs(config: Config, data: DataFolder) -> dict[str, str]:
    """Return what decides results and stands in files of the user's, under names as settings have; if it is there."""
    found = {}
    with suppress(OSError, ValueError):
        found["data.classes.names"] = ", ".join(data.classes)
    lists = {field: getattr(config.data, field) for field in ("train", "score", "val", "test")}
    for field, name in [(field, name) for field, name in lists.items() if name is not None]:
        with suppress(OSError, ValueError):
            stems = data.stems(name)
            sizes = [(path := data.image_path(stem)).is_file() and path.stat().st_size for stem in stems]
            found[f"data.{field}.images"] = f"{len(stems)} of the list {name}, {_digest([stems, sizes])}"
            if field in ("train", "score"):
                found[f"data.{field}.tags"] = f"of the list {name}, {_digest([_tags(data, stem) for stem in stems])}"
    start = config.cam.start_from and config.cam.start_from / "model.pt"
    for setting, file in (("network.weights", config.network.weights), ("cam.start_from", start)):
        if file and file.is_file():
            found[f"{setting}.content"] = _digest(file)
    return found


def _tags(data: DataFolder, stem: str) -> list[str] | None:
    """Return an image's tags by name, whatever the order of the classes; None where they cannot be read."""
    try:
        return sorted(data.classes[k] for k in data.tags(stem).nonzero().flatten().tolist())
    except BadFileError:
        return None


def _digest(content: object) -> str:
    text = content.read_bytes() if isinstance(content, Path) else json.dumps(content).encode()
    return f"digest {hashlib.sha256(text).hexdigest()[:16]}"


def _begun_with(out: Path, name: str) -> list[str]:
    """Return the stages that have begun with the setting `name`, by themselves or through what they read."""
    starts = {start: stage.name for stage in STAGES.values() for start in stage.settings}
    fitting = [start for start in starts if f"{name}.".startswith(f"{start}.")]
    decided = {starts[max(fitting, key=len)] if fitting else FIRST}
    for stage in STAGES.values():
        if decided & {*stage.needs, *stage.uses}:
            decided.add(stage.name)
    return [stage for stage in STAGES if stage in decided and any(p.is_file() for p in (out / stage).rglob("*"))]


def _environment(root: Path, device: torch.device) -> dict[str, Any]:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        revision = ""  # no git: the version of pixelss below must do
    return {
        "data": str(root.resolve()),
        "command": sys.argv,
        "git_revision": revision or None,
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (pixelss, torch, timm, np, jsonargparse)},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "processes": world_size(),
    }


def log_stage(out: Path, stage: str, seconds: float) -> None:
    """Add a line to stages.jsonl, written as a whole: half a line would break every later start."""
    log = out / "stages.jsonl"
    line = json.dumps({"stage": stage, "seconds": round(seconds, 1), "processes": world_size()}) + "\n"
    write_atomic(log, (log.read_bytes() if log.is_file() else b"") + line.encode())


def print_results(run: Run, stages: Sequence[str]) -> None:
    """Print every finished stage with the seconds of its last start and its results, in 80 columns."""
    log = run.out / "stages.jsonl"
    with named(log, "is damaged: remove it, it holds the stages' seconds alone"):
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
        seconds = {line["stage"]: float(line["seconds"]) for line in lines}
    print(f"{'stage':15}{'seconds':>8}  results (scores in %)")
    for stage in filter(run.finished, stages):
        text = ", ".join(f"{name} {value}" for name, value in run.results(stage).items())
        name, spent = stage, f"{seconds[stage]:.0f}" if stage in seconds else ""
        for line in textwrap.wrap(text, 55) or [""]:
            print(f"{name:15}{spent:>8}  {line}")
            name = spent = ""
