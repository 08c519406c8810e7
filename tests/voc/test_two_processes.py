"""One of two processes is killed: the other ends soon, with a message, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from parallel import find
from torch.distributed import TCPStore

from tests.processes import free_port
from tests.voc.runs import VOC, unfinished

pytestmark = [pytest.mark.slow, pytest.mark.processes]
LONG = ("--cam.schedule.iterations", 100_000)


def alone(words: list[str], *, port: int | None = None, world_size: int = 2) -> list[subprocess.Popen[str]]:
    """Start two processes that nobody watches over, as some schedulers do."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port()), "WORLD_SIZE": str(world_size)}
    return [
        subprocess.Popen(
            [sys.executable, *words],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]


def under_torchrun(words: list[str]) -> subprocess.Popen[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    return subprocess.Popen([*start, *words], stderr=subprocess.PIPE, text=True)


def process_of(rank: int, parent: int) -> int:
    """Return the id of torchrun's process of this rank."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"torchrun {parent} has no process of rank {rank}")


def wait_for(folder: Path, pattern: str, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 600  # where other work runs too
    while not any(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"{folder / pattern} did not come"
        assert_all_run(processes)
        time.sleep(0.05)


def assert_all_run(processes: list[subprocess.Popen[str]]) -> None:
    assert all(process.poll() is None for process in processes), [p.communicate()[1] for p in processes]


def said_when_killed(processes: list[subprocess.Popen[str]], killed: int, wait: Callable[[], None]) -> str:
    """Kill one of two processes after a wait; return the message with which the other one ends within a minute."""
    other = processes[1 - killed]
    try:
        wait()
        processes[killed].send_signal(signal.SIGKILL)
        _, message = other.communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert other.returncode == 1
    assert "Traceback" not in message
    return message


@pytest.fixture
def words(tmp_path: Path, tiny: Path) -> list[str]:
    files = ("--config", VOC / "demo.yaml", "--config", tiny)
    return list(map(str, (VOC / "run.py", "--data", "demo", "--out", tmp_path / "out", *files)))


@pytest.mark.parametrize(
    ("pattern", "settings"),
    [("train_cam/metrics.jsonl", LONG), ("infer_cam/*.png", ()), ("make_labels/*.png", ())],
)
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_whose_other_one_is_killed_says_so(
    tmp_path: Path, words: list[str], pattern: str, settings: tuple[object, ...], killed: int
) -> None:
    processes = alone([*words, *map(str, settings)])
    message = said_when_killed(processes, killed, lambda: wait_for(tmp_path / "out", pattern, processes))
    assert "Another process ended" in message, message[-2000:]


@pytest.mark.parametrize("killed", [0, 1])
def test_so_does_one_that_waits_for_a_third(words: list[str], killed: int) -> None:
    processes = alone(words, port=(port := free_port()), world_size=3)

    def both_came() -> None:
        find("127.0.0.1", port, limit=300, silence=300)
        store = TCPStore("127.0.0.1", port, timeout=timedelta(seconds=300))
        while not all(store.add(f"0/alive/{rank}", 0) for rank in range(2)):
            assert_all_run(processes)
            time.sleep(0.05)

    message = said_when_killed(processes, killed, both_came)
    assert ("Process 1 ended before" if killed else "Another process ended") in message, message[-2000:]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("killed", [0, 1])
def test_torchrun_ends_the_other_process_and_the_same_command_goes_on(
    tmp_path: Path, words: list[str], killed: int
) -> None:
    torchrun = under_torchrun(words)
    try:
        wait_for(tmp_path / "out", "infer_cam/*.png", [torchrun])
        os.kill(process_of(killed, torchrun.pid), signal.SIGKILL)
        _, message = torchrun.communicate(timeout=60)
    finally:
        torchrun.kill()
        torchrun.communicate()
    assert torchrun.returncode == 1
    assert "SIGKILL" in message
    again = under_torchrun([*words, "--stages", "train_cam,infer_cam"])
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert not unfinished(tmp_path / "out")
