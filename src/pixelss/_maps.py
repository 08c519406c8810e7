"""Maps that several rooms need: normalised CAMs, the background beside them, label maps and their probabilities."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pixelss._checks import check_choice, check_count, check_nonnegative, check_number, check_tensor
from pixelss._dtype import activation
from pixelss._labels import class_maps, valid_pixels


def normalize_cam(cam: Tensor, *, kind: Literal["max", "minmax"] = "max", eps: float = 1e-5) -> Tensor:
    """Return `relu(cam)` divided by its maximum over the pixels, per image and class.

    The maximum of a live map is then exactly 1; a map whose maximum is not above `eps` becomes all zeros. The
    gradient flows through the maximum too. A non-finite value counts as no activation.

    Args:
        cam: raw class activation maps.
        kind: "max", or "minmax" for relu(relu(A) - min - eps) / (max - min + eps), min and max those of relu(A): SEAM's
            and CPN's. Its maximum is a little below 1, and a constant map becomes zeros.
        eps: the largest maximum that counts as no activation at all; with "minmax", what keeps the quotient finite.

    Shape:
        (B, N, H, W) -> (B, N, H, W) in [0, 1]; float32 for half-precision input.

    Raises:
        TypeError, ValueError: `cam` is no floating tensor of four dimensions, `kind` is unknown, `eps` is
            negative, or zero with "minmax".

    Reference:
        Zhou 2016, "Learning Deep Features for Discriminative Localization"; "minmax" is that of
        Wang 2020, "Self-supervised Equivariant Attention Mechanism".

    Example:
        >>> normalize_cam(torch.tensor([[[[-1.0, 2.0, 4.0]]]]))
        tensor([[[[0.0000, 0.5000, 1.0000]]]])
        >>> normalize_cam(torch.tensor([[[[1.0, 2.0, 5.0]]]]), kind="minmax")
        tensor([[[[0.0000, 0.2500, 1.0000]]]])
    """
    check_tensor("cam", cam, "BNHW")
    check_choice("kind", kind, ("max", "minmax"))
    smallest = torch.finfo(torch.float32).tiny if kind == "minmax" else 0
    check_number("eps", eps, low=smallest, high=float("inf"))
    cam = activation(cam).relu()
    peak = cam.amax((-2, -1), keepdim=True)
    if kind == "minmax":
        low = cam.amin((-2, -1), keepdim=True)
        return (cam - low - eps).relu() / (peak - low + eps)
    alive = peak > eps
    return torch.where(alive, cam / torch.where(alive, peak, 1), 0)


def background_score(cam: Tensor, *, alpha: float) -> Tensor:
    """Return the background's score (1 - max over the classes)^alpha; a non-finite CAM value is no activation.

    Args:
        cam: normalised CAMs in [0, 1], foreground classes alone; of raw ones, which are not refused, every value above
            1 counts as 1: call `normalize_cam` first.
        alpha: the larger, the less background.

    Shape:
        (B, N, H, W) -> (B, 1, H, W).

    Raises:
        TypeError, ValueError: CAMs of another rank or dtype kind; `alpha` out of range.

    Reference:
        Ahn 2018, "Learning Pixel-level Semantic Affinity", Eq. 2.

    Example:
        >>> cam = torch.tensor([0.5, 0.25]).view(1, 2, 1, 1)
        >>> background_score(cam, alpha=2).item()
        0.25
    """
    check_tensor("cam", cam, "BNHW")
    check_nonnegative("alpha", alpha)
    strongest = activation(cam).amax(1, keepdim=True)
    return (1 - strongest.clamp(0, 1)) ** alpha


def confident(foreground: Tensor, background: Tensor, ignore_index: int) -> Tensor:
    """Return the class where `foreground` > 0, 0 where both label maps are 0, else `ignore_index`; int64."""
    foreground, background = foreground.long(), background.long()  # first: uint8 holds no -1
    agreed = foreground.where((foreground == 0) & (background == 0), ignore_index)
    return foreground.where(foreground > 0, agreed)


def refill(labels: Tensor, present: Tensor) -> Tensor:
    """Return label maps over [background, present classes] as label maps over all classes.

    Args:
        labels: 0 the background, i the i-th present class.
        present: where a class is present, (N,) bool.
    """
    classes = 1 + present.nonzero().flatten()
    return torch.cat([classes.new_zeros(1), classes])[labels]


def label_probs(mask: Tensor, num_classes: int, *, gt_prob: float = 0.7, ignore_index: int = 255) -> Tensor:
    """Return probabilities that trust a label map: `gt_prob` at its class, the rest shared by the other classes.

    Uniform at `ignore_index` and at values outside 0..N.

    Args:
        mask: class of every pixel, 0 the background.
        num_classes: N, the foreground classes.
        gt_prob: confidence in the mask.
        ignore_index: void value, even where it lies in 0..N.

    Shape:
        (B, H, W) -> (B, N + 1, H, W), float32.

    Raises:
        TypeError, ValueError: a mask of another rank or dtype kind; a setting out of range.

    Reference:
        Kraehenbuehl 2011, "Efficient Inference in Fully Connected CRFs".

    Example:
        >>> label_probs(torch.tensor([[[0, 2, 255]]]), 3, gt_prob=0.7)[0, :, 0].mT
        tensor([[0.7000, 0.1000, 0.1000, 0.1000],
                [0.1000, 0.1000, 0.7000, 0.1000],
                [0.2500, 0.2500, 0.2500, 0.2500]])
    """
    check_tensor("mask", mask, "BHW", kind="integer")
    check_count("num_classes", num_classes)
    check_number("gt_prob", gt_prob, low=0, high=1)
    K = num_classes + 1
    label, valid = valid_pixels(mask, K, ignore_index)
    probs = torch.where(class_maps(label, K), gt_prob, (1 - gt_prob) / num_classes)
    return probs.where(valid[:, None], 1 / K)


def strongest_alone(cam: Tensor) -> Tensor:
    """Return (B, K, h, w): the background 1 - max_n cam_n, and of (B, N, h, w) what equals the pixel's maximum."""
    strongest = cam.amax(1, keepdim=True)
    return torch.cat([1 - strongest, cam.where(cam >= strongest, 0)], 1)
