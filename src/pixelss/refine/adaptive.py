"""Pixel-adaptive refinement: scores move to the neighbours whose colour is alike, near and far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import exp
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pixelss._checks import check_choice, check_counts, check_integer, check_scale, check_tensor
from pixelss._dtype import full_precision, promote
from pixelss._pieces import entries_at_a_time, launches_cost
from pixelss._resize import resize, scaled_side

_SHARPNESS = 0.3  # of both kernels, in standard deviations
_POSITION = 0.01  # weight of the position's kernel beside the colour's
Border = tuple[Tensor, Tensor]
_RING = tuple((dy, dx) for dy, dx in product((-1, 0, 1), repeat=2) if dy or dx)


def pixel_adaptive_refinement(
    images: Tensor,
    scores: Tensor,
    *,
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
    iterations: int = 10,
    size: float | None = None,
    normalize: bool = True,
) -> Tensor:
    """Return scores after `iterations` in which every pixel takes the weighted mean of its neighbours.

    The neighbours are the 8 around a pixel at every dilation (48 by default); beyond the border lies its nearest pixel.
    With I_q and d_q the colour and the distance of neighbour q, and their standard deviations over the neighbours,

        w_q = softmax_q(-mean_c((I_qc - I_pc) / std_c / .3)^2) + .01 softmax_q(-(d_q / std / .3)^2).

    The published weights add up to 1.01, so that scores grow by a tenth in ten iterations; here they are divided by it.
    No map of all neighbours is stored: memory holds the weights, B H W a neighbour, and a few copies of the scores;
    where these carry a gradient, those of every iteration. On a GPU small maps are moved a dilation at a time, which
    takes nine more copies.

    Args:
        images: RGB of any scale and dtype, levels or normalised: colours are compared in their own deviations.
        scores: class scores, with a background; probabilities remain probabilities.
        dilations: distances of the neighbours in pixels, along an axis.
        iterations: 0 returns the scores.
        size: a factor at which to work, the result at the scores' size again; None: as they are. The field takes .5.
        normalize: False leaves the weights at a sum of 1.01, as published.

    Shape:
        (B, 3, H, W), (B, K, H, W) -> (B, K, H, W); float32 for half precision. The gradient reaches the scores.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype or device; a setting out of range.

    Reference:
        Ru 2022, "Learning Affinity from Attention", its PAR.

    Example:
        >>> images = torch.zeros(1, 3, 8, 8)
        >>> images[..., 4:] = 1.0  # two halves
        >>> scores = torch.zeros(1, 2, 8, 8)
        >>> scores[:, 0, :, :2], scores[:, 1, :, 6:] = 1.0, 1.0
        >>> pixel_adaptive_refinement(images, scores, dilations=(1, 2)).argmax(1)[0, 0]
        tensor([0, 0, 0, 0, 1, 1, 1, 1])
    """
    hint = "Images are RGB, of the scores' size."
    B, _, H, W = check_tensor("images", images, "BCHW", kind="any", hint=hint, C=3)
    check_tensor("scores", scores, "BKHW", like=images, hint=hint, B=B, H=H, W=W)
    _check_settings(dilations, iterations, size, normalize)
    scores = promote(scores)
    pixels = images.detach().to(scores.dtype)
    if size is not None:
        work = scaled_side(H, size), scaled_side(W, size)
        pixels, scores = resize(pixels, work), resize(scores, work)
    with full_precision(scores):
        rings = launches_cost(scores) and 9 * scores.numel() <= entries_at_a_time(scores)  # a CPU adds up slowly
        border = _border(pixels, max(dilations))
        weights = _weights(pixels, border, dilations, rings)
        if normalize:
            weights = weights / (1 + _POSITION)
        parts = weights.unbind()
        for _ in range(iterations):
            refined = torch.zeros_like(scores)
            for weight, around in zip(parts, _neighbours(scores, border, dilations, rings), strict=True):
                if rings:
                    refined += (weight * around).sum((0, 1))
                else:
                    refined.addcmul_(weight[0, 0], around[0, 0])
            scores = refined
    return scores if size is None else resize(scores, (H, W))


def _weights(pixels: Tensor, border: Border, dilations: Sequence[int], rings: bool) -> Tensor:
    """Return the weights of the neighbours, one entry of `_neighbours` after the other: (O, 1, 1, B, 1, H, W).

    Where they come in rings, (dilations, 3, 3, B, 1, H, W), with 0 in the middle.
    """
    O = 8 * len(dilations)  # noqa: E741
    total, squares = torch.zeros_like(pixels), torch.zeros_like(pixels)
    for around in _neighbours(pixels, border, dilations, rings):
        step = around - pixels  # of the pixel itself: 0
        if rings:
            total += step.sum((0, 1))
            squares += step.square_().sum((0, 1))
        else:
            total += step[0, 0]
            squares.addcmul_(step[0, 0], step[0, 0])
    variance = ((squares - total.square() / O) / (O - 1)).clamp(min=0)
    scale = (variance.sqrt() + 1e-8) * _SHARPNESS  # (B, 3, H, W)
    colour = [
        ((around - pixels) / scale).square_().mean(3, keepdim=True).neg_()
        for around in _neighbours(pixels, border, dilations, rings)
    ]
    weights = torch.stack(colour)
    shape = weights.shape[:3]
    if rings:
        weights[:, 1, 1] = -torch.inf
    weights = weights.flatten(0, 2).softmax(0)
    places = [i for i in range(len(weights)) if not rings or i % 9 != 4]
    for place, near in zip(places, _nearness(dilations), strict=True):
        weights[place] += _POSITION * near
    return weights.view(*shape, *weights.shape[1:])


def _nearness(dilations: Sequence[int]) -> list[float]:
    """Return softmax_q(-(d_q / std / .3)^2), as numbers: a tensor copied to the device would wait for it."""
    distances = [dilation * (dy**2 + dx**2) ** 0.5 for dilation, (dy, dx) in product(dilations, _RING)]
    mean = sum(distances) / len(distances)
    variance = sum((distance - mean) ** 2 for distance in distances) / (len(distances) - 1)
    scores = [exp(-(distance**2) / (variance**0.5 + 1e-8) ** 2 / _SHARPNESS**2) for distance in distances]
    return [score / sum(scores) for score in scores]


def _border(x: Tensor, margin: int) -> Border:
    """Return the rows and the columns of x (B, C, H, W) that continue it by its nearest pixels."""
    rows, columns = (torch.arange(-margin, side + margin, device=x.device).clamp(0, side - 1) for side in x.shape[-2:])
    return rows, columns


def _neighbours(x: Tensor, border: Border, dilations: Sequence[int], rings: bool) -> list[Tensor]:
    """Return views of x (B, C, H, W), continued beyond its border.

    One an offset, (1, 1, B, C, H, W), or one a dilation, (3, 3, B, C, H, W), with x itself in the middle.
    """
    (H, W), margin = x.shape[-2:], max(dilations)
    padded = x.index_select(-2, border[0]).index_select(
        -1, border[1]
    )  # a padding's gradient is not deterministic on CUDA
    if rings:
        boxes = ((d, padded[..., margin - d : margin + H + d, margin - d : margin + W + d]) for d in dilations)
        return [box.unfold(2, H, d).unfold(3, W, d).permute(2, 3, 0, 1, 4, 5) for d, box in boxes]
    starts = [(margin + d * dy, margin + d * dx) for d, (dy, dx) in product(dilations, _RING)]
    return [padded[None, None, ..., y : y + H, x : x + W] for y, x in starts]


def _check_settings(dilations: Sequence[int], iterations: int, size: float | None, normalize: bool) -> None:
    check_counts("dilations", dilations, "distances in pixels")
    check_integer("iterations", iterations, low=0, high=10_000)
    check_choice("normalize", normalize, (True, False))
    if size is not None:
        check_scale("size", size)


class PixelAdaptiveRefinement(nn.Module):
    """`pixel_adaptive_refinement` with its settings.

    Args:
        dilations: distances of the neighbours in pixels.
        iterations: how often scores move.
        size: a factor at which to work, or None.
        normalize: whether the weights add up to 1.

    Example:
        >>> refine = PixelAdaptiveRefinement(size=0.5)
        >>> refine(torch.rand(1, 3, 40, 60), torch.rand(1, 21, 40, 60)).shape
        torch.Size([1, 21, 40, 60])
    """

    if TYPE_CHECKING:  # nn.Module's own call says Any
        __call__: Callable[..., Tensor]

    def __init__(
        self,
        *,
        dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
        iterations: int = 10,
        size: float | None = None,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        _check_settings(dilations, iterations, size, normalize)
        self.dilations, self.iterations, self.size, self.normalize = tuple(dilations), iterations, size, normalize

    def forward(self, images: Tensor, scores: Tensor) -> Tensor:
        """Return the refined scores."""
        return pixel_adaptive_refinement(
            images,
            scores,
            dilations=self.dilations,
            iterations=self.iterations,
            size=self.size,
            normalize=self.normalize,
        )

    def extra_repr(self) -> str:
        """Return the settings for the module's repr."""
        return f"dilations={self.dilations}, iterations={self.iterations}, size={self.size}, normalize={self.normalize}"
