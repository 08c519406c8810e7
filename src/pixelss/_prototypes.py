"""Prototypes by scores (PPC): a class's mean feature over the cells of the batch where its score is highest."""

from __future__ import annotations

import torch
from einops import einsum
from torch import Tensor
from torch.nn.functional import normalize

from pixelss._checks import check_number, check_tensor
from pixelss._dtype import activation, full_precision, promote


def score_prototypes(features: Tensor, scores: Tensor, *, share: float = 0.125) -> tuple[Tensor, Tensor]:
    """Return every class's mean feature, weighted by its scores, over the cells of the batch where it scores highest.

    A class has as many cells as `share` of one image's, whichever images they lie in.

    Args:
        features: pixel features X, finite.
        scores: class scores in [0, 1] at the same cells, the background's first where there is one; a negative or
            non-finite one counts as 0. Of equal ones an arbitrary part is taken, as where a background is constant.
        share: of the cells of an image, in (0, 1].

    Shape:
        (B, D, h, w), (B, K, h, w) -> prototypes (K, D), of length 1 or zero, in float32 for half precision, and which
        are filled (K,), bool: a class whose scores are all zero is not. Neither carries a gradient.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; `share` out of range.

    Reference:
        Du 2022, "Pixel-to-Prototype Contrast", its prototypes.

    Example:
        >>> features = torch.tensor([[[[3.0, 0.0, 0.0]], [[0.0, 2.0, 5.0]]]])
        >>> score_prototypes(features, torch.tensor([[[[0.0, 0.5, 1.0]], [[1.0, 0.5, 0.0]], [[0.0, 0.0, 0.0]]]]))
        (tensor([[0., 1.],
                [1., 0.],
                [0., 0.]]), tensor([ True,  True, False]))
    """
    B, _, h, w = check_tensor("features", features, "BDhw")
    hint = "Resize the scores to the features, or the other way."
    check_tensor("scores", scores, "BKhw", like=features, hint=hint, B=B, h=h, w=w)
    check_number("share", share, low=torch.finfo(torch.float32).tiny, high=1)
    dtype = torch.promote_types(promote(features).dtype, promote(scores).dtype)
    cells = features.detach().to(dtype).movedim(1, -1).flatten(0, 2)  # (B h w, D)
    scores = activation(scores.detach()).relu().to(dtype).movedim(1, 0).flatten(1)  # (K, B h w)
    count = min(max(1, int(share * h * w)), scores.shape[1])
    highest, index = scores.topk(count, dim=1)  # (K, count)
    with full_precision(cells):
        prototypes = einsum(highest, cells[index], "k c, k c d -> k d")
    filled = (highest > 0).any(1)
    return normalize(prototypes, dim=1).where(filled[:, None], 0), filled
