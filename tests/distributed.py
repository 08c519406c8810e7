"""Run a function in several gloo processes on one machine."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.processes import START

TIMEOUT = 120.0  # seconds


def run_processes(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `function(rank, *args)` in `world_size` gloo processes; returns what each returned, by rank.

    `function` is a top-level function of a test module. It returns tensors, numbers and containers of them, or
    None. The first error is raised here, with its traceback; a process that hangs is ended after `TIMEOUT`.
    Rendezvous is by file, without ports.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = mp.start_processes(
            _process, args=(world_size, folder, function, args), nprocs=world_size, join=False, start_method=START
        )
        deadline = time.monotonic() + TIMEOUT
        try:
            while not processes.join(timeout=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__} took more than {TIMEOUT} s in {world_size} processes.")
        except Exception as error:
            # One failure breaks the others' connections: raise the first, not whichever is noticed first.
            if (first := Path(folder, "error")).exists():
                raise RuntimeError(first.read_text()) from error
            raise
        finally:
            for process in processes.processes:
                process.kill()
                process.join()
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(world_size)]


def _process(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=Path(folder, "rendezvous").as_uri(),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT / 2),
    )
    try:
        torch.save(function(rank, *args), Path(folder, f"{rank}.pt"))
    except BaseException:
        with suppress(FileExistsError), Path(folder, "error").open("x") as file:
            file.write(f"rank {rank}: {traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()
