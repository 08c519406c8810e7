"""Stage infer_cam: its CAMs are the library's, whatever was there before."""

from __future__ import annotations

import json
from pathlib import Path

import inference
import numpy as np
import pytest
import torch
from data import BadFileError
from infer_cam import cam_path, infer_cam, write_cams
from networks import build_cam
from PIL import Image
from score_cam import score_cam
from shapes import write_shapes

import pixelss
from tests.voc.runs import cam_of, config, new_run


def test_cam_of_infer_cam_is_the_library_s(shapes: Path, tmp_path: Path) -> None:
    made = new_run(shapes, tmp_path / "run")
    infer_cam(made)
    network = build_cam(made.config, 4).eval()
    network.load_state_dict(torch.load(made.folder("train_cam") / "model.pt", weights_only=True))
    stem = made.data.stems("train")[1]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    image = ((torch.from_numpy(made.data.image(stem)) / 255 - mean) / std).permute(2, 0, 1)[None]
    cams = []
    for scale in (0.5, 1.0, 1.5, 2.0):
        for flipped in (False, True):
            with torch.no_grad():
                (output,) = pixelss.multi_scale_forward(network, image.flip(-1) if flipped else image, scales=[scale])
            cams.append(output.cam.flip(-1) if flipped else output.cam)
    wanted = pixelss.msinf_cam(cams, made.data.tags(stem)[None])[0]
    torch.testing.assert_close(cam_of(stem, made), wanted, rtol=0, atol=0.5 / 255 + 1e-4)


def test_infer_cam_continues_and_scores_name_a_damaged_file(shapes: Path, tmp_path: Path) -> None:
    made = new_run(
        shapes, tmp_path / "run", settings=config(**{"infer_cam.single_scales": True, "infer_cam.max_batch": 1})
    )
    infer_cam(made)
    stems = made.data.stems("train")
    files = {stem: cam_path(made, stem).read_bytes() for stem in stems}
    assert cam_of(stems[0], made).shape == (4, 40, 40)
    assert cam_of(stems[1], made).shape == (4, 30, 40)
    dates = {stem: cam_path(made, stem).stat().st_mtime_ns for stem in stems}
    cam_path(made, stems[0]).unlink()
    cam_path(made, stems[1]).write_bytes(files[stems[1]][:60])
    infer_cam(made)
    assert {stem: cam_path(made, stem).read_bytes() for stem in stems} == files
    assert [s for s in stems if cam_path(made, s).stat().st_mtime_ns != dates[s]] == stems[:2]
    score_cam(made)
    assert list(json.loads((made.out / "score_cam/scores.json").read_text())["single_scales"]) == [
        "0.5", "1.0", "1.5", "2.0"
    ]  # fmt: skip

    cam_path(made, stems[2]).write_bytes(b"no PNG")
    with pytest.raises(BadFileError, match=rf"{stems[2]}.png is no CAM file of infer_cam"):
        score_cam(made)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(cam_path(made, stems[2]))
    with pytest.raises(BadFileError, match=stems[2]):
        score_cam(made)
    made.config.data.on_bad_file = "skip"
    with pytest.warns(UserWarning, match=f"left out: .*{stems[2]}"):
        score_cam(made)


def test_a_process_that_starts_late_still_does_its_share(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = new_run(shapes, tmp_path / "run")
    for rank in (0, 1):
        monkeypatch.setattr(inference, "share", lambda items, rank=rank: items[rank::2])
        infer_cam(made)
    assert all(cam_path(made, stem).is_file() for stem in made.data.stems("train"))


def test_a_name_that_is_listed_twice_is_written_by_two_threads(shapes: Path, tmp_path: Path) -> None:
    made = new_run(shapes, tmp_path / "run", settings=config(workers=4))
    stems = made.data.stems("val")[:4]
    write_cams(made, [stem for stem in stems for _ in range(4)])
    assert {path.name for path in made.folder("infer_cam").iterdir()} == {f"{stem}.png" for stem in stems}


def test_damaged_image_stops_or_is_left_out(tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "set", train=4, val=1, size=40)
    bad = root / "JPEGImages" / "train_0002.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    made = new_run(root, tmp_path / "run")
    with pytest.raises(BadFileError, match=r"train_0002.jpg"):
        infer_cam(made)
    made.config.data.on_bad_file = "skip"
    with pytest.warns(UserWarning, match=r"left out: .*train_0002.jpg"):
        infer_cam(made)
    assert sorted(path.stem for path in made.folder("infer_cam").glob("*.png")) == [
        "train_0000", "train_0001", "train_0003"
    ]  # fmt: skip
