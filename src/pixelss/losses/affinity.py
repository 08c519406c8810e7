"""AffinityNet's loss: pairs of cells that show the same class, and pairs that do not."""

from __future__ import annotations

from torch import Tensor

from pixelss._checks import check_tensor
from pixelss._dtype import promote
from pixelss._labels import mean_over
from pixelss._pairs import BACKGROUND, DIFFERENT, FOREGROUND


def affinity_loss(affinity: Tensor, labels: Tensor) -> Tensor:
    """Return AffinityNet's loss: background / 4 + foreground / 4 + different / 2.

    Each is the mean over its pairs of -log(p + 1e-5), or of -log(1 - p + 1e-5) for different; a kind without a pair
    gives 0 on the graph.

    Args:
        affinity: as `AffinityHead`, in [0, 1].
        labels: as `affinity_labels`; values other than 0, 1 and 2 are ignored.

    Shape:
        (B, O, h, w), (B, O, h, w) -> scalar; float32 for half-precision input.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device.

    Reference:
        Ahn 2018, "Learning Pixel-level Semantic Affinity", section 3.2.

    Example:
        >>> import torch
        >>> affinity_loss(torch.ones(1, 34, 5, 5), torch.full((1, 34, 5, 5), 2)).abs() < 1e-4
        tensor(True)
    """
    B, O, h, w = check_tensor("affinity", affinity, "BOhw")  # noqa: E741
    hint = "Build both with the same radius."
    check_tensor("labels", labels, "BOhw", kind="integer", like=affinity, hint=hint, B=B, O=O, h=h, w=w)
    p = promote(affinity)

    def mean(kind: int) -> Tensor:
        pairs = labels == kind
        agreement = (1 - p if kind == DIFFERENT else p).where(pairs, 1)
        return mean_over(-(agreement + 1e-5).log(), pairs)

    return mean(BACKGROUND) / 4 + mean(FOREGROUND) / 4 + mean(DIFFERENT) / 2
