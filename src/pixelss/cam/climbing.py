"""Climbing (AdvCAM): move the image towards its class, and add up the CAMs on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from einops import einsum
from torch import Tensor

from pixelss._checks import TAGS_HINT, check_count, check_number, check_tensor
from pixelss._dtype import activation, full_precision, promote
from pixelss._graphs import outside_graphs
from pixelss.cam.head import CAMOutput
from pixelss.cam.scales import output_of

_LIMIT = torch.finfo(torch.float32).max


def climb_cam(
    model: Callable[[Tensor], CAMOutput],
    images: Tensor,
    tags: Tensor,
    *,
    iterations: int = 27,
    step: float = 0.08,
    strength: float = 7.0,
    region: float = 0.5,
) -> Tensor:
    """Return the sum of a class's Grad-CAMs while the image is changed so that the class scores higher.

    For every present class n, from the clean image and its mirror image as a pair, `iterations` times:

    - A, X = `model(pair)`, y = mean over the cells of relu(A). R = relu(sum_d w_d X_d) of both, the mirrored one back,
      added: w = (sum over cells of g) / (number of positive entries of g in the pair), g = d(sum relu(A_n)) / dX.
    - the pair climbs 2 y_n - sum_k y_k - strength sum |R - R_first| [R / max R > region], both images': what was seen
      first must not grow alone. Of R only X carries a gradient; the region and R_first are constants.
    - pair <- clamp(pair + step gradient / max |gradient|), to the range that the pair had.

    The gradient is taken with respect to the images alone: parameters get none, whether they require one or not, and
    neither their state nor the grad mode changes; it works within `torch.no_grad` and `torch.inference_mode` too.

    Args:
        model: maps images to a `CAMOutput` whose features its CAM is computed from, in eval mode: a batch norm in train
            mode would learn the changed images. Not a `torch.compile`d whole, not `DistributedDataParallel`: both cut
            the way from the CAM back to the features; compile the backbone, pass `model.module`.
        images: the normalised batch. As many pairs at a time go through the model as images have an i-th tag.
        tags: image-level labels, multi-hot of any dtype.
        iterations: CAMs to add up; that of the clean image is the first.
        step: the largest change of a value in an iteration, in units of the normalised images.
        strength: of the regularisation, 0 or above.
        region: what counts as discriminative, of R's maximum.

    Shape:
        (B, C, H, W), (B, N) -> (B, N, h, w), zero for absent classes; float32 for half precision; no gradient.

    Raises:
        TypeError, ValueError: arguments of another rank, size, dtype kind or device; a setting out of range; a `model`
            that returns no `CAMOutput`, or a CAM that does not depend on its features.

    Reference:
        Lee 2021, "Anti-Adversarially Manipulated Attributions", as its code does it.

    Example:
        >>> from torch import nn
        >>> from pixelss import CAMHead
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8, padding=1), CAMHead(8, num_classes=4, dim=16)).eval()
        >>> climb_cam(model, torch.rand(2, 3, 64, 64), torch.eye(4)[:2], iterations=3).shape
        torch.Size([2, 4, 8, 8])
    """
    B, *_ = check_tensor("images", images, "BCHW", hint="A single image? Pass images[None].")
    check_tensor("tags", tags, "BN", kind="any", like=images, hint=TAGS_HINT, B=B)
    check_count("iterations", iterations)
    check_number("step", step, low=0, high=_LIMIT)
    check_number("strength", strength, low=0, high=_LIMIT)
    check_number("region", region, low=0, high=1)
    total: Tensor = _add_up(model, images, tags, iterations, step, strength, region)
    return total


@outside_graphs  # it differentiates a part of the graph
def _add_up(
    model: Callable[[Tensor], CAMOutput],
    images: Tensor,
    tags: Tensor,
    iterations: int,
    step: float,
    strength: float,
    region: float,
) -> Tensor:
    """Return `climb_cam` of checked arguments."""
    B = len(images)
    with torch.inference_mode(False), torch.enable_grad():
        clean = promote(images.detach().clone())  # of an inference tensor, a tensor that autograd takes
        with torch.no_grad():  # for the size of the maps
            _, N, h, w = output_of(model, clean[:1].to(images.dtype), images).cam.shape
        check_tensor("tags", tags, "BN", kind="any", hint=TAGS_HINT, N=N)
        total = clean.new_zeros(B, N, h, w)
        present = (tags > 0).long()
        order = present.cumsum(1) * present  # 1 at the first present class of an image, 2 at its second
        for i in range(1, int(order.max()) + 1 if B else 1):
            chosen, classes = (order == i).nonzero().unbind(1)
            pairs = torch.stack([clean[chosen], clean[chosen].flip(-1)])  # (2, P, C, H, W)
            for cam in _climb(model, pairs, classes, images, iterations, step, strength, region):
                total[chosen, classes] += cam
    return total


def _climb(
    model: Callable[[Tensor], CAMOutput],
    pairs: Tensor,
    classes: Tensor,
    images: Tensor,
    iterations: int,
    step: float,
    strength: float,
    region: float,
) -> Iterator[Tensor]:
    """Yield the Grad-CAMs (P, h, w) of pairs (2, P, C, H, W) that climb, each towards one of `classes` (P,)."""
    of_a_pair, first = (0, 2, 3, 4), None
    for i in range(iterations):
        cam, score = _look(model, pairs.requires_grad_(), classes, images)
        seen = cam.detach()
        yield seen
        if i + 1 == iterations:
            return
        first = seen if first is None else first
        grown = (cam - first).abs().where(seen > region * seen.amax((-2, -1), keepdim=True), 0)
        goal = score - strength * cam[0].numel() * grown.sum()  # times the cells, so that half precision holds it
        gradient = torch.autograd.grad(goal, pairs)[0].nan_to_num(0, 0, 0)
        pairs = pairs.detach()
        move = gradient / gradient.abs().amax(of_a_pair, keepdim=True).clamp(min=torch.finfo(gradient.dtype).tiny)
        low, high = pairs.amin(of_a_pair, keepdim=True), pairs.amax(of_a_pair, keepdim=True)
        pairs = (pairs + step * move).clamp(low, high)


def _look(
    model: Callable[[Tensor], CAMOutput], pairs: Tensor, classes: Tensor, images: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the Grad-CAMs (P, h, w) of pairs, and the sum of their 2 y_n - sum_k y_k, times the cells of a map."""
    halves = 2, len(classes)
    output = output_of(model, pairs.flatten(0, 1).to(images.dtype), images)
    scores = activation(output.cam).relu().sum((-2, -1)).unflatten(0, halves)  # (2, P, N): y times the cells
    own = scores.gather(2, classes.expand(halves)[..., None]).sum()
    gradient = None
    if own.requires_grad and output.features.requires_grad:
        (gradient,) = torch.autograd.grad(own, output.features, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "model must compute its CAM from the features that it returns, with gradients, but the one does not depend"
            " on the other: pass a teacher's .module, and compile the backbone alone."
        )
    features, gradient = (promote(x).unflatten(0, halves) for x in (output.features, gradient))  # (2, P, D, h, w)
    positive = (gradient > 0).sum((0, 2, 3, 4)).clamp(min=1)[:, None]  # a scale alone
    with full_precision(features):
        weights = gradient.sum((-2, -1)) / positive  # (2, P, D)
        cam = activation(einsum(weights, features, "v p d, v p d h w -> v p h w").relu())
    return cam[0] + cam[1].flip(-1), 2 * own - scores.sum()
