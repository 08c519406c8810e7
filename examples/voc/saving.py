"""What a training leaves on the disk while it goes on: checkpoints, metrics.jsonl and TensorBoard files.

One process writes; in the others the same calls do nothing, so that the loop need not ask.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from batches import Samples
from config import decisive
from numpy.typing import NDArray
from parallel import barrier, rank
from stages import Run, Stage
from storage import append_line, load_checkpoint, remove_unfinished, save_checkpoint, write_atomic
from texts import named
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Pictures = Callable[[], Mapping[str, NDArray[np.uint8]]]  # images (H, W, 3) by name


class Checkpoints:
    """The states of a training: written beside the next steps while the context is open.

    An error of a writing is raised by the next `save` or at the context's end.

    Args:
        folder: of the stage.
        settings: what decides the training, by name; a checkpoint of others is refused.
        parts: whatever has a state, by name.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str], parts: Mapping[str, Any]) -> None:
        self.folder, self.settings, self.parts = folder, settings, parts
        self.writer = ThreadPoolExecutor(1)
        self.written: Future[Path] | None = None

    def resume(self, device: torch.device) -> int:
        """Load the newest checkpoint's states, where there is one; returns the steps done."""
        state = load_checkpoint(self.folder, map_location=device)
        if state is not None:
            check_settings(self.folder, state["settings"], self.settings)
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
        barrier()  # all have read before one writes
        return 0 if state is None else int(state["step"])

    def save(self, step: int) -> None:
        """Copy the states as they are now and have them written."""
        if rank() != 0:
            return
        state = {"step": step, "settings": self.settings}
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        self.wait()
        copy = tree_map_only(Tensor, lambda x: x.detach().to("cpu", copy=True), state)
        self.written = self.writer.submit(save_checkpoint, self.folder, step, copy)

    def wait(self) -> None:
        """Wait for the latest checkpoint, or raise its error."""
        if self.written is not None:
            self.written.result()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.writer.shutdown()
        if kind is None:
            self.wait()


class Log:
    """metrics.jsonl and, where asked for, TensorBoard files; what an ended process wrote after step `done` goes."""

    def __init__(self, folder: Path, done: int, *, tensorboard: bool) -> None:
        self.path = folder / "metrics.jsonl"
        self.board: Any = None
        if rank() != 0:
            return
        remove_unfinished(folder)
        if self.path.is_file():
            with named(self.path, "is damaged: remove it, the training does not need it"):
                lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
                kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= done]
            write_atomic(self.path, "".join(kept))
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # an extra that only this setting needs

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        if rank() != 0:
            return
        figures = {name: figure for name, figure in figures.items() if math.isfinite(figure)}  # JSON knows no NaN
        append_line(self.path, json.dumps({"step": step, **figures}))
        if self.board is not None:
            for name, figure in figures.items():
                self.board.add_scalar(name, figure, step)

    def show(self, step: int, pictures: Pictures) -> None:
        """Add pictures, which are made for TensorBoard alone."""
        if self.board is not None:
            for name, picture in pictures().items():
                self.board.add_image(name, picture, step, dataformats="HWC")
            self.board.flush()


def save_model(path: Path, network: nn.Module) -> None:
    """Write a network's weights."""
    if rank() == 0:
        buffer = io.BytesIO()
        torch.save(network.state_dict(), buffer)
        write_atomic(path, buffer.getvalue())


def fingerprint(run: Run, stage: Stage, samples: Samples) -> dict[str, str]:
    """Return every setting that decides what this stage learns, by its name in the config."""
    config, section = run.config, str(stage.section)
    parts = {name: asdict(getattr(config, name)) for name in ("network", section)}
    data = {"classes": run.data.classes, "train": hashlib.sha256(" ".join(samples.stems).encode()).hexdigest()[:16]}
    settings = decisive({"seed": config.seed, "precision": config.precision, "data": data, **parts})
    return {name: str(value) for name, value in settings.items()}


def check_settings(folder: Path, saved: Mapping[str, str], current: Mapping[str, str]) -> None:
    """Refuse to go on from a checkpoint of another setting, and name what differs."""
    names = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
    if names:
        changes = "; ".join(f"{name} was {saved.get(name)}, is {current.get(name)}" for name in names)
        raise ValueError(f"{folder} holds a run begun with other settings: {changes}. Set them back, or remove it.")
