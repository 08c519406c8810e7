"""Whether a training's losses stay finite, and what is done where one does not."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from parallel import sum_over
from stages import Run, Stage
from torch import Tensor, nn


class Health:
    """Watches a training: a step whose loss or gradient is not finite ends it, or is left out.

    Looking waits for the device, so on CUDA a run that stops looks only where the loop waits anyway; the steps between
    are then told together.

    Args:
        run: its `on_nonfinite_loss` decides.
        stage: for the messages.
        modules: whose buffers a forward pass changes; they go back to what they were where a step is left out.
        done: steps that an earlier start has done.
    """

    def __init__(self, run: Run, stage: Stage, modules: Iterable[nn.Module], done: int) -> None:
        self.run, self.stage, self.healthy = run, stage, done
        self.skips = run.config.on_nonfinite_loss == "skip"
        self.total = torch.zeros((), dtype=torch.float64, device=run.device)  # not finite once a loss was not
        self.buffers = [tensor for module in modules for tensor in module.buffers()] if self.skips else []
        self.kept: list[Tensor] = []

    def before_step(self) -> None:
        """Keep what the forward pass may change."""
        self.kept = [tensor.clone() for tensor in self.buffers]

    def allows(self, value: Tensor, step: int, *, look: bool) -> bool:
        """Tell whether the optimiser may take this step; raises where the training is to stop.

        Args:
            value: not finite where the loss or its gradient is not.
            step: steps done before.
            look: whether the loop waits for the device in this step.
        """
        self.total += value
        if not (look or self.skips or self.run.device.type == "cpu"):
            return True
        finite = bool(sum_over(self.total).isfinite())
        if not finite and not self.skips:
            raise RuntimeError(
                f"The loss or its gradient was not finite in the steps {self.healthy + 1} to {step + 1} of "
                f"{self.stage.name}; the checkpoint before is intact. To go on from it without such steps set "
                f"on_nonfinite_loss: skip; or remove {self.run.folder(self.stage.name)} and begin again with a lower "
                f"{self.stage.section}.optimizer.lr or a clip."
            )
        self.healthy = step + 1
        if not finite:
            self.total.zero_()
            for changed, before in zip(self.buffers, self.kept, strict=True):
                changed.copy_(before)
            warnings.warn(f"step {step + 1} of {self.stage.name} is left out: its loss is not finite", stacklevel=3)
        return finite
