from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_matches, value_and_grads
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pixelss import AffinityHead, affinity_labels, affinity_loss, pair_offsets, random_walk

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
halves = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
SIZES = [(1, 1), (2, 3), (1, 7), (6, 2), (6, 7)]
sizes = pytest.mark.parametrize("size", SIZES, ids=str)
seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 8)


# loop references, written from the text


def offsets_by_loop(radius: int) -> list[tuple[int, int]]:
    right = [(0, dx) for dx in range(1, radius)]
    below = [(dy, dx) for dy in range(1, radius) for dx in range(-radius, radius + 1) if dx**2 + dy**2 < radius**2]
    return right + below


def pairs(h: int, w: int, radius: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (offset's index, y, x, v, u) of every pair of cells (y, x) and (v, u) inside the image."""
    for (o, (dy, dx)), y, x in product(enumerate(offsets_by_loop(radius)), range(h), range(w)):
        if 0 <= y + dy < h and 0 <= x + dx < w:
            yield o, y, x, y + dy, x + dx


def elu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.exp(x) - 1)


def affinity_by_loop(taps: list[Tensor], reduce: list[Tensor], mix: Tensor, radius: int) -> Tensor:
    B, _, h, w = taps[0].shape
    affinity = taps[0].new_zeros(B, len(offsets_by_loop(radius)), h, w)
    for b in range(B):
        features = {}
        for y, x in product(range(h), range(w)):
            reduced = [elu(weight @ tap[b, :, y, x]) for tap, weight in zip(taps, reduce, strict=True)]
            features[y, x] = elu(mix @ torch.cat(reduced))
        for o, y, x, v, u in pairs(h, w, radius):
            affinity[b, o, y, x] = torch.exp(-sum(abs(features[y, x] - features[v, u])) / len(mix))
    return affinity


def labels_by_loop(low: Tensor, high: Tensor, radius: int, void: int = 255) -> Tensor:
    B, h, w = low.shape
    labels = torch.full((B, len(offsets_by_loop(radius)), h, w), 255)

    def kind(b: int, y: int, x: int) -> int | None:
        if high[b, y, x] == 0:
            return 0
        return None if low[b, y, x] in (0, void) or low[b, y, x] < 0 else int(low[b, y, x])

    for b in range(B):
        for o, y, x, v, u in pairs(h, w, radius):
            first, second = kind(b, y, x), kind(b, v, u)
            if first is not None and second is not None:
                labels[b, o, y, x] = 0 if first != second else 1 if first == 0 else 2
    return labels


def loss_by_loop(affinity: Tensor, labels: Tensor) -> Tensor:
    terms = {0: [], 1: [], 2: []}
    for p, label in zip(affinity.flatten(), labels.flatten().tolist(), strict=True):
        if label in terms:
            terms[label].append(-torch.log((p if label else 1 - p) + 1e-5))
    different, background, foreground = (sum(t) / len(t) if t else affinity.sum() * 0 for t in terms.values())
    return background / 4 + foreground / 4 + different / 2


def transition_matrix(affinity: Tensor, h: int, w: int, beta: float, radius: int) -> Tensor:
    """Return the dense T of one image: P x P, columns that sum to 1."""
    entries = torch.eye(h * w, dtype=affinity.dtype)
    for o, y, x, v, u in pairs(h, w, radius):
        entries[y * w + x, v * w + u] = entries[v * w + u, y * w + x] = affinity[o, y, x] ** beta
    return entries / entries.sum(0)


def walk_by_matrix(scores: Tensor, affinity: Tensor, *, beta: float = 8, log_steps: int = 8, radius: int = 5) -> Tensor:
    _, K, h, w = scores.shape
    walked = []
    for rows, entries in zip(scores, affinity, strict=True):
        matrix = transition_matrix(entries, h, w, beta, radius)
        for _ in range(log_steps):
            matrix = matrix @ matrix
        walked.append((rows.flatten(1) @ matrix).view(K, h, w))
    return torch.stack(walked)


# inputs


def make_maps(seed: int = 0, size: tuple[int, int] = (6, 7), images: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    values = torch.tensor([0, 0, 1, 2, 2, 3, 255, -1])
    return tuple(values[torch.randint(0, len(values), (images, *size), generator=g)] for _ in range(2))


def make_pairs(
    seed: int = 0, size: tuple[int, int] = (6, 7), images: int = 2, radius: int = 5, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Return affinities in [0, 1], noise outside the image too, and labels of all kinds."""
    g = torch.Generator().manual_seed(seed)
    shape = (images, len(pair_offsets(radius)), *size)
    labels = torch.tensor([0, 1, 2, 255, 3, -1])[torch.randint(0, 6, shape, generator=g)]
    return (0.01 + 0.98 * torch.rand(shape, generator=g, dtype=torch.float64)).to(dtype), labels


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


def tiny_head(radius: int = 3, dtype: torch.dtype = torch.float64) -> AffinityHead:
    torch.manual_seed(0)
    return AffinityHead((3, 4), dims=(2, 3), radius=radius).to(dtype)


def make_taps(size: tuple[int, int] = (4, 5), images: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    return [torch.randn(images, c, *size, generator=g, dtype=torch.float64).to(dtype) for c in (3, 4)]


# pair_offsets


@pytest.mark.parametrize("radius", [2, 3, 4, 5, 6, 9])
def test_offsets_equal_the_loop(radius):
    assert list(pair_offsets(radius)) == offsets_by_loop(radius)


def test_offsets_of_the_paper():
    offsets = pair_offsets()
    assert len(offsets) == 34
    assert offsets[:5] == ((0, 1), (0, 2), (0, 3), (0, 4), (1, -4))


@given(radius=st.integers(2, 12))
def test_offsets_and_their_opposites_are_the_disc(radius):
    offsets = pair_offsets(radius)
    both = {*offsets, *((-dy, -dx) for dy, dx in offsets)}
    square = product(range(-radius, radius + 1), repeat=2)
    assert len(both) == 2 * len(offsets)
    assert both == {(y, x) for y, x in square if 0 < y**2 + x**2 < radius**2}


# AffinityHead


@sizes
@pytest.mark.parametrize("radius", [2, 5])
@dtypes
def test_head_equals_the_loop(size, radius, dtype, device):
    head = tiny_head(radius)
    weights = [conv.weight.detach().flatten(1) for conv in (*head.reduce, head.mix)]

    def ours(first, second, *weights):
        parameters = {name: x[..., None, None] for (name, _), x in zip(head.named_parameters(), weights, strict=True)}
        return torch.func.functional_call(head, parameters, ([first, second],))

    def theirs(first, second, *weights):
        return affinity_by_loop([first, second], weights[:2], weights[2], radius)

    assert_matches(ours, theirs, *make_taps(size), *weights, dtype=dtype, device=device)


def test_head_of_the_paper():
    head = AffinityHead()
    assert sum(p.numel() for p in head.parameters()) == 512 * 64 + 1024 * 128 + 4096 * 256 + 448 * 448
    affinity = head([torch.rand(1, c, 6, 7) for c in (512, 1024, 4096)])
    assert affinity.shape == (1, 34, 6, 7)
    assert affinity.dtype == torch.float32
    assert ((affinity >= 0) & (affinity <= 1)).all()
    assert "offsets=34" in repr(head)


def test_head_is_zero_exactly_outside_the_image():
    affinity = tiny_head(5)(make_taps((3, 4)))
    inside = torch.zeros(34, 3, 4, dtype=torch.bool)
    for o, y, x, _, _ in pairs(3, 4, 5):
        inside[o, y, x] = True
    assert torch.equal(affinity > 0, inside.expand_as(affinity))


def test_equal_cells_have_affinity_one():
    affinity = tiny_head()([x[..., :1, :1].expand(-1, -1, 4, 5) for x in make_taps()])
    torch.testing.assert_close(affinity, (affinity > 0).to(affinity))
    assert affinity.any()


@halves
def test_head_compares_in_float32(half, device):
    head, taps = tiny_head(dtype=half).to(device), make_taps(dtype=half)
    affinity = head([x.to(device) for x in taps])
    assert affinity.dtype == torch.float32
    expected = tiny_head(dtype=half).float()([x.float() for x in taps])
    torch.testing.assert_close(affinity.cpu(), expected, atol=0.05, rtol=0.05)
    with torch.autocast(device, half):
        assert tiny_head(dtype=torch.float32).to(device)([x.float().to(device) for x in taps]).dtype == torch.float32


def test_head_state_dict_round_trip():
    head, other = tiny_head(), AffinityHead((3, 4), dims=(2, 3), radius=3).double()
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(make_taps()), head(make_taps()))


def test_training_the_head_lowers_the_loss():
    head, taps = tiny_head(), make_taps((6, 7))
    labels = affinity_labels(*make_maps(size=(6, 7)), radius=3)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = affinity_loss(head(taps), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


# affinity_labels


@sizes
@pytest.mark.parametrize("radius", [2, 5])
@pytest.mark.parametrize("void", [255, 2, -1])
def test_labels_equal_the_loop(size, radius, void, device):
    low, high = make_maps(size=size)
    labels = affinity_labels(low.to(device), high.to(device), radius=radius, ignore_index=void)
    assert torch.equal(labels.cpu(), labels_by_loop(low, high, radius, void))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_label_maps_of_any_integer_dtype(dtype):
    low, high = (x.clamp(0, 100) for x in make_maps())
    expected = affinity_labels(low, high, ignore_index=100)
    assert torch.equal(affinity_labels(low.to(dtype), high.to(dtype), ignore_index=100), expected)


@given(seed=seeds, permutation=st.permutations([1, 2, 3]))
def test_labels_do_not_depend_on_the_names_of_classes(seed, permutation):
    low, high = make_maps(seed)
    names = torch.tensor([0, *permutation])
    renamed = [torch.where((x > 0) & (x < 4), names[x.clamp(0, 3)], x) for x in (low, high)]
    assert torch.equal(affinity_labels(*renamed), affinity_labels(low, high))


# affinity_loss


@sizes
@dtypes
def test_loss_equals_the_loop(size, dtype, device):
    assert_matches(affinity_loss, loss_by_loop, *make_pairs(size=size), dtype=dtype, device=device)


def test_loss_equals_binary_cross_entropy():
    affinity, _ = make_pairs()
    labels = torch.arange(affinity.numel()).view(affinity.shape) % 3
    bce = torch.nn.functional.binary_cross_entropy
    means = [bce(affinity[labels == kind], (labels[labels == kind] > 0).double()) for kind in range(3)]
    expected = means[0] / 2 + means[1] / 4 + means[2] / 4
    torch.testing.assert_close(affinity_loss(affinity, labels), expected, rtol=1e-3, atol=0)  # the 1e-5 inside


@pytest.mark.parametrize("kept", [(), (0,), (1,), (2,), (0, 2)], ids=str)
def test_an_empty_group_gives_zero_on_the_graph(kept):
    affinity, labels = make_pairs()
    labels = torch.where(sum(labels == kind for kind in (*kept, -9)) > 0, labels, 255)
    assert_matches(affinity_loss, loss_by_loop, affinity, labels)
    loss = affinity_loss(affinity.requires_grad_(), labels)
    assert loss.requires_grad
    assert bool(loss > 0) == bool(kept)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_certain_affinities_have_a_finite_loss(value):
    affinity, labels = make_pairs(dtype=torch.float32)
    loss, gradient = value_and_grads(affinity_loss, torch.full_like(affinity, value), labels)
    assert loss.item() == pytest.approx(-math.log(1e-5) / 2, rel=0.01)
    assert gradient.isfinite().all()


def test_ignored_pairs_have_no_influence():
    affinity, labels = make_pairs()
    ignored = (labels < 0) | (labels > 2)
    other = affinity.masked_fill(ignored, math.nan)
    actual, expected = (value_and_grads(affinity_loss, x, labels) for x in (other, affinity))
    assert all(map(torch.equal, actual, expected))


def test_loss_gradcheck():
    affinity, labels = make_pairs(size=(3, 2), images=1)
    assert torch.autograd.gradcheck(lambda x: affinity_loss(x, labels), affinity.requires_grad_())


@halves
def test_loss_is_computed_in_float32(half, device):
    affinity, labels = (x.to(device) for x in make_pairs(dtype=half))
    actual = value_and_grads(affinity_loss, affinity, labels)
    expected = value_and_grads(affinity_loss, affinity.float(), labels)
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1].to(half))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_loss_equals_eager(dtype, device):
    torch.compiler.reset()
    inputs = [x.to(device) for x in make_pairs(dtype=dtype)]
    compiled = torch.compile(affinity_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_grads(compiled, *inputs), value_and_grads(affinity_loss, *inputs))


# random_walk


@sizes
@dtypes
@pytest.mark.parametrize("log_steps", [0, 1, 3, 8])
def test_walk_equals_the_matrix_power(size, dtype, log_steps, device):
    inputs = make_scores(size=size).to(dtype), make_pairs(size=size, dtype=dtype)[0]
    actual = value_and_grads(lambda *x: random_walk(*x, log_steps=log_steps), *(x.to(device) for x in inputs))
    expected = value_and_grads(lambda *x: walk_by_matrix(*x, log_steps=log_steps), *(x.double() for x in inputs))
    # The affinity's gradient is a sum over all products.
    tolerances = [1e-10, 1e-9, 1e-9] if dtype == torch.float64 else [1e-5, 1e-4, 3e-4]
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
    expected = walk_by_matrix(scores.double(), affinity.double(), log_steps=log_steps)
    actual = random_walk(scores.to(device), affinity.to(device), log_steps=log_steps)
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=0, atol=tolerance)


@given(walk=walks())
def test_any_walk_equals_the_matrix_power(walk):
    scores, affinity, settings = walk
    expected = walk_by_matrix(scores, affinity, **settings)
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
    offsets = offsets_by_loop(radius)
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
    assert torch.autograd.gradcheck(lambda *x: random_walk(*x, beta=beta, log_steps=3, radius=3), inputs)


def test_bounds_do_not_stop_the_gradient():
    affinity, _ = make_pairs(size=(2, 3))
    assert_matches(lambda x: random_walk(x, affinity), lambda x: walk_by_matrix(x, affinity), torch.ones(2, 1, 2, 3))


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


# all of them


def run_all(images: int = 2, device: str = "cpu") -> list[Tensor]:
    """Return every function's value, and its gradients."""
    low, high = make_maps(images=images)
    affinity, labels = make_pairs(images=images, dtype=torch.float32)
    taps = make_taps(images=images, dtype=torch.float32)
    head = tiny_head(dtype=torch.float32).to(device)
    inputs = [x.to(device) for x in (low, high, affinity, labels, make_scores(images=images).float(), *taps)]
    low, high, affinity, labels, scores, *taps = inputs
    return [
        affinity_labels(low, high),
        *value_and_grads(affinity_loss, affinity, labels),
        *value_and_grads(random_walk, scores, affinity),
        *value_and_grads(lambda *x: head(x), *taps),
    ]


def test_deterministic_algorithms_repeat_bit_for_bit(device):
    torch.use_deterministic_algorithms(True)
    try:
        assert all(map(torch.equal, run_all(device=device), run_all(device=device)))
    finally:
        torch.use_deterministic_algorithms(False)


def test_no_branch_on_values():
    inputs = [*make_pairs(dtype=torch.float32), *make_maps(), make_scores().float()]
    head, taps = tiny_head(dtype=torch.float32), make_taps(dtype=torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # tensors without values: whatever asks for one raises
        affinity, labels, low, high, scores = map(mode.from_tensor, inputs)
        assert affinity_labels(low, high).shape == labels.shape
        assert affinity_loss(affinity, labels).shape == ()
        assert random_walk(scores, affinity).shape == scores.shape
        assert head([mode.from_tensor(x) for x in taps]).shape == (2, 14 - 2, 4, 5)


def test_empty_batch(device):
    values, full = run_all(0, device), run_all(2, device)
    assert [x.dtype for x in values] == [x.dtype for x in full]
    assert [x.shape[1:] for x in values] == [x.shape[1:] for x in full]
    assert [x.numel() for x in values if x.ndim] == [0] * (len(values) - 1)
    assert values[1] == 0  # the loss


def test_inputs_are_left_as_they_are():
    inputs = *make_pairs(), *make_maps(), make_scores()
    copies = [x.clone() for x in inputs]
    affinity, labels, low, high, scores = inputs
    affinity_labels(low, high)
    affinity_loss(affinity, labels)
    random_walk(scores, affinity)
    assert all(map(torch.equal, inputs, copies))


def test_memory_format_does_not_matter():
    (affinity, labels), scores = make_pairs(), make_scores()
    last = [x.contiguous(memory_format=torch.channels_last) for x in (affinity, labels, scores)]
    torch.testing.assert_close(random_walk(last[2], last[0]), random_walk(scores, affinity))
    torch.testing.assert_close(affinity_loss(*last[:2]), affinity_loss(affinity, labels))


# refusals

MAP = torch.zeros(2, 4, 5, dtype=torch.int64)
AFFINITY = torch.rand(2, 34, 4, 5)
LABELS = torch.zeros(2, 34, 4, 5, dtype=torch.int64)
SCORES = torch.rand(2, 3, 4, 5)
TAPS = [torch.rand(2, 3, 4, 5), torch.rand(2, 4, 4, 5)]
BAD_RADII = [("radius", value, ValueError) for value in (1, 0, -5, 65)]
BAD_RADII += [("radius", value, TypeError) for value in (5.0, "5", True, None)]


def assert_refuses(function, arguments, name, value, error):
    function(**arguments)
    with pytest.raises(error, match=rf"\b{name}\b"):
        function(**arguments | {name: value})


@pytest.mark.parametrize(("name", "value", "error"), BAD_RADII)
def test_offsets_refuse(name, value, error):
    assert_refuses(pair_offsets, {}, name, value, error)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("in_channels", (3, 0), ValueError),
        ("in_channels", (3, 4.0), TypeError),
        ("in_channels", (), ValueError),
        ("in_channels", 512, TypeError),
        ("dims", (2,), ValueError),
        ("dims", (2, -3), ValueError),
        ("dims", 448, TypeError),
        *BAD_RADII,
    ],
)
def test_head_refuses_settings(name, value, error):
    assert_refuses(AffinityHead, {"in_channels": (3, 4), "dims": (2, 3)}, name, value, error)


@pytest.mark.parametrize(
    ("taps", "error"),
    [
        (TAPS[0], TypeError),
        (None, TypeError),
        (TAPS[:1], ValueError),
        (TAPS[::-1], ValueError),
        ([TAPS[0], TAPS[1][0]], ValueError),
        ([TAPS[0], TAPS[1][:1]], ValueError),
        ([TAPS[0], TAPS[1][..., :4]], ValueError),
        ([TAPS[0], TAPS[1].long()], TypeError),
        ([TAPS[0], TAPS[1].to("meta")], ValueError),
        ([TAPS[0], None], TypeError),
    ],
)
def test_head_refuses(taps, error):
    assert_refuses(tiny_head(dtype=torch.float32), {"taps": TAPS}, "taps", taps, error)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("low", MAP[0], ValueError),
        ("low", MAP[:, :0], ValueError),
        ("low", MAP.float(), TypeError),
        ("low", MAP.bool(), TypeError),
        ("low", None, TypeError),
        ("high", MAP[:1], ValueError),
        ("high", MAP[:, :3], ValueError),
        ("high", MAP.float(), TypeError),
        ("high", MAP.to("meta"), ValueError),
        ("ignore_index", 0, ValueError),
        ("ignore_index", 255.0, TypeError),
        *BAD_RADII,
    ],
)
def test_labels_refuse(name, value, error):
    assert_refuses(affinity_labels, {"low": MAP, "high": MAP}, name, value, error)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("affinity", AFFINITY[0], ValueError),
        ("affinity", AFFINITY[:, :0], ValueError),
        ("affinity", LABELS, TypeError),
        ("affinity", None, TypeError),
        ("labels", LABELS[:, :12], ValueError),
        ("labels", LABELS[:1], ValueError),
        ("labels", LABELS[..., :4], ValueError),
        ("labels", MAP, ValueError),
        ("labels", AFFINITY, TypeError),
        ("labels", LABELS.to("meta"), ValueError),
    ],
)
def test_loss_refuses(name, value, error):
    assert_refuses(affinity_loss, {"affinity": AFFINITY, "labels": LABELS}, name, value, error)


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
