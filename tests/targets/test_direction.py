from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from pixelss import IntraClassDirection
from pixelss._dtype import promote
from tests.blocks import Block
from tests.distributed import run_processes
from tests.oracles import active, assert_refuses
from tests.strategies import Batch, batches, noise

SIGNATURES = {"IntraClassDirection": "(num_classes, dim)"}


def tags_of(b: Batch) -> Tensor:
    """The tags, of every other image the first alone."""
    present = b.tags > 0
    several = torch.arange(len(present), device=present.device)[:, None] % 2 == 1
    return (present & (several | (present.cumsum(1) == 1))).long()


def scores_after(b: Batch, direction: IntraClassDirection) -> Tensor:
    direction.reset()
    for cam in (b.student[0], b.teacher[0]):
        direction.update(b.probs, cam, tags_of(b))
    return direction(b.probs)


def scores_by_loops(b: Batch, direction: IntraClassDirection) -> Tensor:
    direction.reset()
    state = (*(x.clone() for x in direction.buffers()),)
    for cam in (b.student[0], b.teacher[0]):
        state = updated_by_loops(*state, b.probs, cam, tags_of(b))
    maps = []
    for one in b.probs.detach():
        for u, known, (positive, negative) in zip(*state, strict=True):
            sign = (-1 if positive < negative else 1) if known else 0
            maps.append(sign * sum(u[d] * one[d] for d in range(len(u))))
    return torch.stack(maps).view(len(b.probs), -1, *b.probs.shape[2:])


BLOCKS = {
    "IntraClassDirection": Block(
        scores_after,
        scores_by_loops,
        make=lambda b: IntraClassDirection(b.classes, b.classes + 1).to(promote(b.features).dtype),
        but={"gradient": "scores carry none"},
    )
}


def updated_by_loops(
    directions: Tensor, filled: Tensor, activations: Tensor, features: Tensor, cam: Tensor, tags: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A class at a time: the step along the gradient of 1/2 sum s^2 on the sphere, and the sides' mean activations."""
    B, _, h, w = features.shape
    new_directions, new_filled, new_activations = directions.clone(), filled.clone(), activations.clone()
    for n, u in enumerate(directions):
        pull, energy, sides = torch.zeros_like(u), 0.0, []
        for b in range(B):
            if tags[b, n] <= 0:
                continue
            values = {True: [], False: []}
            for i, j in product(range(h), range(w)):
                x = features[b, :, i, j].detach()
                s = (x @ u).item()
                if s != 0:
                    values[s > 0].append(max(active(cam[b, n, i, j]).item(), 0))
                if (tags[b] > 0).sum() == 1:
                    pull, energy = pull + s * x, energy + s * s
            sides.append([sum(side) / max(1, len(side)) for side in (values[True], values[False])])
        if energy > 0:
            # along the gradient pull - energy u, in units of the energy, a tenth of the way
            moved = u + 0.1 * (pull - energy * u) / energy
            new_directions[n], new_filled[n] = moved / moved.norm(), True
        if sides:
            new_activations[n] = 0.9 * activations[n] + 0.1 * torch.tensor(sides).to(activations).mean(0)
    return new_directions, new_filled, new_activations


# The leading axis


def planted(seed: int = 0, images: int = 6, dim: int = 5) -> tuple[Tensor, Tensor]:
    """Features of one class, twice as wide along an axis as across it; the axis of their second moment."""
    g = torch.Generator().manual_seed(seed)
    axis = torch.nn.functional.normalize(torch.randn(dim, generator=g, dtype=torch.float64), dim=0)
    x = torch.randn(images, dim, 8, 8, generator=g, dtype=torch.float64)
    along = torch.einsum("bdhw,d->bhw", x, axis)
    x = x + torch.einsum("bhw,d->bdhw", along, axis)
    pixels = x.movedim(1, -1).flatten(0, 2)
    return x, torch.linalg.eigh(pixels.mT @ pixels).eigenvectors[:, -1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_direction_becomes_the_leading_axis(seed, scale):
    features, axis = planted(seed)
    direction = IntraClassDirection(2, 5).double()
    cam, tags = torch.zeros(6, 2, 8, 8), torch.tensor([[0, 1]]).expand(6, 2)
    for _ in range(200):
        direction.update(scale * features, cam, tags)
    assert (direction.directions[1] @ axis).abs() > 1 - 1e-6
    assert direction.filled.tolist() == [False, True]
    torch.testing.assert_close(direction.directions.norm(dim=1), torch.ones(2, dtype=torch.float64))


def test_every_step_raises_the_energy():
    features, _ = planted()
    direction, energies = IntraClassDirection(1, 5).double(), []
    for _ in range(20):
        direction.update(features, torch.zeros(6, 1, 8, 8), torch.ones(6, 1))
        energies.append(direction(features).square().mean())
    assert (torch.stack(energies).diff() > 0).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_scores_are_positive_where_the_cam_is(seed, side):
    features, axis = planted(seed)
    cam = (side * torch.einsum("bdhw,d->bhw", features, axis)).relu()[:, None]
    direction = IntraClassDirection(1, 5).double()
    for _ in range(60):
        direction.update(features, cam, torch.ones(6, 1))
    scores = direction(features)
    assert scores[cam > 0].mean() > 0 > scores[cam == 0].mean()
    opposite = IntraClassDirection(1, 5).double()
    for _ in range(60):
        opposite.update(features, cam.max() - cam, torch.ones(6, 1))
    torch.testing.assert_close(opposite(features), -scores)


def test_the_sign_follows_the_cam_when_it_turns():
    features, axis = planted()
    cam = torch.einsum("bdhw,d->bhw", features, axis)[:, None]
    direction = IntraClassDirection(1, 5).double()
    for _ in range(20):
        direction.update(features, cam, torch.ones(6, 1))
    before = direction(features)
    for _ in range(20):
        direction.update(features, -cam, torch.ones(6, 1))
    assert (before * direction(features)).mean() < 0


# Which images count


@given(batch=batches(side=5, images=3))
def test_any_batch_equals_the_loops(batch):
    direction = IntraClassDirection(batch.classes, batch.classes + 1).double()
    state = (*(x.clone() for x in direction.buffers()),)
    for cam in (batch.student[0], batch.teacher[0], batch.student[0]):
        direction.update(batch.probs, cam, batch.tags)
        state = updated_by_loops(*state, batch.probs, cam, batch.tags)
    torch.testing.assert_close((*direction.buffers(),), state)


def test_images_of_several_classes_move_no_direction_but_count_for_the_sign():
    features, cam = noise(4, 5, 6, 6), noise(4, 2, 6, 6, seed=1)
    direction = IntraClassDirection(2, 5).double()
    before = direction.directions.clone()
    direction.update(features, cam, torch.ones(4, 2))
    assert torch.equal(direction.directions, before)
    assert not direction.filled.any()
    assert (direction.activations > 0).all()
    assert not direction(features).any()


def test_a_class_without_an_image_keeps_its_state():
    features, cam = noise(4, 5, 6, 6), noise(4, 2, 6, 6, seed=1)
    direction = IntraClassDirection(2, 5).double()
    direction.update(features, cam, torch.tensor([[1, 0], [0, 1], [0, 1], [0, 0]]))
    before = copy.deepcopy(direction.state_dict())
    direction.update(features + 1, cam, torch.tensor([[0, 1]]).expand(4, 2))
    for name, value in direction.state_dict().items():
        assert torch.equal(value[0], before[name][0])
    assert not torch.equal(direction.directions[1], before["directions"][1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_image_that_is_not_finite_counts_for_nothing(value):
    features, cam, tags = noise(3, 5, 6, 6), noise(3, 2, 6, 6, seed=1), torch.tensor([[1, 0], [1, 0], [0, 1]])
    expected, direction = (IntraClassDirection(2, 5).double() for _ in range(2))
    expected.update(features[[0, 2]], cam[[0, 2]], tags[[0, 2]])
    features[1, 2, 3, 3] = value
    direction.update(features, cam, tags)
    torch.testing.assert_close(direction.state_dict(), expected.state_dict())


def test_an_empty_batch_changes_nothing():
    direction = IntraClassDirection(2, 5)
    direction.update(torch.rand(2, 5, 3, 3), torch.rand(2, 2, 3, 3), torch.eye(2))
    before = copy.deepcopy(direction.state_dict())
    direction.update(torch.rand(0, 5, 3, 3), torch.rand(0, 2, 3, 3), torch.rand(0, 2))
    torch.testing.assert_close(direction.state_dict(), before, rtol=0, atol=0)
    assert direction(torch.rand(0, 5, 3, 3)).shape == (0, 2, 3, 3)


# State


def test_state_lies_in_buffers_that_change_in_place():
    direction = IntraClassDirection(2, 5)
    held = dict(direction.named_buffers())
    assert {name: x.dtype for name, x in direction.state_dict().items()} == {
        "directions": torch.float32,
        "filled": torch.bool,
        "activations": torch.float32,
    }
    assert not list(direction.parameters())
    direction.update(torch.randn(2, 5, 3, 3), torch.rand(2, 2, 3, 3), torch.eye(2))
    assert all(getattr(direction, name) is x for name, x in held.items())
    assert direction.filled.all()
    resumed = IntraClassDirection(2, 5)
    resumed.load_state_dict(copy.deepcopy(direction.state_dict()))
    x = torch.randn(1, 5, 4, 4)
    assert torch.equal(resumed(x), direction(x))
    direction.reset()
    torch.testing.assert_close(direction.state_dict(), IntraClassDirection(2, 5).state_dict())
    assert repr(direction) == "IntraClassDirection(num_classes=2, dim=5)"


def test_reading_writes_nothing_and_no_gradient_reaches_the_features():
    direction = IntraClassDirection(2, 5)
    features = torch.randn(2, 5, 3, 3, requires_grad=True)
    direction.update(features, torch.rand(2, 2, 3, 3), torch.eye(2))
    before = copy.deepcopy(direction.state_dict())
    scores = direction(features)
    assert not scores.requires_grad
    torch.testing.assert_close(direction.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_taken_in_float32(half):
    rounded, cam = torch.randn(2, 5, 4, 4).to(half), torch.rand(2, 2, 4, 4).to(half)
    directions = []
    for dtype in (half, torch.float32):
        direction = IntraClassDirection(2, 5)
        with torch.autocast("cpu", torch.bfloat16):
            direction.update(rounded.to(dtype), cam.to(dtype), torch.eye(2))
            directions += [direction.directions, direction(rounded.to(dtype))]
    assert directions[1].dtype == torch.float32
    assert torch.equal(directions[0], directions[2])
    assert torch.equal(directions[1], directions[3])


# Several processes

SHARES = [(3, 2), (1, 4), (5, 0)]
STEPS = [
    (
        noise(5, 4, 3, 3, seed=i),
        noise(5, 3, 3, 3, seed=9 + i),
        torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]),
    )
    for i in range(4)
]


def direction_after(shares: tuple[int, ...], rank: int) -> IntraClassDirection:
    direction = IntraClassDirection(3, 4).double()
    for step in STEPS:
        direction.update(*(x.split(shares)[rank] for x in step))
    return direction


def one_of_two(rank: int) -> list[dict[str, Tensor]]:
    return [dict(direction_after(shares, rank).state_dict()) for shares in SHARES]


@pytest.mark.processes
def test_two_processes_equal_one_of_all_images():
    whole = dict(direction_after((5,), 0).state_dict())
    assert whole["filled"].tolist() == [True, True, False]
    for states in run_processes(one_of_two, 2):
        for state in states:
            torch.testing.assert_close(state, whole)


# refusals

FEATURES, CAM, TAGS = torch.rand(2, 5, 3, 4), torch.rand(2, 3, 3, 4), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("features", FEATURES[0], ValueError),
        ("features", FEATURES[:, :4], ValueError),
        ("features", FEATURES.long(), TypeError),
        ("features", FEATURES.to("meta"), ValueError),
        ("cam", CAM[:, :2], ValueError),
        ("cam", CAM[..., :3], ValueError),
        ("cam", CAM.long(), TypeError),
        ("tags", TAGS[:1], ValueError),
        ("tags", TAGS[:, :2], ValueError),
    ],
)
def test_update_refuses(name, value, error):
    direction: nn.Module = IntraClassDirection(3, 5)
    before = copy.deepcopy(direction.state_dict())
    with pytest.raises(error, match=rf"\b{name}\b"):
        direction.update(**{"features": FEATURES, "cam": CAM, "tags": TAGS, name: value})
    torch.testing.assert_close(direction.state_dict(), before, rtol=0, atol=0)
    if name == "features":
        with pytest.raises(error, match=r"\bfeatures\b"):
            direction(value)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("num_classes", 0, ValueError),
        ("num_classes", 2.0, TypeError),
        ("dim", -1, ValueError),
        ("dim", None, TypeError),
    ],
)
def test_module_refuses(name, value, error):
    assert_refuses(IntraClassDirection, {"num_classes": 3, "dim": 5}, name, value, error)
