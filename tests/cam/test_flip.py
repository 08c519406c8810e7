"""The mirrored pass of `multi_scale_forward`, against a loop, and "minmax" of `normalize_cam`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pixelss import CAMHead, CAMOutput, multi_scale_forward


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), CAMHead(8, 3, dim=6))


def loop(model: nn.Module, images: Tensor, scale: float) -> CAMOutput:
    """One scale by hand: run both, turn the mirrored one back, halve the sum, resize the CAM."""
    H, W = images.shape[-2:]
    size = max(1, int(H * scale + 0.5)), max(1, int(W * scale + 0.5))
    small = functional.interpolate(images, size, mode="bilinear", align_corners=False)
    columns = torch.arange(size[1] - 1, -1, -1)
    straight, mirrored = model(small), model(small[..., columns])
    back = torch.arange(straight.cam.shape[-1] - 1, -1, -1)
    cam = (straight.cam + mirrored.cam[..., back]) / 2
    return CAMOutput(
        (straight.features + mirrored.features[..., back]) / 2,
        functional.interpolate(cam, (H, W), mode="bilinear", align_corners=False),
        (straight.logits + mirrored.logits) / 2,
    )


@torch.no_grad()
def test_flip_equals_a_loop() -> None:
    model, images = network().double(), torch.rand(2, 3, 37, 50, dtype=torch.float64)
    outputs = multi_scale_forward(model, images, scales=(0.5, 1.0, 1.5), flip=True)
    for scale, output in zip((0.5, 1.0, 1.5), outputs, strict=True):
        for actual, expected in zip(output, loop(model, images, scale), strict=True):
            torch.testing.assert_close(actual, expected)


@torch.no_grad()
def test_flip_of_the_mirrored_batch_is_the_mirror_of_the_result() -> None:
    model, images = network(), torch.rand(2, 3, 32, 48)
    for one, other in zip(
        multi_scale_forward(model, images, flip=True),
        multi_scale_forward(model, images.flip(-1), flip=True),
        strict=True,
    ):
        torch.testing.assert_close(other.cam.flip(-1), one.cam)
        torch.testing.assert_close(other.features.flip(-1), one.features)
        torch.testing.assert_close(other.logits, one.logits)


@torch.no_grad()
def test_without_flip_nothing_changes_and_the_model_runs_once_a_scale() -> None:
    seen = []

    def model(images: Tensor) -> CAMOutput:
        seen.append(images)
        cam = images.mean(1, keepdim=True)
        return CAMOutput(images, cam, cam.mean((-2, -1)))

    images = torch.rand(1, 3, 9, 12)
    (output,) = multi_scale_forward(model, images, scales=(1.0,))
    assert len(seen) == 1
    assert torch.equal(output.features, images)
    assert torch.equal(output.cam, images.mean(1, keepdim=True))


def test_flip_keeps_the_memory_format_and_the_gradient() -> None:
    model, formats = network(), []
    model[0].register_forward_pre_hook(
        lambda _, inputs: formats.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    images = torch.rand(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    sum(out.cam.square().sum() for out in multi_scale_forward(model, images, flip=True)).backward()
    assert formats == 6 * [True]
    assert all(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("flip", [2, "yes", None])
def test_flip_must_be_a_bool(flip: Any) -> None:
    with pytest.raises(ValueError, match="flip must be one of True, False"):
        multi_scale_forward(network(), torch.rand(1, 3, 16, 16), flip=flip)
