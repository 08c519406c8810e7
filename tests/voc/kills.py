"""Kill the demo at random moments, go on, and compare with an undisturbed run.

    python tests/voc/kills.py --kills 200 --seed 0
    python tests/voc/kills.py --kills 50 --seed 0 --own  # photographs with tags

A run goes through all stages with few iterations and is killed (SIGKILL) about
fifteen times, at moments that an exponential distribution draws; then the next
run begins. After its last start every file must be an undisturbed run's. The
processes are forks of one that has imported everything and read the settings,
so that no kill is spent on that, of which nothing is left on the disk.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.voc.forks import start, wait
from tests.voc.runs import VOC, contents, unfinished

# After the path of the examples, which tests.voc sets.
from pipeline import STAGES  # isort: skip
from shapes import write_shapes  # isort: skip
from texts import read_names  # isort: skip

CONFIG = """
cam:
  rcm_gate: {iterations: 4}
  mam_gate: {iterations: 4}
  schedule: {iterations: 12, batch: 4, checkpoint_every: 2, log_every: 1}
  augment: {crop: 32}
infer_cam: {scales: [0.5, 1.0], crf: null, max_batch: 4}
affinity:
  radius: 2
  crf: {iterations: 1, bilateral: [80, 60, 10]}  # a coarse lattice is built soon
  schedule: {iterations: 12, batch: 4, checkpoint_every: 2, log_every: 1}
  augment: {crop: 32}
make_labels: {log_steps: 1, crf: null}
seg:
  test_scales: [1.0]
  crf: null
  max_batch: 4
  schedule: {iterations: 12, batch: 4, checkpoint_every: 2, log_every: 1}
  augment: {crop: 32}
"""
RECORDS = {"stages.jsonl", "environment.json"}  # of seconds and commands


class Report(NamedTuple):
    """What was done: starts, kills by the stage that they met, runs that were compared, seconds of a whole run."""

    starts: int
    kills: Counter[str]
    runs: int
    seconds: float


def under_way(out: Path, *, own: bool) -> str:
    """Return what a process that was just killed was about: the images of the demo, or a stage."""
    if not own and not (out / "shapes" / "stamp.txt").is_file():
        return "images"
    return next((name for name in STAGES if not (out / name / "done.json").is_file()), "results")


def check(out: Path, wanted: dict[str, bytes]) -> None:
    """Raise unless a run folder holds what an undisturbed run's does, and nothing else."""
    found = results(out)
    differing = [name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)]
    if differing or unfinished(out):
        raise AssertionError(f"{out} differs in {differing}, and holds {unfinished(out)}")
    for line in (out / "stages.jsonl").read_text().splitlines():
        json.loads(line)
    if "Traceback" in Path(f"{out}.txt").read_text():
        raise AssertionError(f"{out}.txt holds a traceback")


def results(out: Path) -> dict[str, bytes]:
    """Return the files of a run folder by name, without what tells of speed."""
    found = {name: content for name, content in contents(out).items() if name not in RECORDS}
    found["config.yaml"] = re.sub(rb"(?m)^workers: \d+$", b"", found["config.yaml"])
    return found


def photographs(folder: Path) -> tuple[object, ...]:
    """Write images with a table of tags; returns the words that name them."""
    root = write_shapes(folder / "photographs", train=80, val=1)
    tags = {path.stem: " ".join(sorted(read_names(path))) for path in sorted(root.glob("Annotations/train_*.xml"))}
    table = folder / "tags.csv"
    table.write_text("image,tags\n" + "".join(f"{stem}.jpg,{names}\n" for stem, names in tags.items()))
    return "--data", root / "JPEGImages", "--tags", table


def kill_often(folder: Path, kills: int, seed: int, *, own: bool = False, kills_a_run: float = 15) -> Report:
    """Make so many kills; raises where a run that was killed ends in other files than one that was not."""
    rng = random.Random(seed)
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    data = photographs(folder) if own else ("--data", "demo")

    def begin(out: Path, workers: int) -> int:
        files = ("--config", VOC / "demo.yaml", "--config", config)
        return start((*data, "--out", out, *files, "--workers", workers), Path(f"{out}.txt"))

    begun = time.monotonic()
    code = wait(begin(folder / "whole", 0))
    seconds = time.monotonic() - begun
    if code != 0:
        raise AssertionError(f"an undisturbed run ended with {code}: see {folder / 'whole.txt'}")
    wanted = results(folder / "whole")
    met: Counter[str] = Counter()
    starts = runs = 0
    while met.total() < kills:
        out = folder / f"run-{runs}"
        if (
            runs and not own
        ):  # the first run draws the images itself; they begin anew after each kill, which would cost most kills
            shutil.copytree(folder / "whole" / "shapes", out / "shapes")
        code = -signal.SIGKILL
        while code != 0:
            starts += 1
            moment = rng.expovariate(kills_a_run / seconds) if met.total() < kills else None
            code = wait(begin(out, rng.choice((0, 2))), moment)
            if "damaged" in Path(f"{out}.txt").read_text():
                raise AssertionError(f"a file was found damaged: see {out}.txt")
            if code == -signal.SIGKILL and moment is not None:
                met[under_way(out, own=own)] += 1
            elif code != 0:
                raise AssertionError(f"a start ended with {code}: see {out}.txt")
        check(out, wanted)
        runs += 1
        print(f"{met.total()} kills, {starts} starts, {runs} runs: {dict(met)}", flush=True)
        shutil.rmtree(out)
    return Report(starts, met, runs, seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--own", action="store_true", help="photographs with tags in place of the demo")
    parser.add_argument("--folder", type=Path, help="to work in; a temporary one that is kept after a fault")
    options = parser.parse_args()
    place = options.folder or Path(tempfile.mkdtemp(prefix="kills-"))
    place.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    report = kill_often(place, options.kills, options.seed, own=options.own)
    print(
        f"{report.kills.total()} kills in {report.starts} starts of {report.runs} runs, all of them with the files of"
    )
    print(f"an undisturbed run ({report.seconds:.0f} s); {(time.monotonic() - begun) / 60:.0f} minutes. The kills met:")
    print(", ".join(f"{name} {report.kills[name]}" for name in ("images", *STAGES, "results") if report.kills[name]))
    shutil.rmtree(place)
