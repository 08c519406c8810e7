"""Sub-category tags (SC-CAM): what the images of one class have in common in groups, found by k-means."""

from __future__ import annotations

import torch
from torch import Tensor

from pixelss._checks import TAGS_HINT, check_count, check_multi_hot, check_tensor
from pixelss._dtype import full_precision, promote
from pixelss._random import check_generator

_STARTS, _ITERATIONS = 10, 300  # of k-means; the best start counts


@torch.no_grad()
def subcategory_tags(
    features: Tensor, tags: Tensor, *, clusters: int = 10, generator: torch.Generator | None = None
) -> Tensor:
    """Return a tag for each image and class that says in which of the class's clusters the image lies.

    The images of a class are clustered by k-means: ten starts by k-means++, the one with the smallest sum of squared
    distances. Cluster c of class n is column n * `clusters` + c; a class's clusters are counted in the order in which
    its images show them, so one result has one name. A class with fewer different images than `clusters` has fewer.

    Args:
        features: of the whole data set, pooled over the pixels, an image a row; finite.
        tags: image-level labels of the same images, multi-hot of any dtype; probabilities are refused.
        clusters: k, sub-categories of each class.
        generator: of the starts; None takes torch's own. It may lie on another device.

    Shape:
        (B, D), (B, N) -> (B, N clusters) of 0 and 1, in the features' dtype; float32 for half precision.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; features that are not finite, tags
            that are probabilities; `clusters` below 1; another generator than torch's.

    Reference:
        Chang 2020, "Sub-category Exploration", its sub-category labels.

    Example:
        >>> features = torch.tensor([[0.0], [0.1], [9.0], [0.2]])
        >>> subcategory_tags(features, torch.tensor([[1, 0], [1, 1], [1, 0], [0, 1]]), clusters=2)
        tensor([[1., 0., 0., 0.],
                [1., 0., 1., 0.],
                [0., 1., 0., 0.],
                [0., 0., 0., 1.]])
    """
    B, _ = check_tensor("features", features, "BD", hint="Pool them first: features.mean((2, 3)).")
    _, N = check_tensor("tags", tags, "BN", kind="any", like=features, hint=TAGS_HINT, B=B)
    check_count("clusters", clusters)
    check_generator(generator)
    check_multi_hot(tags)
    x = promote(features)
    if not bool(x.isfinite().all()):
        raise ValueError("features must be finite, but hold inf or NaN.")
    found = x.new_zeros(B, N, clusters)
    for n in range(N):
        images = (tags[:, n] > 0).nonzero().flatten()
        if len(images):
            found[images, n, _clusters(x[images], clusters, generator)] = 1
    return found.flatten(1)


def _clusters(x: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
    """Return the cluster of each row of `x`, the best of several starts, counted in the order of the rows."""
    best, smallest = x.new_zeros(len(x), dtype=torch.int64), float("inf")
    for _ in range(_STARTS):
        assigned, spread = _settle(x, _start(x, k, generator))
        if spread < smallest:
            best, smallest = assigned, spread
    order: dict[int, int] = {}
    return torch.tensor([order.setdefault(c, len(order)) for c in best.tolist()], device=x.device)


def _start(x: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
    """Return k rows of `x` or fewer, each drawn with a chance by its squared distance to those before (k-means++)."""
    # Drawn on the CPU in float64: there a running sum is deterministic, and the draw the same for every dtype.
    device = generator.device if generator else "cpu"
    draws = torch.rand(k, generator=generator, dtype=torch.float64, device=device).cpu()
    chosen: list[int] = []
    chance = x.new_ones(len(x))
    for draw in draws:
        edges = chance.double().cpu().cumsum(0)
        if edges[-1] == 0:  # every row is chosen, or equal to one that is
            break
        place = torch.searchsorted(edges, draw * edges[-1], right=True)
        chosen.append(min(int(place), len(x) - 1))
        distance = (x - x[chosen[-1]]).square().sum(1)
        chance = torch.minimum(chance, distance) if len(chosen) > 1 else distance
    return x[chosen]


def _settle(x: Tensor, centres: Tensor) -> tuple[Tensor, float]:
    """Return the cluster of each row once it stays, and the sum of squared distances to their means (Lloyd)."""
    assigned = torch.full_like(x[:, 0], -1, dtype=torch.int64)
    numbers = torch.arange(len(centres), device=x.device)
    for _ in range(_ITERATIONS):
        # Without a product, whose rounding would depend on how far the features lie from 0.
        nearest = torch.cdist(x, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        if torch.equal(nearest, assigned):
            break
        assigned = nearest
        members = (assigned == numbers[:, None]).to(x)  # (k, M)
        count = members.sum(1, keepdim=True)
        with full_precision(x):
            means = members @ x / count.clamp(min=1)
        centres = torch.where(count > 0, means, centres)  # an empty cluster waits where it is
    return assigned, float((x - centres[assigned]).square().sum())
