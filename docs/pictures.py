"""Draw the pictures of the pages into docs/_pictures; every page shows the function that drew its picture.

    python docs/pictures.py

It runs by itself when the site is built, and draws again only where this file, the small network or pixelss changed.
The network learns for some minutes the first time and is kept in runs/pictures.pth.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import inspect
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "examples")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from shapes import CLASSES  # noqa: E402
from small import batch, scenes, trained  # noqa: E402

import pixelss  # noqa: E402
from pixelss import viz  # noqa: E402

OUT = ROOT / "docs" / "_pictures"
PALETTE = viz.voc_palette()
THRESHOLD = 0.3  # the best for these CAMs, to the tenth
LEGEND = {name: PALETTE[k] for k, name in enumerate(CLASSES, start=1)}


def learn() -> torch.nn.Sequential:
    """Return the small network after plain classification, then classification at three scales, then all blocks."""
    student, kept = trained(), ROOT / "runs" / "pictures.pth"
    sources = inspect.getsource(learn), inspect.getsource(sys.modules["small"])
    stamp = hashlib.sha256("".join(sources).encode()).hexdigest()
    if kept.exists() and (saved := torch.load(kept, weights_only=True))["stamp"] == stamp:
        student.load_state_dict(saved["model"])
        return student.eval()
    student.train()
    pool, rng, bce = scenes(320, seed=0), np.random.default_rng(1), torch.nn.BCEWithLogitsLoss()
    region, bank = pixelss.ClassRegionMask(threshold=0.3), pixelss.PrototypeBank(len(CLASSES))
    rcl, mal = pixelss.RegionalContrastiveLoss(), pixelss.MultiScaleAttentiveLoss()
    for steps, lr, momentum, blocks in ((50, 0.02, 0.9, False), (100, 0.04, 0.0, True)):
        optimizer = torch.optim.SGD(student.parameters(), lr=lr, momentum=momentum, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
        teacher = pixelss.EMATeacher(student, momentum=0.99)
        for _ in range(steps):
            images, tags, _ = batch([pool[i] for i in rng.choice(len(pool), 16, replace=False)])
            out = pixelss.multi_scale_forward(student, images)
            loss = torch.stack([bce(o.logits, tags) for o in out]).mean()
            if blocks:
                taught = pixelss.multi_scale_forward(teacher, images)
                mask = region(pixelss.msinf_cam([o.cam for o in taught], tags), tags)
                bank.update(taught[1].features, mask)
                cams = [[pixelss.normalize_cam(o.cam) for o in one] for one in (out, taught)]
                loss = loss + rcl(out[1].features, mask, bank.prototypes, bank.filled) + mal(*cams, tags)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            teacher.update(student)
    kept.parent.mkdir(exist_ok=True)
    torch.save({"stamp": stamp, "model": student.state_dict()}, kept)
    return student.eval()


def prepare() -> None:
    """Train the small network, and keep what the functions below share."""
    global student, scene, image, images, levels, tags, masks, outputs, cam, mask, bank
    student = learn()
    scene = [s for s in scenes(40, seed=1) if len(set(s.names)) == 2][:2]
    image = [s.image for s in scene]
    levels = torch.from_numpy(np.stack(image)).permute(0, 3, 1, 2).contiguous()  # (B, 3, H, W) uint8
    images, tags, masks = batch(scene)
    with torch.no_grad():
        outputs = pixelss.multi_scale_forward(student, images)
    cam = pixelss.msinf_cam([o.cam for o in outputs], tags)
    mask = pixelss.class_region_mask(cam, tags, threshold=THRESHOLD)
    bank = pixelss.PrototypeBank(len(CLASSES))
    many, many_tags, _ = batch(scenes(32, seed=2))
    with torch.no_grad():
        wide = pixelss.multi_scale_forward(student, many)
    wide_cam = pixelss.msinf_cam([o.cam for o in wide], many_tags)
    bank.update(wide[1].features, pixelss.class_region_mask(wide_cam, many_tags, threshold=THRESHOLD))


def as_levels(x: torch.Tensor) -> viz.Pixels:
    """Return one normalised image (3, H, W) as RGB levels (H, W, 3)."""
    return ((x * 0.25 + 0.45).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def head_picture() -> viz.Pixels:
    with torch.no_grad():
        cams = pixelss.normalize_cam(student(images).cam)
    rows = [[image[b], *(viz.overlay_cam(image[b], c) for c in cams[b])] for b in range(2)]
    names = ["tags: " + ", ".join(sorted(set(s.names))) for s in scene]
    return viz.grid(rows, titles=["image", *CLASSES], names=names, heat="CAM")


def scales_picture() -> viz.Pixels:
    rows, names = [], []
    for b, k in tags.nonzero().tolist():
        single = [pixelss.normalize_cam(o.cam)[b, k] for o in outputs]
        rows.append([image[b], *(viz.overlay_cam(image[b], c) for c in [*single, cam[b, k]])])
        names.append(CLASSES[k])
    return viz.grid(rows, titles=["image", "scale 0.5", "scale 1", "scale 2", "msinf_cam"], names=names, heat="CAM")


def climbing_picture() -> viz.Pixels:
    rows, names = [], []
    sums = [pixelss.climb_cam(student, images, tags, iterations=count) for count in (1, 9, 27)]
    for b, k in tags.nonzero().tolist():
        cams = [pixelss.msinf_cam([one], tags, size=images.shape[-2:])[b, k] for one in sums]
        rows.append([image[b], *(viz.overlay_cam(image[b], c) for c in cams)])
        names.append(CLASSES[k])
    return viz.grid(rows, titles=["image", "1 iteration", "9", "27"], names=names, heat="CAM")


def region_picture() -> viz.Pixels:
    rows = []
    for b in range(2):
        regions = [pixelss.class_region_mask(cam, tags, threshold=t)[b] for t in (0.1, THRESHOLD, 0.5)]
        heat = viz.overlay_cam(image[b], cam[b].amax(0))
        rows.append([image[b], heat, *(viz.overlay_mask(image[b], m) for m in [*regions, masks[b]])])
    titles = ["image", "strongest CAM", "threshold 0.1", str(THRESHOLD), "0.5", "truth"]
    return viz.grid(rows, titles=titles, legend=LEGEND, heat="CAM")


def prototype_picture() -> viz.Pixels:
    rows = []
    for b in range(2):
        similarity = viz.prototype_similarity(outputs[1].features[b], bank.prototypes)
        rows.append([image[b], *(viz.overlay_cam(image[b], s) for s in similarity)])
    return viz.grid(rows, titles=["image", "background", *CLASSES], heat="cosine with the prototype")


def contrastive_picture() -> viz.Pixels:
    features, rows = outputs[1].features, []
    pixel = {"reduction": "none", "filled": bank.filled}
    loss = pixelss.regional_contrastive_loss(features, mask, bank.prototypes, **pixel)
    labelled = [torch.full_like(mask, k) for k in range(len(bank.prototypes))]
    every = [pixelss.regional_contrastive_loss(features, m, bank.prototypes, **pixel) for m in labelled]
    nearest = torch.stack(every).argmin(0)  # the class whose loss is the smallest
    for b in range(2):
        heat = viz.overlay_cam(image[b], loss[b] / loss.max())
        maps = [viz.overlay_mask(image[b], m[b]) for m in (mask, nearest)]
        rows.append([image[b], maps[0], heat, maps[1]])
    titles = ["image", "region mask", "loss of every pixel", "nearest prototype"]
    return viz.grid(rows, titles=titles, legend=LEGEND, heat=f"loss / {loss.max():.2f}")


def pixel_prototype_picture() -> viz.Pixels:
    views = [pixelss.normalize_cam(out.cam) * tags[:, :, None, None] for out in outputs[:2]]
    labels = [pixelss.class_region_mask(view, tags) for view in views]
    cells = torch.zeros_like(mask)  # the highest scores of each class in both images: an eighth of one
    for k in tags.any(0).nonzero().flatten().tolist():
        highest = views[1][:, k].flatten().topk(mask[0].numel() // 8).indices
        cells.view(-1)[highest] = k + 1
    rows = [[image[b], *(viz.overlay_mask(image[b], m[b]) for m in [*labels, cells])] for b in range(2)]
    titles = ["image", "labels, scale 0.5", "labels, scale 1", "cells of prototypes"]
    return viz.grid(rows, titles=titles, legend=LEGEND)


def attentive_picture() -> viz.Pixels:
    b, k = tags.nonzero()[1].tolist()
    cams = torch.stack([pixelss.normalize_cam(o.cam)[b, k, None] for o in outputs])  # (S, P, H, W), here P = 1
    plain, target = (pixelss.attentive_target(cams, cams, attentive=a) for a in (False, True))
    rows = [[viz.overlay_cam(image[b], c[s, 0]) for s in range(3)] for c in (cams, plain, target)]
    names = ["student's CAM", "target of MMM", "target of MAM"]
    return viz.grid(rows, titles=["scale 0.5", "scale 1", "scale 2"], names=names, heat="CAM or target (above 1: 1)")


def subcategory_picture() -> viz.Pixels:
    pool = scenes(200, seed=2)
    many, many_tags, _ = batch(pool)
    with torch.no_grad():
        pooled = student(many).features.mean((2, 3))
    generator = torch.Generator().manual_seed(0)
    found = pixelss.subcategory_tags(pooled, many_tags, clusters=3, generator=generator)[:, :3]  # of the first class
    rows = [[pool[i].image for i in own.nonzero()[:5, 0].tolist()] for own in found.unbind(1)]
    return viz.grid(rows, names=[f"{CLASSES[0]} {c}" for c in range(3)])


def proportional_picture() -> viz.Pixels:
    claimed = cam > 0.15  # low, so that they overlap
    shared = pixelss.proportional_mask(cam, claimed, tags)
    rows = []
    for b in range(2):
        own = [torch.where(claimed[b, k], k + 1, 0) for k in tags[b].nonzero()[:, 0].tolist()]
        maps = [*own, pixelss.class_region_mask(cam, tags, threshold=0.15)[b], shared[b]]
        rows.append([image[b], *(viz.overlay_mask(image[b], m) for m in maps)])
    titles = ["image", "claimed by one", "by the other", "the larger CAM", "the larger share"]
    return viz.grid(rows, titles=titles, legend=LEGEND)


def direct_picture() -> viz.Pixels:
    rows, names = [], []
    for b, k in tags.nonzero().tolist():
        target = (mask[b] == k + 1).float()
        loss = torch.nn.functional.binary_cross_entropy(cam[b, k].clamp(1e-6, 1 - 1e-6), target, reduction="none")
        heat = [viz.overlay_cam(image[b], c) for c in (cam[b, k], (loss / 2).clamp(max=1))]
        rows.append([image[b], viz.overlay_mask(image[b], mask[b]), *heat])
        names.append(CLASSES[k])
    titles = ["image", "region mask", "CAM", "loss of every pixel"]
    return viz.grid(rows, titles=titles, names=names, legend=LEGEND, heat="CAM, or loss / 2")


def complementary_picture() -> viz.Pixels:
    *parts, share = pixelss.complementary_pair(images, patch=24, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        full, kept, hidden = (pixelss.normalize_cam(student(part).cam) for part in (images, *parts))
    r = share[:, None, None, None]
    together = r * kept + (1 - r) * hidden
    rows, names = [], []
    for b, k in tags.nonzero().tolist():
        maps = (full, together, (full - together).abs())
        heat = [viz.overlay_cam(image[b], one[b, k]) for one in maps]
        rows.append([image[b], *(as_levels(part[b]) for part in parts), *heat])
        names.append(CLASSES[k])
    titles = ["image", "kept", "hidden", "CAM of the image", "of its parts", "distance"]
    return viz.grid(rows, titles=titles, names=names, heat="CAM or distance")


def puzzle_picture() -> viz.Pixels:
    with torch.no_grad():
        full = student(images).cam
        merged = pixelss.merge_tiles(student(pixelss.split_tiles(images)).cam)
    rows, names = [], []
    for b, k in tags.nonzero().tolist():
        maps = [one[b, k].relu() for one in (full, merged)]
        peak = torch.stack(maps).max()
        heat = [viz.overlay_cam(image[b], one / peak) for one in (*maps, (maps[0] - maps[1]).abs())]
        rows.append([image[b], *heat])
        names.append(CLASSES[k])
    titles = ["image", "CAM", "merged of four tiles", "distance"]
    return viz.grid(rows, titles=titles, names=names, heat="raw CAM, / the row's maximum")


def direction_picture() -> viz.Pixels:
    many, many_tags, _ = batch(scenes(80, seed=4))
    with torch.no_grad():
        wide = student(torch.cat([images, many]))
    norm = torch.nn.BatchNorm2d(wide.features.shape[1], affine=False)
    features, own = norm(wide.features), pixelss.normalize_cam(wide.cam)
    direction = pixelss.IntraClassDirection(len(CLASSES), features.shape[1])
    for _ in range(50):
        direction.update(features[2:], own[2:], many_tags)
    scores, rows, names = direction(features[:2]), [], []
    for b, k in tags.nonzero().tolist():
        sides = [(sign * scores[b, k]).relu() / scores[b, k].abs().max() for sign in (1, -1)]
        rows.append([image[b], *(viz.overlay_cam(image[b], c) for c in (own[b, k], *sides))])
        names.append(CLASSES[k])
    titles = ["image", "CAM", "score above 0", "below 0"]
    return viz.grid(rows, titles=titles, names=names, heat="CAM, or |score| / its maximum")


def teacher_picture() -> viz.Pixels:
    noisy = copy.deepcopy(student)
    teacher = pixelss.EMATeacher(noisy, momentum=0.9)
    generator, columns = torch.Generator().manual_seed(0), []
    for step in range(30):  # a student thrown about by noise, in place of training
        for weight, start in zip(noisy.parameters(), student.parameters(), strict=True):
            noise = torch.randn(weight.shape, generator=generator)
            weight.data = start.data + 1.2 * start.data.std() * noise
        teacher.update(noisy)
        if step >= 27:
            columns.append([pixelss.normalize_cam(net(images).cam.detach()) for net in (noisy, teacher)])
    b, k = tags.nonzero()[0].tolist()
    rows = [[viz.overlay_cam(image[b], column[i][b, k]) for column in columns] for i in range(2)]
    return viz.grid(rows, titles=["step 28", "step 29", "step 30"], names=["student", "teacher"], heat="CAM")


def erasing_picture() -> viz.Pixels:
    rows, names = [], []
    for b, k in tags.nonzero().tolist():
        other = next(n for n in tags[b].nonzero().flatten().tolist() if n != k)
        chosen = torch.eye(len(CLASSES))[None, k]
        with torch.no_grad():
            erase = pixelss.erasing_mask(outputs[1].cam[b, None], chosen)
            after = pixelss.normalize_cam(student(images[b, None] * (1 - erase)).cam)[0, other]
        heat = viz.overlay_cam(image[b], erase[0, 0])
        left = as_levels(images[b] * (1 - erase[0]))
        rows.append([image[b], heat, left, viz.overlay_cam(left, after)])
        names.append(CLASSES[k])
    titles = ["image", "erasing mask", "erased", "CAM of the other class"]
    return viz.grid(rows, titles=titles, names=names, heat="mask or CAM")


def hiding_picture() -> viz.Pixels:
    rows = []
    for patch in (16, 32):
        generator = torch.Generator().manual_seed(1)
        parts = pixelss.complementary_pair(images, patch=patch, generator=generator)[:2]
        rows.append([cell for b in range(2) for cell in (image[b], *(as_levels(part[b]) for part in parts))])
    titles = ["image", "kept", "hidden"] * 2
    return viz.grid(rows, titles=titles, names=["patch=16", "patch=32"])


def crf_picture() -> viz.Pixels:
    probs = torch.cat([pixelss.background_score(cam, alpha=2), cam], dim=1)
    columns = {
        "CAM": probs,
        "PAR": pixelss.pixel_adaptive_refinement(levels, probs),
        "CRF": pixelss.dense_crf(levels, probs, bilateral=(20.0, 13.0, 10.0)),  # sxy: these images are small
    }
    maps, titles = [], []
    for name, scores in columns.items():
        metric = pixelss.ConfusionMatrix(len(CLASSES) + 1)
        metric.update(scores.argmax(1), masks)
        maps.append(scores.argmax(1))
        titles.append(f"{name}, mIoU {100 * metric.compute().miou:.0f}")
    rows = [[image[b], *(viz.overlay_mask(image[b], m[b]) for m in (*maps, masks))] for b in range(2)]
    return viz.grid(rows, titles=["image", *titles, "truth"], legend=LEGEND)


def adaptive_picture() -> viz.Pixels:
    return crf_picture()  # the same images: compare


@cache
def affinity_net() -> tuple[torch.Tensor, ...]:
    """Train a small AffinityNet; return CAMs and both label maps at its cells, affinities before and after."""
    many, many_tags, _ = batch(scenes(48, seed=3))
    double = torch.nn.functional.interpolate(torch.cat([images, many]), scale_factor=2, mode="bilinear")
    with torch.no_grad():  # features of two depths at 24 x 24 cells, and the CAM there
        half, _, deep = student[0].forward_taps(double)  # of the last three convolutions
        small = pixelss.msinf_cam([student[1](deep).cam], torch.cat([tags, many_tags]))
    low, high = (torch.cat([pixelss.background_score(small, alpha=a), small], 1).argmax(1) for a in (1, 6))
    head = pixelss.AffinityHead((128, 128), dims=(32, 64))
    optimizer, pairs = torch.optim.Adam(head.parameters(), lr=0.003), pixelss.affinity_labels(low, high)
    with torch.no_grad():
        before = head([half[:2], deep[:2]])
    for start in range(60):
        some = slice(2 + start % 6 * 8, 10 + start % 6 * 8)
        loss = pixelss.affinity_loss(head([half[some], deep[some]]), pairs[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = head([half[:2], deep[:2]])
    return small[:2], low[:2], high[:2], before, after


def large(cells: torch.Tensor) -> torch.Tensor:
    """Return label maps of cells at the images' size."""
    return cells.repeat_interleave(4, -1).repeat_interleave(4, -2)


def net_picture() -> viz.Pixels:
    *_, before, after = affinity_net()
    rows = []
    for b in range(2):
        alike = [a[b].sum(0) / (a[b] > 0).sum(0) for a in (before, after)]  # mean over a cell's partners
        rows.append([image[b], *(viz.overlay_cam(image[b], (1 - a) / (1 - a).max()) for a in alike)])
    heat = "1 - mean affinity of a cell, / its maximum"
    return viz.grid(rows, titles=["image", "untrained", "trained"], heat=heat)


def labels_picture() -> viz.Pixels:
    _, low, high, *_ = affinity_net()
    known = (pixelss.affinity_labels(low, high) != 255).float().mean(1)
    rows = []
    for b in range(2):
        maps = [viz.overlay_mask(image[b], large(m[b])) for m in (low, high)]
        rows.append([image[b], *maps, viz.overlay_cam(image[b], known[b])])
    return viz.grid(rows, titles=["image", "low", "high", "known pairs"], legend=LEGEND, heat="share of known pairs")


def walk_picture() -> viz.Pixels:
    small, *_, affinity = affinity_net()
    scores = torch.cat([pixelss.background_score(small, alpha=3), small], 1)
    walked = pixelss.random_walk(scores, affinity, log_steps=4)
    rows, names = [], []
    for b, k in tags.nonzero().tolist():
        heat = [viz.overlay_cam(image[b], s[b, k + 1] / s[b, k + 1].max()) for s in (scores, walked)]
        maps = [viz.overlay_mask(image[b], large(s[b].argmax(0))) for s in (scores, walked)]
        rows.append([image[b], *heat, *maps])
        names.append(CLASSES[k])
    titles = ["image", "before", "after 16 steps", "labels before", "labels after"]
    return viz.grid(rows, titles=titles, names=names, legend=LEGEND, heat="score / its maximum")


def smoothing_picture() -> viz.Pixels:
    smoothed = pixelss.variation_smoothing(cam, strength=1.0)
    rows, names = [], []
    for b, k in tags.nonzero().tolist():
        heat = [viz.overlay_cam(image[b], c[b, k]) for c in (cam, smoothed)]
        rows.append([image[b], *heat, viz.overlay_mask(image[b], masks[b])])
        names.append(CLASSES[k])
    return viz.grid(rows, titles=["image", "CAM", "smoothed", "truth"], names=names, legend=LEGEND, heat="CAM")


def difference_picture() -> viz.Pixels:
    probs = torch.cat([pixelss.background_score(cam, alpha=2), cam], dim=1)
    strong = pixelss.dense_crf(levels, probs, bilateral=(40.0, 20.0, 10.0))  # too strong for images this small
    before, after = probs.argmax(1), strong.argmax(1)
    lost = pixelss.lost_classes(before, after, len(CLASSES))
    undecided = torch.zeros_like(cam[:, :1])  # the logits of no network: flags and bias alone
    merged = pixelss.merge_by_difference(before, after, undecided, undecided, lost)
    maps = [before, after, merged, masks]
    rows = [[image[b], *(viz.overlay_mask(image[b], m[b]) for m in maps)] for b in range(2)]
    return viz.grid(rows, titles=["image", "CAM", "after a CRF", "merged", "truth"], legend=LEGEND)


def segmentation_net() -> torch.nn.Module:
    """Train a small segmentation network on pseudo-labels of CAM and CRF."""
    pool = scenes(48, seed=3)
    many, many_tags, _ = batch(pool)
    with torch.no_grad():
        seeds = pixelss.msinf_cam([o.cam for o in pixelss.multi_scale_forward(student, many)], many_tags)
    probs = torch.cat([pixelss.background_score(seeds, alpha=2), seeds], dim=1)
    pixels = torch.stack([torch.from_numpy(s.image).permute(2, 0, 1) for s in pool])
    pseudo = pixelss.dense_crf(pixels, probs, bilateral=(20.0, 13.0, 10.0)).argmax(1)

    backbone, head = copy.deepcopy(student[0]), pixelss.LargeFOV(128, len(CLASSES))
    net = torch.nn.Sequential(backbone, head)
    groups = [{"params": backbone.parameters(), "lr": 0.0003}, {"params": head.parameters(), "lr": 0.003}]
    optimizer = torch.optim.Adam(groups)
    for _ in range(100):
        some = torch.randperm(len(pool))[:4]
        double = torch.nn.functional.interpolate(many[some], scale_factor=2, mode="bilinear")
        loss = pixelss.multi_scale_cross_entropy([net(double)], pseudo[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def segmentation_picture() -> viz.Pixels:
    found = pixelss.multi_scale_inference(segmentation_net(), images, scales=(1.5, 2.0)).argmax(1)  # no tags needed
    rows = [[image[b], *(viz.overlay_mask(image[b], m[b]) for m in (found, masks))] for b in range(2)]
    return viz.grid(rows, titles=["image (not trained on)", "LargeFOV", "truth"], legend=LEGEND)


def metrics_picture() -> viz.Pixels:
    many, tags, truth = batch(scenes(60, seed=1))
    with torch.no_grad():
        out = pixelss.multi_scale_forward(student, many)
    curves = {}
    for name, chosen in (("scale 0.5", out[:1]), ("scale 1", out[1:2]), ("scale 2", out[2:]), ("all three", out)):
        sweep = pixelss.ThresholdSweep(len(CLASSES))
        sweep.update(pixelss.msinf_cam([o.cam for o in chosen], tags), truth)
        scores = sweep.compute()
        curves[name] = (scores.thresholds, scores.miou)
    return viz.threshold_curves(curves)


def overlays_picture() -> viz.Pixels:
    rows = []
    for b in range(2):
        similarity = viz.prototype_similarity(outputs[1].features[b], bank.prototypes[1:]).max(0)
        heat = [viz.overlay_cam(image[b], c) for c in (cam[b].amax(0), similarity)]
        rows.append([image[b], viz.overlay_mask(image[b], masks[b]), *heat])
    return viz.grid(rows, titles=["image", "overlay_mask", "overlay_cam", "prototype_similarity"])


def plots_picture() -> viz.Pixels:
    rows = [[image[b], viz.overlay_mask(image[b], masks[b]), viz.overlay_cam(image[b], cam[b].amax(0))] for b in (0, 1)]
    titles, names = ["image", "mask", "CAM"], ["first", "second"]
    return viz.grid(rows, titles=titles, names=names, legend=LEGEND, heat="CAM")


PICTURES = {name.removesuffix("_picture"): draw for name, draw in globals().items() if name.endswith("_picture")}


def main() -> None:
    """Draw every picture unless all are up to date."""
    sources = [Path(__file__), *(ROOT / "examples").glob("s*.py"), *(ROOT / "src").rglob("*.py")]
    stamp = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()
    if (OUT / "stamp").exists() and (OUT / "stamp").read_text() == stamp:
        return
    OUT.mkdir(exist_ok=True)
    prepare()
    for name, draw in PICTURES.items():
        torch.manual_seed(0)
        Image.fromarray(draw()).save(OUT / f"{name}.png", optimize=True)
    (OUT / "stamp").write_text(stamp)


if __name__ == "__main__":
    argparse.ArgumentParser(description="Draw the pages' pictures into docs/_pictures, unless up to date.").parse_args()
    main()
