from __future__ import annotations

from math import inf, nan

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_matches
from strategies import SIZES, batches, make_batch
from torch import nn
from torch.nn import functional

from pixelss import CAMHead, CAMOutput, msinf_cam, multi_scale_forward, normalize_cam

dtypes = pytest.mark.parametrize("dtype", oracles.TOLERANCE)
image_sizes = pytest.mark.parametrize("size", [target for _, target in SIZES.values()], ids=SIZES)


class Recorder(nn.Module):
    """A CAM network of stride 2 that remembers the images that it saw."""

    def __init__(self):
        super().__init__()
        self.head = CAMHead(3, 2, dim=4).double()
        self.seen = []

    def forward(self, images):
        self.seen.append(images)
        return self.head(functional.avg_pool2d(images, 2, ceil_mode=True))


# normalize_cam


@dtypes
@image_sizes
def test_normalize_cam_equals_the_loop(size, dtype, device):
    cam = make_batch(image_size=size).raw[2]
    cam[0, 0] = -1.0
    assert_matches(normalize_cam, oracles.normalize_cam, cam, dtype=dtype, device=device)


def test_normalize_cam_gradcheck():
    # Peaks and zeros lie further from their neighbours than the step of the differences.
    cam = make_batch(image_size=(3, 4)).raw[2].requires_grad_()
    assert torch.autograd.gradcheck(normalize_cam, cam)


def test_gradient_of_a_normalised_map_flows_through_its_maximum():
    cam = torch.tensor([1.0, 2.0, -3.0, 4.0], dtype=torch.float64).view(1, 1, 2, 2).requires_grad_()
    normalize_cam(cam).sum().backward()
    # sum_p a_p / m with m = 4: 1/m elsewhere, -(1 + 2) / m^2 at the maximum, 0 under the ReLU
    torch.testing.assert_close(cam.grad.flatten(), torch.tensor([0.25, 0.25, 0, -3 / 16], dtype=torch.float64))


@given(batch=batches(dtype=torch.float32), scale=st.floats(1e-4, 1e30), shift=st.floats(-4, 4, allow_subnormal=False))
def test_normalised_maximum_is_exactly_one_or_the_map_is_zero(batch, scale, shift):
    cam = normalize_cam((batch.raw[2] + shift) * scale)
    peaks = cam.amax((2, 3))
    assert ((cam >= 0) & (cam <= 1)).all()
    assert ((peaks == 1) | (peaks == 0)).all()


@given(batch=batches())
def test_normalising_twice_changes_nothing(batch):
    cam = normalize_cam(batch.raw[2])
    assert torch.equal(normalize_cam(cam), cam)


@pytest.mark.parametrize(("peak", "kept"), [(0.25, False), (0.26, True), (0.0, False), (-1.0, False)])
def test_maximum_up_to_eps_gives_zeros(peak, kept):
    cam = torch.full((1, 1, 2, 2), -2.0).index_fill_(3, torch.tensor([0]), peak).requires_grad_()
    actual = normalize_cam(cam, eps=0.25)
    assert actual.amax() == kept
    actual.sum().backward()
    assert cam.grad.isfinite().all()
    assert kept or not cam.grad.any()


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_non_finite_value_counts_as_no_activation(value):
    batch = make_batch()
    broken, zeroed = batch.raw[2].clone(), batch.raw[2].clone()
    broken[0, 0, 1, 2], zeroed[0, 0, 1, 2] = value, 0.0
    broken[0, 1], zeroed[0, 1] = value, 0.0
    broken.requires_grad_()
    actual = normalize_cam(broken)
    assert torch.equal(actual, normalize_cam(zeroed))
    (actual**2).sum().backward()
    assert broken.grad.isfinite().all()
    fused = [msinf_cam([*batch.raw[:2], cam], batch.tags, size=(4, 4)) for cam in (broken, zeroed)]
    assert torch.equal(*fused)


# msinf_cam


@dtypes
@image_sizes
def test_msinf_cam_equals_the_loop(size, dtype, device):
    batch = make_batch(image_size=size)
    assert_matches(
        lambda *cams: msinf_cam(cams[:3], cams[3], size=size),
        lambda *cams: oracles.msinf_cam(cams[:3], cams[3], size),
        *batch.raw,
        batch.tags,
        dtype=dtype,
        device=device,
    )


def test_msinf_cam_gradcheck():
    *raw, tags = *make_batch(image_size=(3, 4)).raw, torch.tensor([[1, 0, 1]] * 3)
    for cam in raw:
        cam.requires_grad_()
    assert torch.autograd.gradcheck(lambda *cams: msinf_cam(cams, tags, size=(4, 3)), raw)


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


# CAMHead


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
    ("cam", "error"),
    [(None, TypeError), (RAW.long(), TypeError), (RAW[0], ValueError), (RAW[..., :0], ValueError)],
    ids=["type", "dtype", "rank", "empty"],
)
def test_normalize_cam_refuses(cam, error):
    with pytest.raises(error, match=r"\bcam\b"):
        normalize_cam(cam)


@pytest.mark.parametrize("eps", [-1.0, nan])
def test_normalize_cam_refuses_eps(eps):
    with pytest.raises(ValueError, match=r"\beps\b"):
        normalize_cam(RAW, eps=eps)


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
