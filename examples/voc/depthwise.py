"""Depthwise convolutions on a CPU: for some, oneDNN has slow backward kernels where another way gives the same.

On one core with AMX (torch 2.13; 1,152 channels, 5 x 5, a batch of 8 maps of 16 x 16) the gradient of the weights takes
35 ms in float32 and 165 ms in bf16; that of the maps, with dilation 2, 60 ms, and 4 ms by the turned kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d
from torch.nn.grad import conv2d_weight
from torch.overrides import TorchFunctionMode


class FastDepthwise(TorchFunctionMode):
    """A context in which depthwise convolutions compute in their weights' precision, dilated ones with `_Dilated`.

    Results have their inputs' dtype. Those of `torch.nn.Conv2d` and timm are meant: groups as the seventh argument.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        depthwise = func is conv2d and len(args) == 7 and args[0].ndim == 4 and args[1].shape[:2] == (args[6], 1)
        if not depthwise or args[6] == 1:
            return func(*args, **(kwargs or {}))
        image, weight, bias, stride, padding, dilation, groups = args
        with torch.autocast("cpu", enabled=False):
            out = image.to(weight.dtype)
            if bias is None and stride == (1, 1) and max(dilation) > 1 and padding == _half(weight, dilation):
                out = _Dilated.apply(out, weight, dilation)
            else:
                out = func(out, weight, bias, stride, padding, dilation, groups)
        return out.to(image.dtype)


class _Dilated(torch.autograd.Function):
    """A dilated depthwise convolution that keeps the size; the gradient of the maps is one with the turned kernels."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, weight: Tensor, dilation: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(image, weight)
        ctx.dilation = dilation
        return conv2d(image, weight, None, 1, _half(weight, dilation), dilation, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (image, weight), grad, dilation = ctx.saved_tensors, grads[0], ctx.dilation
        padding, groups = _half(weight, dilation), len(weight)
        of_image = of_weight = None
        if ctx.needs_input_grad[0]:
            of_image = conv2d(grad, weight.flip(2, 3), None, 1, padding, dilation, groups)
        if ctx.needs_input_grad[1]:
            of_weight = conv2d_weight(image, weight.shape, grad, 1, padding, dilation, groups)
        return of_image, of_weight, None


def _half(weight: Tensor, dilation: tuple[int, int]) -> tuple[int, int]:
    """Return the padding with which a convolution of odd kernels keeps the size; of even ones none does."""
    (height, width), (down, right) = weight.shape[2:], dilation
    return (down * (height - 1) // 2, right * (width - 1) // 2) if height % 2 and width % 2 else (-1, -1)
