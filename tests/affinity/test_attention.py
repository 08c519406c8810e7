from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelss import attention_affinity, sinkhorn_affinity
from tests.blocks import Block
from tests.oracles import assert_refuses, field
from tests.strategies import Batch, make_batch

SIGNATURES = {
    "attention_affinity": "(attention, *, skip=1, layers=None, reduce='mean')",
    "sinkhorn_affinity": "(affinity, *, iterations=3, power=2)",
}


def cell_affinity(batch: Batch, cells: int) -> Tensor:
    """Return a positive (B, cells, cells) of the batch's numbers, without arithmetic that would round them."""
    x = batch.affinity.flatten(1)
    return x.repeat(1, -(-(cells**2) // x.shape[1]))[:, : cells**2].unflatten(1, (cells, cells))


def attention_of(batch: Batch, tokens: int, *, layers: int = 2, heads: int = 2) -> Tensor:
    """Return positive weights (L, B, heads, tokens, tokens) of the batch's numbers."""
    x, size = batch.affinity.flatten(1), layers * heads * tokens**2
    x = x.repeat(1, -(-size // x.shape[1]))[:, :size]
    return x.unflatten(1, (layers, heads, tokens, tokens)).movedim(1, 0)


def attention_affinity_by_loops(attention, *, skip=1, layers=None, reduce="mean") -> Tensor:
    chosen = list(attention)[-(layers or len(attention)) :]
    total = 0
    for layer in chosen:
        heads = layer.shape[1]
        total = total + sum(layer[:, head, skip:, skip:] for head in range(heads)) / heads
    return total / len(chosen) if reduce == "mean" else total


def sinkhorn_affinity_by_loops(affinity: Tensor, *, iterations: int = 3, power: int = 2) -> Tensor:
    P, results = affinity.shape[1], []
    for one in affinity:
        w = {(p, q): one[p, q] for p, q in product(range(P), repeat=2)}
        for _ in range(iterations):
            columns = [sum(w[p, q] for p in range(P)) for q in range(P)]
            w = {(p, q): value / columns[q] for (p, q), value in w.items()}
            rows = [sum(w[p, q] for q in range(P)) for p in range(P)]
            w = {(p, q): value / rows[p] for (p, q), value in w.items()}
        w = {(p, q): (w[p, q] + w[q, p]) / 2 for p, q in w}
        matrix = torch.stack([w[p, q] for p, q in product(range(P), repeat=2)]).view(P, P)
        result = matrix
        for _ in range(power - 1):
            result = result @ matrix
        results.append(result)
    return torch.stack(results) if results else affinity


MADE = {"checks": "its entry makes the argument of other tensors"}
BLOCKS = {
    "attention_affinity": Block(
        lambda b: attention_affinity(attention_of(b, 6)),
        lambda b: attention_affinity_by_loops(attention_of(b, 6)),
        but=MADE,
    ),
    "attention_affinity sum": Block(
        lambda b: attention_affinity(attention_of(b, 6), skip=2, layers=1, reduce="sum"),
        lambda b: attention_affinity_by_loops(attention_of(b, 6), skip=2, layers=1, reduce="sum"),
        but=MADE,
    ),
    "sinkhorn_affinity": Block(
        lambda b: sinkhorn_affinity(cell_affinity(b, 5)),
        lambda b: sinkhorn_affinity_by_loops(cell_affinity(b, 5)),
        but=MADE,
    ),
    "sinkhorn_affinity power": Block(
        lambda b: sinkhorn_affinity(cell_affinity(b, 4), iterations=1, power=3),
        lambda b: sinkhorn_affinity_by_loops(cell_affinity(b, 4), iterations=1, power=3),
        but=MADE,
    ),
}


# the public code


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=2e-6)


def test_attention_and_sinkhorn_equal_clip_es(device):
    golden = field("clipes")
    attention = golden["attn"][:, None, None].to(device)  # heads are averaged already
    affinity = attention_affinity(attention, layers=8)
    close(affinity[0], golden["attn_mean_last8"])
    inside = golden["box_mask"].flatten().float()
    close(sinkhorn_affinity(affinity)[0].cpu() * inside, golden["trans"])


def test_sinkhorn_equals_weclip(device):
    golden = field("clipes")
    close(sinkhorn_affinity(golden["weclip_attn"][None].to(device))[0], golden["weclip_trans"])


def test_the_sum_of_all_layers_equals_mctformer(device):
    golden = field("mctformer")
    affinity = attention_affinity(golden["attn"].to(device), skip=4, reduce="sum")
    for key in ("v2", "plus"):
        cam = golden[f"{key}_cams_fused"].flatten(2)
        refined = torch.einsum("bpq,bnq->bnp", affinity.cpu(), cam)
        close(refined.view_as(golden[f"{key}_refined"]), golden[f"{key}_refined"])


# properties


def weights(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1


seeds, cells = st.integers(0, 10_000), st.integers(1, 8)


@given(seed=seeds, P=cells, images=st.integers(0, 3), power=st.integers(1, 4))
def test_sinkhorn_is_nearly_doubly_stochastic_and_symmetric(seed, P, images, power):
    result = sinkhorn_affinity(weights(seed, images, P, P), iterations=200, power=power)
    torch.testing.assert_close(result, result.mT)
    assert (result >= 0).all()
    for axis in (1, 2):
        torch.testing.assert_close(result.sum(axis), torch.ones(images, P, dtype=torch.float64))
    few = sinkhorn_affinity(weights(seed, images, P, P))
    torch.testing.assert_close(few, few.mT)
    assert ((few.sum(1) - 1).abs() < 0.1).all()


@given(seed=seeds, P=cells)
def test_a_doubly_stochastic_symmetric_affinity_is_only_squared(seed, P):
    start = sinkhorn_affinity(weights(seed, 2, P, P), iterations=500, power=1)
    torch.testing.assert_close(sinkhorn_affinity(start), start @ start)
    assert torch.equal(sinkhorn_affinity(start, iterations=0, power=1), (start + start.mT) / 2)


@given(seed=seeds, scale=st.floats(0.01, 100), data=st.data())
def test_sinkhorn_is_blind_to_scale_and_order(seed, scale, data):
    affinity = weights(seed, 1, 5, 5)
    expected = sinkhorn_affinity(affinity)
    torch.testing.assert_close(sinkhorn_affinity(scale * affinity), expected)
    order = torch.tensor(data.draw(st.permutations(range(5))))
    permuted = sinkhorn_affinity(affinity[:, order][:, :, order])
    torch.testing.assert_close(permuted, expected[:, order][:, :, order])


@given(seed=seeds, L=st.integers(1, 4), heads=st.integers(1, 3), T=st.integers(1, 6), data=st.data())
def test_layers_and_heads(seed, L, heads, T, data):
    attention = weights(seed, L, 2, heads, T, T)
    skip, layers = data.draw(st.integers(0, T - 1)), data.draw(st.integers(1, L))
    mean = attention_affinity(attention, skip=skip, layers=layers)
    assert mean.shape == (2, T - skip, T - skip)
    torch.testing.assert_close(attention_affinity(attention, skip=skip, layers=layers, reduce="sum"), mean * layers)
    torch.testing.assert_close(attention_affinity(list(attention[L - layers :]), skip=skip), mean)


def test_a_row_without_special_tokens_is_a_distribution():
    attention = make_batch().affinity.new_ones(3, 2, 2, 7, 7).softmax(-1)
    rows = attention_affinity(attention, skip=0).sum(2)
    torch.testing.assert_close(rows, torch.ones_like(rows))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("attention", torch.rand(2, 3, 5, 5), ValueError),
        ("attention", torch.rand(2, 1, 3, 5, 4), ValueError),
        ("attention", torch.ones(2, 1, 3, 5, 5).long(), TypeError),
        ("attention", [], ValueError),
        ("skip", -1, ValueError),
        ("skip", 5, ValueError),
        ("skip", 1.0, TypeError),
        ("layers", 0, ValueError),
        ("layers", 3, ValueError),
        ("layers", 1.5, TypeError),
        ("reduce", "max", ValueError),
    ],
)
def test_attention_affinity_refuses(name, value, error):
    arguments = {"attention": torch.rand(2, 1, 3, 5, 5), "skip": 1, "layers": 2, "reduce": "mean"}
    assert_refuses(attention_affinity, arguments, name, value, error)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("affinity", torch.rand(4, 4), ValueError),
        ("affinity", torch.rand(1, 4, 5), ValueError),
        ("affinity", torch.ones(1, 4, 4).long(), TypeError),
        ("iterations", -1, ValueError),
        ("iterations", 1.0, TypeError),
        ("power", 0, ValueError),
        ("power", 0.5, TypeError),
    ],
)
def test_sinkhorn_affinity_refuses(name, value, error):
    arguments = {"affinity": torch.rand(1, 4, 4), "iterations": 3, "power": 2}
    assert_refuses(sinkhorn_affinity, arguments, name, value, error)
