"""The loop that the three training stages share; a stage gives a network, a stream of images and a loss."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from batches import Batch, Samples
from config import Augment, Config, Gate, Optimizer, Scales, Schedule
from health import Health
from inference import autocast
from parallel import averaged, rank, world_size
from saving import Checkpoints, Log, Pictures, fingerprint, save_model
from stages import Plan, Run, Stage
from storage import remove_checkpoints
from torch import Tensor, nn
from torch import _dynamo as dynamo
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# (network under its wrapper, batch, steps done before, whether the values are wanted) -> loss, values to report
Loss = Callable[[nn.Module, Batch, int, bool], tuple[Tensor, dict[str, Tensor]]]

LAYOUT = torch.channels_last  # what convolutions on CUDA are fastest with


def train(
    run: Run,
    stage: Stage,
    network: nn.Sequential,
    samples: Samples,
    loss: Loss,
    *,
    companions: Mapping[str, nn.Module] | None = None,
    after_step: Callable[[], None] = lambda: None,
    pictures: Pictures = dict,
) -> None:
    """Train `network` (a backbone and a head) from where an earlier call was ended, write model.pt, finish the stage.

    Every random choice of a step depends on (seed, step, rank) alone: a run that was killed and started again ends in
    the same bits as one that was not, as far as the device's arithmetic repeats (the CPU's does). One process and many
    give the same losses, but for dropout and for batch norms that train: these see their own process's images.

    Args:
        run: the run.
        stage: its name is the folder's, its section of the config says how it is trained.
        network: on the run's device.
        samples: what it is trained on.
        loss: returns this process's part of the loss, whose mean over the processes is the loss of the global batch,
            and such parts of the values to report.
        companions: modules besides the network that a checkpoint must hold.
        after_step: called after every step of the optimiser.
        pictures: returns images (H, W, 3) for TensorBoard by name.
    """
    config, device, folder = run.config, run.device, run.folder(stage.name)
    section = getattr(config, str(stage.section))
    schedule: Schedule = section.schedule
    steps = total_steps(schedule, len(samples))
    modules = {"network": network, **(companions or {})}
    for module in modules.values():
        module.to(memory_format=LAYOUT)
    optimizer = build_optimizer(network, section.optimizer, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    states = {"optimizer": optimizer, "scaler": scaler, **modules}
    checkpoints = Checkpoints(folder, fingerprint(run, stage, samples), states)
    done = checkpoints.resume(device)
    log = Log(folder, done, tensorboard=config.tensorboard)

    if config.compile:
        compile_in_place(modules.values())
    wrapped = data_parallel(network)
    train_mode(network)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    health = Health(run, stage, modules.values(), done)
    bar = tqdm(total=steps, initial=done, desc=stage.name, unit="step", dynamic_ncols=True, disable=rank() != 0)
    with bar, deterministic(config), checkpoints:
        stream = samples.batches(schedule.batch, done, steps, pin=device.type == "cuda")
        for step, batch in enumerate(stream, done):
            last = step + 1 == steps
            report = last or (step + 1) % schedule.log_every == 0
            save = last or (step + 1) % schedule.checkpoint_every == 0
            torch.manual_seed(int(np.random.SeedSequence((config.seed, step, rank())).generate_state(1)[0]))
            lr = set_lr(optimizer, section.optimizer, step / steps)
            health.before_step()
            with autocast(run):
                value, values = loss(wrapped, to_device(batch, device), step, report)
            optimizer.zero_grad()
            scaler.scale(value).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(weights, section.optimizer.clip or math.inf)
            # The scaler of fp16 provokes gradients that overflow and leaves out their steps by itself.
            watched = value.detach() if scaler.is_enabled() else value.detach() + norm
            if health.allows(watched, step, look=report or save):
                scaler.step(optimizer)
                after_step()
            scaler.update()
            bar.update()
            if report:
                figures = averaged({"loss": value, **values})  # in every process, for it is a collective
                speed = (bar.format_dict["rate"] or 0.0) * schedule.batch
                bar.set_postfix({name: f"{figure:.3g}" for name, figure in figures.items()})
                epoch = (step + 1) * schedule.batch / len(samples)
                log.write(step + 1, {"epoch": epoch, "lr": lr, "images_per_s": speed, **figures})
            if save:
                log.show(step + 1, pictures)
                checkpoints.save(step + 1)
    save_model(folder / "model.pt", network)
    run.finish(stage.name, steps=steps)
    if rank() == 0:
        remove_checkpoints(folder)


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


def pixels_trained(plan: Plan, schedule: Schedule, augment: Augment, scales: Scales, *, passes: int) -> float:
    """Return how many pixels a training passes forward; a backward pass counts as two `passes`."""
    count = total_steps(schedule, plan.images(plan.config.data.train)) * schedule.batch
    return count * augment.crop**2 * sum(scale * scale for scale in scales) * passes


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
