from __future__ import annotations

import pytest
import torch

from pixelss._random import uniform


def test_a_generator_repeats_its_draws_and_leaves_torchs_own_alone(device):
    like, before = torch.zeros((), device=device), torch.get_rng_state()
    first, second = (uniform(4, 5, like=like, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.device == like.device
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_generator_torchs_seed_holds(device):
    draws = []
    for _ in range(2):
        torch.manual_seed(7)
        draws.append(uniform(100, like=torch.zeros((), device=device), generator=None))
    assert torch.equal(*draws)
    assert draws[0].unique().numel() > 90


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.long])
def test_draws_are_float32_in_0_to_1(dtype):
    draws = uniform(1000, like=torch.zeros((), dtype=dtype), generator=torch.Generator().manual_seed(0))
    assert draws.dtype == torch.float32
    assert 0 <= draws.min() < 0.1
    assert 0.9 < draws.max() < 1


def test_compiled_two_graphs_are_enough_for_any_size():
    torch.compiler.reset()
    from torch._dynamo.testing import CompileCounter  # which takes a second

    counter = CompileCounter()
    compiled = torch.compile(lambda x: uniform(*x.shape, like=x, generator=None) + x, backend=counter, fullgraph=True)
    for size in (4, 5, 6, 7):
        assert compiled(torch.ones(size, 2 * size)).shape == (size, 2 * size)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("generator", [0, "0", torch])
def test_what_is_no_generator_is_refused(generator):
    with pytest.raises(TypeError, match=r"generator must .*manual_seed"):
        uniform(2, like=torch.zeros(()), generator=generator)
