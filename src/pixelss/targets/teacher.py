"""The mean teacher (SupportNet): an exponential moving average of the student that makes its targets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pixelss._checks import check_number
from pixelss._copies import named_tensors, plain_copy

if TYPE_CHECKING:
    from typing_extensions import Self


class EMATeacher(nn.Module):
    """A copy of the student whose tensors follow it: theta_G <- alpha * theta_G + (1 - alpha) * theta_F.

    Call `update` after each optimiser step. Floating parameters and buffers are averaged, others copied, in
    place, and paired by name; a tied tensor is averaged once. The wrappers of DistributedDataParallel,
    DataParallel and torch.compile are looked through anywhere in the student, and the copy has none. Its hooks and
    closures hold the copy's parts where the student's hold the student's. The teacher stays in eval mode whatever
    `train` is called on it or on a parent, and takes no gradient.

    What the targets lag behind is a distance, lr / (1 - SGD's momentum) / (1 - alpha): 3.3 in the paper. Keep it there:
    alpha = 1 - lr / (1 - SGD's momentum) / 3.3. In our trainings lags up to 6.7 were sound, 15 and 17 were not.

    With FSDP2 or tensor parallelism build the teacher from the whole student, then shard `teacher.module` alike: each
    process then averages its own shards.

    Keep the teacher in float32: in half precision a step of (1 - alpha) is lost to rounding. A half-precision
    student is cast at each update, so `EMATeacher(student).float()` follows it.

    Args:
        student: the network to average (MainNet F); the teacher starts as its copy, `module`.
        momentum: alpha in [0, 1]; 0 copies the student, the weight sharing of Table 2, and 1 keeps the teacher.

    Shape:
        `forward` takes and returns what the student does.

    Raises:
        TypeError: `student` is no module, or holds a scripted one; `momentum` is no number.
        ValueError: `momentum` is out of range; the student is sharded already.

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
        if sharded := [name for name, tensor in named_tensors(student) if _is_sharded(tensor)]:
            raise ValueError(
                f"student must be whole when the teacher copies it, but {sharded[0]} is sharded. "
                "Build the teacher first, then shard student and teacher.module with the same mesh and plan."
            )
        self.momentum = momentum
        self.module: nn.Module = plain_copy(student).requires_grad_(False)
        self.train()

    def update(self, student: nn.Module, *, momentum: float | None = None) -> None:
        """Move every tensor towards the student's; nothing changes where an error is raised.

        Args:
            student: the network the teacher was built from, under any wrapper.
            momentum: alpha of this call, as for a warm-up; None stands for the setting.

        Raises:
            TypeError: as the constructor.
            ValueError: `momentum` is out of range; a tensor of either side has no partner of its name, shape,
                device and sharding; the teacher was cast to a dtype that cannot be averaged.
        """
        _check_student(student)
        alpha = self.momentum if momentum is None else momentum
        check_number("momentum", alpha, low=0, high=1)
        with torch.no_grad():
            for network in (student, self.module):
                _reshard(network)
            pairs = _pairs(dict(named_tensors(student)), dict(named_tensors(self.module)))
            averaged = [(theirs.to(ours.dtype), ours) for theirs, ours in pairs if ours.is_floating_point()]
            if averaged and 0 < alpha < 1:  # 1 keeps the teacher, from a student that is not finite too
                # One kernel for all tensors: hundreds of launches cost more than the arithmetic on a GPU.
                torch._foreach_lerp_([ours for _, ours in averaged], [theirs for theirs, _ in averaged], 1 - alpha)
            for theirs, ours in pairs:
                if alpha == 0 or not ours.is_floating_point():
                    ours.copy_(theirs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged network, without gradient."""
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever `mode` is and whatever a `train` of the student's own would do."""
        for module in self.modules():
            module.training = False
        return self

    def extra_repr(self) -> str:
        """Describe the settings in the module's repr."""
        return f"momentum={self.momentum}"


_AVERAGED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_student(student: nn.Module) -> None:
    if not isinstance(student, nn.Module):
        raise TypeError(f"student must be a torch.nn.Module, but is a {type(student).__name__}.")
    for name, module in student.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"student must be made of plain modules, but {name or 'the student itself'} is scripted or traced. "
                "Build the teacher from the plain network; torch.compile may wrap either."
            )


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")  # a DTensor: of FSDP2, or of tensor parallelism


def _reshard(network: nn.Module) -> None:
    """Let FSDP2 give back what a forward pass gathered: both sides then hold their shards."""
    for module in network.modules():
        if callable(reshard := getattr(module, "reshard", None)):
            reshard()


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
            move = f"Call teacher.to({str(theirs.device)!r})."
            empty = "Build the teacher when the student has values: after to_empty, then initialised or loaded."
            raise ValueError(
                f"student's {name} must lie on the teacher's device {ours.device}, but lies on {theirs.device}. "
                f"{empty if 'meta' in (ours.device.type, theirs.device.type) else move}"
            )
        if _sharding(theirs) != _sharding(ours):
            raise ValueError(
                f"student's {name} must be sharded as the teacher's, {_sharding(ours)}, but is {_sharding(theirs)}. "
                "Build the teacher first, then shard student and teacher.module with the same mesh and plan."
            )
        if ours.is_floating_point() and ours.dtype not in _AVERAGED:
            raise ValueError(
                f"teacher's {name} must be of a dtype that can be averaged, but is {ours.dtype}. Call teacher.float()."
            )
    unique = {id(ours): (student[name], ours) for name, ours in teacher.items()}
    return [(_local(theirs), _local(ours)) for theirs, ours in unique.values()]


def _sharding(tensor: Any) -> str:
    """Return how a tensor is spread over processes, in words that can be compared."""
    return f"{tensor.placements} on {tensor.device_mesh}" if _is_sharded(tensor) else "whole"


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if _is_sharded(tensor) else tensor
    return local
