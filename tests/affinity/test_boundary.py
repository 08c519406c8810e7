from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from pixelss import BoundaryHead
from tests.blocks import Block
from tests.oracles import bilinear
from tests.strategies import Batch, make_batch

SIGNATURES = {
    "BoundaryHead": "(in_channels, *, dim=32)",
}


def taps(b: Batch) -> list[Tensor]:
    return [b.raw[1], b.features]  # a fine one and a coarse one


BLOCKS = {
    "BoundaryHead": Block(
        lambda b, head: head(taps(b)),
        lambda b, head: boundary_head_by_loops([tap.detach() for tap in taps(b)], head),
        make=lambda b: BoundaryHead((b.classes, b.features.shape[1]), dim=8),
        but={
            "half": "convolutions run in the user's precision",
            "gradient": "taps are taken as they are: no gradient reaches the backbone",
        },
    ),
}


def group_norm_by_loops(x: Tensor, norm: torch.nn.GroupNorm) -> Tensor:
    """Every image's channels in groups of C / 4: less their mean, by their deviation, then an affine map a channel."""
    out = torch.zeros_like(x)
    size = x.shape[1] // norm.num_groups
    for b, c in product(range(x.shape[0]), range(x.shape[1])):
        group = x[b, c // size * size : (c // size + 1) * size]
        mean = group.mean()
        deviation = ((group - mean).square().mean() + norm.eps).sqrt()
        out[b, c] = (x[b, c] - mean) / deviation * norm.weight[c] + norm.bias[c]
    return out


def boundary_head_by_loops(taps: list[Tensor], head: BoundaryHead) -> Tensor:
    areas = [tap.shape[2] * tap.shape[3] for tap in taps]
    size = tuple(taps[areas.index(max(areas))].shape[2:])
    maps = []
    for tap, (conv, norm) in zip(taps, head.reduce, strict=True):
        reduced = torch.einsum("dc,bchw->bdhw", conv.weight[:, :, 0, 0], tap)
        maps.append(bilinear(group_norm_by_loops(reduced, norm), size).relu())
    joined = torch.einsum("kc,bchw->bkhw", head.join.weight[:, :, 0, 0], torch.cat(maps, 1))
    return joined + head.join.bias[:, None, None]


def test_gradients_reach_the_head_alone():
    batch = make_batch(dtype=torch.float32)
    head, ours = BoundaryHead((3, 5), dim=4), [tap.requires_grad_() for tap in taps(batch)]
    head(ours).sum().backward()
    assert all(tap.grad is None for tap in ours)
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize("order", [1, -1])
def test_the_finest_tap_decides_the_size_wherever_it_stands(order):
    sizes = [(9, 4), (5, 6)][::order]
    out = BoundaryHead((2, 2), dim=4)([torch.rand(3, 2, *size) for size in sizes])
    assert out.shape == (3, 1, 9, 4)


def test_head_round_trips_its_state():
    first, second = BoundaryHead((3, 5), dim=4), BoundaryHead((3, 5), dim=4)
    second.load_state_dict(first.state_dict())
    maps = taps(make_batch(dtype=torch.float32))
    assert torch.equal(first(maps), second(maps))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_taps_give_float32(half):
    maps = [tap.to(half) for tap in taps(make_batch())]
    with torch.autocast("cpu", half):
        assert BoundaryHead((3, 5), dim=4)(maps).dtype == torch.float32


@pytest.mark.parametrize(
    ("in_channels", "dim", "error", "message"),
    [
        ((), 32, ValueError, "in_channels"),
        (8, 32, TypeError, "in_channels"),
        ((8, 0), 32, ValueError, r"in_channels\[1\] must be at least 1, but is 0"),
        ((8.0,), 32, TypeError, r"in_channels\[0\] must be an int"),
        ((8,), 6, ValueError, "dim must be a multiple of 4, the groups of the norms, but is 6"),
        ((8,), 0, ValueError, "dim"),
    ],
)
def test_settings_are_refused(in_channels, dim, error, message):
    with pytest.raises(error, match=message):
        BoundaryHead(in_channels, dim=dim)


TAPS = [torch.rand(2, 3, 4, 5), torch.rand(2, 5, 2, 3)]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (TAPS[:1], ValueError, "taps must hold 2 tensors, as in_channels, but holds 1"),
        (TAPS[0], TypeError, "taps"),
        ([TAPS[0], TAPS[1][:1]], ValueError, r"taps\[1\].*B"),
        (TAPS[::-1], ValueError, r"taps\[0\] must have shape .*C is 5"),
        ([TAPS[0], TAPS[1].long()], TypeError, r"taps\[1\]"),
        ([TAPS[0], TAPS[1].to("meta")], ValueError, r"taps\[1\] must lie on cpu"),
    ],
)
def test_taps_are_refused(value, error, message):
    with pytest.raises(error, match=message):
        BoundaryHead((3, 5), dim=4)(value)
