"""Trial runs of classifiers: networks that cannot be read at a cell, and what a trial leaves as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pixelss import classifier_cam
from pixelss.cam.trial import find_plan
from tests.lazily import Lazily

timm: Any = Lazily("timm")


class Shared(nn.Module):
    """One convolution, pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3, 4, 1), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(self.stem(x).mean((-2, -1)))
        return logits


def test_the_plan_of_a_plain_network() -> None:
    plan = find_plan(Shared(), "stem", ("fc",), (64, 96))
    assert (plan.layout, plan.prefix, plan.averages, plan.size) == ("NCHW", 0, True, (64, 96))
    assert [(branch.layers, branch.classifier) for branch in plan.branches] == [((), "fc")]


def test_a_classifier_of_zeros_is_no_excuse() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    nn.init.zeros_(model[4].weight)  # agrees with whatever is read before the tanh
    with pytest.raises(ValueError, match="holds one cell everywhere is not '4'"):
        find_plan(model, "0", ("4",), (64, 96))


@pytest.mark.parametrize(
    ("name", "settings", "layer"),
    [
        ("mobilenetv3_small_050", {}, "runs 'conv_head', a Conv2d"),
        ("lcnet_050", {}, "runs 'conv_head', a Conv2d"),
        ("efficientvit_b0", {}, "runs 'head.in_conv.conv', a Conv2d"),
        ("inception_next_atto", {"depths": (1, 1, 1, 1)}, "runs 'head.fc1', a Linear"),
        ("mambaout_femto", {}, "runs 'head.pre_logits.fc', a Linear"),
        ("pit_ti_224", {}, "tokens of images .* are no map"),
        ("resnet18", {"global_pool": "catavgmax"}, "must be maps or tokens of 1024 channels, the width of"),
        ("resnet18", {"num_classes": 0}, "must have a classifier, but ResNet has none.*num_classes=N"),
        ("resnet18", {"global_pool": ""}, r"model cannot be tried on images of size \(64, 96\)"),
    ],
)
def test_networks_that_cannot_be_read_at_a_cell(name: str, settings: dict[str, Any], layer: str) -> None:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    model = timm.create_model(name, **{"num_classes": 3, **settings})
    with pytest.raises(ValueError, match=layer):
        classifier_cam(model)


def test_a_training_mode_is_left_as_it_is() -> None:
    model = timm.create_model("test_byobnet", num_classes=3).train()
    model.stem.eval()
    modes = [m.training for m in model.modules()]
    classifier_cam(model)
    assert [m.training for m in model.modules()] == modes


def test_random_state_is_left_alone() -> None:
    model = Shared()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    classifier_cam(model, features="stem", classifier="fc")
    assert torch.equal(torch.rand(1), expected)
