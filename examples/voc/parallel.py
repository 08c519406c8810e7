"""One process or many, started by plain `torchrun`: who am I, sums over all, and the share of a list."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")
# A stage of inference meets the other processes at its end alone, and shares take unequal time. A process that dies
# does not make the others wait so long: torchrun ends them.
_TIMEOUT = timedelta(hours=6)


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Join torchrun's process group, where there is one, and yield this process's device."""
    many = "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1
    place = torch.device(device, int(os.environ.get("LOCAL_RANK", 0))) if device == "cuda" else torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if many:
        cuda = place.type == "cuda"
        distributed.init_process_group("nccl" if cuda else "gloo", timeout=_TIMEOUT, device_id=place if cuda else None)
    try:
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
