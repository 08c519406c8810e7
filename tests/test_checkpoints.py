"""Weight files: the MXNet reader against files that MXNet wrote, every layout, and hostile files."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import re
import struct
import tracemalloc
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from pixelss.backbones.checkpoints import load_resnet38, resnet38
from pixelss.backbones.mxnet import read_mxnet_params, torch_name
from pixelss.backbones.resnet38 import ResNet38

GOLDEN = Path(__file__).parent / "golden" / "mxnet"
DESCRIBED = json.loads((GOLDEN / "params.json").read_text())
MIB = 2**20

with torch.device("meta"):
    META = resnet38()


@pytest.fixture(scope="module")
def model() -> ResNet38:
    return resnet38()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file, written anew by each test."""
    return tmp_path_factory.mktemp("weights") / "weights"


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


def tensors() -> dict[str, Tensor]:
    """A few tensors of ResNet38 and a classifier."""
    g = torch.Generator().manual_seed(0)
    names = ("conv1a.weight", "b2.bn_branch2a.running_var", "b4_3.bn_branch2b1.weight", "bn7.bias")
    state = {name: torch.rand(META.state_dict()[name].shape, generator=g) for name in names}
    return {**state, "fc8.weight": torch.rand(3, 2, generator=g)}


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


# --- MXNet -----------------------------------------------------------------------------------------------------


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


@given(st.binary(max_size=200), st.booleans())
def test_arbitrary_bytes(path: Path, model: ResNet38, content: bytes, magic: bool) -> None:
    path.write_bytes(struct.pack("<Q", 0x112) * magic + content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_resnet38(model, path)


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


# --- every layout ----------------------------------------------------------------------------------------------


def save_mxnet(state: dict[str, Tensor], path: Path) -> None:
    names = {k: mxnet_name(k) if k in META.state_dict() else "arg:linear1000_weight" for k in state}
    path.write_bytes(mxnet_bytes({names[k]: v.numpy() for k, v in state.items()}))


def save_legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


LAYOUTS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "mxnet": save_mxnet,
    "plain": torch.save,
    "legacy": save_legacy,
    "safetensors": save_file,
    "ordered": lambda s, p: torch.save(OrderedDict(s), p),
    "parameters": lambda s, p: torch.save({k: nn.Parameter(v) for k, v in s.items()}, p),
    "state_dict": lambda s, p: torch.save({"state_dict": s, "epoch": 3, "optimizer": {"lr": 0.1}}, p),
    "model": lambda s, p: save_legacy({"model": s, "arch": "resnet38"}, p),
    "twice": lambda s, p: torch.save({"model": {"state_dict": s}}, p),
    "module": lambda s, p: torch.save(prefixed("module.", s), p),
    "backbone": lambda s, p: save_file({**prefixed("module.net.0.", s), "module.net.1.weight": torch.zeros(2)}, p),
    "double": lambda s, p: torch.save({k: v.double() for k, v in s.items()}, p),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.ModuleDict({"a": nn.Sequential(m, nn.Conv2d(4096, 2, 1))})])
def test_layouts(model: ResNet38, path: Path, layout: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    state = tensors()
    with torch.no_grad():
        for name in state.keys() & model.state_dict().keys():
            model.state_dict()[name].zero_()
    LAYOUTS[layout](state, path)
    untouched = model.b7.conv_branch1.weight._version
    report = load_resnet38(wrap(model), path)
    assert report.loaded == tuple(name for name in state if name != "fc8.weight")
    assert all("fc8" in name or "linear1000" in name or ".1." in name for name in report.skipped)
    assert len(report.skipped) == 1 + (layout == "backbone")
    assert len(report.missing) == 191 - 4
    assert not any("num_batches_tracked" in name for name in report.missing)
    assert set(report.missing).isdisjoint(report.loaded)
    for name in report.loaded:
        assert torch.equal(model.state_dict()[name], state[name])
    assert model.b7.conv_branch1.weight._version == untouched


def test_whole_state_dict(model: ResNet38, path: Path) -> None:
    other = resnet38()
    torch.save(other.state_dict(), path)
    report = load_resnet38(model, path)
    assert (len(report.loaded), report.skipped, report.missing) == (228, (), ())
    for name, tensor in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_published_heads_are_skipped(model: ResNet38, path: Path) -> None:
    heads = {name: torch.zeros(2) for name in ("fc8.weight", "fc9.weight", "bn8.bias", "f8_3.weight", "fc_proj.weight")}
    torch.save({**tensors(), **heads}, path)
    assert set(load_resnet38(model, path).skipped) == set(heads)


# --- faults ----------------------------------------------------------------------------------------------------


def change(**entries: object) -> dict[str, object]:
    return {**tensors(), **{name.replace("__", "."): value for name, value in entries.items()}}


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("/nowhere/evil"),)


LOOP: dict[str, object] = {}
LOOP["model"] = LOOP
BIAS = torch.ones(4096)
FAULTS: dict[str, tuple[object, str]] = {
    "shape": (change(bn7__bias=torch.ones(4095)), r"'bn7.bias' must be of shape \(4096,\), but is \(4095,\)"),
    "empty tensor": (change(bn7__bias=torch.ones(0)), "'bn7.bias' must be of shape"),
    "integer": (change(bn7__bias=BIAS.int()), "'bn7.bias' must be torch.float32, but is torch.int32"),
    "complex": (change(bn7__bias=BIAS.to(torch.complex64)), "'bn7.bias' must be torch.float32, but is torch.complex64"),
    "float counter": (change(bn7__num_batches_tracked=torch.tensor(1.0)), "must be torch.int64, but is torch.float32"),
    "nan": (change(bn7__bias=BIAS.where(BIAS.cumsum(0) != 9, torch.nan)), "'bn7.bias' must be finite in torch.float32"),
    "infinite": (change(bn7__bias=BIAS * torch.inf), "'bn7.bias' must be finite"),
    "overflow": (change(bn7__bias=BIAS.double() * 1e300), "'bn7.bias' must be finite in torch.float32"),
    "sparse": (change(bn7__bias=BIAS.to_sparse()), "'bn7.bias' must be a plain tensor in memory"),
    "meta": (change(bn7__bias=BIAS.to("meta")), "'bn7.bias' must be a plain tensor in memory, but is .* on meta"),
    "non-tensor": (change(epoch=3), "must hold tensors only, but its 'epoch' is a int"),
    "name": ({3: BIAS}, "must hold tensors only, but its 3 is a Tensor"),
    "list": ([BIAS], "must hold a state dict, but holds a list"),
    "loop": (LOOP, "its 'model' is a dict"),
    "nothing": ({}, "holds no tensor of ResNet38"),
    "stranger": ({"fc8.weight": BIAS}, "holds no tensor of ResNet38"),
    "two networks": (
        {"student.bn7.bias": BIAS, "teacher.bn7.bias": BIAS},
        r"several ResNet38, under \['student', 'teac",
    ),
    "twice": (change(bn7_beta=BIAS), "holds bn7.bias twice, as 'bn7.bias' and as 'bn7_beta'"),
    "code": (change(evil=Evil()), r"damaged or unsafe, torch.load\(weights_only=True\) rejects it"),
    "module": (nn.Linear(2, 2), "damaged or unsafe"),
}


def assert_rejected(model: ResNet38, path: Path, message: str | None = None) -> ValueError:
    before = [tensor._version for tensor in model.state_dict().values()]
    with pytest.raises(ValueError, match=message) as caught:
        load_resnet38(model, path)
    assert str(caught.value).startswith(str(path))
    assert [tensor._version for tensor in model.state_dict().values()] == before
    return caught.value


@pytest.mark.parametrize("save", [torch.save, save_legacy])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.filterwarnings("ignore:.*(pickle|sparse):UserWarning")
def test_faults(model: ResNet38, path: Path, fault: str, save: Callable[[object, Path], None]) -> None:
    content, message = FAULTS[fault]
    save(content, path)
    assert_rejected(model, path, message)


def test_faults_name_their_cause(model: ResNet38, path: Path) -> None:
    torch.save(Evil(), path)
    assert isinstance(assert_rejected(model, path, "unsafe").__cause__, pickle.UnpicklingError)
    path.write_bytes(struct.pack("<Q", 2) + b"{x")
    assert type(assert_rejected(model, path, "safetensors rejects it").__cause__).__name__ == "SafetensorError"


def test_two_mxnet_names_of_one_tensor(model: ResNet38, path: Path) -> None:
    bias = BIAS.numpy()
    path.write_bytes(mxnet_bytes({"arg:bn7_beta": bias, "aux:bn7_beta": bias}))
    assert_rejected(model, path, "holds bn7.bias twice, as 'arg:bn7_beta' and as 'aux:bn7_beta'")


def test_repeated_name_in_safetensors(model: ResNet38, path: Path) -> None:
    entry = b'"bn7.bias":{"dtype":"F32","shape":[4096],"data_offsets":[0,16384]}'
    header = b"{" + entry + b"," + entry + b"}"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16384))
    assert_rejected(model, path, "its header names 'bn7.bias' 2 times")


@pytest.mark.parametrize("head", [b"", b"PK\x03\x04", b"\x80", b"\x80\x02", b"<html>404 not found", b"\x00" * 64])
def test_other_files(model: ResNet38, path: Path, head: bytes) -> None:
    path.write_bytes(head)
    assert_rejected(model, path, "neither an MXNet, a torch nor a safetensors file|damaged or unsafe")


CONTAINERS = {"zip": torch.save, "legacy": save_legacy, "safetensors": save_file, "mxnet": save_mxnet}


@pytest.mark.parametrize("container", CONTAINERS)
def test_cut_or_continued(model: ResNet38, path: Path, container: str) -> None:
    CONTAINERS[container](tensors(), path)
    content = path.read_bytes()
    cuts = [*range(0, len(content), 997), *range(0, 300, 13), *range(len(content) - 300, len(content), 7)]
    for cut in sorted({*cuts, len(content) - 1}):
        path.write_bytes(content[:cut])
        assert_rejected(model, path)
    for garbage in (b"x", b"PK\x05\x06" * 9, bytes(70_000)):
        path.write_bytes(content + garbage)
        assert_rejected(model, path)


@pytest.mark.parametrize("container", CONTAINERS)
def test_mutated(model: ResNet38, path: Path, container: str) -> None:
    CONTAINERS[container](tensors(), path)
    content = path.read_bytes()
    draw = random.Random(0)
    for _ in range(150):
        mutated = bytearray(content)
        for _ in range(draw.choice((1, 3))):
            near = min(1200, len(content))
            position = draw.choice((draw.randrange(near), len(content) - 1 - draw.randrange(near)))
            mutated[position] = draw.randrange(256)
        path.write_bytes(mutated)
        try:
            load_resnet38(model, path)
        except ValueError as error:
            assert str(error).startswith(str(path))  # noqa: PT017


def test_missing_file(model: ResNet38, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_resnet38(model, tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError):
        read_mxnet_params(tmp_path / "nowhere.params")


def test_bad_model(model: ResNet38, path: Path) -> None:
    torch.save(tensors(), path)
    with pytest.raises(TypeError, match="exactly one ResNet38, but Linear contains 0"):
        load_resnet38(nn.Linear(2, 2), path)
    with pytest.raises(TypeError, match="exactly one ResNet38, but ModuleList contains 2"):
        load_resnet38(nn.ModuleList([model, META]), path)
    with pytest.raises(ValueError, match='"meta" device'):
        load_resnet38(META, path)
