"""Files of `np.save` and `pickle.dump` by strangers: numbers, containers, arrays, tensors; nothing in them runs."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def load_arrays(path: Path) -> object:
    """Return what a .npy or pickle file holds, by the restricted unpickler."""
    with path.open("rb") as file:
        start = file.read(6)
        file.seek(0)
        try:
            if start != b"\x93NUMPY":
                return _Unpickler(file).load()
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(file)
            if not dtype.hasobject:
                file.seek(0)
                return np.load(file, allow_pickle=False)
            content = _Unpickler(file).load()
        except _RefusedError:
            raise
        except Exception as error:
            raise ValueError(f"{path} is no file of np.save or pickle, or is damaged ({error}).") from error
    return content.item() if isinstance(content, np.ndarray) and content.shape == shape == () else content


class _RefusedError(ValueError):
    """Content that could run code."""


class _Unpickler(pickle.Unpickler):
    """Builds numpy arrays, tensors and Python's own containers alone: no other name is looked up."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="latin1")  # arrays of Python 2 need it
        self.name = getattr(file, "name", "the file")

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")
        if (module, name) not in _ALLOWED:
            raise _RefusedError(
                f"{self.name} wants {module}.{name}, which could run code: numbers, arrays and tensors alone are read."
            )
        return _ALLOWED[module, name]()


class _DType:
    """A dtype as a pickle describes it: numpy would believe any description, of pointers where there are bytes too."""

    def __init__(self, code: str, *_: object) -> None:
        self.code: str = code
        self.order: Any = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.order, *parts = state[:5]
        if any(part is not None for part in parts):  # subarray, names, fields
            raise ValueError("an array of records")

    def numpy(self) -> np.dtype[Any]:
        """Return numpy's own dtype of this code and byte order: numbers, strings or objects."""
        dtype = np.dtype(self.code).newbyteorder(self.order)
        if dtype.kind not in "biufcSUO":
            raise ValueError(f"an array of {dtype}")
        return dtype


class _Array(np.ndarray[Any, Any]):
    """An array whose content a pickle sets, checked: numpy reads past the end of a list that is too short."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *version, shape, dtype, fortran, content = state
        dtype = dtype.numpy()
        if dtype.hasobject != isinstance(content, list) or (dtype.hasobject and len(content) != prod(shape)):
            raise ValueError(f"an array of {dtype} and shape {shape} from a {type(content).__name__}")
        super().__setstate__((*version, shape, dtype, fortran, content))


# What a pickle of arrays and tensors calls, as functions that cannot be turned against us. They are made anew for every
# file, as a pickle can set attributes of what it is given.
_ALLOWED: dict[tuple[str, str], Callable[[], Any]] = {
    ("numpy", "ndarray"): lambda: None,  # an argument of _reconstruct, never called
    ("numpy", "dtype"): lambda: lambda *args: _DType(*args),
    ("numpy._core.multiarray", "_reconstruct"): lambda: lambda *_: _Array(0, np.int8),  # filled by its __setstate__
    ("numpy._core.multiarray", "scalar"): lambda: lambda dtype, content: np.frombuffer(content, dtype.numpy())[0],
    ("numpy._core.numeric", "_frombuffer"): lambda: lambda *args: _from_buffer(*args),  # of protocol 5
    ("collections", "OrderedDict"): lambda: OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): lambda: lambda *args: torch._utils._rebuild_tensor_v2(*args),
    ("torch.storage", "_load_from_bytes"): lambda: lambda content: _storage(content),
    ("_codecs", "encode"): lambda: lambda text, _: text.encode("latin1"),  # the bytes of protocols below 3
}


def _storage(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _from_buffer(buffer: Any, dtype: _DType, shape: Any, order: Any) -> NDArray[Any]:
    return np.frombuffer(buffer, dtype.numpy()).reshape(shape, order=order).copy(order=order)
