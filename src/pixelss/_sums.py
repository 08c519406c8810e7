"""Weighted sums of a table's rows, in the way that is fastest where it lies."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from pixelss._simplices import narrow

_FEW = 8  # columns whose sum takes torch longer than a product


def offsets_of(rows: Tensor) -> Tensor:
    """Return where each of the rows begins when they are flat, and where the last ends."""
    return torch.arange(0, rows.numel() + 1, rows.shape[1], dtype=rows.dtype, device=rows.device)


def sums(table: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the sum of weight * row of the table (N, C) over each run of the index, (len(offsets) - 1, C)."""
    if weights is not None and _by_products(table):
        size = (len(offsets) - 1, len(table))
        matrix = torch.sparse_csr_tensor(offsets, index, weights, size, device=table.device)
        return torch.mv(matrix, table[:, 0])[:, None]
    return embedding_bag(index, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def row_sums(like: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that sums tensors as large as `like` over their last axis, (P, S, K) -> (P, S, 1)."""
    *rows, K = like.shape
    entries = like.view(-1, 1)
    if K > _FEW or rows[1] > 1 or not _by_products(entries):  # of several label sets the matrix is large
        return partial(torch.sum, dim=-1, keepdim=True)
    index = torch.arange(len(entries), dtype=narrow(len(entries) + 1), device=like.device)
    offsets, ones = offsets_of(index.view(-1, K)), torch.ones_like(index, dtype=like.dtype)
    return lambda x: sums(x.view(-1, 1), index, offsets, ones).view(*rows, 1)


def _by_products(table: Tensor) -> bool:
    """Return whether sums are products of a sparse matrix and a vector, which take a third of an embedding's time."""
    return table.shape[1] == 1 and table.device.type == "cpu" and _has_products()


@lru_cache(maxsize=1)
def _has_products() -> bool:
    """Return whether this torch can multiply sparse matrices, which needs MKL; its warning of a beta is dropped."""
    one = torch.ones(1, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return bool(torch.mv(torch.sparse_csr_tensor([0, 1], [0], one, device=one.device), one) == 1)
        except RuntimeError:
            return False
