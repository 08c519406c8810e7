"""Random walk: class scores spread to the neighbouring cells that look alike."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from pixelss._checks import check_integer, check_positive, check_tensor
from pixelss._dtype import promote
from pixelss._pairs import Offsets, pair_offsets, shifted


def random_walk(scores: Tensor, affinity: Tensor, *, beta: float = 8.0, log_steps: int = 8, radius: int = 5) -> Tensor:
    """Return scores @ T^(2^log_steps) for every image: scores spread to the cells that look alike.

    T holds affinity^beta of every pair in both directions and 1 on its diagonal, its columns divided by their sums:
    a result is a weighted mean of its map, and is kept between the map's minimum and maximum against rounding.

    T is never stored as a matrix of all cells, and few of the 2^log_steps products are computed: with the Chebyshev
    polynomials C_j, T^n = sum_j P(|S_n| = j) C_j(T), where S_n is a walk of n steps +-1, and terms below the
    dtype's precision are left out. At n = 256 that is 88 products in float32, 132 in float64. T is similar to a
    symmetric matrix with eigenvalues in [-1, 1], so the terms are bounded.

    Differentiable in both arguments, in float32 to a few 1e-4; autograd keeps the scores of every product, at
    n = 256 88 times (B, K, h, w).

    Args:
        scores: class scores, with a background, finite.
        affinity: as `AffinityHead`, in [0, 1]; entries outside the image have no influence.
        beta: exponent > 0; a larger one leaves less between unlike cells.
        log_steps: logarithm to base 2 of the number of steps, 0 to 16.
        radius: of `pair_offsets`, the one that `affinity` was built with.

    Shape:
        (B, K, h, w), (B, O, h, w) -> (B, K, h, w); float32 for half-precision input.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; a setting out of range.

    Reference:
        Ahn 2018, "Learning Pixel-level Semantic Affinity", section 3.3;
        Sachdeva 2014, "Faster Algorithms via Approximation Theory", chapter 3, for the powers.

    Example:
        >>> scores = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]])
        >>> affinity = torch.zeros(1, 4, 1, 4)
        >>> affinity[0, 0, 0] = torch.tensor([1.0, 0.0, 1.0, 0.0])  # the left two are alike, and the right two
        >>> random_walk(scores, affinity, radius=2)
        tensor([[[[0.5000, 0.5000, 0.0000, 0.0000]]]])
    """
    offsets = pair_offsets(radius)
    B, K, h, w = check_tensor("scores", scores, "BKhw", hint="One map a class, background included.")
    hint = f"radius={radius} has {len(offsets)} offsets; the size is that of the scores."
    check_tensor("affinity", affinity, "BOhw", like=scores, hint=hint, B=B, O=len(offsets), h=h, w=w)
    check_positive("beta", beta)
    check_integer("log_steps", log_steps, low=0, high=16)

    dtype = torch.promote_types(promote(scores).dtype, promote(affinity).dtype)
    scores = scores.to(dtype)
    # T - 1 in place of T, and steps in place of terms: what a cell keeps is then never rounded. Columns are normalised
    # in float64, as many steps multiply what their sums lack.
    sources, weights = _transition(affinity.double(), offsets, beta)
    weights = weights.to(dtype)

    def change(x: Tensor) -> Tensor:
        return embedding_bag(sources, x, per_sample_weights=weights, mode="sum")

    shares = _chebyshev_shares(2**log_steps, torch.finfo(dtype).eps)
    start = scores.movedim(1, -1).reshape(B * h * w, K).contiguous()  # a row a cell of the batch
    step = change(start)
    current = start + step
    total = shares[0] * start + shares[1] * current
    for share in shares[2:]:
        step = step.add(change(current), alpha=2)
        current = current + step
        total = total.add(current, alpha=share) if share else total
    result = total.view(B, h, w, K).movedim(-1, 1)
    bounded = result.clamp(scores.amin((2, 3), keepdim=True), scores.amax((2, 3), keepdim=True))
    return result + (bounded - result).detach()  # the bound moves rounding only: the gradient goes past it


def _transition(affinity: Tensor, offsets: Offsets, beta: float) -> tuple[Tensor, Tensor]:
    """Return T - 1 by columns: of each cell of the batch the cells that it receives from, and their weights."""
    B, _, h, w = affinity.shape
    backward = tuple((-dy, -dx) for dy, dx in offsets)
    cells = torch.arange(h * w, device=affinity.device).view(h, w)
    partners = torch.stack([cells, *shifted(cells, offsets + backward, outside=-1)])  # (1 + 2 O, h, w)
    inside = partners >= 0
    first_cells = h * w * torch.arange(B, device=cells.device)[:, None, None]
    sources = partners.where(inside, cells).flatten(1).T + first_cells  # (B, hw, 1 + 2 O)

    own = inside[1 : 1 + len(offsets)]
    ahead = affinity.where(own, 1).pow(beta).where(own, 0)  # 1 and not 0: the gradient of a power at 0 may be infinite
    behind = [view[:, o] for o, view in enumerate(shifted(ahead, backward, outside=0))]
    weights = torch.cat([torch.ones_like(ahead[:, :1]), ahead, torch.stack(behind, 1)], 1)  # (B, 1 + 2 O, h, w)
    total = weights.sum(1, keepdim=True)
    weights = torch.cat([1 - total, weights[:, 1:]], 1) / total
    return sources.flatten(0, 1).contiguous(), weights.flatten(2).mT.flatten(0, 1).contiguous()  # (B hw, 1 + 2 O)


def _chebyshev_shares(steps: int, eps: float) -> list[float]:
    """Return P(|S| = j), j = 0, 1, ..., of a walk S of `steps` steps +-1, up to `eps` of the largest."""
    shares: list[float] = []
    binomial = 1.0  # in units of the middle one
    for j in range(steps % 2, steps + 1, 2):
        shares += [0.0] * (j - len(shares)) + [2 * binomial if j else binomial]
        behind = (steps - j) // 2
        binomial *= behind / (steps - behind + 1)
        if binomial < eps:
            break
    total = sum(shares)
    return [share / total for share in shares]
