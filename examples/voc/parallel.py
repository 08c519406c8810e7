"""One process or many, started by plain `torchrun`: who am I, sums over all, and the share of a list."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # documented, not in __all__

T = TypeVar("T")
# A stage of inference meets the other processes at its end alone, and shares take unequal time. A process that dies
# does not make the others wait so long: torchrun ends them, and without it they see its connection end.
_TIMEOUT = timedelta(hours=6)
_MEETING = 600.0  # seconds for all processes to come; schedulers start them one by one
_SILENCE = 30.0  # seconds after which a process that had come, and waits as the others do, has ended


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Join torchrun's process group, where there is one, and yield this process's device."""
    many = "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1
    place = torch.device(device, int(os.environ.get("LOCAL_RANK", 0))) if device == "cuda" else torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    try:
        if many:
            _join(place)
        yield place
    except RuntimeError as error:
        if many and (isinstance(error, distributed.DistError) or "gloo" in str(error)):
            raise RuntimeError(
                "Another process ended: its message says why, or the system's log if it was killed. The same command "
                f"continues where they were. ({error})"
            ) from error
        raise
    if many:  # not after an error: it may wait for the other processes, which wait for this one
        distributed.destroy_process_group()


def _join(place: torch.device) -> None:
    """Join the process group that the environment names, once all of it have come."""
    if absent := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ValueError(f"{' and '.join(absent)} must be set where WORLD_SIZE is, as torchrun does.")
    me, many = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # holds the store that process 0 holds else
    if me or torchrun:
        find(address, port, limit=_MEETING, silence=_SILENCE)
    try:
        held = TCPStore(address, port, many, me == 0 and not torchrun, wait_for_workers=False)
    except distributed.DistError as error:
        if me or torchrun:
            raise
        raise RuntimeError(f"Process 0 cannot listen at MASTER_PORT {port}: choose another one. ({error})") from error
    store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), held)
    meet(store, me, many, limit=_MEETING, silence=_SILENCE)
    kind, cuda = ("nccl", place) if place.type == "cuda" else ("gloo", None)
    # All are there: connecting takes no time, unless one has ended in this very moment.
    soon = cuda is None and hasattr(distributed, "set_timeout")  # which torch 2.4 has not
    timeout = timedelta(seconds=_SILENCE) if soon else _TIMEOUT
    distributed.init_process_group(kind, store=store, rank=me, world_size=many, timeout=timeout, device_id=cuda)
    if soon:
        distributed.set_timeout(_TIMEOUT)


def find(address: str, port: int, *, limit: float, silence: float) -> None:
    """Wait until process 0 listens, quietly: TCPStore prints a stack at every try that fails.

    Raises:
        RuntimeError: nobody listens within `limit` seconds; after every `silence` seconds a line says who is awaited.
    """
    begun = told = time.monotonic()
    while True:
        try:
            with socket.create_connection((address, port), timeout=min(silence, limit)):
                return
        except OSError as error:
            now, why = time.monotonic(), str(error)
            if now - begun > limit:
                raise RuntimeError(
                    f"Process 0 did not come within {limit:.0f} seconds: nobody listens at MASTER_ADDR {address}, "
                    f"MASTER_PORT {port}. If it ended, its message says why. ({why})"
                ) from error
        if now - told > silence:
            print(f"Still to come: process 0, at {address}:{port}. ({why})", file=sys.stderr, flush=True)
            told = now
        time.sleep(0.2)


def meet(store: Store, me: int, many: int, *, limit: float, silence: float) -> None:
    """Wait until `many` processes have come, which say again and again that they are alive.

    Raises:
        RuntimeError: some did not come within `limit` seconds, or came and said nothing for `silence` seconds.
    """
    begun = told = time.monotonic()
    heard: dict[int, tuple[int, float]] = {}  # what each said, and when it was new
    while True:
        now = time.monotonic()
        store.add(f"alive/{me}", 1)
        said = {other: store.add(f"alive/{other}", 0) for other in range(many)}
        absent = [other for other in said if said[other] == 0]
        if not absent:  # a process that came may have ended before the last one came: all say once more that they go on
            store.add(f"ready/{me}", 1)
        waiting = [other for other in said if not store.add(f"ready/{other}", 0)]  # those ready may be gone already
        if not waiting:
            return
        heard |= {other: (said[other], now) for other in said if said[other] != heard.get(other, (0, now))[0]}
        if silent := [other for other in waiting if other in heard and now - heard[other][1] > silence]:
            raise RuntimeError(
                f"{_processes(silent)} ended before all had come: its message says why, or the system's log if it was "
                "killed."
            )
        if absent and now - begun > limit:
            raise RuntimeError(
                f"{_processes(absent)} of {many} did not come within {limit:.0f} seconds: all need the same WORLD_SIZE "
                "and each a RANK of its own. If one ended, its message says why."
            )
        if absent and now - told > silence:
            print(f"Still to come, of {many}: {_processes(absent).lower()}.", file=sys.stderr, flush=True)
            told = now
        time.sleep(0.2)


def _processes(ranks: Sequence[int]) -> str:
    return f"{'Process' if len(ranks) == 1 else 'Processes'} {', '.join(map(str, ranks))}"


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def share(items: Sequence[T]) -> Sequence[T]:
    """Return this process's part of a list: every world_size-th item; shares may be uneven or empty."""
    return items[rank() :: world_size()]


def sum_over(value: Tensor) -> Tensor:
    """Return the processes' sum of a value."""
    total = value.clone()
    if distributed.is_initialized():
        distributed.all_reduce(total)
    return total


def mean_count(count: Tensor) -> Tensor:
    """Return the processes' mean of a count, at least 1e-12: what a sum is divided by before DDP averages gradients."""
    return (sum_over(count.detach().double()) / world_size()).clamp(min=1e-12)


def shared_mean(mean: Tensor, count: Tensor) -> Tensor:
    """Weigh this process's mean over `count` items so that DDP's average is the mean over all processes' items."""
    return mean * (count / mean_count(count))


def averaged(values: dict[str, Tensor]) -> dict[str, float]:
    """Return the processes' mean of every value; this waits for the device."""
    total = sum_over(torch.stack([value.detach().double() for value in values.values()]))
    return dict(zip(values, (total / world_size()).tolist(), strict=True))


def barrier() -> None:
    if distributed.is_initialized():
        distributed.barrier()
