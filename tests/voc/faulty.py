"""Run a script in a process that meets a fault while it writes.

    python faulty.py killed NAME WHOLE SCRIPT ARGUMENTS...
    python faulty.py full NAME WHOLE SCRIPT ARGUMENTS...

Of the files with NAME in their names WHOLE are written. In the middle of the next one the process is killed, or the
disk is full from there on: no file grows beyond `ROOM` bytes, and the system refuses the rest as on a full disk.
"""

from __future__ import annotations

import io
import os
import resource
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

ROOM = 100


class Deadly(io.BufferedWriter):
    """A file whose first write kills the process halfway."""

    def write(self, content: Any) -> int:
        super().write(content[: len(content) // 2])
        self.flush()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("a killed process went on")


def main(fault: str, name: str, whole: str, script: str, *arguments: str) -> None:
    left, really_open = int(whole), Path.open

    def open_file(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        nonlocal left
        if name in path.name and set(mode) & set("wa"):
            left -= 1
            if left < 0 and fault == "killed":
                return Deadly(io.FileIO(path, "w"))
            if left < 0:
                resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return really_open(path, mode, *args, **kwargs)

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # write() beyond the limit then fails, as it does on a full disk
    Path.open = open_file  # type: ignore[method-assign, assignment]
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
