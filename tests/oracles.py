"""Loop references written from the equations: one function an equation, one pixel, class or scale at a time.

They resize features to the image's size first, as the paper does, and are differentiable, so `assert_matches`
compares values and gradients.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def value_and_grads(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Return `function(*inputs)` and the gradient of a weighted sum of it with respect to each floating input."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    value = function(*leaves)
    if value.requires_grad:
        weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=value.device)
        (value * weights.view(value.shape)).sum().backward()
    floating = [leaf for leaf in leaves if leaf.is_floating_point()]
    return [value.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in floating)]


def assert_matches(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    *inputs: Tensor,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> None:
    """Check value and gradients of `function` in `dtype` on `device` against `reference` in float64."""
    rounded = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    actual = value_and_grads(function, *(x.to(device) for x in rounded))
    expected = value_and_grads(reference, *(x.double() if x.is_floating_point() else x for x in rounded))
    if actual[0].is_floating_point():
        assert actual[0].dtype == dtype
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], check_dtype=False)


def neighbours(target: int, targets: int, sources: int) -> list[tuple[int, float]]:
    """Return the source cells, with weights, whose centres surround the centre of cell `target` of `targets`."""
    centre = min(max((target + 0.5) * sources / targets - 0.5, 0.0), sources - 1.0)
    low = math.floor(centre)
    return [(low, 1 - (centre - low)), (min(low + 1, sources - 1), centre - low)]


def bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (..., h, w) to (..., H, W), bilinear, align_corners False."""
    (h, w), (H, W) = x.shape[-2:], size
    pixels = [
        sum(a * b * x[..., u, v] for (u, a), (v, b) in product(neighbours(i, H, h), neighbours(j, W, w)))
        for i, j in product(range(H), range(W))
    ]
    return torch.stack(pixels, -1).view(*x.shape[:-2], H, W)


def active(cam: Tensor) -> Tensor:
    """Return the CAM with non-finite values as no activation."""
    return torch.where(cam.isfinite(), cam, 0.0)


def normalize_cam(cam: Tensor, eps: float = 1e-5) -> Tensor:
    """CAM: relu(A) / max over pixels where that maximum is > eps, else zeros."""
    maps = []
    for one in active(cam).flatten(0, 1):
        values = [torch.relu(value) for value in one.flatten()]
        peak = max(values)
        maps += [value / peak if peak > eps else value * 0 for value in values]
    return torch.stack(maps).view(cam.shape)


def msinf_cam(cams: Sequence[Tensor], tags: Tensor, size: tuple[int, int]) -> Tensor:
    """Multi-scale inferred CAM: resize raw, ReLU, sum over scales, absent classes zero, normalise."""
    total = sum(torch.relu(bilinear(active(cam), size)) for cam in cams)
    return normalize_cam(total * (tags > 0).to(total)[:, :, None, None])


def class_region_mask(cam: Tensor, tags: Tensor, threshold: float) -> Tensor:
    """Eq. 1-2: the present class of the largest activation (the lowest on a tie) where > threshold, else 0."""
    B, N, H, W = cam.shape
    mask = torch.zeros(B, H, W, dtype=torch.int64)
    for b, i, j in product(range(B), range(H), range(W)):
        present = [k for k in range(N) if tags[b, k] > 0]
        values = [float(active(cam[b, k, i, j])) for k in present]
        if values and max(values) > threshold:
            mask[b, i, j] = 1 + present[values.index(max(values))]
    return mask


def labelled(mask: Tensor, num_classes: int, ignore_index: int = 255) -> Iterator[tuple[int, int, int, int]]:
    """Yield (b, i, j, class) of each pixel that is not void: its class is in 0..num_classes."""
    for b, i, j in product(*map(range, mask.shape)):
        k = int(mask[b, i, j])
        if 0 <= k <= num_classes and k != ignore_index:
            yield b, i, j, k


def direct_loss(cam: Tensor, mask: Tensor, tags: Tensor, ignore_index: int = 255, eps: float = 2**-52) -> Tensor:
    """Direct self-supervision: BCE of CAM_k against [mask = k], mean over (present pair, valid pixel)."""
    terms = []
    for b, i, j, label in labelled(mask, cam.shape[1], ignore_index):
        for k in range(1, cam.shape[1] + 1):
            if tags[b, k - 1] > 0:
                p = active(cam[b, k - 1, i, j]).clamp(eps, 1 - eps)
                terms.append(-torch.log(p if label == k else 1 - p))
    return sum(terms) / len(terms) if terms else cam.sum() * 0


def class_prototypes(
    features: Tensor, mask: Tensor, num_classes: int, ignore_index: int = 255
) -> tuple[Tensor, Tensor]:
    """Eq. 3 for one image: the mean feature over each class's region, and the region's pixels."""
    B, D, K = *features.shape[:2], num_classes + 1
    x = bilinear(features, mask.shape[1:])
    regions = {(b, k): [] for b, k in product(range(B), range(K))}
    for b, i, j, k in labelled(mask, num_classes, ignore_index):
        regions[b, k].append(x[b, :, i, j])
    means = [sum(region) / len(region) if region else torch.zeros(D).to(x) for region in regions.values()]
    counts = [len(region) for region in regions.values()]
    return torch.stack(means).view(B, K, D), torch.tensor(counts).view(B, K)


def updated_bank(prototypes: Tensor, filled: Tensor, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 3 over images: the mean over those that show the class; a class shown by none keeps its row."""
    means, counts = class_prototypes(features, mask, len(prototypes) - 1)
    prototypes, filled = prototypes.clone(), filled.clone()
    for k in range(len(prototypes)):
        shown = [mean[k] for mean, count in zip(means, counts, strict=True) if count[k] > 0]
        if shown:
            prototypes[k], filled[k] = sum(shown) / len(shown), True
    return prototypes, filled


def unit(x: Tensor, eps: float) -> Tensor:
    """Return x / |x|, or zeros where |x| <= eps."""
    return x / x.square().sum().sqrt() if x.square().sum() > eps**2 else x * 0


def regional_contrastive_loss(
    features: Tensor,
    mask: Tensor,
    prototypes: Tensor,
    filled: Tensor | None = None,
    *,
    temperature: float = 0.5,
    form: str = "infonce",
    reduction: str = "mean",
    ignore_index: int = 255,
) -> Tensor:
    """Eq. 4-5: -log softmax (infonce) or -softmax (ratio) of z_pk = <x_p, pt_k> / T over the filled classes."""
    eps = torch.finfo(features.dtype).eps
    x = bilinear(features, mask.shape[1:])
    classes = [k for k in range(len(prototypes)) if filled is None or filled[k]]
    terms = {pixel: x.new_zeros(()) for pixel in product(*map(range, mask.shape))}
    valid = []
    for b, i, j, label in labelled(mask, len(prototypes) - 1, ignore_index):
        if label in classes:
            z = {k: unit(x[b, :, i, j], eps) @ unit(prototypes[k], eps) / temperature for k in classes}
            probability = torch.exp(z[label]) / sum(torch.exp(other) for other in z.values())
            terms[b, i, j] = -torch.log(probability) if form == "infonce" else -probability
            valid.append((b, i, j))
    if reduction == "none":
        return torch.stack(list(terms.values())).view(mask.shape)
    total = sum(terms.values()) + 0 * (features.sum() + prototypes.sum())
    return total / max(len(valid), 1) if reduction == "mean" else total


def scale_dissimilarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Eq. 6: xi_ij = 2 - cos(A_i, A_j) over pixels, (S,P,H,W), (R,P,H,W) -> (P,S,R)."""
    xi = []
    for p, i, j in product(range(student.shape[1]), range(len(student)), range(len(teacher))):
        a, b = student[i, p].flatten(), teacher[j, p].flatten()
        dot = sum(u * v for u, v in zip(a, b, strict=True))
        norms = torch.sqrt(sum(u * u for u in a)) * torch.sqrt(sum(v * v for v in b))
        xi.append(2 - (dot / norms if norms > 0 else dot * 0))
    return torch.stack(xi).view(student.shape[1], len(student), len(teacher))


def attentive_target(student: Tensor, teacher: Tensor, attentive: bool = True) -> Tensor:
    """Eq. 7: target_i = 1/R sum_j xi_ij A_j, without gradient; xi = 1 where not attentive."""
    student, teacher = student.detach(), teacher.detach()
    xi = scale_dissimilarity(student, teacher) if attentive else None
    target = torch.zeros_like(student)
    for i, p, j in product(range(len(student)), range(student.shape[1]), range(len(teacher))):
        target[i, p] += (xi[p, i, j] if attentive else 1.0) * teacher[j, p] / len(teacher)
    return target


def multi_scale_attentive_loss(
    student_cams: Sequence[Tensor],
    teacher_cams: Sequence[Tensor],
    tags: Tensor,
    *,
    attentive: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Eq. 8: L1 distance to the target, summed over student scales; mean over (present pair, pixel) or sum."""
    total, count = sum(active(cam).sum() for cam in student_cams) * 0, 0
    for b, k in tags.gt(0).nonzero().tolist():
        student = torch.stack([active(cam[b, k]) for cam in student_cams])[:, None]
        teacher = torch.stack([active(cam[b, k]) for cam in teacher_cams])[:, None]
        target = attentive_target(student, teacher, attentive)
        for i, u, v in product(range(len(student)), *map(range, student.shape[2:])):
            total = total + torch.abs(student[i, 0, u, v] - target[i, 0, u, v])
        count += student[0].numel()
    return total / max(count, 1) if reduction == "mean" else total


def multi_scale_cross_entropy(logits: Sequence[Tensor], mask: Tensor, ignore_index: int = 255) -> Tensor:
    """CE of every scale, and of the largest logits of all where there are several: means over valid pixels, summed."""
    maps = [bilinear(one, mask.shape[1:]) for one in logits]
    if len(maps) > 1:
        maps.append(functools.reduce(torch.maximum, maps))
    total = sum(one.sum() for one in maps) * 0
    valid = list(labelled(mask, maps[0].shape[1] - 1, ignore_index))
    for one, (b, i, j, k) in product(maps, valid):
        total = total - torch.log(torch.exp(one[b, k, i, j]) / torch.exp(one[b, :, i, j]).sum()) / len(valid)
    return total


def window_starts(length: int, side: int) -> list[int]:
    """The fewest evenly spread windows of which neighbours share a third."""
    for steps in range(length):
        starts = [math.floor(i * (length - side) / max(steps, 1)) for i in range(steps + 1)]
        gaps = [b - a for a, b in pairwise(starts)]
        if starts[-1] == length - side and all(side - gap >= side // 3 for gap in gaps):
            return starts
    raise AssertionError


def multi_scale_inference(
    model: Callable[[Tensor], Tensor], images: Tensor, scales: Sequence[float], flip: bool, tile: int
) -> Tensor:
    """Mean over scales, flips and images of the logits, each a mean over windows by the distance to an edge."""
    results = []
    for image, scale, mirrored in product(images, scales, [False, True][: 1 + flip]):
        sides = [
            n if math.floor(n * scale + 0.5) <= tile else max(1, math.floor(tile / scale)) for n in image.shape[1:]
        ]
        total, weights = 0, torch.zeros(image.shape[1:]).to(image)
        for corner in product(*(window_starts(n, side) for n, side in zip(image.shape[1:], sides, strict=True))):
            (y, x), (h, w) = corner, sides
            crop = image[None, :, y : y + h, x : x + w]
            scaled = bilinear(crop, [min(tile, max(1, math.floor(side * scale + 0.5))) for side in sides])
            logits = bilinear(model(scaled.flip(-1)), sides).flip(-1) if mirrored else bilinear(model(scaled), sides)
            total = total if weights.any() else torch.zeros(logits.shape[1], *image.shape[1:]).to(logits)
            for i, j in product(range(h), range(w)):
                weight = min(i + 1, h - i) * min(j + 1, w - j)
                total[:, y + i, x + j] += weight * logits[0, :, i, j]
                weights[y + i, x + j] += weight
        results.append(total / weights)
    return torch.stack(results).unflatten(0, (len(images), -1)).mean(1)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: int = 1) -> Tensor:
    """A convolution that keeps the size: every output cell sums over the taps that lie inside."""
    (h, w), (rows, columns) = x.shape[2:], weight.shape[2:]
    cells = []
    for i, j in product(range(h), range(w)):
        cell = torch.zeros(len(x), len(weight)).to(x)
        for r, c in product(range(rows), range(columns)):
            u, v = i + dilation * (r - rows // 2), j + dilation * (c - columns // 2)
            if 0 <= u < h and 0 <= v < w:
                cell = cell + x[:, :, u, v] @ weight[:, :, r, c].T
        cells.append(cell)
    out = torch.stack(cells, -1).unflatten(-1, (h, w))
    return out if bias is None else out + bias[:, None, None]
