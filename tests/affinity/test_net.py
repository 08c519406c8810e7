from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from pixelss import AffinityHead, affinity_labels, affinity_loss
from tests.blocks import Block
from tests.oracles import BAD_RADII, assert_matches, assert_refuses, pair_offsets_by_loops, pairs
from tests.strategies import make_maps

SIGNATURES = {
    "AffinityHead": "(in_channels=(512, 1024, 4096), *, dims=(64, 128, 256), radius=5)",
}

BLOCKS = {
    "AffinityHead": Block(
        lambda b, head: head([b.features, b.features.flip(-1)]),
        lambda b, head: affinity_head_by_loops(
            [b.features, b.features.flip(-1)],
            [conv.weight.detach().flatten(1) for conv in head.reduce],
            head.mix.weight.detach().flatten(1),
            radius=3,
        ),
        make=lambda b: AffinityHead(2 * b.features.shape[1:2], dims=(2, 3), radius=3),
        but={"half": "convolutions run in the user's precision"},
    ),
}

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
halves = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
SIZES = [(1, 1), (2, 3), (1, 7), (6, 2), (6, 7)]
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def elu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.exp(x) - 1)


def affinity_head_by_loops(taps: list[Tensor], reduce: list[Tensor], mix: Tensor, radius: int) -> Tensor:
    B, _, h, w = taps[0].shape
    affinity = taps[0].new_zeros(B, len(pair_offsets_by_loops(radius)), h, w)
    for b in range(B):
        features = {}
        for y, x in product(range(h), range(w)):
            reduced = [elu(weight @ tap[b, :, y, x]) for tap, weight in zip(taps, reduce, strict=True)]
            features[y, x] = elu(mix @ torch.cat(reduced))
        for o, y, x, v, u in pairs(h, w, radius):
            affinity[b, o, y, x] = torch.exp(-sum(abs(features[y, x] - features[v, u])) / len(mix))
    return affinity


def tiny_head(radius: int = 3, dtype: torch.dtype = torch.float64) -> AffinityHead:
    torch.manual_seed(0)
    return AffinityHead((3, 4), dims=(2, 3), radius=radius).to(dtype)


def make_taps(size: tuple[int, int] = (4, 5), images: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    return [torch.randn(images, c, *size, generator=g, dtype=torch.float64).to(dtype) for c in (3, 4)]


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
        return affinity_head_by_loops([first, second], weights[:2], weights[2], radius)

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


TAPS = [torch.rand(2, 3, 4, 5), torch.rand(2, 4, 4, 5)]


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
