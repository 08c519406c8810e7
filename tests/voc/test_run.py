"""run.py as a user runs it: all stages, restarts, settings that change, messages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tables
import torch
import yaml
from config import Config
from data import BadFileError, VOCFolder
from networks import build_cam, load_start, load_trained
from PIL import Image
from pipeline import STAGES
from run import execute, load_config, main
from runfolder import UserError, open_run
from stages import Run

from tests.processes import run_script
from tests.voc.runs import VOC, VOC_MINI, Call, config, new_run, unfinished


def test_all_stages_give_every_result(finished: tuple[Path, str], shapes: Path) -> None:
    out, printed = finished
    said, _, results = printed.partition("\nstage ")
    assert said.startswith("Training list train: 6 images; 4 classes: beetle ")
    table = ["stage " + results.splitlines()[0], *results.splitlines()[1:]]
    assert [line.split()[0] for line in table if line[0] != " "][1:] == list(STAGES)
    assert max(map(len, table)) <= 80
    assert all((out / stage / "done.json").is_file() for stage in STAGES)
    with Image.open(out / "score_cam" / "curve.png") as curve:
        assert curve.size[0] > 500
    scores = json.loads((out / "score_cam" / "scores.json").read_text())
    assert 0 < scores["miou"] <= 1
    assert len(scores["curve"]["miou"]) == 61
    assert scores["miou"] == max(scores["curve"]["miou"])
    assert np.nanmean(list(scores["iou"].values())) == pytest.approx(scores["miou"])  # the second pass sees the same
    for name, folder in (("train", "make_labels"), ("val", "infer_seg/val"), ("val", "infer_seg/test")):
        for stem in VOCFolder(shapes).stems(name):
            VOCFolder(shapes).mask(stem, folder=out / folder)
    assert yaml.safe_load((out / "config.yaml").read_text())["cam"]["schedule"]["iterations"] == 2
    assert {"data", "torch", "device", "git_revision", "command"} <= json.loads(
        (out / "environment.json").read_text()
    ).keys()
    assert "| background |" in (out / "evaluate" / "table.md").read_text()
    assert not unfinished(out)


def test_restart_skips_finished_stages(finished: tuple[Path, str], shapes: Path, tiny: Path, call: Call) -> None:
    out, printed = finished
    dates = {path: path.stat().st_mtime_ns for path in out.glob("*/*") if path.is_file()}
    (out / ".stages.jsonl.1.tmp").touch()  # of a process that was killed
    again = call(main, "--data", shapes, "--out", out, "--config", VOC / "demo.yaml", "--config", tiny)
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*") if path.is_file()} == dates
    assert again == "stage " + printed.partition("\nstage ")[2]
    assert not unfinished(out)


def test_changed_setting_is_refused_and_named(
    finished: tuple[Path, str], shapes: Path, tiny: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = finished
    kept = (out / "config.yaml").read_bytes()
    base = ("--data", shapes, "--out", out, "--config", VOC / "demo.yaml", "--config", tiny)
    message = call(main, *base, "--cam.threshold", 0.3, "--make_labels.crf", "null", ok=False)
    assert "cam.threshold: 0.2 -> 0.3" in message
    assert "make_labels.crf.iterations: 1 -> None" in message
    assert "cam.temperature" not in message
    assert (out / "config.yaml").read_bytes() == kept
    monkeypatch.setenv("PIXELSS_DEBUG", "1")
    with pytest.raises(UserError, match=r"cam\.threshold"):
        call(main, *base, "--cam.threshold", 0.3)
    settings = load_config([VOC / "demo.yaml", tiny], ["--infer_cam.max_batch=1"])  # memory, not results
    assert open_run(settings, shapes, out, torch.device("cpu")).finished("evaluate")
    with pytest.raises(UserError, match="--data: "):
        open_run(settings, shapes.parent, out, torch.device("cpu"))


def test_settings_of_stages_that_have_not_begun_may_change(shapes: Path, tmp_path: Path) -> None:
    def reopen(**changes: Any) -> Run:
        return open_run(config(**changes), shapes, tmp_path / "out", torch.device("cpu"))

    made = reopen()
    for stage in ("train_cam", "infer_cam", "score_cam"):
        made.folder(stage).mkdir()
        (made.folder(stage) / "done.json").write_text("{}")
    changes: dict[str, Any] = {"seg.tile": 64, "affinity.schedule.batch": 2, "on_nonfinite_loss": "skip"}
    assert reopen(**changes).config.seg.tile == 64
    for name, value, folders in (
        ("cam.threshold", 0.3, "it:"),
        ("seed", 1, "it:"),
        ("infer_cam.scales", [1.0], "infer_cam, score_cam in it:"),
        ("infer_cam.single_scales", True, "infer_cam, score_cam in it:"),
        ("infer_cam.crf", "null", "score_cam in it:"),
        ("data.score", "val", "infer_cam, score_cam in it:"),
    ):
        with pytest.raises(UserError, match=f"or remove {folders}\n  {name}") as caught:
            reopen(**changes, **{name: value})
        assert "seg.tile" not in str(caught.value)
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text())["seg"]["tile"] == 64
    shutil.rmtree(made.folder("train_cam"))
    with pytest.raises(UserError, match=r"or remove infer_cam, score_cam in it:\n  cam\.threshold"):  # made of it
        reopen(**changes, **{"cam.threshold": 0.3})
    shutil.rmtree(made.folder("infer_cam"))
    with pytest.raises(UserError, match=r"or remove score_cam in it:\n  data\.score"):  # of the CAMs that were there
        reopen(**changes, **{"data.score": "val"})
    (made.folder("train_affinity") / "labels" / "low").mkdir(parents=True)
    reopen(**changes)
    (made.folder("train_affinity") / "labels" / "low" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"or remove train_affinity in it:\n  affinity\.schedule\.batch: 2 -> "):
        reopen()


def tags_of_another_image(root: Path) -> None:
    shutil.copy(root / "Annotations/train_0000.xml", root / "Annotations/train_0002.xml")


def another_image(root: Path) -> None:
    Image.new("RGB", (40, 40)).save(root / "JPEGImages/train_0001.jpg")


def a_shorter_list(name: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / f"ImageSets/Segmentation/{name}.txt"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))

    return change


def another_order(root: Path) -> None:
    (root / "classes.txt").write_text("\n".join(reversed((root / "classes.txt").read_text().split())))


@pytest.mark.parametrize(
    ("change", "remove", "name"),
    [
        (another_order, "remove it:", "data.classes.names: beetle, fish, snail, worm -> worm, snail, fish, beetle"),
        (tags_of_another_image, "remove it:", "data.train.tags: of the list train, digest "),
        (another_image, "remove it:", "data.train.images: 6 of the list train, digest "),
        (a_shorter_list("train"), "remove it:", "data.train.images: 6 of the list train, digest "),
        (a_shorter_list("val"), "remove infer_seg in it:", "data.val.images: 3 of the list val, digest "),
    ],
)
def test_files_that_change_between_stages_are_refused_and_named(
    shapes: Path, tmp_path: Path, change: Callable[[Path], None], remove: str, name: str
) -> None:
    root = Path(shutil.copytree(shapes, tmp_path / "set"))
    (root / "Annotations/train_0005.xml").write_text("<annotation>")  # a bad file hides no change of the others
    made = open_run(config(), root, tmp_path / "out", torch.device("cpu"))
    open_run(config(), root, tmp_path / "out", torch.device("cpu"))
    for stage in ("train_cam", "infer_seg"):
        made.folder(stage).mkdir()
        (made.folder(stage) / "done.json").write_text("{}")
    change(root)
    with pytest.raises(UserError, match=f"or {remove}\n(.*\n)*  {name}"):
        open_run(config(), root, tmp_path / "out", torch.device("cpu"))
    for stage in ("train_cam", "infer_seg"):
        shutil.rmtree(made.folder(stage))
    open_run(config(), root, tmp_path / "out", torch.device("cpu"))  # nothing was made of them


def test_weight_files_that_change_are_refused_but_may_go(shapes: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"first")
    changes: dict[str, Any] = {"network.weights": weights, "network.backbone": "resnet18"}
    made = open_run(config(**changes), shapes, tmp_path / "out", torch.device("cpu"))
    made.folder("train_cam").mkdir()
    (made.folder("train_cam") / "done.json").write_text("{}")
    weights.unlink()
    open_run(config(**changes), shapes, tmp_path / "out", torch.device("cpu"))
    weights.write_bytes(b"second")
    with pytest.raises(UserError, match=r"  network\.weights\.content: digest "):
        open_run(config(**changes), shapes, tmp_path / "out", torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", b"[1"),
        ("inputs.json", b"3"),
        ("environment.json", b"{"),
        ("train_cam/done.json", b""),
        ("stages.jsonl", b"\xff"),
    ],
)
def test_records_that_are_damaged_are_named(
    finished: tuple[Path, str], shapes: Path, tiny: Path, tmp_path: Path, call: Call, name: str, content: bytes
) -> None:
    out = Path(shutil.copytree(finished[0], tmp_path / "out"))
    (out / name).write_bytes(content)
    message = call(main, "--data", shapes, "--out", out, "--config", VOC / "demo.yaml", "--config", tiny, ok=False)
    assert f"{out / name} is damaged: " in message


def test_networks_of_other_settings_are_named(shapes: Path, tmp_path: Path) -> None:
    made = new_run(shapes, tmp_path)
    path = made.folder("train_cam") / "model.pt"
    torch.save({"0.weight": torch.zeros(1)}, path)
    with pytest.raises(BadFileError, match=rf"{path} holds another network .* run train_cam again \(Missing key"):
        load_trained(made, "train_cam")
    with pytest.raises(BadFileError, match=rf"{path} holds another network .* cam\.start_from"):
        load_start(build_cam(made.config, 4), made.folder("train_cam"))


def test_own_photographs_without_masks_go_through_all_stages(
    shapes: Path, tiny: Path, tmp_path: Path, call: Call
) -> None:
    root = tmp_path / "own"
    for name in ("JPEGImages", "Annotations", "classes.txt"):
        (shutil.copytree if (shapes / name).is_dir() else shutil.copy)(shapes / name, root / name)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    shutil.copy(shapes / "ImageSets/Segmentation/train.txt", root / "ImageSets/Segmentation/train.txt")
    base = ("--data", root, "--out", tmp_path / "out", "--config", VOC / "demo.yaml", "--config", tiny)
    message = call(main, *base, ok=False)
    assert "SegmentationClass is missing" in message
    assert "val.txt is missing. Where there is none, data.val: null." in message
    without = ("--data.score", "null", "--data.val", "null", "--data.test", "null")
    assert "score_cam" in call(main, *base, *without)
    assert len(list((tmp_path / "out" / "make_labels").glob("*.png"))) == 6
    for stage in ("score_cam", "evaluate", "export_test"):
        assert "is null" in (tmp_path / "out" / stage / "done.json").read_text()
    assert "data.score must name" in call(tables.main, "table1", *base, *without, ok=False)
    assert "data.val must name" in call(tables.main, "table4", *base, "--data.val", "null", ok=False)


def test_a_schedule_of_nothing_is_refused(call: Call, shapes: Path, tmp_path: Path) -> None:
    for name in ("iterations", "batch", "log_every", "checkpoint_every"):
        base = ("--data", shapes, "--out", tmp_path, "--config", VOC / "demo.yaml", f"--cam.schedule.{name}", 0)
        assert f"schedule.{name} must be at least 1, but is 0" in call(main, *base, ok=False)


def test_defaults_are_those_of_paper_yaml() -> None:
    paper = load_config([VOC / "paper.yaml"])
    paper.data.classes = paper.network.weights = None
    assert paper == Config()


def test_errors_are_one_message(shapes: Path, tmp_path: Path, call: Call) -> None:
    base = ("--data", shapes, "--out", tmp_path, "--config", VOC / "demo.yaml")
    assert "cam.nothing" in call(main, *base, "--cam.nothing", 1, ok=False)
    assert "--stages must be" in call(main, *base, "--stages", "train", ok=False)
    done = run_script(VOC / "run.py", *base, "--stages", "from:infer_seg")
    assert done.returncode == 1
    assert "infer_seg needs train_seg" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_setting(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fill(_: Run) -> None:
        raise error

    monkeypatch.setitem(STAGES, "train_cam", replace(STAGES["train_cam"], function=fill))
    with pytest.raises(UserError, match=r"train_cam: lower cam.schedule.batch or cam.augment.crop; or workers"):
        execute(new_run(shapes, tmp_path, weights=False), ["train_cam"])


def test_another_error_of_torch_is_not_taken_for_one_of_memory(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Run) -> None:
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.")

    monkeypatch.setitem(STAGES, "train_cam", replace(STAGES["train_cam"], function=fail))
    with pytest.raises(RuntimeError, match="Caught RuntimeError"):
        execute(new_run(shapes, tmp_path, weights=False), ["train_cam"])


@pytest.mark.skipif(not VOC_MINI.is_dir(), reason="no VOC photographs: set PIXELSS_VOC_MINI to a folder in VOC layout")
def test_all_stages_on_photographs(tiny: Path, tmp_path: Path, call: Call) -> None:
    lists = tmp_path / "set" / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name in ("JPEGImages", "SegmentationClass", "Annotations"):
        (tmp_path / "set" / name).symlink_to(VOC_MINI / name)
    for name, count in (("train", 2), ("val", 1)):
        stems = (VOC_MINI / "ImageSets" / "Segmentation" / f"{name}.txt").read_text().split()
        (lists / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems[:count]))
    classes = load_config([VOC / "paper.yaml"]).data.classes
    (tmp_path / "set" / "classes.txt").write_text("\n".join(classes or []))
    base = ("--config", VOC / "demo.yaml", "--config", tiny)
    table = call(main, "--data", tmp_path / "set", "--out", tmp_path / "out", *base)
    assert "evaluate" in table
    assert "| aeroplane |" in (tmp_path / "out" / "evaluate" / "table.md").read_text()


def test_epochs_beside_iterations_of_the_config_are_refused():
    with pytest.raises(UserError, match=r"--cam\.schedule\.epochs must be given with --cam\.schedule\.iterations null"):
        load_config([VOC / "demo.yaml"], ["--cam.schedule.epochs=10"])
    config = load_config([VOC / "demo.yaml"], ["--cam.schedule.epochs", "10", "--cam.schedule.iterations", "null"])
    assert (config.cam.schedule.epochs, config.cam.schedule.iterations) == (10, None)
