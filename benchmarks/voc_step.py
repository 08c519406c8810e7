r"""Speed of examples/voc: the step of train_cam, its loader, CAM inference.

    python benchmarks/voc_step.py --backbone small --batch 4 --crop 64 \
        --images 4 --steps 3                           # small, for a CPU
    python benchmarks/voc_step.py --device cuda --peak 790 --out voc_step.json
    python benchmarks/voc_step.py --device cuda --data VOC2012 --workers 16

The second is the paper's setting, the third on photographs. A step is one of
examples/voc/training.py itself: student forward and backward, teacher forward,
all losses, SGD, EMA. The network is frozen where the paper's is, its norms and
ResNet38's stem; its arithmetic is that of the networks alone, and MFU the share
of --peak that it reaches. Every row has a process of its own. Without --data
the images are blurred noise of VOC's sizes. On CUDA torch's float32
convolutions are TF32.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import pixelss

sys.path.append(str(Path(__file__).parent.parent / "examples/voc"))

import training
from batches import Batch, Samples
from config import Config, Data, Gate, InferCAM, Network, Schedule
from data import VOCFolder
from infer_cam import write_cams
from networks import build_cam
from stages import Run
from train_cam import STAGE, Objective

WARMUP = 3  # steps before the clock starts: memory, compilation
# row -> precision, whether compiled, memory layout
WAYS = {
    "fp32 NCHW eager": ("float32", False, torch.contiguous_format),
    "bf16 eager": ("bf16", False, torch.channels_last),
    "bf16 compiled": ("bf16", True, torch.channels_last),
}
ROWS = [*(f"step, {way}" for way in WAYS), "loader", "infer_cam, float32", "infer_cam, bf16"]


class Repeated(Samples):
    """A stream of one batch of noise; `times` holds when the warm-up and the step before the last had ended."""

    def batches(self, batch: int, start: int, stop: int, *, pin: bool) -> Iterator[Batch]:
        """Yield the same noise for every step; nothing waits for the device in between."""
        crop, self.times = self.augment.crop, list[float]()
        tags = torch.zeros(batch, self.data.num_classes)
        tags[:, :2] = 1  # VOC shows 1.5 classes an image
        images, maps = torch.randn(batch, 3, crop, crop), torch.zeros(batch, 0, crop, crop, dtype=torch.uint8)
        noise = Batch(images.pin_memory() if pin else images, tags, maps)
        for step in range(start, stop):
            if step in (start + WARMUP, stop - 1):
                if pin:
                    torch.cuda.synchronize()
                    if not self.times:
                        torch.cuda.reset_peak_memory_stats()
                self.times.append(time.perf_counter())
            yield noise


def build(run: Run) -> Any:
    """Build the CAM network, frozen as with weights."""
    network: Any = build_cam(run.config, run.data.num_classes)
    if run.config.network.backbone == "resnet38":
        network[0].freeze_stem()
    return pixelss.freeze_norm(network)


def measure_step(run: Run, way: str, steps: int) -> dict[str, float]:
    """Return the mean seconds of a training step with all losses, the peak memory and the step's arithmetic."""
    config = run.config
    config.precision, config.compile, training.LAYOUT = WAYS[way]  # type: ignore[assignment]
    config.cam.rcm_gate = config.cam.mam_gate = Gate(iterations=0)
    config.cam.schedule.iterations = WARMUP + steps + 1  # the last one also writes a checkpoint
    student = build(run).to(run.device)
    samples = Repeated(run.data, run.data.stems(config.data.train), config, config.cam.augment)
    objective = Objective(config, student, run.data.num_classes, len(samples))
    moved = partial(objective.teacher.update, student)
    training.train(run, STAGE, student, samples, objective, companions=objective.modules, after_step=moved)
    seconds = (samples.times[1] - samples.times[0]) / steps
    return {"seconds": seconds, "images": config.cam.schedule.batch, "tflop": step_tflop(run), "peak_mib": peak(run)}


def step_tflop(run: Run) -> float:
    """Count the networks' arithmetic of one step, without doing it."""
    config = run.config.cam
    with torch.device("meta"):
        student = build(run)
        sides = [round(config.augment.crop * scale) for scale in config.scales]
        inputs = [torch.zeros(config.schedule.batch, 3, side, side) for side in sides]
        with FlopCounterMode(display=False) as counter:
            for images in inputs:
                student(images).cam.sum().backward()
                with torch.no_grad():  # the teacher
                    student(images)
    return float(counter.get_total_flops() / 1e12)


def measure_loader(run: Run, steps: int) -> dict[str, float]:
    """Return the mean seconds of a batch that nothing else waits for, after what the workers made beforehand."""
    config, workers = run.config, max(1, run.config.workers)
    ahead, steps = 3 * workers, max(steps, 10 * workers)
    samples = Samples(run.data, run.data.stems(config.data.train), config, config.cam.augment)
    batches = samples.batches(config.cam.schedule.batch, 0, ahead + steps, pin=run.device.type == "cuda")
    for _ in range(ahead):
        next(batches)
    start = time.perf_counter()
    count = sum(len(batch.images) for batch in batches)
    return {"seconds": (time.perf_counter() - start) / steps, "images": count / steps}


def measure_inference(run: Run, precision: Any) -> dict[str, float]:
    """Return the seconds of the stage infer_cam from the loaded network to the last file."""
    run.config.precision = precision
    run.folder("train_cam").mkdir(parents=True)
    torch.save(build_cam(run.config, run.data.num_classes).state_dict(), run.folder("train_cam") / "model.pt")
    stems = run.data.stems(run.config.data.train)
    return {"seconds": len(stems) / write_cams(run, stems), "images": len(stems), "peak_mib": peak(run)}


def peak(run: Run) -> float:
    """Return the peak memory in MiB: of the device, or of the whole process on a CPU."""
    cuda = run.device.type == "cuda"
    return (
        torch.cuda.max_memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )


def write_noise(root: Path, images: int, classes: int = 20) -> Path:
    """Write images of VOC's sizes, blurred so that their files are as large as photographs', and their tags."""
    rng = np.random.default_rng(0)
    for name in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    (root / "classes.txt").write_text("".join(f"class{i}\n" for i in range(classes)))
    stems = [f"noise_{i:04d}" for i in range(images)]
    (root / "ImageSets/Segmentation/train.txt").write_text("".join(f"{stem}\n" for stem in stems))
    for i, stem in enumerate(stems):
        # Of ten, five are 500 x 375, four of two other common sizes, one of a size that hardly another has.
        size = [(500, 375), (375, 500), (500, 375), (500, 333), (500, 375)][i % 5] if i % 10 else (500, 280 + i % 97)
        small = Image.fromarray(rng.integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(root / f"JPEGImages/{stem}.jpg", quality=92)
        tag = f"<annotation><object><name>class{i % classes}</name></object></annotation>"
        (root / f"Annotations/{stem}.xml").write_text(tag)
    return root


def measure(row: str, args: argparse.Namespace) -> dict[str, float]:
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        data = VOCFolder(args.data or write_noise(Path(folder, "data"), args.images))
        config = Config(device=device.type, workers=args.workers, data=Data(train=args.list, score=args.list))  # type: ignore[arg-type]
        config.network, config.infer_cam = Network(args.backbone), InferCAM(crf=None)
        config.cam.augment.crop = args.crop
        config.cam.schedule = Schedule(batch=args.batch, log_every=10**9, checkpoint_every=10**9)
        run = Run(config, data, Path(folder, "out"), device)
        if row == "loader":
            return measure_loader(run, args.steps)
        if row.startswith("infer_cam"):
            return measure_inference(run, row.split()[-1])
        return measure_step(run, row.removeprefix("step, "), args.steps)


def main() -> None:
    """Measure every row in a process of its own, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cpu")
    add("--backbone", default="resnet38")
    add("--batch", type=int, default=16)
    add("--crop", type=int, default=192)
    add("--steps", type=int, default=20)
    add("--workers", type=int, default=8, help="processes that load images")
    add("--data", type=Path, help="a VOC-layout folder for loader and infer_cam")
    add("--list", default="train", help="its image list")
    add("--images", type=int, default=256, help="noise images where there is no --data")
    add("--peak", type=float, help="TFLOP/s of the device in bf16, for MFU")
    add("--only", default="", help="rows whose name holds this")
    add("--out", type=Path, help="write the figures as JSON")
    add("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args)))
        return
    cuda = args.device.startswith("cuda")
    device = torch.cuda.get_device_name(args.device) if cuda else f"{platform.processor() or platform.machine()} CPU"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.backbone}, ", end="")
    print(f"batch {args.batch}, crop {args.crop}, {args.workers} workers")
    print(f"{'':24}{'time':>12}{'images/s':>10}{'TFLOP/s':>9}{'MFU':>6}{'peak':>12}")
    figures: dict[str, dict[str, float]] = {}
    for row in (row for row in ROWS if args.only in row):
        if "compiled" in row and not cuda:
            continue  # minutes of compiling that tell nothing about a GPU
        command = [sys.executable, *sys.argv, "--one", row]
        child = subprocess.run(command, capture_output=True, text=True)  # its bars would drown the table in a log
        if child.returncode:
            raise SystemExit(child.stderr)
        figures[row] = one = json.loads(child.stdout.splitlines()[-1])
        speed = one["tflop"] / one["seconds"] if "tflop" in one else None
        cells = [f"{1e3 * one['seconds']:>9.1f} ms", f"{one['images'] / one['seconds']:>10.1f}"]
        cells += [f"{speed:>9.1f}" if speed else f"{'':9}"]
        cells += [f"{100 * speed / args.peak:>5.1f}%" if speed and args.peak else f"{'':6}"]
        cells += [f"{one['peak_mib']:>8.0f} MiB" if "peak_mib" in one else ""]
        print(f"{row:24}{''.join(cells)}", flush=True)
    if args.out:
        setting = {name: value for name, value in vars(args).items() if name not in ("one", "out", "only")}
        report = {"device": device, "torch": torch.__version__, "setting": setting, "figures": figures}
        args.out.write_text(json.dumps(report, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
