"""Pixel correlation (SEAM's PCM): scores spread to all pixels of the image whose features point the same way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pixelss._checks import check_count, check_counts, check_number, check_taps, check_tensor
from pixelss._dtype import activation, full_precision, promote
from pixelss._maps import strongest_alone
from pixelss._pieces import entries_at_a_time
from pixelss._resize import resize


def pixel_correlation(embedding: Tensor, scores: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Return scores A' = A W, with W_pq = relu(cos(E_p, E_q)) divided by its sum over p.

    W is computed a block of columns at a time, and again in the backward pass: (h w)^2 numbers are never held.

    Args:
        embedding: what is compared.
        scores: class scores, a background included where it matters.
        eps: added to |E_p| and to the sums.

    Shape:
        (B, D, h, w), (B, K, h, w) -> (B, K, h, w); float32 for half precision.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; `eps` out of range.

    Reference:
        Wang 2020, "Self-supervised Equivariant Attention Mechanism", its PCM.

    Example:
        >>> embedding = torch.tensor([[[[1.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]]]])  # the left two are alike
        >>> pixel_correlation(embedding, torch.tensor([[[[1.0, 0.0, 0.0]]]]))
        tensor([[[[0.5000, 0.5000, 0.0000]]]])
    """
    B, _, h, w = check_tensor("embedding", embedding, "BDhw")
    hint = "Resize the scores to the features, or the other way."
    check_tensor("scores", scores, "BKhw", like=embedding, hint=hint, B=B, h=h, w=w)
    check_number("eps", eps, low=0, high=1)
    dtype = torch.promote_types(promote(embedding).dtype, promote(scores).dtype)
    e = embedding.to(dtype).flatten(2)  # (B, D, hw)
    e = e / (e.norm(dim=1, keepdim=True) + eps)
    a = scores.to(dtype).flatten(2)

    def block(e: Tensor, a: Tensor, columns: Tensor) -> Tensor:
        with full_precision(e):
            similarity = (e.mT @ columns).relu_()  # (B, hw, columns)
            spread = torch.cat([a, torch.ones_like(a[:, :1])], 1) @ similarity  # the last row: the sums
            return spread[:, :-1] / (spread[:, -1:] + eps)

    parts = []
    for columns in e.split(max(1, entries_at_a_time(e) // (h * w)), dim=2):
        if torch.is_grad_enabled() and (e.requires_grad or a.requires_grad):
            part: Tensor = checkpoint(block, e, a, columns, use_reentrant=False, preserve_rng_state=False)
        else:
            part = block(e, a, columns)
        parts.append(part)
    return torch.cat(parts, 2).view(scores.shape)


class PixelCorrelation(nn.Module):
    """A head that refines CAMs by `pixel_correlation` of the image and of two of its backbone's taps.

    E is a 1x1 convolution of [image at h x w, relu(1x1 convolution of each tap)], none with a bias. Taps, image and
    CAMs are taken as they are: gradients reach the convolutions alone. What is spread is relu(relu(A) - 1e-5) /
    (max A + 1e-5) with 1 - max as background, of the foreground only the pixel's strongest class.

    Args:
        in_channels: channels of every tap.
        dims: channels that every tap is reduced to.
        dim: channels of E.

    Shape:
        taps (B, C_i, h, w), images (B, 3, *, *), raw CAMs (B, N, h, w) -> refined CAMs (B, K, h, w), K = N + 1.

    Raises:
        TypeError, ValueError: channel counts that are no positive ints or not one a tap; taps, images or CAMs that do
            not fit together.

    Reference:
        Wang 2020, "Self-supervised Equivariant Attention Mechanism", its PCM.

    Example:
        >>> head = PixelCorrelation((8, 16), dims=(4, 6), dim=10)
        >>> taps = [torch.rand(2, 8, 5, 6), torch.rand(2, 16, 5, 6)]
        >>> head(taps, torch.rand(2, 3, 40, 48), torch.rand(2, 20, 5, 6)).shape
        torch.Size([2, 21, 5, 6])
    """

    if TYPE_CHECKING:  # nn.Module's own call says Any
        __call__: Callable[..., Tensor]

    def __init__(self, in_channels: Sequence[int], *, dims: Sequence[int] = (64, 128), dim: int = 192) -> None:
        super().__init__()
        check_counts("in_channels", in_channels, "ints, one a tap")
        check_counts("dims", dims, "ints, one a tap")
        check_count("dim", dim)
        if len(dims) != len(in_channels):
            raise ValueError(
                f"dims must have one entry a tap, as in_channels with {len(in_channels)}, but has {len(dims)}."
            )
        self.in_channels = tuple(in_channels)
        convs = [
            nn.Conv2d(channels, reduced, 1, bias=False) for channels, reduced in zip(in_channels, dims, strict=True)
        ]
        self.reduce = nn.ModuleList(convs)
        self.embed = nn.Conv2d(3 + sum(dims), dim, 1, bias=False)
        for conv in convs:
            nn.init.kaiming_normal_(conv.weight)
        nn.init.xavier_uniform_(self.embed.weight, gain=4)

    def forward(self, taps: Sequence[Tensor], images: Tensor, cam: Tensor) -> Tensor:
        """Refine raw CAMs."""
        B, _, h, w = check_tensor("cam", cam, "BNhw", like=self.embed.weight)
        check_tensor("images", images, "BCHW", like=cam, hint="The images that the taps are of.", B=B, C=3)
        hint = "Taps have the CAMs' size, and their channels are in_channels."
        check_taps(taps, self.in_channels, shared="Bhw", like=cam, hint=hint, B=B, h=h, w=w)
        reduced = [conv(tap.detach()).relu() for tap, conv in zip(taps, self.reduce, strict=True)]
        image = resize(images.detach(), (h, w)).to(reduced[0].dtype)
        embedding = self.embed(torch.cat([image, *reduced], 1))
        cam = activation(cam.detach()).relu()
        cam = (cam - 1e-5).relu() / (cam.amax((2, 3), keepdim=True) + 1e-5)
        return pixel_correlation(embedding, strongest_alone(cam))
