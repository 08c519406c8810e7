"""Damaged and wrong weight files: read right, or refused by name.

    python tests/backbones/fuzz.py --count 10000 --seed 0

Nine in ten are damaged copies of files in every layout, some of them of other
readers (networks of timm, CAMs of other code); one in ten is a whole file with
a tensor that does not belong there.
"""

from __future__ import annotations

import pickle
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from pixelss.backbones import load_resnet38, timm_backbone
from pixelss.backbones.mxnet import read_mxnet_params
from pixelss.io import read_cam
from tests.backbones.test_checkpoints import filled, prefixed, save_legacy, save_mxnet, tensors
from tests.mutations import fuzz, mutated

CAM = np.random.default_rng(0).random((2, 8, 9)).astype(np.float32)
TIMM = "test_convnext"  # the smallest of timm's
NESTED: dict[str, Any] = {"epoch": 3, "optimizer": {"lr": 0.1}}
RESNET38: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "mxnet": save_mxnet,
    "zip": torch.save,
    "zip, nested": lambda state, path: torch.save({"state_dict": state, **NESTED}, path),
    "legacy": save_legacy,
    "safetensors": lambda state, path: save_file(prefixed("module.", state), path),
}
CAMS: dict[str, Callable[[Path], object]] = {
    "npy": lambda path: np.save(path.open("wb"), np.array({3: CAM[0], 7: CAM[1]}, dtype=object), allow_pickle=True),
    "pickle": lambda path: path.write_bytes(pickle.dumps({3: CAM[0], 7: torch.from_numpy(CAM[1])}, 2)),
    "keys": lambda path: path.write_bytes(pickle.dumps({"keys": np.array([3, 7]), "high_res": CAM}, 4)),
}


def wrong_tensors(state: dict[str, Tensor], rng: random.Random) -> tuple[dict[str, Tensor], bool]:
    """Return a state with one odd tensor in the place of a right one or beside it, and whether it must be refused."""
    name = rng.choice([name for name in state if name != "fc8.weight"])
    own = state[name]
    odd: dict[str, Callable[[], Tensor]] = {
        "longer": lambda: torch.cat([own, own]),
        "one dimension more": lambda: own[None].clone(),
        "empty": lambda: own[:0],
        "a number": lambda: own.sum(),
        "integers": lambda: own.int(),
        "bool": lambda: own > 0,
        "complex": lambda: own.to(torch.complex64),
        "nan": lambda: own.where(own != own.flatten()[rng.randrange(own.numel())], torch.nan),
        "infinite": lambda: own * torch.inf,
        "too large for float32": lambda: own.double() * 1e300,
        "double": own.double,
        "half": own.half,
        "bfloat16": own.bfloat16,
    }
    kind = rng.choice(list(odd))
    if rng.random() < 0.2:  # a stranger's tensor, whatever it is, is left out
        return {**state, f"other.{rng.randrange(9)}.weight": odd[kind]()}, False
    return {**state, name: odd[kind]()}, kind not in ("double", "half", "bfloat16")


class Fuzz:
    """Trials over one scratch file; number i is the same whatever came before it.

    Args:
        folder: for the file.
        seed: of all random choices.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.path, self.seed = folder / "weights.bin", seed
        self.model, self.state = filled(0.0), tensors()
        self.before = {name: tensor.clone() for name, tensor in self.model.state_dict().items() if name in self.state}
        self.timm_state = timm.create_model(TIMM).state_dict()
        whole: dict[str, bytes] = {}
        for name, save in RESNET38.items():
            save(self.state, self.path)
            whole[name] = self.path.read_bytes()
        for name, save_cam in CAMS.items():
            save_cam(self.path)
            whole[name] = self.path.read_bytes()
        for name, save in (("timm, zip", torch.save), ("timm, safetensors", save_file)):
            save(self.timm_state, self.path)
            whole[name] = self.path.read_bytes()
        self.whole, self.others = whole, [*whole.values(), b"<!DOCTYPE html><html>404", b"\x93NUMPY\x01\x00", bytes(64)]

    def __call__(self, number: int) -> str:
        rng = random.Random(f"{self.seed} {number}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tensors that are missing, of torch's readers
            if number < len(self.whole):
                kind = list(self.whole)[number]
                self.path.write_bytes(self.whole[kind])
                self.reader(kind)()
                return f"whole {kind}"
            if number % 10 == 9:
                return f"wrong tensor {self.wrong(rng)}"
            kind = rng.choice([*RESNET38, *CAMS] * 20 + ["timm, zip", "timm, safetensors"])
            self.path.write_bytes(mutated(self.whole[kind], rng, self.others))
            return f"{kind} {self.read(self.reader(kind))}"

    def wrong(self, rng: random.Random) -> str:
        state, refused = wrong_tensors(self.state, rng)
        layout = rng.choice([name for name in RESNET38 if name != "mxnet"])  # which has no such dtypes
        RESNET38[layout]({name: value.contiguous() for name, value in state.items()}, self.path)
        outcome = self.read(self.load_resnet38)
        assert (outcome == "refused") == refused, (outcome, {name: value.dtype for name, value in state.items()})
        return outcome

    def read(self, reader: Callable[[], None]) -> str:
        """Return whether the reader took the file; raises unless it refused it by a ValueError that names it."""
        try:
            reader()
        except ValueError as error:
            assert str(self.path) in str(error), f"the message names no file: {error}"  # noqa: PT017
            assert type(error) is ValueError or type(error).__name__ == "_RefusedError", type(error)  # noqa: PT017
            return "refused"
        return "read"

    def reader(self, kind: str) -> Callable[[], None]:
        if kind in CAMS:
            return self.read_cam
        if kind.startswith("timm"):
            return self.timm_backbone
        return self.load_mxnet if kind == "mxnet" else self.load_resnet38

    def load_mxnet(self) -> None:
        self.load_resnet38()
        arrays = read_mxnet_params(self.path)
        assert sum(array.nbytes for array in arrays.values()) <= self.path.stat().st_size

    def load_resnet38(self) -> None:
        """Load into the network, which must stay as it was where the file is refused, and be finite where it is not."""
        own = self.model.state_dict()
        versions = {name: tensor._version for name, tensor in own.items()}
        try:
            report = load_resnet38(self.model, self.path)
        except ValueError:
            assert {name: tensor._version for name, tensor in own.items()} == versions, "the network was changed"
            raise
        changed = {name for name, tensor in own.items() if tensor._version != versions[name]}
        assert changed == set(report.loaded)
        assert all(own[name].isfinite().all() for name in report.loaded)
        with torch.no_grad():
            for name in report.loaded:
                own[name].copy_(self.before.get(name, torch.zeros(())))

    def timm_backbone(self) -> None:
        overlay = {"file": str(self.path)}
        timm_backbone(TIMM, output_stride=4, pretrained=True, pretrained_cfg_overlay=overlay)

    def read_cam(self) -> None:
        cam = read_cam(self.path, 20)
        assert cam.dtype == np.float32
        assert cam.ndim == 3
        assert len(cam) == 20


if __name__ == "__main__":
    fuzz(Fuzz, __doc__, count=10_000)
