"""Depthwise convolutions on a CPU: for some, oneDNN has slow backward kernels where another way gives the same.

On one core with AMX (torch 2.14; 1,152 channels, 5 x 5, dilation 2, a batch of 8, channels last) the gradient of the
weights takes 53 ms in float32 where maps have 16 x 16 cells and 71 where they have 8 x 8, here 17 and 3; that of the
maps 60, here 4. Kernels of 3 x 3 without dilation have fast ones of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d
from torch.overrides import TorchFunctionMode

Pair = tuple[int, int]


class FastDepthwise(TorchFunctionMode):
    """A context in which depthwise convolutions compute in their weights' precision, large ones as `_Depthwise`.

    Results have their inputs' dtype. Those of `torch.nn.Conv2d` and timm are meant: groups as the seventh argument.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        depthwise = func is conv2d and len(args) == 7 and args[0].ndim == 4 and args[1].shape[:2] == (args[6], 1)
        if not depthwise or args[6] == 1:
            return func(*args, **(kwargs or {}))
        image, weight, bias, stride, padding, dilation, groups = args
        own = bias is None and all(isinstance(setting, tuple) for setting in (stride, padding, dilation))
        own = own and (max(weight.shape[2:]) > 3 or max(dilation) > 1)
        with torch.autocast("cpu", enabled=False):
            out = image.to(weight.dtype)
            if own:
                out = _Depthwise.apply(out, weight, stride, padding, dilation)
            else:
                out = func(out, weight, bias, stride, padding, dilation, groups)
        return out.to(image.dtype)


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution whose gradients are, where that is faster, convolutions forward."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
        ctx.save_for_backward(image, weight)
        ctx.settings = stride, padding, dilation
        return conv2d(image, weight, None, stride, padding, dilation, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        given = *ctx.saved_tensors, grads[0], *ctx.settings
        with torch.autocast("cpu", enabled=False):
            of_image = _of_image(*given) if ctx.needs_input_grad[0] else None
            of_weight = _of_weight(*given) if ctx.needs_input_grad[1] else None
        return of_image, of_weight, None, None, None


def _of_image(image: Tensor, weight: Tensor, grad: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Return the gradient of the image."""
    if max(dilation) > 1 and max(stride) == 1 and padding == _half(weight, dilation):
        return conv2d(grad, weight.flip(2, 3), None, 1, padding, dilation, len(weight))
    settings = stride, padding, dilation, False, (0, 0), len(weight), (True, False, False)
    of_image: Tensor = torch.ops.aten.convolution_backward(grad, image, weight, None, *settings)[0]
    return of_image


def _of_weight(image: Tensor, weight: Tensor, grad: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Return the gradient of the weights: the image's convolution with its gradient, stride and dilation exchanged.

    Image by image, so that none is copied to make channels of the batch; what an uneven stride left over is cut off.
    """
    rows, columns = weight.shape[2:]
    total = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    for i in range(len(image)):
        of_one = conv2d(image[i : i + 1], grad[i][:, None], None, dilation, padding, stride, len(weight))
        total += of_one[0, :, None, :rows, :columns]
    return total.to(weight.dtype)


def _half(weight: Tensor, dilation: Pair) -> Pair:
    """Return the padding with which a convolution of odd kernels keeps the size; of even ones none does."""
    (height, width), (down, right) = weight.shape[2:], dilation
    return (down * (height - 1) // 2, right * (width - 1) // 2) if height % 2 and width % 2 else (-1, -1)
