"""The reader of MXNet's files against files that MXNet wrote, and hostile ones."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pixelss.backbones.checkpoints import resnet38
from pixelss.backbones.mxnet import read_mxnet_params, torch_name

GOLDEN = Path(__file__).parent.parent / "golden" / "mxnet"
DESCRIBED = json.loads((GOLDEN / "params.json").read_text())
MIB = 2**20
with torch.device("meta"), patch("torch.nn.init.kaiming_normal_"), patch("torch.nn.init.kaiming_uniform_"):
    # To pretend draws there takes a second
    META = resnet38()


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Tell, once the block has ended, how many bytes it held at most."""
    peaks: list[int] = []
    tracemalloc.start()
    try:
        yield lambda: peaks[0]
    finally:
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()


def mxnet_array(array: np.ndarray, version: int | None = 2) -> bytes:
    code = ["f4", "f8", "f2", "u1", "i4", "i1", "i8"].index(array.dtype.str[1:])
    shape, dims = array.shape, "q"
    head = {
        2: struct.pack("<Iii", 0xF993FAC9, 0, array.ndim),
        3: struct.pack("<Iii", 0xF993FACA, 0, array.ndim),
        1: struct.pack("<II", 0xF993FAC8, array.ndim),
        0: struct.pack("<I", array.ndim),
    }[version]
    dims = "q" if version else "I"
    return head + struct.pack(f"<{array.ndim}{dims}3i", *shape, 1, 0, code) + array.tobytes()


def mxnet_file(arrays: list[bytes], names: list[bytes]) -> bytes:
    body = b"".join(arrays) + struct.pack("<Q", len(names))
    return struct.pack("<3Q", 0x112, 0, len(arrays)) + body + b"".join(struct.pack("<Q", len(n)) + n for n in names)


def mxnet_bytes(state: dict[str, np.ndarray], version: int = 2) -> bytes:
    return mxnet_file([mxnet_array(a, version) for a in state.values()], [n.encode() for n in state])


def mxnet_name(key: str) -> str:
    """The published MXNet name of a torch name, by its own rule."""
    kinds = {"running_mean": "moving_mean", "running_var": "moving_var", "weight": "gamma", "bias": "beta"}
    *block, layer, kind = key.split(".")
    kind = kind if "conv" in layer else kinds[kind]
    where = "aux" if kind.startswith("moving") else "arg"
    if not block:
        return f"{where}:{layer}_{kind}"
    level, _, index = block[0][1:].partition("_")
    prefix, _, branch = layer.partition("_")
    return f"{where}:{ {'conv': 'res', 'bn': 'bn'}[prefix] }{level}{'b' + index if index else 'a'}_{branch}_{kind}"


@pytest.mark.parametrize("name", sorted(DESCRIBED))
def test_golden_files(name: str) -> None:
    arrays = read_mxnet_params(GOLDEN / name)
    found = {n: [list(a.shape), a.dtype.name, zlib.crc32(np.ascontiguousarray(a))] for n, a in arrays.items()}
    assert found == DESCRIBED[name]
    assert list(arrays) == list(DESCRIBED[name])
    assert all(a.flags.aligned for a in arrays.values())


def test_every_published_name() -> None:
    lines = []
    for key, tensor in META.state_dict().items():
        if key.endswith("num_batches_tracked"):
            lines.append(f"{key}  ")
        else:
            assert torch_name(mxnet_name(key)) == key
            lines.append(f"{key} {'x'.join(map(str, tensor.shape))} {mxnet_name(key)}")
    digest = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    assert digest == "528e7a365bcd6f4318d327f414e8a7a2655421ef44bc3c73b6530d3760fc9549"  # of the published files
    for other in ("arg:linear1000_weight", "arg:res8_branch", "bn4b33_branch2a_gamma", "xarg:conv1a_weight", ""):
        assert torch_name(other) == other


def test_names_spelled_out() -> None:
    assert torch_name("arg:conv1a_weight") == "conv1a.weight"
    assert torch_name("arg:res6a_branch2b2_weight") == "b6.conv_branch2b2.weight"
    assert torch_name("aux:bn4b5_branch2a_moving_mean") == "b4_5.bn_branch2a.running_mean"
    assert torch_name("arg:bn7_beta") == "bn7.bias"


@pytest.mark.parametrize("version", [0, 1, 2, 3])
@given(st.data())
def test_round_trip(path: Path, version: int, data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(1, 4), min_size=version != 3, max_size=4), max_size=3))
    dtypes = st.sampled_from(["f4", "f8", "f2", "u1", "i4", "i1", "i8"])
    arrays = {f"n{i}é": np.ones(s, data.draw(dtypes)) * (i + 1) for i, s in enumerate(shapes)}
    arrays = {name: np.asarray(a, a.dtype) for name, a in arrays.items()}
    path.write_bytes(mxnet_bytes(arrays, version))
    found = read_mxnet_params(path)
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert np.array_equal(found[name], array)


@pytest.mark.parametrize("empty", ["<Iii", "<II", "<I", "v3"])
def test_empty_arrays(path: Path, empty: str) -> None:
    head = {
        "<Iii": struct.pack("<Iii", 0xF993FAC9, 0, 0),
        "<II": struct.pack("<II", 0xF993FAC8, 0),
        "<I": struct.pack("<I", 0),
        "v3": struct.pack("<Iii", 0xF993FACA, 0, -1),
    }[empty]
    path.write_bytes(mxnet_file([head, mxnet_array(np.float32([[5]]))], []))
    found = read_mxnet_params(path)
    assert found["0"].shape == (0,)
    assert found["1"] == 5


def test_zero_sized_and_unaligned_arrays(path: Path) -> None:
    arrays = {"a": np.zeros((0, 3), np.float32), "b": np.uint8([1]), "c": np.float32([2, 3])}
    path.write_bytes(mxnet_bytes(arrays, 0))
    found = read_mxnet_params(path)
    assert found["a"].shape == (0, 3)
    assert found["c"].tolist() == [2, 3]
    assert found["c"].flags.aligned


V2 = struct.pack("<I", 0xF993FAC9)


ONE = mxnet_array(np.float32([1]))


HOSTILE_PARAMS = {
    "no array list": (struct.pack("<3Q", 0x112, 0, 1), "the list of 1 arrays takes 4 bytes, 0 are left"),
    "absurd array count": (struct.pack("<3Q", 0x112, 0, 2**63), f"the list of {2**63} arrays takes"),
    "absurd name count": (mxnet_file([ONE], [])[:-8] + struct.pack("<Q", 2**60), f"list of {2**60} names"),
    "absurd name length": (mxnet_file([ONE], [b"a"])[:-9] + struct.pack("<Q", 2**62) + b"a", "bytes of name 0 takes"),
    "fewer names": (mxnet_file([ONE, ONE], [b"a"]), "has 2 arrays but 1 names"),
    "names of nothing": (mxnet_file([], [b"a"]), "has 0 arrays but 1 names"),
    "duplicate names": (mxnet_file([ONE, ONE], [b"a", b"a"]), "several arrays named 'a'"),
    "not UTF-8": (mxnet_file([ONE], [b"\xff\xfe"]), "name 0 that is not UTF-8"),
    "sparse": (mxnet_file([V2 + struct.pack("<ii", 1, 1)], []), r"sparse array 0 \(storage type 1\)"),
    "absurd rank": (mxnet_file([V2 + struct.pack("<ii", 0, 2**31 - 1)], []), f"array 0 of {2**31 - 1} dimensions"),
    "negative rank": (mxnet_file([V2 + struct.pack("<ii", 0, -1)], []), "array 0 of -1 dimensions"),
    "unknown version": (mxnet_file([struct.pack("<I", 0xF993FACB)], []), "unknown"),
    "unknown dtype": (mxnet_file([V2 + struct.pack("<iiq3i", 0, 1, 1, 1, 0, 7)], []), "array 0 of unknown dtype 7"),
    "negative dtype": (mxnet_file([V2 + struct.pack("<iiq3i", 0, 1, 1, 1, 0, -1)], []), "unknown dtype -1"),
    "negative size": (mxnet_file([V2 + struct.pack("<ii2q3i", 0, 2, -1, -1, 1, 0, 0)], []), r"impossible shape \(-1"),
    "absurd size": (mxnet_file([V2 + struct.pack("<iiq3i", 0, 1, 2**58, 1, 0, 0)], []), "the data of array 0"),
    "zero times absurd": (mxnet_file([V2 + struct.pack("<ii2q3i", 0, 2, 0, 2**62, 1, 0, 0)], []), "impossible shape"),
    "trailing garbage": (mxnet_file([ONE], [b"a"]) + b"xyz", "goes on for 3 bytes after its end"),
    "other magic": (struct.pack("<3Q", 0x113, 0, 0) + bytes(8), "does not begin with 0x112"),
    "empty": (b"", "does not begin with 0x112"),
}


@pytest.mark.parametrize("case", HOSTILE_PARAMS)
def test_hostile_params(path: Path, case: str) -> None:
    content, message = HOSTILE_PARAMS[case]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} .*{message}.*byte \\d+"), peak_memory() as peak:
        read_mxnet_params(path)
    assert peak() < MIB // 8


@pytest.mark.parametrize("name", sorted(DESCRIBED))
def test_params_cut_at_any_byte(path: Path, name: str) -> None:
    content = (GOLDEN / name).read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"byte \d+"):
            read_mxnet_params(path)


@given(st.sampled_from(sorted(DESCRIBED)), st.lists(st.tuples(st.integers(0, 1434), st.binary(max_size=8)), max_size=3))
def test_mutated_params(path: Path, name: str, edits: list[tuple[int, bytes]]) -> None:
    content = bytearray((GOLDEN / name).read_bytes())
    for position, data in edits:
        content[position : position + len(data)] = data
    path.write_bytes(content)
    try:
        arrays = read_mxnet_params(path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert sum(a.nbytes for a in arrays.values()) <= len(content)


def test_memory_of_params(path: Path) -> None:
    path.write_bytes(mxnet_bytes({"a": np.ones(1, np.uint8), "b": np.ones(8 * MIB, np.float32)}, 0))
    size = path.stat().st_size
    with peak_memory() as peak:
        arrays = read_mxnet_params(path)
    assert size <= peak() <= 2 * size + 16 * MIB
    assert arrays["b"].sum() == 8 * MIB


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (struct.pack("<3Q", 0x112, 0, MIB) + bytes(4 * MIB + 8), "lists 1048576 arrays"),
        (struct.pack("<3QIQQ", 0x112, 0, 1, 0, 1, 4 * MIB) + "🐟".encode().ljust(4 * MIB), "name 0 of 4194304 bytes"),
    ],
    ids=["empty arrays", "one name"],
)
def test_memory_of_params_that_grow_when_read(path: Path, content: bytes, problem: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=problem), peak_memory() as peak:
        read_mxnet_params(path)
    assert peak() <= 2 * len(content)
