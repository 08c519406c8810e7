"""Complementary regularisation (CPN): the CAM of an image is that of its parts together."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from pixelss._checks import check_choice, check_tensor
from pixelss._dtype import activation


def complementary_loss(
    full: Tensor, kept: Tensor, hidden: Tensor, share: Tensor, *, through: Literal["full", "all"] = "full"
) -> Tensor:
    """Return the mean distance of an image's CAMs from those of its complementary pair, weighed by what each shows.

    That is |share kept + (1 - share) hidden - full|, averaged over all entries, those of absent classes too.

    Args:
        full: normalised CAMs of the images, zero for absent classes; a non-finite value counts as no activation.
        kept: of the first images of `complementary_pair`.
        hidden: of the second.
        share: of every image's pixels in the first.
        through: "full", the gradient reaches `full` alone; "all", as published for refined CAMs, all three.

    Shape:
        (B, N, h, w) three times, (B,) -> scalar; float32 for half precision.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; `through` is unknown.

    Reference:
        Zhang 2021, "Complementary Patch for Weakly Supervised Semantic Segmentation", its triplet of CAMs.

    Example:
        >>> import torch
        >>> full, kept, hidden = torch.tensor([[[[[0.5, 0.5]]]], [[[[1.0, 0.0]]]], [[[[0.0, 0.5]]]]])
        >>> complementary_loss(full, kept, hidden, torch.tensor([0.5]))
        tensor(0.1250)
    """
    B, N, h, w = check_tensor("full", full, "BNhw")
    for name, cam in (("kept", kept), ("hidden", hidden)):
        check_tensor(name, cam, "BNhw", like=full, hint="The full images' CAMs' size.", B=B, N=N, h=h, w=w)
    check_tensor("share", share, "B", like=full, hint="One number an image.", B=B)
    check_choice("through", through, ("full", "all"))
    if through == "full":
        kept, hidden = kept.detach(), hidden.detach()
    full, kept, hidden = activation(full), activation(kept), activation(hidden)
    weight = share.detach().to(full.dtype)[:, None, None, None]
    distance = (weight * kept + (1 - weight) * hidden - full).abs()
    return distance.sum() / max(1, distance.numel())
