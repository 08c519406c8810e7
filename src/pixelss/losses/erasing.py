"""Class-specific erasing (OC-CSE): with one class erased, a fixed classifier finds the others and that one no more."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from pixelss._checks import TAGS_HINT, check_tensor
from pixelss._dtype import promote


def class_erasing_loss(logits: Tensor, tags: Tensor, chosen: Tensor) -> Tensor:
    """Return the binary cross-entropy of a classifier on erased images against the tags without the erased class.

    An image without a tag has nothing to erase and adds 0.

    Args:
        logits: of a fixed classifier on images * (1 - mask), the mask that of `erasing_mask`.
        tags: image-level labels, multi-hot of any dtype.
        chosen: the class that was erased, one-hot of any dtype, from `choose_class`.

    Shape:
        (B, N), (B, N), (B, N) -> scalar: the mean over all B N entries; float32 for half precision.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device.

    Reference:
        Kweon 2021, "Unlocking the Potential of Ordinary Classifier", its class-specific erasing.

    Example:
        >>> import torch
        >>> tags, chosen = torch.tensor([[1, 1, 0]]), torch.tensor([[0, 1, 0]])
        >>> class_erasing_loss(torch.tensor([[9.0, -9.0, -9.0]]), tags, chosen) < 0.001
        tensor(True)
    """
    B, N = check_tensor("logits", logits, "BN")
    check_tensor("tags", tags, "BN", kind="any", like=logits, hint=TAGS_HINT, B=B, N=N)
    check_tensor("chosen", chosen, "BN", kind="any", like=logits, hint="One-hot, as the tags.", B=B, N=N)
    logits, present = promote(logits), tags > 0
    remaining = (present & (chosen <= 0)).to(logits.dtype)
    loss = binary_cross_entropy_with_logits(logits, remaining, reduction="none")
    return loss.where(present.any(1, keepdim=True), 0).sum() / max(1, loss.numel())
