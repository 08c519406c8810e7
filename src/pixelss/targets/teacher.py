"""The mean teacher (SupportNet): an exponential moving average of the student that makes its targets."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from pixelss._checks import check_number

if TYPE_CHECKING:
    from typing_extensions import Self


class EMATeacher(nn.Module):
    """A copy of the student whose tensors follow it: theta_G <- alpha * theta_G + (1 - alpha) * theta_F.

    Call `update` after each optimiser step. Floating parameters and buffers are averaged, others copied, in
    place, and paired by name; a tied tensor is averaged once. The wrappers of DistributedDataParallel,
    DataParallel and torch.compile are looked through anywhere in the student, and the copy has none. The
    teacher stays in eval mode whatever `train` is called on it or on a parent, and takes no gradient.

    Keep the teacher in float32: in half precision a step of (1 - alpha) is lost to rounding. A half-precision
    student is cast at each update, so `EMATeacher(student).float()` follows it.

    Args:
        student: the network to average (MainNet F); the teacher starts as its copy, `module`.
        momentum: alpha in [0, 1]; 0 copies the student, the weight sharing of Table 2, and 1 keeps the teacher.

    Shape:
        `forward` takes and returns what the student does.

    Raises:
        TypeError: `student` is no module, `momentum` no number.
        ValueError: `momentum` is out of range.

    Reference:
        Yoon 2021, "Exploring Pixel-level Self-supervision", the SupportNet;
        after Tarvainen 2017, "Mean teachers are better role models".

    Example:
        >>> student = nn.Linear(1, 1, bias=False)
        >>> teacher = EMATeacher(nn.Sequential(student), momentum=0.75)
        >>> before = teacher.module[0].weight.clone()
        >>> with torch.no_grad():
        ...     _ = student.weight.add_(1)
        >>> teacher.update(nn.Sequential(student))
        >>> round((teacher.module[0].weight - before).item(), 4)
        0.25
    """

    def __init__(self, student: nn.Module, momentum: float = 0.997) -> None:
        super().__init__()
        _check_student(student)
        check_number("momentum", momentum, low=0, high=1)
        self.momentum = momentum
        self.module: nn.Module = _plain_copy(student, {}).requires_grad_(False)
        self.eval()

    def update(self, student: nn.Module, *, momentum: float | None = None) -> None:
        """Move every tensor towards the student's; nothing changes where an error is raised.

        Args:
            student: the network the teacher was built from, under any wrapper.
            momentum: alpha of this call, as for a warm-up; None stands for the setting.

        Raises:
            TypeError: `student` is no module, `momentum` no number.
            ValueError: `momentum` is out of range; a tensor of either side has no partner of its name, shape
                and device.
        """
        _check_student(student)
        alpha = self.momentum if momentum is None else momentum
        check_number("momentum", alpha, low=0, high=1)
        with torch.no_grad():
            pairs = _pairs(dict(_named_tensors(student)), dict(_named_tensors(self.module)))
            averaged = [(theirs.to(ours.dtype), ours) for theirs, ours in pairs if ours.is_floating_point()]
            for theirs, ours in pairs:
                if alpha == 0 or not ours.is_floating_point():
                    ours.copy_(theirs)
            if averaged and 0 < alpha < 1:  # 1 keeps the teacher, from a student that is not finite too
                # One kernel for all tensors: hundreds of launches cost more than the arithmetic on a GPU.
                torch._foreach_lerp_([ours for _, ours in averaged], [theirs for theirs, _ in averaged], 1 - alpha)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged network, without gradient."""
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever `mode` is."""
        return super().train(False)

    def extra_repr(self) -> str:
        """Describe the settings in the module's repr."""
        return f"momentum={self.momentum}"


def _check_student(student: nn.Module) -> None:
    if not isinstance(student, nn.Module):
        raise TypeError(f"student must be a torch.nn.Module, but is a {type(student).__name__}.")


def _unwrap(module: nn.Module) -> nn.Module:
    """Return what the wrappers around `module` hold, or `module` itself."""
    while True:
        if isinstance(module, (DataParallel, DistributedDataParallel)):
            module = module.module
        elif isinstance(compiled := module._modules.get("_orig_mod"), nn.Module):  # torch.compile's only child
            module = compiled
        else:
            return module


def _plain_copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a deep copy of `module` in which the content of every wrapper stands in the wrapper's place."""
    for child in module.children():
        _plain_copy(child, memo)
    memo[id(module)] = plain = copy.deepcopy(_unwrap(module), memo)
    return plain


def _named_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer under each of its names, as if there were no wrapper."""
    module = _unwrap(module)
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield prefix + name, tensor
    for name, child in module._modules.items():
        if child is not None:
            yield from _named_tensors(child, f"{prefix}{name}.")


def _pairs(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return (student's, teacher's) tensor of every name, each of the teacher's tensors once."""
    if student.keys() != teacher.keys():
        lacking = {"student": sorted(teacher.keys() - student), "teacher": sorted(student.keys() - teacher)}
        facts = " and ".join(f"the {side} lacks {names[:3]} ({len(names)})" for side, names in lacking.items())
        raise ValueError(f"student must have the teacher's tensors, but {facts}. Build the teacher from this student.")
    for name, ours in teacher.items():
        theirs = student[name]
        if theirs.shape != ours.shape:
            raise ValueError(
                f"student's {name} must have the teacher's shape {tuple(ours.shape)}, but has shape "
                f"{tuple(theirs.shape)}. Build the teacher from this student."
            )
        if theirs.device != ours.device:
            raise ValueError(
                f"student's {name} must lie on the teacher's device {ours.device}, but lies on {theirs.device}. "
                f"Call teacher.to({str(theirs.device)!r})."
            )
    return list({id(ours): (student[name], ours) for name, ours in teacher.items()}.values())
