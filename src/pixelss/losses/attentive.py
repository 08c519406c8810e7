"""Multi-scale attentive loss (Yoon Eq. 6, Yoon Eq. 7, Yoon Eq. 8): the student's scales learn from the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import einsum
from torch import Tensor, nn
from torch.nn.functional import normalize

from pixelss._checks import TAGS_HINT, check_choice, check_maps, check_tensor
from pixelss._dtype import activation, full_precision, promote
from pixelss._pieces import entries_at_a_time


def scale_dissimilarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Return xi of Yoon Eq. 6, one minus the cosine plus one: how far a teacher's scale is from a student's.

    xi_ij = 2 - cos(A_i^F, A_j^G) over the pixels: in [1, 2] for non-negative CAMs, 2 where a map is all zeros.

    Args:
        student: the student's normalised CAMs of the P present pairs at S scales.
        teacher: the teacher's at R scales.

    Shape:
        (S, P, H, W), (R, P, H, W) -> (P, S, R); float32 for half-precision input.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device.

    Reference:
        Yoon 2021, "Exploring Pixel-level Self-supervision", Eq. 6.

    Example:
        >>> cam = torch.rand(3, 5, 8, 8)
        >>> torch.allclose(scale_dissimilarity(cam, cam).diagonal(dim1=1, dim2=2), torch.ones(5, 3))
        True
    """
    dtype = _check_pairs(student, teacher)
    with full_precision(student):
        s, r = (normalize(cam.to(dtype).flatten(2), dim=-1).transpose(0, 1) for cam in (student, teacher))
        return 2 - s @ r.mT  # (P, S, HW) (P, HW, R)


@torch.no_grad()
def attentive_target(student: Tensor, teacher: Tensor, *, attentive: bool = True) -> Tensor:
    """Return the target of Yoon Eq. 7 for every student scale: 1/R sum_j xi_ij A_j^G, without gradient.

    Args:
        student: the student's normalised CAMs of the P present pairs at S scales.
        teacher: the teacher's at R scales.
        attentive: False sets xi = 1, the plain mean of the teacher's CAMs (MMM of Table 1).

    Shape:
        (S, P, H, W), (R, P, H, W) -> (S, P, H, W) in [0, 2]; not clamped, as printed.

    Raises:
        TypeError, ValueError: as `scale_dissimilarity`.

    Reference:
        Yoon 2021, "Exploring Pixel-level Self-supervision", Eq. 7.

    Example:
        >>> teacher = torch.tensor([0.2, 0.4]).reshape(2, 1, 1, 1)
        >>> attentive_target(torch.ones(1, 1, 1, 1), teacher, attentive=False).flatten()
        tensor([0.3000])
    """
    check_choice("attentive", attentive, (True, False))
    dtype = _check_pairs(student, teacher)
    if not attentive:
        return teacher.to(dtype).mean(0).expand(student.shape)
    xi = scale_dissimilarity(student, teacher)
    with full_precision(student):
        return einsum(xi, teacher.to(dtype), "p s r, r p h w -> s p h w") / len(teacher)


def _check_pairs(student: Tensor, teacher: Tensor) -> torch.dtype:
    """Check the CAMs of pairs at the student's and the teacher's scales; returns the dtype to compute in."""
    _, P, H, W = check_tensor("student", student, "SPHW")
    check_tensor("teacher", teacher, "RPHW", like=student, P=P, H=H, W=W)
    return torch.promote_types(promote(student).dtype, promote(teacher).dtype)


def multi_scale_attentive_loss(
    student_cams: Sequence[Tensor],
    teacher_cams: Sequence[Tensor],
    tags: Tensor,
    *,
    attentive: bool = True,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Return Yoon Eq. 8: the L1 distance of the student's CAMs to their `attentive_target`, summed over its scales.

    Only the present (image, class) pairs take part, but for the CAMs' gradient, which is dense. They are gathered
    once, which waits for the device unless `tags` lie on the CPU. The target carries no gradient. Table 1's
    ablations are settings: MAM as it is; MMM with `attentive=False`; SMM with one student scale besides.

    Args:
        student_cams: normalised CAMs, one tensor a student scale, all of one size.
        teacher_cams: the teacher's, one a teacher scale; a non-finite value counts as no activation.
        tags: image-level labels, multi-hot of any dtype, on the CAMs' device or on the CPU: present where > 0, so of
            probabilities pass tags > 0.5.
        attentive: False weighs every teacher scale alike.
        reduction: "mean" over (present pair, pixel), or "sum" (as printed).

    Shape:
        S and R tensors (B, N, H, W), (B, N) -> scalar; zero on the graph where no pair is present.

    Raises:
        TypeError, ValueError: empty sequences, arguments of another rank, size, dtype kind or device.

    Reference:
        Yoon 2021, "Exploring Pixel-level Self-supervision", Eq. 8.

    Example:
        >>> student = [torch.rand(2, 3, 8, 8, requires_grad=True) for _ in range(3)]
        >>> teacher = [torch.rand(2, 3, 8, 8) for _ in range(3)]
        >>> loss = multi_scale_attentive_loss(student, teacher, torch.tensor([[1, 0, 0], [0, 1, 1]]))
        >>> loss.backward()
        >>> student[0].grad.abs().amax((-2, -1)) > 0
        tensor([[ True, False, False],
                [False,  True,  True]])
    """
    _check_settings(attentive, reduction)
    B, N, H, W = check_maps("student_cams", student_cams, "BNHW", shared="BNHW")
    first = student_cams[0]
    check_maps("teacher_cams", teacher_cams, "BNHW", shared="BNHW", like=first, B=B, N=N, H=H, W=W)
    on_cpu = isinstance(tags, Tensor) and tags.device.type == "cpu"
    check_tensor("tags", tags, "BN", kind="any", like=None if on_cpu else first, hint=TAGS_HINT, B=B, N=N)
    image, k = (tags > 0).nonzero().to(first.device, non_blocking=True).unbind(1)  # (P,) each
    teacher = [cam.detach() for cam in teacher_cams]
    total: Tensor = _Distance.apply(attentive, image, k, teacher, *student_cams)
    return total if reduction == "sum" else total / max(1, len(image) * H * W)


class _Distance(torch.autograd.Function):
    """The sum of distances to the targets, some pairs at a time; a sign, one byte, is all that waits for a gradient."""

    @staticmethod
    def forward(ctx: Any, attentive: bool, image: Tensor, k: Tensor, teacher: list[Tensor], *student: Tensor) -> Tensor:
        pixels = student[0].shape[-2] * student[0].shape[-1]
        # Traced, how many pairs there are is not known.
        many = len(image) if torch.compiler.is_compiling() else entries_at_a_time(student[0]) // max(1, pixels)
        total, signs = promote(student[0]).new_zeros(()), []
        for i, n in zip(image.split(max(1, many)), k.split(max(1, many)), strict=True):
            s, t = (torch.stack([promote(cam[i, n]) for cam in cams]) for cams in (student, teacher))
            target = attentive_target(activation(s), activation(t), attentive=attentive)
            distance = activation(s) - target  # (S, some of P, H, W)
            total = total + distance.abs().sum()
            signs.append(distance.sign_().mul_(s.isfinite()).to(torch.int8))
        ctx.save_for_backward(image, k, torch.cat(signs, 1))
        ctx.shape, ctx.dtypes = student[0].shape, [cam.dtype for cam in student]
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        image, k, signs = ctx.saved_tensors
        slopes = []
        for sign, dtype in zip(signs, ctx.dtypes, strict=True):
            slopes.append(grads[0].new_zeros(ctx.shape, dtype=dtype))
            slopes[-1][image, k] = (grads[0] * sign).to(dtype)
        return None, None, None, None, *slopes


def _check_settings(attentive: bool, reduction: str) -> None:
    check_choice("attentive", attentive, (True, False))
    check_choice("reduction", reduction, ("mean", "sum"))


class MultiScaleAttentiveLoss(nn.Module):
    """`multi_scale_attentive_loss` with its settings.

    Args:
        attentive: False weighs every teacher scale alike (MMM and SMM of Table 1).
        reduction: "mean" or "sum".

    Example:
        >>> mal = MultiScaleAttentiveLoss()
        >>> cams = [torch.rand(2, 20, 16, 16)]
        >>> mal(cams, cams, torch.ones(2, 20)).item() < 1e-6
        True
    """

    if TYPE_CHECKING:  # nn.Module's own call says Any
        __call__: Callable[..., Tensor]

    def __init__(self, *, attentive: bool = True, reduction: Literal["mean", "sum"] = "mean") -> None:
        super().__init__()
        _check_settings(attentive, reduction)
        self.attentive = attentive
        self.reduction: Literal["mean", "sum"] = reduction

    def forward(self, student_cams: Sequence[Tensor], teacher_cams: Sequence[Tensor], tags: Tensor) -> Tensor:
        """Return the loss of the student's normalised CAMs against the teacher's."""
        return multi_scale_attentive_loss(
            student_cams, teacher_cams, tags, attentive=self.attentive, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        """Return the settings for the module's repr."""
        return f"attentive={self.attentive}, reduction={self.reduction!r}"
