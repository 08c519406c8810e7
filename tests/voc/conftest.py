"""Data sets and runs that the tests of examples/voc share."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from run import guarded
from shapes import write_shapes

from tests.voc.runs import TINY, VOC, Again, Call, command, contents, load_once
from tests.voc.trainings import TRAININGS, with_labels
from tests.voc.trainings import open_run as open_training


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in this process; returns what it prints, its error message too. Settings are read once."""

    def run_main(function: Callable[[], None], *arguments: object, ok: bool = True) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        for module in {"run", "tables", "headroom"} & sys.modules.keys():
            monkeypatch.setattr(sys.modules[module], "load_config", load_once)
        code: object = 0
        try:
            guarded(function)
        except SystemExit as error:
            code = error.code
        printed = capsys.readouterr().out + (code if isinstance(code, str) else "")
        assert (code in (0, None)) == ok, printed
        return printed

    return run_main


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_shapes(tmp_path_factory.mktemp("voc") / "shapes", train=6, val=3, size=40)
    for stem in ("train_0001", "val_0001"):  # another shape, for batching by shape
        for folder, end in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
            path = root / folder / f"{stem}.{end}"
            Image.open(path).crop((0, 0, 40, 30)).save(path)
    return root


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def finished(shapes: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of all stages, shared by the tests that only read it."""
    out = tmp_path_factory.mktemp("runs") / "all"
    done = command("run.py", "--data", shapes, "--out", out, "--config", VOC / "demo.yaml", "--config", tiny)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


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


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("voc") / "shapes", train=12, val=4, size=40)


@pytest.fixture
def own_root(root, tmp_path):
    """A copy of the data set to damage."""
    return Path(shutil.copytree(root, tmp_path / "own"))


@pytest.fixture(scope="module")
def one_thread():
    """Sums of floats depend on the number of threads, and processes are compared bit for bit."""
    with threads(1):
        yield


@pytest.fixture(scope="session")
def whole(root, tmp_path_factory):
    """All three stages, never interrupted."""
    run = with_labels(open_training(root, tmp_path_factory.mktemp("whole")))
    with threads(1):
        for train in TRAININGS.values():
            train(run)
    return run
