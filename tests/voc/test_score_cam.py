"""Stage score_cam, with and without infer_cam, in one process and in two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from infer_cam import infer_cam
from networks import build_cam
from score_cam import score_cam
from shapes import write_shapes

import pixelss
from tests.distributed import run_processes
from tests.voc.runs import cam_of, config, new_run


def test_score_cam_infers_the_scored_images_where_infer_cam_has_not_run(shapes: Path, tmp_path: Path) -> None:
    made = new_run(shapes, tmp_path / "run", settings=config(**{"data.score": "val"}))
    score_cam(made)
    score = (made.out / "score_cam/scores.json").read_text()
    stems = [{path.stem for path in made.folder("infer_cam").glob("*.png")}]
    infer_cam(made)
    stems += [{path.stem for path in made.folder("infer_cam").glob("*.png")}]
    assert stems == [set(made.data.stems("val")), {*made.data.stems("val"), *made.data.stems("train")}]
    score_cam(made)
    assert (made.out / "score_cam/scores.json").read_text() == score


def test_score_cam_scores_the_network_that_is_there(shapes: Path, tmp_path: Path) -> None:
    made = new_run(shapes, tmp_path / "run")
    score_cam(made)
    first = (made.out / "score_cam/scores.json").read_text()
    torch.manual_seed(1)
    torch.save(build_cam(made.config, made.data.num_classes).state_dict(), made.folder("train_cam") / "model.pt")
    score_cam(made)
    assert (made.out / "score_cam/scores.json").read_text() != first


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_cams_are_scored_after_pixel_adaptive_refinement_too(shapes: Path, tmp_path: Path, alpha: float | None) -> None:
    par = {"infer_cam.par.iterations": 3, "infer_cam.par.dilations": [1, 2]}
    made = new_run(shapes, tmp_path / "run", settings=config(**par, **{"infer_cam.crf_alpha": alpha or "null"}))
    score_cam(made)
    scores = json.loads((made.out / "score_cam/scores.json").read_text())
    matrix = pixelss.ConfusionMatrix(5)
    for stem in made.data.stems("train"):
        cam, image = cam_of(stem, made)[None], torch.from_numpy(made.data.image(stem)).permute(2, 0, 1)[None]
        background = torch.full_like(cam[:, :1], scores["threshold"])
        if alpha:
            background = (1 - cam.amax(1, keepdim=True)) ** alpha
        present = [0, *(1 + c for c in range(4) if made.data.tags(stem)[c])]
        probs = torch.cat([background, cam], 1)[:, present]
        refined = pixelss.pixel_adaptive_refinement(image, probs, iterations=3, dilations=(1, 2), size=0.5)
        matrix.update(torch.tensor(present)[refined.argmax(1)], torch.from_numpy(made.data.mask(stem))[None])
    assert scores["par_miou"] == pytest.approx(matrix.compute().miou.item(), abs=1e-6)
    assert made.results("score_cam")["par_miou"] == round(100 * scores["par_miou"], 1)
    assert "crf_miou" in scores


def share_of_the_work(rank: int, root: str, out: str) -> list[float]:
    """Infer and score in one of several processes, with uneven shares."""
    made = new_run(Path(root), Path(out), weights=False)
    infer_cam(made)
    score_cam(made)
    return [made.results("score_cam")["miou"], made.results("score_cam")["crf_miou"]]


def test_two_processes_infer_and_score_as_one(tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "set", train=5, val=1, size=40)
    runs = [new_run(root, tmp_path / name) for name in ("one", "two")]
    one = share_of_the_work(0, str(root), str(runs[0].out))
    two = run_processes(share_of_the_work, 2, str(root), str(runs[1].out))
    assert two == [one, one]
    for stem in runs[0].data.stems("train"):
        torch.testing.assert_close(cam_of(stem, runs[0]), cam_of(stem, runs[1]), rtol=0, atol=1.01 / 255)
