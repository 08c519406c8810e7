"""Depthwise convolutions under FastDepthwise: torch's values and gradients, whatever the setting; bf16 where asked."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from depthwise import FastDepthwise
from inference import autocast
from torch import nn

OWN = [  # settings with a gradient of their own
    {"kernel_size": 5, "padding": 4, "dilation": 2},
    {"kernel_size": (3, 5), "padding": (3, 2), "dilation": (3, 1)},
    {"kernel_size": 5, "padding": 2},
    {"kernel_size": 5, "padding": 3, "dilation": 2},
    {"kernel_size": 5, "stride": 2},
    {"kernel_size": (1, 5), "stride": (1, 3), "padding": (0, 1)},
    {"kernel_size": 4, "padding": 3, "dilation": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "stride": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "padding_mode": "reflect"},
]
SETTINGS = [
    *OWN,
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "bias": True},
]


def results(conv: nn.Conv2d, image: torch.Tensor) -> list[torch.Tensor]:
    out = conv(image)
    return [out, *torch.autograd.grad((out.float() ** 2).sum(), (image, *conv.parameters()))]


@pytest.mark.parametrize(
    ("channels", "groups", "out_channels"),
    [(6, 6, 6), (6, 6, 12), (6, 3, 3), (6, 3, 6), (1, 1, 1)],
    ids=["depthwise", "multiplied", "two a group, one out", "two a group", "one channel"],
)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_values_and_gradients_are_torchs(
    setting: dict[str, object], channels: int, groups: int, out_channels: int
) -> None:
    conv = nn.Conv2d(channels, out_channels, groups=groups, **{"bias": False, **setting}).double()
    image = torch.rand(2, channels, 9, 11, dtype=torch.float64, requires_grad=True)
    expected = results(conv, image)
    with FastDepthwise():
        torch.testing.assert_close(results(conv, image), expected)
        own = "_Depthwise" in type(conv(image).grad_fn).__name__
    assert own == (setting in OWN and channels == groups == out_channels > 1)


def test_frozen_weights_and_inputs_without_gradient() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=2, dilation=2, groups=3, bias=False)
    image = torch.rand(1, 3, 8, 8, requires_grad=True)
    expected = results(conv, image)
    with FastDepthwise():
        weight = torch.autograd.grad((conv(image.detach()) ** 2).sum(), conv.weight)[0]
        conv.requires_grad_(False)
        found = torch.autograd.grad((conv(image) ** 2).sum(), image)[0]
        with torch.inference_mode():
            out = conv(image)
    torch.testing.assert_close([out, found, weight], expected)


def test_under_autocast_the_product_alone_is_float32() -> None:
    conv = nn.Conv2d(3, 3, 5, padding=4, dilation=2, groups=3, bias=False)
    point = nn.Conv2d(3, 3, 1)
    image = torch.rand(2, 3, 9, 9).bfloat16().requires_grad_()
    exact = results(conv, image.detach().float().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16), FastDepthwise():
        out = conv(image)
        assert point(image).dtype == torch.bfloat16
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact[0].bfloat16())  # rounded once, at the end
    found = torch.autograd.grad((out.float() ** 2).sum(), (image, conv.weight))
    for gradient, expected in zip(found, exact[1:], strict=True):
        torch.testing.assert_close(gradient.float(), expected, rtol=0.03, atol=0.03)


def test_a_batch_of_none_and_settings_that_are_no_pairs() -> None:
    conv = nn.Conv2d(3, 3, 5, padding=2, groups=3, bias=False)
    with FastDepthwise():
        conv(torch.rand(0, 3, 8, 8)).sum().backward()
    assert not conv.weight.grad.any()
    image = torch.rand(2, 3, 8, 8, requires_grad=True)
    with FastDepthwise():
        found = torch.nn.functional.conv2d(image, conv.weight, None, 1, 2, 1, 3)
        gradients = torch.autograd.grad((found**2).sum(), (image, conv.weight))
    torch.testing.assert_close([found, *gradients], results(conv, image))


def test_gradients_under_autocast_are_float32_too() -> None:
    conv = nn.Conv2d(3, 3, 5, padding=4, dilation=2, groups=3, bias=False)
    image = torch.rand(2, 3, 9, 9, requires_grad=True)
    expected = results(conv, image)
    with torch.autocast("cpu", torch.bfloat16), FastDepthwise():
        torch.testing.assert_close(results(conv, image), expected)


def test_an_image_without_a_batch() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=2, dilation=2, groups=3, bias=False)
    image = torch.rand(3, 8, 8, requires_grad=True)
    expected = results(conv, image)
    with FastDepthwise():
        torch.testing.assert_close(results(conv, image), expected)


@pytest.mark.parametrize(("compiled", "own"), [(False, True), (True, False)])
def test_the_pipelines_networks_run_in_it_unless_they_are_compiled(compiled: bool, own: bool) -> None:
    run = SimpleNamespace(config=SimpleNamespace(precision="bf16", compile=compiled), device=torch.device("cpu"))
    conv = nn.Conv2d(3, 3, 3, padding=2, dilation=2, groups=3, bias=False)
    with autocast(run):
        out = conv(torch.rand(1, 3, 8, 8).bfloat16())
        assert nn.Conv2d(3, 3, 1)(torch.rand(1, 3, 8, 8)).dtype == torch.bfloat16
    assert ("_Depthwise" in type(out.grad_fn.next_functions[0][0]).__name__) == own
