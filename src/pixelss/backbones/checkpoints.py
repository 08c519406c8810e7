"""ResNet38 with published weights (MXNet .params, torch .pth, .safetensors): read, checked, then copied.

The files come from strangers: a file with any fault leaves the model as it was.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pixelss.backbones.files import read_weights, under_prefixes, unwrapped
from pixelss.backbones.mxnet import torch_name
from pixelss.backbones.resnet38 import ResNet38

_COUNTER = "num_batches_tracked"  # absent from old files, and unused by a norm with a fixed momentum


class LoadReport(NamedTuple):
    """What `load_resnet38` did: `loaded` and `missing` in ResNet38's names, `skipped` in the file's."""

    loaded: tuple[str, ...]
    skipped: tuple[str, ...]
    missing: tuple[str, ...]


def load_resnet38(model: nn.Module, path: str | os.PathLike[str]) -> LoadReport:
    """Copy published weights into the one ResNet38 inside `model`.

    The file is an MXNet `.params` file, a torch file (a state dict, or one under "state_dict", "model", "teacher",
    "net" and the like; loaded with `weights_only=True`) or a `.safetensors` file. The names may carry a common
    prefix, such as "backbone.", and what the wrappers of DistributedDataParallel, FSDP, activation checkpointing
    and torch.compile put anywhere into them; values are cast to the model's dtype. Warns where most of the network is
    missing.

    Args:
        model: a ResNet38, or any module that contains exactly one.
        path: the file.

    Returns:
        The tensors that were loaded, those of the file that ResNet38 lacks (classifiers: `linear1000_*`, `fc8`,
        ...), and those of ResNet38 that the file lacks; `num_batches_tracked`, absent from old files, is not missed.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: `model` contains no ResNet38, or several.
        ValueError: the file is damaged, ambiguous or of no known format, holds objects that could run code or no tensor
            of ResNet38, or holds one of another shape, another kind of dtype or with a value that is not finite. The
            model is then unchanged.

    Reference:
        Wu 2016, "Wider or Deeper", who published the weights.

    Example:
        >>> import warnings
        >>> from tempfile import TemporaryDirectory
        >>> model = nn.Sequential(resnet38(), nn.Conv2d(4096, 20, 1))
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "old.pth")
        ...     torch.save({"module.bn7.bias": torch.ones(4096), "module.fc8.weight": torch.ones(20, 4096)}, path)
        ...     with warnings.catch_warnings():
        ...         warnings.simplefilter("ignore")  # that 190 tensors are missing
        ...         report = load_resnet38(model, path)
        >>> report.loaded, report.skipped, len(report.missing)
        (('bn7.bias',), ('module.fc8.weight',), 190)
    """
    report = _load(model, Path(path))
    if len(report.missing) > len(report.loaded):
        _warn_of_missing(path, report, stacklevel=3)
    return report


def _load(model: nn.Module, path: Path) -> LoadReport:
    own = _find_resnet38(model).state_dict()
    tensors = read_weights(path)
    names = _match(path, tensors, own)
    values = {key: _fit(path, name, tensors[name], own[key]) for key, name in names.items()}
    with torch.no_grad():
        for key, value in values.items():
            own[key].copy_(value)
    used = set(names.values())
    return LoadReport(
        loaded=tuple(key for key in own if key in names),
        skipped=tuple(name for name in tensors if name not in used),
        missing=tuple(key for key in own if key not in names and not key.endswith(_COUNTER)),
    )


def _find_resnet38(model: nn.Module) -> ResNet38:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = [module for module in modules if isinstance(module, ResNet38)]
    if len(found) != 1:
        raise TypeError(
            f"model must contain exactly one ResNet38, but {type(model).__name__} contains {len(found)}: "
            "pass the ResNet38 itself, or the one model that holds it."
        )
    if found[0].bn7.weight.is_meta:
        raise ValueError('model lies on the "meta" device, which keeps no values: build it on another, then load.')
    return found[0]


def _match(path: Path, tensors: Iterable[str], own: Mapping[str, Tensor]) -> dict[str, str]:
    """Pair ResNet38's names with the file's, whatever one prefix the latter share: {own name: file name}."""
    found = under_prefixes(path, {name: unwrapped(torch_name(name)) for name in tensors}, own)
    if not found:
        raise ValueError(f"{path} holds no tensor of ResNet38, such as conv1a.weight.")
    best = max(len(names) for names in found.values())
    prefixes = [prefix for prefix, names in found.items() if len(names) == best]
    if len(prefixes) > 1:
        raise ValueError(f"{path} holds several ResNet38, under {prefixes}: save the one to load on its own.")
    return found[prefixes[0]]


def _fit(path: Path, name: str, value: Tensor, own: Tensor) -> Tensor:
    """Return `value` in the dtype of the model's own tensor; raises unless it can take its place."""
    problem = ""
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        problem = f"a plain tensor in memory, but is {value.layout} on {value.device}"
    elif value.shape != own.shape:
        problem = f"of shape {tuple(own.shape)}, but is {tuple(value.shape)}"
    elif value.is_complex() or value.is_floating_point() != own.is_floating_point():
        problem = f"{own.dtype}, but is {value.dtype}"
    if not problem:
        value = value.to(own.dtype)
        if value.is_floating_point() and not value.isfinite().all():
            problem = f"finite in {own.dtype}, but is not: the file is damaged"
    if problem:
        raise ValueError(f"{path}: {name!r} must be {problem}.")
    return value


def resnet38(weights: str | os.PathLike[str] | None = None) -> ResNet38:
    """Build a ResNet38, with published weights where a file is given.

    Args:
        weights: a file that `load_resnet38` reads; warns where it lacks tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds no tensor of ResNet38.

    Shape:
        The network maps as `ResNet38` does.

    Reference:
        Wu 2016, "Wider or Deeper", model A.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     model = resnet38()
        >>> sum(p.numel() for p in model.parameters())
        105070912
    """
    model = ResNet38()
    if weights is not None:
        report = _load(model, Path(weights))
        if report.missing:
            _warn_of_missing(weights, report, stacklevel=3)
    return model


def _warn_of_missing(path: str | os.PathLike[str], report: LoadReport, stacklevel: int) -> None:
    missing = report.missing
    lacks = f"{os.fspath(path)} lacks {len(missing)} tensors of ResNet38: {', '.join(missing[:3])}, ..."
    others = f" It holds others: {', '.join(report.skipped[:3])}, ..." if report.skipped else ""
    warnings.warn(f"{lacks} They keep their initial values.{others}", stacklevel=stacklevel)
