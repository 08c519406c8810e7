"""Pseudo-labels: CAMs and tags to label maps, by a CRF or another refiner, with void where nothing is sure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from pixelss._checks import (
    TAGS_HINT,
    check_choice,
    check_images,
    check_multi_hot,
    check_no_class,
    check_nonnegative,
    check_number,
    check_tensor,
    outside_unit,
)
from pixelss._dtype import promote
from pixelss._maps import background_score, confident, label_probs, refill
from pixelss.refine.crf import dense_crf

Refiner = Callable[[Tensor, Tensor], Tensor]


def pseudo_labels(
    images: Tensor,
    cam: Tensor,
    tags: Tensor,
    *,
    threshold: float = 0.3,
    alpha: float | None = None,
    refine: Literal["label_crf", "crf"] | Refiner | None = "label_crf",
    void: tuple[float, float] | None = None,
    confidence: float | None = None,
    ignore_index: int = 255,
) -> Tensor:
    """Return the label maps of images whose tags and CAMs are known: what a segmentation network is trained on.

    One image at a time, the present classes and the background alone: their scores are the CAMs and a constant
    `threshold` (or `background_score`, given `alpha`), `refine` makes probabilities of them, and the largest is the
    label; ties go to the lowest class, the background first. An image without a tag is background.

    - "label_crf" takes the arg-max of the scores, believes it to 0.7 (`label_probs`), and runs `dense_crf` with
      IRN's kernels, (50, 5, 10) and (3, 3).
    - "crf" runs `dense_crf` with its defaults on the scores as probabilities.
    - A callable gets images (S, 3, H, W), one image S times, and scores (S, 1 + P, H, W), and returns probabilities of
      the scores' shape, without a gradient: a `DenseCRF` of your settings, for instance.
    - None takes the arg-max of the scores.

    With `void` = (low, high) two label maps are made, the background's score being high in one and low in the other,
    refined on one lattice: a class is believed where the first shows it, the background where both do, and the rest is
    void (`confident_mask`). With `confidence` a pixel is void whose label has a smaller refined probability.

    Args:
        images: RGB levels 0 to 255, of dtype uint8.
        cam: normalised CAMs in [0, 1] at the images' size, as `msinf_cam` gives; those of absent classes are not read.
        tags: image-level labels, multi-hot of any dtype; probabilities are refused.
        threshold: the background's score, in [0, 1]; `alpha` or `void` takes its place.
        alpha: power of `background_score`, the larger, the less background; not together with `void`.
        refine: "label_crf", "crf", a callable or None.
        void: None, or the background's scores (low, high), in [0, 1].
        confidence: None, or the smallest probability of a label that counts; it needs a `refine`.
        ignore_index: what void pixels hold; it must be no class.

    Shape:
        (B, 3, H, W), (B, N, H, W), (B, N) -> (B, H, W) int64 with 0 (background) to N and, for void, `ignore_index`.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype or device; CAMs outside [0, 1]; tags that are
            probabilities; a setting out of range; 255 classes or more with void at 255; a callable whose result has
            another shape or is not finite.

    Reference:
        Ahn 2019, "Weakly Supervised Learning of Instance Segmentation", its label CRF and its two thresholds; Ahn 2018,
        "Learning Pixel-level Semantic Affinity", its CRF on scores.

    Example:
        >>> images = torch.randint(0, 256, (2, 3, 24, 32), dtype=torch.uint8)
        >>> cam, tags = torch.rand(2, 20, 24, 32), torch.eye(20)[:2]
        >>> pseudo_labels(images, cam, tags, void=(0.05, 0.3)).shape
        torch.Size([2, 24, 32])
    """
    B, H, W = check_images(images)
    hint = "CAMs lie at the images' size: msinf_cam(cams, tags, size=images.shape[-2:])."
    _, N, _, _ = check_tensor("cam", cam, "BNHW", like=images, hint=hint, B=B, H=H, W=W)
    check_tensor("tags", tags, "BN", kind="any", like=cam, hint=TAGS_HINT, B=B, N=N)
    _check_settings(threshold, alpha, refine, void, confidence)
    check_no_class(ignore_index, N)
    check_multi_hot(tags)
    mask = torch.zeros(B, H, W, dtype=torch.int64, device=cam.device)
    with torch.no_grad():
        for b, present in enumerate(tags > 0):
            scores = promote(cam[b, present])  # (P, H, W)
            if len(scores) == 0:
                continue
            _check_cam(scores)
            levels = [threshold] if void is None else [void[1], void[0]]
            background = [scores.new_full((1, H, W), level) for level in levels]
            if alpha is not None:
                background = [background_score(scores[None], alpha=alpha)[0]]
            sets = torch.stack([torch.cat([one, scores]) for one in background])  # (S, 1 + P, H, W)
            probs = _refined(images[b].expand(len(sets), -1, -1, -1), sets, refine)
            sure, labels = probs.max(1)  # (S, H, W)
            labels = refill(labels, present)
            mask[b] = labels[0] if void is None else confident(labels[0], labels[1], ignore_index)
            if confidence is not None:
                decided = sure[0].where(labels[0] > 0, sure[-1])  # the background is the last set's
                mask[b] = mask[b].where(decided >= confidence, ignore_index)
    return mask


def _refined(images: Tensor, scores: Tensor, refine: str | Refiner | None) -> Tensor:
    """Return the probabilities (S, 1 + P, H, W) that `refine` makes of the scores."""
    if refine == "label_crf":
        trusted = label_probs(scores.argmax(1), scores.shape[1] - 1, gt_prob=0.7, ignore_index=-1)
        return dense_crf(images, trusted, bilateral=(50.0, 5.0, 10.0))
    if refine == "crf":
        return dense_crf(images, scores)
    if not callable(refine):
        return scores
    probs = refine(images, scores)
    S, K, H, W = scores.shape
    check_tensor("the result of refine", probs, "SKHW", like=scores, S=S, K=K, H=H, W=W)
    if not bool(probs.isfinite().all()):
        raise ValueError("the result of refine must be finite, but holds inf or NaN.")
    return promote(probs)


def _check_cam(cam: Tensor) -> None:
    """Raise where CAMs leave [0, 1] by more than rounding, as raw ones do."""
    outside = outside_unit(cam)
    if bool(outside.any()):
        value = cam[outside][0].item()
        raise ValueError(f"cam must lie in [0, 1], but holds {value:.4g}. Raw CAMs? Call msinf_cam or normalize_cam.")


def _check_settings(
    threshold: float,
    alpha: float | None,
    refine: str | Refiner | None,
    void: tuple[float, float] | None,
    confidence: float | None,
) -> None:
    check_number("threshold", threshold, low=0, high=1)
    if not callable(refine):
        check_choice("refine", refine, ("label_crf", "crf", None))
    if alpha is not None:
        check_nonnegative("alpha", alpha)
    if void is not None:
        if alpha is not None:
            raise ValueError(
                "void must be None where alpha is given: two alphas are confident_mask of two calls, alpha=4 and 32."
            )
        if not isinstance(void, (tuple, list)) or len(void) != 2:
            raise ValueError(f"void must be None or (low, high), but is {void!r}.")
        for name, value in zip(("low", "high"), void, strict=True):
            check_number(f"void {name}", value, low=0, high=1)
        if void[0] > void[1]:
            raise ValueError(f"void must be (low, high) with low <= high, but is {void!r}. Swap them.")
    if confidence is not None:
        check_number("confidence", confidence, low=0, high=1)
        if refine is None:
            raise ValueError("confidence must be None where refine is None: scores are no probabilities.")
