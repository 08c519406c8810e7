"""MXNet's NDArray-list files (`.params`), in which ResNet38's ImageNet weights were published, without MXNet."""

from __future__ import annotations

import math
import os
import re
import struct
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

MAGIC = struct.pack("<Q", 0x112)
_DTYPES = ("<f4", "<f8", "<f2", "u1", "<i4", "i1", "<i8")
# An empty array takes 4 bytes of the file but 100 of memory, and an ASCII name with one emoji 4 a byte.
_MOST_ARRAYS, _LONGEST_NAME = 2**14, 2**10
_V1, _V2, _V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
_NAME = re.compile(
    r"(?:arg:|aux:)?(?:(?P<top>conv1a|bn7)|(?P<type>res|bn)(?P<level>\d)(?:a|b(?P<index>\d))_(?P<branch>branch\w+?))"
    r"_(?P<kind>weight|gamma|beta|moving_mean|moving_var)"
)
_KINDS = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_var": "running_var"}


def read_mxnet_params(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """Read an MXNet NDArray-list file (`.params`) of any version, without MXNet.

    Args:
        path: the file. It is read into memory once, and the arrays are views of it.

    Returns:
        The arrays under the file's names ("arg:conv1a_weight"), or "0", "1", ... where it has none. An array
        that MXNet saved as empty has shape (0,).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no such list, is damaged or holds sparse arrays; the message tells where.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> content = struct.pack("<3Q2I3i2fQ", 0x112, 0, 1, 1, 2, 1, 0, 0, 0.5, 2, 0)
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "tiny.params")
        ...     _ = path.write_bytes(content)
        ...     read_mxnet_params(path)
        {'0': array([0.5, 2. ], dtype=float32)}
    """
    reader = _Reader(Path(path))
    if reader.data[:8].tobytes() != MAGIC:
        reader.fail("is no MXNet parameter file: it does not begin with 0x112")
    reader.offset = 16
    count = reader.count("arrays", size=4)
    if count > _MOST_ARRAYS:
        reader.fail(f"lists {count} arrays, of which no network has more than {_MOST_ARRAYS}")
    arrays = [reader.array(i) for i in range(count)]
    named = reader.count("names", size=8)
    if named not in (0, count):
        reader.fail(f"has {count} arrays but {named} names")
    names = [reader.name(i) for i in range(named)] or [str(i) for i in range(count)]
    if reader.offset != len(reader.data):
        reader.fail(f"goes on for {len(reader.data) - reader.offset} bytes after its end")
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        reader.fail(f"has several arrays named {repeated[0]!r}")
    return dict(zip(names, arrays, strict=True))


class _Reader:
    """A file in memory and a position in it; every read checks that the bytes are there."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.offset = path, np.fromfile(path, np.uint8), 0

    def fail(self, problem: str) -> NoReturn:
        raise ValueError(f"{self.path} {problem} (byte {self.offset}).")

    def integers(self, code: str, what: str) -> tuple[int, ...]:
        size = struct.calcsize(f"<{code}")
        self.need(size, what)
        self.offset += size
        return struct.unpack_from(f"<{code}", self.data.data, self.offset - size)

    def need(self, size: int, what: str) -> None:
        if size > len(self.data) - self.offset:
            self.fail(f"is cut short: {what} takes {size} bytes, {len(self.data) - self.offset} are left")

    def count(self, what: str, *, size: int) -> int:
        (count,) = self.integers("Q", f"the number of {what}")
        self.need(count * size, f"the list of {count} {what}")
        return count

    def array(self, index: int) -> NDArray[Any]:
        what = f"array {index}"
        (version,) = self.integers("I", what)
        ndim = version
        if version in (_V2, _V3):
            storage, ndim = self.integers("ii", what)
            if storage != 0:
                self.fail(f"has a sparse {what} (storage type {storage}), only dense ones are supported")
        elif version == _V1:
            (ndim,) = self.integers("I", what)
        if ndim == (-1 if version == _V3 else 0):
            return np.empty(0, np.float32)
        if not 0 <= ndim <= 32:
            self.fail(f"has an {what} of {ndim} dimensions, a version that is unknown")
        shape = self.integers(f"{ndim}{'q' if version in (_V1, _V2, _V3) else 'I'}", f"the shape of {what}")
        _, _, code = self.integers("iii", f"the device and dtype of {what}")
        if not 0 <= code < len(_DTYPES):
            self.fail(f"has an {what} of unknown dtype {code}")
        dtype = np.dtype(_DTYPES[code])
        # The second test is for numpy, which rejects (0, 2**62) too.
        if min(shape, default=0) < 0 or math.prod(max(size, 1) for size in shape) >= 2**59:
            self.fail(f"has an {what} of impossible shape {shape}")
        self.need(math.prod(shape) * dtype.itemsize, f"the data of {what}, shape {shape},")
        view: NDArray[Any] = np.ndarray(shape, dtype, buffer=self.data, offset=self.offset)
        self.offset += view.nbytes
        return np.require(view, requirements="A")

    def name(self, index: int) -> str:
        length = self.count(f"bytes of name {index}", size=1)
        if length > _LONGEST_NAME:
            self.fail(f"has a name {index} of {length} bytes, of which none has more than {_LONGEST_NAME}")
        try:
            name = self.data[self.offset : self.offset + length].tobytes().decode()
        except UnicodeDecodeError as error:
            self.fail(f"has a name {index} that is not UTF-8: {error}")
        self.offset += length
        return name


def torch_name(name: str) -> str:
    """Translate a name of the published ResNet38 to `pixelss.backbones.resnet38`'s; any other stays as it is.

    Example:
        >>> torch_name("aux:bn4b3_branch2a_moving_var"), torch_name("arg:linear1000_weight")
        ('b4_3.bn_branch2a.running_var', 'arg:linear1000_weight')
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return name
    kind = _KINDS.get(match["kind"], match["kind"])
    if match["top"]:
        return f"{match['top']}.{kind}"
    index = f"_{match['index']}" if match["index"] else ""
    return f"b{match['level']}{index}.{'conv' if match['type'] == 'res' else 'bn'}_{match['branch']}.{kind}"
