from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelss import confident_mask
from tests.blocks import Block

SIGNATURES = {"confident_mask": "(foreground, background, *, ignore_index=255)"}

BLOCKS = {
    "confident_mask": Block(
        lambda b: confident_mask(b.mask, b.mask.flip(-1)),
        lambda b: confident_mask_by_loops(b.mask, b.mask.flip(-1), 255),
        but={"void": "knows no N: a class that is too large stays as it is"},
    ),
}


def make(seed: int, *, B: int = 2, H: int = 4, W: int = 5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    foreground, background = (torch.randint(0, 4, (B, H, W), generator=g) for _ in range(2))
    foreground[torch.rand(B, H, W, generator=g) < 0.4] = 0
    background[torch.rand(B, H, W, generator=g) < 0.4] = 0
    return foreground, background


def confident_mask_by_loops(foreground: Tensor, background: Tensor, ignore_index: int) -> Tensor:
    """IRN's rule, a pixel at a time."""
    mask = torch.full(foreground.shape, ignore_index)
    for pixel in product(*map(range, foreground.shape)):
        if foreground[pixel] > 0:
            mask[pixel] = foreground[pixel]
        elif foreground[pixel] == 0 and background[pixel] == 0:
            mask[pixel] = 0
    return mask


seeds = st.integers(0, 10_000)


@given(seeds, st.sampled_from([255, -1, 7]))
def test_equals_the_loop(seed, ignore_index):
    maps = make(seed)
    maps[0][:, 0] = -1  # void by another name: neither a class nor background
    actual = confident_mask(*maps, ignore_index=ignore_index)
    assert actual.dtype == torch.int64
    assert torch.equal(actual, confident_mask_by_loops(*maps, ignore_index))


@given(seeds)
def test_a_map_with_itself_is_itself(seed):
    mask, _ = make(seed)
    assert torch.equal(confident_mask(mask, mask), mask)


@given(seeds)
def test_a_background_without_classes_leaves_no_void(seed):
    mask, _ = make(seed)
    assert torch.equal(confident_mask(mask, mask * 0), mask)


@given(seeds)
def test_psa_differs_where_a_class_meets_background(seed):
    foreground, background = make(seed)
    psa = foreground.where(foreground != 0, 255).where(background != 0, 0)  # its labels: 0 -> void, then high's 0 -> 0
    mask = confident_mask(foreground, background)
    assert torch.equal(mask.where(background != 0, 0), psa)  # as the docstring says
    assert torch.equal(mask != psa, (foreground > 0) & (background == 0))


@pytest.mark.parametrize("void", [255, -1])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64], ids=str)
def test_void_stays_void(void, dtype):
    foreground, background = torch.tensor([[[void, void, 0, 3]]]), torch.tensor([[[0, 1, void, void]]])
    if dtype == torch.uint8:
        foreground, background = foreground % 256, background % 256
    expected = 255 if dtype == torch.uint8 else void
    actual = confident_mask(foreground.to(dtype), background.to(dtype), ignore_index=expected)
    assert actual.tolist() == [[[expected, expected, expected, 3]]]


def test_compiles_and_takes_an_empty_batch():
    torch.compiler.reset()
    maps = make(0)
    compiled = torch.compile(confident_mask, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*maps), confident_mask(*maps))
    assert confident_mask(*make(0, B=0)).shape == (0, 4, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda f, b: (f.float(), b), TypeError, "foreground must be of integer dtype"),
        (lambda f, b: (f, b[:1]), ValueError, r"background must have shape \(B=2, H=4, W=5\)"),
        (lambda f, b: (f, b.to("meta")), ValueError, "background must lie on cpu"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        confident_mask(*change(*make(0)))
    with pytest.raises(TypeError, match="ignore_index must be an int"):
        confident_mask(*make(0), ignore_index=None)
