"""Pickles of strangers: what comes back, and what is never run."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from pixelss._unpickle import load_arrays

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


def save(path: Path, content: object, protocol: int | None) -> Path:
    """Write by `np.save`, or by `pickle.dump` with a protocol."""
    if protocol is None:
        np.save(path.with_suffix(".npy"), content, allow_pickle=True)
        return path.with_suffix(".npy")
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def native(array: object) -> object:
    """Return the dtype in this machine's byte order, as protocols below 5 give it."""
    return array.dtype.newbyteorder("=") if hasattr(array.dtype, "newbyteorder") else array.dtype


PROTOCOLS = pytest.mark.parametrize("protocol", [None, *range(6)])


@PROTOCOLS
@pytest.mark.parametrize(
    "array", [ARRAY, np.asfortranarray(ARRAY), ARRAY.astype(">f2"), torch.tensor([[1.5]]), np.int64(4)]
)
def test_arrays_come_back_and_can_be_written_to(array, protocol, tmp_path):
    content = OrderedDict(x=[array, (1, 2.5, "a", None)])
    loaded = load_arrays(save(tmp_path / "x", content, protocol))
    assert type(loaded) is OrderedDict
    found, rest = loaded["x"]
    assert rest == (1, 2.5, "a", None)
    assert (native(found), found.tolist()) == (native(array), array.tolist())
    if found.ndim:
        found[0, 0] = 7
        assert found[0, 0] == 7


def test_a_plain_array_of_np_save(tmp_path):
    np.save(tmp_path / "x.npy", ARRAY)
    assert load_arrays(tmp_path / "x.npy").tolist() == ARRAY.tolist()


class Call:
    def __init__(self, function, *args, state=None):
        self.call = function, args, state

    def __reduce__(self):
        return self.call


@PROTOCOLS
@pytest.mark.parametrize(
    "call",
    [
        Call(os.system, "touch RAN"),
        Call(eval, "open('RAN', 'w')"),
        Call(np.load, "other.npy", None, True),
        Call(torch.load, "other.pt"),
        Call(getattr, "x", "upper"),
        Call(Path, "RAN"),
    ],
    ids=["system", "eval", "np.load", "torch.load", "getattr", "Path"],
)
def test_nothing_runs(call, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in ({1: call}, call, {"keys": call, "high_res": ARRAY}):
        path = save(tmp_path / "x", content, protocol)
        with pytest.raises(ValueError, match=r"x.* wants .*\w+\.\w+, which could run code"):
            load_arrays(path)
    assert not (tmp_path / "RAN").exists()


def test_a_tensor_inside_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inner = tmp_path / "inner.pt"
    torch.save(Call(os.system, "touch RAN"), inner)
    path = save(tmp_path / "x", {1: Call(torch.storage._load_from_bytes, inner.read_bytes())}, 2)
    with pytest.raises(ValueError, match="damaged"):
        load_arrays(path)
    assert not (tmp_path / "RAN").exists()


def test_a_file_changes_nothing_of_ours(tmp_path):
    before = torch._utils._rebuild_tensor_v2.__defaults__
    # The attribute __defaults__ of the function, by the opcode BUILD with a state of slots.
    code = b"ctorch._utils\n_rebuild_tensor_v2\n(N}X\x0c\x00\x00\x00__defaults__(I1\ntstb."
    (tmp_path / "x").write_bytes(b"\x80\x02" + code)
    assert load_arrays(tmp_path / "x").__defaults__ == (1,)  # of a function made for this file
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before


CORE = np._core if hasattr(np, "_core") else np.core  # its name before numpy 2


def forged(code: str, elements: object = None, order: str = "<", names: object = None) -> Call:
    """Return a dtype with a state that is not its own: numpy takes what it says of objects and sizes for true."""
    return Call(np.dtype, code, False, True, state=(3, order, None, names, elements, -1, -1, 0))


def array(dtype: object, content: object, shape: tuple[int, ...] = (2,)) -> Call:
    return Call(CORE.multiarray._reconstruct, np.ndarray, (0,), b"b", state=(1, shape, dtype, False, content))


RAW = b"\x10" * 16  # two pointers to nowhere, if they were any
OBJECTS = Call(np.dtype, "O8", False, True)


@pytest.mark.parametrize(
    "content",
    [
        array(forged("O8"), RAW),
        Call(CORE.numeric._frombuffer, RAW, forged("O8"), (2,), "C"),
        Call(CORE.multiarray.scalar, forged("O8"), RAW[:8]),
        array(OBJECTS, [1.0], shape=(5000,)),
        array(OBJECTS, [1.0], shape=(-1, -1)),
        array(forged("V8", {"a": (OBJECTS, 0)}, "|", ("a",)), RAW[:8], shape=(1,)),
        array(forged("V8", {"a": (Call(np.dtype, "f8"), 1 << 40)}, "|", ("a",)), RAW[:8], shape=(1,)),
        array(Call(np.dtype, "i4,O"), RAW),
        array(Call(np.dtype, "f8"), [1.0, 2.0]),
        array(Call(np.dtype, "f8"), RAW[:8]),
    ],
    ids=["array", "buffer", "scalar", "short list", "negative", "field", "offset", "record", "list", "short"],
)
def test_forged_arrays_are_refused_before_they_are_read(content, tmp_path):
    (tmp_path / "x").write_bytes(pickle.dumps({1: content}, 4))
    with pytest.raises(ValueError, match="is damaged"):
        print(load_arrays(tmp_path / "x"))
