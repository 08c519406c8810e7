"""A CAM network at several scales, and the CAM inferred from all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from pixelss._checks import TAGS_HINT, check_choice, check_count, check_maps, check_scales, check_tensor
from pixelss._dtype import activation
from pixelss._maps import normalize_cam
from pixelss._resize import resize, scaled_side
from pixelss.cam.head import CAMOutput


def multi_scale_forward(
    model: Callable[[Tensor], CAMOutput],
    images: Tensor,
    *,
    scales: Sequence[float] = (0.5, 1.0, 2.0),
    flip: bool = False,
) -> tuple[CAMOutput, ...]:
    """Run `model` on the images at every scale; CAMs come back at the images' size.

    Args:
        model: maps images (B, 3, *, *) to a `CAMOutput`: student, teacher, wrapped or not.
        images: the normalised batch I_m; `model` sees its dtype and memory format.
        scales: factors of the image size; a side has `max(1, floor(H * scale + 1/2))` pixels.
        flip: run every scale on the mirrored batch too and return the means of both, maps mirrored back. Most
            published CAM inference does so; it costs twice the time.

    Shape:
        (B, C, H, W) -> one `CAMOutput` a scale: `features` native (B, D, h, w), `cam` raw, bilinearly resized to
        (B, N, H, W), `logits` (B, N).

    Raises:
        TypeError, ValueError: images of another rank, no scale or one that is not positive, `flip` that is no bool, a
            `model` that does not return a `CAMOutput`.

    Reference:
        Yoon 2021, "Exploring Pixel-level Self-supervision", section 3.

    Example:
        >>> from torch import nn
        >>> from pixelss import CAMHead
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8, padding=1), CAMHead(8, num_classes=4, dim=16))
        >>> small, middle, large = multi_scale_forward(model, torch.rand(2, 3, 64, 64))
        >>> middle.features.shape, large.features.shape, large.cam.shape
        (torch.Size([2, 16, 8, 8]), torch.Size([2, 16, 16, 16]), torch.Size([2, 4, 64, 64]))
    """
    _, _, H, W = check_tensor("images", images, "BCHW", hint="A single image? Pass images[None].")
    check_scales(scales)
    check_choice("flip", flip, (True, False))
    outputs = []
    for scale in scales:
        scaled = resize(images, (scaled_side(H, scale), scaled_side(W, scale))).to(images.dtype)
        output = output_of(model, scaled, images)
        if flip:
            mirrored = output_of(model, scaled.flip(-1), images)
            output = CAMOutput(
                features=(output.features + mirrored.features.flip(-1)) / 2,
                cam=(output.cam + mirrored.cam.flip(-1)) / 2,
                logits=(output.logits + mirrored.logits) / 2,
            )
        outputs.append(output._replace(cam=resize(output.cam, (H, W))))
    return tuple(outputs)


def output_of(model: Callable[[Tensor], CAMOutput], scaled: Tensor, images: Tensor) -> CAMOutput:
    """Return the model's output for `scaled`, in the memory format of `images`."""
    if images.is_contiguous(memory_format=torch.channels_last):
        scaled = scaled.contiguous(memory_format=torch.channels_last)
    output = model(scaled)
    if not isinstance(output, CAMOutput):
        raise TypeError(
            f"model must return a CAMOutput(features, cam, logits), but returned type {type(output).__name__}."
            " End it with a CAMHead, pass a trained classifier through classifier_cam, or wrap what it returns."
        )
    return output


def msinf_cam(cams: Sequence[Tensor], tags: Tensor, *, size: tuple[int, int] | None = None) -> Tensor:
    """Return the multi-scale inferred CAM: resize, ReLU, sum over scales, drop absent classes, normalise.

    Args:
        cams: raw CAMs, one tensor a scale; a flipped copy, flipped back, may be one more entry.
        tags: image-level labels, multi-hot of any dtype: present where > 0, so of probabilities pass tags > 0.5.
        size: (H, W) of the result; None where all CAMs share one size already.

    Shape:
        R tensors (B, N, *, *) and (B, N) -> (B, N, H, W) in [0, 1], zero for classes without a tag.

    Raises:
        TypeError, ValueError: no CAM, CAMs or tags that do not fit together, sizes that differ without `size`.

    Reference:
        Yoon 2021, "Exploring Pixel-level Self-supervision", section 3.2.

    Example:
        >>> cams = [torch.rand(1, 3, 4, 4), torch.rand(1, 3, 8, 8)]
        >>> msinf_cam(cams, torch.tensor([[1, 0, 1]]), size=(16, 16)).amax((-2, -1))
        tensor([[1., 0., 1.]])
    """
    if size is None:
        hint = "Give size where the CAMs differ in size."
        B, N, H, W = check_maps("cams", cams, "BNHW", shared="BNHW", hint=hint)
        size = H, W
    else:
        B, N, _, _ = check_maps("cams", cams, "BNHW", shared="BN")
        if not isinstance(size, Sequence) or len(size) != 2:
            raise ValueError(f"size must be a pair (H, W), but is {size}.")
        check_count("size[0]", size[0])
        check_count("size[1]", size[1])
    check_tensor("tags", tags, "BN", kind="any", like=cams[0], hint=TAGS_HINT, B=B, N=N)
    total = reduce(torch.add, (resize(activation(cam), size).relu() for cam in cams))
    return normalize_cam(total * (tags > 0)[:, :, None, None])
