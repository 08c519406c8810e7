"""The training side of examples/voc: batches, the loop and its faults, the three stages, in a tiny setting."""

from __future__ import annotations

import errno
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "voc")]

import storage  # noqa: E402
import train_affinity  # noqa: E402
import train_cam  # noqa: E402
import train_seg  # noqa: E402
import training  # noqa: E402
from batches import Batch, Samples, colour_jitter, draw_window  # noqa: E402
from config import CAM, Augment, Config, Data, Gate, Network, Optimizer, Schedule  # noqa: E402
from data import BadFileError, VOCFolder  # noqa: E402
from distributed import run_processes  # noqa: E402
from networks import IMAGENET, build_affinity, build_cam, load_trained, normalisation  # noqa: E402
from parallel import mean_count, share, shared_mean  # noqa: E402
from shapes import CLASSES, write_shapes  # noqa: E402
from stages import Run  # noqa: E402
from training import build_optimizer, gate_step, set_lr, total_steps, train_mode  # noqa: E402

import pixelss  # noqa: E402

STAGES = {
    "train_cam": train_cam.train_cam,
    "train_affinity": train_affinity.train_affinity,
    "train_seg": train_seg.train_seg,
}
STEPS = 6


def tiny_config(**changes: object) -> Config:
    """All losses, gates that open on the way, momentum: everything that a checkpoint must hold."""
    schedule = Schedule(iterations=STEPS, batch=5, checkpoint_every=2, log_every=1)
    augment = Augment(crop=32)
    config = Config(
        device="cpu",
        precision="float32",
        compile=False,
        workers=0,
        data=Data(train="train"),
        network=Network("small", dim=16),
    )
    config.cam = CAM(
        direct=0.1,
        rcm_gate=Gate(iterations=1),
        mam_gate=Gate(iterations=2),
        teacher_momentum=0.9,
        schedule=schedule,
        augment=augment,
        optimizer=Optimizer(momentum=0.9, clip=5.0),
    )
    for section in (config.affinity, config.seg):
        section.schedule, section.augment = schedule, augment
    return replace(config, **changes)


def open_run(root: Path, out: Path, config: Config | None = None) -> Run:
    return Run(config or tiny_config(), VOCFolder(root), out, torch.device("cpu"))


def with_labels(run: Run) -> Run:
    """Put the truth in the place of what CRF and random walk would make of the CAMs."""
    for name in ("train_affinity/labels/low", "train_affinity/labels/high", "make_labels"):
        shutil.copytree(run.data.root / "SegmentationClass", run.out / name, dirs_exist_ok=True)
    return run


def model_digest(run: Run, stage: str = "train_cam") -> str:
    return hashlib.sha256((run.folder(stage) / "model.pt").read_bytes()).hexdigest()


def metrics(run: Run, stage: str = "train_cam") -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run.folder(stage) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_s"} for line in lines]


def fail_at(monkeypatch: pytest.MonkeyPatch, step: int, factor: float | None = None) -> None:
    """Make train_cam's loss of one step raise, or multiply it."""
    whole = train_cam.Objective.__call__

    def broken(self, student, batch, now, report):
        loss, values = whole(self, student, batch, now, report)
        if now == step and factor is None:
            raise KeyboardInterrupt
        return (loss * factor if now == step else loss), values

    monkeypatch.setattr(train_cam.Objective, "__call__", broken)


def train_until(run: Run, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Run train_cam and interrupt it as `fail_at` does."""
    with monkeypatch.context() as patch:
        fail_at(patch, step)
        with pytest.raises(KeyboardInterrupt):
            train_cam.train_cam(run)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("voc") / "shapes", train=12, val=4, size=40)


@pytest.fixture
def own_root(root, tmp_path):
    """A copy of the data set to damage."""
    return Path(shutil.copytree(root, tmp_path / "own"))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums of floats depend on the number of threads, and processes are compared bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """All three stages, never interrupted."""
    run = with_labels(open_run(root, tmp_path_factory.mktemp("whole")))
    for train in STAGES.values():
        train(run)
    return run


# The three stages


def test_stages_write_models_metrics_and_nothing_else(whole):
    for stage in STAGES:
        left = {path.name for path in whole.folder(stage).iterdir()} - {"labels"}
        assert left == {"model.pt", "metrics.jsonl", "done.json"}
        assert [line["step"] for line in metrics(whole, stage)] == list(range(1, STEPS + 1))
        network = load_trained(whole, stage)
        assert not network.training
        network(torch.rand(1, 3, 32, 40))
    names = [set(line) for line in metrics(whole)]
    assert "rcm" not in names[0]
    assert "rcm" in names[1]
    assert "mam" not in names[1]
    assert {"mam", "direct", "gap", "zeros", "peak", "teacher_cls"} <= names[2]
    first, second = metrics(whole)[:2]
    assert first["teacher_cls"] == first["cls"]  # the teacher starts as the student, which learns before it
    assert second["teacher_cls"] != second["cls"]


def test_later_stages_start_from_the_cam_network(root, whole, tmp_path):
    config = tiny_config()
    for section in (config.affinity, config.seg):
        section.optimizer = Optimizer(lr=0.0)
    run = with_labels(open_run(root, tmp_path, config))
    shutil.copytree(whole.folder("train_cam"), run.folder("train_cam"))
    cam = load_trained(run, "train_cam")[0].state_dict()
    train_affinity.train_affinity(run)
    train_seg.train_seg(run)
    assert_close(load_trained(run, "train_affinity")[0].backbone.state_dict(), cam)
    assert_close(load_trained(run, "train_seg")[0].state_dict(), cam)


def test_start_from_begins_with_that_network(root, whole, tmp_path):
    config = tiny_config()
    config.cam.start_from, config.cam.optimizer = whole.folder("train_cam"), Optimizer(lr=0.0)
    run = open_run(root, tmp_path, config)
    train_cam.train_cam(run)
    assert_close(load_trained(run, "train_cam").state_dict(), load_trained(whole, "train_cam").state_dict())
    config.cam.start_from = tmp_path
    with pytest.raises(FileNotFoundError, match=r"start_from.*model\.pt"):
        train_cam.train_cam(open_run(root, tmp_path / "other", config))


def test_a_stage_that_is_not_trained_is_named(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="run stage train_cam first"):
        load_trained(open_run(root, tmp_path), "train_cam")


def test_bfloat16_and_determinism_and_tensorboard(root, tmp_path):
    config = tiny_config(precision="bf16", deterministic=True, tensorboard=True)
    first, second = (
        open_run(root, tmp_path / "a", config),
        open_run(root, tmp_path / "b", replace(config, tensorboard=False)),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="tensorboard")
        train_cam.train_cam(first)
    train_cam.train_cam(second)
    assert model_digest(first) == model_digest(second)
    assert list((first.folder("train_cam") / "tensorboard").iterdir())
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    "changes", [{"cls_scales": (1.5,)}, {"mam_student_scales": (3.0,)}, {"scales": (0.5, 2.0), "cls_scales": (0.5,)}]
)
def test_scales_that_do_not_fit_are_refused(root, tmp_path, changes):
    config = tiny_config(cam=replace(tiny_config().cam, **changes))
    with pytest.raises(ValueError, match=r"cam\.(cls_scales|mam_student_scales|scales) must"):
        train_cam.train_cam(open_run(root, tmp_path, config))


# Killed and resumed


def process(root: str, out: str, stage: str) -> None:
    """What the killed process runs."""
    torch.set_num_threads(1)
    run = open_run(Path(root), Path(out))
    STAGES[stage](run)


def kill_until_finished(run: Run, stage: str, moments: list[float]) -> int:
    """Start the stage again and again, kill each process so many seconds after its first new checkpoint."""
    code = f"import test_voc_training as t; t.process({str(run.data.root)!r}, {str(run.out)!r}, {stage!r})"
    kills = 0
    for moment in [*moments, None]:
        before = set(run.folder(stage).glob("step-*.pt"))
        child = subprocess.Popen(
            [sys.executable, "-c", code], cwd=Path(__file__).parent, stderr=subprocess.PIPE, text=True
        )
        while moment is not None and child.poll() is None and not run.finished(stage):
            if set(run.folder(stage).glob("step-*.pt")) - before:
                time.sleep(moment)
                break
            time.sleep(0.002)
        if moment is not None and child.poll() is None:
            child.send_signal(signal.SIGKILL)
            kills += 1
        _, errors = child.communicate()
        assert child.returncode in (0, -signal.SIGKILL), errors
    assert run.finished(stage)
    return kills


def test_a_checkpoint_written_late_holds_the_state_of_its_own_step(root, whole, tmp_path, monkeypatch):
    run, write = open_run(root, tmp_path), training.save_checkpoint

    def late(folder, step, state):
        deadline = time.monotonic() + 60
        while step == 2 and len(metrics(run)) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        return write(folder, step, state)

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_checkpoint", late)
        train_until(run, patch, 4)
    (_, of_step_2) = sorted(run.folder("train_cam").glob("step-*.pt"), reverse=True)
    for path in run.folder("train_cam").glob("step-*.pt"):
        if path != of_step_2:
            path.unlink()
    train_cam.train_cam(run)
    check_resumed(run, whole, "train_cam")


def test_a_checkpoint_that_cannot_be_written_stops_the_training(root, tmp_path, monkeypatch):
    def full(folder, step, state):
        raise OSError(errno.ENOSPC, f"could not write {folder}/step-{step}.pt")

    monkeypatch.setattr(training, "save_checkpoint", full)
    run = open_run(root, tmp_path)
    with pytest.raises(OSError, match=r"could not write .*step-2\.pt"):
        train_cam.train_cam(run)
    assert not run.finished("train_cam")


def check_resumed(run: Run, whole: Run, stage: str) -> None:
    assert model_digest(run, stage) == model_digest(whole, stage)
    assert metrics(run, stage) == metrics(whole, stage)


def test_killed_process_resumes_bit_for_bit(root, whole, tmp_path):
    run = open_run(root, tmp_path)
    moments = [0.0, random.uniform(0, 0.1)]  # the first comes well before the last step
    assert kill_until_finished(run, "train_cam", moments) >= 1, moments
    check_resumed(run, whole, "train_cam")
    assert not list(run.folder("train_cam").glob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_process_killed_often_resumes_bit_for_bit(root, whole, tmp_path, stage):
    for i in range(5):
        run = with_labels(open_run(root, tmp_path / str(i)))
        if stage != "train_cam":
            shutil.copytree(whole.folder("train_cam"), run.folder("train_cam"))
        moments = [random.uniform(0, 0.3) for _ in range(4)]
        kill_until_finished(run, stage, moments)
        check_resumed(run, whole, stage)


def test_dropout_draws_the_same_after_a_resume(root, tmp_path, monkeypatch):
    def with_dropout(config: Config, num_classes: int) -> torch.nn.Sequential:
        backbone, head = build_cam(config, num_classes)
        return torch.nn.Sequential(torch.nn.Sequential(backbone, torch.nn.Dropout2d(0.5)), head)

    monkeypatch.setattr(train_cam, "build_cam", with_dropout)
    once, twice = open_run(root, tmp_path / "once"), open_run(root, tmp_path / "twice")
    train_cam.train_cam(once)
    train_until(twice, monkeypatch, 3)
    torch.rand(7)
    train_cam.train_cam(twice)
    check_resumed(twice, once, "train_cam")


def test_damaged_checkpoint_falls_back_to_the_one_before(root, whole, tmp_path, monkeypatch):
    run = open_run(root, tmp_path)
    train_until(run, monkeypatch, 5)
    older, newest = sorted(run.folder("train_cam").glob("step-*.pt"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{newest.name} is damaged"):
        train_cam.train_cam(run)
    check_resumed(run, whole, "train_cam")
    assert older.name.startswith("step-0000002")


def test_resuming_with_other_settings_is_refused_and_named(root, tmp_path, monkeypatch):
    run = open_run(root, tmp_path)
    train_until(run, monkeypatch, 3)
    other = tiny_config(workers=1)
    other.cam = replace(other.cam, threshold=0.3, schedule=replace(other.cam.schedule, log_every=3))
    with pytest.raises(ValueError, match=r"other settings: cam\.threshold was 0\.2, is 0\.3\. "):
        train_cam.train_cam(replace(run, config=other))


def test_a_log_loses_what_was_not_checkpointed_and_half_lines(root, whole, tmp_path, monkeypatch):
    run = open_run(root, tmp_path)
    train_until(run, monkeypatch, 3)
    assert [line["step"] for line in metrics(run)] == [1, 2, 3]
    with (run.folder("train_cam") / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    train_cam.train_cam(run)
    assert metrics(run) == metrics(whole)


# A loss that is not finite


def test_nonfinite_loss_stops_and_keeps_the_checkpoint(root, whole, tmp_path, monkeypatch):
    run = open_run(root, tmp_path)
    with monkeypatch.context() as patch:
        fail_at(patch, 4, float("nan"))
        with pytest.raises(RuntimeError, match=r"not finite in the steps 5 to 5 of train_cam.*cam\.optimizer\.lr"):
            train_cam.train_cam(run)
    assert [path.name[:12] for path in sorted(run.folder("train_cam").glob("step-*.pt"))] == [
        "step-0000002",
        "step-0000004",
    ]
    train_cam.train_cam(run)
    check_resumed(run, whole, "train_cam")


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_nonfinite_loss_skips_that_step_alone(root, whole, tmp_path, monkeypatch, factor):
    run = open_run(root, tmp_path, tiny_config(on_nonfinite_loss="skip"))
    with monkeypatch.context() as patch:
        fail_at(patch, 3, factor)
        with pytest.warns(UserWarning, match="step 4 of train_cam is left out"):
            train_cam.train_cam(run)
    weights = load_trained(run, "train_cam").state_dict()
    assert all(value.isfinite().all() for value in weights.values())
    assert model_digest(run) != model_digest(whole)
    assert metrics(run)[:3] == metrics(whole)[:3]
    assert "loss" not in metrics(run)[3]
    assert metrics(run)[4]["loss"] != metrics(whole)[4]["loss"]


def test_a_skipped_step_leaves_no_trace_in_the_norms(root, tmp_path, monkeypatch):
    """A forward pass of what is not finite changes a norm's statistics before any loss tells of it."""
    moved, calls = training.to_device, iter(range(100))

    def damaged(batch: Batch, device: torch.device) -> Batch:
        batch = moved(batch, device)
        return batch._replace(images=batch.images * float("nan")) if next(calls) == 3 else batch

    run = with_labels(open_run(root, tmp_path, tiny_config(on_nonfinite_loss="skip")))
    run.config.seg = replace(run.config.seg, norm=True, from_cam=False)
    monkeypatch.setattr(training, "to_device", damaged)
    with pytest.warns(UserWarning, match="step 4 of train_seg is left out"):
        train_seg.train_seg(run)
    assert all(value.isfinite().all() for value in load_trained(run, "train_seg").state_dict().values())


# Many processes


def train_in_float64(rank: int, root: str, out: str) -> None:
    torch.set_default_dtype(torch.float64)
    run = open_run(Path(root), Path(out))
    for train in STAGES.values():
        train(run)


def test_two_processes_with_uneven_shares_equal_one(root, tmp_path):
    runs = [with_labels(open_run(root, tmp_path / name)) for name in ("one", "two")]
    for run, processes in zip(runs, (1, 2), strict=True):
        run_processes(train_in_float64, processes, str(root), str(run.out))
    one, two = runs
    for stage in STAGES:
        for a, b in zip(metrics(one, stage), metrics(two, stage), strict=True):
            assert a == pytest.approx(b, rel=1e-9, abs=1e-12)
        weights = [torch.load(run.folder(stage) / "model.pt", weights_only=True) for run in runs]
        assert_close(weights[0], weights[1], rtol=1e-9, atol=1e-12)
        assert next(iter(weights[0].values())).dtype == torch.float64


def shares(rank: int) -> list[object]:
    count = torch.tensor([3.0, 0.0])[rank]
    mean = torch.tensor([2.0, 0.0])[rank]
    return [list(share(range(5))), mean_count(count), shared_mean(mean, count), shared_mean(mean, 0 * count)]


def test_shares_and_means_of_two_processes():
    first, second = run_processes(shares, 2)
    assert first[0] == [0, 2, 4]
    assert second[0] == [1, 3]
    assert first[1] == second[1] == 1.5
    assert (first[2] + second[2]) / 2 == 2
    assert first[3] == second[3] == 0


# Batches


def collect(root: Path, config: Config, **kwargs: object) -> list[tuple[torch.Tensor, ...]]:
    data = VOCFolder(root)
    samples = Samples(
        data, data.stems("train"), config, config.cam.augment, [data.root / "SegmentationClass"], **kwargs
    )
    return list(samples.batches(5, 0, 4, pin=False))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_batches_depend_on_neither_workers_nor_start(root):
    alone, helped = collect(root, tiny_config()), collect(root, tiny_config(workers=2))
    assert len(alone) == 4
    for a, b in zip(alone, helped, strict=True):
        assert_close(a, b, rtol=0, atol=0)
    data = VOCFolder(root)
    samples = Samples(data, data.stems("train"), tiny_config(), tiny_config().cam.augment)
    later = next(samples.batches(5, 3, 4, pin=False))
    assert torch.equal(later.images, alone[3].images)
    other = collect(root, tiny_config(seed=1))
    assert not torch.equal(other[0].images, alone[0].images)


def test_an_epoch_shows_every_image_once(root):
    data = VOCFolder(root)
    stems = data.stems("train")
    samples = Samples(data, stems, tiny_config(), Augment(crop=8))
    seen: list[str] = []
    samples.sample = lambda stem, rng: seen.append(stem)  # type: ignore[method-assign, assignment, return-value]
    for position in range(3 * len(stems)):
        samples[position]
    epochs = [seen[i * len(stems) : (i + 1) * len(stems)] for i in range(3)]
    assert all(sorted(epoch) == sorted(stems) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


class Coordinates:
    """Images whose red and green tell where a pixel comes from, and the label map that belongs to them."""

    stems = ("only",)

    def __init__(self, width: int, height: int) -> None:
        self.y, self.x = np.mgrid[:height, :width]

    def image(self, stem: str) -> np.ndarray:
        return np.stack([2 * self.x, 2 * self.y, 0 * self.x + 255], -1).astype(np.uint8)

    def tags(self, stem: str) -> torch.Tensor:
        return torch.ones(1)

    def mask(self, stem: str, *, folder: Path) -> np.ndarray:
        return (self.x // 8 + 3 * (self.y // 8)).astype(np.uint8)


@pytest.mark.parametrize("size", [(100, 60), (31, 50), (24, 24)])
@pytest.mark.parametrize(("mode", "low", "high"), [("scale", 0.5, 1.3), ("area", 0.5, 1.0), ("longest", 30, 90)])
def test_image_and_map_are_cut_alike(mode, low, high, size):
    augment = Augment(crop=48, resize=mode, resize_range=(low, high), jitter_probability=0)
    samples = Samples(Coordinates(*size), ["only"], tiny_config(), augment, [Path("maps")])  # type: ignore[arg-type]
    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    flips = 0
    for position in range(20):
        images, _, maps = samples[position][0]  # type: ignore[index]
        colours, labels = (images[0] * std + mean) * 255, maps[0, 0]
        inside = labels != 255
        assert torch.equal(images[0].abs().sum(0) > 0, inside)
        x, y = colours[0] / 2, colours[1] / 2  # bilinear: exact but for rounding, and at the image's edge
        sure = inside & ((x % 8 - 3.5).abs() < 2.7) & ((y % 8 - 3.5).abs() < 2.7)
        assert sure.sum() > 0.2 * inside.sum()
        assert torch.equal(labels[sure].float(), (x // 8 + 3 * (y // 8))[sure])
        rows = x.where(inside, torch.nan).nanmean(0)
        rows = rows[~rows.isnan()]
        flips += int(rows[0] > rows[-1])
    assert 3 <= flips <= 17


def test_windows_keep_scale_and_stay_inside():
    rng = np.random.default_rng(0)
    for _ in range(200):
        augment = Augment(crop=64, resize="scale", resize_range=(0.5, 1.3))
        (x0, y0, x1, y1), (w, h), (left, top), _ = draw_window(rng, (100, 50), augment)
        assert 0 <= x0 < x1 <= 100
        assert 0 <= y0 < y1 <= 50
        assert 0.49 < w / (x1 - x0) < 1.31
        assert w / (x1 - x0) == pytest.approx(h / (y1 - y0), rel=0.03)
        assert left + w <= 64
        assert top + h <= 64
        augment = Augment(crop=64, resize="area", resize_range=(0.2, 0.8))
        (x0, y0, x1, y1), size, _, _ = draw_window(rng, (100, 80), augment)
        assert size == (64, 64)
        assert 0.19 < (x1 - x0) * (y1 - y0) / 8000 < 0.82
        augment = Augment(crop=400, resize="longest", resize_range=(90, 110))
        _, size, _, _ = draw_window(rng, (100, 50), augment)
        assert 90 <= size[0] <= 110
        assert size[1] == pytest.approx(size[0] / 2, abs=1)


def test_colour_jitter_changes_what_it_is_asked_to():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)

    def jitter(*amounts: float, probability: float = 1.0) -> np.ndarray:
        augment = Augment(jitter=amounts, jitter_probability=probability)  # type: ignore[arg-type]
        return colour_jitter(image, np.random.default_rng(3), augment)

    assert np.array_equal(jitter(0.4, 0.4, 0.4, 0.1, probability=0), image)
    assert np.array_equal(jitter(0, 0, 0, 0), np.asarray(Image.fromarray(image).convert("HSV").convert("RGB")))
    bright = jitter(0.5, 0, 0, 0).mean()
    assert abs(bright - image.mean()) > 1
    grey = np.full((8, 8, 3), 90, np.uint8)
    augment = Augment(jitter=(0, 0, 0.5, 0.5), jitter_probability=1)
    assert np.array_equal(colour_jitter(grey, np.random.default_rng(0), augment), grey)
    values = {
        colour_jitter(grey, np.random.default_rng(i), Augment(jitter=(0.5, 0, 0, 0), jitter_probability=1)).max()
        for i in range(50)
    }
    assert min(values) >= 45
    assert max(values) <= 135
    assert len(values) > 20


# Bad files


def damage(root: Path, what: str) -> str:
    """Damage one image's files; returns what the message must say."""
    stem = "train_0003"
    image, mask, xml = (
        root / f for f in (f"JPEGImages/{stem}.jpg", f"SegmentationClass/{stem}.png", f"Annotations/{stem}.xml")
    )
    if what == "truncated image":
        image.write_bytes(image.read_bytes()[:400])
        return rf"{image.name} cannot be read"
    if what == "no image":
        image.unlink()
        return rf"{image.name} is missing"
    if what == "size":
        Image.fromarray(np.zeros((40, 30), np.uint8)).save(mask)
        return rf"{mask.name} must have its image's size \(40, 40\), but has \(40, 30\)"
    if what == "16 bits":
        Image.fromarray(np.full((40, 40), 257, np.uint16)).save(mask)
        return rf"{mask.name} must hold class indices"
    if what == "colours":
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(mask)
        return rf"{mask.name} must hold class indices"
    if what == "values":
        Image.fromarray(np.full((40, 40), 9, np.uint8)).save(mask)
        return rf"{mask.name} must hold 0 to {len(CLASSES)} or 255, but holds \[9\]"
    if what == "no mask":
        mask.unlink()
        return rf"{mask.name}.*no such mask"
    if what == "class":
        xml.write_text("<annotation><object><name>dragon</name></object></annotation>")
        return rf"{xml.name} names \['dragon'\]"
    if what == "xml":
        xml.write_text("<annotation><object>")
        return rf"{xml.name} is no readable XML"
    xml.unlink()
    return rf"{xml.name} is missing"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    "what", ["truncated image", "no image", "size", "16 bits", "colours", "values", "no mask", "class", "xml", "no xml"]
)
def test_bad_file_is_named_or_skipped(own_root, what):
    message = damage(own_root, what)
    workers = 1 if what == "truncated image" else 0
    with pytest.raises(BadFileError, match=message) as caught:
        collect(own_root, tiny_config(workers=workers))
    assert "Traceback" not in str(caught.value)
    assert "on_bad_file: skip" in str(caught.value)
    config = tiny_config(data=Data(train="train", on_bad_file="skip"), workers=workers)
    with pytest.warns(UserWarning, match=f"skipped the image train_0003: .*{message}"):
        batches = collect(own_root, config)
    assert all(len(batch.images) == 5 for batch in batches)


def test_a_list_without_a_usable_image_stops_even_when_skipping(own_root):
    for path in (own_root / "JPEGImages").iterdir():
        path.unlink()
    with pytest.raises(BadFileError, match="no image of the training list"):
        collect(own_root, tiny_config(data=Data(train="train", on_bad_file="skip")))


def test_lists_may_hold_paths_and_missing_ones_say_what_to_get(own_root):
    lists = own_root / "ImageSets/Segmentation"
    (lists / "odd.txt").write_text("/JPEGImages/a_b.jpg /SegmentationClassAug/a_b.png\n\nc\n")
    data = VOCFolder(own_root)
    assert data.stems("odd") == ["a_b", "c"]
    with pytest.raises(FileNotFoundError, match=r"train_aug\.txt is missing.*SBD"):
        data.stems("train_aug")
    (lists / "empty.txt").write_text("\n")
    with pytest.raises(BadFileError, match="lists no image"):
        data.stems("empty")


def test_names_of_classes_may_hold_spaces(own_root):
    (own_root / "classes.txt").write_text("traffic light\n dog \n\n")
    assert VOCFolder(own_root).classes == ["traffic light", "dog"]


def test_overlays_leave_out_bad_images(own_root):
    damage(own_root, "truncated image")
    data, config = VOCFolder(own_root), tiny_config()
    stems = ["train_0002", "train_0003"]
    pictures = train_cam.overlays(build_cam(config, data.num_classes), Samples(data, stems, config, Augment(crop=32)))
    assert list(pictures) == ["cam/train_0002"]


# Storage


def test_a_full_disk_leaves_the_file_that_was(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    storage.write_atomic(path, b"whole")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", full)
        with pytest.raises(OSError, match=r"could not write .*model\.pt \(No space left") as caught:
            storage.write_atomic(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"whole"
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_a_full_disk_ends_training_and_it_goes_on_later(root, whole, tmp_path, monkeypatch):
    run = open_run(root, tmp_path)
    with monkeypatch.context() as patch:
        fsync, calls = storage.os.fsync, iter(range(100))

        def full(file: int) -> None:
            if next(calls) > 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(file)

        patch.setattr(storage.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            train_cam.train_cam(run)
    assert len(list(run.folder("train_cam").glob("step-*.pt"))) == 1
    train_cam.train_cam(run)
    check_resumed(run, whole, "train_cam")


def test_checkpoints_are_kept_in_order_and_checked(tmp_path):
    assert storage.load_checkpoint(tmp_path) is None
    for step in (1, 2, 10):
        storage.save_checkpoint(tmp_path, step, {"step": step, "x": torch.full((3,), step)})
    assert [p.name[:12] for p in sorted(tmp_path.iterdir())] == ["step-0000002", "step-0000010"]
    state = storage.load_checkpoint(tmp_path)
    assert state is not None
    assert state["x"].tolist() == [10, 10, 10]
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="is damaged"):
        assert storage.load_checkpoint(tmp_path) is None
    (tmp_path / ".model.pt.77.tmp").touch()
    storage.remove_unfinished(tmp_path)
    storage.remove_checkpoints(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("present", [[], [2], [0, 3]])
def test_cams_survive_a_png_in_steps_of_1_255(tmp_path, present):
    labels = torch.zeros(4)
    labels[present] = 1
    cam = torch.rand(4, 7, 5) * labels[:, None, None]
    storage.save_cam(tmp_path / "cam.png", cam, labels)
    again = storage.load_cam(tmp_path / "cam.png", 4)
    assert again.shape == cam.shape
    assert (again - cam).abs().max() <= 0.5 / 255 + 1e-6
    assert not again[labels == 0].any()
    storage.save_cam(tmp_path / "again.png", again, labels)
    assert torch.equal(storage.load_cam(tmp_path / "again.png", 4), again)
    (tmp_path / "cam.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cam\.png is no CAM file"):
        storage.load_cam(tmp_path / "cam.png", 4)


def test_masks_survive_a_png(tmp_path):
    mask = np.random.default_rng(0).integers(0, 256, (5, 4), dtype=np.uint8)
    storage.save_mask(tmp_path / "m.png", mask)
    with Image.open(tmp_path / "m.png") as image:
        assert image.mode == "P"
        assert np.array_equal(np.array(image), mask)


# Networks, schedule, signals


def test_optimizer_has_the_papers_groups():
    network = build_cam(tiny_config(), 3)
    network[0].requires_grad_(False)
    network[0].layers[-1].requires_grad_(True)
    settings = Optimizer(lr=0.1, head_lr=10, bias_lr=2, weight_decay=5e-4, momentum=0.5)
    optimizer = build_optimizer(network, settings, fused=False)
    set_lr(optimizer, settings, 0.25)
    names = {id(p): n for n, p in network.named_parameters()}
    got = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    lr = 0.1 * 0.75**0.9
    layer = "0.layers.4"
    assert got == {
        f"{layer}.0.weight": (lr, 5e-4),
        f"{layer}.1.weight": (lr, 5e-4),
        f"{layer}.1.bias": (2 * lr, 0.0),
        "1.project.weight": (pytest.approx(10 * lr), 5e-4),
        "1.classify.weight": (pytest.approx(10 * lr), 5e-4),
    }


def test_epochs_and_iterations():
    assert total_steps(Schedule(epochs=20, batch=16), 10582) == 13228
    assert total_steps(Schedule(epochs=20, batch=16, iterations=7), 10582) == 7
    assert gate_step(Gate(epochs=6), Schedule(batch=16), 10582) == 3968
    assert gate_step(Gate(epochs=6, iterations=0), Schedule(batch=16), 10582) == 0


def test_collapse_signals_of_hand_made_cams():
    student = [torch.tensor([[[[1.0, 0.5, 0.0, 0.0]], [[9.0, 9.0, 9.0, 9.0]]]])]
    teacher = [torch.tensor([[[[0.5, 0.25, 0.0, 0.0]], [[9.0, 9.0, 9.0, 9.0]]]])]  # parallel: xi = 1, the target itself
    signals = train_cam.collapse_signals(student, teacher, torch.tensor([[1, 0]]))
    assert {name: round(value.item(), 5) for name, value in signals.items()} == {
        "gap": -0.375,
        "zeros": 0.5,
        "peak": 0.5,
    }
    empty = train_cam.collapse_signals(student, teacher, torch.tensor([[0, 0]]))
    assert all(value.isfinite() for value in empty.values())


def test_kinds_of_pairs_sum_to_the_loss():
    maps = torch.randint(0, 3, (2, 9, 9))
    labels = pixelss.affinity_labels(maps, maps, radius=3)
    affinity = torch.rand(labels.shape)
    loss, parts = train_affinity.kind_by_kind(affinity, labels)
    assert_close(loss, pixelss.affinity_loss(affinity, labels), check_dtype=False)
    assert set(parts) == {"different", "background", "foreground"}


def test_label_maps_are_read_at_the_centres_of_cells():
    maps = torch.arange(16 * 16).view(1, 16, 16)
    assert train_affinity.subsampled(maps, (2, 2)).tolist() == [
        [[4 * 16 + 4, 4 * 16 + 12], [12 * 16 + 4, 12 * 16 + 12]]
    ]
    assert train_affinity.subsampled(maps, (16, 16)).equal(maps)


def test_timm_backbone_shares_its_tensors_with_the_affinity_network():
    config = tiny_config(network=Network("resnet18", output_stride=16, dim=8))
    cam, affinity = build_cam(config, 2), build_affinity(config)
    affinity[0].backbone.load_state_dict(cam[0].state_dict())
    images = torch.rand(1, 3, 64, 48)
    assert affinity.eval()(images).shape == (1, len(pixelss.pair_offsets(5)), 4, 3)
    assert_close(affinity[0](images)[-1], cam[0].eval()(images))
    assert normalisation(config) == IMAGENET


def test_given_weights_freeze_the_norms(tmp_path):
    import timm

    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "weights.pth")
    config = tiny_config(network=Network("resnet18", weights=tmp_path / "weights.pth", output_stride=16, dim=8))
    for network in (build_cam(config, 2), build_affinity(config)):
        norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert norms
        assert not any(p.requires_grad for norm in norms for p in norm.parameters())
        train_mode(network.eval())
        assert not any(norm.training for norm in norms)
        assert all(module.training for module in network.modules() if module not in norms)
    with pytest.raises(ValueError, match=r"network\.weights must be null"):
        build_cam(tiny_config(network=Network("small", weights=tmp_path / "weights.pth")), 2)


def test_frozen_parts_are_not_trained_and_unknown_ones_named():
    network = Network("resnet18", frozen=("net.conv1", "net.layer1"), output_stride=16, dim=8)
    for build in (lambda config: build_cam(config, 2), build_affinity):
        backbone = build(tiny_config(network=network))[0]
        frozen = {name for name, weight in backbone.named_parameters() if not weight.requires_grad}
        parts = ("net.conv1.", "net.layer1.", "backbone.net.conv1.", "backbone.net.layer1.")
        assert frozen == {name for name, _ in backbone.named_parameters() if name.startswith(parts)}
        assert frozen
    with pytest.raises(ValueError, match=r"network\.frozen must name modules of resnet18 \(.*net\.layer1.*'layer1'"):
        build_cam(tiny_config(network=replace(network, frozen=("layer1",))), 2)


@pytest.mark.parametrize("backbone", ["small", "resnet38"])
def test_a_stride_that_a_backbone_has_not_is_refused(backbone):
    with pytest.raises(ValueError, match=rf"network\.output_stride must be 8 for {backbone}, but is 16"):
        build_cam(tiny_config(network=Network(backbone, output_stride=16)), 2)
