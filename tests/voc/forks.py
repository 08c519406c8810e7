"""Runs in forks of this process: what it has imported and the settings that it has read are there, which takes seconds.

For scripts, not for a process that has trained: torch's backward pass has threads, which a fork lacks.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from tests.voc.runs import load_once  # which sets the path of the examples

import run  # isort: skip


def start(words: tuple[object, ...], said: Path) -> int:
    """Return the id of a process that does what `run.py` does with these words; it says so in the file `said`."""
    arguments = list(map(str, words))
    run.load_config = load_once
    run.parse_args(arguments)  # which the forks know then
    said.unlink(missing_ok=True)  # workers of the last process, which end after it, may still write to the old file
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        torch.set_num_threads(1)  # the order of a sum of floats depends on it
        sys.argv = ["run.py", *arguments]
        run.guarded(run.main)
        sys.stdout.flush()
        code = 0
    except SystemExit as error:
        print(error.code, file=sys.stderr, flush=True)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def wait(child: int, seconds: float | None = None) -> int:
    """Wait for a process; after so many seconds it is killed. Returns how it ended: 0, -SIGKILL or another code."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while deadline is not None and time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    if deadline is not None:
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
