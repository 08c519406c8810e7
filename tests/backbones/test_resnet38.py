"""ResNet38: structure on the meta device, and the numbers of a functional oracle."""

from __future__ import annotations

import copy
import math
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pixelss.backbones.checkpoints import resnet38
from pixelss.backbones.norms import freeze_norm
from pixelss.backbones.resnet38 import ResNet38

SIGNATURES = {
    "ResNet38": "()",
}

BLOCKS = {"ResNet38": "105 million weights in the user's precision: the tests below ask of it what fits a network"}

# name, stride, the two dilations; name, dropout
RESIDUAL = [
    ("b2", 2, 1, 1),
    ("b2_1", 1, 1, 1),
    ("b2_2", 1, 1, 1),
    ("b3", 2, 1, 1),
    ("b3_1", 1, 1, 1),
    ("b3_2", 1, 1, 1),
]
RESIDUAL += [("b4", 2, 1, 1), *((f"b4_{i}", 1, 1, 1) for i in range(1, 6))]
RESIDUAL += [("b5", 1, 1, 2), ("b5_1", 1, 2, 2), ("b5_2", 1, 2, 2)]
BOTTLENECK = [("b6", 0.3), ("b7", 0.5)]


def oracle(w: dict[str, Tensor], x: Tensor, *, training: bool = False) -> list[Tensor]:
    """Every activated stage, from the description of the network and its state dict."""

    def norm_relu(x: Tensor, name: str) -> Tensor:
        stats = (w[f"{name}.running_mean"], w[f"{name}.running_var"], w[f"{name}.weight"], w[f"{name}.bias"])
        return F.relu(F.batch_norm(x, *stats, training=False, eps=1e-5))

    stages = []
    x = F.conv2d(x, w["conv1a.weight"], padding=1)
    for name, stride, d1, d2 in RESIDUAL:
        r = norm_relu(x, f"{name}.bn_branch2a")
        if name in ("b3", "b4", "b5"):
            stages.append(r)
        changes = f"{name}.conv_branch1.weight" in w
        shortcut = F.conv2d(r, w[f"{name}.conv_branch1.weight"], stride=stride) if changes else x
        y = F.conv2d(r, w[f"{name}.conv_branch2a.weight"], stride=stride, padding=d1, dilation=d1)
        y = norm_relu(y, f"{name}.bn_branch2b1")
        x = shortcut + F.conv2d(y, w[f"{name}.conv_branch2b1.weight"], padding=d2, dilation=d2)
    for name, dropout in BOTTLENECK:
        r = norm_relu(x, f"{name}.bn_branch2a")
        if name == "b6":
            stages.append(r)
        y = norm_relu(F.conv2d(r, w[f"{name}.conv_branch2a.weight"]), f"{name}.bn_branch2b1")
        y = F.dropout2d(y, dropout, training)
        y = norm_relu(F.conv2d(y, w[f"{name}.conv_branch2b1.weight"], padding=4, dilation=4), f"{name}.bn_branch2b2")
        y = F.dropout2d(y, dropout, training)
        x = F.conv2d(r, w[f"{name}.conv_branch1.weight"]) + F.conv2d(y, w[f"{name}.conv_branch2b2.weight"])
    return [*stages, norm_relu(x, "bn7")]


STEM = {"conv1a", "b2", "b2_1", "b2_2"}


with torch.device("meta"), patch("torch.nn.init.kaiming_normal_"), patch("torch.nn.init.kaiming_uniform_"):
    # To pretend draws there takes a second
    META = resnet38().eval()


@pytest.fixture(scope="module")
def model() -> ResNet38:
    """A network in float32 whose norms are no identities."""
    torch.manual_seed(0)
    model = resnet38().eval()
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                for tensor in (norm.weight, norm.running_var):
                    tensor.uniform_(0.5, 1.5)
                for tensor in (norm.bias, norm.running_mean):
                    tensor.uniform_(-0.2, 0.2)
    return model


@torch.no_grad()
def test_stages_are_those_of_the_oracle(model: ResNet38) -> None:
    x = torch.randn(2, 3, 17, 23)
    expected = oracle(model.state_dict(), x)
    stages = model.forward_stages(x)
    for stage, reference in zip(stages, expected, strict=True):
        assert reference.std() > 0.1
        torch.testing.assert_close(stage, reference, rtol=1e-4, atol=1e-4 * reference.max().item())
    for tap, stage in zip(model.forward_taps(x), stages[2:], strict=True):
        assert torch.equal(tap, stage)
    assert torch.equal(model(x), stages[-1])


@torch.no_grad()
def test_training_drops_channels_before_the_last_two_convolutions_of_a_bottleneck(model: ResNet38) -> None:
    trained = freeze_norm(copy.deepcopy(model)).train()
    x = torch.randn(1, 3, 9, 9)
    torch.manual_seed(1)
    expected = oracle(model.state_dict(), x, training=True)[-1]
    torch.manual_seed(1)
    torch.testing.assert_close(trained(x), expected, rtol=1e-4, atol=1e-4 * expected.max().item())
    assert not torch.allclose(expected, model(x), rtol=0.1)


def test_parameters_and_names() -> None:
    model = META
    assert sum(p.numel() for p in model.parameters()) == 105_070_912
    state = model.state_dict()
    assert len(state) == 228
    assert state["b6.bn_branch2b2.running_var"].shape == (1024,)
    assert state["b5_2.conv_branch2a.weight"].shape == (512, 1024, 3, 3)
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}
    assert (model.out_channels, model.stride) == (4096, 8)


@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 2))
def test_size_is_the_ceiling(H: int, W: int, B: int) -> None:
    images = torch.zeros(B, 3, H, W, device="meta")
    stages = META.forward_stages(images)
    for stage, channels, stride in zip(stages, (128, 256, 512, 1024, 4096), (2, 4, 8, 8, 8), strict=True):
        assert stage.shape == (B, channels, math.ceil(H / stride), math.ceil(W / stride))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(3, 8, 8), ValueError, r"\(B, C=3, H, W\).*\(3, 8, 8\)"),
        (torch.zeros(1, 1, 8, 8), ValueError, "C is 1"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "floating dtype, but is torch.uint8"),
    ],
)
def test_bad_images(images: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"x must.*{message}"):
        META(images)


def test_initialisation_is_he(model: ResNet38) -> None:
    weight = model.b5.conv_branch2b1.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (1024 * 9)), rel=0.02)
    assert abs(weight.mean().item()) < 1e-4


def test_train_and_eval_return_the_model() -> None:
    assert META.train() is META
    assert META.eval() is META


def test_freeze_stem_freezes_820928_weights() -> None:
    model = copy.deepcopy(META)
    assert model.freeze_stem() is model
    frozen = {name: p.numel() for name, p in model.named_parameters() if not p.requires_grad}
    assert sum(frozen.values()) == 820_928
    assert {name.split(".")[0] for name in frozen} == STEM


def test_frozen_model_trains_what_is_left() -> None:
    model = freeze_norm(copy.deepcopy(META)).freeze_stem().train()
    model(torch.zeros(1, 3, 16, 16, device="meta")).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in model.named_parameters() if "conv" in n and n.split(".")[0] not in STEM}
