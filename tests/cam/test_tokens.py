from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelss import class_token_cam
from tests.affinity.test_attention import attention_of
from tests.blocks import Block
from tests.oracles import active, assert_refuses, field
from tests.strategies import Batch, batches

SIGNATURES = {"class_token_cam": "(attention, patch_cam, *, layers=3, reduce='sum', root=False)"}


def class_token_cam_by_loops(attention, patch_cam, *, layers=3, reduce="sum", root=False) -> Tensor:
    B, N, h, w = patch_cam.shape
    L, heads = len(attention), attention[0].shape[1]
    values = []
    for b, n, y, x in product(range(B), range(N), range(h), range(w)):
        seen = [attention[i][b, a, n, N + y * w + x] for i in range(L - layers, L) for a in range(heads)]
        m = sum(seen) / heads / (1 if reduce == "sum" else layers)
        value = m * active(patch_cam[b, n, y, x]).relu()
        values.append(value.sqrt() if root else value)
    return torch.stack(values).view(B, N, h, w) if values else patch_cam


def arguments_of(batch: Batch) -> tuple[Tensor, Tensor]:
    cam = batch.raw[0][..., :2, :2]
    return attention_of(batch, batch.classes + cam.shape[2] * cam.shape[3]), cam


def positive_arguments(batch: Batch) -> tuple[Tensor, Tensor]:
    attention, cam = arguments_of(batch)
    return attention, batch.probs[:, 1:, :1, :1].expand_as(cam)


BLOCKS = {
    "class_token_cam": Block(
        lambda b: class_token_cam(*arguments_of(b), layers=2),
        lambda b: class_token_cam_by_loops(*arguments_of(b), layers=2),
    ),
    "class_token_cam root": Block(
        lambda b: class_token_cam(*positive_arguments(b), layers=2, reduce="mean", root=True),
        lambda b: class_token_cam_by_loops(*positive_arguments(b), layers=2, reduce="mean", root=True),
        but={"checks": "its entry makes the arguments of other tensors"},
    ),
}


def patch_cam_of(golden: dict[str, Tensor]) -> Tensor:
    h, w = golden["grid"].tolist()
    patches = golden["x_patch"].mT.unflatten(2, (h, w))
    return torch.nn.functional.conv2d(patches, golden["head_w"], golden["head_b"], padding=1)


@pytest.mark.parametrize(("key", "settings"), [("v2", {}), ("plus", {"reduce": "mean", "root": True})])
def test_equals_the_public_code(key, settings, device):
    golden = field("mctformer")
    attention, cam = golden["attn"].to(device), patch_cam_of(golden).to(device)
    actual = class_token_cam(attention, cam, layers=int(golden["n_layers"]), **settings)
    torch.testing.assert_close(actual.cpu(), golden[f"{key}_cams_fused"], rtol=0, atol=2e-6)


def test_the_attention_alone_equals_the_public_code():
    golden = field("mctformer")
    ones = torch.ones(2, 4, 4, 6)
    actual = class_token_cam(golden["attn"], ones, layers=int(golden["n_layers"]))
    torch.testing.assert_close(actual, golden["v2_cams_mct"], rtol=0, atol=2e-6)


@given(batch=batches(), layers=st.integers(1, 2))
def test_forms_follow_from_each_other(batch: Batch, layers: int):
    attention, cam = arguments_of(batch)
    total = class_token_cam(attention, cam, layers=layers)
    mean = class_token_cam(list(attention), cam, layers=layers, reduce="mean")
    torch.testing.assert_close(total, layers * mean)
    assert (total >= 0).all()
    assert torch.equal(total > 0, cam > 0)
    root = class_token_cam(attention, cam, layers=layers, root=True)
    torch.testing.assert_close(root.square(), total)
    torch.testing.assert_close(class_token_cam(attention, 3 * cam, layers=layers), 3 * total)


@given(batch=batches(), data=st.data())
def test_permuting_classes_permutes_cams(batch: Batch, data):
    attention, cam = arguments_of(batch)
    classes = data.draw(st.permutations(range(batch.classes)))
    tokens = [*classes, *range(batch.classes, attention.shape[-1])]
    expected = class_token_cam(attention, cam, layers=1)[:, classes]
    torch.testing.assert_close(
        class_token_cam(attention[..., tokens, :][..., tokens], cam[:, classes], layers=1), expected
    )


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("attention", torch.rand(2, 1, 3, 22, 22), ValueError),
        ("attention", torch.rand(2, 1, 3, 23, 22), ValueError),
        ("attention", torch.rand(2, 4, 3, 23, 23), ValueError),
        ("attention", torch.rand(1, 3, 23, 23), ValueError),
        ("attention", torch.ones(2, 1, 3, 23, 23).long(), TypeError),
        ("attention", [], ValueError),
        ("patch_cam", torch.rand(3, 4, 5), ValueError),
        ("patch_cam", torch.ones(1, 3, 4, 5).long(), TypeError),
        ("layers", 3, ValueError),
        ("layers", 0, ValueError),
        ("layers", 1.5, TypeError),
        ("reduce", "max", ValueError),
        ("root", "no", ValueError),
    ],
)
def test_class_token_cam_refuses(name, value, error):
    arguments = {"attention": torch.rand(2, 1, 3, 23, 23), "patch_cam": torch.rand(1, 3, 4, 5)}
    assert_refuses(class_token_cam, arguments | {"layers": 2, "reduce": "sum"}, name, value, error)
