"""Fully connected CRF: mean-field inference with Gaussian filters on permutohedral lattices."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pixelss._checks import check_images, check_integer, check_nonnegative, check_positive, check_tensor, outside_unit
from pixelss._dtype import promote
from pixelss._graphs import outside_graphs
from pixelss._lattice import PermutohedralLattice, filtered, joined
from pixelss._sums import row_sums

_CLIP = 1e-5
_KEPT_PIXELS = 1 << 19  # of the largest image whose lattice of positions is kept


def dense_crf(
    images: Tensor,
    probs: Tensor,
    *,
    iterations: int = 10,
    gaussian: tuple[float, float] | None = (3.0, 3.0),
    bilateral: tuple[float, float, float] | None = (80.0, 13.0, 10.0),
) -> Tensor:
    """Return the class probabilities after mean-field inference of the fully connected CRF.

    Starting from Q = softmax(log p), with p clipped to [1e-5, 1], every iteration is
    Q = softmax(log p + sum over kernels of compat * D^-1/2 G D^-1/2 Q): G is the kernel's Gaussian filter on the
    lattice, D its response to ones. The numbers are those of the C++ code (Potts compatibility, symmetric
    normalisation). Half-precision probabilities are computed and returned in float32. The gradient reaches `probs`.

    On a CPU the lattices of positions of the last four sizes or settings are kept, for images of up to half a million
    pixels: 58 bytes a pixel in float32 at sxy 3, 108 at sxy 1, none below.
    Consecutive equal images share one lattice and are filtered together: for several label sets of one image, pass
    `image.expand(S, -1, -1, -1)`.

    Args:
        images: RGB levels 0 to 255, of dtype uint8.
        probs: class probabilities in [0, 1]; they need not sum to 1.
        iterations: mean-field steps; 0 gives the clipped `probs`, normalised.
        gaussian: (sxy in pixels, compat) of the smoothness kernel; None switches it off.
        bilateral: (sxy in pixels, srgb in levels, compat) of the appearance kernel; None switches it off.

    Shape:
        (B, 3, H, W), (B, K, H, W) -> (B, K, H, W).

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype or device; a setting out of range; `probs`
            outside [0, 1]; a scale so small that the lattice has no room.

    Reference:
        Kraehenbuehl 2011, "Efficient Inference in Fully Connected CRFs".

    Example:
        >>> images = torch.randint(0, 256, (2, 3, 24, 32), dtype=torch.uint8)
        >>> probs = torch.rand(2, 21, 24, 32).softmax(dim=1)
        >>> dense_crf(images, probs).argmax(dim=1).shape
        torch.Size([2, 24, 32])
    """
    hint = "Images are RGB, one for every map of probabilities."
    B, H, W = check_images(images, hint=hint)
    check_tensor("probs", probs, "BKHW", like=images, hint=hint, B=B, H=H, W=W)
    _check_settings(iterations, gaussian, bilateral)
    probs = promote(probs)
    refined: Tensor = _infer(images, probs, iterations, gaussian, bilateral)
    return refined


class DenseCRF(nn.Module):
    """`dense_crf` with its settings.

    Args:
        iterations: mean-field steps.
        gaussian: (sxy in pixels, compat) or None.
        bilateral: (sxy in pixels, srgb in levels 0 to 255, compat) or None.

    Example:
        >>> crf = DenseCRF(iterations=1, bilateral=(32.0, 13.0, 10.0))
        >>> images = torch.zeros(1, 3, 8, 9, dtype=torch.uint8)
        >>> crf(images, torch.rand(1, 2, 8, 9)).shape
        torch.Size([1, 2, 8, 9])
    """

    if TYPE_CHECKING:  # nn.Module's own call says Any
        __call__: Callable[..., Tensor]

    def __init__(
        self,
        *,
        iterations: int = 10,
        gaussian: tuple[float, float] | None = (3.0, 3.0),
        bilateral: tuple[float, float, float] | None = (80.0, 13.0, 10.0),
    ) -> None:
        super().__init__()
        _check_settings(iterations, gaussian, bilateral)
        self.iterations, self.gaussian, self.bilateral = iterations, gaussian, bilateral

    def forward(self, images: Tensor, probs: Tensor) -> Tensor:
        """Return the probabilities after inference on uint8 images."""
        return dense_crf(images, probs, iterations=self.iterations, gaussian=self.gaussian, bilateral=self.bilateral)

    def extra_repr(self) -> str:
        """Return the settings for the module's repr."""
        return f"iterations={self.iterations}, gaussian={self.gaussian}, bilateral={self.bilateral}"


@outside_graphs  # it takes minutes, and gains nothing
def _infer(
    images: Tensor,
    probs: Tensor,
    iterations: int,
    gaussian: tuple[float, float] | None,
    bilateral: tuple[float, float, float] | None,
) -> Tensor:
    """Return `dense_crf` of arguments that were checked but for the range of `probs`."""
    if probs.numel():
        ends = torch.stack(probs.detach().aminmax())  # either keeps a NaN
        if outside_unit(ends).any():
            span = f"{ends[0].item():.4g} to {ends[1].item():.4g}"
            raise ValueError(f"probs must lie in [0, 1], but ranges from {span}. Logits? Take their softmax(dim=1).")
    B, _, H, W = probs.shape
    smoothness = [_smoothness(H, W, gaussian, probs)] if gaussian else []
    first = [b for b in range(B) if b == 0 or not torch.equal(images[b], images[b - 1])]
    results = []
    for start, stop in pairwise([*first, B]):
        lattice = _lattice(images[start], probs, smoothness, bilateral)
        p = probs[start:stop].clamp(_CLIP, 1).flatten(2)  # (S, K, HW)
        results.append(_mean_field(p, lattice, iterations))
        del lattice, p  # before the next are made
    if not results:
        return probs
    copied = len(results) > 1 or probs.requires_grad  # a caller may write to it, a backward pass needs it as it was
    return (torch.cat(results) if copied else results[0].contiguous()).view_as(probs)


def _lattice(
    image: Tensor, like: Tensor, kernels: list[PermutohedralLattice], bilateral: tuple[float, float, float] | None
) -> PermutohedralLattice | None:
    """Return the given kernels and the image's bilateral one as one lattice, None where there are none."""
    if bilateral:
        (_, H, W), (sxy, srgb, compat) = image.shape, bilateral
        position, level = _positions(H, W, like), image.flatten(1).to(like.dtype)
        kernels = [*kernels, _kernel(torch.cat([position / sxy, level / srgb]).mT, compat)]  # of (HW, 5)
    return joined(kernels) if kernels else None


def _smoothness(H: int, W: int, gaussian: tuple[float, float], like: Tensor) -> PermutohedralLattice:
    """Return the kernel of the positions alone, on a CPU kept for the last sizes and settings unless it is large."""
    keep = like.device.type == "cpu" and H * W <= _KEPT_PIXELS and gaussian[0] >= 1
    build = _kept_smoothness if keep else _kept_smoothness.__wrapped__
    return build(H, W, tuple(gaussian), like.dtype, like.device)


@lru_cache(maxsize=4)
def _kept_smoothness(
    H: int, W: int, gaussian: tuple[float, float], dtype: torch.dtype, device: torch.device
) -> PermutohedralLattice:
    sxy, compat = gaussian
    return _kernel(_positions(H, W, torch.empty(0, dtype=dtype, device=device)).mT / sxy, compat)


def _kernel(features: Tensor, compat: float) -> PermutohedralLattice:
    """Return compat * D^-1/2 G D^-1/2, whose factors are the lattice's own weights: no product a step is theirs."""
    lattice = PermutohedralLattice(features)
    response = lattice.filter(features.new_ones(len(features), 1))  # (P, 1)
    lattice.scale_((compat / (response[:, 0] + 1e-20)).sqrt())
    return lattice


def _mean_field(p: Tensor, lattice: PermutohedralLattice | None, iterations: int) -> Tensor:
    """Return Q (S, K, P) of S label sets p, which the filters take as one, after `iterations` steps."""
    q = p / p.sum(1, keepdim=True)
    if lattice is None or iterations == 0:
        return q
    if p.shape[1] == 2:
        return _of_two_classes(p, lattice, iterations)
    log_p = p.log().permute(2, 0, 1).contiguous()  # (P, S, K)
    q = q.permute(2, 0, 1).contiguous()
    softmax = _Softmax(q)
    for _ in range(iterations):
        q = _Step.apply(q, log_p, lattice, softmax)
    return q.flatten(1).mT.contiguous().view_as(p)  # a third of the time of permuting three axes


def _of_two_classes(p: Tensor, lattice: PermutohedralLattice, iterations: int) -> Tensor:
    """Return `_mean_field` of two classes, whose difference tells all: the filters have one channel a label set."""
    unary = p.log()
    unary = (unary[:, 0] - unary[:, 1]).mT.contiguous()  # (P, S)
    logit = unary
    for _ in range(iterations):
        logit = filtered(lattice, (logit / 2).tanh()) + unary  # softmax([a, b]) @ [1, -1] = tanh((a - b) / 2)
    return torch.stack([logit.mT, -logit.mT], dim=1).sigmoid()


class _Step(torch.autograd.Function):
    """One step of mean field, Q (P, S, K) -> softmax(log p + what the kernels make of Q)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, log_p: Tensor, lattice: PermutohedralLattice, softmax: _Softmax) -> Tensor:
        q = softmax(lambda: filtered(lattice, q.flatten(1)).view_as(q).add_(log_p))
        ctx.lattice = lattice
        ctx.save_for_backward(q)
        return q

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (q,), (grad,) = ctx.saved_tensors, grads
        of_log_p = q * (grad - (grad * q).sum(-1, keepdim=True))
        return filtered(ctx.lattice, of_log_p.flatten(1), reverse=True).view_as(q), of_log_p, None, None


class _Softmax:
    """Softmax over the last axis of logits of one size; on a CPU without their maximum, until that overflows.

    There torch's takes long where the axis is short, and the search for a maximum as long as the exponentials.
    """

    def __init__(self, like: Tensor) -> None:
        self.plain = like.device.type == "cpu"
        self.sums = row_sums(like)

    def __call__(self, logits: Callable[[], Tensor]) -> Tensor:
        """Return the softmax of what `logits` computes, perhaps twice."""
        if self.plain:
            p = logits().exp_()
            total = self.sums(p)  # not 0: of each pixel one is at least log(_CLIP), for messages are no less than 0
            if total.max() < torch.inf:
                return p.div_(total)
            self.plain = False  # the next steps' would overflow too
        return logits().softmax(-1)


def _positions(H: int, W: int, like: Tensor) -> Tensor:
    """Return x and y of each pixel, (2, HW)."""
    x, y = (torch.arange(size, dtype=like.dtype, device=like.device) for size in (W, H))
    return torch.stack(torch.meshgrid(x, y, indexing="xy")).flatten(1)


def _check_settings(
    iterations: int, gaussian: tuple[float, float] | None, bilateral: tuple[float, float, float] | None
) -> None:
    check_integer("iterations", iterations)
    if iterations < 0:
        raise ValueError(f"iterations must be at least 0, but is {iterations}.")
    parts = {"gaussian": (gaussian, ("sxy", "compat")), "bilateral": (bilateral, ("sxy", "srgb", "compat"))}
    for name, (kernel, settings) in parts.items():
        if kernel is None:
            continue
        if not isinstance(kernel, (tuple, list)) or len(kernel) != len(settings):
            raise ValueError(f"{name} must be None or ({', '.join(settings)}), but is {kernel!r}.")
        for setting, value in zip(settings, kernel, strict=True):
            check = check_nonnegative if setting == "compat" else check_positive
            check(f"{name} {setting}", value)
