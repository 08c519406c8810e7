"""Prototypes (Yoon Eq. 3): the mean feature of every class region, kept in a bank from batch to batch."""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum
from torch import Tensor, nn

from pixelss._checks import check_count, check_tensor, check_void
from pixelss._distributed import sum_over_processes
from pixelss._dtype import full_precision, promote
from pixelss._labels import class_maps, valid_pixels
from pixelss._resize import resize_matrix


def class_prototypes(
    features: Tensor, mask: Tensor, num_classes: int, *, ignore_index: int = 255
) -> tuple[Tensor, Tensor]:
    """Return each image's mean feature over every class region, as if upsampled to the mask's size (Yoon Eq. 3).

    Nothing is upsampled: the mean is linear in the features, so the one-hot mask is pulled back through the
    transpose of the bilinear resize and contracted with the features at their own size. The result is exact.

    Args:
        features: pixel features X, of any size against the mask's.
        mask: label map in 0..N; `ignore_index` and values out of range belong to no region.
        num_classes: foreground classes N; K = N + 1.
        ignore_index: the mask's void value.

    Shape:
        (B, D, h, w), (B, H, W) -> prototypes (B, K, D), zero for an empty region, in float32 for half-precision
        features, and pixel counts (B, K), int64.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device.

    Reference:
        Yoon 2021, "Exploring Pixel-level Self-supervision", Eq. 3; the paper prints a sum and says
        "averaging".

    Example:
        >>> features = torch.tensor([[[[1.0, 3.0]]]])
        >>> prototypes, counts = class_prototypes(features, torch.tensor([[[0, 1]]]), num_classes=1)
        >>> prototypes.squeeze(), counts.squeeze()
        (tensor([1., 3.]), tensor([1, 1]))
    """
    B, _, h, w = check_tensor("features", features, "BDhw")
    _, H, W = check_tensor("mask", mask, "BHW", kind="integer", like=features, B=B)
    check_count("num_classes", num_classes)
    features = promote(features)
    label, valid = valid_pixels(mask, num_classes + 1, ignore_index)
    region = class_maps(label, num_classes + 1) & valid[:, None]  # (B, K, H, W)
    with full_precision(features):
        weights = region.to(features.dtype)
        if w != W:
            weights = weights @ resize_matrix(w, W, features)  # (B, K, H, w)
        if h != H:
            weights = resize_matrix(h, H, features).mT @ weights  # (B, K, h, w)
        counts = region.sum((-2, -1))
        sums = einsum(weights, features, "b k h w, b d h w -> b k d")
    means = (sums / counts.clamp(min=1)[:, :, None]).where(counts[:, :, None] > 0, 0)
    return means, counts


class PrototypeBank(nn.Module):
    """The latest prototype of every class: mean over the batch's images of their `class_prototypes`.

    A class without a pixel in the global batch keeps its row; so does one whose new row is not finite. Across
    processes the sums and image counts are reduced, then divided, so every process holds the same bank; it must lie
    on a device that the process group reduces on.

    Args:
        num_classes: foreground classes N; K = N + 1 rows.
        dim: feature channels D; None takes those of the first features, or of the state that is loaded first.
        ignore_index: the mask's void value.

    Attributes:
        prototypes: (K, D), unnormalised; (K, 0) as long as D is not known.
        filled: (K,) bool, False until the class was seen once.

    Shape:
        `update` takes (B, D, h, w) and (B, H, W); see `class_prototypes`.

    Raises:
        TypeError, ValueError: as `class_prototypes`; features whose channels are not `dim`, or not those of the other
            processes.

    Reference:
        Yoon 2021, "Exploring Pixel-level Self-supervision", section 3.3.

    Example:
        >>> bank = PrototypeBank(num_classes=20, dim=256)
        >>> bank.update(torch.rand(4, 256, 24, 24), torch.randint(0, 3, (4, 192, 192)))
        >>> bank.filled.nonzero().flatten()
        tensor([0, 1, 2])
    """

    prototypes: Tensor
    filled: Tensor

    def __init__(self, num_classes: int, dim: int | None = 256, *, ignore_index: int = 255) -> None:
        super().__init__()
        check_count("num_classes", num_classes)
        if dim is not None:
            check_count("dim", dim)
        check_void(ignore_index, num_classes + 1)
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self._any_dim = dim is None
        self.register_buffer("prototypes", torch.zeros(num_classes + 1, dim or 0))
        self.register_buffer("filled", torch.zeros(num_classes + 1, dtype=torch.bool))

    @torch.no_grad()
    def update(self, features: Tensor, mask: Tensor) -> None:
        """Replace the rows of the classes seen in features (B, D, h, w) under mask (B, H, W).

        Every process must call it, with an empty batch too.
        """
        hint = "dim must be the number of feature channels."
        _, D, _, _ = check_tensor("features", features, "BDhw", like=self.prototypes)
        check_tensor("features", features, "BDhw", hint=hint, D=self.dim or D)
        rows, pixels = class_prototypes(features, mask, self.num_classes, ignore_index=self.ignore_index)
        if self.dim is None:
            self._take_dim(D)
        images = (pixels > 0).to(rows.dtype)  # (B, K): which show the class
        total = sum_over_processes(torch.cat([rows.sum(0), images.sum(0)[:, None]], dim=1))  # (K, D + 1)
        sums, images = total[:, :-1], total[:, -1:]
        rows = sums / images.clamp(min=1)
        seen = (images > 0) & rows.isfinite().all(1, keepdim=True)
        self.prototypes.copy_(torch.where(seen, rows, self.prototypes))
        self.filled.logical_or_(seen[:, 0])

    @property
    def dim(self) -> int | None:
        """Feature channels D; None as long as they are not known."""
        return self.prototypes.shape[1] or None

    def _take_dim(self, dim: int) -> None:
        own = torch.tensor([1, dim, dim**2], device=self.prototypes.device)
        total = sum_over_processes(own)
        if total is not own:  # several processes: before they reduce tensors of different sizes
            processes, summed, squares = total.tolist()
            if processes * squares != summed**2:
                raise ValueError(f"features must have as many channels in every process, but have {dim} in this one.")
        self.prototypes.resize_(self.num_classes + 1, dim).zero_()  # in place: whoever holds the buffer sees it

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the width of the state where that of the bank was left open; an unseen bank's state fits any."""
        name = f"{prefix}prototypes"
        value, own = state_dict.get(name), self.prototypes
        if isinstance(value, Tensor) and value.ndim == 2 and len(value) == len(own):
            if self._any_dim:
                own.resize_(value.shape)
            elif value.shape[1] == 0:
                state_dict = {**state_dict, name: torch.zeros_like(own)}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def reset(self) -> None:
        """Forget every class."""
        self.prototypes.zero_()
        self.filled.zero_()

    def extra_repr(self) -> str:
        """Return the settings for the module's repr."""
        return f"num_classes={self.num_classes}, dim={self.dim}, ignore_index={self.ignore_index}"
