"""The VOC pipeline as a user runs it: all stages, restarts, faults, exports and tables, in a tiny setting."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

VOC = Path(__file__).parent.parent / "examples" / "voc"
VOC_MINI = Path(os.environ.get("PIXELSS_VOC_MINI", Path(__file__).parent.parent.parent / "shared/data/voc12-mini"))
sys.path[:0] = [str(VOC), str(VOC.parent)]

import headroom as headroom_command  # noqa: E402
import inference  # noqa: E402
import tables  # noqa: E402
from batches import Samples  # noqa: E402
from config import CRF, Config  # noqa: E402
from crf_labels import label_maps, with_background, write_crf_labels  # noqa: E402
from data import BadFileError, VOCFolder  # noqa: E402
from distributed import run_processes  # noqa: E402
from export_test import export_test  # noqa: E402
from headroom import headroom  # noqa: E402
from infer_cam import cam_path, infer_cam, write_cams  # noqa: E402
from inference import writing  # noqa: E402
from networks import build_cam  # noqa: E402
from plan import cost  # noqa: E402
from run import STAGES, execute, guarded, load_config, main  # noqa: E402
from runfolder import UserError, open_run  # noqa: E402
from score_cam import score_cam  # noqa: E402
from shapes import write_shapes  # noqa: E402
from stages import Run  # noqa: E402
from storage import load_cam, load_checkpoint, save_cam, save_mask  # noqa: E402

import pixelss  # noqa: E402
from pixelss.viz import voc_palette  # noqa: E402

TINY = """
cam:
  schedule: {iterations: 2, batch: 2, checkpoint_every: 1, log_every: 1}
  augment: {crop: 32}
  rcm_gate: {iterations: 1}
  mam_gate: {iterations: 1}
infer_cam: {scales: [0.5, 1.0], crf: {iterations: 1}, max_batch: 2}
affinity: {radius: 2, crf: {iterations: 1}, schedule: {iterations: 2, batch: 2}, augment: {crop: 32}}
make_labels: {log_steps: 1, crf: {iterations: 1}}
seg: {test_scales: [1.0], crf: {iterations: 1}, max_batch: 2, schedule: {iterations: 2, batch: 2}, augment: {crop: 32}}
"""


def command(script: str, *arguments: object, fault: tuple[object, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does: a process of its own, which takes seconds to start; with a fault of faulty.py."""
    before = [Path(__file__).with_name("faulty.py"), *fault] if fault else []
    words = [sys.executable, *before, VOC / script, *arguments]
    return subprocess.run([str(word) for word in words], capture_output=True, text=True)


Call = Callable[..., str]
Again = Callable[[str], tuple[Path, dict[str, bytes], tuple[object, ...]]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in this process; returns what it prints, its error message too."""

    def run_main(function: Callable[[], None], *arguments: object, ok: bool = True) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        code: object = 0
        try:
            guarded(function)
        except SystemExit as error:
            code = error.code
        printed = capsys.readouterr().out + (code if isinstance(code, str) else "")
        assert (code in (0, None)) == ok, printed
        return printed

    return run_main


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_shapes(tmp_path_factory.mktemp("voc") / "shapes", train=6, val=3, size=40)
    for stem in ("train_0001", "val_0001"):  # another shape, for batching by shape
        for folder, end in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
            path = root / folder / f"{stem}.{end}"
            Image.open(path).crop((0, 0, 40, 30)).save(path)
    return root


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def finished(shapes: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of all stages, shared by the tests that only read it."""
    out = tmp_path_factory.mktemp("runs") / "all"
    done = command("run.py", "--data", shapes, "--out", out, "--config", VOC / "demo.yaml", "--config", tiny)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def config(**changes: Any) -> Config:
    settings = [f"--{name}={value}" for name, value in changes.items()]
    return load_config([VOC / "demo.yaml"], settings)


def new_run(root: Path, out: Path, *, weights: bool = True, settings: Config | None = None) -> Run:
    """A run folder with an untrained CAM network in it."""
    settings = settings or config()
    made = Run(settings, VOCFolder(root, settings.data.classes), out, torch.device("cpu"))
    if weights:
        torch.manual_seed(0)
        network = build_cam(settings, made.data.num_classes)
        made.folder("train_cam").mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), made.folder("train_cam") / "model.pt")
    return made


def cam_of(stem: str, made: Run) -> Tensor:
    return load_cam(cam_path(made, stem), made.data.num_classes)


def write_random_cams(made: Run, name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for stem in made.data.stems(name):
        cam = torch.rand(made.data.num_classes, *made.data.size(stem), generator=generator)
        save_cam(cam_path(made, stem), cam, made.data.tags(stem))


@pytest.fixture
def again(finished: tuple[Path, str], shapes: Path, tiny: Path, tmp_path: Path) -> Again:
    """Copy the finished run but for one stage; returns that stage's folder, what belongs there, and the command."""
    out, _ = finished

    def prepare(stage: str) -> tuple[Path, dict[str, bytes], tuple[object, ...]]:
        copy = tmp_path / "run"
        shutil.copytree(out, copy, ignore=lambda folder, _: [stage] if Path(folder) == out else [])
        base = ("--data", shapes, "--out", copy, "--config", VOC / "demo.yaml", "--config", tiny)
        return copy / stage, contents(out / stage), base

    return prepare


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a stage by its name, without figures of speed."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): re.sub(rb'"images_per_s\w*": [\d.]+', b"", p.read_bytes()) for p in files}


def unfinished(folder: Path) -> list[Path]:
    return list(folder.rglob(".*.tmp"))


def test_all_stages_give_every_result(finished: tuple[Path, str], shapes: Path) -> None:
    out, printed = finished
    table = printed.splitlines()
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
    assert again == printed
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


@pytest.mark.parametrize(
    ("stage", "name", "whole", "kept"),
    [
        ("infer_cam", ".png", 2, 2),
        ("train_affinity", ".png", 3, 2),  # an image's two label maps are made together
        pytest.param("make_labels", ".png", 4, 4, marks=pytest.mark.slow),
        pytest.param("infer_seg", ".png", 4, 3, marks=pytest.mark.slow),  # 3 of val; of test one of a batch of two
        pytest.param("infer_cam", "stages.jsonl", 0, 7, marks=pytest.mark.slow),  # 6 CAMs and done.json
    ],
)
def test_killed_process_continues_at_the_first_unfinished_batch(
    again: Again, call: Call, stage: str, name: str, whole: int, kept: int
) -> None:
    folder, wanted, base = again(stage)
    ended = command("run.py", *base, "--stages", stage, fault=("killed", name, whole))
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    there = {name: content for name, content in contents(folder).items() if not name.endswith(".tmp")}
    assert there.items() <= wanted.items()
    assert len(unfinished(folder.parent)) == 1
    dates = {name: (folder / name).stat().st_mtime_ns for name in there}
    call(main, *base, "--stages", stage)
    assert contents(folder) == wanted
    assert [(folder / name).stat().st_mtime_ns == dates[name] for name in there].count(True) == kept
    assert not unfinished(folder.parent)


@pytest.mark.parametrize(
    ("stage", "name", "whole", "steps"),
    [
        ("train_cam", "step-0000002", 0, 1),
        pytest.param("train_cam", "model.pt", 0, 2, marks=pytest.mark.slow),
        pytest.param("train_cam", "metrics.jsonl", 0, 0, marks=pytest.mark.slow),  # half a line is left
        pytest.param("infer_cam", ".png", 2, 0, marks=pytest.mark.slow),
    ],
)
def test_full_disk_is_told_naming_the_file_and_the_command_continues(
    again: Again, call: Call, stage: str, name: str, whole: int, steps: int
) -> None:
    folder, wanted, base = again(stage)
    others = {path.name: contents(path) for path in folder.parent.iterdir() if path.is_dir()}
    ended = command("run.py", *base, "--stages", stage, fault=("full", name, whole))
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    (told,) = re.findall(r"could not write (.+) \(File too large\)", ended.stderr)
    assert Path(told).parent == folder
    assert name in Path(told).name
    assert not unfinished(folder.parent)
    images = {name: content for name, content in contents(folder).items() if name.endswith(".png")}
    assert images.items() <= wanted.items()
    assert (load_checkpoint(folder) or {"step": 0})["step"] == steps
    logged = [log.read_text().splitlines()[:steps] for log in folder.glob("metrics.jsonl")]
    call(main, *base, "--stages", stage)
    # A step that was repeated would have another speed.
    assert [log.read_text().splitlines()[:steps] for log in folder.glob("metrics.jsonl")] == logged
    assert {path.name: contents(path) for path in folder.parent.iterdir() if path.is_dir()} == others | {stage: wanted}


def test_full_disk_is_told_while_the_demo_s_images_are_written(tmp_path: Path) -> None:
    arguments = ("--data", "demo", "--out", tmp_path / "out", "--stages", "train_cam", "--dry-run")
    result = command("run.py", *arguments, fault=("full", "train_0003", 0))
    assert result.returncode != 0
    assert f"could not write the data set {tmp_path / 'out' / 'shapes'} (" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out" / "shapes").exists()
    assert command("run.py", *arguments).returncode == 0


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


def test_only_the_lists_that_the_stages_read_are_wanted(shapes: Path, tmp_path: Path, call: Call) -> None:
    root = tmp_path / "set"
    shutil.copytree(shapes, root)
    (root / "ImageSets/Segmentation/val.txt").unlink()
    shutil.rmtree(root / "SegmentationClass")
    resnet = ("--config", VOC / "demo.yaml", "--network.backbone", "resnet38")
    plan = call(main, "--data", root, "--out", tmp_path, *resnet, "--dry-run", "--stages", "train_cam,infer_cam")
    assert "An estimate" in plan
    plan = call(main, "--data", root, "--out", tmp_path, *resnet, "--dry-run", "--stages", "score_cam", ok=False)
    assert "SegmentationClass is missing" in plan


def test_a_schedule_of_nothing_is_refused(call: Call, shapes: Path, tmp_path: Path) -> None:
    for name in ("iterations", "batch", "log_every", "checkpoint_every"):
        base = ("--data", shapes, "--out", tmp_path, "--config", VOC / "demo.yaml", f"--cam.schedule.{name}", 0)
        assert f"schedule.{name} must be at least 1, but is 0" in call(main, *base, ok=False)


def test_resumed_inference_works_on_the_same_batches(shapes: Path, tmp_path: Path) -> None:
    made = new_run(shapes, tmp_path / "run", settings=config(**{"infer_cam.max_batch": 3}))
    stems = made.data.stems("train")

    def batches(finished: set[str]) -> list[list[str]]:
        shared = inference.shared_batches(made, stems, str, desc="", done=finished.__contains__, max_batch=3)
        return [[stem for stem, _ in batch] for batch in shared]

    whole = batches(set())
    assert sorted(stem for batch in whole for stem in batch) == sorted(stems)
    assert max(map(len, whole)) == 3
    for finished in ({whole[0][0]}, {*whole[0], whole[1][0]}, set(stems)):
        assert batches(finished) == [batch for batch in whole if not set(batch) <= finished]


def test_dry_run_names_everything_missing(tmp_path: Path, shapes: Path, call: Call) -> None:
    empty = ("--data", tmp_path / "empty", "--out", tmp_path / "out", "--dry-run")
    message = call(main, *empty, "--network.weights", tmp_path / "none.params", ok=False)
    for name in ("JPEGImages", "Annotations", "SegmentationClass", "train_aug.txt", "train.txt", "val.txt", "test.txt"):
        assert name in message
    assert "SBD" in message
    assert "none.params" in message
    if not torch.cuda.is_available():
        assert "--device cpu" in message
    assert not (tmp_path / "out").exists()
    base = ("--data", shapes, "--out", tmp_path / "out", "--config", VOC / "demo.yaml")
    plan = call(main, *base, "--dry-run", "--network.backbone", "resnet38")
    assert "An estimate" in plan
    assert "Nothing is missing." in plan
    (shapes / "Annotations" / "train_0002.xml").rename(tmp_path / "kept.xml")
    message = call(main, *base, ok=False)
    (tmp_path / "kept.xml").rename(shapes / "Annotations" / "train_0002.xml")
    assert "1 of 6 annotations of train.txt are missing" in message
    assert "train_0002.xml" in message


def plan_of(rank: int, root: str, out: str) -> str:
    """Print the plan in one of several processes."""
    sys.argv = ["run.py", "--data", root, "--out", out, "--config", str(VOC / "demo.yaml"), "--dry-run"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main()
    return printed.getvalue()


def test_dry_run_of_two_processes_prints_one_plan(shapes: Path, tmp_path: Path) -> None:
    first, second = run_processes(plan_of, 2, str(shapes), str(tmp_path / "out"))
    assert "Nothing is missing." in first
    assert second == ""


def test_estimate_is_the_measured_step(shapes: Path) -> None:
    settings = load_config([VOC / "paper.yaml"], ["--cam.schedule.iterations=1", "--data.train=train"])
    settings.data.val, settings.data.test = "val", None
    settings.data.classes = None
    data, flipped = VOCFolder(shapes), 2 * (0.5**2 + 1 + 1.5**2 + 2**2) * 375 * 500
    estimate = cost(settings, data, ["train_cam", "score_cam", "evaluate"])
    pixel = 49.7 / (16 * 192**2 * (0.5**2 + 1 + 2**2) * 4)
    assert estimate == pytest.approx({"train_cam": 49.7, "score_cam": 6 * flipped * pixel})
    assert cost(settings, data, ["train_cam", "infer_cam", "score_cam"]).keys() == {"train_cam", "infer_cam"}


def test_defaults_are_those_of_paper_yaml() -> None:
    paper = load_config([VOC / "paper.yaml"])
    paper.data.classes = paper.network.weights = None
    assert paper == Config()


def test_errors_are_one_message(shapes: Path, tmp_path: Path, call: Call) -> None:
    base = ("--data", shapes, "--out", tmp_path, "--config", VOC / "demo.yaml")
    assert "cam.nothing" in call(main, *base, "--cam.nothing", 1, ok=False)
    assert "--stages must be" in call(main, *base, "--stages", "train", ok=False)
    done = command("run.py", *base, "--stages", "from:infer_seg")
    assert done.returncode == 1
    assert "infer_seg needs train_seg" in done.stderr
    assert "Traceback" not in done.stderr


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

    monkeypatch.setitem(STAGES, "train_cam", (fill, STAGES["train_cam"][1]))
    with pytest.raises(UserError, match=r"train_cam: lower cam.schedule.batch or cam.augment.crop; or workers"):
        execute(new_run(shapes, tmp_path, weights=False), ["train_cam"])


def test_another_error_of_torch_is_not_taken_for_one_of_memory(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Run) -> None:
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.")

    monkeypatch.setitem(STAGES, "train_cam", (fail, STAGES["train_cam"][1]))
    with pytest.raises(RuntimeError, match="Caught RuntimeError"):
        execute(new_run(shapes, tmp_path, weights=False), ["train_cam"])


def test_a_process_that_starts_late_still_does_its_share(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = new_run(shapes, tmp_path / "run")
    for rank in (0, 1):
        monkeypatch.setattr(inference, "share", lambda items, rank=rank: items[rank::2])
        infer_cam(made)
    assert all(cam_path(made, stem).is_file() for stem in made.data.stems("train"))


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


def test_a_name_that_is_listed_twice_is_written_by_two_threads(shapes: Path, tmp_path: Path) -> None:
    made = new_run(shapes, tmp_path / "run", settings=config(workers=4))
    stems = made.data.stems("val")[:4]
    write_cams(made, [stem for stem in stems for _ in range(4)])
    assert {path.name for path in made.folder("infer_cam").iterdir()} == {f"{stem}.png" for stem in stems}


@pytest.mark.parametrize("calls", [1, 9])  # told at the end, or by a later call
def test_a_file_that_cannot_be_written_beside_the_network_is_told(calls: int, shapes: Path, tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "full")

    def write_all() -> None:
        with writing(new_run(shapes, tmp_path, weights=False)) as write:
            for _ in range(calls):
                write(full)

    with pytest.raises(OSError, match="full"):
        write_all()


def test_cam_of_infer_cam_is_the_library_s(shapes: Path, tmp_path: Path) -> None:
    made = new_run(shapes, tmp_path / "run")
    infer_cam(made)
    network = build_cam(made.config, 4).eval()
    network.load_state_dict(torch.load(made.folder("train_cam") / "model.pt"))
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


def test_crf_labels_of_one_lattice_equal_separate_ones(shapes: Path, tmp_path: Path) -> None:
    made = new_run(shapes, tmp_path / "run", weights=False)
    write_random_cams(made, "train")
    write_crf_labels(made)
    crf = made.config.affinity.crf
    for stem in made.data.stems("train"):
        cam, tags = cam_of(stem, made)[None], made.data.tags(stem)
        levels = torch.from_numpy(made.data.image(stem)).permute(2, 0, 1)[None].contiguous()
        for name, alpha in (("low", made.config.affinity.alpha_low), ("high", made.config.affinity.alpha_high)):
            present = [0, *(1 + c for c in range(4) if tags[c])]
            probs = torch.cat([(1 - cam.amax(1, keepdim=True)) ** alpha, cam], 1)[:, present]
            result = pixelss.dense_crf(
                levels, probs, iterations=crf.iterations, gaussian=crf.gaussian, bilateral=crf.bilateral
            )
            wanted = torch.tensor(present)[result[0].argmax(0)]
            found = made.data.mask(stem, folder=made.folder("train_affinity") / "labels" / name)
            assert (torch.from_numpy(found) == wanted).all()


def test_label_maps_without_a_tag_are_background() -> None:
    image, tags = np.zeros((5, 6, 3), np.uint8), torch.zeros(3)
    scores = with_background(torch.zeros(1, 3, 5, 6), tags, torch.ones(1, 1, 5, 6))
    for crf in (None, CRF(iterations=1)):
        (labels,) = label_maps(image, scores, tags, crf)
        assert labels.dtype == np.uint8
        assert labels.shape == (5, 6)
        assert not labels.any()


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


def test_archive_is_what_the_server_takes(finished: tuple[Path, str], shapes: Path, tmp_path: Path) -> None:
    out, _ = finished
    data = VOCFolder(shapes)
    stems = data.stems("val")
    with tarfile.open(out / "export_test" / "results.tar.gz") as archive:
        names = archive.getnames()
        assert names == [f"results/VOC2012/Segmentation/comp6_test_cls/{stem}.png" for stem in sorted(stems)]
        for name, stem in zip(names, sorted(stems), strict=True):
            with Image.open(archive.extractfile(name)) as mask:
                assert mask.mode == "P"
                assert mask.getpalette() == voc_palette().flatten().tolist()
                assert mask.size[::-1] == data.size(stem)
    made = new_run(shapes, tmp_path / "run", weights=False)
    for stem in stems:
        save_mask(made.folder("infer_seg") / "test" / f"{stem}.png", np.ones(data.size(stem), np.uint8))
    export_test(made)
    archive_path = made.folder("export_test") / "results.tar.gz"
    first = archive_path.read_bytes()
    archive_path.unlink()
    time.sleep(1.1)  # a date in the archive would now differ
    export_test(made)
    assert archive_path.read_bytes() == first


def test_archive_is_refused_naming_every_wrong_mask(shapes: Path, tmp_path: Path) -> None:
    made = new_run(shapes, tmp_path / "run", weights=False)
    folder, (missing, small, void) = made.folder("infer_seg") / "test", made.data.stems("val")
    save_mask(folder / f"{small}.png", np.zeros((7, 8), np.uint8))
    wrong = np.zeros(made.data.size(void), np.uint8)
    wrong[0, 0] = 255
    save_mask(folder / f"{void}.png", wrong)
    with pytest.raises(BadFileError, match="3 of 3 masks are wrong") as error:
        export_test(made)
    message = str(error.value)
    assert f"{missing}.png: no such mask" in message
    assert f"{small}.png must have its image's size" in message
    assert "holds 255" in message
    assert not made.folder("export_test").exists()
    wrong[0, 0] = 9
    save_mask(folder / f"{void}.png", wrong)
    with pytest.raises(BadFileError, match=r"must hold 0 to 4 or 255, but holds \[9\]"):
        export_test(made)
    Image.fromarray(np.zeros_like(wrong)).save(folder / f"{void}.png")
    with pytest.raises(BadFileError, match="palette PNG"):
        export_test(made)


def test_tables(shapes: Path, tiny: Path, tmp_path: Path, call: Call) -> None:
    start = tmp_path / "start.yaml"
    start.write_text("cam: {rcm: 1, schedule: {iterations: 1}}\n")  # without modules all the same
    rows = ("--cam.schedule.iterations", 3)  # of the rows alone
    base = ("--data", shapes, "--out", tmp_path / "out", "--config", VOC / "demo.yaml", "--config", tiny)
    printed = call(tables.main, "table5", *base, *rows, "--seeds", 0, 1, "--start", start)
    text = (tmp_path / "out" / "table5.md").read_text()
    assert text in printed
    assert "| MAM+RCM |" in text
    for word in ("train.txt", "seeds 0, 1", "3 iterations", "(6 images)", "46.0"):
        assert word in text
    assert (tmp_path / "out" / "table5.csv").read_text().startswith("row,column,seed,value,paper")
    for name in ("table5.png", "table5-curves.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.size[0] > 500
    made = {path.name for path in (tmp_path / "out" / "rows").iterdir()}
    assert made == {"start", "baseline", "MAM+RCM"}
    settings = [yaml.safe_load((tmp_path / f"out/rows/{row}/seed-1/config.yaml").read_text()) for row in sorted(made)]
    assert [(one["cam"]["schedule"]["iterations"], one["cam"]["rcm"]) for one in settings] == [(3, 1), (3, 0), (1, 0)]
    for name in ("data", "infer_cam", "network", "seed"):
        assert settings[0][name] == settings[1][name]
    for name in ("schedule", "cls_scales", "augment", "optimizer", "start_from"):
        assert settings[0]["cam"][name] == settings[1]["cam"][name]
    assert settings[0]["cam"]["start_from"].endswith("start/seed-1/train_cam")
    dates = [path.stat().st_mtime_ns for path in (tmp_path / "out/rows").rglob("done.json")]
    assert call(tables.main, "table5", *base, *rows, "--seeds", 0, 1, "--start", start).endswith(
        printed[printed.index("Table 5") :]
    )
    assert [path.stat().st_mtime_ns for path in (tmp_path / "out/rows").rglob("done.json")] == dates


def test_table_shows_mean_half_range_and_the_paper_s_figure(tmp_path: Path) -> None:
    text = tables.write_table("table1", {"MAM": {"miou": [50.0, 54.0]}}, "A caption.", [3, 5], tmp_path)
    assert text.splitlines() == [
        "A caption.", "", "| row | miou | miou, paper |", "| --- | --- | --- |", "| MAM | 52.0 ± 2.0 | 58.0 |"
    ]  # fmt: skip
    assert (tmp_path / "table1.csv").read_text().split() == [
        "row,column,seed,value,paper", "MAM,miou,3,50.0,58.0", "MAM,miou,5,54.0,58.0"
    ]  # fmt: skip


def test_headroom_is_the_iou_of_cam_and_targets_on_the_crops_of_a_training(shapes: Path, tmp_path: Path) -> None:
    made = new_run(shapes, tmp_path / "run")
    scales = {"cam.scales": [1.0, 1.5], "cam.cls_scales": [1.0]}
    settings = config(**scales, **{"cam.start_from": made.folder("train_cam"), "cam.augment.crop": 32})
    made.config = settings
    found = headroom(made)

    stems, classes = made.data.stems("train"), made.data.num_classes
    network = build_cam(settings, classes)
    network.load_state_dict(torch.load(made.folder("train_cam") / "model.pt"))
    samples = Samples(made.data, stems, settings, settings.cam.augment, [shapes / "SegmentationClass"])
    ((images, tags, maps),) = samples.batches(len(stems), 0, 1, pin=False)
    with torch.no_grad():
        outputs = pixelss.multi_scale_forward(network.eval(), images, scales=[1.0, 1.5])
    cams = [pixelss.normalize_cam(output.cam).double().numpy() for output in outputs]
    truth = maps[:, 0].numpy()
    for scale, own, other in (("x1", *cams), ("x1.5", *cams[::-1])):
        columns: dict[str, Any] = {name: np.zeros_like(own) for name in ("CAM", "MMM", "MAM")}
        for b, k in tags.nonzero().tolist():
            norms = np.sqrt((own[b, k] ** 2).sum() * (other[b, k] ** 2).sum())
            xi = 2 - ((own[b, k] * other[b, k]).sum() / norms if norms > 0 else 0)
            columns["CAM"][b, k] = own[b, k]
            columns["MMM"][b, k] = (own[b, k] + other[b, k]) / 2
            columns["MAM"][b, k] = (1.0 * own[b, k] + xi * other[b, k]) / 2  # a live map is not unlike itself
        for name, cam in columns.items():
            best = max(miou(np.where(cam.max(1) > t / 100, cam.argmax(1) + 1, 0), truth, classes) for t in range(120))
            assert found.scales[scale][name] == pytest.approx(best, abs=0.05)
    together = pixelss.msinf_cam([output.cam for output in outputs], tags).numpy()
    maps_at = [np.where(together.max(1) > t / 100, together.argmax(1) + 1, 0) for t in range(100)]
    best = max(miou(prediction, truth, classes) for prediction in maps_at)
    assert found.scales.keys() == {"x1", "x1.5", "all"}
    assert found.scales["all"] == {"CAM": pytest.approx(best, abs=0.05)}
    mask = np.where(together.max(1) > settings.cam.threshold, together.argmax(1) + 1, 0)
    assert 100 * found.mask.miou.item() == pytest.approx(miou(mask, truth, classes), abs=0.05)


def miou(prediction: np.ndarray, truth: np.ndarray, classes: int) -> float:
    """Return the mean IoU in per cent over classes that occur, void left out."""
    seen = truth != 255
    pairs = [((prediction == c) & seen, (truth == c) & seen) for c in range(classes + 1)]
    return 100 * float(np.mean([(p & t).sum() / (p | t).sum() for p, t in pairs if (p | t).any()]))


def test_headroom_command_prints_a_table(finished: tuple[Path, str], shapes: Path, tiny: Path, call: Call) -> None:
    base = ("--data", shapes, "--config", VOC / "demo.yaml", "--config", tiny)
    assert "cam.start_from must be" in call(headroom_command.main, *base, ok=False)
    lines = call(headroom_command.main, *base, "--cam.start_from", finished[0] / "train_cam").splitlines()
    assert lines[0] == "| scale | CAM | target of MMM | target of MAM |"
    assert [line.split()[1] for line in lines[2:6]] == ["x0.5", "x1", "x2", "all"]
    assert re.fullmatch(r"\| x2 \| [\d.]+ \| [\d.]+ \([+-][\d.]+\) \| [\d.]+ \([+-][\d.]+\) \|", lines[4])
    assert "mask at threshold 0.2: mIoU" in lines[-1]


@pytest.mark.slow
def test_all_tables(shapes: Path, tiny: Path, tmp_path: Path, call: Call) -> None:
    call(tables.main, "all", "--data", shapes, "--out", tmp_path, "--config", VOC / "demo.yaml", "--config", tiny)
    for name in ("table1", "table2", "table4", "table5", "fig7"):
        assert {f"{name}.md", f"{name}.csv", f"{name}.png"} <= {path.name for path in tmp_path.iterdir()}
    assert "| MMM+RCM |" in (tmp_path / "table1.md").read_text()
    assert (tmp_path / "rows" / "RCM-t=0.35").is_dir()
    assert not (tmp_path / "rows" / "RCM-t=0.2").exists()  # the same settings as the row RCM


@pytest.mark.skipif(not VOC_MINI.is_dir(), reason="no VOC photographs: set PIXELSS_VOC_MINI to a folder in VOC layout")
def test_all_stages_on_photographs(tiny: Path, tmp_path: Path, call: Call) -> None:
    lists = tmp_path / "set" / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name in ("JPEGImages", "SegmentationClass", "Annotations"):
        (tmp_path / "set" / name).symlink_to(VOC_MINI / name)
    for name, count in (("train", 16), ("val", 8)):
        stems = (VOC_MINI / "ImageSets" / "Segmentation" / f"{name}.txt").read_text().split()
        (lists / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems[:count]))
    classes = load_config([VOC / "paper.yaml"]).data.classes
    (tmp_path / "set" / "classes.txt").write_text("\n".join(classes or []))
    base = ("--config", VOC / "demo.yaml", "--config", tiny)
    table = call(main, "--data", tmp_path / "set", "--out", tmp_path / "out", *base)
    assert "evaluate" in table
    assert "| aeroplane |" in (tmp_path / "out" / "evaluate" / "table.md").read_text()
