"""Class activation maps: the head that makes them, their normalisation, and inference at several scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pixelss._checks import TAGS_HINT, check_cams, check_count, check_number, check_tensor
from pixelss._resize import promote, resize


class CAMOutput(NamedTuple):
    """What a CAM network returns for a batch of images.

    Attributes:
        features: pixel features X after the ReLU, (B, D, h, w).
        cam: raw class activation maps A, (B, N, h, w).
        logits: global average of `cam`, (B, N), for a multi-label classification loss.
    """

    features: Tensor
    cam: Tensor
    logits: Tensor


class CAMHead(nn.Module):
    """The head of a CAM network: X = ReLU(conv1x1(input)), A = conv1x1(X), logits = GAP(A); no biases.

    Put it after any backbone: `nn.Sequential(backbone, CAMHead(backbone.out_channels, num_classes))`.

    Args:
        in_channels: channels C of the backbone's features.
        num_classes: foreground classes N.
        dim: channels D of the pixel features that the self-supervised losses see.

    Shape:
        (B, C, h, w) -> `CAMOutput` of (B, D, h, w), (B, N, h, w) and (B, N).

    Raises:
        TypeError, ValueError: an argument that is no positive int; an input of another rank or channel count.

    Reference:
        Yoon et al., "Exploring Pixel-level Self-supervision for Weakly Supervised Semantic Segmentation",
        section 4.2.

    Example:
        >>> head = CAMHead(512, num_classes=20)
        >>> out = head(torch.rand(2, 512, 24, 24))
        >>> out.features.shape, out.cam.shape, out.logits.shape
        (torch.Size([2, 256, 24, 24]), torch.Size([2, 20, 24, 24]), torch.Size([2, 20]))
    """

    def __init__(self, in_channels: int, num_classes: int, *, dim: int = 256) -> None:
        super().__init__()
        check_count("in_channels", in_channels)
        check_count("num_classes", num_classes)
        check_count("dim", dim)
        self.project = nn.Conv2d(in_channels, dim, 1, bias=False)
        self.classify = nn.Conv2d(dim, num_classes, 1, bias=False)
        nn.init.kaiming_normal_(self.project.weight, nonlinearity="relu")
        nn.init.normal_(self.classify.weight, std=0.01)  # logits near 0: large ones kill the features' ReLU at once

    def forward(self, x: Tensor) -> CAMOutput:
        """Map backbone features (B, C, h, w) to features, raw CAMs and logits."""
        hint = "in_channels must be the backbone's number of output channels."
        check_tensor("x", x, "BCHW", like=self.project.weight, hint=hint, C=self.project.in_channels)
        features = self.project(x).relu()
        cam = self.classify(features)
        return CAMOutput(features, cam, promote(cam).mean((-2, -1)))


def normalize_cam(cam: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Return `relu(cam)` divided by its maximum over the pixels, per image and class.

    The maximum of a live map is then exactly 1; a map whose maximum is not above `eps` becomes all zeros. The
    gradient flows through the maximum too. A non-finite value counts as no activation.

    Args:
        cam: raw class activation maps.
        eps: the largest maximum that counts as no activation at all.

    Shape:
        (B, N, H, W) -> (B, N, H, W) in [0, 1]; float32 for half-precision input.

    Raises:
        TypeError, ValueError: `cam` is no floating tensor of four dimensions, `eps` is negative.

    Reference:
        Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016.

    Example:
        >>> normalize_cam(torch.tensor([[[[-1.0, 2.0, 4.0]]]]))
        tensor([[[[0.0000, 0.5000, 1.0000]]]])
    """
    check_tensor("cam", cam, "BNHW")
    check_number("eps", eps, low=0, high=float("inf"))
    cam = promote(cam).nan_to_num(0, 0, 0).relu()
    peak = cam.amax((-2, -1), keepdim=True)
    alive = peak > eps
    return torch.where(alive, cam / torch.where(alive, peak, 1), 0)


def msinf_cam(cams: Sequence[Tensor], labels: Tensor, *, size: tuple[int, int] | None = None) -> Tensor:
    """Return the multi-scale inferred CAM: resize, ReLU, sum over scales, drop absent classes, normalise.

    Args:
        cams: raw CAMs, one tensor a scale; a flipped copy, flipped back, is one more entry.
        labels: image tags, multi-hot of any dtype.
        size: (H, W) of the result; None where all CAMs share one size already.

    Shape:
        R tensors (B, N, *, *) and (B, N) -> (B, N, H, W) in [0, 1], zero for classes without a tag.

    Raises:
        TypeError, ValueError: no CAM, CAMs or labels that do not fit together, sizes that differ without `size`.

    Reference:
        Yoon et al., "Exploring Pixel-level Self-supervision for Weakly Supervised Semantic Segmentation",
        section 3.2.

    Example:
        >>> cams = [torch.rand(1, 3, 4, 4), torch.rand(1, 3, 8, 8)]
        >>> msinf_cam(cams, torch.tensor([[1, 0, 1]]), size=(16, 16)).amax((-2, -1))
        tensor([[1., 0., 1.]])
    """
    if size is None:
        first = check_cams("cams", cams, shared="BNHW", hint="Give size where the CAMs differ in size.")
        size = (first.shape[2], first.shape[3])
    else:
        first = check_cams("cams", cams, shared="BN")
        if not isinstance(size, Sequence) or len(size) != 2:
            raise ValueError(f"size must be a pair (H, W), but is {size}.")
        check_count("size[0]", size[0])
        check_count("size[1]", size[1])
    B, N, _, _ = first.shape
    check_tensor("labels", labels, "BN", kind="any", like=first, hint=TAGS_HINT, B=B, N=N)
    total = torch.stack([resize(cam.nan_to_num(0, 0, 0), size).relu() for cam in cams]).sum(0)
    return normalize_cam(total * (labels > 0)[:, :, None, None])


def multi_scale_forward(
    model: Callable[[Tensor], CAMOutput], images: Tensor, *, scales: Sequence[float] = (0.5, 1.0, 2.0)
) -> tuple[CAMOutput, ...]:
    """Run `model` on the images at every scale; CAMs come back at the images' size.

    Args:
        model: maps images (B, 3, *, *) to a `CAMOutput`: student, teacher, wrapped or not.
        images: the normalised batch I_m; `model` sees its dtype and memory format.
        scales: factors of the image size; a side has `max(1, floor(H * scale + 1/2))` pixels.

    Shape:
        (B, C, H, W) -> one `CAMOutput` a scale: `features` native (B, D, h, w), `cam` raw, bilinearly resized to
        (B, N, H, W), `logits` (B, N).

    Raises:
        TypeError, ValueError: images of another rank, no scale or one that is not positive, a `model` that
            does not return a `CAMOutput`.

    Reference:
        Yoon et al., "Exploring Pixel-level Self-supervision for Weakly Supervised Semantic Segmentation",
        section 3.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8, padding=1), CAMHead(8, num_classes=4, dim=16))
        >>> small, middle, large = multi_scale_forward(model, torch.rand(2, 3, 64, 64))
        >>> middle.features.shape, large.features.shape, large.cam.shape
        (torch.Size([2, 16, 8, 8]), torch.Size([2, 16, 16, 16]), torch.Size([2, 4, 64, 64]))
    """
    _, _, H, W = check_tensor("images", images, "BCHW", hint="A single image? Pass images[None].")
    if not isinstance(scales, Sequence) or len(scales) == 0:
        raise ValueError(f"scales must be a sequence of one factor or more, but is {scales}.")
    outputs = []
    for i, scale in enumerate(scales):
        check_number(f"scales[{i}]", scale, low=1e-3, high=1e3)
        size = max(1, int(H * scale + 0.5)), max(1, int(W * scale + 0.5))
        scaled = resize(images, size).to(images.dtype)
        if images.is_contiguous(memory_format=torch.channels_last):
            scaled = scaled.contiguous(memory_format=torch.channels_last)
        output = model(scaled)
        if not isinstance(output, CAMOutput):
            raise TypeError(
                f"model must return a CAMOutput(features, cam, logits), but returned type {type(output).__name__}."
                " End it with a CAMHead, or wrap what it returns."
            )
        outputs.append(output._replace(cam=resize(output.cam, (H, W))))
    return tuple(outputs)
