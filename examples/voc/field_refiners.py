"""What makes other CAMs, or masks, of a run's CAMs, in the table of the field.

A refiner takes a run and returns what refines an image: to CAMs, which are then scored as any others and after a CRF,
or to masks. A new one is a function and an entry in `CAMS` or `MASKS`.
"""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from config import CRF, PAR, Config
from crf_labels import REFINERS, refined_masks, with_background
from infer_cam import cam_path
from inference import shared_batches, to_input, writing
from networks import AFFINITIES, load_trained
from numpy.typing import NDArray
from parallel import barrier, rank
from run import execute
from runfolder import open_run
from stages import Run
from storage import load_cam
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate, one_hot
from train_affinity import kind_by_kind, zone_by_zone

import pixelss
from pixelss.io import write_mask

Array = NDArray[np.uint8]
Cams = Callable[[str], Tensor]  # an image's name -> its CAMs (N, H, W)
# (image, S sets of scores (S, 1 + P, H, W) of background and present classes, tags) -> S masks (H, W)
Masks = Callable[[Array, Tensor, Tensor], Sequence[Array]]
BACKGROUNDS = [t / 100 for t in range(10, 75, 5)]  # constant ones that masks are swept over


class Refiner(NamedTuple):
    """A refiner, and the functions and classes whose lines are its code."""

    make: Callable[[Run], Any]
    code: tuple[Callable[..., object], ...] = ()


def plain(run: Run) -> Cams:
    """The run's CAMs as they are."""
    return lambda stem: load_cam(cam_path(run, stem), run.data.num_classes)


def smoothed(run: Run) -> Cams:
    """PMM: lift what is half active."""
    cams = plain(run)
    return lambda stem: pixelss.variation_smoothing(cams(stem)[None])[0]


def walked(run: Run, kind: str) -> Cams:
    """CAMs that walk on learned affinities, no background beside them."""
    run = _with_affinities(run, kind)
    affinities, radius, cams = AFFINITIES[kind], run.config.affinity.radius, plain(run)
    beta, log_steps = run.config.make_labels.beta or affinities.beta, run.config.make_labels.log_steps
    network = load_trained(run, "train_affinity")

    @torch.inference_mode()
    def walk(stem: str) -> Tensor:
        image, cam = run.data.image(stem), cams(stem)[None].to(run.device)
        output = network(to_input(run, [image])[1])
        cells = affinities.walkers(adaptive_avg_pool2d(cam, output.shape[-2:]), output)
        pairs = affinities.pairs(output, radius)
        scores = pixelss.random_walk(cells, pairs, beta=beta, log_steps=log_steps, radius=radius)
        return pixelss.normalize_cam(interpolate(scores, image.shape[:2], mode="bilinear"))[0]

    return walk


def by_crf(run: Run) -> Masks:
    """The dense CRF that CAMs of every row are scored after."""
    return partial(refined_masks, settings=run.config.infer_cam.crf or CRF())


def by_par(run: Run) -> Masks:
    """PAR in the CRF's place."""
    return partial(refined_masks, settings=run.config.infer_cam.par or PAR())


def merged(run: Run) -> Masks:
    """SSDD: at every pixel the label before the CRF or that after it, whichever's difference is harder to foresee."""
    crf, N = by_crf(run), run.data.num_classes
    cam_network, foresee = load_trained(run, "train_cam"), _trained_difference(run)

    @torch.inference_mode()
    def merge(image: Array, sets: Tensor, tags: Tensor) -> Sequence[Array]:
        before, after = _before_and_after(image, sets, tags, crf)
        features = cam_network(to_input(run, [image])[1]).features.expand(len(sets), -1, -1, -1)
        logits = [foresee(features, mask) for mask in (before, after)]
        lost = pixelss.lost_classes(before, after, N)
        masks = pixelss.merge_by_difference(before, after, logits[0], logits[1], lost, bias=0.1, background=0.1)
        return [mask.numpy() for mask in masks.to(torch.uint8).cpu()]

    return merge


class DifferenceNet(nn.Module):
    """Logits (B, 1, H, W) of where a label map will change, from features (B, D, h, w) and the map (B, H, W).

    It works at a quarter of the map's size. SSDD's has more layers, and features of two depths.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.reduce = nn.Conv2d(dim, 32, 1)
        self.foresee = nn.Sequential(nn.Conv2d(33 + num_classes, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 1, 1))

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        shown = one_hot(mask, self.num_classes + 1).permute(0, 3, 1, 2).to(features)
        H, W = mask.shape[-2:]
        shown = adaptive_avg_pool2d(shown, (-(-H // 4), -(-W // 4)))
        reduced = interpolate(self.reduce(features).relu(), shown.shape[-2:], mode="bilinear")
        logits: Tensor = self.foresee(torch.cat([reduced, shown], 1))
        return interpolate(logits, mask.shape[-2:], mode="bilinear")


def _trained_difference(run: Run) -> DifferenceNet:
    """Return a network that has learned from the training list, with as many iterations as an affinity network.

    Every image has a background drawn from those of the sweep. Every process learns the same; killed, it begins anew.
    """
    execute(run, ["infer_cam"])  # of the images that it is trained on too
    torch.manual_seed(run.config.seed)
    rng, crf, cams = np.random.default_rng(run.config.seed), by_crf(run), plain(run)
    cam_network, N = load_trained(run, "train_cam"), run.data.num_classes
    network = DifferenceNet(run.config.network.dim, N).to(run.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.003)
    stems, schedule = run.data.stems(run.config.data.train), run.config.affinity.schedule
    for _ in range(schedule.iterations or round(schedule.epochs * len(stems) / schedule.batch)):
        losses = []
        backgrounds = rng.choice(BACKGROUNDS, schedule.batch)
        for stem, background in zip(rng.choice(stems, schedule.batch), backgrounds, strict=True):
            image, tags, cam = run.data.image(stem), run.data.tags(stem), cams(stem)[None].to(run.device)
            scores = with_background(cam, tags, torch.full_like(cam[:, :1], background))
            before, after = _before_and_after(image, scores, tags, crf)
            with torch.no_grad():
                features = cam_network(to_input(run, [image])[1]).features
            lost = pixelss.lost_classes(before, after, N)
            losses += [pixelss.difference_loss(network(features, m), before, after, lost) for m in (before, after)]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    return network.eval()


def _before_and_after(image: Array, sets: Tensor, tags: Tensor, crf: Masks) -> tuple[Tensor, Tensor]:
    """Return label maps (S, H, W) of sets of scores, and the same after a CRF."""
    masks = refined_masks(image, sets, tags, None), crf(image, sets, tags)
    before, after = (torch.from_numpy(np.stack(one)).long().to(sets.device) for one in masks)
    return before, after


CAMS: dict[str, Refiner] = {
    "none": Refiner(plain),
    "PMM": Refiner(smoothed, (smoothed,)),
    "AffinityNet": Refiner(partial(walked, kind="features"), (walked, kind_by_kind)),
    "IRNet": Refiner(partial(walked, kind="path"), (walked, kind_by_kind)),
    "BES": Refiner(partial(walked, kind="zones"), (walked, zone_by_zone)),
}
MASKS: dict[str, Refiner] = {
    "dense CRF": Refiner(by_crf, (by_crf,)),
    "PAR": Refiner(by_par, (by_par,)),
    "SSDD": Refiner(merged, (merged, DifferenceNet, _trained_difference, _before_and_after)),
}


def _with_affinities(run: Run, kind: str) -> Run:
    """Return a run with the network and the CAMs of `run`, copied, that has learned affinities of a kind."""
    execute(run, ["infer_cam"])  # of the images that the affinities are trained on too
    affinity: Any = replace(run.config.affinity, kind=kind)  # type: ignore[arg-type]
    folders = {stage: run.folder(stage) for stage in ("train_cam", "infer_cam")}
    copied = derived(run, f"walk-{kind}", replace(run.config, affinity=affinity), folders)
    execute(copied, ["train_affinity"])
    return copied


def derived(run: Run, name: str, config: Config, folders: Mapping[str, Path]) -> Run:
    """Return a run beside `run` with another config, and with copies of folders by the names that they have there."""
    out = run.out.parent.parent / name / run.out.name
    if rank() == 0:
        own = out / "train_cam" / "model.pt"
        if own.is_file() and not filecmp.cmp(own, run.folder("train_cam") / "model.pt", shallow=False):
            shutil.rmtree(out)  # of a network that was trained before this one
        for target, source in folders.items():
            _copy(source, out / target)
    barrier()
    return open_run(config, run.data.root, out, run.device)


def _copy(source: Path, target: Path) -> None:
    if not target.is_dir():
        unfinished = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(source, unfinished)
        unfinished.rename(target)


@torch.inference_mode()
def write_reliable(run: Run, folder: Path) -> None:
    """Write RRM's reliable masks of the training list, void where CAM and CRFs do not agree or are not sure."""
    execute(run, ["infer_cam"])
    config, cams, N = run.config.affinity, plain(run), run.data.num_classes
    trained = (run.folder("train_cam") / "model.pt").stat().st_mtime_ns

    def read(stem: str) -> tuple[Array, Tensor, Tensor]:
        return run.data.image(stem), cams(stem)[None].to(run.device), run.data.tags(stem)

    def done(stem: str) -> bool:
        path = folder / f"{stem}.png"
        return path.is_file() and path.stat().st_mtime_ns >= trained

    batches = shared_batches(run, run.data.stems(run.config.data.train), read, desc="reliable", done=done)
    with writing(run) as write:
        for ((stem, (image, cam, tags)),) in batches:
            alphas = config.alpha_low, config.alpha_high
            scores = torch.cat([with_background(cam, tags, pixelss.background_score(cam, alpha=a)) for a in alphas])
            levels = torch.from_numpy(image).to(run.device).permute(2, 0, 1).expand(2, -1, -1, -1)
            probs = REFINERS[CRF](levels, scores, **asdict(config.crf))
            every = probs.new_zeros(2, N + 1, *probs.shape[-2:])
            every[:, [0, *(tags.nonzero().flatten() + 1).tolist()]] = probs
            mask = pixelss.reliable_mask(cam, every[:1], every[1:], tags[None].to(run.device))
            write(write_mask, folder / f"{stem}.png", mask[0].to(torch.uint8).cpu().numpy())
    barrier()
