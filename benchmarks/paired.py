"""Paired measurements: every way of a group, its time and peak memory, ratios to the first way.

On a CPU every way has a process of its own, and the peak is that of the resident size (Linux only); on CUDA it is the
allocator's. Each is above what the inputs take.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Step = Callable[[], object]
Groups = Mapping[str, Mapping[str, Callable[[str], Step]]]  # group -> way -> (device -> step)
_BUDGET = 60.0  # seconds after which a way is not repeated any more


class Unavailable(Exception):  # noqa: N818
    """Raised by a way that cannot run here; the message says why."""


def measure(make: Callable[[str], Step], device: str, repeats: int) -> dict[str, Any]:
    """Return the median seconds of a step and the peak MiB of one above the inputs.

    On CUDA the peak is that of the second step, for the first one takes the libraries' workspaces, and steps go on for
    a second at least.
    """
    torch.manual_seed(0)
    try:
        step = make(device)
    except Unavailable as reason:
        return {"unavailable": str(reason)}
    cuda = device.startswith("cuda")
    if cuda:
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: making the inputs may have been it
        before = _resident("VmRSS")
    seconds: list[float] = []
    while not seconds or ((len(seconds) <= repeats or (cuda and sum(seconds) < 1)) and sum(seconds) < _BUDGET):
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            peak = torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM")
    measured = seconds[1:] or seconds  # the first one warms up
    return {"seconds": statistics.median(measured), "peak_mib": (peak - before) / 2**20, "repeats": len(measured)}


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def run(description: str | None, groups: Groups, note: str) -> None:
    """Measure all groups, print their tables, write the JSON."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="measure the groups whose name holds this")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--one", nargs=2, metavar=("GROUP", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        group, way = args.one
        print(json.dumps(measure(groups[group][way], args.device, args.repeats)))
        return
    cuda = args.device.startswith("cuda")
    device = torch.cuda.get_device_name(args.device) if cuda else f"{platform.processor() or platform.machine()} CPU"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {note}")
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    for group, ways in groups.items():
        if args.only not in group:
            continue
        print(f"\n{group}\n{'':16}{'time':>13}{'peak':>12}{'faster':>9}{'leaner':>9}")
        figures[group] = {}
        for way in ways:
            if cuda:  # the allocator tells one way's memory from another's; a process of its own takes seconds to start
                figures[group][way] = row = measure(ways[way], args.device, args.repeats)
                torch.cuda.empty_cache()
            else:
                command = [sys.executable, sys.argv[0], "--device", args.device, "--repeats", str(args.repeats)]
                child = subprocess.run([*command, "--one", group, way], check=True, stdout=subprocess.PIPE, text=True)
                figures[group][way] = row = json.loads(child.stdout)
            print(_line(way, row, next(iter(figures[group].values()))), flush=True)
    if args.out:
        report = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__, "figures": figures}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def _line(way: str, row: dict[str, Any], first: dict[str, Any]) -> str:
    if "unavailable" in row:
        return f"{way:16}{row['unavailable']}"
    line = f"{way:16}{1e3 * row['seconds']:>10.1f} ms{row['peak_mib']:>8.0f} MiB"
    if "unavailable" in first:
        return line
    faster = f"{first['seconds'] / row['seconds']:.2f}x"
    leaner = f"{first['peak_mib'] / row['peak_mib']:.1f}x" if min(row["peak_mib"], first["peak_mib"]) >= 1 else "-"
    return f"{line}{faster:>9}{leaner:>9}"
