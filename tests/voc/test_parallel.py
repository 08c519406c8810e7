"""Shares and means of several processes."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import parallel
import pytest
import torch
from parallel import find, mean_count, meet, process_group, share, shared_mean
from torch.distributed import DistBackendError, HashStore

from tests.distributed import run_processes
from tests.processes import free_port


def shares(rank: int) -> list[object]:
    count = torch.tensor([3.0, 0.0])[rank]
    mean = torch.tensor([2.0, 0.0])[rank]
    return [list(share(range(5))), mean_count(count), shared_mean(mean, count), shared_mean(mean, 0 * count)]


def test_shares_and_means_of_two_processes():
    first, second = run_processes(shares, 2)
    assert first[0] == [0, 2, 4]
    assert second[0] == [1, 3]
    assert first[1] == second[1] == 1.5
    assert (first[2] + second[2]) / 2 == 2
    assert first[3] == second[3] == 0


@pytest.mark.parametrize(
    "error", [RuntimeError("[/gloo/transport/tcp/pair.cc:561] Connection closed by peer"), DistBackendError("NCCL")]
)
def test_the_end_of_another_process_is_told(monkeypatch, error):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(parallel, "_join", lambda _: None)
    with (
        pytest.raises(RuntimeError, match=r"Another process ended: .* The same command"),
        process_group("cpu"),
    ):
        raise error
    with pytest.raises(RuntimeError, match=r"^of this one$"), process_group("cpu"):
        raise RuntimeError("of this one")


@pytest.fixture
def others():
    """Threads in the place of other processes."""
    with ThreadPoolExecutor() as pool:
        yield pool


def test_processes_that_start_apart_meet(others):
    store = HashStore()
    first = others.submit(meet, store, 0, 3, limit=60, silence=60)
    time.sleep(0.3)
    second = others.submit(meet, store, 2, 3, limit=60, silence=60)
    time.sleep(0.3)
    assert not first.done()
    assert not second.done()
    meet(store, 1, 3, limit=60, silence=60)
    first.result(30)
    second.result(30)


def test_a_process_that_does_not_come_is_named(others, capsys):
    store = HashStore()
    there = others.submit(meet, store, 2, 4, limit=2, silence=60)
    with pytest.raises(RuntimeError, match=r"^Processes 0, 3 of 4 did not come within 1 seconds: all need .* RANK"):
        meet(store, 1, 4, limit=1, silence=0.5)
    assert capsys.readouterr().err == "Still to come, of 4: processes 0, 3.\n"
    with pytest.raises(RuntimeError, match=r"^Processes 0, 3 of 4 did not come within 2 seconds"):
        there.result(30)


@pytest.mark.parametrize("last", ["comes", "does not come"])
def test_a_process_that_ends_while_the_others_come_is_named(last, others):
    store = HashStore()
    store.add("alive/1", 7)  # says no more
    there = others.submit(meet, store, 2, 3, limit=60, silence=2) if last == "comes" else None
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^Process 1 ended before all had come"):
        meet(store, 0, 3, limit=60, silence=1)
    assert time.monotonic() - begun < 30
    if there:
        with pytest.raises(RuntimeError, match=r"1 ended before all had come"):
            there.result(30)


def test_process_0_is_waited_for(capsys):
    with pytest.raises(RuntimeError, match=r"^Process 0 did not come within 1 seconds: nobody listens at "):
        find("127.0.0.1", free_port(), limit=1, silence=0.5)
    assert "Still to come: process 0, at 127.0.0.1:" in capsys.readouterr().err


def test_a_place_in_the_group_is_named_in_full(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ValueError, match=r"^MASTER_ADDR and MASTER_PORT must be set"), process_group("cpu"):
        pass
