"""Processes that begin with torch imported, which takes seconds: forks of one server, where the system has such.

The server imports modules and does nothing else, so that its forks lack no threads.
"""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import torch.multiprocessing as mp

START = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
if START == "forkserver":  # what test files and examples import, and torch itself with its first optimizer
    mp.set_forkserver_preload(
        [
            *("hypothesis", "jsonargparse", "matplotlib.pyplot", "PIL.Image", "pytest"),
            *("tests.oracles", "tests.strategies", "timm", "torch._dynamo", "tqdm", "yaml"),
        ]
    )
ROOT = Path(__file__).parent.parent
OURS = [ROOT / name for name in ("benchmarks", "docs", "examples", "tests")]


def free_port() -> int:
    with socket.socket() as waiting:
        waiting.bind(("127.0.0.1", 0))
        return int(waiting.getsockname()[1])


def run_script(*words: object, environment: Mapping[str, str] = {}) -> subprocess.CompletedProcess[str]:
    """Run a script with its arguments as `python SCRIPT ARGUMENTS...` does, with the same path of modules."""
    command = [str(word) for word in words]
    if START == "spawn":
        own = {**os.environ, **environment}
        return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=own)
    pipes = [mp.Pipe(duplex=False) for _ in range(2)]
    process = mp.get_context(START).Process(target=_script, args=(command, environment, *(end for _, end in pipes)))
    process.start()
    for _, end in pipes:
        end.close()
    try:
        with ThreadPoolExecutor() as pool:
            said = list(pool.map(_read, (end for end, _ in pipes)))
        process.join()
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.exitcode, *said)


def _read(end: Connection) -> str:
    with end, open(end.fileno(), closefd=False) as file:
        return file.read()


def _script(words: list[str], environment: Mapping[str, str], *ends: Connection) -> None:
    os.environ.update(environment)
    for number, end in enumerate(ends, 1):
        os.dup2(end.fileno(), number)
        end.close()
    others = [path for path in sys.path if Path(path) != ROOT and not any(map(Path(path).is_relative_to, OURS))]
    sys.path[:] = [str(Path(words[0]).parent), *others]
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
