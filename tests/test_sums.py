"""Sums of rows, by both ways and against loops; the CRF's and the lattice's own tests meet them at work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pixelss import _sums
from pixelss._sums import _has_products, offsets_of, row_sums, sums

runs = st.lists(st.integers(0, 4), max_size=6)  # how many rows each sum has
indices = st.sampled_from([torch.int32, torch.int64])
ways = pytest.mark.parametrize("products", [True, False], ids=["products", "bags"])


@contextmanager
def sums_by(products: bool) -> Iterator[None]:
    """Let sums of one column be products of sparse matrices, where this torch has them, or bags as elsewhere."""
    if products and not _has_products():
        pytest.skip("this torch multiplies no sparse matrices")
    with pytest.MonkeyPatch.context() as patch:
        if not products:
            patch.setattr(_sums, "_has_products", lambda: False)
            patch.setattr(torch, "sparse_csr_tensor", None)
        yield


@ways
@given(runs=runs, C=st.integers(1, 3), index=indices, weighted=st.booleans(), seed=st.integers(0, 10_000))
def test_sums_of_each_run(products, runs, C, index, weighted, seed):
    draw = torch.Generator().manual_seed(seed)
    table = torch.rand(5, C, generator=draw, dtype=torch.float64)
    rows = torch.randint(0, 5, (sum(runs),), generator=draw).to(index)
    weights = torch.randn(sum(runs), generator=draw, dtype=torch.float64)
    expected, at = torch.zeros(len(runs), C, dtype=torch.float64), 0
    for i, run in enumerate(runs):
        for j in range(at, at + run):
            expected[i] += (weights[j] if weighted else 1) * table[rows[j]]
        at += run
    offsets = torch.tensor([0, *runs]).cumsum(0, dtype=index)
    with sums_by(products):
        result = sums(table, rows, offsets, weights if weighted else None)
    torch.testing.assert_close(result, expected)


@ways
@pytest.mark.parametrize("shape", [(6, 1, 1), (6, 1, 5), (6, 1, 8), (6, 1, 9), (6, 3, 2), (0, 1, 4)])
def test_row_sums_are_those_of_the_last_axis(products, shape):
    like, x = torch.empty(shape), torch.randn(shape)
    with sums_by(products):
        torch.testing.assert_close(row_sums(like)(x), x.sum(-1, keepdim=True))


def test_one_column_is_summed_by_products(monkeypatch):
    with sums_by(True):
        monkeypatch.setattr(_sums, "embedding_bag", None)
        index, offsets = torch.tensor([0, 1, 1]), torch.tensor([0, 2, 3])
        assert sums(torch.tensor([[1.0], [2.0]]), index, offsets, torch.ones(3)).tolist() == [[3], [2]]
        monkeypatch.setattr(torch, "sum", None)
        assert row_sums(torch.empty(1, 1, 8))(torch.ones(1, 1, 8)).tolist() == [[[8]]]
        with pytest.raises(TypeError):
            row_sums(torch.empty(1, 1, 9))


def test_offsets_say_where_rows_begin_and_the_last_ends():
    assert offsets_of(torch.zeros(3, 4, dtype=torch.int32)).tolist() == [0, 4, 8, 12]
    assert offsets_of(torch.zeros(3, 4, dtype=torch.int32)).dtype == torch.int32
    assert offsets_of(torch.zeros(0, 4, dtype=torch.int64)).tolist() == [0]


def test_looking_for_sparse_products_warns_nobody_and_may_fail(monkeypatch):
    torch.set_warn_always(True)  # else torch warns once a process
    try:
        assert _has_products.__wrapped__() == _has_products()
    finally:
        torch.set_warn_always(False)

    def refuse(*_):
        raise RuntimeError("Calling addmv on a sparse CPU tensor requires Linux platform")

    monkeypatch.setattr("torch.mv", refuse)
    assert not _has_products.__wrapped__()
