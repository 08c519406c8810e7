"""Shared by all tests: the hypothesis profiles, the marks, the threads of several workers, and the devices."""

from __future__ import annotations

import gc
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

# With pytest-xdist each worker has its share of the cores; torch reads this once, the processes that tests start too
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import pytest
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=12)  # others at each run
settings.register_profile("ci", settings.get_profile("default"), max_examples=25, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

gc.disable()  # until all is imported, which makes no garbage

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms on CUDA need it

# By the file's place: what runs whole examples as a user does
PIPELINE = re.compile(r"tests/(voc/|test_examples|test_docs)")
NETWORKS = re.compile(r"tests/(backbones/|cam/test_(classifier|trial))|pixelss/(backbones/|cam/classifier)")
NOT_UNIT = {"slow", "pipeline", "networks", "processes", "inductor"}

DRAWS = ("kaiming_normal_", "kaiming_uniform_")  # of the weights of convolutions

collect_ignore = ["golden/make_crf.py"]  # a script that needs the extra crf-reference


def missing_for_machine_code() -> str:
    """Return what inductor lacks on a CPU: the compiler that torch calls, the headers it includes, or nothing."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which(compiler):
        return f"no C++ compiler {compiler}"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return "" if header.exists() else f"no header {header}"


def pytest_configure(config: pytest.Config) -> None:
    """With `-m unit`, import no module of the package that has no such doctest; the hook below sees the tests alone."""
    if config.option.markexpr == "unit":
        places = ["*/pixelss/backbones/*", "*/pixelss/cam/classifier.py"]
        config.option.ignore_glob = [*(config.option.ignore_glob or []), *places]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m unit`, read no file or folder that has none: the pipeline's import what takes seconds."""
    path = collection_path.as_posix() + "/" * collection_path.is_dir()
    none_here = PIPELINE.search(path) or NETWORKS.search(path)
    return True if none_here and config.option.markexpr == "unit" else None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Mark the pipeline's and the networks' tests by their place, those that compile by name, the rest as `unit`."""
    missing = missing_for_machine_code()
    for item in items:
        if missing and "to_machine_code" in item.name:
            item.add_marker(pytest.mark.skip(reason=f"{missing}: nothing can be compiled to machine code"))
        if PIPELINE.search(item.path.as_posix()):
            item.add_marker(pytest.mark.pipeline)
        if NETWORKS.search(item.path.as_posix()):
            item.add_marker(pytest.mark.networks)
        if "compile" in item.name:
            item.add_marker(pytest.mark.inductor)
        if not NOT_UNIT & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.unit)
    result = yield
    # Long ones first, none waits for them; what starts processes too, whose server then one worker alone has to start
    items.sort(key=lambda item: not any(map(item.get_closest_marker, ("pipeline", "processes"))))
    return result


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Take what was imported out of the garbage collector's sight: half a million objects, looked through each time."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Spare the expected failures their tracebacks, which nobody sees and which take longer than the tests."""
    mark = pyfuncitem.get_closest_marker("xfail")
    if mark is None or mark.kwargs.keys() != {"reason", "strict"} or pyfuncitem.config.option.runxfail:
        return (yield)
    try:
        return (yield)
    except Exception as error:
        raise pytest.xfail.Exception(mark.kwargs["reason"], pytrace=False) from error


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker a row of files, so that most fixtures of a file or folder are made once; the idle take over."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getvalue("dist") == "load" else None


@cache
def devices() -> list[str]:
    """Return the CPU, and CUDA where there is one."""
    import torch  # not above: the process that starts pytest-xdist's workers needs none, which takes seconds

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what takes `device` on each."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices(), scope="session")


@pytest.fixture
def no_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave weights as they lie in memory: millions of numbers take seconds to draw."""
    for name in DRAWS:
        monkeypatch.setattr(f"torch.nn.init.{name}", lambda tensor, *_, **__: tensor)


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the weights of eight channels of a layer and repeat them in the others, at the scale of them all."""
    import torch

    @torch.no_grad()
    def draw(whole: Any, tensor: Any, *arguments: Any, **settings: Any) -> Any:
        whole(tensor[:8], *arguments, **settings)
        if settings.get("mode") == "fan_out":
            tensor[:8] *= min(1, 8 / len(tensor)) ** 0.5
        for start in range(8, len(tensor), 8):
            part = tensor[start : start + 8]
            part.copy_(tensor[: len(part)])
        return tensor

    for name in DRAWS:
        monkeypatch.setattr(torch.nn.init, name, partial(draw, getattr(torch.nn.init, name)))
