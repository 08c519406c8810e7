"""How much is worked on at a time depends on the device alone."""

from __future__ import annotations

import pytest
import torch

from pixelss._pieces import entries_at_a_time, launches_cost


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("size", [0, 1, 100])
def test_entries_depend_on_the_kind_of_device(size, dtype):
    assert entries_at_a_time(torch.empty(size, dtype=dtype)) == 2**20
    assert not launches_cost(torch.empty(size, dtype=dtype))
    assert launches_cost(torch.empty(size, dtype=dtype, device="meta"))
    assert entries_at_a_time(torch.empty(size, dtype=dtype, device="meta")) == 2**24
