"""The frozen layers that student and teacher begin with: on a CPU they run once for both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

Forward = Callable[[Tensor], Tensor]


class Pass(NamedTuple):
    """What a layer of the student was given and returned, and how often each had been written to."""

    given: Tensor
    returned: Tensor
    versions: tuple[int, int]


Seen = dict[tuple[str, torch.Size], Pass]  # by the layer's name and its input's size


def share_frozen_layers(student: nn.Module, teacher: nn.Module) -> Seen:
    """Let the teacher take what the student's frozen first layers returned, where it sees the same images.

    They are the layers whose output asks for no gradient while the student trains. Their numbers are the teacher's
    too, to the bit: it is an average of equal weights. A layer of the teacher compares its input with the student's,
    which costs a hundredth of a step on a CPU and would make a GPU wait; what was written to since is not taken.

    Args:
        student: as it trains, passes first, under the teacher's autocast; the forward of its frozen layers is replaced.
        teacher: its copy, the same there.

    Returns:
        What the student's layers keep, until the teacher takes it or the student's next pass of that size.
    """
    seen: Seen = {}
    twins = dict(teacher.named_modules())
    for name, layer in frozen_layers(student):
        twin = twins[name]
        for own, other in zip(layer.state_dict().values(), twin.state_dict().values(), strict=True):
            if not torch.equal(own, other):
                raise ValueError(
                    f"teacher must be a copy of student, but differs from it in {name}. Was the checkpoint made with "
                    "other frozen layers? Train into a new folder."
                )
        layer.forward = partial(_keep, seen, name, layer.forward)
        twin.forward = partial(_take, seen, name, twin.forward)
    return seen


def frozen_layers(network: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the largest modules that training leaves as they are and that return the same each time, by name."""
    for name, child in network.named_children():
        weights = list(child.parameters())
        changing = (module for module in child.modules() if isinstance(module, (_BatchNorm, _DropoutNd)))
        if weights and not any(w.requires_grad for w in weights) and not any(m.training for m in changing):
            yield prefix + name, child
        else:
            yield from frozen_layers(child, f"{prefix}{name}.")


def _keep(seen: Seen, name: str, forward: Forward, x: Tensor) -> Tensor:
    out = forward(x)
    if torch.is_grad_enabled() and not out.requires_grad:
        seen[name, x.shape] = Pass(x, out, (x._version, out._version))
    return out


def _take(seen: Seen, name: str, forward: Forward, x: Tensor) -> Tensor:
    before = seen.pop((name, x.shape), None)
    if before is None or before.versions != (before.given._version, before.returned._version):
        return forward(x)  # an activation in place wrote to it
    return before.returned.clone() if torch.equal(before.given, x) else forward(x)
