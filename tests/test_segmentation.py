from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise, product

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from pixelss import LargeFOV, multi_scale_cross_entropy, multi_scale_inference, resnet38
from tests import oracles
from tests.blocks import Block
from tests.oracles import assert_matches, bilinear, interpolate, value_and_grads
from tests.strategies import image_sizes, make_batch, noise

SIGNATURES = {
    "LargeFOV": "(in_channels, num_classes, *, norm=False)",
    "multi_scale_inference": "(model, images, *, scales=(0.5, 0.75, 1.0, 1.25, 1.5), flip=True, tile=1024)",
}

BLOCKS = {
    "LargeFOV": Block(
        lambda b, head: head(b.features),
        make=lambda b: LargeFOV(b.features.shape[1], b.classes),
        but={"half": "convolutions run in the user's precision"},
    ),
    "LargeFOV norm": Block(
        lambda b, head: head(b.features),
        make=lambda b: LargeFOV(b.features.shape[1], b.classes, norm=True).eval(),
        but={"half": "convolutions run in the user's precision"},
    ),
    "multi_scale_inference": Block(
        lambda b, network: multi_scale_inference(network, b.probs[:, :2], scales=(0.5, 1.3), tile=7),
        lambda b, network: multi_scale_inference_by_loops(network, b.probs[:, :2].detach(), (0.5, 1.3), True, 7),
        make=lambda b: nn.Conv2d(2, 3, 3, 2, 1).requires_grad_(False),
        but={
            "half": "its network runs in the user's precision",
            "gradient": "inference carries none",
            "checks": "its network checks the device",
        },
    ),
}

halves = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
both = pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])


@cache
def windows(length: int, largest: int) -> tuple[list[int], int]:
    """The starts and the side of the fewest and smallest evenly spread windows that share a quarter of the largest."""
    for steps in range(length):
        for side in range(1, largest + 1):
            starts = [math.floor(i * (length - side) / max(steps, 1)) for i in range(steps + 1)]
            gaps = [b - a for a, b in pairwise(starts)]
            if starts[-1] == length - side and all(side - gap >= largest // 4 for gap in gaps):
                return starts, side
    raise AssertionError


def multi_scale_inference_by_loops(
    model: Callable[[Tensor], Tensor], images: Tensor, scales: Sequence[float], flip: bool, tile: int
) -> Tensor:
    """Mean over scales, flips and images of the logits, each a mean over windows by the distance to an edge."""
    results = []
    for image, scale, mirrored in product(images, scales, [False, True][: 1 + flip]):
        largest = [
            n if math.floor(n * scale + 0.5) <= tile else max(1, math.floor(tile / scale)) for n in image.shape[1:]
        ]
        (rows, h), (columns, w) = (windows(n, side) for n, side in zip(image.shape[1:], largest, strict=True))
        sides = h, w
        total, weights = 0, torch.zeros(image.shape[1:]).to(image)
        for y, x in product(rows, columns):
            crop = image[None, :, y : y + h, x : x + w]
            scaled = bilinear(crop, [min(tile, max(1, math.floor(side * scale + 0.5))) for side in sides])
            logits = bilinear(model(scaled.flip(-1)), sides).flip(-1) if mirrored else bilinear(model(scaled), sides)
            total = total if weights.any() else torch.zeros(logits.shape[1], *image.shape[1:]).to(logits)
            weight = [[min(i + 1, h - i) * min(j + 1, w - j) for j in range(w)] for i in range(h)]
            total[:, y : y + h, x : x + w] += torch.tensor(weight) * logits[0]
            weights[y : y + h, x : x + w] += torch.tensor(weight)
        results.append(total / weights)
    return torch.stack(results).unflatten(0, (len(images), -1)).mean(1)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: int = 1) -> Tensor:
    """A convolution that keeps the size: every output cell sums over the taps that lie inside."""
    (h, w), (rows, columns) = x.shape[2:], weight.shape[2:]
    cells = []
    for i, j in product(range(h), range(w)):
        cell = torch.zeros(len(x), len(weight)).to(x)
        for r, c in product(range(rows), range(columns)):
            u, v = i + dilation * (r - rows // 2), j + dilation * (c - columns // 2)
            if 0 <= u < h and 0 <= v < w:
                cell = cell + x[:, :, u, v] @ weight[:, :, r, c].T
        cells.append(cell)
    out = torch.stack(cells, -1).unflatten(-1, (h, w))
    return out if bias is None else out + bias[:, None, None]


# multi_scale_inference


class Network(nn.Module):
    """A convolution of some stride that knows what it has seen, with a padded border and a preferred direction."""

    def __init__(self, classes: int = 4, stride: int = 1, size: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(noise(classes, 3, size, size))
        self.stride, self.seen = stride, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return functional.conv2d(x, self.weight, stride=self.stride, padding=self.weight.shape[-1] // 2)


def pointwise(x: Tensor) -> Tensor:
    return torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], 1)


SCALES = (0.5, 0.75, 1.0, 1.25, 1.5)


IMAGES = [(1, 1), (1, 23), (19, 2), (7, 8), (13, 10)]


shapes = pytest.mark.parametrize("size", IMAGES, ids=str)


odd_sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


scale_factors = st.sampled_from([0.1, 0.3, 0.5, 0.75, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0])


@pytest.mark.parametrize(  # few tiles of one pixel, each of which is a call of the model
    ("size", "tile"), [*product(IMAGES, (5, 6, 9, 1024)), *product([(1, 1), (1, 23), (4, 3)], [1])], ids=str
)
@pytest.mark.parametrize(("stride", "flip"), [(1, False), (2, True), (3, True)])
def test_inference_equals_the_loop(size, tile, stride, flip, device):
    model, images = Network(stride=stride), noise(2, 3, *size)
    with torch.no_grad():
        expected = multi_scale_inference_by_loops(model, images, (0.5, 1.0, 1.5), flip, tile)
    settings = {"scales": (0.5, 1.0, 1.5), "flip": flip, "tile": tile}
    actual = multi_scale_inference(model.to(device), images.to(device), **settings)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-10, atol=1e-10)
    single = multi_scale_inference(model.float(), images.float().to(device), **settings)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.cpu(), expected.float(), rtol=1e-4, atol=1e-4)


@given(size=image_sizes, tile=st.integers(1, 40), scale=scale_factors)
def test_any_inference_equals_the_loop(size, tile, scale):
    images = noise(1, 3, *size)
    with torch.no_grad():
        expected = multi_scale_inference_by_loops(pointwise, images, (scale,), False, tile)
    actual = multi_scale_inference(pointwise, images, scales=(scale,), flip=False, tile=tile)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@shapes
@pytest.mark.parametrize("stride", [1, 2])
def test_an_image_in_one_tile_is_the_mean_over_whole_images(size, stride):
    model, images = Network(stride=stride).requires_grad_(False), noise(2, 3, *size)
    passes = []
    for scale in SCALES:
        scaled = interpolate(images, tuple(max(1, int(side * scale + 0.5)) for side in size))
        passes += [
            interpolate(model(scaled), size),
            interpolate(model(scaled.flip(-1)), size).flip(-1),
        ]
    torch.testing.assert_close(
        multi_scale_inference(model, images), torch.stack(passes).mean(0), rtol=1e-10, atol=1e-10
    )


@given(size=odd_sizes, flip=st.booleans(), scale=scale_factors)
@example(size=(3, 7), flip=True, scale=0.75)  # 5.25 pixels are 5, and fit
def test_a_tile_of_exactly_the_largest_side_changes_no_bit(size, flip, scale):
    model, images = Network(stride=2), noise(1, 3, *size)
    largest = max(1, int(max(size) * scale + 0.5))
    exact = multi_scale_inference(model, images, scales=(scale,), flip=flip, tile=largest)
    assert torch.equal(exact, multi_scale_inference(model, images, scales=(scale,), flip=flip, tile=10**9))


def test_one_scale_without_flip_is_the_model():
    model, images = Network(), noise(2, 3, 9, 7)
    assert torch.equal(multi_scale_inference(model, images, scales=(1.0,), flip=False), model(images))


@given(size=odd_sizes, tile=st.integers(1, 50), flip=st.booleans(), dtype=st.sampled_from([*oracles.TOLERANCE]))
def test_windows_of_a_pointwise_model_leave_no_trace(size, tile, flip, dtype):
    images = noise(1, 3, *size, dtype=dtype)
    tiled = multi_scale_inference(pointwise, images, scales=(1,), flip=flip, tile=tile)
    # To rounding: weights that sum to 1 do not give back every bit.
    torch.testing.assert_close(tiled, pointwise(images), rtol=8 * torch.finfo(dtype).eps, atol=1e-30)


def test_windows_of_a_convolution_1x1_leave_no_trace():
    model, images = Network(size=1), noise(2, 3, 31, 18)
    tiled = multi_scale_inference(model, images, scales=(1.0,), tile=7)
    torch.testing.assert_close(tiled, model(images), rtol=1e-12, atol=1e-12)


@given(size=odd_sizes, tile=st.integers(3, 50), scale=scale_factors)
def test_constant_logits_stay_constant(size, tile, scale):
    constant = noise(1, 5, 1, 1)
    actual = multi_scale_inference(lambda _: constant, noise(1, 3, *size), scales=(scale, 1.0), tile=tile)
    torch.testing.assert_close(actual, constant.expand_as(actual))


@given(size=odd_sizes, tile=st.integers(1, 50))
def test_flips_change_nothing_for_a_model_without_direction(size, tile):
    model, images = Network(), noise(1, 3, *size)
    model.weight.data += model.weight.data.flip(-1)
    results = [multi_scale_inference(model, images, scales=(1.0, 1.5), tile=1000, flip=flip) for flip in (True, False)]
    torch.testing.assert_close(*results)


@given(size=odd_sizes)
def test_a_flipped_image_gives_the_flipped_result(size):
    model, images = Network(stride=2), noise(1, 3, *size)
    actual = multi_scale_inference(model, images.flip(-1)).flip(-1)
    torch.testing.assert_close(actual, multi_scale_inference(model, images))


def test_flips_change_a_model_with_a_direction():
    model, images = Network(), noise(1, 3, 9, 9)
    first, second = (multi_scale_inference(model, images, scales=(1.0,), flip=flip) for flip in (True, False))
    assert (first - second).abs().max() > 0.1


@given(size=odd_sizes)
def test_windows_differ_from_the_whole_only_near_their_edges(size):
    model, images, tile = Network(), noise(1, 3, *size), 9
    whole, tiled = (multi_scale_inference(model, images, scales=(1.0,), tile=t) for t in (100, tile))
    away = torch.ones(size, dtype=torch.bool)
    for axis, length in enumerate(size):
        if length > tile:
            starts, side = windows(length, tile)
            for start in starts:
                for edge in {start, start + side - 1} - {0, length - 1}:
                    away.select(axis, edge).fill_(False)
    torch.testing.assert_close(tiled[..., away], whole[..., away])


@given(size=odd_sizes, tile=st.integers(1, 30), scales=st.lists(scale_factors, min_size=1, max_size=3))
def test_the_model_never_sees_more_than_a_tile(size, tile, scales):
    seen = []

    def model(x: Tensor) -> Tensor:
        seen.append(x.shape)
        return x[:, :1]

    multi_scale_inference(model, torch.zeros(2, 3, *size), scales=scales, tile=tile)
    assert max(max(shape[2:]) for shape in seen) <= tile
    assert {tuple(shape[:2]) for shape in seen} == {(2, 3)}
    if max(size) * max(scales) + 0.5 < tile:
        assert len(seen) == 2 * len(scales)


class Largest(TorchDispatchMode):
    """Remember the most numbers that one new tensor held, but for those of a given shape."""

    def __init__(self, apart: tuple[int, ...]) -> None:
        super().__init__()
        self.apart, self.numbers = apart, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view and tuple(out.shape) != self.apart:
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("size", [(40, 60), (72, 56), (16, 400)], ids=str)
def test_memory_does_not_grow_with_the_image(size):
    model, images = Network(5, stride=4).float(), torch.zeros(1, 3, *size)
    with Largest(apart=(1, 5, *size)) as largest:
        multi_scale_inference(model, images, tile=16)
    assert largest.numbers <= 5 * (16 / 0.5) ** 2


def test_windows_of_the_defaults():
    seen = []

    def model(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape[2:]))
        return x[:, :1, ::64, ::64]

    multi_scale_inference(model, torch.zeros(1, 3, 640, 682), flip=False)
    assert seen == [(320, 341), (480, 512), (640, 682), (800, 853), (960, 1023)]
    seen.clear()
    multi_scale_inference(model, torch.zeros(1, 3, 1792, 700), scales=(1.0,), flip=False)
    assert seen == 2 * [(1024, 700)]  # 1024 + 1024 - 256 = 1792
    seen.clear()
    multi_scale_inference(model, torch.zeros(1, 3, 1793, 700), scales=(1.0,), flip=False)
    assert seen == 3 * [(769, 700)]  # 3 x 769 - 2 x 256 = 1795


@pytest.mark.parametrize("mode", [True, False])
def test_the_model_keeps_its_mode_and_gets_no_gradient(mode):
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Dropout(0.5)).train(mode)
    result = multi_scale_inference(model, torch.rand(1, 3, 4, 5, requires_grad=True))
    assert not result.requires_grad
    assert torch.is_grad_enabled()
    assert all(module.training is mode for module in model.modules())
    (result * torch.ones((), requires_grad=True)).sum().backward()  # no inference tensor


def test_a_model_that_works_in_place_changes_no_image():
    images = noise(1, 3, 5, 6)
    before = images.clone()
    actual = multi_scale_inference(lambda x: x.mul_(2).add_(1), images)
    assert torch.equal(images, before)
    torch.testing.assert_close(actual, multi_scale_inference(lambda x: 2 * x + 1, before))


def test_the_model_s_own_tensor_is_left_as_it_is():
    constant = noise(1, 2, 5, 6)
    before = constant.clone()
    multi_scale_inference(lambda _: constant, noise(1, 3, 5, 6), scales=(1.0, 2.0), flip=False)
    assert torch.equal(constant, before)


@halves
def test_inference_sums_in_float32(half, device):
    model, images = Network(stride=2).to(device, half), noise(2, 3, 9, 7).to(device, half)
    actual = multi_scale_inference(model, images, tile=8)
    assert {x.dtype for x in model.seen} == {half}
    assert actual.dtype == torch.float32
    expected = multi_scale_inference(model.float(), images.float(), tile=8)
    torch.testing.assert_close(actual, expected, atol=0.2, rtol=0.05)


def test_inference_under_autocast(device):
    model, images = Network(stride=2).float().to(device), noise(1, 3, 9, 7, dtype=torch.float32).to(device)
    with torch.autocast(device, torch.bfloat16):
        actual = multi_scale_inference(model, images, tile=8)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, multi_scale_inference(model, images, tile=8), atol=0.2, rtol=0.05)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_the_model_sees_the_memory_format_of_the_images(layout):
    model = Network()
    images = noise(2, 3, 9, 7)
    actual = multi_scale_inference(model, images.contiguous(memory_format=layout), tile=5)
    assert all(x.is_contiguous(memory_format=layout) for x in model.seen)
    torch.testing.assert_close(actual, multi_scale_inference(model, images, tile=5))


def test_an_empty_batch_passes_inference():
    assert multi_scale_inference(Network(stride=2), noise(0, 3, 9, 7), tile=4).shape == (0, 4, 9, 7)


@pytest.mark.slow  # .ci/run runs it
def test_compiled_inference_equals_eager(device):
    torch.compiler.reset()
    head, images = nn.Conv2d(3, 2, 3, stride=2, padding=1).to(device), torch.rand(1, 3, 9, 7, device=device)
    compiled = torch.compile(multi_scale_inference, fullgraph=True, backend="aot_eager")
    settings = {"scales": (0.5, 1.0), "tile": 6}
    torch.testing.assert_close(compiled(head, images, **settings), multi_scale_inference(head, images, **settings))


# LargeFOV


def reference_of(head: LargeFOV) -> Callable[..., Tensor]:
    """The head as a function of its input and parameters, in order."""

    def plain(x, first, bias, second, other):
        return convolution(convolution(x, first, bias, dilation=12).relu(), second, other, dilation=12)

    def normed(x, first, scale, shift, second, scale2, shift2, third, bias):
        def normalise(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            mean = x.mean((0, 2, 3), keepdim=True)
            variance = (x - mean).square().mean((0, 2, 3), keepdim=True)
            return (x - mean) / (variance + 1e-5).sqrt() * scale[:, None, None] + shift[:, None, None]

        x = normalise(convolution(x, first, dilation=12), scale, shift).relu()
        return convolution(normalise(convolution(x, second), scale2, shift2).relu(), third, bias)

    return normed if len(list(head.parameters())) == 8 else plain


@both
@pytest.mark.parametrize("size", [(1, 2), (3, 14), (26, 2)], ids=str)
def test_head_equals_the_loop(norm, size, device):
    torch.manual_seed(0)
    head = LargeFOV(3, 2, norm=norm).double().to(device)
    parameters = {name: noise(*p.shape, seed=i) / 9 for i, (name, p) in enumerate(head.named_parameters())}

    def ours(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(head, dict(zip(parameters, values, strict=True)), (x,))

    assert_matches(ours, reference_of(head), noise(2, 3, *size), *parameters.values(), device=device)


def test_heads_of_the_recipe():
    def count(norm: bool) -> int:
        return sum(p.numel() for p in LargeFOV(4096, 20, norm=norm).parameters())

    assert count(False) == 4096 * 512 * 9 + 512 + 512 * 21 * 9 + 21
    assert count(True) == 4096 * 512 * 9 + 2 * 512 + 512 * 512 + 2 * 512 + 512 * 21 + 21


@both
def test_head_after_resnet38(norm):
    with torch.device("meta"):
        network = nn.Sequential(resnet38(), LargeFOV(4096, 20, norm=norm))
        assert network(torch.zeros(2, 3, 65, 96)).shape == (2, 21, 9, 12)


@both
def test_head_starts_as_deeplab_s(norm):
    torch.manual_seed(0)
    head = LargeFOV(64, 20, norm=norm)
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.02)
            assert abs(module.weight.mean().item()) < 1e-3
            assert module.bias is None or not module.bias.any()
    convolutions = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
    assert [m.bias is None for m in convolutions] == ([True, True, False] if norm else [False, False])


@both
def test_head_sees_as_far_as_its_dilation(norm):
    head = LargeFOV(2, 1, norm=norm).eval()
    x = torch.rand(1, 2, 61, 61, requires_grad=True)
    head(x)[0, 0, 30, 30].backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten().tolist()
    columns = x.grad.abs().sum((0, 1, 2)).nonzero().flatten().tolist()
    assert rows == columns == ([18, 30, 42] if norm else [6, 18, 30, 42, 54])


@both
@given(size=image_sizes)
def test_head_keeps_the_size(norm, size):
    head = LargeFOV(2, 3, norm=norm).eval()
    assert head(torch.rand(2, 2, *size)).shape == (2, 4, *size)
    assert head(torch.rand(0, 2, *size)).shape == (0, 4, *size)


@both
def test_head_state_dict_round_trip(norm):
    head, other, x = LargeFOV(4, 2, norm=norm), LargeFOV(4, 2, norm=norm), torch.rand(2, 4, 5, 6)
    head(x)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.eval()(x), head.eval()(x))


@both
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_training_lowers_the_loss_and_repeats_bit_for_bit(norm, dtype, device):
    mask = make_batch(classes=2, image_size=(16, 16)).mask.to(device)

    def train() -> list[float]:
        torch.manual_seed(0)
        head, x = LargeFOV(6, 2, norm=norm).to(device), torch.rand(3, 6, 4, 4).to(device)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.02)
        losses = []
        for _ in range(8):
            with torch.autocast(device, dtype, enabled=dtype is not None):
                logits = [head(x), head(x[..., ::2, ::2])]
                loss = multi_scale_cross_entropy(logits, mask)
            assert all(one.dtype == torch.float32 for one in logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = train(), train()
    finally:
        torch.use_deterministic_algorithms(before)
    assert first == second
    assert first[-1] < first[0]


@halves
@both
def test_head_in_half_precision_gives_float32_logits(half, norm, device):
    torch.manual_seed(0)
    head, x = LargeFOV(4, 2, norm=norm).eval().to(device, half), noise(2, 4, 5, 6).to(device, half)
    logits = head(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, head.float()(x.float()), atol=1e-2, rtol=0.05)


@pytest.mark.slow  # .ci/run runs it
@both
def test_compiled_head_equals_eager(norm, device):
    torch.compiler.reset()
    head, x = LargeFOV(4, 2, norm=norm).eval().to(device), torch.rand(2, 4, 5, 6, device=device)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_grads(compiled, x), value_and_grads(head, x))


# refusals


LOGITS = torch.rand(2, 3, 4, 5)


def growing(x: Tensor) -> Tensor:
    return x.repeat(1, x.shape[2], 1, 1)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("images", LOGITS[0], ValueError),
        ("images", LOGITS.byte(), TypeError),
        ("images", LOGITS[..., :0], ValueError),
        ("images", None, TypeError),
        ("scales", (), ValueError),
        ("scales", 1.0, TypeError),
        ("scales", (1.0, 0.0), ValueError),
        ("scales", (-0.5,), ValueError),
        ("scales", (math.nan,), ValueError),
        ("scales", ("1",), TypeError),
        ("flip", "no", ValueError),
        ("flip", None, ValueError),
        ("tile", 0, ValueError),
        ("tile", -1, ValueError),
        ("tile", 64.0, TypeError),
        ("tile", None, TypeError),
        ("model", lambda x: (x, x), TypeError),
        ("model", lambda x: x.mean((2, 3)), ValueError),
        ("model", lambda x: x[:1], ValueError),
        ("model", lambda x: x.argmax(1, keepdim=True), TypeError),
        ("model", lambda x: x.to("meta"), ValueError),
        ("model", growing, ValueError),  # as many classes as rows
    ],
)
def test_inference_refuses(name, value, error):
    with pytest.raises(error, match=rf"\b{name}\b.* must .* but "):
        multi_scale_inference(**{"model": Network().float(), "images": LOGITS, name: value})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("in_channels", 0, ValueError),
        ("in_channels", "4", TypeError),
        ("num_classes", 0, ValueError),
        ("num_classes", 2.0, TypeError),
    ],
)
def test_head_refuses_settings(name, value, error):
    with pytest.raises(error, match=rf"\b{name}\b must .* but "):
        LargeFOV(**{"in_channels": 4, "num_classes": 2, name: value})


@pytest.mark.parametrize(
    ("x", "error"),
    [(LOGITS[:, :2], ValueError), (LOGITS[0], ValueError), (LOGITS.long(), TypeError), (None, TypeError)],
    ids=["size", "rank", "dtype", "type"],
)
def test_head_refuses_input(x, error):
    with pytest.raises(error, match=r"\bx must .* but "):
        LargeFOV(3, 2)(x)
