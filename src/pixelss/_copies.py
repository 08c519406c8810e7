"""A copy of a network that shares nothing with it, and what wrappers hold: for teachers and for trained classifiers."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils._pytree import tree_leaves

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def unwrap(module: nn.Module) -> nn.Module:
    """Return what the wrappers around `module` hold, or `module` itself."""
    while True:
        if isinstance(module, (DataParallel, DistributedDataParallel)):
            module = module.module
        elif isinstance(compiled := module._modules.get("_orig_mod"), nn.Module):  # torch.compile's only child
            module = compiled
        else:
            return module


def named_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer under each of its names, as if there were no wrapper."""
    module = unwrap(module)
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield prefix + name, tensor
    for name, child in module._modules.items():
        if child is not None:
            yield from named_tensors(child, f"{prefix}{name}.")


def plain_copy(module: nn.Module) -> nn.Module:
    """Return a deep copy of `module` in which the content of every wrapper stands in the wrapper's place.

    A tensor that autograd made, such as a kept activation, is copied without its graph; one that shares memory with
    itself gets memory of its own. Hooks are called by the copy with what belongs to it: where a closure, a method or a
    partial holds a part of `module`, it holds the copy's part; what lies outside `module` is shared.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in tree_leaves(vars(part)):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        for name, buffer in part._buffers.items():
            if buffer is not None and torch._debug_has_internal_overlap(buffer) == 1:
                memo[id(part._buffers[name])] = buffer.detach().clone(memory_format=torch.contiguous_format)
        for hooks in _HOOKS:
            memo[id(getattr(part, hooks))] = OrderedDict()  # filled below, when everything has its copy
    copied = _copy(module, memo)
    for part in module.modules():
        twin = memo.get(id(part))
        if isinstance(twin, nn.Module):
            for hooks in _HOOKS:
                memo[id(getattr(part, hooks))].update({k: _rebound(f, memo) for k, f in getattr(part, hooks).items()})
            vars(twin).update({k: _rebound(f, memo) for k, f in vars(twin).items() if isinstance(f, FunctionType)})
    return copied


def _copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    for child in module.children():
        _copy(child, memo)
    memo[id(module)] = plain = copy.deepcopy(unwrap(module), memo)
    return plain


def _rebound(value: Any, memo: dict[int, Any]) -> Any:
    """Return the copy of `value`; of a function without one, the same function bound to the copies of what it holds."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, partial):
        keywords = {name: _rebound(held, memo) for name, held in value.keywords.items()}
        return partial(_rebound(value.func, memo), *(_rebound(held, memo) for held in value.args), **keywords)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _rebound(value.__self__, memo))
    if not isinstance(value, FunctionType) or not value.__closure__:
        return value
    memo[id(value)] = value  # a function may hold itself
    cells = tuple(_rebound_cell(cell, memo) for cell in value.__closure__)
    if any(new is not old for new, old in zip(cells, value.__closure__, strict=True)):
        twin = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
        twin.__kwdefaults__ = value.__kwdefaults__
        memo[id(value)] = twin
    return memo[id(value)]


def _rebound_cell(cell: CellType, memo: dict[int, Any]) -> CellType:
    try:
        held = cell.cell_contents
    except ValueError:  # not assigned yet
        return cell
    own = _rebound(held, memo)
    return cell if own is held else CellType(own)  # what lies outside stays shared: a variable that a hook assigns
