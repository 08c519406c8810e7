from __future__ import annotations

import os
import re
from itertools import product
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelss import DenseCRF, PermutohedralLattice, _sums, background_score, dense_crf
from pixelss.refine import crf
from tests.blocks import Block
from tests.test_lattice import slow_lattice

SIGNATURES = {
    "DenseCRF": "(*, iterations=10, gaussian=(3.0, 3.0), bilateral=(80.0, 13.0, 10.0))",
    "dense_crf": "(images, probs, *, iterations=10, gaussian=(3.0, 3.0), bilateral=(80.0, 13.0, 10.0))",
}

WAITS = "checks the probabilities and builds lattices, whose number of cells decides a shape"

BLOCKS = {
    "dense_crf": Block(lambda b: dense_crf(b.images, b.probs), but=dict.fromkeys(("compile", "no wait"), WAITS)),
    "DenseCRF": Block(lambda b: DenseCRF()(b.images, b.probs)),
}

# Outputs of the C++ code, written by golden/make_crf.py; the variable names another such file.
GOLDEN = Path(os.environ.get("PIXELSS_CRF_GOLDEN", Path(__file__).parent.parent / "golden" / "crf.npz"))


def make(
    seed: int = 0, *, B: int = 1, K: int = 3, H: int = 5, W: int = 6, dtype=torch.float64
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (B, 3, H, W), generator=g, dtype=torch.uint8)
    return images, (2 * torch.randn(B, K, H, W, generator=g, dtype=torch.float64)).softmax(1).to(dtype)


def normalised(probs: Tensor) -> Tensor:
    clipped = probs.clamp(1e-5, 1)
    return clipped / clipped.sum(1, keepdim=True)


seeds = st.integers(0, 10_000)


inputs = st.builds(make, seeds, B=st.integers(1, 3), K=st.integers(1, 4), H=st.integers(1, 6), W=st.integers(1, 6))


KERNELS = [
    {},
    {"gaussian": None},
    {"bilateral": None},
    {"gaussian": (1.5, 2), "bilateral": (5.0, 30.0, 4.0)},
]


kernels = pytest.mark.parametrize("kernels", KERNELS, ids=str)


classes = pytest.mark.parametrize("K", [2, 3])  # of two the difference alone is filtered


any_kernels = st.sampled_from(KERNELS)


# the C++ code


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        *(
            (f"q_b{sxy}_{srgb}_10_t{t}", {"bilateral": (float(sxy), float(srgb), 10.0), "iterations": t})
            for sxy, srgb, t in product((80, 50, 20), (13, 5), (1, 10))
            if (sxy, srgb) in ((80, 13), (50, 5), (20, 13))
        ),
        ("q_gauss_only_t5", {"bilateral": None, "iterations": 5}),
    ],
)
def test_equals_the_c_code(key, settings, device):
    with np.load(GOLDEN) as data:
        images, probs, expected = (torch.from_numpy(data[name]) for name in ("img", "p", key))
    actual = dense_crf(images.permute(2, 0, 1)[None].to(device), probs[None].to(device), **settings)
    torch.testing.assert_close(actual[0].cpu(), expected, rtol=0, atol=1e-4)


# mean field


def slow_kernel(features: np.ndarray, q: Tensor) -> Tensor:
    scale = 1 / np.sqrt(slow_lattice(features, np.ones((len(q), 1))) + 1e-20)
    return torch.from_numpy(scale * slow_lattice(features, scale * q.numpy()))


@classes
@kernels
@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_crf_equals_the_slow_one(kernels, iterations, K, device):
    images, probs = make(K=K)
    settings = {"gaussian": (3.0, 3.0), "bilateral": (80.0, 13.0, 10.0)} | kernels
    position = np.array([(x, y) for y in range(5) for x in range(6)], dtype=float)
    level = images[0].flatten(1).T.double().numpy()
    log_p = probs[0].flatten(1).T.clamp(1e-5, 1).log()
    q = log_p.softmax(1)
    for _ in range(iterations):
        message = torch.zeros_like(q)
        if settings["gaussian"]:
            sxy, compat = settings["gaussian"]
            message += compat * slow_kernel(position / sxy, q)
        if settings["bilateral"]:
            sxy, srgb, compat = settings["bilateral"]
            message += compat * slow_kernel(np.hstack([position / sxy, level / srgb]), q)
        q = (log_p + message).softmax(1)
    actual = dense_crf(images.to(device), probs.to(device), iterations=iterations, **kernels).cpu()
    torch.testing.assert_close(actual[0].flatten(1).T, q, rtol=1e-6, atol=1e-6)


@given(batch=inputs, kernels=any_kernels, iterations=st.integers(0, 3))
def test_probabilities_sum_to_one(batch, kernels, iterations):
    q = dense_crf(*batch, iterations=iterations, **kernels)
    assert q.shape == batch[1].shape
    assert (q >= 0).all()
    torch.testing.assert_close(q.sum(1), torch.ones_like(q[:, 0]))


@given(batch=inputs, kernels=any_kernels, data=st.data())
def test_permuting_classes_permutes_results(batch, kernels, data):
    images, probs = batch
    order = data.draw(st.permutations(range(probs.shape[1])))
    torch.testing.assert_close(
        dense_crf(images, probs[:, order], **kernels), dense_crf(images, probs, **kernels)[:, order]
    )


@given(batch=inputs, kernels=any_kernels, factor=st.floats(0.1, 0.9, allow_subnormal=False))
def test_a_factor_common_to_the_classes_does_not_matter(batch, kernels, factor):
    images, probs = batch
    probs = 0.5 * probs + 0.2  # away from the clip
    factors = factor * torch.linspace(1, 0.5, probs[0, 0].numel(), dtype=probs.dtype).view(probs.shape[-2:])
    torch.testing.assert_close(dense_crf(images, factors * probs, **kernels), dense_crf(images, probs, **kernels))


@classes
def test_messages_whose_exponentials_overflow(K):
    images, probs = make(K=K, dtype=torch.float32)
    settings = {"iterations": 3, "gaussian": (3.0, 100.0), "bilateral": (80.0, 200.0, 400.0)}
    q = dense_crf(images, probs, **settings)
    torch.testing.assert_close(q, dense_crf(images, probs.double(), **settings).float())
    torch.testing.assert_close(q.sum(1), torch.ones_like(q[:, 0]))


@pytest.mark.parametrize("size", [(7, 1, 3), (7, 2, 3), (7, 1, 9)])
def test_one_pixel_s_exponentials_overflow(size):
    logits = torch.rand(size)
    logits[4, 0, 1] = 200
    softmax = crf._Softmax(logits)
    for x in (logits.clamp(max=1), logits, logits):
        torch.testing.assert_close(softmax(x.clone), x.softmax(-1))


@classes
def test_what_is_kept_from_one_call_serves_the_next(K):
    images, probs = make(K=K, H=4, W=7, dtype=torch.float32)
    with torch.inference_mode():
        expected = dense_crf(images, probs)
    leaf = probs.clone().requires_grad_()
    q = dense_crf(images, leaf)
    q.square().sum().backward()
    assert torch.equal(q, expected)
    assert leaf.grad.any()


@pytest.mark.parametrize(
    ("other", "gaussian"), [("size", (3, 3)), ("dtype", (3, 3)), ("scale", (2, 3)), ("compat", (3, 2))]
)
def test_what_is_kept_is_of_the_same_size_dtype_and_setting(other, gaussian):
    images, probs = make(H=4, W=7, dtype=torch.float32)
    dense_crf(images, probs, bilateral=None)  # kept
    if other == "size":
        images, probs = images.mT, probs.mT  # as many pixels
    settings = {"gaussian": gaussian, "bilateral": None}
    probs = probs.double() if other == "dtype" else probs
    found = dense_crf(images, probs, **settings)
    crf._kept_smoothness.cache_clear()
    assert torch.equal(found, dense_crf(images, probs, **settings))


def test_probabilities_sum_to_one_at_any_precision_of_products():
    images, probs = make(K=21, H=60, W=80, dtype=torch.float32)
    torch.set_float32_matmul_precision("medium")
    try:
        q = dense_crf(images, probs)
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(q.sum(1), torch.ones_like(q[:, 0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("K", [1, 2, 3])
def test_the_result_may_be_written_to_and_viewed(K):
    images, probs = make(K=K, H=5, W=6)
    probs = probs.contiguous(memory_format=torch.channels_last)
    for settings in ({}, {"iterations": 0}):
        given = probs.clone().requires_grad_()
        refined = dense_crf(images, given, **settings)
        refined.mul_(2).view(-1).square().sum().backward()
        doubled = probs.clone().requires_grad_()
        (4 * dense_crf(images, doubled, **settings).square()).sum().backward()
        torch.testing.assert_close(given.grad, doubled.grad)
        assert dense_crf(images, probs, **settings).is_contiguous()


@classes
def test_a_torch_without_sparse_products_gives_the_same(K, monkeypatch):
    images, probs = make(B=2, K=K, H=20, W=30)
    expected = dense_crf(images, probs)
    monkeypatch.setattr("pixelss._sums._has_products", lambda: False)
    monkeypatch.setattr("torch.sparse_csr_tensor", None)
    torch.testing.assert_close(dense_crf(images, probs), expected)


@classes
def test_both_kernels_are_summed_by_parts_as_on_a_gpu(K, monkeypatch):
    images, probs = make(K=K, H=20, W=30)
    expected = dense_crf(images, probs)
    crf._kept_smoothness.cache_clear()
    monkeypatch.setattr("pixelss._lattice.launches_cost", lambda x: True)
    torch.testing.assert_close(dense_crf(images, probs), expected)
    crf._kept_smoothness.cache_clear()


@pytest.mark.parametrize("K", [2, 3])
def test_another_default_device_does_not_matter(K):
    images, probs = torch.randint(0, 256, (1, 3, 6, 7), dtype=torch.uint8), torch.rand(1, K, 6, 7)
    expected = dense_crf(images, probs)
    _sums._has_products.cache_clear()
    crf._kept_smoothness.cache_clear()
    with torch.device("meta"):
        assert torch.equal(dense_crf(images, probs), expected)


def test_compile_leaves_it_out():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    images, probs = make(H=4, W=7)
    compiled = torch.compile(lambda p: dense_crf(images, p + 0), backend=count)
    torch.testing.assert_close(compiled(probs), dense_crf(images, probs))
    assert sum(node.op == "call_function" for graph in graphs for node in graph.graph.nodes) < 40


@given(batch=inputs, kernels=any_kernels)
def test_no_iteration_or_no_kernel_gives_the_normalised_probs(batch, kernels):
    torch.testing.assert_close(dense_crf(*batch, iterations=0, **kernels), normalised(batch[1]))
    torch.testing.assert_close(dense_crf(*batch, gaussian=None, bilateral=None), normalised(batch[1]))


@given(batch=inputs, kernels=any_kernels)
def test_batch_equals_single_images(batch, kernels):
    images, probs = batch
    single = [dense_crf(image[None], p[None], **kernels) for image, p in zip(images, probs, strict=True)]
    torch.testing.assert_close(dense_crf(images, probs, **kernels), torch.cat(single))


@given(seed=seeds, kernels=any_kernels, level=st.integers(0, 255), K=st.integers(2, 4))
def test_everywhere_the_same_stays_with_its_class(seed, kernels, level, K):
    _, probs = make(seed, K=K, H=1, W=1)
    q = dense_crf(torch.full((1, 3, 4, 6), level, dtype=torch.uint8), probs.expand(1, K, 4, 6), **kernels)
    assert (q.argmax(1) == probs.argmax(1)).all()
    assert (q.amax(1) >= probs.amax(1) - 1e-4).all()
    even = torch.full((1, K, 4, 6), 1 / K)
    q = dense_crf(torch.full((1, 3, 4, 6), level, dtype=torch.uint8), even, **kernels)
    torch.testing.assert_close(q, even)


def test_labels_follow_the_edges_of_the_image():
    images = torch.full((1, 3, 12, 16), 40, dtype=torch.uint8)
    images[..., 8:] = 200
    probs = torch.full((1, 2, 12, 16), 0.4)
    probs[:, 0, :, :6], probs[:, 1, :, 6:] = 0.6, 0.6  # two columns off the edge
    refined = dense_crf(images, probs).argmax(1)
    assert torch.equal(refined, (images[:, 0] > 100).long())
    assert not torch.equal(probs.argmax(1), refined)


def test_equal_images_share_one_lattice(monkeypatch):
    images, probs = make(B=3)
    built = []

    class Counted(PermutohedralLattice):
        def __init__(self, features):
            built.append(tuple(features.shape))
            super().__init__(features)

    expected = torch.cat([dense_crf(images[:1], p[None]) for p in probs])
    monkeypatch.setattr("pixelss.refine.crf.PermutohedralLattice", Counted)
    torch.testing.assert_close(dense_crf(images[:1].expand(3, -1, -1, -1), probs), expected)
    assert built == [(30, 5)]  # that of the positions is kept from the calls before
    dense_crf(images, probs)
    assert built[1:] == [(30, 5)] * 3
    dense_crf(images, probs, gaussian=(2.0, 3.0))
    assert built[4:] == [(30, 2), *[(30, 5)] * 3]


@classes
@kernels
def test_crf_gradcheck(kernels, K):
    images, probs = make(B=2, K=K, H=2, W=3)
    assert torch.autograd.gradcheck(
        lambda p: dense_crf(images, p, iterations=2, **kernels),
        probs.clamp(0.05, 0.95).requires_grad_(),
        fast_mode=True,
    )


@classes
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(half, K, device):
    images, probs = (x.to(device) for x in make(K=K, dtype=half))
    with torch.autocast(device, half):
        torch.testing.assert_close(dense_crf(images, probs), dense_crf(images, probs.float()), rtol=0, atol=0)
    lattice = PermutohedralLattice(torch.linspace(0, 1, 8, device=device, dtype=half)[:, None])
    assert lattice.filter(torch.ones(8, K - 1, device=device, dtype=half)).dtype == torch.float32


@classes
def test_deterministic_algorithms_repeat_bit_for_bit(K, device):
    images, probs = (x.to(device) for x in make(K=K, H=40, W=50, dtype=torch.float32))

    def run() -> tuple[Tensor, Tensor]:
        leaf = probs.clone().requires_grad_()
        q = dense_crf(images, leaf)
        q.square().sum().backward()
        return q.detach(), leaf.grad

    torch.use_deterministic_algorithms(True)
    try:
        (first, gradient), (second, other) = run(), run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)
    assert torch.equal(gradient, other)
    assert gradient.any()


@pytest.mark.parametrize(("H", "W"), [(1, 1), (1, 200), (200, 1), (2, 3)])
@pytest.mark.parametrize("K", [1, 2, 21])
@pytest.mark.parametrize("constant", [True, False])
def test_degenerate_images(H, W, K, constant, device):
    images, probs = (x.to(device) for x in make(K=K, H=H, W=W, dtype=torch.float32))
    q = dense_crf(images * (not constant), probs.requires_grad_())
    torch.testing.assert_close(q.sum(1), torch.ones_like(q[:, 0]))
    q.square().sum().backward()
    assert probs.grad.isfinite().all()


@classes
def test_certain_and_impossible_classes_are_finite(K):
    images, probs = make(K=K, dtype=torch.float32)
    q = dense_crf(images, probs.round())
    torch.testing.assert_close(q.sum(1), torch.ones_like(q[:, 0]))


def test_empty_batch():
    images, probs = make(B=2)
    assert dense_crf(images[:0], probs[:0]).shape == (0, 3, 5, 6)


def test_memory_format_does_not_matter_and_inputs_stay():
    images, probs = make(B=2)
    before = images.clone(), probs.clone()
    other = dense_crf(*(x.movedim(1, -1).contiguous().movedim(-1, 1) for x in (images, probs)))
    torch.testing.assert_close(other, dense_crf(images, probs))
    assert torch.equal(images, before[0])
    assert torch.equal(probs, before[1])


@pytest.mark.parametrize("settings", [{}, {"iterations": 2, **KERNELS[3]}, KERNELS[1], KERNELS[2]], ids=str)
def test_module_equals_the_function(settings):
    module = DenseCRF(**settings)
    assert torch.equal(module(*make()), dense_crf(*make(), **settings))
    assert all(f"{name}={value}" in repr(module) for name, value in settings.items())
    assert module.state_dict() == {}


def test_a_cam_becomes_a_crf_input():
    images, cam = make(dtype=torch.float32)
    probs = torch.cat([background_score(cam, alpha=4), cam], dim=1)
    assert dense_crf(images, probs).shape == (1, 4, 5, 6)


# refusals


IMAGES, PROBS = make(B=2, dtype=torch.float32)


BAD_SETTINGS = [
    ("iterations", -1, ValueError),
    ("iterations", 1.0, TypeError),
    ("gaussian", 3.0, ValueError),
    ("gaussian", (3.0, 3.0, 3.0), ValueError),
    ("gaussian", (0.0, 3.0), ValueError),
    ("gaussian", (nan, 3.0), ValueError),
    ("gaussian", (3.0, -1.0), ValueError),
    ("gaussian", ("3", 3.0), TypeError),
    ("bilateral", (80.0, 10.0), ValueError),
    ("bilateral", (80.0, -13.0, 10.0), ValueError),
    ("bilateral", (80.0, inf, 10.0), ValueError),
]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("images", IMAGES[0], ValueError),
        ("images", IMAGES[:, :1], ValueError),
        ("images", IMAGES.float(), TypeError),
        ("images", IMAGES.long(), TypeError),
        ("images", IMAGES.numpy(), TypeError),
        ("probs", PROBS[0], ValueError),
        ("probs", PROBS[:1], ValueError),
        ("probs", PROBS[..., :5], ValueError),
        ("probs", PROBS[:, :0], ValueError),
        ("probs", PROBS.long(), TypeError),
        ("probs", PROBS.to("meta"), ValueError),
        ("probs", PROBS - 0.5, ValueError),
        ("probs", 4 * PROBS, ValueError),
        ("probs", PROBS * nan, ValueError),
        ("probs", PROBS.index_fill(1, torch.tensor(1), nan), ValueError),
        *BAD_SETTINGS,
    ],
)
def test_crf_refuses(name, value, error):
    with pytest.raises(error, match=rf"\b{name}\b"):
        dense_crf(**{"images": IMAGES, "probs": PROBS, name: value})


@pytest.mark.parametrize(("name", "value", "error"), BAD_SETTINGS)
def test_module_refuses(name, value, error):
    with pytest.raises(error, match=rf"\b{name}\b"):
        DenseCRF(**{name: value})


def test_a_scale_too_small_for_the_lattice_is_refused():
    with pytest.raises(ValueError, match=re.escape("(sxy, srgb)")):
        dense_crf(IMAGES, PROBS, bilateral=(1e-3, 1e-3, 10.0))
