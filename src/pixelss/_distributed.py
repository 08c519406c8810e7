"""The one collective of the library."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def sum_over_processes(x: Tensor) -> Tensor:
    """Return the sum of `x` over all processes, or `x` itself where there is one process.

    Every process must call it, with an empty shard too (a zero `x`). The process group is looked up at each
    call; `x` must lie on a device that the group reduces on (CUDA for nccl) and is left as it is.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total
