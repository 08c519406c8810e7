"""Every setting of the pipeline, typed; paper.yaml gives the paper's values and the reasons for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Scales = tuple[float, ...]
# Settings that change speed, memory or reports, not results: they may differ when a run continues.
FREE = {"device", "workers", "compile", "tensorboard", "max_batch", "checkpoint_every", "log_every"}
FREE |= {"on_bad_file", "on_nonfinite_loss"}  # until such a thing is met


def decisive(tree: Any, name: str = "") -> dict[str, Any]:
    """Return the settings of nested dictionaries, under dotted names, that are not free to change."""
    if not isinstance(tree, dict):
        return {name: tree}
    kept = {key: branch for key, branch in tree.items() if key not in FREE}
    return {k: v for key, branch in kept.items() for k, v in decisive(branch, f"{name}.{key}".strip(".")).items()}


@dataclass
class Data:
    """Which images.

    Args:
        classes: foreground class names in the masks' order; null reads classes.txt of the data folder.
        train: list that is trained on, with tags only.
        score: list whose masks score the CAMs and pseudo-labels; null: no masks, no scores.
        val: list whose masks score the segmentation; null as above.
        test: list without masks, exported for the test server; null skips the export.
        tags: null: the folder is in the VOC layout. A table with the columns image and tags, or the word folders (an
            image's tag is its folder's name): `--tags`. The lists are then all, and masks: those with a mask.
        masks: folder of the masks STEM.png, for images with `tags`: `--masks`.
        longest: side in pixels that images with `tags` are shrunk to; null: none are.
        on_bad_file: stop at an unreadable image, mask or annotation, or skip it with a warning.
    """

    classes: list[str] | None = None
    train: str = "train_aug"
    score: str | None = "train"
    val: str | None = "val"
    test: str | None = "test"
    tags: str | None = None
    masks: Path | None = None
    longest: int | None = None
    on_bad_file: Literal["stop", "skip"] = "stop"


@dataclass
class Network:
    """The backbone of all three networks.

    Args:
        backbone: resnet38, small (a few convolutions, for the demo) or any timm name.
        weights: its weight file; its norms are then frozen.
        frozen: names of its modules that are not trained; null: with weights resnet38's stem, else none; []: none.
        output_stride: of a timm network; the others have stride 8.
        dim: D, the channels of the CAM head's features.
    """

    backbone: str = "resnet38"
    weights: Path | None = None
    frozen: tuple[str, ...] | None = None
    output_stride: int = 8
    dim: int = 256


@dataclass
class Augment:
    """Random changes of a training image, in this order.

    Args:
        crop: side of the square crop in pixels; a smaller image is padded with zeros after normalisation.
        resize: `scale`: sides times U(range), then the crop; `area`: a random resized crop of that range of areas;
            `longest`: longest side U(range) pixels, then the crop.
        resize_range: see `resize`.
        flip: probability of a horizontal flip.
        jitter: brightness, contrast, saturation, hue.
        jitter_probability: of the colour jitter.
    """

    crop: int = 192
    resize: Literal["scale", "area", "longest"] = "scale"
    resize_range: tuple[float, float] = (0.5, 1.3)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_probability: float = 0.8


@dataclass
class Optimizer:
    """SGD with a learning rate that falls as (1 - step / steps)^power.

    Args:
        lr: of the backbone's weights.
        head_lr: factor on `lr` for the new layers.
        bias_lr: factor on `lr` for biases.
        momentum: the field's scripts set none in effect (they pass the weight decay in its place).
        weight_decay: of all weights.
        power: of the decay.
        clip: largest norm of the gradient; null does not clip.
    """

    lr: float = 0.01
    head_lr: float = 1.0
    bias_lr: float = 2.0
    momentum: float = 0.0
    weight_decay: float = 5e-4
    power: float = 0.9
    clip: float | None = None


@dataclass
class Schedule:
    """How long, and how often the state is saved.

    Args:
        epochs: passes over the training list.
        iterations: steps; where given, they replace `epochs`.
        batch: images a step over all processes.
        checkpoint_every: steps between checkpoints.
        log_every: steps between lines of metrics.jsonl.
    """

    epochs: float = 20.0
    iterations: int | None = None
    batch: int = 16
    checkpoint_every: int = 500
    log_every: int = 20

    def __post_init__(self) -> None:
        for name in ("iterations", "batch", "checkpoint_every", "log_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"schedule.{name} must be at least 1, but is {value}; for never give a large number.")


@dataclass
class Gate:
    """When a loss starts: after so many epochs, or, where given, after so many iterations."""

    epochs: float = 0.0
    iterations: int | None = None


@dataclass
class CAM:
    """Stage train_cam: the CAM network and the paper's losses.

    Args:
        cls: weight of the classification loss (lambda_1 of Yoon Eq. 9).
        rcm: weight of the regional contrastive loss.
        mam: weight of the multi-scale attentive loss.
        direct: weight of the direct loss (Table 2, Exp. 1).
        er: weight of the equivariance of two views' CAMs (SEAM; 1 there, as of the next two).
        ecr: weight of the equivariance of one view's CAMs and the other's refined ones, which takes a pixel correlation
            into the network; its CAMs are then inferred refined.
        minpool: weight of the activation of the pixels that are refined to the least, which takes it in as well.
        erase: weight of OC-CSE's loss on images with one class erased; its classifier is the network of `start_from`.
        hide: weight of CPN's losses of two images that hide each other's patches (1 there, as of the next three).
        puzzle: weight of Puzzle-CAM's losses of an image's tiles.
        ppc: weight of PPC's contrast of the two views' pixels, there beside SEAM's three losses.
        icd: weight of ICD's discrimination within a class, on the CAMs.
        subcategory: weight of SC-CAM's classification by sub-categories (5 there), which takes a second classifier into
            the network; they are found in the features of the network of `start_from`.
        subclusters: sub-categories of each class.
        ecs: weight of what the teacher still finds after an erasure, our reading of ECS-Net's abstract.
        rcm_gate: when the contrastive (and the direct) loss starts.
        mam_gate: when the attentive loss starts.
        scales: of student and teacher.
        cls_scales: of the classification loss, a part of `scales`.
        mam_student_scales: of the student in the attentive loss, a part of `scales`; null: all; one for SMM.
        view_scales: of the two views that SEAM's and PPC's losses compare.
        attentive: false sets xi = 1 (MMM, SMM).
        form: of the contrastive loss: infonce, or ratio as Yoon Eq. 5 is printed.
        temperature: T.
        threshold: of the class region mask.
        teacher_momentum: alpha; 0 shares the weights.
        start_from: a finished train_cam folder to start from, for rows that share one baseline.
    """

    cls: float = 1.0
    rcm: float = 1.0
    mam: float = 1.0
    direct: float = 0.0
    er: float = 0.0
    ecr: float = 0.0
    minpool: float = 0.0
    erase: float = 0.0
    hide: float = 0.0
    puzzle: float = 0.0
    ppc: float = 0.0
    icd: float = 0.0
    subcategory: float = 0.0
    subclusters: int = 10
    ecs: float = 0.0
    rcm_gate: Gate = field(default_factory=Gate)
    mam_gate: Gate = field(default_factory=lambda: Gate(epochs=6))
    scales: Scales = (0.5, 1.0, 2.0)
    cls_scales: Scales = (0.5, 1.0, 2.0)
    mam_student_scales: Scales | None = None
    view_scales: tuple[float, float] = (1.0, 0.3)
    attentive: bool = True
    form: Literal["infonce", "ratio"] = "infonce"
    temperature: float = 0.5
    threshold: float = 0.2
    teacher_momentum: float = 0.997
    start_from: Path | None = None
    schedule: Schedule = field(default_factory=Schedule)
    augment: Augment = field(default_factory=Augment)
    optimizer: Optimizer = field(default_factory=Optimizer)

    @property
    def correlates(self) -> bool:
        """Tell whether the network has a pixel correlation: whether a loss would teach it."""
        return self.ecr > 0 or self.minpool > 0


@dataclass
class CRF:
    """A dense CRF; null switches a kernel off.

    Args:
        iterations: of the mean field.
        gaussian: sxy in pixels, compat.
        bilateral: sxy in pixels, srgb in grey levels, compat.
    """

    iterations: int = 10
    gaussian: tuple[float, float] | None = (3.0, 3.0)
    bilateral: tuple[float, float, float] | None = (80.0, 13.0, 10.0)


@dataclass
class PAR:
    """Pixel-adaptive refinement, in a CRF's place.

    Args:
        iterations: how often scores move.
        size: factor at which it works; null: the image's size.
        dilations: distances of the neighbours in pixels at that size.
    """

    iterations: int = 10
    size: float | None = 0.5
    dilations: tuple[int, ...] = (1, 2, 4, 8, 12, 24)


@dataclass
class InferCAM:
    """Stages infer_cam and score_cam.

    Args:
        scales: each also flipped.
        single_scales: score every scale by itself as well (Table 5).
        max_batch: most images of one shape that share a forward pass.
        crf: CAMs are scored with it as well ("also with CRF" of Table 1); null leaves that out.
        par: CAMs are scored with this refinement as well; null leaves that out.
        crf_alpha: of the background score beside the CAMs in both of them; null: a constant background at the best
            threshold, what the CAMs compete with in the score without either.
    """

    scales: Scales = (0.5, 1.0, 1.5, 2.0)
    single_scales: bool = False
    max_batch: int = 8
    crf: CRF | None = field(default_factory=CRF)
    par: PAR | None = None
    crf_alpha: float | None = None


@dataclass
class Affinity:
    """Stage train_affinity: AffinityNet, IRNet's or BES's boundaries.

    Args:
        kind: features: a pair's affinity is the likeness of its features (AffinityNet); path: no boundary lies between
            (IRNet), the backbone stays as it is; zones: the same, learned where labels change, not by pairs (BES).
        alpha_low: of the background score whose foreground is trusted.
        alpha_high: of the background score whose background is trusted.
        radius: of the pairs, in cells; IRNet trains with 10.
        zone_stride: of BES's zones, in pixels; they are cut out by a window of 13 of their cells.
    """

    kind: Literal["features", "path", "zones"] = "features"
    alpha_low: float = 4.0
    alpha_high: float = 32.0
    radius: int = 5
    zone_stride: int = 4
    crf: CRF = field(default_factory=CRF)
    schedule: Schedule = field(default_factory=lambda: Schedule(epochs=8, batch=8))
    augment: Augment = field(
        default_factory=lambda: Augment(
            crop=448, resize_range=(0.7, 1.3), jitter=(0.3, 0.3, 0.3, 0.1), jitter_probability=1.0
        )
    )
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(head_lr=10))


@dataclass
class MakeLabels:
    """Stage make_labels: the random walk, and a CRF or PAR on its result.

    Args:
        alpha: of the background score that walks along.
        radius: of the walk's pairs; null: affinity.radius. IRNet walks with 5.
        beta: exponent of the affinities; null: 8, of paths 10, of zones 5.
        log_steps: logarithm to base 2 of the walk's steps.
        crf: on the walk's result; null leaves it out.
        par: refines the walk's result in the CRF's place; null: the CRF.
    """

    alpha: float = 16.0
    radius: int | None = None
    beta: float | None = None
    log_steps: int = 8
    crf: CRF | None = field(default_factory=CRF)
    par: PAR | None = None


@dataclass
class Segmentation:
    """Stages train_seg, infer_seg and evaluate: DeepLab-LargeFOV on the pseudo-labels.

    Args:
        norm: LargeFOV's variant with batch norm.
        from_cam: start from the CAM network's backbone, else from `network.weights`.
        scales: of the training loss.
        energy: weight of RRM's dense energy (1e-7 there), which spreads labels along the colours into what is void.
        test_scales: of the inference, each also flipped.
        tile: side of the largest input in pixels.
        max_batch: most images of one shape that share a forward pass.
        crf: on the result; null leaves it out.
    """

    norm: bool = False
    from_cam: bool = True
    scales: Scales = (1.0, 0.75, 0.5)
    energy: float = 0.0
    test_scales: Scales = (0.5, 0.75, 1.0, 1.25, 1.5)
    tile: int = 1024
    max_batch: int = 4
    crf: CRF | None = field(default_factory=CRF)
    schedule: Schedule = field(default_factory=lambda: Schedule(epochs=35, batch=8))
    augment: Augment = field(
        default_factory=lambda: Augment(
            crop=321, resize="longest", resize_range=(256, 768), jitter=(0.3, 0.3, 0.3, 0.1), jitter_probability=1.0
        )
    )
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=7e-4, head_lr=10))


@dataclass
class Config:
    """The whole pipeline.

    Args:
        seed: of every random choice.
        device: cuda or cpu.
        precision: of autocast.
        deterministic: two runs on one GPU agree bit for bit; slower.
        compile: torch.compile the networks.
        workers: a process's: processes that load a training's images, threads that read and write an inference's.
        on_nonfinite_loss: stop, or skip that step.
        tensorboard: also write TensorBoard files, with CAM overlays of fixed images.
    """

    seed: int = 0
    device: Literal["cuda", "cpu"] = "cuda"
    precision: Literal["float32", "bf16", "fp16"] = "bf16"
    deterministic: bool = False
    compile: bool = True
    workers: int = 8
    on_nonfinite_loss: Literal["stop", "skip"] = "stop"
    tensorboard: bool = False
    data: Data = field(default_factory=Data)
    network: Network = field(default_factory=Network)
    cam: CAM = field(default_factory=CAM)
    infer_cam: InferCAM = field(default_factory=InferCAM)
    affinity: Affinity = field(default_factory=Affinity)
    make_labels: MakeLabels = field(default_factory=MakeLabels)
    seg: Segmentation = field(default_factory=Segmentation)
