"""Weight files of ResNet38: every layout, faults and hostile files."""

from __future__ import annotations

import copy
import pickle
import random
import re
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from pixelss.backbones.checkpoints import load_resnet38, resnet38
from pixelss.backbones.mxnet import read_mxnet_params
from pixelss.backbones.resnet38 import ResNet38
from tests.backbones.test_mxnet import META, mxnet_bytes, mxnet_name

pytestmark = pytest.mark.filterwarnings("ignore:.*lacks .* tensors of ResNet38")

SIGNATURES = {
    "LoadReport": "(loaded, skipped, missing)",
    "load_resnet38": "(model, path)",
    "resnet38": "(weights=None)",
}

BLOCKS = {
    "load_resnet38": "reads a file into a network, no tensor",
    "resnet38": "builds a network: see `ResNet38`",
}


def filled(value: float) -> ResNet38:
    """Return a ResNet38 of one number: to draw 105 million takes seconds."""
    network = copy.deepcopy(META).to_empty(device="cpu")
    with torch.no_grad():
        for i, tensor in enumerate(network.state_dict().values()):
            tensor.fill_(value * i)
    return network


@pytest.fixture(scope="module")
def model() -> ResNet38:
    return filled(0.0)


def tensors() -> dict[str, Tensor]:
    """A few tensors of ResNet38 and a classifier."""
    g = torch.Generator().manual_seed(0)
    names = ("conv1a.weight", "b2.bn_branch2a.running_var", "b4_3.bn_branch2b1.weight", "bn7.bias")
    state = {name: torch.rand(META.state_dict()[name].shape, generator=g) for name in names}
    return {**state, "fc8.weight": torch.rand(3, 2, generator=g)}


@given(st.binary(max_size=200), st.booleans())
def test_arbitrary_bytes(path: Path, model: ResNet38, content: bytes, magic: bool) -> None:
    path.write_bytes(struct.pack("<Q", 0x112) * magic + content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_resnet38(model, path)


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
    other = {  # one number each in the file, which would have 420 MB
        name: tensor.new_tensor(i).div(2).to(tensor.dtype).expand(tensor.shape)
        for i, (name, tensor) in enumerate(model.state_dict().items())
    }
    torch.save(other, path)
    report = load_resnet38(model, path)
    assert (len(report.loaded), report.skipped, report.missing) == (228, (), ())
    for name, tensor in other.items():
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
    "code": (
        change(evil=Evil()),
        r"more than tensors: torch.load\(weights_only=True\) rejects its (builtins\.)?getattr",  # the room: torch 2.4
    ),
    "module": (nn.Linear(2, 2), r"rejects its torch\.nn\.modules\.linear\.Linear"),
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
    assert isinstance(assert_rejected(model, path, "rejects its").__cause__, pickle.UnpicklingError)
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


@pytest.mark.usefixtures("no_draws")
def test_weights_file(tmp_path: Path) -> None:
    path = tmp_path / "partial.pth"
    torch.save({"bn7.bias": torch.full((4096,), 3.0)}, path)
    with pytest.warns(UserWarning, match=r"partial\.pth lacks 190 tensors of ResNet38: conv1a\.weight, "):
        assert resnet38(path).bn7.bias.eq(3).all()
    torch.save({"other": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no tensor of ResNet38"):
        resnet38(path)
