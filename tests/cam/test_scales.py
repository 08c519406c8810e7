from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn import functional

from pixelss import CAMHead, msinf_cam, multi_scale_forward, normalize_cam
from tests import oracles
from tests.blocks import Block
from tests.oracles import (
    active,
    assert_matches,
    bilinear,
)
from tests.strategies import SIZES, batches, make_batch
from tests.test_maps import normalize_cam_by_loops

SIGNATURES = {
    "msinf_cam": "(cams, tags, *, size=None)",
    "multi_scale_forward": "(model, images, *, scales=(0.5, 1.0, 2.0), flip=False)",
}

BLOCKS = {
    "msinf_cam": Block(
        lambda b: msinf_cam(b.raw, b.tags, size=(6, 5)), lambda b: msinf_cam_by_loops(b.raw, b.tags, (6, 5))
    ),
    "multi_scale_forward": Block(
        lambda b, network: multi_scale_forward(network, b.probs[:, :2], scales=(0.5, 1.3))[1].cam,
        make=lambda b: nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), CAMHead(4, b.classes, dim=4)),
        but={"half": "its network runs in the user's precision", "checks": "its network checks the device"},
    ),
}

dtypes = pytest.mark.parametrize("dtype", oracles.TOLERANCE)
image_sizes = pytest.mark.parametrize("size", [target for _, target in SIZES.values()], ids=SIZES)


def msinf_cam_by_loops(cams: Sequence[Tensor], tags: Tensor, size: tuple[int, int]) -> Tensor:
    """Multi-scale inferred CAM: resize raw, ReLU, sum over scales, absent classes zero, normalise."""
    total = sum(torch.relu(bilinear(active(cam), size)) for cam in cams)
    return normalize_cam_by_loops(total * (tags > 0).to(total)[:, :, None, None])


class Recorder(nn.Module):
    """A CAM network of stride 2 that remembers the images that it saw."""

    def __init__(self):
        super().__init__()
        self.head = CAMHead(3, 2, dim=4).double()
        self.seen = []

    def forward(self, images):
        self.seen.append(images)
        return self.head(functional.avg_pool2d(images, 2, ceil_mode=True))


# msinf_cam


@dtypes
@image_sizes
def test_msinf_cam_equals_the_loop(size, dtype, device):
    batch = make_batch(image_size=size)
    assert_matches(
        lambda *cams: msinf_cam(cams[:3], cams[3], size=size),
        lambda *cams: msinf_cam_by_loops(cams[:3], cams[3], size),
        *batch.raw,
        batch.tags,
        dtype=dtype,
        device=device,
    )


def test_msinf_cam_gradcheck():
    *raw, tags = *make_batch(image_size=(3, 4)).raw, torch.tensor([[1, 0, 1]] * 3)
    for cam in raw:
        cam.requires_grad_()
    assert torch.autograd.gradcheck(lambda *cams: msinf_cam(cams, tags, size=(4, 3)), raw, fast_mode=True)


@given(batch=batches())
def test_msinf_cam_absent_classes_are_zero_and_peaks_one(batch):
    cam = msinf_cam(batch.raw, batch.tags, size=(5, 4))
    assert cam.shape[2:] == (5, 4)
    assert not cam[batch.tags == 0].any()
    peaks = cam.amax((2, 3))
    assert ((peaks == 1) | (peaks == 0)).all()


@given(batch=batches())
def test_msinf_cam_of_one_scale_normalises_the_present_classes(batch):
    cam = batch.raw[2]
    expected = normalize_cam(cam) * batch.tags[:, :, None, None]
    assert torch.equal(msinf_cam([cam], batch.tags), expected)


@given(batch=batches())
def test_msinf_cam_does_not_depend_on_the_order_of_scales(batch):
    torch.testing.assert_close(
        msinf_cam(batch.raw[::-1], batch.tags, size=(4, 6)), msinf_cam(batch.raw, batch.tags, size=(4, 6))
    )


# multi_scale_forward


@pytest.mark.parametrize("scales", [(0.5, 1.0, 2.0), (0.25, 1.3), (0.01,)], ids=str)
@pytest.mark.parametrize("size", [(8, 6), (7, 5), (1, 1)], ids=str)
def test_multi_scale_forward_equals_one_forward_per_scale(size, scales):
    model, images = Recorder(), torch.rand(2, 3, *size, dtype=torch.float64)
    outs = multi_scale_forward(model, images, scales=scales)
    assert isinstance(outs, tuple)
    assert len(outs) == len(scales)
    for scale, out, seen in zip(scales, outs, list(model.seen), strict=True):
        scaled = tuple(max(1, int(side * scale + 0.5)) for side in size)
        expected = functional.interpolate(images, scaled, mode="bilinear", align_corners=False)
        torch.testing.assert_close(seen, expected)
        features, cam, logits = model(expected)
        torch.testing.assert_close(out.features, features)
        torch.testing.assert_close(out.logits, logits)
        torch.testing.assert_close(out.cam, functional.interpolate(cam, size, mode="bilinear", align_corners=False))


def test_multi_scale_forward_trains_the_model_through_every_scale():
    model, images = Recorder(), torch.rand(2, 3, 6, 6, dtype=torch.float64)
    for scale in range(3):
        model.zero_grad()
        out = multi_scale_forward(model, images)[scale]
        (out.cam.square().sum() + out.logits.sum()).backward()
        assert all(p.grad.any() for p in model.parameters())


# refusals


RAW = torch.rand(2, 3, 4, 5)


TAGS = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("cams", [], ValueError),
        ("cams", None, TypeError),
        ("cams", [RAW, RAW[0]], ValueError),
        ("cams", [RAW, RAW[:1]], ValueError),
        ("cams", [RAW, RAW[:, :2]], ValueError),
        ("cams", [RAW, RAW.int()], TypeError),
        ("cams", [RAW, RAW[..., 1:]], ValueError),  # without a size all share one
        ("cams", [RAW, RAW.to("meta")], ValueError),
        ("tags", TAGS[:, :2], ValueError),
        ("tags", TAGS[:1], ValueError),
        ("tags", TAGS[0], ValueError),
        ("tags", [[1, 0, 1]] * 2, TypeError),
        ("tags", TAGS.to("meta"), ValueError),
        ("size", (0, 4), ValueError),
        ("size", (4, -1), ValueError),
        ("size", 4, ValueError),
        ("size", RAW.shape, ValueError),
    ],
)
def test_msinf_cam_refuses(name, value, error):
    with pytest.raises(error, match=rf"\b{name}\b"):
        msinf_cam(**{"cams": [RAW, RAW], "tags": TAGS, name: value})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("images", RAW[0], ValueError),
        ("images", RAW.byte(), TypeError),
        ("images", None, TypeError),
        ("scales", (), ValueError),
        ("scales", 1.0, TypeError),
        ("scales", (1.0, 0.0), ValueError),
        ("scales", (-0.5,), ValueError),
        ("scales", (nan,), ValueError),
        ("scales", (inf,), ValueError),
        ("model", nn.Identity(), TypeError),
        ("model", lambda x: (x, x, x), TypeError),
    ],
)
def test_multi_scale_forward_refuses(name, value, error):
    arguments = {"model": Recorder().float(), "images": RAW, name: value}
    with pytest.raises(error, match=rf"\b{name}\b"):
        multi_scale_forward(**arguments)


def test_multi_scale_forward_keeps_the_memory_format():
    model = Recorder().float()
    multi_scale_forward(model, RAW.contiguous(memory_format=torch.channels_last))
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in model.seen)


def test_multi_scale_forward_keeps_the_dtype_of_the_images():
    outs = multi_scale_forward(Recorder().bfloat16(), RAW.bfloat16())
    assert all(out.cam.dtype == torch.float32 and out.cam.isfinite().all() for out in outs)
