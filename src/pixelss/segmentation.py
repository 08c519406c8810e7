"""The segmentation network trained on the final pseudo-labels: its head, and inference at several scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from pixelss._checks import check_choice, check_count, check_scales, check_tensor
from pixelss._dtype import promote
from pixelss._resize import resize, scaled_side


@torch.no_grad()
def multi_scale_inference(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    scales: Sequence[float] = (0.5, 0.75, 1.0, 1.25, 1.5),
    flip: bool = True,
    tile: int = 1024,
) -> Tensor:
    """Return the mean of a network's logits over scales and flips, at the images' size, in bounded memory.

    `model` never sees more than (B, C, tile, tile), one scale and one flip at a time. A side that is larger when scaled
    is cut into windows of at most `tile / scale` pixels of the image, each sharing a quarter of that or more with the
    next: as few as do, evenly spread, and as small as so few may be. Where windows overlap, their logits are averaged
    with weights that fall linearly to their edges, where the network saw padding. An image that fits is not cut: its
    result is exactly that of the whole image.

    Beyond the result and the network's own needs, memory holds one window: its pixels, its logits as the network gives
    them and resized to B x K x (tile / scale)^2 numbers at most. It does not grow with the image.

    Args:
        model: maps images (B, C, *, *) to logits (B, K, *, *) of any stride. It is called as it is, without gradient:
            put it in eval mode first.
        images: the normalised batch; `model` sees its dtype and memory format.
        scales: factors of the image size; a side has `max(1, floor(H * scale + 1/2))` pixels.
        flip: whether every scale is also run on the mirrored image.
        tile: largest side that `model` sees. The default leaves images up to 682 pixels whole at scale 1.5 (VOC's have
            500, COCO's 640). Lower it where memory is short; a quarter of it should cover the network's reach.

    Shape:
        (B, C, H, W) -> (B, K, H, W), float32 for half precision.

    Raises:
        TypeError, ValueError: images of another rank, no scale or one that is not positive, `flip` that is no bool,
            `tile` no positive int, a `model` that does not return one tensor of logits (wrap it to pick them).

    Reference:
        Chen 2017, "Rethinking Atrous Convolution", section 4.

    Example:
        >>> model = nn.Conv2d(3, 21, 3, stride=8, padding=1)
        >>> multi_scale_inference(model, torch.rand(1, 3, 75, 50), tile=64).shape
        torch.Size([1, 21, 75, 50])
    """
    B, _, H, W = check_tensor("images", images, "BCHW", hint="A single image? Pass images[None].")
    check_scales(scales)
    check_choice("flip", flip, (True, False))
    check_count("tile", tile)
    layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    hint = "Several outputs? Wrap the model to return the logits."

    total = images.new_zeros(())  # (B, K, H, W) once the model has told K

    def run(x: Tensor) -> Tensor:
        logits = model(x.clone(memory_format=layout))  # one that works in place must not change the images
        sizes = {"B": B, "K": total.shape[1]} if total.ndim else {"B": B}
        check_tensor("model(images)", logits, "BKhw", like=images, hint=hint, kind="floating", **sizes)
        return promote(logits)

    for scale in scales:
        rows, columns = (_windows(side, scale, tile, images.device) for side in (H, W))
        for row, column in product(rows, columns):
            y, x = row.pixels, column.pixels
            window = resize(images[..., y, x], (row.scaled, column.scaled)).to(images.dtype)
            logits = run(window) + run(window.flip(-1)).flip(-1) if flip else run(window)
            if total.ndim == 0:
                total = logits.new_zeros(B, logits.shape[1], H, W)
            logits = resize(logits, (y.stop - y.start, x.stop - x.start))
            total[..., y, x].addcmul_(logits, row.weights.to(total)[:, None] * column.weights.to(total))
    return total.div_(len(scales) * (2 if flip else 1))


class _Window(NamedTuple):
    pixels: slice
    scaled: int  # its side when scaled
    weights: Tensor  # of its pixels; over all windows they sum to 1, and with one window they are exactly 1


def _windows(length: int, scale: float, tile: int, device: torch.device) -> list[_Window]:
    """Cut a side of `length` pixels into windows that `model` can see."""
    side, steps = length, 0
    if scaled_side(length, scale) > tile:
        largest = max(1, int(tile / scale))
        shared = largest // 4
        steps = -(-(length - largest) // (largest - shared))
        side = -(-(length + steps * shared) // (steps + 1))  # as small as so few may be
    starts = [i * (length - side) // max(steps, 1) for i in range(steps + 1)]
    windows = [slice(start, start + side) for start in starts]
    ramp = torch.arange(1, side + 1, device=device, dtype=torch.float64)
    tent = torch.minimum(ramp, ramp.flip(0))
    cover = torch.zeros(length, device=device, dtype=torch.float64)
    for window in windows:
        cover[window] += tent
    scaled = min(tile, scaled_side(side, scale))
    return [_Window(window, scaled, tent / cover[window]) for window in windows]


class LargeFOV(nn.Module):
    """The head of DeepLab-LargeFOV: two 3x3 convolutions of dilation 12, or one and a normalised 1x1 pair.

    Plain: conv3x3 to 512, ReLU, conv3x3 to K. With `norm`: conv3x3 to 512, BN, ReLU, conv1x1 to 512, BN, ReLU,
    conv1x1 to K. Weights start normal with deviation .01 and biases at 0, as DeepLab's new layers; a convolution
    before a norm has no bias. Put it after any backbone: `nn.Sequential(resnet38(), LargeFOV(4096, 20))`.

    Args:
        in_channels: channels C of the backbone's features.
        num_classes: foreground classes N; the head has K = N + 1 outputs, background first.
        norm: the variant with batch norms.

    Shape:
        (B, C, h, w) -> (B, K, h, w) logits, float32 for half precision.

    Raises:
        TypeError, ValueError: a count that is no positive int; an input of another rank or channel count.

    Reference:
        Chen 2015, "Semantic Image Segmentation with Deep Convolutional Nets"; the norms as in the re-training of
        Wang 2020, "Self-supervised Equivariant Attention Mechanism".

    Example:
        >>> LargeFOV(64, num_classes=20)(torch.rand(2, 64, 41, 41)).shape
        torch.Size([2, 21, 41, 41])
    """

    if TYPE_CHECKING:  # nn.Module's own call says Any
        __call__: Callable[..., Tensor]

    def __init__(self, in_channels: int, num_classes: int, *, norm: bool = False) -> None:
        super().__init__()
        check_count("in_channels", in_channels)
        check_count("num_classes", num_classes)
        self.conv = nn.Conv2d(in_channels, 512, 3, padding=12, dilation=12, bias=not norm)
        if norm:
            inner = nn.BatchNorm2d(512), nn.ReLU(), nn.Conv2d(512, 512, 1, bias=False), nn.BatchNorm2d(512), nn.ReLU()
            self.classify = nn.Sequential(*inner, nn.Conv2d(512, num_classes + 1, 1))
        else:
            self.classify = nn.Sequential(nn.ReLU(), nn.Conv2d(512, num_classes + 1, 3, padding=12, dilation=12))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map backbone features (B, C, h, w) to logits (B, K, h, w)."""
        hint = "in_channels must be the backbone's number of output channels."
        check_tensor("x", x, "BChw", like=self.conv.weight, hint=hint, C=self.conv.in_channels)
        return promote(self.classify(self.conv(x)))
