"""Weight files of any origin: read without running anything in them, and their names matched with a network's.

The files come from strangers. The format is told by the content, nothing in a file is executed and no size is
believed before it is checked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from pixelss.backbones.mxnet import MAGIC, read_mxnet_params

# Where trainers keep the state dict; an average of the weights goes before the weights.
_OUTER = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model_state_dict",
    "model",
    "teacher",
    "student",
    "net",
    "module",
)
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"}
_FOREIGN = re.compile(r"Unsupported global: GLOBAL (\S+)")


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """Return the tensors of a weight file by their names, outside of any dict that wraps them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of no known format, or holds something else.
    """
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
        message = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # torch prints parts of it in bold
        reader = "safetensors" if safe else "torch.load(weights_only=True)"
        foreign = _FOREIGN.search(message)
        if foreign:
            raise ValueError(
                f"{path} holds more than tensors: {reader} rejects its {foreign[1]}, which could run code. If you "
                "trust the file, load it yourself with weights_only=False and save its state dict alone by torch.save."
            ) from error
        first_line = message.partition("\n")[0]
        raise ValueError(f"{path} is damaged or unsafe, {reader} rejects it: {first_line}") from error
    return _state_dict(str(path), content)


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
    with path.open("rb") as file, _arguments_allowed():
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


@contextmanager
def _arguments_allowed() -> Iterator[None]:
    """Let torch read argparse.Namespace, which runs nothing: timm's and many other trainers save their arguments."""
    if not hasattr(torch.serialization, "safe_globals"):  # torch 2.4
        yield
        return
    with torch.serialization.safe_globals([argparse.Namespace]):
        yield


def _state_dict(path: str, content: object) -> Mapping[str, Tensor]:
    for _ in range(2):  # {"model": {"state_dict": ...}} at most: a pickle can contain itself
        if isinstance(content, Mapping):
            content = next((content[w] for w in _OUTER if isinstance(content.get(w), Mapping)), content)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a state dict, but holds a {type(content).__name__}.")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} must hold tensors only, but its {name!r} is a {type(value).__name__}.")
    return content


def unwrapped(name: str) -> str:
    """Return a tensor's name without what DistributedDataParallel, FSDP, checkpointing and torch.compile put in.

    Example:
        >>> unwrapped("module.b2._checkpoint_wrapped_module.conv.weight")
        'b2.conv.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def under_prefixes(
    path: str | os.PathLike[str], names: Mapping[str, str], own: Collection[str]
) -> dict[str, dict[str, str]]:
    """Find a network's own names at the end of a file's: {prefix: {own name: file's name}}.

    Args:
        path: for the message.
        names: the file's names as they are, and as they shall be read.
        own: the network's names.

    Raises:
        ValueError: two of the file's names stand for one of the network's, under one prefix.

    Example:
        >>> under_prefixes("a.pth", {"net.fc.bias": "net.fc.bias"}, {"fc.bias", "bias"})
        {'net': {'fc.bias': 'net.fc.bias'}, 'net.fc': {'bias': 'net.fc.bias'}}
    """
    found: dict[str, dict[str, str]] = {}
    for name, read_as in names.items():
        parts = read_as.split(".")
        for start in range(len(parts)):
            key = ".".join(parts[start:])
            if key in own:
                twin = found.setdefault(".".join(parts[:start]), {}).setdefault(key, name)
                if twin != name:
                    raise ValueError(f"{path} holds {key} twice, as {twin!r} and as {name!r}.")
    return found
