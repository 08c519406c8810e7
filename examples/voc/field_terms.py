"""Losses of other systems of the field, as terms beside those of terms.py: each is one system's own part, by one block.

train_cam joins `FIELD_TERMS` to `terms.TERMS`. A system's recipe is more than its loss: what differs from the published
one stands at each term.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from config import Config, Scales
from data import VOID
from inference import shared_batches, to_input
from networks import build_cam, load_start
from numpy.typing import NDArray
from parallel import sum_over
from stages import Run
from terms import Mean, Term, Views
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, batch_norm, binary_cross_entropy_with_logits

import pixelss

_WHOLE: Scales = (1.0,)
_PATCHES = 4  # along a side of what CPN hides
_SURE = 0.5  # of ECS-Net's CAMs: what is erased, and what is foreground


def erasing(config: Config, num_classes: int, images: int) -> Term:
    """OC-CSE: with one class erased from the images, the start's network finds the others and that one no more.

    Published: a weight that rises from .3 to 1, and one maximum of the mask for the whole batch, not one an image.
    """
    ordinary = _start(config, num_classes, "erase", "is the ordinary classifier that sees the erased images")

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


def subcategory(config: Config, num_classes: int, images: int) -> Term:
    """SC-CAM: a second classifier tells the clusters of each class apart, those of the images' pooled features.

    Published: three rounds, each from ImageNet, with the features of the round before; here one, with the start's.
    """
    _start(config, num_classes, "subcategory", "gives the features that are clustered")  # refuses before the training
    known = nn.Module()
    known.register_buffer("tags", torch.zeros(images, num_classes * config.cam.subclusters))

    def prepare(run: Run) -> None:
        network = _start(config, num_classes, "subcategory", "gives the features that are clustered")
        features, tags = _pooled(run, network.to(run.device))
        generator = torch.Generator().manual_seed(config.seed)
        found = pixelss.subcategory_tags(features, tags, clusters=config.cam.subclusters, generator=generator)
        known.get_buffer("tags").copy_(found)

    def mean(views: Views) -> Mean:
        logits = views.head.subclassify(views.student[1.0].features.mean((2, 3)))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        tags = known.get_buffer("tags")[views.places.to(logits.device, non_blocking=True)]
        return binary_cross_entropy_with_logits(logits, tags), views.images_seen

    return Term(mean, _WHOLE, modules={"subcategories": known}, prepare=prepare)


def still_found(config: Config, num_classes: int, images: int) -> Term:
    """ECS-Net, which has no public code, as we read its abstract: the rest of an object shows where its CAM is erased.

    Erased is a class by the teacher's CAM. What the teacher then finds of the classes that it still recognises, which
    drops noise, are the labels outside of what was erased. There it is a segmentation network that finds them.
    """

    @torch.no_grad()
    def labels(views: Views) -> Tensor:
        whole = _whole(views.ema, views.images)
        erased = pixelss.erasing_mask(whole.cam, pixelss.choose_class(views.tags))
        rest = _whole(views.ema, views.images * (1 - erased).to(views.images.dtype))
        still = views.tags * (rest.logits > 0)
        found = pixelss.normalize_cam(rest.cam) * still[:, :, None, None]
        either = torch.maximum(found, pixelss.normalize_cam(whole.cam))
        sure = pixelss.class_region_mask(found, still, threshold=_SURE)
        anything = pixelss.class_region_mask(either, views.tags, threshold=config.cam.threshold)
        return pixelss.confident_mask(sure, anything).masked_fill(erased[:, 0] > _SURE, VOID)

    def mean(views: Views) -> Mean:
        mask = labels(views)
        pairs = (mask != VOID).sum((1, 2)) * (views.tags > 0).sum(1)  # (present pair, known pixel)
        return pixelss.direct_loss(views.cam(1.0), mask, views.tags), pairs.sum()

    return Term(mean, _WHOLE)


def _start(config: Config, num_classes: int, weight: str, task: str) -> nn.Sequential:
    """Return the network of `cam.start_from`, fixed, for the term of a weight, which it `task`."""
    folder = config.cam.start_from
    if folder is None:
        raise ValueError(
            f"cam.start_from must be a finished train_cam folder where cam.{weight} is above 0, but is null: its"
            f" network {task}."
        )
    # Without weights, which the folder's file holds, and without what a plain classifier has no use for.
    plain = replace(config.network, weights=None)
    bare = replace(config.cam, ecr=0, minpool=0, subcategory=0)
    network = build_cam(replace(config, network=plain, cam=bare), num_classes)
    load_start(network, folder)
    return network.requires_grad_(False).eval()


@torch.no_grad()
def _pooled(run: Run, network: nn.Sequential) -> tuple[Tensor, Tensor]:
    """Return pooled features and tags of the training list, whole images; zeros for one that cannot be read."""
    stems = run.data.stems(run.config.data.train)
    places = {stem: place for place, stem in enumerate(stems)}
    features = torch.zeros(len(stems), run.config.network.dim, device=run.device)
    tags = torch.zeros(len(stems), run.data.num_classes, device=run.device)

    def read(stem: str) -> tuple[NDArray[np.uint8], Tensor]:
        return run.data.image(stem), run.data.tags(stem)

    for batch in shared_batches(run, stems, read, desc="features", max_batch=run.config.infer_cam.max_batch):
        rows = [places[stem] for stem, _ in batch]
        output = network(to_input(run, [image for _, (image, _) in batch])[1])
        features[rows] = output.features.mean((2, 3))
        tags[rows] = torch.stack([shown for _, (_, shown) in batch]).to(tags)
    return sum_over(features), sum_over(tags)


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
    "subcategory": subcategory,
    "ecs": still_found,
}
