"""Fill the disk, or take the right to write, at every stage: what is told?

    python tests/voc/disks.py

A message must name a file, and later the files must be the same. Each stage of
a small run is made on a disk in memory that has no room, a little room, a
little more, until the stage is done; and with a folder, its own or the run's,
that cannot be written to. After each refusal nothing half-written may lie
there, what was there must be as it was, and with room the same command must
give an undisturbed run's files. The data may lie on a disk that cannot be
written to. The disks are mounted in a namespace of the script's own (Linux).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.voc.forks import start, wait
from tests.voc.runs import TINY, VOC, contents, unfinished

from pipeline import LAST_OF_LABELS, STAGES  # isort: skip
from shapes import write_shapes  # isort: skip

PAGE = 4096
Words = tuple[object, ...]


def namespace() -> list[str]:
    """Return the words before a command that may mount disks which nobody else sees."""
    return ["unshare", "-m" if os.geteuid() == 0 else "-rm"]


def room(disk: Path) -> int:
    there = os.statvfs(disk)
    return there.f_bavail * there.f_frsize


@contextmanager
def full(disk: Path, left: int) -> Iterator[None]:
    """Leave so many bytes of the disk."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, room(disk) - left)
    yield
    filler.unlink()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Let nothing be written in a folder, by root neither."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
    yield
    subprocess.run(["umount", folder], check=True)


def run(words: Words, said: Path) -> str | None:
    """Return the message with which a run stops, None where it does its work."""
    code = wait(start(words, said))
    text = said.read_text()
    assert code in (0, 1), f"the process ended with {code}"
    assert "Traceback" not in text, text
    return text.replace("\r", "\n").strip() if code else None


def check_refusal(message: str, out: Path, before: dict[str, bytes], wanted: dict[str, bytes]) -> None:
    """Raise unless the message names a file of the run and all files but logs are those before or those wanted."""
    last = message.splitlines()[-2]  # the line after it says how to see a traceback
    assert f"could not write {out}" in last, message
    assert not unfinished(out), unfinished(out)
    for name, content in contents(out).items():
        if name.rpartition("/")[2] not in {"metrics.jsonl", "stages.jsonl", "environment.json"} and "step-" not in name:
            assert content in (before.get(name), wanted.get(name)), f"{name} is neither as before nor as it should be"


class Trial:
    """One run of all stages that was not disturbed, and its stages made again on a disk that disturbs.

    Args:
        whole: the run that was not disturbed; its words without --out.
        words: of the command, without --out.
        disk: mounted, where the stages are made again.
    """

    def __init__(self, whole: Path, words: Words, disk: Path) -> None:
        self.whole, self.words, self.disk, self.out = whole, words, disk, disk / "out"
        self.said = whole.with_suffix(".txt")
        message = run((*words, "--out", whole), self.said)
        assert message is None, message
        self.wanted = contents(whole)

    def prepare(self, stage: str) -> Words:
        """Copy the run but for one stage; returns the command that makes it."""
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.copytree(self.whole, self.out, ignore=lambda folder, _: [stage] if Path(folder) == self.whole else [])
        return (*self.words, "--out", self.out, "--stages", stage)

    def finish(self, command: Words) -> None:
        """Run without disturbance what was disturbed, and compare."""
        message = run(command, self.said)
        assert message is None, message
        found = contents(self.out)
        names = [name for name in sorted(found.keys() | self.wanted.keys()) if found.get(name) != self.wanted.get(name)]
        names = [name for name in names if name not in {"stages.jsonl", "environment.json"}]  # of seconds and commands
        assert not names, f"{names} differ from an undisturbed run's"

    def fill(self, stage: str) -> int:
        """Make a stage with more and more room; returns how often there was too little."""
        left, step, refusals = 0, 1, 0
        while True:
            command = self.prepare(stage)
            before = contents(self.out)
            with full(self.disk, left * PAGE):
                message = run(command, self.said)
            if message is not None:
                refusals += 1
                check_refusal(message, self.out, before, self.wanted)
            self.finish(command)
            if message is None:
                return refusals
            left, step = left + step, max(1, (left + step) // 2)

    def forbid(self, stage: str) -> int:
        """Make a stage whose folder, and then whose run's folder, cannot be written to."""
        command = self.prepare(stage)
        before = contents(self.out)
        for folder in (self.out / stage, self.out):
            with read_only(folder):
                message = run(command, self.said)
                assert message is not None, f"{stage} was made in {folder}, which is read-only"
                check_refusal(message, self.out, before, self.wanted)
        self.finish(command)
        return 2


def main() -> None:
    place = Path(tempfile.mkdtemp(prefix="disks-"))
    tiny = place / "tiny.yaml"
    tiny.write_text(TINY)
    root = write_shapes(place / "shapes", train=4, val=2, size=40)
    table = root / "tags.csv"
    table.write_text("image,tags\n" + "".join(f"train_000{i}.jpg,{tag}\n" for i, tag in enumerate(("fish", "worm"))))
    disk = place / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "disk", disk], check=True)
    settings = ("--config", VOC / "demo.yaml", "--config", tiny)
    with read_only(root):
        trials = {
            stage: Trial(place / kind, ("--data", data, *options, *settings), disk)
            for kind, data, options, stages in (
                ("voc", root, (), [name for name in STAGES if name != LAST_OF_LABELS]),
                ("own", root / "JPEGImages", ("--tags", table), [LAST_OF_LABELS]),  # does nothing in the VOC layout
            )
            for stage in stages[:1]
        }
        for stage in STAGES:
            trial = trials.get(stage, trials[next(iter(STAGES))])
            print(
                f"{stage}: told of {trial.fill(stage)} full disks, {trial.forbid(stage)} read-only folders", flush=True
            )
    print("After each of them the same command gave an undisturbed run's files.")
    subprocess.run(["umount", disk], check=True)
    shutil.rmtree(place)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # of the namespace
    if not parser.parse_args().inside:
        words = [*namespace(), sys.executable, __file__, "--inside"]
        os.execvp(words[0], words)
    main()
