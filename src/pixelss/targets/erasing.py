"""What to erase from an image (OC-CSE): one present class, where its CAM is."""

from __future__ import annotations

import torch
from torch import Tensor

from pixelss._checks import TAGS_HINT, check_number, check_tensor
from pixelss._dtype import activation
from pixelss._random import uniform

_CHOSEN_HINT = "One-hot over the foreground classes, as choose_class returns it."


def erasing_mask(cam: Tensor, chosen: Tensor, *, per_image: bool = True, eps: float = 0.0) -> Tensor:
    """Return how much of every pixel to erase: relu(A_c) of the chosen class c, over its maximum.

    The erased images are images * (1 - mask). The gradient flows through the mask and through the maximum.

    Args:
        cam: raw CAMs at the images' size; a non-finite value counts as no activation.
        chosen: the class to erase from every image, one-hot of any dtype; from an image without one nothing is erased.
        per_image: False takes one maximum over the whole batch, as published.
        eps: what is added to the maximum; 1e-5 as published. With 0 the maximum of a live mask is exactly 1.

    Shape:
        (B, N, H, W), (B, N) -> (B, 1, H, W) in [0, 1], zeros where no chosen CAM is active; float32 for half precision.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; `eps` out of range.

    Reference:
        Kweon 2021, "Unlocking the Potential of Ordinary Classifier", its class-specific erasing.

    Example:
        >>> cam = torch.tensor([[[[-1.0, 2.0, 4.0]], [[9.0, 9.0, 9.0]]]])
        >>> erasing_mask(cam, torch.tensor([[1, 0]]))
        tensor([[[[0.0000, 0.5000, 1.0000]]]])
    """
    B, N, _, _ = check_tensor("cam", cam, "BNHW")
    check_tensor("chosen", chosen, "BN", kind="any", like=cam, hint=_CHOSEN_HINT, B=B, N=N)
    check_number("eps", eps, low=0, high=torch.finfo(torch.float32).max)
    activated = activation(cam.where((chosen > 0)[:, :, None, None], 0).sum(1, keepdim=True)).relu()
    peak = activated.amax((1, 2, 3) if per_image or B == 0 else (0, 1, 2, 3), keepdim=True)
    alive = peak > torch.finfo(torch.float32).tiny  # below it 1 / peak overflows
    return torch.where(alive, activated / (peak.where(alive, 1) + eps), 0)


def choose_class(tags: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Return one of an image's present classes, every one equally likely.

    Args:
        tags: image-level labels, multi-hot of any dtype: present where > 0.
        generator: of the draws, on any device; None: torch's own.

    Shape:
        (B, N) -> (B, N) one-hot, in the tags' dtype; zeros where an image has no tag.

    Raises:
        TypeError, ValueError: tags of another rank; another generator than torch's.

    Reference:
        Kweon 2021, "Unlocking the Potential of Ordinary Classifier", its random choice of the target class.

    Example:
        >>> choose_class(torch.tensor([[0, 1, 0], [0, 0, 0]]))
        tensor([[0, 1, 0],
                [0, 0, 0]])
    """
    B, N = check_tensor("tags", tags, "BN", kind="any", hint=TAGS_HINT)
    present = tags > 0
    first = uniform(B, N, like=tags, generator=generator).where(present, -1).argmax(1, keepdim=True)
    classes = torch.arange(N, device=tags.device)
    return ((classes == first) & present).to(tags.dtype)
