"""Dense energy (RRM): pixels of alike colour and place shall have the same class, on the permutohedral lattice."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from pixelss._checks import check_choice, check_positive, check_scale, check_tensor
from pixelss._dtype import promote
from pixelss._labels import valid_pixels
from pixelss._lattice import PermutohedralLattice
from pixelss._resize import resize


def energy_lattices(
    images: Tensor, *, bilateral: tuple[float, float] = (100.0, 15.0), scale: float = 0.5
) -> tuple[PermutohedralLattice, ...]:
    """Return the lattice of every image for `dense_energy_loss`: build them once for a batch that is seen again.

    Args:
        images: RGB levels 0 to 255, of dtype uint8 or floating.
        bilateral: (sxy in pixels, srgb in levels), the standard deviations.
        scale: factor of the image size at which the energy is computed; sxy shrinks with it.

    Shape:
        (B, 3, H, W) -> B lattices.

    Raises:
        TypeError, ValueError: images of another rank; a setting out of range.

    Reference:
        Zhang 2020, "Reliability Does Matter", its dense energy loss.

    Example:
        >>> len(energy_lattices(torch.rand(2, 3, 16, 16) * 255))
        2
    """
    check_tensor("images", images, "BCHW", kind="any", C=3)
    _check_settings(bilateral, scale)
    pixels = promote(_nearest(images, scale))  # (B, 3, h, w)
    h, w = pixels.shape[-2:]
    rows, columns = (torch.arange(side, dtype=pixels.dtype, device=pixels.device) for side in (h, w))
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).view(-1, 2) / (bilateral[0] * scale)
    return tuple(PermutohedralLattice(torch.cat([grid, one.flatten(1).mT / bilateral[1]], 1)) for one in pixels)


def dense_energy_loss(
    images: Tensor,
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    region: Tensor | None = None,
    bilateral: tuple[float, float] = (100.0, 15.0),
    scale: float = 0.5,
    lattices: Sequence[PermutohedralLattice] | None = None,
    published_gradient: bool = False,
    ignore_index: int = 255,
) -> Tensor:
    """Return - 1/B sum over images and classes of <q, g F(q)>, q the class probabilities within the region.

    F is the unnormalised bilateral filter. The gate g is 1 where the mask is void and relu(region - max_k p) elsewhere,
    so that a confident pixel of known class counts little; it carries no gradient. The sum over pixels is large: the
    field weighs the loss by 1e-7.

    Args:
        images: RGB levels 0 to 255, of dtype uint8 or floating.
        logits: of every class, of any size: their probabilities are resized to `scale` times the images' size, rounded
            down. Logits of the images' size lose the rows and columns beyond it first: at .5 the last of an odd side.
        mask: label map at the images' size; None: no class is known, and g is 1.
        region: 1 where the crop shows the image, 0 where it is padding; None: everywhere.
        bilateral: (sxy in pixels, srgb in levels), the standard deviations.
        scale: factor of the image size; sxy shrinks with it.
        lattices: of `energy_lattices` with the same images, `bilateral` and `scale`.
        published_gradient: True for the public code's, -2/B g F(q) region, as if g F were symmetric; it has no second
            derivative.
        ignore_index: the mask's void value; values out of 0..K-1 are void too.

    Shape:
        (B, 3, H, W), (B, K, *, *), (B, H, W), (B, H, W) -> scalar; float32 for half precision.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; a setting out of range; not one
            lattice an image, or lattices of another scale.

    Reference:
        Zhang 2020, "Reliability Does Matter", its dense energy loss.

    Example:
        >>> images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
        >>> logits = torch.zeros(2, 21, 16, 16, requires_grad=True)
        >>> dense_energy_loss(images, logits).backward()
        >>> logits.grad.shape
        torch.Size([2, 21, 16, 16])
    """
    B, _, H, W = check_tensor("images", images, "BCHW", kind="any", C=3)
    check_tensor("logits", logits, "BKhw", like=images, hint="One map a class, background included.", B=B)
    _check_settings(bilateral, scale)
    check_choice("published_gradient", published_gradient, (True, False))
    size = _side(H, scale), _side(W, scale)
    if lattices is None:
        lattices = energy_lattices(images, bilateral=bilateral, scale=scale)
    else:
        _check_lattices(lattices, B, size)
    p = promote(logits).softmax(1)
    if logits.shape[-2:] == (H, W):  # the last row of an odd side has no cell
        p = p[..., : round(size[0] / scale), : round(size[1] / scale)]
    p = resize(p, size)  # (B, K, h, w)
    inside = p.new_ones(B, *size)
    if region is not None:
        check_tensor("region", region, "BHW", kind="any", like=images, B=B, H=H, W=W)
        inside = _nearest(region[:, None], scale)[:, 0].to(p.dtype)
    gate = torch.ones_like(inside)
    if mask is not None:
        check_tensor("mask", mask, "BHW", kind="integer", like=images, B=B, H=H, W=W)
        _, known = valid_pixels(_nearest(mask[:, None], scale)[:, 0], p.shape[1], ignore_index)
        gate = gate.where(~known, (inside - p.detach().amax(1)).relu())
    q = p * inside[:, None]
    energy = p.sum() * 0
    for one, g, lattice in zip(q, gate, lattices, strict=True):
        values = one.flatten(1).mT  # (hw, K)
        filtered = g.flatten()[:, None] * lattice.filter(values.detach() if published_gradient else values)
        product = (values * filtered).sum()
        energy = energy + (2 * product - product.detach() if published_gradient else product)
    return -energy / max(1, B)


def _check_settings(bilateral: tuple[float, float], scale: float) -> None:
    if not isinstance(bilateral, (tuple, list)) or len(bilateral) != 2:
        raise ValueError(f"bilateral must be (sxy, srgb), but is {bilateral!r}.")
    for name, value in zip(("sxy", "srgb"), bilateral, strict=True):
        check_positive(f"bilateral {name}", value)
    check_scale("scale", scale)


def _check_lattices(lattices: Sequence[PermutohedralLattice], B: int, size: tuple[int, int]) -> None:
    """Raise unless there is one lattice an image, of as many points as the image has cells."""
    if not isinstance(lattices, Sequence):
        raise TypeError(f"lattices must be a sequence, one an image, but is of type {type(lattices).__name__}.")
    if len(lattices) != B:
        raise ValueError(f"lattices must be one an image, {B}, but are {len(lattices)}. Build them of these images.")
    for i, lattice in enumerate(lattices):
        if not isinstance(lattice, PermutohedralLattice):
            raise TypeError(f"lattices[{i}] must be a PermutohedralLattice, but is of type {type(lattice).__name__}.")
        if (points := len(lattice.slice_cells)) != prod(size):
            raise ValueError(
                f"lattices[{i}] must have the {prod(size)} points of an image at this scale, {size}, but has {points}. "
                "Build them with the same scale."
            )


def _side(side: int, scale: float) -> int:
    """Return the scaled side: rounded down, as torch's interpolation by a factor, and so the public code."""
    return max(1, int(side * scale))


def _nearest(x: Tensor, scale: float) -> Tensor:
    """Return x (B, C, H, W) at `scale`, each pixel the one at its upper left, as torch's nearest interpolation."""
    H, W = x.shape[-2:]
    rows, columns = (
        (torch.arange(_side(side, scale), device=x.device, dtype=torch.float64) / scale).long().clamp(max=side - 1)
        for side in (H, W)
    )
    return x.index_select(-2, rows).index_select(-1, columns)
