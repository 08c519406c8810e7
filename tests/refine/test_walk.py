from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelss import pair_offsets, random_walk
from tests.blocks import Block
from tests.oracles import BAD_RADII, assert_matches, assert_refuses, pair_offsets_by_loops, pairs, value_and_grads
from tests.strategies import make_pairs

SIGNATURES = {
    "random_walk": "(scores, affinity, *, beta=8.0, log_steps=8, radius=5)",
}

BLOCKS = {
    "random_walk": Block(
        lambda b: random_walk(b.features, b.affinity, log_steps=3, radius=3),
        lambda b: random_walk_by_matrix(b.features, b.affinity, log_steps=3, radius=3),
    ),
}

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
halves = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
SIZES = [(1, 1), (2, 3), (1, 7), (6, 2), (6, 7)]
sizes = pytest.mark.parametrize("size", SIZES, ids=str)
seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 8)


def transition_matrix(affinity: Tensor, h: int, w: int, beta: float, radius: int) -> Tensor:
    """Return the dense T of one image: P x P, columns that sum to 1."""
    entries, found = torch.eye(h * w, dtype=affinity.dtype), list(pairs(h, w, radius))
    if found:  # one assignment: a Tensor takes long to change entry by entry
        o, y, x, v, u = torch.tensor(found).T
        p, q = y * w + x, v * w + u
        entries[p, q] = entries[q, p] = affinity[o, y, x] ** beta
    return entries / entries.sum(0)


def random_walk_by_matrix(
    scores: Tensor, affinity: Tensor, *, beta: float = 8, log_steps: int = 8, radius: int = 5
) -> Tensor:
    _, K, h, w = scores.shape
    walked = []
    for rows, entries in zip(scores, affinity, strict=True):
        matrix = transition_matrix(entries, h, w, beta, radius)
        for _ in range(log_steps):
            matrix = matrix @ matrix
        walked.append((rows.flatten(1) @ matrix).view(K, h, w))
    return torch.stack(walked)


def make_scores(seed: int = 0, size: tuple[int, int] = (6, 7), images: int = 2, classes: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(seed + 1)
    return torch.rand(images, classes, *size, generator=g, dtype=torch.float64)


@st.composite
def walks(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, float]]:
    seed, size, radius = draw(seeds), (draw(sides), draw(sides)), draw(st.integers(2, 5))
    scores = make_scores(seed, size, draw(st.integers(1, 3)), draw(st.integers(1, 4))) * 4 - 2
    affinity, _ = make_pairs(seed, size, len(scores), radius)
    beta, log_steps = draw(st.sampled_from([0.5, 1.0, 8.0])), draw(st.integers(0, 10))
    return scores, affinity, {"radius": radius, "beta": beta, "log_steps": log_steps}


@sizes
@dtypes
@pytest.mark.parametrize("log_steps", [0, 1, 3, 8])
def test_walk_equals_the_matrix_power(size, dtype, log_steps, device):
    inputs = make_scores(size=size).to(dtype), make_pairs(size=size, dtype=dtype)[0]
    actual = value_and_grads(lambda *x: random_walk(*x, log_steps=log_steps), *(x.to(device) for x in inputs))
    expected = value_and_grads(lambda *x: random_walk_by_matrix(*x, log_steps=log_steps), *(x.double() for x in inputs))
    # The affinity's gradient is a sum over all products; an H200 was 3.7e-4 off.
    tolerances = [1e-10, 1e-9, 1e-9] if dtype == torch.float64 else [1e-5, 1e-4, 6e-4]
    for ours, theirs, tolerance in zip(actual, expected, tolerances, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "factor", "log_steps", "tolerance"),
    [
        (torch.float64, 1.0, 8, 1e-10),
        (torch.float64, 0.5, 10, 1e-10),
        (torch.float32, 1.0, 8, 1e-5),
        (torch.float32, 0.5, 8, 1e-5),  # nearly isolated cells: the dense power in float32 is off by 3e-5
        (torch.float32, 0.3, 8, 1e-5),  # the dense one by 9e-5
    ],
)
def test_walk_equals_the_matrix_power_on_a_larger_image(dtype, factor, log_steps, tolerance, device):
    scores, affinity = make_scores(size=(19, 23)).to(dtype), factor * make_pairs(size=(19, 23), dtype=dtype)[0]
    expected = random_walk_by_matrix(scores.double(), affinity.double(), log_steps=log_steps)
    actual = random_walk(scores.to(device), affinity.to(device), log_steps=log_steps)
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=0, atol=tolerance)


@given(walk=walks())
def test_any_walk_equals_the_matrix_power(walk):
    scores, affinity, settings = walk
    expected = random_walk_by_matrix(scores, affinity, **settings)
    torch.testing.assert_close(random_walk(scores, affinity, **settings), expected, rtol=1e-10, atol=1e-10)


@given(walk=walks())
def test_columns_of_the_matrix_sum_to_one(walk):
    scores, affinity, settings = walk
    h, w = scores.shape[2:]
    one_hot = torch.eye(h * w, dtype=torch.float64).view(1, -1, h, w)  # row p of T is the walk of one score at p
    rows = random_walk(one_hot, affinity[:1], **settings | {"log_steps": 0})[0].flatten(1)
    torch.testing.assert_close(rows.sum(0), torch.ones(h * w, dtype=torch.float64))
    torch.testing.assert_close(
        rows, transition_matrix(affinity[0], h, w, settings["beta"], settings["radius"]), rtol=1e-10, atol=1e-10
    )


@given(
    walk=walks(), value=st.floats(-10, 10, allow_subnormal=False), dtype=st.sampled_from([torch.float32, torch.float64])
)
def test_a_constant_map_stays_constant(walk, value, dtype):
    scores, affinity, settings = walk
    constant = torch.full_like(scores, value, dtype=dtype)
    assert torch.equal(random_walk(constant, affinity.to(dtype), **settings), constant)


@given(walk=walks(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_results_lie_between_their_map_s_extremes(walk, dtype):
    scores, affinity, settings = walk
    scores = scores.to(dtype)
    walked = random_walk(scores, affinity.to(dtype), **settings)
    assert (walked >= scores.amin((2, 3), keepdim=True)).all()
    assert (walked <= scores.amax((2, 3), keepdim=True)).all()


@given(walk=walks())
def test_no_affinity_changes_nothing(walk):
    scores, affinity, settings = walk
    torch.testing.assert_close(random_walk(scores, affinity * 0, **settings), scores, rtol=1e-12, atol=1e-12)


@given(walk=walks(), data=st.data())
def test_permuted_classes_permute_the_results(walk, data):
    scores, affinity, settings = walk
    order = torch.tensor(data.draw(st.permutations(range(scores.shape[1]))))
    expected = random_walk(scores, affinity, **settings)[:, order]
    torch.testing.assert_close(random_walk(scores[:, order], affinity, **settings), expected, rtol=1e-12, atol=1e-12)


@given(walk=walks())
def test_images_do_not_meet(walk):
    scores, affinity, settings = walk
    alone = [random_walk(s[None], a[None], **settings) for s, a in zip(scores, affinity, strict=True)]
    torch.testing.assert_close(random_walk(scores, affinity, **settings), torch.cat(alone), rtol=1e-12, atol=1e-12)


def flipped(affinity: Tensor, radius: int, axis: int) -> Tensor:
    """Return the affinities of the image mirrored along y (0) or x (1)."""
    h, w = affinity.shape[2:]
    offsets = pair_offsets_by_loops(radius)
    mirrored = torch.zeros_like(affinity)
    for o, y, x, v, u in pairs(h, w, radius):
        first, second = ((h - 1 - y, x), (h - 1 - v, u)) if axis == 0 else ((y, w - 1 - x), (v, w - 1 - u))
        first, second = sorted([first, second])
        place = offsets.index((second[0] - first[0], second[1] - first[1]))
        mirrored[:, place, first[0], first[1]] = affinity[:, o, y, x]
    return mirrored


@given(walk=walks(), axis=st.sampled_from([0, 1]))
def test_a_flipped_image_gives_the_flipped_result(walk, axis):
    scores, affinity, settings = walk
    other = flipped(affinity, settings["radius"], axis)
    expected = random_walk(scores, affinity, **settings).flip(2 + axis)
    torch.testing.assert_close(random_walk(scores.flip(2 + axis), other, **settings), expected, rtol=1e-10, atol=1e-10)


@given(walk=walks(), noise=st.sampled_from([0.0, 1.0, math.nan, math.inf]))
def test_entries_outside_the_image_have_no_influence(walk, noise):
    scores, affinity, settings = walk
    other = torch.full_like(affinity, noise)
    for o, y, x, _, _ in pairs(*scores.shape[2:], settings["radius"]):
        other[:, o, y, x] = affinity[:, o, y, x]
    assert torch.equal(random_walk(scores, other, **settings), random_walk(scores, affinity, **settings))


def test_scores_stop_at_a_wall_and_at_the_border():
    columns = torch.arange(9)
    affinity = torch.zeros(1, 34, 5, 9)
    for o, (_, dx) in enumerate(pair_offsets()):
        affinity[:, o] = ((columns < 4) == (columns + dx < 4)).float()  # two halves; noise outside the image
    scores = torch.zeros(1, 1, 5, 9)
    scores[0, 0, 2, 0] = 1
    walked = random_walk(scores, affinity, log_steps=10)
    assert (walked[..., :4] > 0).all()
    assert not walked[..., 4:].any()


@pytest.mark.parametrize("beta", [0.5, 8.0])
def test_walk_gradcheck(beta):
    scores, (affinity, _) = make_scores(size=(3, 2)), make_pairs(size=(3, 2), radius=3)
    inputs = scores.requires_grad_(), affinity.requires_grad_()
    walk = partial(random_walk, beta=beta, log_steps=3, radius=3)
    assert torch.autograd.gradcheck(walk, inputs, fast_mode=True)


def test_bounds_do_not_stop_the_gradient():
    affinity, _ = make_pairs(size=(2, 3))
    assert_matches(
        lambda x: random_walk(x, affinity), lambda x: random_walk_by_matrix(x, affinity), torch.ones(2, 1, 2, 3)
    )


@halves
def test_walk_is_computed_in_float32(half, device):
    scores, (affinity, _) = make_scores().to(device, half), make_pairs(dtype=half)
    affinity = affinity.to(device)
    expected = value_and_grads(random_walk, scores.float(), affinity.float())
    for autocast in (False, True):
        with torch.autocast(device, half, enabled=autocast):
            actual = value_and_grads(random_walk, scores, affinity)
        torch.testing.assert_close(actual[0], expected[0])
        torch.testing.assert_close(actual[1:], [x.to(half) for x in expected[1:]])


def test_the_wider_dtype_wins():
    scores, (affinity, _) = make_scores(), make_pairs()
    assert random_walk(scores, affinity.half()).dtype == torch.float64
    assert random_walk(scores.bfloat16(), affinity).dtype == torch.float64


AFFINITY = torch.rand(2, 34, 4, 5)


LABELS = torch.zeros(2, 34, 4, 5, dtype=torch.int64)


SCORES = torch.rand(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("scores", SCORES[0], ValueError),
        ("scores", SCORES[:, :0], ValueError),
        ("scores", SCORES.long(), TypeError),
        ("scores", None, TypeError),
        ("affinity", AFFINITY[:, :33], ValueError),
        ("affinity", AFFINITY[:1], ValueError),
        ("affinity", AFFINITY[:, :, :3], ValueError),
        ("affinity", AFFINITY[0], ValueError),
        ("affinity", LABELS, TypeError),
        ("affinity", AFFINITY.to("meta"), ValueError),
        ("beta", 0, ValueError),
        ("beta", -8.0, ValueError),
        ("beta", math.nan, ValueError),
        ("beta", math.inf, ValueError),
        ("beta", "8", TypeError),
        ("log_steps", -1, ValueError),
        ("log_steps", 17, ValueError),
        ("log_steps", 256, ValueError),
        ("log_steps", 8.0, TypeError),
        ("radius", 4, ValueError),
        *BAD_RADII,
    ],
)
def test_walk_refuses(name, value, error):
    assert_refuses(random_walk, {"scores": SCORES, "affinity": AFFINITY}, name, value, error)


def test_walk_says_how_many_offsets_a_radius_has():
    with pytest.raises(ValueError, match=r"O is 34.*radius=3 has 12 offsets"):
        random_walk(SCORES, AFFINITY, radius=3)
