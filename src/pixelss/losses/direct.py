"""Direct self-supervision, the ablation of Yoon Table 2: cross-entropy of CAMs against the region mask."""

from __future__ import annotations

import torch
from torch import Tensor

from pixelss._checks import TAGS_HINT, check_tensor
from pixelss._dtype import activation
from pixelss._labels import class_maps, mean_over, valid_pixels


def direct_loss(cam: Tensor, mask: Tensor, tags: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Return the direct self-supervision of Yoon Table 2: cross-entropy of the student's CAMs against the mask.

    Per pixel the binary cross-entropy of CAM_k against [mask = k], averaged over every (present pair, valid
    pixel). The CAM is clamped to [eps, 1 - eps] of its dtype: its peak is exactly 1, where the logarithm
    would be infinite. A clamped value has no gradient of its own.

    Args:
        cam: the student's normalised CAMs in [0, 1]; a non-finite value counts as no activation.
        mask: class region mask in 0..N; `ignore_index` and values out of range are void.
        tags: image-level labels, multi-hot of any dtype: present where > 0, so of probabilities pass tags > 0.5.
        ignore_index: the mask's void value.

    Shape:
        (B, N, H, W), (B, H, W), (B, N) -> scalar; zero on the graph where no present pair or valid pixel is left.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device.

    Reference:
        Yoon 2021, "Exploring Pixel-level Self-supervision", Table 2, Exp. 1; the paper gives no formula,
        this is our reading.

    Example:
        >>> cam = torch.tensor([[[[0.5, 0.5]]]])
        >>> direct_loss(cam, torch.tensor([[[1, 255]]]), torch.tensor([[1]]))
        tensor(0.6931)
    """
    B, N, H, W = check_tensor("cam", cam, "BNHW")
    check_tensor("mask", mask, "BHW", kind="integer", like=cam, B=B, H=H, W=W)
    check_tensor("tags", tags, "BN", kind="any", like=cam, hint=TAGS_HINT, B=B, N=N)
    cam = activation(cam)
    eps = torch.finfo(cam.dtype).eps
    cam = cam.clamp(eps, 1 - eps)
    label, valid = valid_pixels(mask, N + 1, ignore_index)
    counted = (tags > 0)[:, :, None, None] & valid[:, None]  # (B, N, H, W): present pairs at valid pixels
    loss = -torch.where(class_maps(label, N + 1)[:, 1:], cam.log(), (1 - cam).log())
    return mean_over(loss, counted)
