from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pixelss import merge_tiles, reconstruction_loss, split_tiles
from tests.blocks import Block
from tests.oracles import active, assert_refuses, field, value_and_grads
from tests.strategies import batches, make_batch, noise

SIGNATURES = {
    "split_tiles": "(images, pieces=2)",
    "merge_tiles": "(maps, pieces=2)",
    "reconstruction_loss": "(cam, merged, tags)",
}


def doubled(x: Tensor) -> Tensor:
    """Return maps whose sides 2 divides."""
    return torch.cat([torch.cat([x, x + 1], -1), torch.cat([x + 2, x + 3], -1)], -2)


MOVES = {"half": "it moves values, in whatever dtype", "finite": "it moves values, whatever they are"}
BLOCKS = {
    "split_tiles": Block(
        lambda b: split_tiles(doubled(b.cam)), lambda b: split_tiles_by_loops(doubled(b.cam)), but=MOVES
    ),
    "merge_tiles": Block(
        lambda b: merge_tiles(torch.cat([b.cam, b.cam + 1, b.cam + 2, b.cam + 3])),
        lambda b: merge_tiles_by_loops(torch.cat([b.cam, b.cam + 1, b.cam + 2, b.cam + 3])),
        but=MOVES,
    ),
    "reconstruction_loss": Block(
        lambda b: reconstruction_loss(b.raw[2], b.student[0], b.tags),
        lambda b: reconstruction_loss_by_loops(b.raw[2], b.student[0], b.tags),
    ),
}


def split_tiles_by_loops(images: Tensor, pieces: int = 2) -> Tensor:
    h, w = (side // pieces for side in images.shape[2:])
    corners = [(i * h, j * w) for i in range(pieces) for j in range(pieces)]
    return torch.cat([images[:, :, y : y + h, x : x + w] for y, x in corners])


def merge_tiles_by_loops(maps: Tensor, pieces: int = 2) -> Tensor:
    tiles = maps.chunk(pieces**2) if len(maps) else pieces**2 * [maps]  # of every image, tile after tile
    rows = [torch.cat(tiles[i * pieces : (i + 1) * pieces], -1) for i in range(pieces)]
    return torch.cat(rows, -2)


def reconstruction_loss_by_loops(cam: Tensor, merged: Tensor, tags: Tensor) -> Tensor:
    total = (active(cam).sum() + active(merged).sum()) * 0
    for b, n, i, j in product(*map(range, cam.shape)):
        if tags[b, n] > 0:
            total = total + (active(cam[b, n, i, j]) - active(merged[b, n, i, j])).abs() / cam.numel()
    return total


# What Puzzle-CAM's own code returned, with its two ways of leaving absent classes out


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)


def masked(cam: Tensor, merged: Tensor, tags: Tensor) -> Tensor:
    return reconstruction_loss(cam, merged, tags)


def selected(cam: Tensor, merged: Tensor, tags: Tensor) -> Tensor:
    """The mean over an image's present classes, then over the images."""
    images = [(x[None, t > 0], y[None, t > 0], t[None, t > 0]) for x, y, t in zip(cam, merged, tags, strict=True)]
    return torch.stack([reconstruction_loss(*one) for one in images]).mean()


@pytest.mark.parametrize(("name", "reconstruction"), [("masking", masked), ("selection", selected)])
def test_tiles_losses_and_gradients_are_puzzles(name, reconstruction):
    a = field(f"puzzle_{name}_feature")
    pieces = round(a["pieces"].item() ** 0.5)  # theirs counts all
    assert torch.equal(split_tiles(a["image"], pieces), a["tiles"])
    cam, tile_cams = (a[key].requires_grad_() for key in ("features", "tile_cams"))
    merged = merge_tiles(tile_cams, pieces)
    assert torch.equal(merged, a["merged_features"])
    terms = {
        "class_loss": functional.multilabel_soft_margin_loss(cam.mean((2, 3)), a["tags"]),
        "p_class_loss": functional.multilabel_soft_margin_loss(merged.mean((2, 3)), a["tags"]),
        "re_loss": reconstruction(cam, merged, a["tags"]),
    }
    for key, term in terms.items():
        close(term, a[key])
    found = tile_cams.mean((2, 3)).sigmoid()
    entropy = -(found * (found + 1e-5).log()).sum(1).mean()  # a term that its recipe switches off
    close(entropy, a["conf_loss"])
    loss = terms["class_loss"] + terms["p_class_loss"] + a["alpha"] * terms["re_loss"] + entropy
    close(loss, a["loss"])
    for gradient, key in zip(torch.autograd.grad(loss, (cam, tile_cams)), ("features", "tile"), strict=True):
        close(gradient, a[f"grad_{key}"])


# What holds for any maps


@given(data=st.data(), pieces=st.integers(1, 4), images=st.integers(0, 3))
def test_tiles_equal_the_loops_and_merging_undoes_splitting(data, pieces, images):
    h, w = (data.draw(st.integers(1, 3)) for _ in range(2))
    maps = noise(images, 2, pieces * h, pieces * w)
    tiles = split_tiles(maps, pieces)
    assert tiles.shape == (pieces**2 * images, 2, h, w)
    assert torch.equal(tiles, split_tiles_by_loops(maps, pieces))
    merged = merge_tiles(tiles, pieces)
    assert torch.equal(merged, maps)
    assert torch.equal(merged, merge_tiles_by_loops(tiles, pieces))


@given(pieces=st.integers(2, 3), images=st.integers(1, 3))
def test_tiles_of_an_image_are_those_of_it_alone(pieces, images):
    maps = noise(images, 2, 2 * pieces, 3 * pieces)
    tiles = split_tiles(maps, pieces).unflatten(0, (pieces**2, images))
    for b in range(images):
        assert torch.equal(tiles[:, b], split_tiles(maps[b, None], pieces))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.long, torch.bool, torch.float16, torch.float64])
def test_tiles_keep_their_dtype(dtype):
    maps = (torch.rand(2, 1, 4, 6) * 9).to(dtype)
    tiles = split_tiles(maps)
    assert tiles.dtype == dtype
    assert torch.equal(merge_tiles(tiles), maps)


def test_a_network_that_sees_one_pixel_gives_the_same_for_tiles():
    images, network = torch.rand(2, 3, 8, 12), torch.nn.Conv2d(3, 5, 1)
    cam, merged = network(images), merge_tiles(network(split_tiles(images)))
    assert reconstruction_loss(cam, merged, torch.ones(2, 5)) < 1e-6


@given(batch=batches())
def test_all_tags_give_torchs_l1_both_ways(batch):
    cam, merged = batch.raw[2], batch.student[0]
    loss = reconstruction_loss(cam, merged, torch.ones_like(batch.tags))
    torch.testing.assert_close(loss, functional.l1_loss(cam, merged))
    assert torch.equal(loss, reconstruction_loss(merged, cam, torch.ones_like(batch.tags)))
    assert reconstruction_loss(cam, cam, batch.tags) == 0


@given(batch=batches())
def test_the_gradient_reaches_both_sides_and_no_absent_class(batch):
    _, first, second = value_and_grads(
        lambda x, y: reconstruction_loss(x, y, batch.tags), batch.raw[2], batch.student[0]
    )
    assert torch.equal(first, -second)
    assert not first[batch.tags <= 0].any()
    assert torch.equal(first.flatten(2).any(2), batch.tags > 0)


@given(data=st.data(), batch=batches())
def test_the_order_of_images_and_classes_does_not_matter(data, batch):
    inputs = batch.raw[2], batch.student[0], batch.tags
    images, classes = (torch.tensor(data.draw(st.permutations(range(size)))) for size in batch.tags.shape)
    permuted = (x[images][:, classes] for x in inputs)
    torch.testing.assert_close(reconstruction_loss(*permuted), reconstruction_loss(*inputs))


def test_gradcheck():
    maps = noise(4, 2, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(split_tiles, maps)
    assert torch.autograd.gradcheck(merge_tiles, maps)
    batch = make_batch(images=2, image_size=(2, 3))
    cam, merged = (noise(*batch.cam.shape, seed=i).requires_grad_() for i in range(2))
    assert torch.autograd.gradcheck(lambda x, y: reconstruction_loss(x, y, batch.tags), (cam, merged))


# refusals


CAM, TAGS = torch.rand(4, 3, 4, 6), torch.ones(4, 3)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("images", CAM[0], ValueError),
        ("images", CAM[..., :5], ValueError),
        ("images", CAM[:, :, :3], ValueError),
        ("images", None, TypeError),
        ("pieces", 3, ValueError),
        ("pieces", 0, ValueError),
        ("pieces", 2.0, TypeError),
    ],
)
def test_splitting_refuses(name, value, error):
    assert_refuses(split_tiles, {"images": CAM, "pieces": 2}, name, value, error)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("maps", CAM[0], ValueError),
        ("maps", CAM[:3], ValueError),
        ("maps", None, TypeError),
        ("pieces", 3, ValueError),
        ("pieces", 0, ValueError),
        ("pieces", 2.0, TypeError),
    ],
)
def test_merging_refuses(name, value, error):
    assert_refuses(merge_tiles, {"maps": CAM, "pieces": 2}, name, value, error)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("cam", CAM[0], ValueError),
        ("cam", CAM.long(), TypeError),
        ("merged", CAM[..., :4], ValueError),
        ("merged", CAM.to("meta"), ValueError),
        ("merged", None, TypeError),
        ("tags", TAGS[:, :2], ValueError),
        ("tags", TAGS.to("meta"), ValueError),
    ],
)
def test_reconstruction_refuses(name, value, error):
    assert_refuses(reconstruction_loss, {"cam": CAM, "merged": CAM, "tags": TAGS}, name, value, error)
