"""ResNet38 with published weights (MXNet .params, torch .pth, .safetensors): read, checked, then copied.

The files come from strangers. The format is told by the content, nothing in a file is executed, no size is
believed before it is checked, and a file with any fault leaves the model as it was.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pixelss.backbones.mxnet import MAGIC, read_mxnet_params, torch_name
from pixelss.backbones.resnet38 import ResNet38

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_COUNTER = "num_batches_tracked"  # absent from old files, and unused by a norm with a fixed momentum


class LoadReport(NamedTuple):
    """What `load_resnet38` did: `loaded` and `missing` in ResNet38's names, `skipped` in the file's."""

    loaded: tuple[str, ...]
    skipped: tuple[str, ...]
    missing: tuple[str, ...]


def load_resnet38(model: nn.Module, path: str | os.PathLike[str]) -> LoadReport:
    """Copy published weights into the one ResNet38 inside `model`.

    The file is an MXNet `.params` file, a torch file (a state dict, or one under "state_dict", "model_state_dict",
    "model" or "net"; loaded with `weights_only=True`) or a `.safetensors` file. The names may carry a common
    prefix, such as "module." or "backbone."; values are cast to the model's dtype.

    Args:
        model: a ResNet38, or any module that contains exactly one.
        path: the file.

    Returns:
        The tensors that were loaded, those of the file that ResNet38 lacks (classifiers: `linear1000_*`, `fc8`,
        ...), and those of ResNet38 that the file lacks; `num_batches_tracked`, absent from old files, is not missed.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: `model` contains no ResNet38, or several.
        ValueError: the file is damaged, ambiguous or of no known format, holds no tensor of ResNet38, or holds one
            of another shape, another kind of dtype or with a value that is not finite. The model is then unchanged.

    Reference:
        Wu 2016, "Wider or Deeper", who published the weights.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> model = nn.Sequential(resnet38(), nn.Conv2d(4096, 20, 1))
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "old.pth")
        ...     torch.save({"module.bn7.bias": torch.ones(4096), "module.fc8.weight": torch.ones(20, 4096)}, path)
        ...     report = load_resnet38(model, path)
        >>> report.loaded, report.skipped, len(report.missing)
        (('bn7.bias',), ('module.fc8.weight',), 190)
    """
    path = Path(path)
    own = _find_resnet38(model).state_dict()
    tensors = _read(path)
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


def _read(path: Path) -> Mapping[str, Tensor]:
    with path.open("rb") as file:
        head = file.read(9)
    if head[:8] == MAGIC:
        return {name: torch.from_numpy(array) for name, array in read_mxnet_params(path).items()}
    safe = head[8:] == b"{"
    if not safe and head[:4] != b"PK\x03\x04" and head[:1] != b"\x80":
        raise ValueError(f"{path} is neither an MXNet, a torch nor a safetensors file: it begins with {head!r}.")
    try:
        content = _read_safetensors(path) if safe else _read_torch(path, zipped=head[:2] == b"PK")
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged pickle can raise
        first_line = str(error).partition("\n")[0]
        reader = "safetensors" if safe else "torch.load(weights_only=True)"
        raise ValueError(f"{path} is damaged or unsafe, {reader} rejects it: {first_line}") from error
    return _check_state_dict(path, content)


def _read_safetensors(path: Path) -> object:
    from safetensors.torch import load_file

    tensors = load_file(path)  # checks everything but repeated names, of which it keeps the last
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    json.loads(header, object_pairs_hook=_unique)
    return tensors


def _unique(pairs: list[tuple[str, object]]) -> None:
    for name, times in Counter(name for name, _ in pairs).items():
        if times > 1:
            raise ValueError(f"its header names {name!r} {times} times")


def _read_torch(path: Path, *, zipped: bool) -> object:
    with path.open("rb") as file:
        if not zipped:  # the format before torch 1.6, which cannot be mapped
            content = torch.load(file, map_location="cpu", weights_only=True)
            ended = not file.read(1)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            file.seek(-22, os.SEEK_END)
            ended = file.read(4) == b"PK\x05\x06"
    if not ended:
        raise ValueError("it goes on after its end")
    return content


def _check_state_dict(path: Path, content: object) -> Mapping[str, Tensor]:
    for _ in range(2):  # {"model": {"state_dict": ...}} at most: a pickle can contain itself
        if isinstance(content, Mapping):
            content = next((content[w] for w in _WRAPPERS if isinstance(content.get(w), Mapping)), content)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a state dict, but holds a {type(content).__name__}.")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} must hold tensors only, but its {name!r} is a {type(value).__name__}.")
    return content


def _match(path: Path, tensors: Iterable[str], own: Mapping[str, Tensor]) -> dict[str, str]:
    """Pair ResNet38's names with the file's, whatever one prefix the latter share: {own name: file name}."""
    found: dict[str, dict[str, str]] = {}
    for name in tensors:
        parts = torch_name(name).split(".")
        for start in (len(parts) - 2, len(parts) - 3):
            key = ".".join(parts[max(start, 0) :])
            if start >= 0 and key in own:
                twin = found.setdefault(".".join(parts[:start]), {}).setdefault(key, name)
                if twin != name:
                    raise ValueError(f"{path} holds {key} twice, as {twin!r} and as {name!r}.")
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
        missing = load_resnet38(model, weights).missing
        if missing:
            lacks = f"{os.fspath(weights)} lacks {len(missing)} tensors of ResNet38: {', '.join(missing[:3])}, ..."
            warnings.warn(f"{lacks} They keep their initial values.", stacklevel=2)
    return model
