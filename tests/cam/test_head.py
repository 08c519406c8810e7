from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pixelss import CAMHead, CAMOutput
from tests.blocks import Block
from tests.strategies import make_batch

SIGNATURES = {
    "CAMHead": "(in_channels, num_classes, *, dim=256)",
    "CAMOutput": "(features, cam, logits)",
}

BLOCKS = {
    "CAMHead": Block(
        lambda b, head: head(b.features).cam,
        make=lambda b: CAMHead(b.features.shape[1], b.classes, dim=4),
        but={"half": "convolutions run in the user's precision"},
    ),
}


def test_head_features_and_logits():
    x = make_batch().features
    features, cam, logits = out = CAMHead(5, 3, dim=7).double()(x)
    assert isinstance(out, CAMOutput)
    assert features.shape == (3, 7, 3, 4)
    assert cam.shape == (3, 3, 3, 4)
    assert (features >= 0).all()
    assert (features > 0).any()
    torch.testing.assert_close(logits, cam.mean((2, 3)))


def test_head_has_two_convolutions_without_bias():
    assert sorted(tuple(p.shape) for p in CAMHead(5, 3).parameters()) == [(3, 256, 1, 1), (256, 5, 1, 1)]
    zeros = CAMHead(5, 3)(torch.zeros(1, 5, 2, 2))
    assert not any(part.any() for part in zeros)


def test_head_is_pixelwise_and_its_cam_is_linear_in_the_features():
    head, x = CAMHead(5, 3, dim=7), make_batch(dtype=torch.float32).features
    torch.testing.assert_close(head(x.flip(2, 3)).cam, head(x).cam.flip(2, 3))
    torch.testing.assert_close(head(3 * x).cam, 3 * head(x).cam)  # positively homogeneous: ReLU, no bias
    (weight,) = (p for p in head.parameters() if p.shape[0] == 3)
    torch.testing.assert_close(head(x).cam, functional.conv2d(head(x).features, weight))


def test_head_logits_train_both_convolutions():
    head = CAMHead(5, 3, dim=7)
    head(make_batch(dtype=torch.float32).features).logits.square().sum().backward()
    assert all(p.grad.any() for p in head.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_logits_are_float32_under_autocast(dtype):
    head, x = CAMHead(5, 3, dim=7), make_batch(dtype=torch.float32).features
    with torch.autocast("cpu", dtype):
        out = head(x)
    assert out.logits.dtype == torch.float32
    torch.testing.assert_close(out.logits, out.cam.float().mean((2, 3)))


def test_head_state_dict_round_trip():
    x = make_batch(dtype=torch.float32).features
    head, other = CAMHead(5, 3, dim=7), CAMHead(5, 3, dim=7)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(x).cam, head(x).cam)


# refusals


RAW = torch.rand(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("in_channels", 0, ValueError),
        ("num_classes", 0, ValueError),
        ("num_classes", 2.0, TypeError),
        ("dim", -1, ValueError),
    ],
)
def test_head_refuses_settings(name, value, error):
    with pytest.raises(error, match=rf"\b{name}\b"):
        CAMHead(**{"in_channels": 4, "num_classes": 2, name: value})


@pytest.mark.parametrize(
    ("x", "error"),
    [(RAW[:, :2], ValueError), (RAW[0], ValueError), (RAW.long(), TypeError)],
    ids=["size", "rank", "dtype"],
)
def test_head_refuses_input(x, error):
    with pytest.raises(error, match="must"):
        CAMHead(3, 2)(x)
