"""Random draws that a generator repeats, wherever it lies."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(*shape: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return draws from [0, 1), float32, on the device of `like`.

    They are drawn on the generator's own device, without waiting: one on the CPU gives the same draws for all devices.
    """
    check_generator(generator)
    if generator is None:  # a call of its own: torch.compile knows no sizes that vary where a generator is given
        return torch.rand(shape, device=like.device, dtype=torch.float32)
    draws = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float32)
    return draws.to(like.device, non_blocking=True)


def check_generator(generator: object) -> None:
    """Raise unless `generator` is one of torch's or None."""
    if not isinstance(generator, torch.Generator | None):
        was = type(generator).__name__
        raise TypeError(
            f"generator must be a torch.Generator or None, but is of type {was}. Pass torch.Generator().manual_seed(0)."
        )
