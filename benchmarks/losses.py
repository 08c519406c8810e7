"""Time and peak memory of the losses against their literal implementations, forward and backward, in one run.

    python benchmarks/losses.py --device cpu
    python benchmarks/losses.py --device cuda --out losses.json

Every measurement has a process of its own: on a CPU the peak is the growth of the resident size over the inputs, on
CUDA the allocator's peak over the inputs. Ratios are the literal way divided by ours.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, interpolate, normalize

import pixelss

B, D, N, CELLS, PIXELS, SCALES = 16, 256, 20, 24, 192, 3
Step = Callable[[], Tensor]


def literal_contrastive(features: Tensor, mask: Tensor, prototypes: Tensor) -> Tensor:
    """Upsample, normalise, softmax: Eq. 4-5 as written."""
    pixels = normalize(interpolate(features, mask.shape[-2:], mode="bilinear", align_corners=False), dim=1)
    z = torch.einsum("bdhw,kd->bkhw", pixels, normalize(prototypes, dim=1)) / 0.5
    return cross_entropy(z, mask)


def literal_attentive(student: list[Tensor], teacher: list[Tensor], labels: Tensor) -> Tensor:
    """Eq. 6-8 over all N classes, the absent ones multiplied by zero."""
    loss = student[0].new_zeros(())
    for a in student:
        with torch.no_grad():
            xi = [2 - cosine_similarity(a.flatten(2), g.flatten(2), dim=-1)[:, :, None, None] for g in teacher]
            target = sum(x * g for x, g in zip(xi, teacher, strict=True)) / len(teacher)
        loss = loss + ((a - target).abs() * labels[:, :, None, None]).sum()
    return loss / (labels.sum() * student[0][0, 0].numel())


def contrastive_step(way: str, device: str) -> Step:
    features = torch.rand(B, D, CELLS, CELLS, device=device, requires_grad=True)
    mask = torch.randint(0, N + 1, (B, PIXELS, PIXELS), device=device)
    prototypes = torch.rand(N + 1, D, device=device)
    loss: Callable[..., Tensor] = literal_contrastive if way == "literal" else pixelss.regional_contrastive_loss
    if way == "compiled":
        loss = torch.compile(loss, fullgraph=True)

    def step() -> Tensor:
        return torch.autograd.grad(loss(features, mask, prototypes), features)[0]

    return step


def attentive_step(way: str, device: str, classes: int, pairs: int) -> Step:
    labels = torch.zeros(B, classes)
    labels[:, :pairs] = 1
    cams = [torch.rand(B, classes, PIXELS, PIXELS, device=device) for _ in range(2 * SCALES)]
    student, teacher = [cam.requires_grad_() for cam in cams[:SCALES]], cams[SCALES:]
    loss = literal_attentive if way == "literal" else pixelss.multi_scale_attentive_loss
    labels = labels.to(device) if way == "literal" else labels

    def step() -> Tensor:
        return torch.autograd.grad(loss(student, teacher, labels), student)[0]

    return step


# name: (what makes the step, its arguments); the first row of a group is what the others are compared with.
GROUPS: dict[str, dict[str, tuple[Callable[..., Step], tuple[int, ...]]]] = {
    "regional contrastive loss, 24 x 24 -> 192 x 192, D 256, K 21": {
        "literal": (contrastive_step, ()),
        "ours": (contrastive_step, ()),
        "compiled": (contrastive_step, ()),
    },
    **{
        f"multi-scale attentive loss, N {classes}, {pairs} present of each image": {
            "literal": (attentive_step, (classes, pairs)),
            "ours": (attentive_step, (classes, pairs)),
        }
        for classes, pairs in ((20, 1), (20, 2), (20, 4), (80, 2))
    },
}


def measure(group: str, way: str, device: str, repeats: int) -> dict[str, float]:
    """Return the median seconds of a step and the peak MiB of the first one above the inputs."""
    torch.manual_seed(0)
    make, settings = GROUPS[group][way]
    step = make(way, device, *settings)
    cuda = device.startswith("cuda")
    if way == "compiled":
        step()  # compiling takes memory of its own
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "peak_mib": (peak - before) / 2**20}


def main() -> None:
    """Measure every way in a process of its own, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--one", nargs=2, metavar=("GROUP", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        group, way = args.one
        print(json.dumps(measure(group, way, args.device, args.repeats)))
        return
    cuda = args.device.startswith("cuda")
    device = torch.cuda.get_device_name(args.device) if cuda else f"{platform.processor() or platform.machine()} CPU"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {B}, forward and backward")
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for group, ways in GROUPS.items():
        print(f"\n{group}\n{'':10}{'time':>12}{'peak':>12}{'faster':>9}{'leaner':>9}")
        figures[group] = {}
        for way in ways:
            if way == "compiled" and not cuda:
                continue  # compiling raises a process's own peak: only CUDA's allocator can tell them apart
            command = [sys.executable, __file__, "--device", args.device, "--repeats", str(args.repeats)]
            child = subprocess.run([*command, "--one", group, way], check=True, capture_output=True, text=True)
            row = figures[group][way] = json.loads(child.stdout)
            first = figures[group]["literal"]
            faster = first["seconds"] / row["seconds"]
            figure = f"{way:10}{1e3 * row['seconds']:>9.1f} ms{row['peak_mib']:>8.0f} MiB{faster:>8.1f}x"
            print(figure + f"{first['peak_mib'] / row['peak_mib']:>8.1f}x", flush=True)
    if args.out:
        report = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__, "figures": figures}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
