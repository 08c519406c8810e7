"""What a row of a table costs: the seconds of a step, the most memory that it took, and the lines of its code."""

from __future__ import annotations

import ast
import ctypes
import gc
import inspect
import io
import json
import math
import statistics
import textwrap
import tokenize
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from parallel import rank
from stages import Run
from storage import write_atomic

_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


@contextmanager
def watched(run: Run, stage: str) -> Iterator[None]:
    """Write the peak of memory while a stage runs to STAGE-memory.json; of one that continues, since it does."""
    gc.collect()
    cuda = run.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(run.device)
    else:
        _forget_peak()
    yield
    peak = torch.cuda.max_memory_allocated(run.device) / 1e6 if cuda else _peak()
    if rank() == 0:
        write_atomic(_record(run, stage), json.dumps({"megabytes": None if math.isnan(peak) else round(peak, 1)}))


def megabytes(run: Run, stage: str) -> float:
    """Return what `watched` measured; nan where it did not."""
    path = _record(run, stage)
    value = json.loads(path.read_text())["megabytes"] if path.is_file() else None
    return math.nan if value is None else float(value)


def seconds_a_step(run: Run, stage: str) -> float:
    """Return the median over the reports of a training, loading included."""
    lines = (run.folder(stage) / "metrics.jsonl").read_text().splitlines()
    speeds = [speed for line in lines if (speed := json.loads(line)["images_per_s"]) > 0]
    batch: int = getattr(run.config, stage.removeprefix("train_")).schedule.batch
    return statistics.median(batch / speed for speed in speeds) if speeds else math.nan


def code_lines(*parts: Callable[..., object]) -> int:
    """Return how many lines of functions and classes hold code: no docstrings, comments or blank lines."""
    return sum(_code_lines(inspect.getsource(part)) for part in parts)


def _code_lines(source: str) -> int:
    source, lines = textwrap.dedent(source), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def _record(run: Run, stage: str) -> Path:
    return run.out / f"{stage}-memory.json"


def _forget_peak() -> None:
    """Give free memory back to the system and let it count the process's peak anew, where it can (Linux)."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> float:
    """Return the process's peak of resident memory in megabytes."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    return math.nan
