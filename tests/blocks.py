"""The entries of all test files, collected: from them test_promises makes its tests, and nothing is listed elsewhere.

The test file of a module (`src/pixelss/losses/direct.py` has `tests/losses/test_direct.py`) exports, for every public
name that the module defines,

- `SIGNATURES[name]`, the contract;
- `BLOCKS[name]`: a `Block`, or one line that says why no promise concerns it. "name setting" is a further entry.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import pixelss
from pixelss import io, viz
from tests.strategies import Batch, make_batch

TESTS = Path(__file__).parent
PACKAGE = Path(pixelss.__file__).parent


# What an entry may be let off, with its reason; determinism, empty batches and inputs left alone hold for all.
PROMISES = {
    "dtype": "float32 and float64 inputs give results of their dtype",
    "half": "half precision and autocast are computed in float32",
    "gradient": "the gradient with respect to every floating input is that of finite differences",
    "compile": "torch.compile gives the same, in one graph where nothing waits",
    "no wait": "no branch on values: one graph, no wait for the device",
    "finite": "a non-finite CAM value counts as no activation",
    "void": "a mask value outside 0..N is void",
    "checks": "a tensor of another rank or device is refused by name",
}


class Block(NamedTuple):
    """How a public name is called on a batch, and which promises do not hold for it.

    `call` takes the batch, and the module that `make` builds where it is given, in the batch's dtype and on its device.
    `oracle` takes the same and is written in loops: every loss has one, and whatever cites an equation. `but` maps
    promises to the reason of their absence; test_promises expects the block to break them. A scalar is a loss.
    `inductor` compiles it to machine code too, which takes seconds: for what a training step compiles. `compiled_by`
    names the entry of another setting whose graph has all of this one's, where compiling takes seconds: that one is
    compiled for both.
    """

    call: Callable[..., Tensor]
    oracle: Callable[..., Tensor] | None = None
    make: Callable[[Batch], nn.Module] | None = None
    but: Mapping[str, str] = {}
    inductor: bool = False
    compiled_by: str = ""

    def on(self, batch: Batch, *, oracle: bool = False) -> Callable[[Batch], Tensor]:
        """Return the call, or its oracle, as a function of batches that are like this one in dtype and device."""
        call = self.oracle if oracle else self.call
        if self.make is None:
            return call
        before = torch.get_default_dtype()
        torch.set_default_dtype(batch.features.dtype)
        try:
            with torch.device(batch.features.device):
                torch.manual_seed(0)
                module = self.make(batch)
        finally:
            torch.set_default_dtype(before)
        return lambda b: call(b, module)


def modules() -> list[str]:
    """Return the dotted name below pixelss of every module, packages left out."""
    files = PACKAGE.rglob("*.py")
    return sorted(".".join(f.relative_to(PACKAGE).with_suffix("").parts) for f in files if f.name != "__init__.py")


def path_of_tests(module: str) -> Path:
    """Return where the tests of a module lie: losses.direct has losses/test_direct.py, _maps has test_maps.py."""
    *folder, name = module.split(".")
    return TESTS.joinpath(*folder, f"test_{name.lstrip('_')}.py")


def import_tests(module: str) -> ModuleType:
    """Import the test file of a module."""
    return importlib.import_module(".".join(["tests", *path_of_tests(module).relative_to(TESTS).with_suffix("").parts]))


def home(value: Any) -> str:
    """Return the module below pixelss that defines a public name."""
    return str(value.__module__).removeprefix("pixelss.")


def collect(what: str) -> dict[str, Any]:
    """Return one dictionary of the entries `what` of all test files that exist."""
    entries: dict[str, Any] = {}
    for module in modules():
        if path_of_tests(module).exists():
            own = getattr(import_tests(module), what, {})
            assert not entries.keys() & own.keys()
            entries |= own
    return entries


class _Watched(Batch):
    """A batch that notes which of its fields are read."""

    read: ClassVar[set[str]]

    def __getattribute__(self, name: str) -> Any:
        if name in Batch._fields:
            type(self).read.add(name)
        return super().__getattribute__(name)

    def __iter__(self) -> Iterator[Any]:
        type(self).read.update(Batch._fields)
        return super().__iter__()


@cache
def run_once(name: str) -> tuple[Tensor, list[str]]:
    """Return what a block gives for a batch, and the fields of the batch that it reads: no other concerns it."""
    batch = make_batch()
    block = blocks()[name].on(batch)
    _Watched.read = set()
    value = block(_Watched(*batch))
    return value, [field for field in Batch._fields if field in _Watched.read]


PUBLIC = {name: getattr(pixelss, name) for name in pixelss.__all__}
PUBLIC |= {name: value for room in (io, viz) for name in room.__all__ if callable(value := getattr(room, name))}
RESULTS = {name for name, value in PUBLIC.items() if inspect.isclass(value) and issubclass(value, tuple)}
WRAPPERS = {  # Modules that keep the settings of a function, by what their docstring says
    name: match[1] for name, value in PUBLIC.items() if (match := re.match(r"`(\w+)` with its", inspect.getdoc(value)))
}


@cache
def blocks() -> dict[str, Block]:
    """Return every entry that is a `Block`."""
    return {name: entry for name, entry in collect("BLOCKS").items() if isinstance(entry, Block)}
