"""Trainings that are killed, full disks, damaged checkpoints: the same bits in the end."""

from __future__ import annotations

import errno
import random
import shutil
import signal
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import saving
import storage
import torch
import train_cam
from config import Config
from networks import build_cam
from stages import Run

from tests.processes import START
from tests.voc.trainings import TRAININGS, check_resumed, metrics, open_run, tiny_config, train_until, with_labels

pytestmark = pytest.mark.usefixtures("one_thread")


def process(root: str, out: str, stage: str) -> None:
    """What the killed process runs."""
    torch.set_num_threads(1)
    run = open_run(Path(root), Path(out))
    TRAININGS[stage](run)


def kill_until_finished(run: Run, stage: str, moments: list[float]) -> int:
    """Start the stage again and again, kill each process so many seconds after its first new checkpoint."""
    kills = 0
    for moment in [*moments, None]:
        before = set(run.folder(stage).glob("step-*.pt"))
        child = get_context(START).Process(target=process, args=(str(run.data.root), str(run.out), stage))
        child.start()
        while moment is not None and child.is_alive() and not run.finished(stage):
            if set(run.folder(stage).glob("step-*.pt")) - before:
                time.sleep(moment)
                break
            time.sleep(0.002)
        if moment is not None and child.is_alive():
            child.kill()
            kills += 1
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
    assert run.finished(stage)
    return kills


def test_killed_process_resumes_bit_for_bit(root, whole, tmp_path):
    run = open_run(root, tmp_path)
    moments = [0.0, random.uniform(0, 0.1)]  # the first comes well before the last step
    assert kill_until_finished(run, "train_cam", moments) >= 1, moments
    check_resumed(run, whole, "train_cam")
    assert not list(run.folder("train_cam").glob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", TRAININGS)
def test_process_killed_often_resumes_bit_for_bit(root, whole, tmp_path, stage):
    for i in range(5):
        run = with_labels(open_run(root, tmp_path / str(i)))
        if stage != "train_cam":
            shutil.copytree(whole.folder("train_cam"), run.folder("train_cam"))
        moments = [random.uniform(0, 0.3) for _ in range(4)]
        kill_until_finished(run, stage, moments)
        check_resumed(run, whole, stage)


def test_a_checkpoint_written_late_holds_the_state_of_its_own_step(root, whole, tmp_path, monkeypatch):
    run, write = open_run(root, tmp_path), saving.save_checkpoint

    def late(folder, step, state):
        deadline = time.monotonic() + 60
        while step == 2 and len(metrics(run)) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        return write(folder, step, state)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_checkpoint", late)
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

    monkeypatch.setattr(saving, "save_checkpoint", full)
    run = open_run(root, tmp_path)
    with pytest.raises(OSError, match=r"could not write .*step-2\.pt"):
        train_cam.train_cam(run)
    assert not run.finished("train_cam")


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
