"""A classifier read at every cell of its features: the layers of its head, by a plan of their names."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from pixelss._graphs import outside_graphs

INSTEAD = "Train a CAMHead on its features instead: nn.Sequential(timm_backbone(name), CAMHead(...))."


class Branch(NamedTuple):
    """One classifier, and the layers that a cell passes before it: (dotted name, form of its input)."""

    layers: tuple[tuple[str, str], ...]
    classifier: str


class Plan(NamedTuple):
    """How to read a network's features and classifiers."""

    layout: str  # of the features: NCHW, NHWC or NLC
    prefix: int  # tokens before those of the cells
    stride: int  # image pixels a cell, for tokens
    branches: tuple[Branch, ...]
    averages: bool  # the logits are the mean of the CAM plus the bias
    size: tuple[int, int]  # of images that the model takes


class UnlikeError(ValueError):
    """The model is understood, and is not one that can be read at a cell."""


def is_classifier(module: nn.Module) -> bool:
    """Tell whether a layer can be applied to a cell: a linear one or a 1x1 convolution."""
    if isinstance(module, nn.Conv2d):
        return set(module.kernel_size) == {1} and module.groups == 1
    return isinstance(module, nn.Linear)


def run(model: nn.Module, part: str | None, images: Tensor, kwargs: Mapping[str, Any]) -> tuple[Any, Tensor]:
    """Return what the features part gave, and the logits."""
    if part is None:
        network: Any = model
        found = network.forward_features(images, **kwargs)
        return found, first_tensor(network.forward_head(found), "logits")
    with _watch(model.get_submodule(part)) as outputs:
        logits = first_tensor(model(images, **kwargs), "logits")
    if not outputs:
        raise UnlikeError(f"features must be a module that the model runs, but {part!r} was not called.")
    return outputs[-1], logits


@contextmanager
def _watch(module: nn.Module) -> Iterator[list[Any]]:
    """Keep the outputs of `module` for this block alone: the hook is gone after it, from every copy too."""
    outputs: list[Any] = []
    caller = _thread()

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        if _thread() == caller:  # another thread's images are not ours
            outputs.append(output)

    handle = module.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


@outside_graphs  # it cannot be traced
def _thread() -> int:
    return threading.get_ident()


def first_tensor(output: Any, name: str) -> Tensor:
    """Return the tensor called `name` of a result, or its first."""
    found = output
    if not isinstance(found, Tensor):
        found = getattr(output, name, None)
    if found is None and isinstance(output, Mapping):
        found = output.get(name, next(iter(output.values()), None))
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise UnlikeError(f"the model must give {name} as a tensor, but gives a {type(output).__name__}. {INSTEAD}")
    return found


def cells_of(found: Any, plan: Plan, size: tuple[int, int]) -> Tensor:
    """Return the features as (B, h, w, C)."""
    x = first_tensor(found, "last_hidden_state")
    if plan.layout == "NCHW":
        return x.permute(0, 2, 3, 1)
    if plan.layout == "NHWC":
        return x
    grid = grid_of(x.shape[1] - plan.prefix, size, plan.stride)
    if grid is None:
        raise ValueError(
            f"{x.shape[1]} tokens, {plan.prefix} of them class tokens, are no map of stride {plan.stride} on {size}"
        )
    cells: Tensor = x[:, plan.prefix :].unflatten(1, grid)
    return cells


def grid_of(cells: int, size: tuple[int, int], stride: int) -> tuple[int, int] | None:
    """Return (h, w) of `cells` cells of a stride: rounded up (padded images) or down."""
    H, W = size
    for grid in ((-(-H // stride), -(-W // stride)), (H // stride, W // stride)):
        if grid[0] * grid[1] == cells:
            return grid
    return None


def read_cells(model: nn.Module, branches: tuple[Branch, ...], cells: Tensor, *, bias: bool = False) -> Tensor:
    """Return the mean of the classifiers' answers to every cell: (B, h, w, C) -> (B, h, w, N)."""
    answers = []
    for branch in branches:
        x = cells.flatten(0, 2)  # (B h w, C)
        for name, form in branch.layers:
            x = _apply(model.get_submodule(name), form, x)
        head: Any = model.get_submodule(branch.classifier)
        answers.append(functional.linear(x, head.weight.flatten(1), head.bias if bias else None))
    total = answers[0] if len(answers) == 1 else torch.stack(answers).mean(0)
    scores: Tensor = total.unflatten(0, cells.shape[:3])
    return scores


def _apply(layer: nn.Module, form: str, x: Tensor) -> Tensor:
    """Apply a layer of the head to each cell (M, C) alone."""
    if isinstance(layer, _BatchNorm):  # stored statistics: those of cells are not those of images
        return functional.batch_norm(
            x, layer.running_mean, layer.running_var, layer.weight, layer.bias, training=False, eps=layer.eps
        )
    if form == "tokens":
        x = x[:, None]
    elif form == "map":
        x = x[:, :, None, None]
    y: Tensor = layer(x)
    return y.flatten(1)
