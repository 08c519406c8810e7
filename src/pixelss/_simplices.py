"""Simplices of the permutohedral lattice: the one around each point, its corners, and numbers that name them."""

from __future__ import annotations

from itertools import combinations
from math import prod

import torch
from torch import Tensor


def enclosing_simplex(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return remainder-0 corner, ranks and barycentric weights, each (d + 1, P), of the simplex around every point."""
    point = _elevate(features)
    corner, rank = _nearest_corner(point)
    return corner, rank, _barycentric_weights(point, corner)


def _elevate(features: Tensor) -> Tensor:
    """Return the points (P, d) on the plane of d + 1 coordinates that sum to 0, (d + 1, P)."""
    d = features.shape[1]
    total = torch.zeros_like(features[:, 0])
    elevated = [total] * (d + 1)
    for j in range(d, 0, -1):
        # In this order, as the C++ code: a sum rounded otherwise may fall into another simplex.
        scaled = features[:, j - 1] * ((2 / 3) ** 0.5 * (d + 1) / (j * (j + 1)) ** 0.5)
        elevated[j] = total - j * scaled
        total = total + scaled
    elevated[0] = total
    return torch.stack(elevated)


def _nearest_corner(point: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest corner whose coordinates are multiples of d + 1, and each coordinate's rank by its rest.

    All are of the points' dtype: on a CPU comparing, adding and rounding take longer where dtypes mix.
    """
    d = len(point) - 1
    corner, rest, rank = (torch.empty_like(point) for _ in range(3))
    for j, coordinate in enumerate(point):  # one by one: what is at work fits a cache
        torch.mul((coordinate / (d + 1)).sub_(0.5).ceil_(), d + 1, out=corner[j])  # halves go down
        torch.sub(coordinate, corner[j], out=rest[j])
    off_plane = (corner.sum(0) / (d + 1)).round_()  # by so many steps rounding left it
    for j in range(d + 1):
        torch.add(off_plane, j, out=rank[j])
    later = torch.empty_like(off_plane)
    for i, j in combinations(range(d + 1), 2):
        torch.gt(rest[j], rest[i], out=later)  # of equal ones the first is before
        rank[i] += later
        rank[j] -= later
    wrap = torch.div(rank, d + 1, out=rest).floor_().mul_(d + 1)
    return corner.sub_(wrap), rank.sub_(wrap)


def _barycentric_weights(point: Tensor, corner: Tensor) -> Tensor:
    """Return the weights of the corners of remainder 0 to d: differences of the rests, in the order of their ranks.

    The points' memory is used for the rests.
    """
    d = len(point) - 1
    *rests, spare = *torch.sub(point, corner, out=point).div_(d + 1), torch.empty_like(point[0])
    for i, j in combinations(range(d + 1), 2):  # the higher the rank the lower the rest
        torch.minimum(rests[i], rests[j], out=spare)
        torch.maximum(rests[i], rests[j], out=rests[j])
        rests[i], spare = spare, rests[i]
    weights = torch.empty_like(point)
    for r in range(d + 1):
        torch.sub(rests[r], rests[r - 1], out=weights[r])
    weights[0] += 1
    return weights


def simplex_keys(corner: Tensor, rank: Tensor) -> Tensor:
    """Return a number for each simplex of P points, of its corner of remainder 0 and its ranks without the last."""
    place = corner + rank
    spans = (place.amax(1) - place.amin(1) + 1).long().tolist()
    return keys_of(place, [prod(spans[:k]) for k in range(len(spans))], prod(spans))


def strides_of_keys(corner: Tensor) -> list[int]:
    """Return what each of d coordinates counts in a cell's key, and last how many keys there can be.

    All coordinates of a cell leave the remainder r when divided by d + 1, x = (d + 1) a + r. The key is the sum of
    stride * x, (d + 1) * (sum of stride * a) + r * (sum of strides): as the strides sum to 1 more than a multiple of
    d + 1 it tells r, and as they are products of as many a as there are, all of them.
    """
    d = len(corner)
    # With room for the other corners and their neighbours: no two cells share a key.
    counts = ((corner.amax(1) - corner.amin(1)) / (d + 1) + 5).long().tolist()
    counts[0] += -counts[0] % (d + 1)
    return [prod(counts[:k]) for k in range(d)] + [(d + 1) * prod(counts)]


def keys_of(place: Tensor, strides: list[int], count: int) -> Tensor:
    """Return the sum of stride * coordinate for the coordinates (d, P) of each of P places; it is below `count`."""
    if count >= 2**63:
        raise ValueError(
            f"features must span few enough cells that their keys fit 63 bits, but need {count.bit_length()}: "
            "divide them by larger scales (sxy, srgb)."
        )
    key = torch.zeros(place.shape[1], dtype=narrow(count), device=place.device)
    for coordinate, stride in zip(place, strides, strict=True):
        key.add_((coordinate - coordinate.min()).to(key.dtype), alpha=stride)
    return key


def narrow(count: int) -> torch.dtype:
    """Return the integers, half as long where they can be, for numbers below `count`."""
    return torch.int32 if count < 2**31 else torch.long


def corner_keys(corner: Tensor, rank: Tensor, strides: list[int], count: int) -> Tensor:
    """Return the key of each corner, by remainder, of each simplex, (d + 1, U)."""
    d = len(strides)
    first = keys_of(corner[:d], strides, count)
    # From remainder r to r + 1 all coordinates grow by 1, and that of rank d - r falls by d + 1.
    steps = first.new_tensor([sum(strides) - (d + 1) * stride for stride in [*strides, 0]])
    keys = torch.empty(rank.shape, dtype=first.dtype, device=first.device)
    keys.scatter_(0, torch.where(rank > 0, d + 1 - rank, 0).long(), steps[:, None].expand(rank.shape))
    keys[0] = first
    return torch.cumsum(keys, 0, out=keys)
