"""Stage make_labels: the walk on either kind of affinities, and what refines its result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from config import Config
from make_labels import make_labels
from networks import build_affinity
from stages import Run
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

import pixelss
from tests.voc.runs import cam_of, config, new_run, write_random_cams

STEPS = {"make_labels.log_steps": 1, "affinity.radius": 3}


def labelled(root: Path, out: Path, **changes: Any) -> Run:
    """A run of make_labels on random CAMs and an untrained affinity network."""
    made = new_run(root, out, settings=config(**STEPS, **changes))
    write_random_cams(made, "train")
    torch.manual_seed(0)
    made.folder("train_affinity").mkdir()
    torch.save(sharpened(made.config).state_dict(), made.folder("train_affinity") / "model.pt")
    make_labels(made)
    return made


def sharpened(settings: Config) -> torch.nn.Sequential:
    """An untrained network whose boundaries, if it has some, are well below and above one half."""
    network = build_affinity(settings)
    if settings.affinity.kind == "path":
        network[1].join.weight.data *= 20
    return network


def dense_walk(scores: Tensor, boundary: Tensor, radius: int, beta: float, steps: int) -> Tensor:
    """IRNet's walk in loops: a cell of a path is less than 1 from the line between its ends."""
    h, w = boundary.shape
    cells = [(y, x) for y in range(h) for x in range(w)]
    matrix = torch.eye(h * w, dtype=torch.float64)
    for i, (y, x) in enumerate(cells):
        for j, (v, u) in enumerate(cells):
            dy, dx = v - y, u - x
            if (dy, dx) != (0, 0) and dy * dy + dx * dx < radius * radius:
                path = [
                    boundary[a, b]
                    for a in range(min(y, v), max(y, v) + 1)
                    for b in range(min(x, u), max(x, u) + 1)
                    if (dy * (b - x) - dx * (a - y)) ** 2 < dy * dy + dx * dx
                ]
                matrix[i, j] = (1 - max(path)) ** beta
    walk = torch.linalg.matrix_power(matrix / matrix.sum(0), steps)
    return ((scores * (1 - boundary)).flatten(1) @ walk).view(-1, h, w)


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What random walks give, in the order of the images."""
    results: list[Tensor] = []
    whole = pixelss.random_walk
    monkeypatch.setattr(pixelss, "random_walk", lambda *a, **k: results.append(whole(*a, **k)) or results[-1])
    return results


@pytest.mark.parametrize(("beta", "radius"), [("null", "null"), (4, 2)])
def test_boundaries_walk_with_irnet_s_settings(
    shapes: Path, tmp_path: Path, walked: list[Tensor], beta: object, radius: object
) -> None:
    changes = {
        "affinity.kind": "path",
        "make_labels.beta": beta,
        "make_labels.radius": radius,
        "make_labels.crf": "null",
    }
    made = labelled(shapes, tmp_path / "run", **changes)
    torch.manual_seed(0)
    network = sharpened(made.config).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for stem, found in list(zip(made.data.stems("train"), walked, strict=False))[:2]:  # of two shapes
        image = ((torch.from_numpy(made.data.image(stem)) / 255 - mean) / std).permute(2, 0, 1)[None]
        with torch.no_grad():
            boundary = network(image).sigmoid()[0, 0].double()
        cam = cam_of(stem, made)[None]
        present = [0, *(1 + c for c in range(4) if made.data.tags(stem)[c])]
        scores = torch.cat([(1 - cam.amax(1, keepdim=True)) ** made.config.make_labels.alpha, cam], 1)[:, present]
        cells = adaptive_avg_pool2d(scores, boundary.shape)[0].double()
        wanted = dense_walk(cells, boundary, 3 if radius == "null" else 2, 10 if beta == "null" else 4, 2)
        torch.testing.assert_close(found[0].double(), wanted, rtol=1e-4, atol=1e-6)
        mask = interpolate(found, scores.shape[2:], mode="bilinear")[0].argmax(0)
        assert (made.data.mask(stem, folder=made.folder("make_labels")) == torch.tensor(present)[mask].numpy()).all()


def test_pixel_adaptive_refinement_takes_the_crf_s_place(shapes: Path, tmp_path: Path, walked: list[Tensor]) -> None:
    masks = {}
    for name, changes in (
        ("none", {"make_labels.crf": "null"}),
        ("crf", {}),
        ("par", {"make_labels.par": "{}"}),
        ("par alone", {"make_labels.crf": "null", "make_labels.par.size": "null"}),
    ):
        made = labelled(shapes, tmp_path / name, **changes)
        masks[name] = {s: made.data.mask(s, folder=made.folder("make_labels")) for s in made.data.stems("train")}
    for first, second in (("none", "par"), ("crf", "par"), ("none", "crf"), ("par", "par alone")):
        assert any((masks[first][stem] != masks[second][stem]).any() for stem in masks["none"])

    walked.clear()
    made = labelled(shapes, tmp_path / "again", **{"make_labels.par": "{}"})
    for stem, result in zip(made.data.stems("train"), walked, strict=False):
        image = torch.from_numpy(made.data.image(stem)).permute(2, 0, 1)[None]
        scores = interpolate(result, image.shape[2:], mode="bilinear")
        refined = pixelss.pixel_adaptive_refinement(image, scores, size=0.5)  # as AFA runs it
        present = [0, *(1 + c for c in range(4) if made.data.tags(stem)[c])]
        assert (torch.tensor(present)[refined[0].argmax(0)].numpy() == masks["par"][stem]).all()
