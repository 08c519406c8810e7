"""Class re-activation (ReCAM): a softmax classifier on what each CAM gathers tells the classes apart."""

from __future__ import annotations

import torch
from einops import einsum
from torch import Tensor

from pixelss._checks import TAGS_HINT, check_tensor
from pixelss._dtype import activation, full_precision, promote
from pixelss._labels import mean_over


def reactivation_loss(features: Tensor, cam: Tensor, classifier_weight: Tensor, tags: Tensor) -> Tensor:
    """Return the cross-entropy of every present class against all classes, on the features that its CAM gathers.

    g_n = mean over the cells of cam_n x; the loss of a present class n is the cross-entropy of classifier_weight g_n
    with target n: its mean over an image's classes, then over all images. An image without a tag adds 0.

    Args:
        features: pixel features x.
        cam: normalised CAMs, zero for absent classes; the gradient flows through them.
        classifier_weight: of a second linear classifier, without a bias.
        tags: image-level labels, multi-hot of any dtype.

    Shape:
        (B, D, h, w), (B, N, h, w), (N, D), (B, N) -> scalar; float32 for half precision.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device.

    Reference:
        Chen 2022, "Class Re-Activation Maps", its softmax cross-entropy.

    Example:
        >>> cam = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
        >>> reactivation_loss(2 * cam, cam, torch.eye(2), torch.ones(1, 2))
        tensor(0.3133)
    """
    B, D, h, w = check_tensor("features", features, "BDhw")
    _, N, _, _ = check_tensor("cam", cam, "BNhw", like=features, hint="The features' size.", B=B, h=h, w=w)
    check_tensor("classifier_weight", classifier_weight, "ND", like=features, hint="A 1x1 one? Flatten it.", N=N, D=D)
    check_tensor("tags", tags, "BN", kind="any", like=features, hint=TAGS_HINT, B=B, N=N)
    x, cam, weight = promote(features), activation(cam), promote(classifier_weight)
    dtype = torch.promote_types(torch.promote_types(x.dtype, cam.dtype), weight.dtype)
    with full_precision(features):
        gathered = einsum(cam.to(dtype), x.to(dtype), "b n h w, b d h w -> b n d") / (h * w)
        logits = gathered @ weight.to(dtype).mT  # (B, N, N)
    loss = -logits.log_softmax(-1).diagonal(dim1=1, dim2=2)  # (B, N)
    return mean_over(loss, tags > 0, dim=1).sum() / max(1, B)
