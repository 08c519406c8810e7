"""Damaged files by the thousand: what a damage is, and a process in which each is tried under a watch."""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import resource
import signal
import struct
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

_GIB = 2**30
_EXTREMES = [struct.pack(code, value) for code in ("<I", "<Q", ">I", ">H") for value in (0, 1, 2**15, 2**16 - 1)]
_EXTREMES += [struct.pack(code, value) for code in ("<I", ">I") for value in (2**31 - 1, 2**31, 2**32 - 1)]
_EXTREMES += [struct.pack("<Q", value) for value in (2**31, 2**40, 2**62, 2**63, 2**64 - 1)]


class Trials(NamedTuple):
    """How trials went: how often each outcome came, and the faults by the trial's number."""

    outcomes: Counter[str]
    faults: dict[int, str]


def mutated(content: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Return a damaged copy: bytes that differ, are missing, are too many or belong to one of the `others`."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        where, size = _place(rng, len(data)), rng.choice((1, 2, 8, 64, 1000))
        match rng.randrange(10):
            case 0 | 1:
                data[where : where + 1] = bytes([rng.randrange(256)])
            case 2:
                data[where : where + 1] = bytes([(data[where] if data else 0) ^ 1 << rng.randrange(8)])
            case 3:
                value = rng.choice(_EXTREMES)
                data[where : where + len(value)] = value
            case 4:
                del data[where:]
            case 5:
                del data[where : where + size]
            case 6:
                data[where:where] = rng.randbytes(size)
            case 7:
                data[where : where + size] = bytes(size)
            case 8:
                data[where:where] = data[where : where + size]
            case 9:
                other = rng.choice(others)
                head = rng.choice((4, 8, 16, 100))
                data = bytearray(other[:head] + data[head:] if rng.random() < 0.5 else data[:where] + other[where:])
    return bytes(data)


def _place(rng: random.Random, length: int) -> int:
    """Draw a place, half of the time near the beginning or the end, where headers and tables are."""
    if length < 2:
        return 0
    near = min(length, rng.choice((16, 200, 1500)))
    return rng.choice(
        (rng.randrange(length), rng.randrange(near), rng.randrange(length), length - 1 - rng.randrange(near))
    )


def tried(count: int, trial: Callable[[int], str], *, seconds: int = 10, first: int = 0) -> Trials:
    """Call `trial` with the numbers from `first` on, in a process of its own; it returns the outcome's name.

    A fault is whatever it raises, a trial that takes more than so many seconds of a processor, ten times as many on the
    clock or more than 1 GiB, and the death of the process, after which another one goes on.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        _try_all(range(first, first + count), trial, seconds, writer)
    os.close(writer)
    outcomes: Counter[str] = Counter()
    faults: dict[int, str] = {}
    number = first
    with os.fdopen(reader, encoding="utf-8") as lines:
        for line in lines:
            kind, _, text = line.rstrip("\n").partition(" ")
            if kind == "fault":
                faults[number] = text
            else:
                outcomes[text] += 1
            number += 1
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        faults[number] = f"the process ended with {code}: it crashed, or took more than {seconds} s"
        rest = tried(first + count - number - 1, trial, seconds=seconds, first=number + 1)
        return Trials(outcomes + rest.outcomes, faults | rest.faults)
    return Trials(outcomes, faults)


def fuzz(make: Callable[[Path, int], Callable[[int], str]], about: str | None, *, count: int) -> None:
    """The command of a script: try so many files, on a disk in memory where there is one, and print how it went.

    `make` gets a folder and the seed, and returns the trial.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number to begin with: of a fault, with --count 1")
    options = parser.parse_args()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        done = tried(options.count, make(Path(folder), options.seed), first=options.first)
    for outcome, times in sorted(done.outcomes.items()):
        print(f"{times:6} {outcome}")
    for number, fault in done.faults.items():
        print(f"fault of number {number}: {fault}")
    print(f"{done.outcomes.total()} files worked with or told of, {len(done.faults)} faults")
    raise SystemExit(bool(done.faults))


def _try_all(numbers: range, trial: Callable[[int], str], seconds: int, writer: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (16 * _GIB, 16 * _GIB))  # before the machine suffers
    code = 1
    try:
        highest = _peak()
        for number in numbers:
            signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process
            faulthandler.dump_traceback_later(10 * seconds, exit=True)
            try:
                line = f"outcome {trial(number)}"
            except BaseException as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                line = f"fault {type(error).__name__}: {error} ({where.filename}, line {where.lineno})"
            if _peak() > highest + _GIB:
                line, highest = f"fault it took {(_peak() - highest) / _GIB:.1f} GiB", _peak()
            os.write(writer, (" ".join(line.split()) + "\n").encode())
        code = 0
    finally:
        os._exit(code)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
