from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pixelss import complementary_pair
from tests.blocks import Block
from tests.oracles import assert_refuses, field
from tests.strategies import batches, make_batch, noise

SIGNATURES = {
    "complementary_pair": "(images, *, share=0.5, patch, generator=None)",
}

BLOCKS = {
    "complementary_pair": Block(  # what is hidden is left to chance, what both add up to is not
        lambda b: sum(complementary_pair(b.features, patch=2)[:2]),
        lambda b: b.features * 1,
        but={"half": "images for a network keep their dtype"},
    ),
}

shares = st.sampled_from([0.0, 0.3, 0.5, 1.0])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def patches_of(kept: torch.Tensor, patch: int) -> list[torch.Tensor]:
    """Return where pixels are kept, in every patch of every image of ones, by loops over the grid."""
    _, _, H, W = kept.shape
    return [
        one[:, y : y + patch, x : x + patch] > 0 for one in kept for y in range(0, H, patch) for x in range(0, W, patch)
    ]


@given(batch=batches(), share=shares, patch=st.integers(1, 10), seed=st.integers(0, 99))
def test_a_patch_is_kept_or_hidden_as_a_whole_in_all_channels(batch, share, patch, seed):
    images = torch.ones_like(batch.features)
    kept, hidden, _ = complementary_pair(images, share=share, patch=patch, generator=seeded(seed))
    assert torch.equal(hidden, 1 - kept)
    for one in patches_of(kept, patch):
        assert one.all() or not one.any()


@given(batch=batches(), share=shares, patch=st.integers(1, 10), seed=st.integers(0, 99))
def test_both_add_up_to_the_images_and_the_share_is_that_of_the_pixels_kept(batch, share, patch, seed):
    images = batch.features + 1
    kept, hidden, kept_share = complementary_pair(images, share=share, patch=patch, generator=seeded(seed))
    assert torch.equal(kept + hidden, images)
    assert not (kept * hidden).any()
    torch.testing.assert_close(kept_share, (kept > 0).double().mean((1, 2, 3)))
    again = complementary_pair(images, share=share, patch=patch, generator=seeded(seed))
    assert all(map(torch.equal, again, (kept, hidden, kept_share)))
    if share in (0, 1):
        assert torch.equal(kept_share, torch.full_like(kept_share, share))


@given(batch=batches(), patch=st.integers(1, 10))
def test_what_is_hidden_does_not_depend_on_the_images(batch, patch):
    first, second = (complementary_pair(x, patch=patch, generator=seeded()) for x in (batch.features, -batch.features))
    assert torch.equal(first[0], -second[0])
    assert torch.equal(first[2], second[2])


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_every_patch_is_kept_with_the_same_probability(share):
    images = torch.ones(4000, 1, 5, 8)
    kept, _, kept_share = complementary_pair(images, share=share, patch=3, generator=seeded())
    grid = kept[:, 0, ::3, ::3]  # (B, 2, 3)
    torch.testing.assert_close(grid.mean(0), torch.full((2, 3), share), rtol=0, atol=0.03)
    torch.testing.assert_close(kept_share.mean(), torch.tensor(share), rtol=0, atol=0.02)
    together = (grid[:, 0, 0] * grid[:, 1, 1]).mean()  # independent patches
    torch.testing.assert_close(together, torch.tensor(share**2), rtol=0, atol=0.03)
    of_two_images = (grid[::2, 0, 0] * grid[1::2, 0, 0]).mean()
    torch.testing.assert_close(of_two_images, torch.tensor(share**2), rtol=0, atol=0.04)


def test_the_grid_is_cpns():
    """Its mask of an image of ones, every 8th pixel: cells of 224 pixels from the upper left, kept or hidden whole.

    Its share is that of the cells, of which those at the border are 2 pixels high.
    """
    a = field("cpn")
    cells = patches_of(a["grid_keep_mask"][None, None], 224 // 8)
    assert all(cell.all() or not cell.any() for cell in cells)
    assert sum(cell.all().item() for cell in cells) / len(cells) == a["grid_keep_rate"]
    _, H, W = a["grid_shape"].tolist()
    theirs = a["grid_keep_mask"]
    for seed in range(10_000):  # ours finds it too
        kept, _, share = complementary_pair(torch.ones(1, 1, H, W), patch=224, generator=seeded(seed))
        if torch.equal(kept[0, 0, ::8, ::8] > 0, theirs):
            torch.testing.assert_close(share[0], kept.mean())
            return
    raise AssertionError("no draw gives the published grid")


def test_a_patch_as_large_as_the_image_keeps_all_or_nothing():
    _, _, share = complementary_pair(torch.ones(50, 3, 4, 6), patch=6, generator=seeded())
    assert set(share.tolist()) == {0.0, 1.0}


def test_a_hidden_value_that_is_not_finite_is_hidden():
    images = torch.full((1, 1, 4, 4), float("nan"))
    kept, hidden, _ = complementary_pair(images, patch=1, generator=seeded())
    assert torch.equal(kept.isnan(), ~hidden.isnan())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_images_keep_their_dtype(dtype):
    kept, hidden, share = complementary_pair(torch.ones(2, 3, 4, 4, dtype=dtype), patch=2)
    assert kept.dtype == hidden.dtype == dtype
    assert share.dtype == torch.promote_types(dtype, torch.float32)


def test_gradcheck():
    images = noise(2, 2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: complementary_pair(x, patch=2, generator=seeded())[:2], images)


def test_an_empty_batch_gives_empty_results():
    kept, hidden, share = complementary_pair(make_batch(images=0).features, patch=2)
    assert (len(kept), len(hidden), len(share)) == (0, 0, 0)


# refusals


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("images", torch.rand(3, 4, 5), ValueError),
        ("images", torch.zeros(2, 3, 4, 5, dtype=torch.uint8), TypeError),
        ("images", None, TypeError),
        ("share", -0.1, ValueError),
        ("share", 1.1, ValueError),
        ("share", "0.5", TypeError),
        ("patch", 0, ValueError),
        ("patch", 2.0, TypeError),
        ("generator", 0, TypeError),
    ],
)
def test_pair_refuses(name, value, error):
    given_ = {"images": torch.rand(2, 3, 4, 5), "share": 0.5, "patch": 2, "generator": None}
    assert_refuses(complementary_pair, given_, name, value, error)
