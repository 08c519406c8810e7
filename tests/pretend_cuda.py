"""A CUDA device without a GPU: shapes, dtypes and devices are real, values are not, and nothing may wait for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

MARKS = [
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
    pytest.mark.skipif(torch.__version__ < (2, 5), reason="torch 2.4 asks the real CUDA for more than it pretends"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a real device is here: copies of pretended ones ask it"),
]


class PretendCUDA(FakeTensorMode):
    """Within it "cuda" is a device whose tensors hold no values, while those of the CPU stay as they are.

    Tensors of two devices in one operation raise, as on a GPU, and so does what asks for a value: `.item()`, `.cpu()`,
    a branch on a value, a shape that depends on values. Copies to the device are not seen, though blocking ones wait
    too, and backward passes are out of its reach.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        leaves = tree_leaves((args, options))
        on_device = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        target = options.get("device")
        if on_device and isinstance(target, torch.device) and target.type == "cpu":
            raise RuntimeError(f"{func} waits for the device: it copies to the CPU")
        if func is torch.ops.aten.copy_.default and isinstance(args[1], FakeTensor) and args[0].device.type == "cpu":
            raise RuntimeError(f"{func} waits for the device: it copies to the CPU")
        if on_device or (isinstance(target, torch.device) and target.type == "cuda"):
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **options)


def devices(tree: object) -> set[str]:
    """Return the kinds of devices that the tensors of a nested structure lie on."""
    return {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}
