"""Losses of other systems of the field, as terms beside those of terms.py: each is one system's own part, by one block.

train_cam joins `FIELD_TERMS` to `terms.TERMS`. A system's recipe is more than its loss: what differs from the published
one stands at each term.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from config import Config, Scales
from networks import build_cam, load_start
from terms import Mean, Term, Views
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, batch_norm, binary_cross_entropy_with_logits

import pixelss

_WHOLE: Scales = (1.0,)
_PATCHES = 4  # along a side of what CPN hides


def erasing(config: Config, num_classes: int, images: int) -> Term:
    """OC-CSE: with one class erased from the images, the start's network finds the others and that one no more.

    Published: a weight that rises from .3 to 1, and one maximum of the mask for the whole batch, not one an image.
    """
    folder = config.cam.start_from
    if folder is None:
        raise ValueError(
            "cam.start_from must be a finished train_cam folder where cam.erase is above 0, but is null: its network is"
            " the ordinary classifier that sees the erased images."
        )
    # Without weights, which the folder's file holds, and without a correlation, which a classifier has no use for.
    plain = replace(config.network, weights=None)
    ordinary = build_cam(replace(config, network=plain, cam=replace(config.cam, ecr=0, minpool=0)), num_classes)
    load_start(ordinary, folder)
    ordinary.requires_grad_(False).eval()

    def mean(views: Views) -> Mean:
        chosen = pixelss.choose_class(views.tags)
        mask = pixelss.erasing_mask(views.student[1.0].cam, chosen)
        logits = _whole(ordinary, views.images * (1 - mask).to(views.images.dtype)).logits
        return pixelss.class_erasing_loss(logits, views.tags, chosen), views.images_seen

    return Term(mean, _WHOLE, modules={"ordinary": ordinary})


def complementary(config: Config, num_classes: int, images: int) -> Term:
    """CPN: the CAM of an image is that of two images together which hide each other's patches; both have its tags.

    Published: the mean classification loss of all three images; super-pixels beside the grid; a region correlation.
    """

    def mean(views: Views) -> Mean:
        kept, hidden, share = pixelss.complementary_pair(views.images, patch=-(-views.images.shape[-1] // _PATCHES))
        parts = _whole(views.network, torch.cat([kept, hidden]))
        full, *pair = (views.comparable(cam) for cam in (views.student[1.0].cam, *parts.cam.chunk(2)))
        classes = binary_cross_entropy_with_logits(parts.logits, torch.cat([views.tags, views.tags]))
        return pixelss.complementary_loss(full, pair[0], pair[1], share) + classes, views.images_seen

    return Term(mean, _WHOLE)


def puzzle(config: Config, num_classes: int, images: int) -> Term:
    """Puzzle-CAM: the raw CAM of an image is that of its four tiles put together, which has the tags as well.

    Published: a weight of the former that rises from 0 to 4; here it is 1, the code's default.
    """

    def mean(views: Views) -> Mean:
        tiles = _whole(views.network, pixelss.split_tiles(views.images))
        logits = tiles.logits.unflatten(0, (-1, len(views.images))).mean(0)  # the mean of the CAMs put together
        classes = binary_cross_entropy_with_logits(logits, views.tags)
        merged = pixelss.merge_tiles(tiles.cam)
        return pixelss.reconstruction_loss(views.student[1.0].cam, merged, views.tags) + classes, views.images_seen

    return Term(mean, _WHOLE)


def pixel_prototype(config: Config, num_classes: int, images: int) -> Term:
    """PPC: the cells of two views, against the prototypes and under the labels of both, at the smaller view's cells.

    The scores are refined CAMs where another term teaches a correlation, as SEAM's do in PPC. Published: features of a
    projection of their own, and a third term within each view.
    """
    scales, refined = config.cam.view_scales, config.cam.correlates

    def mean(views: Views) -> Mean:
        h, w = views.student[min(scales)].features.shape[-2:]

        def view(scale: float) -> tuple[Tensor, Tensor]:
            cam = views.refined(scale)[:, 1:] if refined else views.student[scale].cam
            scores = pixelss.normalize_cam(cam, kind="minmax")
            return adaptive_avg_pool2d(views.student[scale].features, (h, w)), adaptive_avg_pool2d(scores, (h, w))

        return pixelss.pixel_prototype_loss(view(scales[0]), view(scales[1]), views.tags), views.images_seen

    return Term(mean, scales, refined=refined)


def intra_class(config: Config, num_classes: int, images: int) -> Term:
    """ICD: the CAM, taken as a classifier of pixels, learns on which side of its class's direction a cell lies.

    The weight warms up over two epochs, as published. Published besides: a pixel classifier of its own, whose map is
    the result, and scores that are averaged over super-pixels.
    """
    direction = pixelss.IntraClassDirection(num_classes, config.network.dim)
    progress = nn.Module()
    progress.register_buffer("steps", torch.zeros((), dtype=torch.float64))
    warm = max(1.0, 2 * images / config.cam.schedule.batch)

    def mean(views: Views) -> Mean:
        # Of zero mean: without it all pixels lie on one side. By the batch's statistics, which need no memory.
        features = batch_norm(views.student[1.0].features.detach().float(), None, None, training=True)
        h, w = features.shape[-2:]
        logits = adaptive_avg_pool2d(views.student[1.0].cam, (h, w))
        direction.update(features, logits.detach().float(), views.tags)
        progress.get_buffer("steps").add_(1)
        weight = torch.exp(10 * (progress.get_buffer("steps") / warm).clamp(max=1) - 10).float()
        return weight * pixelss.intra_class_loss(logits, direction(features), views.tags), views.images_seen

    return Term(mean, _WHOLE, modules={"direction": direction, "intra_class_steps": progress})


def _whole(model: Callable[[Tensor], pixelss.CAMOutput], images: Tensor) -> pixelss.CAMOutput:
    """Return the output for images as they are, its CAM at their size."""
    (output,) = pixelss.multi_scale_forward(model, images, scales=_WHOLE)
    return output


FIELD_TERMS: dict[str, Callable[[Config, int, int], Term]] = {
    "erase": erasing,
    "hide": complementary,
    "puzzle": puzzle,
    "ppc": pixel_prototype,
    "icd": intra_class,
}
