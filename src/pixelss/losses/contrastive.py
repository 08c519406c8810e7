"""Regional contrastive loss (Yoon Eq. 4, Yoon Eq. 5): pull every pixel to its class's prototype, off the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from pixelss._checks import check_choice, check_integer, check_positive, check_tensor
from pixelss._dtype import full_precision, promote
from pixelss._labels import mean_over, valid_pixels
from pixelss._resize import kept, multiply_rows, resize, resize_back, resize_matrix


def regional_contrastive_loss(
    features: Tensor,
    mask: Tensor,
    prototypes: Tensor,
    filled: Tensor | None = None,
    *,
    temperature: float = 0.5,
    form: Literal["infonce", "ratio"] = "infonce",
    reduction: Literal["mean", "sum", "none"] = "mean",
    ignore_index: int = 255,
) -> Tensor:
    """Return the regional contrastive loss of Yoon Eq. 4, Yoon Eq. 5, exact at the mask's resolution.

    z_pk = <x_p, pt_k> / T with both L2-normalised, where x_p is the feature map bilinearly resized to the mask's
    size. No resized feature is ever stored: the products are resized instead of the features, and |x_p|^2 is
    a weighted sum of its values at and midway between cells. A pixel with |x_p|^2 <= eps^2 (eps of the dtype) has
    z = 0 and no gradient. Float32 agrees with the literal way to 1e-5 for features >= 0, as `CAMHead` gives.

    TF32, where the user allows it, rounds these products like any other. There is no second derivative.

    Args:
        features: the student's pixel features X, finite, of any size against the mask's.
        mask: class region mask in 0..N; `ignore_index`, values out of range and classes not `filled` are void.
        prototypes: one row a class, as `PrototypeBank.prototypes`.
        filled: the rows that exist, as `PrototypeBank.filled`; the others leave the denominator. None: all.
        temperature: T > 0.
        form: "infonce" for -log softmax, "ratio" for -softmax (as printed: bounded, robust to noise).
        reduction: "mean" over the valid pixels, "sum" (as printed) or "none".
        ignore_index: the mask's void value.

    Shape:
        (B, D, h, w), (B, H, W), (K, D), (K,) -> scalar, or (B, H, W) for "none", with zeros at void pixels.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; a setting out of range.

    Reference:
        Yoon 2021, "Exploring Pixel-level Self-supervision", Eq. 4, Eq. 5.

    Example:
        >>> features, prototypes = torch.rand(2, 256, 24, 24, requires_grad=True), torch.rand(21, 256)
        >>> mask = torch.randint(0, 21, (2, 192, 192))
        >>> regional_contrastive_loss(features, mask, prototypes).backward()
        >>> features.grad.shape
        torch.Size([2, 256, 24, 24])
    """
    B, D, _, _ = check_tensor("features", features, "BDhw")
    _, H, W = check_tensor("mask", mask, "BHW", kind="integer", like=features, B=B)
    hint = "One row a class (background first), as wide as the features."
    K, _ = check_tensor("prototypes", prototypes, "KD", like=features, hint=hint, D=D)
    _check_settings(temperature, form, reduction, ignore_index)
    if filled is not None:
        check_tensor("filled", filled, "K", kind="bool", like=features, K=K)

    dtype = torch.promote_types(promote(features).dtype, promote(prototypes).dtype)
    features, prototypes = features.to(dtype), normalize(prototypes.to(dtype), dim=1) / temperature
    with full_precision(features):
        products = torch.bmm(prototypes.expand(B, -1, -1), features.flatten(2)).unflatten(2, features.shape[2:])
    label, valid = valid_pixels(mask, K, ignore_index)
    if filled is not None:
        valid = valid & filled[label]
    log_p: Tensor = _LogProbability.apply(products, resized_square_norm(features, (H, W)), label, filled)  # (B, H, W)
    loss = -log_p if form == "infonce" else -log_p.exp()
    if reduction == "mean":
        return mean_over(loss, valid)
    loss = loss.where(valid, 0)
    return loss.sum() if reduction == "sum" else loss


def _check_settings(temperature: float, form: str, reduction: str, ignore_index: int) -> None:
    check_positive("temperature", temperature)
    check_choice("form", form, ("infonce", "ratio"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_integer("ignore_index", ignore_index)


class _LogProbability(torch.autograd.Function):
    """The log-softmax of the resized products over the features' lengths, at the label.

    One map a class waits for the backward pass, where autograd would keep two and make four.
    """

    @staticmethod
    def forward(ctx: Any, products: Tensor, square: Tensor, label: Tensor, filled: Tensor | None) -> Tensor:
        info, label = torch.finfo(products.dtype), label[:, None]
        scale = square.masked_fill(square <= info.eps**2, torch.inf).rsqrt_()[:, None]  # (B, 1, H, W)
        z = resize(products, (label.shape[2], label.shape[3])) * scale  # (B, K, H, W)
        if filled is not None:
            z.masked_fill_(~filled[:, None, None], info.min)
        log_softmax = z.log_softmax(1)
        log_p = log_softmax.gather(1, label)
        ctx.save_for_backward(log_softmax, log_p, scale, label)
        ctx.size = products.shape[2:]
        return log_p.squeeze(1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]  # what is saved is a constant to autograd
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        log_softmax, log_p, scale, label = ctx.saved_tensors
        slope = grads[0][:, None]
        # Probabilities by softmax and not exp, which takes a CPU fifty times as long where a class is not filled.
        # The slopes of z sum to zero over the classes, so that log_softmax may stand for z.
        mean = log_softmax.softmax(1).mul_(log_softmax).sum(1, keepdim=True)
        by_square = (slope * (log_p - mean) * scale.square() / -2).squeeze(1)
        by_z = log_softmax.softmax(1).mul_(-slope).scatter_add_(1, label, slope)
        return resize_back(by_z.mul_(scale), ctx.size), by_square, None, None


def resized_square_norm(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return |x_p|^2 (B, H, W) of x (B, D, h, w) bilinearly resized to `size`.

    Along one axis, between two cells, it is a quadratic function, hence a weighted sum of its values at both cells
    and in the middle between them: (2h - 1) x (2w - 1) squares, and their weights factor into rows and columns.
    """
    (h, w), (H, W) = x.shape[-2:], size
    with full_precision(x):
        nodes = multiply_rows(kept(_nodes, h, h, x), x @ kept(_nodes, w, w, x).mT)  # (B, D, 2h - 1, 2w - 1)
        squares = nodes.square().sum(1)
        return multiply_rows(kept(_node_weights, h, H, x), squares @ kept(_node_weights, w, W, x).mT)


def _nodes(source: int, _: int, like: Tensor) -> Tensor:
    """Return the (2h - 1, h) matrix that appends the means of neighbouring cells to the cells."""
    eye = torch.eye(source, dtype=like.dtype, device=like.device)
    return torch.cat([eye, (eye[:-1] + eye[1:]) / 2])


def _node_weights(source: int, target: int, like: Tensor) -> Tensor:
    """Return the (H, 2h - 1) weights of the squares at `_nodes`: of a x_0 + b x_1, a (a - b), b (b - a) and 4 a b."""
    weights = resize_matrix(source, target, like)  # a and b = 1 - a
    return torch.cat([weights * (2 * weights - 1), 4 * weights[:, :-1] * weights[:, 1:]], dim=1)


class RegionalContrastiveLoss(nn.Module):
    """`regional_contrastive_loss` with its settings.

    Args:
        temperature: T > 0.
        form: "infonce" or "ratio".
        reduction: "mean", "sum" or "none".
        ignore_index: the mask's void value.

    Example:
        >>> rcl = RegionalContrastiveLoss(form="ratio")
        >>> mask = torch.randint(0, 21, (2, 64, 64))
        >>> rcl(torch.rand(2, 256, 8, 8), mask, torch.rand(21, 256), torch.ones(21, dtype=torch.bool)).shape
        torch.Size([])
    """

    if TYPE_CHECKING:  # nn.Module's own call says Any
        __call__: Callable[..., Tensor]

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        form: Literal["infonce", "ratio"] = "infonce",
        reduction: Literal["mean", "sum", "none"] = "mean",
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        _check_settings(temperature, form, reduction, ignore_index)
        self.temperature, self.ignore_index = temperature, ignore_index
        self.form: Literal["infonce", "ratio"] = form
        self.reduction: Literal["mean", "sum", "none"] = reduction

    def forward(self, features: Tensor, mask: Tensor, prototypes: Tensor, filled: Tensor | None = None) -> Tensor:
        """Return the loss of student features under a mask, against a bank's prototypes."""
        return regional_contrastive_loss(
            features,
            mask,
            prototypes,
            filled,
            temperature=self.temperature,
            form=self.form,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
        )

    def extra_repr(self) -> str:
        """Return the settings for the module's repr."""
        return (
            f"temperature={self.temperature}, form={self.form!r}, reduction={self.reduction!r}, "
            f"ignore_index={self.ignore_index}"
        )
