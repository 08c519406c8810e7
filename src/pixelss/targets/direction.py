"""Directions within a class (ICD): the axis along which the pixels of its images differ most, object against rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from einops import einsum
from torch import Tensor, nn
from torch.nn.functional import normalize

from pixelss._checks import TAGS_HINT, check_count, check_tensor
from pixelss._distributed import sum_over_processes
from pixelss._dtype import activation, full_precision, promote
from pixelss._labels import mean_over

_MOMENTUM = 0.9


class IntraClassDirection(nn.Module):
    """A direction u_n of every class, and pixels' scores along it: positive where the CAM says that the class is.

    `update` moves u_n towards the leading axis of the pixels X_p of the images that have the tag n and no other, along
    the gradient of 1/2 sum_p s_p^2 on the sphere, s_p = <X_p, u_n>: u <- 0.9 u + 0.1 (sum_p s_p X_p) / (sum_p s_p^2),
    back to length 1. And it keeps the means of relu(CAM_n) where s > 0 and where s < 0, over the images with the tag n,
    running with momentum 0.9: where the negative side has more, the scores change their sign.

    A class without such an image in the global batch keeps its state. Across processes sums and counts are reduced, so
    that every process holds the same; it must lie on a device that the process group reduces on. An image with a
    non-finite feature counts for nothing.

    Args:
        num_classes: foreground classes N.
        dim: feature channels D.

    Attributes:
        directions: (N, D), of length 1.
        filled: (N,) bool, False until an image had the class as its only tag; its scores are zeros until then.
        activations: (N, 2), mean activations on the positive and on the negative side.

    Shape:
        `update` takes features (B, D, h, w), CAMs (B, N, h, w) and tags (B, N). Called on features (B, D, h, w) it
        gives signed scores (B, N, h, w) of all classes, without a gradient; float32 for half precision.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; a setting that is no positive int.

    Reference:
        Fan 2020, "Intra-Class Discriminator", its bottom-up direction and sign.

    Example:
        >>> direction = IntraClassDirection(num_classes=2, dim=8)
        >>> features, cam = torch.randn(4, 8, 6, 6), torch.rand(4, 2, 6, 6)
        >>> direction.update(features, cam, torch.tensor([[1, 0], [1, 0], [1, 1], [0, 0]]))
        >>> direction.filled, direction(features).shape
        (tensor([ True, False]), torch.Size([4, 2, 6, 6]))
    """

    if TYPE_CHECKING:  # nn.Module's own call says Any
        __call__: Callable[..., Tensor]

    directions: Tensor
    filled: Tensor
    activations: Tensor

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        check_count("num_classes", num_classes)
        check_count("dim", dim)
        self.num_classes, self.dim = num_classes, dim
        self.register_buffer("directions", torch.empty(num_classes, dim))
        self.register_buffer("filled", torch.empty(num_classes, dtype=torch.bool))
        self.register_buffer("activations", torch.empty(num_classes, 2))
        self.reset()

    @torch.no_grad()
    def update(self, features: Tensor, cam: Tensor, tags: Tensor) -> None:
        """Learn from features (B, D, h, w), raw or normalised CAMs (B, N, h, w) and tags (B, N).

        Every process must call it, with an empty batch too.
        """
        B, h, w = self._check(features)
        hint = "Resize the CAMs to the features, or the other way."
        check_tensor("cam", cam, "BNhw", like=features, hint=hint, B=B, N=self.num_classes, h=h, w=w)
        check_tensor("tags", tags, "BN", kind="any", like=features, hint=TAGS_HINT, B=B, N=self.num_classes)
        finite = features.isfinite().flatten(1).all(1)
        features = promote(features).where(finite[:, None, None, None], 0)
        present = (tags > 0) & finite[:, None]  # (B, N)
        alone = present & (present.sum(1, keepdim=True) == 1)

        scores = self._project(features)
        own = scores.where(alone[:, :, None, None], 0)
        with full_precision(features):
            pulls = einsum(own, features.to(own.dtype), "b n h w, b d h w -> n d") / (h * w)
        energy = own.square().sum((0, 2, 3)) / (h * w)
        cam = activation(cam).relu().to(scores.dtype)
        sides = [mean_over(cam, side, (2, 3)) for side in (scores > 0, scores < 0)]  # of each image: (B, N)
        seen = torch.stack([*(x.where(present, 0) for x in sides), present.to(scores.dtype)]).sum(1)  # (3, N)

        total = sum_over_processes(torch.cat([pulls, energy[:, None], seen.mT], 1))  # (N, D + 4)
        pulls, energy, sums, images = total.split([self.dim, 1, 2, 1], 1)
        moved = _MOMENTUM * self.directions + (1 - _MOMENTUM) * pulls / energy
        taken = (energy > 0) & moved.isfinite().all(1, keepdim=True)
        self.directions.copy_(torch.where(taken, normalize(moved, dim=1), self.directions))
        self.filled.logical_or_(taken[:, 0])
        running = _MOMENTUM * self.activations + (1 - _MOMENTUM) * sums / images
        self.activations.copy_(torch.where(images > 0, running, self.activations))

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Return the signed scores (B, N, h, w) of features (B, D, h, w)."""
        self._check(features)
        positive, negative = self.activations.unbind(1)
        sign = torch.where(positive < negative, -1, 1).where(self.filled, 0)
        return self._project(promote(features)) * sign[:, None, None]

    def _check(self, features: Tensor) -> tuple[int, int, int]:
        hint = "dim must be the number of feature channels."
        check_tensor("features", features, "BDhw", like=self.directions)
        B, _, h, w = check_tensor("features", features, "BDhw", hint=hint, D=self.dim)
        return B, h, w

    def _project(self, features: Tensor) -> Tensor:
        dtype = torch.promote_types(features.dtype, promote(self.directions).dtype)
        with full_precision(features):
            return einsum(features.to(dtype), self.directions.to(dtype), "b d h w, n d -> b n h w")

    def reset(self) -> None:
        """Forget every class."""
        own = self.directions
        waves = torch.arange(1, own.numel() + 1, device=own.device, dtype=torch.float64).sin()  # alike everywhere
        own.copy_(normalize(waves.view_as(own), dim=1))
        self.filled.zero_()
        self.activations.zero_()

    def extra_repr(self) -> str:
        """Return the settings for the module's repr."""
        return f"num_classes={self.num_classes}, dim={self.dim}"
