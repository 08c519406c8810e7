"""The head of a CAM network: pixel features, class activation maps, logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from pixelss._checks import check_count, check_tensor
from pixelss._dtype import promote


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
        Yoon 2021, "Exploring Pixel-level Self-supervision", section 4.2.

    Example:
        >>> import torch
        >>> head = CAMHead(512, num_classes=20)
        >>> out = head(torch.rand(2, 512, 24, 24))
        >>> out.features.shape, out.cam.shape, out.logits.shape
        (torch.Size([2, 256, 24, 24]), torch.Size([2, 20, 24, 24]), torch.Size([2, 20]))
    """

    if TYPE_CHECKING:  # nn.Module's own call says Any
        __call__: Callable[..., CAMOutput]

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
