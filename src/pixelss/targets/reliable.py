"""Reliable regions (RRM): the pixels on which the CAM and two CRFs agree, and are sure."""

from __future__ import annotations

import torch
from torch import Tensor

from pixelss._checks import TAGS_HINT, check_no_class, check_nonnegative, check_number, check_tensor
from pixelss._dtype import activation, promote
from pixelss._maps import background_score


def reliable_mask(
    cam: Tensor,
    low_probs: Tensor,
    high_probs: Tensor,
    tags: Tensor,
    *,
    alpha: float = 32.0,
    floor: float = 0.1,
    share: float = 0.6,
    background: float = 0.8,
    confidence: float = 0.8,
    ignore_index: int = 255,
) -> Tensor:
    """Return the classes of the pixels that are sure three times over, void elsewhere.

    The class is that of the low CRF where it is foreground, background where the high CRF says so, else unknown. It
    stays where both agree that it is sure:

    - the CAM: the arg-max of [(1 - max cam)^alpha, cam] over the present classes gives each pixel a class and a value.
      It is sure where the value exceeds the one at `share` of its class's, sorted, those above `floor` alone; the
      background where it exceeds `background`.
    - the CRFs: the largest of the high CRF's background and of the low CRF's present classes is `confidence` or more.

    Args:
        cam: normalised CAMs, zero for absent classes.
        low_probs: the CRF's probabilities from a background score with a low alpha (4): reliable foreground.
        high_probs: the same with a high alpha (32): reliable background.
        tags: image-level labels, multi-hot of any dtype.
        alpha: of the background score beside the CAM.
        floor: values below it are left out of the sorting.
        share: of the sorted values that is not sure.
        background: what the background score must exceed.
        confidence: what the CRFs' probability must reach.
        ignore_index: void in the result; it must be no class.

    Shape:
        (B, N, H, W), (B, K, H, W), (B, K, H, W), (B, N) -> (B, H, W) int64.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; a setting out of range.

    Reference:
        Zhang 2020, "Reliability Does Matter", its reliable regions, as its code finds them.

    Example:
        >>> cam = torch.tensor([[[[1.0, 0.9, 0.2, 0.0]]]])
        >>> probs = torch.tensor([[[[0.0, 0.1, 0.6, 1.0]], [[1.0, 0.9, 0.4, 0.0]]]])
        >>> reliable_mask(cam, probs, probs, torch.ones(1, 1), share=0.0)
        tensor([[[  1,   1, 255,   0]]])
    """
    B, N, H, W = check_tensor("cam", cam, "BNHW")
    for name, probs in (("low_probs", low_probs), ("high_probs", high_probs)):
        check_tensor(name, probs, "BKHW", like=cam, hint="Background first.", B=B, K=N + 1, H=H, W=W)
    check_tensor("tags", tags, "BN", kind="any", like=cam, hint=TAGS_HINT, B=B, N=N)
    check_nonnegative("alpha", alpha)
    shares = {"floor": floor, "share": share, "background": background, "confidence": confidence}
    for name, setting in shares.items():
        check_number(name, setting, low=0, high=1)
    check_no_class(ignore_index, N)
    present = torch.cat([torch.ones_like(tags[:, :1]), tags], 1) > 0
    absent = ~present[:, :, None, None]
    low, high = (promote(probs).masked_fill(absent, -1) for probs in (low_probs, high_probs))
    label = low.argmax(1)
    label = label.where(label > 0, ignore_index).where(high.argmax(1) > 0, 0)

    cam = activation(cam)
    map_ = torch.cat([background_score(cam, alpha=alpha), cam], 1).masked_fill(absent, -1)  # (B, K, H, W)
    value, found = map_.max(1)  # (B, H, W) each
    limit = torch.full_like(map_[:, :, 0, 0], torch.inf)  # (B, K)
    limit[:, 0] = background
    for n in range(1, N + 1):
        own = value.where((found == n) & (value > floor), torch.inf).flatten(1).sort(1).values
        count = own.isfinite().sum(1)
        entry = (share * count).long().clamp(max=own.shape[1] - 1)  # where there is none, the limit is infinite
        limit[:, n] = own.gather(1, entry[:, None])[:, 0]
    sure_cam = value > limit.gather(1, found.flatten(1)).view_as(value)
    sure_crf = torch.cat([high[:, :1], low[:, 1:]], 1).amax(1) >= confidence
    return label.where(sure_cam & sure_crf, ignore_index)
