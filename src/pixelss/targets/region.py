"""Class region mask (Yoon Eq. 1, Yoon Eq. 2): the class of every pixel, by the teacher's CAM and the image's tags."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pixelss._checks import TAGS_HINT, check_number, check_tensor
from pixelss._dtype import activation


def class_region_mask(cam: Tensor, tags: Tensor, *, threshold: float = 0.2) -> Tensor:
    """Return the mask of Yoon Eq. 1, Yoon Eq. 2: the strongest present class where it exceeds `threshold`, else 0.

    Absent classes are removed before the arg-max; ties go to the lowest index. Every pixel has one label, so the
    regions partition the image. A non-finite value counts as no activation.

    Args:
        cam: normalised CAMs in [0, 1], as `msinf_cam` gives.
        tags: image-level labels, multi-hot of any dtype: present where > 0, so of probabilities pass tags > 0.5.
        threshold: foreground where the activation is greater, in [0, 1].

    Shape:
        (B, N, H, W), (B, N) -> (B, H, W) int64 with values 0 (background) to N.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; `threshold` out of range.

    Reference:
        Yoon 2021, "Exploring Pixel-level Self-supervision", Eq. 1, Eq. 2.

    Example:
        >>> cam = torch.tensor([[[[0.9, 0.1]], [[0.3, 0.8]], [[1.0, 1.0]]]])
        >>> class_region_mask(cam, torch.tensor([[1, 1, 0]]))
        tensor([[[1, 2]]])
    """
    B, N, _, _ = check_tensor("cam", cam, "BNHW")
    check_tensor("tags", tags, "BN", kind="any", like=cam, hint=TAGS_HINT, B=B, N=N)
    check_number("threshold", threshold, low=0, high=1)
    present = (tags > 0)[:, :, None, None]  # (B, N, 1, 1)
    strongest, index = activation(cam).where(present, -1).max(1)
    return torch.where(strongest > threshold, index + 1, 0)


class ClassRegionMask(nn.Module):
    """`class_region_mask` with its threshold as a setting.

    Args:
        threshold: foreground where the normalised CAM is greater, in [0, 1].

    Example:
        >>> region = ClassRegionMask(threshold=0.25)
        >>> region(torch.rand(2, 20, 8, 8), torch.ones(2, 20)).shape
        torch.Size([2, 8, 8])
    """

    if TYPE_CHECKING:  # nn.Module's own call says Any
        __call__: Callable[..., Tensor]

    def __init__(self, threshold: float = 0.2) -> None:
        super().__init__()
        check_number("threshold", threshold, low=0, high=1)
        self.threshold = threshold

    def forward(self, cam: Tensor, tags: Tensor) -> Tensor:
        """Return the class region mask of normalised CAMs."""
        return class_region_mask(cam, tags, threshold=self.threshold)

    def extra_repr(self) -> str:
        """Return the settings for the module's repr."""
        return f"threshold={self.threshold}"
