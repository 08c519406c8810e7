"""Refinement by affinity (CLIP-ES): a CAM spreads along a transformer's attention, from within its own boxes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from pixelss._checks import check_number, check_tensor
from pixelss._dtype import activation, full_precision, promote


def refine_by_affinity(scores: Tensor, affinity: Tensor, *, inside: Tensor | None = None) -> Tensor:
    """Return affinity @ scores for every map: each cell takes what it is like.

    Args:
        scores: maps of any classes.
        affinity: of every two cells, as `attention_affinity` or `sinkhorn_affinity`.
        inside: the cells whose scores may spread, as `cam_boxes`; None: all.

    Shape:
        (B, N, h, w), (B, P, P), (B, N, h, w) bool -> (B, N, h, w), P = h w; float32 for half precision.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device.

    Reference:
        Lin 2023, "CLIP is Also an Efficient Segmenter", its refinement by affinity.

    Example:
        >>> scores = torch.tensor([[[[1.0, 0.0]]]])
        >>> refine_by_affinity(scores, torch.tensor([[[0.75, 0.25], [0.5, 0.5]]]))
        tensor([[[[0.7500, 0.5000]]]])
    """
    B, N, h, w = check_tensor("scores", scores, "BNhw")
    hint = "A row and a column a cell of the scores."
    check_tensor("affinity", affinity, "BPQ", like=scores, hint=hint, B=B, P=h * w, Q=h * w)
    x = promote(scores)
    if inside is not None:
        check_tensor("inside", inside, "BNhw", kind="bool", like=scores, B=B, N=N, h=h, w=w)
        x = x.where(inside, 0)
    with full_precision(x):
        return (x.flatten(2) @ promote(affinity).to(x.dtype).mT).view(B, N, h, w)


@torch.no_grad()
def cam_boxes(cam: Tensor, *, threshold: float = 0.4) -> Tensor:
    """Return the cells within the bounding boxes of what a CAM shows.

    A box encloses cells above `threshold` of the map's maximum that touch, diagonally too; it holds its last row and
    column, which the public code leaves out.

    Args:
        cam: CAMs, not negative.
        threshold: share of the maximum, in [0, 1].

    Shape:
        (B, N, h, w) -> (B, N, h, w) bool; nothing where a map is all zeros.

    Raises:
        TypeError, ValueError: CAMs of another rank or dtype kind; `threshold` out of range.

    Reference:
        Lin 2023, "CLIP is Also an Efficient Segmenter", its box mask.

    Example:
        >>> cam = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])[None, None]
        >>> cam_boxes(cam)[0, 0].int()
        tensor([[1, 1, 0],
                [1, 1, 0],
                [0, 0, 0]], dtype=torch.int32)
    """
    _, _, h, w = check_tensor("cam", cam, "BNhw")
    check_number("threshold", threshold, low=0, high=1)
    maps = activation(cam).flatten(0, 1)  # (M, h, w)
    on = maps > threshold * maps.amax((1, 2), keepdim=True)
    # A component's number is the largest of its cells', which spreads from cell to touching cell; off is 0.
    number = torch.arange(1, h * w + 1, dtype=torch.float64, device=cam.device).view(h, w) * on
    for _ in range(h * w):
        spread = max_pool2d(number[:, None], 3, 1, 1)[:, 0] * on
        if torch.equal(spread, number):
            break
        number = spread
    inside = torch.zeros_like(on)
    for numbers, box in zip(number, inside, strict=True):
        for n in numbers[numbers > 0].unique():
            rows, columns = (numbers == n).nonzero().unbind(1)
            box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
    return inside.view(cam.shape)
