"""The look-ups of the threshold sweep against loops over pixels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pixelss._lookup import below, strongest_class

LEVELS = st.sampled_from([0.0, 0.2, 0.5, 0.7, 1.0])  # few, so that classes tie


@given(
    levels=st.lists(LEVELS, min_size=24, max_size=24),
    classes=st.sampled_from([1, 2, 3, 4]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    last=st.booleans(),
)
def test_the_strongest_class_is_the_first_of_the_largest(levels, classes, dtype, last):
    cam = torch.tensor(levels, dtype=dtype).view(2, classes, -1, 1)
    values, found = strongest_class(cam.to(memory_format=torch.channels_last) if last else cam)
    for b in range(2):
        for p in range(cam.shape[2]):
            column = cam[b, :, p, 0].tolist()
            assert values[b, p, 0].item() == max(column)
            assert found[b, p, 0].item() == column.index(max(column))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "thresholds",
    [[t / 100 for t in range(61)], [0.5], [0.3, 0.3001, 0.30011], [0.0, 1.0]],
    ids=["a sweep", "one", "several a cell", "the ends"],
)
def test_thresholds_below_a_value_are_counted(thresholds, dtype):
    steps = torch.tensor(thresholds, dtype=dtype)
    near = [(steps + sign * 1e-6).clamp(0, 1) for sign in (-1, 0, 1)]  # at a threshold and at either side
    values = torch.cat([*near, torch.linspace(0, 1, 500, dtype=dtype)])
    found = below(steps, values[None])
    assert found.dtype == torch.int32
    assert found[0].tolist() == [sum(step < value for step in steps.tolist()) for value in values.tolist()]
