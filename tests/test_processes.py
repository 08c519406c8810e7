"""A script in a fork ends and speaks as one in an interpreter of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, run_script


@pytest.mark.processes
@pytest.mark.parametrize(
    "ends",
    ["", "sys.exit(3)", "sys.exit('told')", "raise ValueError('wrong')", "os.kill(os.getpid(), 9)", "import run"],
)
def test_a_script_ends_as_in_its_own_interpreter(tmp_path: Path, ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples" / "voc")  # what other tests find there, a script must not
    path = tmp_path / "script.py"
    path.write_text(
        f"import os, sys\nprint(sys.argv[1:], __name__, sys.path[0], flush=True)\nsys.stderr.write('x\\n')\n{ends}\n"
    )
    ours = run_script(path, "a b", 3)
    own = subprocess.run([sys.executable, str(path), "a b", "3"], capture_output=True, text=True)
    assert (ours.returncode, ours.stdout) == (own.returncode, own.stdout)
    assert ours.stderr.splitlines()[-1] == own.stderr.splitlines()[-1]
    assert ours.returncode in (0, 1, 3, -signal.SIGKILL)
