"""Class region mask (Eq. 1-2): which class every pixel belongs to, by the teacher's CAM and the image's tags."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pixelss._checks import TAGS_HINT, check_integer, check_number, check_tensor
from pixelss._resize import promote


def class_region_mask(cam: Tensor, labels: Tensor, *, threshold: float = 0.2) -> Tensor:
    """Return the label map of Eq. 1-2: the strongest present class where its CAM exceeds `threshold`, else 0.

    Absent classes are removed before the arg-max; ties go to the lowest index. Every pixel has one label, so the
    regions partition the image. A non-finite value counts as no activation.

    Args:
        cam: normalised CAMs in [0, 1], as `msinf_cam` gives.
        labels: image tags, multi-hot of any dtype.
        threshold: foreground where the activation is greater, in [0, 1].

    Shape:
        (B, N, H, W), (B, N) -> (B, H, W) int64 with values 0 (background) to N.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; `threshold` out of range.

    Reference:
        Yoon et al., "Exploring Pixel-level Self-supervision for Weakly Supervised Semantic Segmentation",
        Eq. 1-2.

    Example:
        >>> cam = torch.tensor([[[[0.9, 0.1]], [[0.3, 0.8]], [[1.0, 1.0]]]])
        >>> class_region_mask(cam, torch.tensor([[1, 1, 0]]))
        tensor([[[1, 2]]])
    """
    B, N, _, _ = check_tensor("cam", cam, "BNHW")
    check_tensor("labels", labels, "BN", kind="any", like=cam, hint=TAGS_HINT, B=B, N=N)
    check_number("threshold", threshold, low=0, high=1)
    cam = promote(cam).nan_to_num(0, 0, 0)
    activation, index = cam.where((labels > 0)[:, :, None, None], -1).max(1)
    return torch.where(activation > threshold, index + 1, 0)


class ClassRegionMask(nn.Module):
    """`class_region_mask` with its threshold as a setting.

    Args:
        threshold: foreground where the normalised CAM is greater, in [0, 1].

    Shape:
        (B, N, H, W), (B, N) -> (B, H, W) int64.

    Raises:
        TypeError, ValueError: as `class_region_mask`.

    Reference:
        Yoon et al., "Exploring Pixel-level Self-supervision for Weakly Supervised Semantic Segmentation",
        Eq. 1-2.

    Example:
        >>> region = ClassRegionMask(threshold=0.25)
        >>> region(torch.rand(2, 20, 8, 8), torch.ones(2, 20)).shape
        torch.Size([2, 8, 8])
    """

    def __init__(self, threshold: float = 0.2) -> None:
        super().__init__()
        check_number("threshold", threshold, low=0, high=1)
        self.threshold = threshold

    def forward(self, cam: Tensor, labels: Tensor) -> Tensor:
        """Return the class region mask of normalised CAMs."""
        return class_region_mask(cam, labels, threshold=self.threshold)

    def extra_repr(self) -> str:
        """Return the settings for the module's repr."""
        return f"threshold={self.threshold}"


def direct_loss(cam: Tensor, mask: Tensor, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Return the direct self-supervision of Table 2: cross-entropy of the student's CAMs against the mask.

    Per pixel the binary cross-entropy of CAM_k against [mask = k], averaged over every (present pair, valid
    pixel). The CAM is clamped to [eps, 1 - eps] of its dtype: its peak is exactly 1, where the logarithm
    would be infinite. A clamped value has no gradient of its own.

    Args:
        cam: the student's normalised CAMs in [0, 1]; a non-finite value counts as no activation.
        mask: class region mask in 0..N; `ignore_index` and values out of range are void.
        labels: image tags, multi-hot of any dtype.
        ignore_index: the mask's void value.

    Shape:
        (B, N, H, W), (B, H, W), (B, N) -> scalar; zero on the graph where no present pair or valid pixel is left.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device.

    Reference:
        Yoon et al., "Exploring Pixel-level Self-supervision for Weakly Supervised Semantic Segmentation",
        Table 2, Exp. 1; the paper gives no formula, this is our reading.

    Example:
        >>> cam = torch.tensor([[[[0.5, 0.5]]]])
        >>> direct_loss(cam, torch.tensor([[[1, 255]]]), torch.tensor([[1]]))
        tensor(0.6931)
    """
    B, N, H, W = check_tensor("cam", cam, "BNHW")
    check_tensor("mask", mask, "BHW", kind="integer", like=cam, B=B, H=H, W=W)
    check_tensor("labels", labels, "BN", kind="any", like=cam, hint=TAGS_HINT, B=B, N=N)
    check_integer("ignore_index", ignore_index)
    cam, mask = promote(cam).nan_to_num(0, 0, 0), mask.long()
    eps = torch.finfo(cam.dtype).eps
    cam = cam.clamp(eps, 1 - eps)
    valid = (mask != ignore_index) & (mask >= 0) & (mask <= N)
    counts = (labels > 0)[:, :, None, None] & valid[:, None]
    classes = torch.arange(1, N + 1, device=cam.device)[:, None, None]
    loss = -torch.where(mask[:, None] == classes, cam.log(), (1 - cam).log())
    return loss.where(counts, 0).sum() / counts.sum().clamp(min=1)
