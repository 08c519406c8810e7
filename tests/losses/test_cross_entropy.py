from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pixelss import balanced_cross_entropy, multi_scale_cross_entropy, underfit_cross_entropy
from tests import oracles
from tests.blocks import Block
from tests.oracles import assert_matches, bilinear, interpolate, labelled, value_and_grads
from tests.strategies import SIZES, Batch, batches, make_batch, noise

SIGNATURES = {
    "multi_scale_cross_entropy": "(logits, mask, *, ignore_index=255)",
    "balanced_cross_entropy": "(logits, mask, *, ignore_index=255)",
    "underfit_cross_entropy": "(logits, mask, *, start=0.5, limit=0.5, kind='clamp', ignore_index=255)",
}

BLOCKS = {
    "multi_scale_cross_entropy": Block(
        lambda b: multi_scale_cross_entropy(b.raw, b.mask),
        lambda b: multi_scale_cross_entropy_by_loops(b.raw, b.mask),
        but={"finite": "takes logits, which must be finite"},
    ),
    "balanced_cross_entropy": Block(
        lambda b: balanced_cross_entropy(b.raw[2], b.mask),
        lambda b: balanced_cross_entropy_by_loops(b.raw[2], b.mask),
        but={"finite": "takes logits, which must be finite"},
    ),
    "underfit_cross_entropy": Block(
        lambda b: underfit_cross_entropy(b.raw[2], b.mask),
        lambda b: underfit_cross_entropy_by_loops(b.raw[2], b.mask),
        but={"finite": "takes logits, which must be finite"},
    ),
    "underfit_cross_entropy clamp": Block(
        lambda b: underfit_cross_entropy(b.raw[2], b.mask, start=9),
        lambda b: underfit_cross_entropy_by_loops(b.raw[2], b.mask, start=9),
        but={"finite": "takes logits, which must be finite"},
    ),
    "underfit_cross_entropy pow": Block(
        lambda b: underfit_cross_entropy(b.raw[2], b.mask, start=9, kind="pow"),
        lambda b: underfit_cross_entropy_by_loops(b.raw[2], b.mask, start=9, kind="pow"),
        but={"finite": "takes logits, which must be finite"},
    ),
    "underfit_cross_entropy ignore": Block(
        lambda b: underfit_cross_entropy(b.raw[2], b.mask, start=9, limit=1.2, kind="ignore"),
        lambda b: underfit_cross_entropy_by_loops(b.raw[2], b.mask, start=9, limit=1.2, kind="ignore"),
        but={"finite": "takes logits, which must be finite"},
    ),
}

halves = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
seeds = st.integers(0, 2**32 - 1)


def multi_scale_cross_entropy_by_loops(logits: Sequence[Tensor], mask: Tensor, ignore_index: int = 255) -> Tensor:
    """CE of every scale, and of the largest logits of all where there are several: means over valid pixels, summed."""
    maps = [bilinear(one, mask.shape[1:]) for one in logits]
    if len(maps) > 1:
        maps.append(functools.reduce(torch.maximum, maps))
    total = sum(one.sum() for one in maps) * 0
    valid = list(labelled(mask, maps[0].shape[1] - 1, ignore_index))
    for one, (b, i, j, k) in product(maps, valid):
        total = total - torch.log(torch.exp(one[b, k, i, j]) / torch.exp(one[b, :, i, j]).sum()) / len(valid)
    return total


def balanced_cross_entropy_by_loops(logits: Tensor, mask: Tensor, ignore_index: int = 255) -> Tensor:
    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    for b, i, j, k in labelled(mask, logits.shape[1] - 1, ignore_index):
        parts[k > 0].append(torch.log(torch.exp(logits[b, :, i, j]).sum()) - logits[b, k, i, j])
    return logits.sum() * 0 + sum(sum(part) / len(part) for part in parts.values() if part)


def underfit_cross_entropy_by_loops(
    logits: Tensor,
    mask: Tensor,
    *,
    start: float = 0.5,
    limit: float = 0.5,
    kind: str = "clamp",
    ignore_index: int = 255,
) -> Tensor:
    zero = logits.sum() * 0
    losses = [zero] * mask.numel()
    _, H, W = mask.shape
    void = True
    for b, i, j, k in labelled(mask, logits.shape[1] - 1, ignore_index):
        losses[(b * H + i) * W + j] = torch.logsumexp(logits[b, :, i, j], 0) - logits[b, k, i, j]  # never below 0
        void = False
    mean = sum(losses) / len(losses) if losses else zero
    if void or not mean < start:
        return mean
    spared = []
    for loss in losses:
        if kind == "pow":
            spared.append((loss + 1e-9) ** limit)
        else:
            spared.append(loss if loss <= limit else zero + (limit if kind == "clamp" else 0))
    return sum(spared) / len(spared)


def loss_of(batch: Batch, **settings: int) -> list[Tensor]:
    *raw, mask = *batch.raw, batch.mask
    return value_and_grads(lambda *logits: multi_scale_cross_entropy(logits, mask, **settings), *raw)


@pytest.mark.parametrize(("low", "high"), SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("scales", [1, 2, 3])
@pytest.mark.parametrize("dtype", oracles.TOLERANCE, ids=str)
def test_loss_equals_the_loop(low, high, scales, dtype, device):
    batch = make_batch(feature_size=low, image_size=high)
    assert_matches(
        lambda *x: multi_scale_cross_entropy(x[:-1], x[-1]),
        lambda *x: multi_scale_cross_entropy_by_loops(x[:-1], x[-1]),
        *batch.raw[:scales],
        batch.mask,
        dtype=dtype,
        device=device,
    )


@given(batch=batches(), void=st.sampled_from([0, 1, -1, 255]))
def test_any_loss_equals_the_loop(batch, void):
    actual = multi_scale_cross_entropy(batch.raw, batch.mask, ignore_index=void)
    torch.testing.assert_close(actual, multi_scale_cross_entropy_by_loops(batch.raw, batch.mask, void))


@given(batch=batches())
def test_a_single_scale_is_cross_entropy(batch):
    mask = batch.mask.where((batch.mask >= 0) & (batch.mask < batch.raw[0].shape[1]), 255)
    mask[0, 0, 0] = 0
    for logits in batch.raw:
        resized = interpolate(logits, mask.shape[1:])
        expected = functional.cross_entropy(resized, mask, ignore_index=255)
        torch.testing.assert_close(multi_scale_cross_entropy([logits], mask), expected)


def test_the_loss_of_the_recipe():
    mask = torch.randint(0, 21, (2, 33, 33), generator=torch.Generator().manual_seed(0))
    logits = [noise(2, 21, side, side, seed=side) for side in (5, 4, 3)]
    one, three_quarters, half = (interpolate(x, (33, 33)) for x in logits)
    largest = torch.maximum(torch.maximum(one, three_quarters), half)
    expected = sum(functional.cross_entropy(x, mask) for x in (one, three_quarters, half, largest))
    torch.testing.assert_close(multi_scale_cross_entropy(logits, mask), expected)


def test_loss_gradcheck():
    batch = make_batch(feature_size=(2, 3), image_size=(3, 4), images=1)
    logits = [x.requires_grad_() for x in batch.raw]
    assert torch.autograd.gradcheck(lambda *x: multi_scale_cross_entropy(x, batch.mask), logits)


@given(batch=batches(), seed=seeds)
def test_void_pixels_have_no_influence(batch, seed):
    K = batch.raw[0].shape[1]
    void = (batch.mask < 0) | (batch.mask >= K)
    logits = [noise(len(void), K, *void.shape[1:], seed=seed + i) for i in range(2)]
    others = [x + 1e3 * noise(*x.shape, seed=seed) * void[:, None] for x in logits]
    expected = value_and_grads(lambda *x: multi_scale_cross_entropy(x, batch.mask), *logits)
    actual = value_and_grads(lambda *x: multi_scale_cross_entropy(x, batch.mask), *others)
    torch.testing.assert_close(actual, expected)
    assert not any(gradient.abs().sum(1)[void].any() for gradient in actual[1:])


@given(batch=batches(), value=st.sampled_from([-(2**40), -100, -1, 200, 255, 2**40]))
def test_every_value_out_of_range_is_void(batch, value):
    K = batch.raw[0].shape[1]
    mask = batch.mask.where((batch.mask >= 0) & (batch.mask < K), value)
    actual, expected = loss_of(batch._replace(mask=mask)), loss_of(batch)
    assert all(map(torch.equal, actual, expected))


@given(data=st.data(), batch=batches())
def test_permuting_classes_permutes_the_gradient(data, batch):
    K = batch.raw[0].shape[1]
    order = torch.tensor(data.draw(st.permutations(range(K))))
    inside = (batch.mask >= 0) & (batch.mask < K)
    mask = order.argsort()[batch.mask.clamp(0, K - 1)].where(inside, 255)
    value, *gradients = loss_of(batch._replace(mask=mask, raw=tuple(x[:, order] for x in batch.raw)))
    expected, *reference = loss_of(batch)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients, [x[:, order] for x in reference])


@given(batch=batches())
def test_the_order_of_scales_does_not_matter(batch):
    actual, expected = loss_of(batch._replace(raw=batch.raw[::-1])), loss_of(batch)
    torch.testing.assert_close([actual[0], *actual[:0:-1]], expected)


@pytest.mark.parametrize("scales", [1, 2, 5])
def test_logits_that_do_not_know_give_log_k_a_term(scales):
    logits = [torch.full((1, 7, side, 2), 3.0) for side in range(1, scales + 1)]
    terms = 1 if scales == 1 else scales + 1
    loss = multi_scale_cross_entropy(logits, torch.arange(6).view(1, 2, 3))
    assert loss.item() == pytest.approx(terms * math.log(7), rel=1e-6)


@halves
def test_large_half_precision_logits_have_a_finite_loss(half, device):
    logits = [1e4 * noise(2, 3, 4, 5).to(device, half) for _ in range(2)]
    mask = make_batch(image_size=(9, 7)).mask[:2].to(device)
    loss, *gradients = value_and_grads(lambda *x: multi_scale_cross_entropy(x, mask), *logits)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, multi_scale_cross_entropy([x.float() for x in logits], mask))
    assert all(gradient.isfinite().all() for gradient in gradients)


# The balanced one


def test_balanced_loss_and_gradient_are_rrms():
    a = oracles.field("rrm")
    logits = a["joint_logits"].requires_grad_()
    loss = balanced_cross_entropy(interpolate(logits, a["joint_label"].shape[1:]), a["joint_label"])
    torch.testing.assert_close(loss, a["joint_ce"], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], a["joint_grad_ce"], rtol=2e-6, atol=2e-6)


def test_half_of_the_balanced_loss_is_afas():
    a = oracles.field("afa")
    loss = balanced_cross_entropy(a["seg_logits"], a["refined_label"]) / 2
    torch.testing.assert_close(loss, a["seg_loss"], rtol=2e-6, atol=2e-6)


@given(batch=batches(), void=st.sampled_from([0, 1, -1, 255]))
def test_any_balanced_loss_equals_the_loop(batch, void):
    actual = balanced_cross_entropy(batch.probs, batch.mask, ignore_index=void)
    torch.testing.assert_close(actual, balanced_cross_entropy_by_loops(batch.probs, batch.mask, void))


@given(batch=batches())
def test_a_balanced_loss_of_one_part_is_cross_entropy(batch):
    foreground = batch.mask.where((batch.mask > 0) & (batch.mask <= batch.classes), 255)
    foreground[0, 0, 0] = 1
    for mask in (foreground, torch.zeros_like(foreground)):
        expected = functional.cross_entropy(batch.probs, mask, ignore_index=255)
        torch.testing.assert_close(balanced_cross_entropy(batch.probs, mask), expected)


@given(data=st.data(), batch=batches())
def test_the_order_of_the_foreground_does_not_matter_to_the_balanced_loss(data, batch):
    N = batch.classes
    order = torch.tensor([0, *data.draw(st.permutations(range(1, N + 1)))])
    mask = order.argsort()[batch.mask.clamp(0, N)].where((batch.mask >= 0) & (batch.mask <= N), 255)
    actual = balanced_cross_entropy(batch.probs[:, order], mask)
    torch.testing.assert_close(actual, balanced_cross_entropy(batch.probs, batch.mask))


def test_how_many_pixels_a_part_has_does_not_matter_to_the_balanced_loss():
    logits = noise(1, 3, 1, 2)
    few, many = torch.tensor([[[0, 2]]]), torch.tensor([[[0, 0, 0, 0, 2]]])
    expected = balanced_cross_entropy(logits, few)
    torch.testing.assert_close(balanced_cross_entropy(logits[..., [0, 0, 0, 0, 1]], many), expected)


def test_balanced_loss_gradcheck():
    logits = noise(2, 3, 2, 3).requires_grad_()
    mask = torch.tensor([[[0, 1, 255], [2, 0, 1]]]).expand(2, 2, 3)
    assert torch.autograd.gradcheck(lambda x: balanced_cross_entropy(x, mask), logits)


# The under-fitting one

kinds = pytest.mark.parametrize("kind", ["clamp", "pow", "ignore"])


@kinds
@pytest.mark.parametrize(("start", "limit"), [(0.5, 0.5), (10.0, 0.3), (0.4, 0.3)])
def test_underfit_loss_and_gradient_are_pmms(kind, start, limit):
    a = oracles.field("pmm_underfit")
    key = f"{kind}_beta{start}_k{limit}" if start > 0.4 else "plain_beta0.5_k0.5"  # the mean loss is 0.47
    logits = a["logits"].requires_grad_()
    loss = underfit_cross_entropy(logits, a["labels"], start=start, limit=limit, kind=kind)
    torch.testing.assert_close(loss, a[f"loss_{key}"], rtol=2e-6, atol=2e-6)
    if f"grad_{key}" in a:
        (gradient,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(gradient, a[f"grad_{key}"], rtol=2e-6, atol=2e-6)


def test_a_loss_that_has_not_begun_has_the_gradient_of_pmms():
    a = oracles.field("pmm_underfit")
    logits = a["logits"].requires_grad_()
    (gradient,) = torch.autograd.grad(underfit_cross_entropy(logits, a["labels"], start=0), logits)
    torch.testing.assert_close(gradient, a["grad_plain_beta10.0_k0.3"], rtol=2e-6, atol=2e-6)


@given(
    batch=batches(),
    void=st.sampled_from([0, 1, -1, 255]),
    start=st.sampled_from([0.0, 1.0, 9.0]),
    limit=st.sampled_from([0.3, 1.0, 1.5]),
    kind=st.sampled_from(["clamp", "pow", "ignore"]),
)
def test_any_underfit_loss_equals_the_loop(batch, void, **settings):
    actual = value_and_grads(
        lambda x: underfit_cross_entropy(x, batch.mask, ignore_index=void, **settings), batch.raw[2]
    )
    expected = value_and_grads(
        lambda x: underfit_cross_entropy_by_loops(x, batch.mask, ignore_index=void, **settings), batch.raw[2]
    )
    torch.testing.assert_close(actual, expected)


@given(batch=batches())
def test_an_underfit_loss_without_void_that_has_not_begun_is_cross_entropy(batch):
    mask = batch.mask.clamp(0, batch.classes)
    expected = functional.cross_entropy(batch.probs, mask)
    for settings in ({"start": 0}, {"start": 99, "limit": 99}, {"start": 99, "limit": 99, "kind": "ignore"}):
        torch.testing.assert_close(underfit_cross_entropy(batch.probs, mask, **settings), expected)


@given(batch=batches(), limits=st.tuples(st.floats(0, 3), st.floats(0, 3)).map(sorted))
def test_a_lower_limit_never_costs_more(batch, limits):
    for kind in ("clamp", "ignore"):
        low, high = (
            underfit_cross_entropy(batch.probs, batch.mask, start=99, limit=limit, kind=kind) for limit in limits
        )
        assert 0 <= low <= high + 1e-12
        assert high <= underfit_cross_entropy(batch.probs, batch.mask, start=0) + 1e-12


@pytest.mark.parametrize("kind", ["clamp", "ignore"])
def test_pixels_that_do_not_fit_lose_their_gradient(kind):
    logits = torch.tensor([[4.0, 4.0, 0.0], [0.0, 0.0, 4.0]]).view(1, 2, 1, 3).requires_grad_()
    mask = torch.tensor([[[0, 1, 1]]])  # the second is wrong
    underfit_cross_entropy(logits, mask, start=2, kind=kind).backward()
    assert logits.grad.abs().sum(1).gt(0).tolist() == [[[True, False, True]]]
    logits.grad = None
    underfit_cross_entropy(logits, mask, start=1, kind=kind).backward()  # the mean loss is 1.35
    assert logits.grad.abs().sum(1).gt(0).all()


@kinds
@pytest.mark.parametrize("images", [0, 2])
def test_a_void_or_empty_batch_gives_an_underfit_zero_on_the_graph(kind, images):
    logits = torch.randn(images, 3, 4, 4, requires_grad=True)
    loss = underfit_cross_entropy(logits, torch.full((images, 4, 4), 255), kind=kind)
    assert loss == 0
    loss.backward()
    assert not logits.grad.any()


@kinds
def test_logits_that_fit_to_the_last_bit_have_a_finite_gradient(kind):
    logits = torch.tensor([[99.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2).requires_grad_()
    underfit_cross_entropy(logits, torch.tensor([[[0, 1]]]), kind=kind).backward()
    assert logits.grad.isfinite().all()


def test_a_power_that_overflows_does_not_matter_before_it_begins():
    logits = torch.tensor([-200.0, 200.0]).view(1, 2, 1, 1).requires_grad_()
    loss = underfit_cross_entropy(logits, torch.zeros(1, 1, 1).long(), kind="pow", limit=20)
    loss.backward()
    assert loss == 400
    assert logits.grad.flatten().tolist() == [-1, 1]


@kinds
def test_underfit_loss_gradcheck(kind):
    logits = noise(2, 3, 2, 3).requires_grad_()
    mask = torch.tensor([[[0, 1, 255], [2, 0, 1]]]).expand(2, 2, 3)
    assert torch.autograd.gradcheck(lambda x: underfit_cross_entropy(x, mask, start=9, kind=kind), logits)


# refusals


LOGITS = torch.rand(2, 3, 4, 5)


MASK = torch.zeros(2, 8, 9, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("logits", [], ValueError),
        ("logits", LOGITS, TypeError),
        ("logits", None, TypeError),
        ("logits", [LOGITS[0]], ValueError),
        ("logits", [LOGITS, None], TypeError),
        ("logits", [LOGITS, LOGITS.long()], TypeError),
        ("logits", [LOGITS, LOGITS[:, :2]], ValueError),
        ("logits", [LOGITS, LOGITS[:1]], ValueError),
        ("logits", [LOGITS[:, :, :0]], ValueError),
        ("logits", [LOGITS, LOGITS.to("meta")], ValueError),
        ("mask", MASK[0], ValueError),
        ("mask", MASK[:1], ValueError),
        ("mask", MASK[:, None], ValueError),
        ("mask", MASK.float(), TypeError),
        ("mask", MASK.bool(), TypeError),
        ("mask", MASK.to("meta"), ValueError),
        ("mask", None, TypeError),
        ("ignore_index", 255.0, TypeError),
        ("ignore_index", None, TypeError),
    ],
)
def test_loss_refuses(name, value, error):
    with pytest.raises(error, match=rf"\b{name}\b.* must .* but "):
        multi_scale_cross_entropy(**{"logits": [LOGITS, LOGITS], "mask": MASK, name: value})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("logits", LOGITS[0], ValueError),
        ("logits", LOGITS.long(), TypeError),
        ("logits", None, TypeError),
        ("mask", MASK, ValueError),
        ("mask", MASK[:1, :4, :5], ValueError),
        ("mask", MASK[:, :4, :5].float(), TypeError),
        ("mask", MASK[:, :4, :5].to("meta"), ValueError),
        ("ignore_index", 255.0, TypeError),
    ],
)
def test_balanced_loss_refuses(name, value, error):
    given_ = {"logits": LOGITS, "mask": MASK[:, :4, :5], "ignore_index": 255}
    oracles.assert_refuses(balanced_cross_entropy, given_, name, value, error)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("logits", LOGITS[0], ValueError),
        ("logits", LOGITS.long(), TypeError),
        ("mask", MASK, ValueError),
        ("mask", MASK[:, :4, :5].float(), TypeError),
        ("mask", MASK[:, :4, :5].to("meta"), ValueError),
        ("start", -0.5, ValueError),
        ("start", "0.5", TypeError),
        ("limit", -0.5, ValueError),
        ("limit", float("nan"), ValueError),
        ("kind", "plain", ValueError),
        ("kind", None, ValueError),
        ("ignore_index", 255.0, TypeError),
    ],
)
def test_underfit_loss_refuses(name, value, error):
    given_ = {"logits": LOGITS, "mask": MASK[:, :4, :5], "start": 0.5, "limit": 0.5, "kind": "clamp"}
    oracles.assert_refuses(underfit_cross_entropy, given_, name, value, error)
