from __future__ import annotations

import numpy as np
import pytest
import torch

from pixelss._checks import (
    check_choice,
    check_count,
    check_counts,
    check_integer,
    check_maps,
    check_nonnegative,
    check_number,
    check_positive,
    check_taps,
    check_tensor,
    outside_unit,
)

IMAGE = torch.zeros(2, 3, 4, 5)


def test_check_tensor_returns_the_shape():
    assert check_tensor("cam", IMAGE, "BNHW", N=3, like=torch.zeros(1)) == (2, 3, 4, 5)


@pytest.mark.parametrize(
    ("kind", "accepted"),
    [
        ("floating", {torch.float16, torch.bfloat16, torch.float32, torch.float64}),
        ("integer", {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}),
        ("bool", {torch.bool}),
        (
            "any",
            {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
            | {torch.float16, torch.bfloat16, torch.float32, torch.float64},
        ),
    ],
)
def test_check_tensor_dtype(kind, accepted):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.bool,
                  torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):  # fmt: skip
        x = torch.zeros(2, dtype=dtype)
        if dtype in accepted:
            check_tensor("x", x, "B", kind=kind)
        else:
            with pytest.raises(TypeError, match=rf"^x must be of {kind} dtype, but is {dtype}"):
                check_tensor("x", x, "B", kind=kind)


@pytest.mark.parametrize(
    ("value", "settings", "error", "message"),
    [
        ([[1.0]], {}, TypeError, r"cam must be a torch.Tensor, but is of type list\. Pass torch.tensor\(cam\)\.$"),
        ((IMAGE[0],), {}, TypeError, r"cam must be .*of type tuple\. Pass torch.stack\(cam\)\.$"),
        (IMAGE[0], {}, ValueError, r"cam must have shape \(B, N, H, W\), but has shape \(3, 4, 5\)"),
        (IMAGE, {"N": 4}, ValueError, r"cam must have shape \(B, N=4, H, W\), .*\(2, 3, 4, 5\): N is 3"),
        (IMAGE[:, :, :0], {}, ValueError, r"\(2, 3, 0, 5\): H is 0"),
        (IMAGE.to("meta"), {"like": IMAGE}, ValueError, "cam must lie on cpu, but lies on meta"),
        (IMAGE.to("meta"), {"like": IMAGE, "hint": "Resize."}, ValueError, r"by \.to\(device\)\.$"),
        (IMAGE[0], {"hint": "Add a batch dimension."}, ValueError, r"Add a batch dimension\.$"),
    ],
    ids=["type", "a sequence", "rank", "size", "empty", "device", "no size hint", "hint"],
)
def test_check_tensor_message(value, settings, error, message):
    with pytest.raises(error, match=message):
        check_tensor("cam", value, "BNHW", **settings)


def read_only(array):
    array.setflags(write=False)
    return array


@pytest.mark.parametrize(
    ("value", "axes", "sizes", "call"),
    [
        (np.zeros((8, 9, 3)), "BCHW", {"C": 3}, "torch.from_numpy(x).permute(2, 0, 1)[None]"),
        (np.zeros((8, 9, 2)), "BNHW", {}, "torch.from_numpy(x).permute(2, 0, 1)[None]"),
        (np.zeros((2, 8, 9, 3)), "BCHW", {"C": 3}, "torch.from_numpy(x).permute(0, 3, 1, 2)"),
        (np.zeros((3, 8, 9)), "BCHW", {"C": 3}, "torch.from_numpy(x)[None]"),
        (np.zeros((2, 5, 8, 9)), "BNHW", {}, "torch.from_numpy(x)"),
        (np.zeros((8, 9)), "BHW", {"H": 8, "W": 9}, "torch.from_numpy(x)[None]"),
        (read_only(np.zeros((8, 9, 3))), "BCHW", {"C": 3}, "torch.from_numpy(x.copy()).permute(2, 0, 1)[None]"),
        (np.zeros((8, 9, 3))[:, ::-1], "BCHW", {"C": 3}, "torch.from_numpy(x.copy()).permute(2, 0, 1)[None]"),
        (np.zeros((8, 9, 3))[..., ::-1], "BCHW", {"C": 3}, "torch.from_numpy(x.copy()).permute(2, 0, 1)[None]"),
        (torch.zeros(8, 9, 3), "BCHW", {"C": 3}, "x.permute(2, 0, 1)[None]"),
        (torch.zeros(2, 8, 9, 3), "BCHW", {"C": 3}, "x.permute(0, 3, 1, 2)"),
        (torch.zeros(2, 8, 9, 5), "BNHW", {"B": 2, "H": 8, "W": 9}, "x.permute(0, 3, 1, 2)"),
        (torch.zeros(3, 8, 9), "BCHW", {"C": 3}, "x[None]"),
        (torch.zeros(8, 9), "BHW", {"H": 8, "W": 9}, "x[None]"),
        (torch.zeros(4), "BN", {"B": 1, "N": 4}, "x[None]"),
    ],
)
def test_the_call_that_mends_the_axes_does(value, axes, sizes, call):
    with pytest.raises((TypeError, ValueError)) as caught:
        check_tensor("x", value, axes, **sizes)
    assert str(caught.value).endswith(f" Pass {call}.")
    assert len(str(caught.value)) < 170
    check_tensor("x", eval(call, {"torch": torch, "x": value}), axes, **sizes)


@pytest.mark.parametrize(
    ("value", "axes", "sizes"),
    [
        (torch.zeros(8, 9, 3), "BNHW", {}),  # no size is known
        (torch.zeros(8, 9, 3), "BNHW", {"B": 2, "N": 3}),  # one map of a batch of two
        (torch.zeros(2, 8, 9, 4), "BCHW", {"C": 3}),  # with an alpha channel
        (torch.zeros(8, 9), "BCHW", {"C": 3}),
        (torch.zeros(8), "KD", {"D": 8}),  # no batch
    ],
)
def test_no_call_is_named_that_would_not_mend(value, axes, sizes):
    with pytest.raises(ValueError, match="x must have shape") as caught:
        check_tensor("x", value, axes, hint="A hint.", **sizes)
    assert str(caught.value).endswith(". A hint.")


@pytest.mark.parametrize("axes", ["BNHW", "SPHW"])
def test_only_images_and_pairs_may_be_empty(axes):
    shape = [0 if axis in "BP" else 1 for axis in axes]
    assert check_tensor("x", torch.zeros(shape), axes) == tuple(shape)


def test_check_choice():
    check_choice("form", "ratio", ("infonce", "ratio"))
    with pytest.raises(ValueError, match="form must be one of 'infonce', 'ratio', but is 'infoNCE'"):
        check_choice("form", "infoNCE", ("infonce", "ratio"))


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.5)])
def test_check_number_accepts(value):
    check_number("threshold", value, low=0, high=1)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (1.5, ValueError, "threshold must be between 0 and 1, but is 1.5"),
        (-0.1, ValueError, "but is -0.1"),
        (float("nan"), ValueError, "but is nan"),
        ("0.2", TypeError, "threshold must be a number, but is of type str"),
        (True, TypeError, "but is of type bool"),
    ],
)
def test_check_number_refuses(value, error, message):
    with pytest.raises(error, match=message):
        check_number("threshold", value, low=0, high=1)


def test_check_count():
    for value in (1, np.int64(1)):
        check_count("dim", value)
    with pytest.raises(ValueError, match="dim must be at least 1, but is 0"):
        check_count("dim", 0)
    for value in (2.0, True, "2"):
        with pytest.raises(TypeError, match=f"dim must be an int, but is of type {type(value).__name__}"):
            check_count("dim", value)


def test_integers_between():
    check_integer("skip", 3, low=0, high=3)
    with pytest.raises(ValueError, match="skip must be between 0 and 2, but is 3"):
        check_integer("skip", 3, low=0, high=2)
    with pytest.raises(TypeError, match="skip must be an int"):
        check_integer("skip", 1.0, low=0, high=2)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), 1e39])
def test_numbers_that_float32_does_not_hold(value):
    for check in (check_positive, check_nonnegative):
        with pytest.raises(ValueError, match="alpha must be between"):
            check("alpha", value)
    check_nonnegative("alpha", 0)
    with pytest.raises(ValueError, match="alpha must be between"):
        check_positive("alpha", 0)


def test_counts():
    check_counts("dims", [1, 2], "ints, one a tap")
    for value, error, message in (
        (3, TypeError, "dims must be a sequence of ints, one a tap"),
        ((), ValueError, "empty"),
        ((1, 0), ValueError, r"dims\[1\] must be at least 1"),
        ((1, 2.0), TypeError, r"dims\[1\] must be an int"),
    ):
        with pytest.raises(error, match=message):
            check_counts("dims", value, "ints, one a tap")


def test_taps():
    taps = [torch.zeros(2, 3, 4, 5), torch.zeros(2, 6, 4, 5)]
    check_taps(taps, (3, 6), shared="Bhw", like=IMAGE)
    check_taps([taps[0], taps[1][..., 1:]], (3, 6), shared="B", like=IMAGE)
    for value, error, message in (
        (taps[0], TypeError, r"taps must be a sequence .*of type Tensor\. Of one alone pass \[taps\]\.$"),
        (taps[:1], ValueError, "taps must hold 2 tensors, as in_channels, but holds 1"),
        (taps[::-1], ValueError, r"taps\[0\] must .*C is 6.* Theirs"),
        ([taps[0], taps[1][..., 1:]], ValueError, r"taps\[1\] must .*w is 4"),
        ([taps[0], taps[1][:1]], ValueError, r"taps\[1\] must .*B is 1"),
        ([taps[0], taps[1].to("meta")], ValueError, r"taps\[1\] must lie on cpu"),
        ([taps[0], taps[1].long()], TypeError, r"taps\[1\] must be of floating dtype"),
    ):
        with pytest.raises(error, match=message):
            check_taps(value, (3, 6), shared="Bhw", like=IMAGE, hint="Theirs.")


def test_outside_of_zero_to_one_but_for_rounding():
    x = torch.tensor([-1.0, -0.02, -0.005, 0.0, 1.0, 1.005, 1.02, float("nan"), float("inf")])
    assert outside_unit(x).tolist() == [True, True, False, False, False, False, True, True, True]


@pytest.mark.parametrize("maps", [[], (), torch.zeros(0, 2, 3, 4, 5)], ids=["list", "tuple", "tensor"])
def test_no_map_at_all(maps):
    with pytest.raises(ValueError, match=r"cams must .*(is empty|holds none)"):
        check_maps("cams", maps, "BNHW", shared="BN")
