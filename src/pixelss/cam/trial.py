"""A trial run of a classifier: which layers lie between its features and its logits, and whether they can be read."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pixelss._dtype import full_precision
from pixelss.cam.reading import (
    INSTEAD,
    Branch,
    Plan,
    UnlikeError,
    cells_of,
    first_tensor,
    grid_of,
    is_classifier,
    read_cells,
    run,
)

SIZES = ((64, 96), (224, 224), (256, 256), (384, 384))  # of the images that a model is tried with


def find_plan(model: nn.Module, part: str | None, heads: tuple[str, ...], size: tuple[int, int]) -> Plan:
    """Find the plan from a run on random images of this size, and check it against the model."""
    trial = _Trial(model, part, heads)
    weight = next(p for p in trial.twin.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    B = 2 if size == SIZES[0] else 1  # large images take their time
    images = torch.randn(B, _in_chans(model), *size, generator=generator).to(weight)
    with torch.no_grad(), full_precision(images):
        found, logits = trial.run(images)
        x = first_tensor(found, "last_hidden_state")
        branches = _branches(trial, heads, logits)
        width = _weight(trial.twin, branches[0]).shape[1]
        refusal = UnlikeError(
            f"the features {tuple(x.shape)} must be maps or tokens of {width} channels, the width of the classifier "
            f"{branches[0].classifier!r}: what lies between them does more than pool and normalise. {INSTEAD}"
        )
        layouts = {"NCHW": 1, "NHWC": 3} if x.ndim == 4 else {"NLC": 2} if x.ndim == 3 else {}
        for layout, axis in layouts.items():
            if x.shape[axis] != width:
                continue
            prefix, stride = _tokens(model, x.shape[1], size) if layout == "NLC" else (0, 0)
            plan = Plan(layout, prefix, stride, branches, False, size)
            cells = cells_of(x, plan, size)
            cell = cells[:, -1, -1]  # (B, C)
            shape: list[int] = [B, 1, 1, 1][: x.ndim]
            shape[axis] = width
            _, constant = trial.run(images, cell.view(shape).expand(x.shape).contiguous())
            if _close(constant, read_cells(trial.twin, branches, cell[:, None, None], bias=True).flatten(1)):
                mean = read_cells(trial.twin, branches, cells, bias=True).mean((1, 2))
                return plan._replace(averages=_close(logits, mean))
            refusal = UnlikeError(
                "the model must do no more than pool and normalise between its features and its classifier, but what "
                f"it says of a map that holds one cell everywhere is not {branches[0].classifier!r} of that cell. "
                + (INSTEAD if part is None else "Name as features the last module before the pooling.")
            )
        raise refusal


class _Trial:
    """A copy of the model in eval mode that writes down the layers with weights which run after its features.

    It shares every tensor but the classifiers', which are random: a weight of zeros would agree with everything. A
    copy, for a run in eval mode can fill caches.
    """

    def __init__(self, model: nn.Module, part: str | None, heads: tuple[str, ...]) -> None:
        def linear(module: nn.Module) -> Iterator[nn.Parameter]:
            for leaf in (leaf for head in heads for leaf in module.get_submodule(head).modules()):
                yield from leaf.parameters(recurse=False) if is_classifier(leaf) else ()

        kept: list[Tensor] = [*model.parameters(), *model.buffers()]
        kept += [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
        random = {id(p) for p in linear(model)}
        self.twin = copy.deepcopy(model, {id(tensor): tensor for tensor in kept if id(tensor) not in random}).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in linear(self.twin):
                p.copy_(torch.randn(p.shape, generator=generator).mul(p[0].numel() ** -0.5))
        self.part = part
        self.calls: list[tuple[str, nn.Module, tuple[int, ...]]] = []
        self.constant: Tensor | None = None
        self.found: Any = None
        whole: tuple[str, ...] = ()
        for name, module in self.twin.named_modules():
            one = _is_pool(module) or _is_norm(module) or is_classifier(module)
            leaf = one or (not module._modules and next(module.parameters(), None) is not None)
            if leaf and not f"{name}.".startswith(whole):
                module.register_forward_hook(partial(self._note, name))
            whole += (f"{name}.",) * one
        if part is not None:
            self.twin.get_submodule(part).register_forward_hook(self._start)

    def run(self, images: Tensor, constant: Tensor | None = None) -> tuple[Any, Tensor]:
        """Return features and logits, the latter of the features `constant` where they are given."""
        self.constant = constant
        if self.part is not None:
            return run(self.twin, self.part, images, {})
        network: Any = self.twin
        if constant is None:
            self.found = network.forward_features(images)
        found = self._start(network, images, self.found)
        return found, first_tensor(network.forward_head(found), "logits")

    def _note(self, name: str, module: nn.Module, inputs: Any, _: Any) -> None:
        self.calls.append((name, module, tuple(inputs[0].shape) if inputs else ()))

    def _start(self, _: nn.Module, __: Any, output: Any) -> Any:
        self.calls.clear()
        if self.constant is None or isinstance(output, Tensor):
            return output if self.constant is None else self.constant
        if isinstance(output, Mapping):
            key = "last_hidden_state" if "last_hidden_state" in output else next(iter(output))
            kind: Any = type(output)
            return kind(**{**output, key: self.constant})
        return (self.constant, *output[1:])


def _branches(trial: _Trial, heads: tuple[str, ...], logits: Tensor) -> tuple[Branch, ...]:
    """Read the classifiers, and what runs before each, from the layers that were called after the features."""
    last = {
        name
        for name, module, _ in trial.calls
        if is_classifier(module) and f"{name}.".startswith(tuple(f"{head}." for head in heads))
        if next(module.parameters()).shape[:1] == logits.shape[1:]  # not the hidden layers of a perceptron
    }
    branches: list[Branch] = []
    layers: list[tuple[str, str]] = []
    for name, module, shape in trial.calls:
        if name in last:
            branches.append(Branch(tuple(layers), name))
            layers = []
        elif _is_pool(module):
            layers.append((name, "tokens"))
        elif _is_norm(module):
            width = next(module.parameters()).numel()
            layers.append((name, "map" if len(shape) == 4 and shape[1] == width != shape[3] else "vector"))
        else:
            raise UnlikeError(
                "the model must do no more than pool and normalise between its features and its classifier, but runs "
                f"{name!r}, a {type(module).__name__}. {INSTEAD}"
            )
    if not branches or layers:
        raise UnlikeError(f"the classifier must be the last layer after the features, but is not. {INSTEAD}")
    sizes = {tuple(_weight(trial.twin, branch).shape[:2]) for branch in branches}
    if len(sizes) > 1 or (tuple(logits.shape[1:]),) != tuple(size[:1] for size in sizes):
        raise UnlikeError(f"the classifier must give logits (B, N), but they are {tuple(logits.shape)}. {INSTEAD}")
    return tuple(branches)


def _weight(model: nn.Module, branch: Branch) -> Tensor:
    head: Any = model.get_submodule(branch.classifier)
    weight: Tensor = head.weight
    return weight


def _is_norm(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return "norm" in type(module).__name__.lower() and bool(parameters) and all(p.ndim == 1 for p in parameters)


def _is_pool(module: nn.Module) -> bool:
    return type(module).__name__ == "AttentionPoolLatent"  # timm's: one query attends to all tokens


def _in_chans(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    if config is not None and isinstance(getattr(config, "num_channels", None), int):
        return int(config.num_channels)
    stem = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    told: Any = getattr(model, "pretrained_cfg", None) or {}
    if stem is None or (stem.in_channels > 16 and told.get("input_size")):  # pixels folded into channels first
        return int((told.get("input_size") or (3,))[0])
    return stem.in_channels


def _tokens(model: nn.Module, count: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return how many tokens come before the cells', and the cells' stride."""
    known: Any = getattr(model, "num_prefix_tokens", None)
    levels: Any = getattr(model, "feature_info", None)
    told = {levels[-1]["reduction"]} if isinstance(levels, list) and levels else set()
    H, W = size
    strides = sorted(range(1, min(H, W) + 1), key=lambda s: (s not in told, H % s + W % s, s))  # then exact ones
    for prefix in range(9) if known is None else (int(known),):
        for stride in strides:
            if count - prefix > 1 and grid_of(count - prefix, size, stride) is not None:
                return prefix, stride
    raise UnlikeError(f"{count} tokens of images {size} are no map. {INSTEAD}")


def _close(first: Tensor, second: Tensor) -> bool:
    """Tell whether two results agree up to rounding."""
    eps = torch.finfo(first.dtype).eps
    return bool((first - second).abs().amax() <= 300 * eps * (1 + second.abs().amax()))
