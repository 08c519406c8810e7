"""Shares and means of several processes."""

from __future__ import annotations

import parallel
import pytest
import torch
from parallel import mean_count, process_group, share, shared_mean
from torch.distributed import DistBackendError

from tests.distributed import run_processes


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
    monkeypatch.setattr(parallel.distributed, "init_process_group", lambda *_, **__: None)
    with (
        pytest.raises(RuntimeError, match=r"Another process ended: .* The same command"),
        process_group("cpu"),
    ):
        raise error
    with pytest.raises(RuntimeError, match=r"^of this one$"), process_group("cpu"):
        raise RuntimeError("of this one")
