"""How much of what does not fit at once is worked on at a time: little in a CPU's caches, much where launches cost."""

from __future__ import annotations

from torch import Tensor

_CPU, _OTHER = 2**20, 2**24  # 4 and 64 MiB in float32


def launches_cost(x: Tensor) -> bool:
    """Return whether many small operations on the device of `x` take longer than few large ones, as on a GPU."""
    return x.device.type != "cpu"


def entries_at_a_time(x: Tensor) -> int:
    """Return how many numbers of an intermediate result to hold at a time on the device of `x`.

    A CPU is fastest while a piece stays near its caches; a GPU waits for the launches of small pieces.
    """
    return _OTHER if launches_cost(x) else _CPU
