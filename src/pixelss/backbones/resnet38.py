"""ResNet38 (wide, 38 layers, stride 8), the backbone that weakly supervised segmentation papers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.functional import relu

from pixelss._checks import check_tensor


class _Residual(nn.Module):
    """Pre-activation block of two 3x3 convolutions; returns (output, activated input)."""

    def __init__(
        self, channels: int, mid: int, out: int, *, stride: int = 1, dilations: tuple[int, int] = (1, 1)
    ) -> None:
        super().__init__()
        first, second = dilations
        self.bn_branch2a = nn.BatchNorm2d(channels)
        self.conv_branch2a = nn.Conv2d(channels, mid, 3, stride, first, first, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(mid)
        self.conv_branch2b1 = nn.Conv2d(mid, out, 3, 1, second, second, bias=False)
        self.conv_branch1: nn.Conv2d | None = None
        if channels != out or stride != 1:
            self.conv_branch1 = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r = relu(self.bn_branch2a(x))
        shortcut = x if self.conv_branch1 is None else self.conv_branch1(r)
        branch = relu(self.bn_branch2b1(self.conv_branch2a(r)))
        return shortcut + self.conv_branch2b1(branch), r


class _Bottleneck(nn.Module):
    """Pre-activation block of a 1x1, a dilated 3x3 and a 1x1 convolution; returns (output, activated input)."""

    def __init__(self, channels: int, out: int, *, dropout: float) -> None:
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(channels)
        self.conv_branch2a = nn.Conv2d(channels, out // 4, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(out // 4)
        self.conv_branch2b1 = nn.Conv2d(out // 4, out // 2, 3, padding=4, dilation=4, bias=False)
        self.bn_branch2b2 = nn.BatchNorm2d(out // 2)
        self.conv_branch2b2 = nn.Conv2d(out // 2, out, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(channels, out, 1, bias=False)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r = relu(self.bn_branch2a(x))
        branch = self.dropout(relu(self.bn_branch2b1(self.conv_branch2a(r))))
        branch = self.dropout(relu(self.bn_branch2b2(self.conv_branch2b1(branch))))
        return self.conv_branch1(r) + self.conv_branch2b2(branch), r


def _stage(x: Tensor, *blocks: nn.Module) -> tuple[Tensor, Tensor]:
    """Run the blocks in turn; returns (output, activated input of the first block)."""
    x, activated = blocks[0](x)
    for block in blocks[1:]:
        x, _ = block(x)
    return x, activated


class ResNet38(nn.Module):
    """ResNet38 without a classifier, under the tensor names of the published weights.

    A fresh network has He-initialised convolutions and norms that train. The published recipes keep every
    norm and the stem as ImageNet left them: `freeze_norm(model)`, `model.freeze_stem()`.

    Shape:
        images (B, 3, H, W), RGB / 255 normalised by mean (.485, .456, .406) and deviation (.229, .224, .225)
        -> features (B, 4096, ceil(H / 8), ceil(W / 8)), which are not negative.

    Reference:
        Wu 2016, "Wider or Deeper", with the dilations of
        Ahn 2018, "Learning Pixel-level Semantic Affinity".

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     features = ResNet38()(torch.zeros(2, 3, 65, 96))
        >>> features.shape
        torch.Size([2, 4096, 9, 12])
    """

    if TYPE_CHECKING:  # nn.Module's own call says Any
        __call__: Callable[..., Tensor]

    out_channels = 4096
    stride = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv1a = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.b2 = _Residual(64, 128, 128, stride=2)
        self.b2_1 = _Residual(128, 128, 128)
        self.b2_2 = _Residual(128, 128, 128)
        self.b3 = _Residual(128, 256, 256, stride=2)
        self.b3_1 = _Residual(256, 256, 256)
        self.b3_2 = _Residual(256, 256, 256)
        self.b4 = _Residual(256, 512, 512, stride=2)
        self.b4_1 = _Residual(512, 512, 512)
        self.b4_2 = _Residual(512, 512, 512)
        self.b4_3 = _Residual(512, 512, 512)
        self.b4_4 = _Residual(512, 512, 512)
        self.b4_5 = _Residual(512, 512, 512)
        self.b5 = _Residual(512, 512, 1024, dilations=(1, 2))
        self.b5_1 = _Residual(1024, 512, 1024, dilations=(2, 2))
        self.b5_2 = _Residual(1024, 512, 1024, dilations=(2, 2))
        self.b6 = _Bottleneck(1024, 2048, dropout=0.3)
        self.b7 = _Bottleneck(2048, 4096, dropout=0.5)
        self.bn7 = nn.BatchNorm2d(4096)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the features (B, 4096, h, w) of images (B, 3, H, W)."""
        return self.forward_stages(x)[-1]

    def forward_taps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return conv4 (B, 512, h, w), conv5 (B, 1024, h, w) and conv6 (B, 4096, h, w), the affinity head's input."""
        return self.forward_stages(x)[2:]

    def forward_stages(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the activated output of every width.

        Args:
            x: images.

        Shape:
            (B, 3, H, W) -> channels 128, 256, 512, 1024, 4096 at strides 2, 4, 8, 8, 8; the last three are the taps.

        Raises:
            TypeError: `x` is not a floating tensor.
            ValueError: `x` is not (B, 3, H, W).
        """
        check_tensor("x", x, "BCHW", C=3)
        x, _ = _stage(self.conv1a(x), self.b2, self.b2_1, self.b2_2)
        x, conv2 = _stage(x, self.b3, self.b3_1, self.b3_2)
        x, conv3 = _stage(x, self.b4, self.b4_1, self.b4_2, self.b4_3, self.b4_4, self.b4_5)
        x, conv4 = _stage(x, self.b5, self.b5_1, self.b5_2)
        x, conv5 = _stage(x, self.b6, self.b7)
        return conv2, conv3, conv4, conv5, relu(self.bn7(x))

    def freeze_stem(self) -> ResNet38:
        """Stop the training of the convolutions of conv1a and b2, b2_1, b2_2 (820,928 weights); returns self."""
        for stem in (self.conv1a, self.b2, self.b2_1, self.b2_2):
            for module in stem.modules():
                if isinstance(module, nn.Conv2d):
                    module.requires_grad_(False)
        return self
