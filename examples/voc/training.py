"""The loop that the three training stages share; a stage gives a network, a stream of images and a loss."""

from __future__ import annotations

import hashlib
import io
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batches import Batch, Samples
from config import Config, Gate, Optimizer, Schedule, decisive
from inference import autocast
from numpy.typing import NDArray
from parallel import averaged, barrier, rank, sum_over, world_size
from stages import Run
from storage import append_line, load_checkpoint, remove_checkpoints, remove_unfinished, save_checkpoint, write_atomic
from torch import Tensor, nn
from torch import _dynamo as dynamo
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

# (network under its wrapper, batch, steps done before, whether the values are wanted) -> loss, values to report
Loss = Callable[[nn.Module, Batch, int, bool], tuple[Tensor, dict[str, Tensor]]]

SECTIONS = {"train_cam": "cam", "train_affinity": "affinity", "train_seg": "seg"}
LAYOUT = torch.channels_last  # what convolutions on CUDA are fastest with


def train(
    run: Run,
    stage: str,
    network: nn.Sequential,
    samples: Samples,
    loss: Loss,
    *,
    companions: Mapping[str, nn.Module] | None = None,
    after_step: Callable[[], None] = lambda: None,
    pictures: Callable[[], Mapping[str, NDArray[np.uint8]]] = dict,
) -> None:
    """Train `network` (a backbone and a head) from where an earlier call was ended, write model.pt, finish the stage.

    Every random choice of a step depends on (seed, step, rank) alone: a run that was killed and started again ends in
    the same bits as one that was not, as far as the device's arithmetic repeats (the CPU's does). One process and many
    give the same losses, but for dropout and for batch norms that train: these see their own process's images.

    Args:
        run: the run.
        stage: train_cam, train_affinity or train_seg: its folder and its section of the config.
        network: on the run's device.
        samples: what it is trained on.
        loss: returns this process's part of the loss, whose mean over the processes is the loss of the global batch,
            and such parts of the values to report.
        companions: modules besides the network that a checkpoint must hold.
        after_step: called after every step of the optimiser.
        pictures: returns images (H, W, 3) for TensorBoard by name.
    """
    config, device, folder = run.config, run.device, run.folder(stage)
    section = getattr(config, SECTIONS[stage])
    schedule: Schedule = section.schedule
    steps = total_steps(schedule, len(samples))
    modules = {"network": network, **(companions or {})}
    for module in modules.values():
        module.to(memory_format=LAYOUT)
    optimizer = build_optimizer(network, section.optimizer, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    settings = fingerprint(run, stage, samples)
    parts: dict[str, Any] = {"optimizer": optimizer, "scaler": scaler, **modules}
    done = resume(folder, settings, parts, device)
    log = Log(folder, done, tensorboard=config.tensorboard) if rank() == 0 else None

    if config.compile:
        compile_in_place(modules.values())
    wrapped = data_parallel(network)
    train_mode(network)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    health, healthy = torch.zeros((), dtype=torch.float64, device=device), done  # not finite once a loss was not
    skips = config.on_nonfinite_loss == "skip"
    buffers = [tensor for module in modules.values() for tensor in module.buffers()] if skips else []
    bar = tqdm(total=steps, initial=done, desc=stage, unit="step", dynamic_ncols=True, disable=log is None)
    saved: Future[Path] | None = None
    with bar, deterministic(config), ThreadPoolExecutor(1) as writer:
        stream = samples.batches(schedule.batch, done, steps, pin=device.type == "cuda")
        for step, batch in enumerate(stream, done):
            last = step + 1 == steps
            report = last or (step + 1) % schedule.log_every == 0
            save = last or (step + 1) % schedule.checkpoint_every == 0
            torch.manual_seed(int(np.random.SeedSequence((config.seed, step, rank())).generate_state(1)[0]))
            lr = set_lr(optimizer, section.optimizer, step / steps)
            kept = [tensor.clone() for tensor in buffers]
            with autocast(run):
                value, values = loss(wrapped, to_device(batch, device), step, report)
            optimizer.zero_grad()
            scaler.scale(value).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(weights, section.optimizer.clip or math.inf)

            # Looking waits for the device, so on CUDA a run that stops looks only where it waits anyway. The scaler of
            # fp16 provokes gradients that overflow and leaves out their steps by itself.
            health += value.detach() if scaler.is_enabled() else value.detach() + norm
            look = skips or report or save or device.type == "cpu"
            bad = look and not sum_over(health).isfinite()
            if bad and not skips:
                raise RuntimeError(
                    f"The loss or its gradient was not finite in the steps {healthy + 1} to {step + 1} of {stage}; the "
                    "checkpoint before is intact. To go on from it without such steps set on_nonfinite_loss: skip; or "
                    f"remove {folder} and begin again with a lower {SECTIONS[stage]}.optimizer.lr or a clip."
                )
            if bad:
                health.zero_()
                for changed, before in zip(buffers, kept, strict=True):  # by the forward pass
                    changed.copy_(before)
                warnings.warn(f"step {step + 1} of {stage} is left out: its loss is not finite", stacklevel=2)
            else:
                scaler.step(optimizer)
                after_step()
            scaler.update()
            healthy = step + 1 if look else healthy

            bar.update()
            if report:
                figures = averaged({"loss": value, **values})  # in every process, for it is a collective
                if log is not None:
                    rate = bar.format_dict["rate"] or 0.0
                    bar.set_postfix({name: f"{figure:.3g}" for name, figure in figures.items()})
                    epoch = (step + 1) * schedule.batch / len(samples)
                    log.write(step + 1, {"epoch": epoch, "lr": lr, "images_per_s": rate * schedule.batch, **figures})
            if save and log is not None:
                log.show(step + 1, pictures() if config.tensorboard else {})
                state = {"step": step + 1, "settings": settings}
                state |= {name: part.state_dict() for name, part in parts.items()}
                if saved is not None:
                    saved.result()  # or its error
                copy = tree_map_only(Tensor, lambda x: x.detach().to("cpu", copy=True), state)
                saved = writer.submit(save_checkpoint, folder, step + 1, copy)  # while the next steps go on
    if saved is not None:
        saved.result()
    if rank() == 0:
        buffer = io.BytesIO()
        torch.save(network.state_dict(), buffer)
        write_atomic(folder / "model.pt", buffer.getvalue())
    run.finish(stage, steps=steps)
    if rank() == 0:
        remove_checkpoints(folder)


def resume(folder: Path, settings: Mapping[str, str], parts: Mapping[str, Any], device: torch.device) -> int:
    """Load the newest checkpoint's states into `parts`, where there is one; returns the steps done."""
    state = load_checkpoint(folder, map_location=device)
    if state is not None:
        check_settings(folder, state["settings"], settings)
        for name, part in parts.items():
            part.load_state_dict(state[name])
    barrier()  # all have read before one writes
    return 0 if state is None else int(state["step"])


def compile_in_place(modules: Iterable[nn.Module]) -> None:
    """Compile the modules; the names of their tensors stay."""
    torch.compiler.reset()  # all networks share one limit of graphs; past it the last stage would run uncompiled
    dynamo.config.cache_size_limit = 32  # graphs: scales of the student, of the teacher, in training and not
    dynamo.config.optimize_ddp = False  # it splits graphs to send gradients early, which sums over scales prevent
    for module in modules:
        module.compile(dynamic=False)  # one graph a scale


def data_parallel(network: nn.Module) -> nn.Module:
    """Return the network under DDP, in one process the network itself."""
    if world_size() == 1:
        return network
    with warnings.catch_warnings():  # newer torch has another name, which older does not know
        warnings.filterwarnings("ignore", "`?broadcast_buffers", FutureWarning)
        return DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)


def train_mode(network: nn.Module) -> None:
    """Put the network in training mode, frozen norms aside.

    Their hook would put them back, but torch.compile would compile the pass that does it by itself.
    """
    network.train()
    for module in network.modules():
        trained = [weight.requires_grad for weight in module.parameters()]
        if isinstance(module, _BatchNorm) and trained and not any(trained):
            module.eval()


def total_steps(schedule: Schedule, images: int) -> int:
    steps = round(schedule.epochs * images / schedule.batch) if schedule.iterations is None else schedule.iterations
    return max(1, steps)


def gate_step(gate: Gate, schedule: Schedule, images: int) -> int:
    """Return the number of steps before the loss behind `gate` starts."""
    return round(gate.epochs * images / schedule.batch) if gate.iterations is None else gate.iterations


def build_optimizer(network: nn.Sequential, settings: Optimizer, *, fused: bool) -> torch.optim.SGD:
    """Build SGD over what is trained: weights and biases of the backbone, then of the head; biases do not decay."""
    groups = []
    for part, factor in ((network[:-1], 1.0), (network[-1], settings.head_lr)):
        trained = [(name, weight) for name, weight in part.named_parameters() if weight.requires_grad]
        for bias in (False, True):
            params = [weight for name, weight in trained if name.endswith("bias") == bias]
            scale, decay = (settings.bias_lr, 0.0) if bias else (1.0, settings.weight_decay)
            groups.append({"params": params, "factor": factor * scale, "weight_decay": decay})
    return torch.optim.SGD(groups, settings.lr, settings.momentum, fused=fused)


def set_lr(optimizer: torch.optim.SGD, settings: Optimizer, progress: float) -> float:
    """Set every group's rate for this step of the poly schedule; returns the backbone's."""
    lr = settings.lr * float((1 - progress) ** settings.power)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]
    return lr


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move images and maps; tags stay on the CPU, where asking which classes are present waits for nothing."""
    images = batch.images.to(device, non_blocking=True, memory_format=LAYOUT)
    return batch._replace(images=images, maps=batch.maps.to(device, non_blocking=True))


@contextmanager
def deterministic(config: Config) -> Iterator[None]:
    """Let torch choose deterministic algorithms or, unless they are asked for, the fastest convolutions."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.benchmark = not config.deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def fingerprint(run: Run, stage: str, samples: Samples) -> dict[str, str]:
    """Return every setting that decides what this stage learns, by its name in the config."""
    config, section = run.config, SECTIONS[stage]
    parts = {name: asdict(getattr(config, name)) for name in ("network", section)}
    data = {"classes": run.data.classes, "train": hashlib.sha256(" ".join(samples.stems).encode()).hexdigest()[:16]}
    settings = decisive({"seed": config.seed, "precision": config.precision, "data": data, **parts})
    return {name: str(value) for name, value in settings.items()}


def check_settings(folder: Path, saved: Mapping[str, str], current: Mapping[str, str]) -> None:
    """Refuse to go on from a checkpoint of another setting, and name what differs."""
    names = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
    if names:
        changes = "; ".join(f"{name} was {saved.get(name)}, is {current.get(name)}" for name in names)
        raise ValueError(f"{folder} holds a run begun with other settings: {changes}. Set them back, or remove it.")


class Log:
    """metrics.jsonl and, where asked for, TensorBoard files; what an ended process wrote after step `done` goes."""

    def __init__(self, folder: Path, done: int, *, tensorboard: bool) -> None:
        remove_unfinished(folder)
        self.path = folder / "metrics.jsonl"
        if self.path.is_file():
            whole = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
            write_atomic(self.path, "".join(line for line in whole if json.loads(line)["step"] <= done))
        self.board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # an extra that only this setting needs

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        figures = {name: figure for name, figure in figures.items() if math.isfinite(figure)}  # JSON knows no NaN
        append_line(self.path, json.dumps({"step": step, **figures}))
        if self.board is not None:
            for name, figure in figures.items():
                self.board.add_scalar(name, figure, step)

    def show(self, step: int, pictures: Mapping[str, NDArray[np.uint8]]) -> None:
        for name, picture in pictures.items():
            self.board.add_image(name, picture, step, dataformats="HWC")
        if self.board is not None:
            self.board.flush()
