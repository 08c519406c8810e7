"""The loop of the three training stages: what it writes, its optimiser and lengths, many processes."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import train_affinity
import train_cam
import train_seg
from config import Gate, Optimizer, Schedule
from networks import build_cam, load_trained
from torch.testing import assert_close
from training import build_optimizer, gate_step, set_lr, total_steps

from tests.distributed import run_processes
from tests.voc.trainings import STEPS, TRAININGS, metrics, model_digest, open_run, tiny_config, with_labels

pytestmark = pytest.mark.usefixtures("one_thread")


def test_stages_write_models_metrics_and_nothing_else(whole):
    for stage in TRAININGS:
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


KINDS = {  # of affinities: those of other systems after the CAM network of others, which both have
    "features": list(TRAININGS),
    "path": ["train_cam", "train_affinity"],
    "zones": ["train_affinity"],
}


def train_in_float64(rank: int, root: str, out: str, start: str) -> None:
    torch.set_default_dtype(torch.float64)
    for kind, stages in KINDS.items():
        config = tiny_config()
        if kind != "features":
            seam = {"er": 1.0, "ecr": 1.0, "minpool": 1.0, "view_scales": (1.0, 0.5)}
            subcategory = {"subcategory": 5.0, "subclusters": 2, "start_from": Path(start)}
            config.cam, config.affinity.kind = replace(config.cam, **seam, **subcategory), kind
        run = open_run(Path(root), Path(out, kind), config)
        for stage in stages:
            TRAININGS[stage](run)


def test_two_processes_with_uneven_shares_equal_one(root, whole, tmp_path):
    """Whatever is trained, in one start of the processes, which takes as long as a training."""
    runs = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        runs[processes] = {kind: with_labels(open_run(root, out / kind)) for kind in KINDS}
        (out / "zones" / "train_cam").symlink_to(out / "path" / "train_cam")
        run_processes(train_in_float64, processes, str(root), str(out), str(whole.folder("train_cam")))
    for kind, stage in [(kind, stage) for kind, stages in KINDS.items() for stage in stages]:
        one, two = (runs[processes][kind] for processes in (1, 2))
        for a, b in zip(metrics(one, stage), metrics(two, stage), strict=True):
            assert a == pytest.approx(b, rel=1e-9, abs=1e-12)
        weights = [torch.load(run.folder(stage) / "model.pt", weights_only=True) for run in (one, two)]
        assert_close(weights[0], weights[1], rtol=1e-9, atol=1e-10)  # 3e-12 apart on torch 2.4
        assert next(iter(weights[0].values())).dtype == torch.float64
