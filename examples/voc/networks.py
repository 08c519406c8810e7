"""The three networks of the pipeline, all one backbone and one head: CAMs, affinities, segmentation."""

from __future__ import annotations

import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from config import Config, Network
from numpy.typing import NDArray
from stages import Run
from storage import load_weights
from texts import BadFileError
from torch import Tensor, nn
from torch.nn.functional import interpolate

import pixelss

sys.path.append(str(Path(__file__).parent.parent))
from small import Backbone

TAPS = {"resnet38": (512, 1024, 4096), "small": (128, 128, 128)}  # the channels of what `forward_taps` gives
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Taps(nn.Module):
    """A backbone that gives all feature maps of the affinity head; `out_channels` has one entry a map.

    Args:
        backbone: with `forward_taps`, or with a `net` that returns a list.
        out_channels: of the maps.
        one_size: bring a list's maps to the size of the last.
    """

    def __init__(self, backbone: Any, out_channels: tuple[int, ...], *, one_size: bool) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.out_channels = out_channels
        self.one_size = one_size

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if hasattr(self.backbone, "forward_taps"):
            taps: tuple[Tensor, ...] = self.backbone.forward_taps(x)
            return taps
        levels = self.backbone.net(x)
        if not self.one_size:
            return tuple(levels)
        return tuple(interpolate(level, levels[-1].shape[-2:], mode="bilinear") for level in levels)


@dataclass(frozen=True)
class Affinities:
    """A way to the affinities of neighbouring cells: the head that learns them, and how its output is read.

    Args:
        head: (channels of the taps, radius) -> a head of the taps.
        pairs: (the head's output, radius) -> affinities (B, O, h, w).
        walkers: (scores (B, K, h, w), the head's output) -> what walks on them.
        beta: the exponent of the walk, where the config names none.
        trains_backbone: whether the head's gradient reaches the taps, which are then of one size.
        zones: whether what it learns from are the zones of the labels, not pairs.
    """

    head: Callable[[Sequence[int], int], nn.Module]
    pairs: Callable[[Tensor, int], Tensor]
    walkers: Callable[[Tensor, Tensor], Tensor]
    beta: float
    trains_backbone: bool
    zones: bool = False


# By the name that affinity.kind gives them.
AFFINITIES: dict[str, Affinities] = {
    "features": Affinities(  # AffinityNet
        head=lambda channels, radius: pixelss.AffinityHead(channels, dims=(64, 128, 256), radius=radius),
        pairs=lambda output, radius: output,
        walkers=lambda scores, output: scores,
        beta=8,
        trains_backbone=True,
    ),
    "path": Affinities(  # IRNet, without its displacement, which is for instances
        head=lambda channels, radius: pixelss.BoundaryHead(channels),
        pairs=lambda output, radius: pixelss.path_affinity(output.sigmoid(), radius=radius),
        walkers=lambda scores, output: scores * (1 - output.sigmoid()),
        beta=10,
        trains_backbone=False,
    ),
}
AFFINITIES["zones"] = replace(AFFINITIES["path"], beta=5, zones=True)  # BES


class CorrelatedHead(pixelss.CAMHead):
    """A `CAMHead` with SEAM's pixel correlation beside it, under the names of a `CAMHead` and `correlation`."""

    def __init__(self, in_channels: int, num_classes: int, *, dim: int, taps: Sequence[int]) -> None:
        super().__init__(in_channels, num_classes, dim=dim)
        self.correlation = pixelss.PixelCorrelation(taps, dims=(64, 128)[-len(taps) :])


class Correlated(nn.Sequential):
    """A backbone and a `CorrelatedHead`: images to a `pixelss.CAMOutput`, as without correlation.

    What is correlated are the taps before the feature map (conv4 and conv5 of resnet38), where the backbone gives some,
    else that map. With `correlate` the refined CAMs (B, K, h, w) follow the raw ones in `cam`.
    """

    def forward(self, images: Tensor, *, correlate: bool = False) -> pixelss.CAMOutput:
        backbone: Any = self[0]
        head: Any = self[1]
        *taps, features = backbone.forward_taps(images) if hasattr(backbone, "forward_taps") else [backbone(images)]
        output: pixelss.CAMOutput = head(features)
        if not correlate:
            return output
        refined = head.correlation(taps or [features], images, output.cam)
        return output._replace(cam=torch.cat([output.cam, refined], 1))

    def refine(self, images: Tensor) -> pixelss.CAMOutput:
        """Return the output with the refined CAMs of the foreground (B, N, h, w) in place of the raw ones."""
        output: pixelss.CAMOutput = self(images, correlate=True)
        return output._replace(cam=output.cam[:, -output.logits.shape[1] :])


def build_backbone(network: Network) -> Any:
    """Build the backbone; given weights, its norms stay as they were trained."""
    backbone: Any
    if network.backbone in TAPS and network.output_stride != 8:
        raise ValueError(f"network.output_stride must be 8 for {network.backbone}, but is {network.output_stride}.")
    if network.backbone == "small":
        if network.weights:
            raise ValueError("network.weights must be null for the backbone small, which nobody published weights of.")
        backbone = Backbone()
    elif network.backbone == "resnet38":
        backbone = pixelss.resnet38()
        if network.weights:
            check_report(pixelss.load_resnet38(backbone, network.weights), network.weights)
            backbone = backbone.freeze_stem() if network.frozen is None else backbone
    else:
        backbone = pixelss.timm_backbone(network.backbone, output_stride=network.output_stride, **_pretrained(network))
    return _freeze(backbone, network)


def check_report(report: pixelss.LoadReport, path: Path) -> None:
    """Tell which tensors a file lacks; raises where it lacks most. `timm_backbone` does the same by itself."""
    if not report.missing:
        return
    arrived, wanted = len(report.loaded), len(report.loaded) + len(report.missing)
    lacks = (
        f"{path} holds {arrived} of the {wanted} tensors of resnet38; {', '.join(report.missing[:3])}, ... are missing"
    )
    if 2 * arrived < wanted:
        raise ValueError(f"network.weights must fit the network, but {lacks}, and it has {report.skipped[:3]} instead.")
    warnings.warn(f"{lacks} and keep their initial values", stacklevel=3)


def _freeze(backbone: Any, network: Network) -> Any:
    for name in network.frozen or ():
        if name not in (names := dict(backbone.named_modules())):
            near = ", ".join(get_close_matches(name, filter(None, names), 8, 0))
            raise ValueError(f"network.frozen must name modules of {network.backbone} ({near}, ...), but has {name!r}.")
        names[name].requires_grad_(False)
    return pixelss.freeze_norm(backbone) if network.weights else backbone


def _pretrained(network: Network) -> dict[str, Any]:
    overlay = {"file": str(network.weights)}
    return {"pretrained": True, "pretrained_cfg_overlay": overlay} if network.weights else {}


def build_cam(config: Config, num_classes: int) -> nn.Sequential:
    """Build the CAM network: images to a `pixelss.CAMOutput`."""
    backbone, dim = build_backbone(config.network), config.network.dim
    if config.cam.correlates:
        taps = TAPS.get(config.network.backbone, ())[:-1] or (backbone.out_channels,)
        correlated = CorrelatedHead(backbone.out_channels, num_classes, dim=dim, taps=taps)
        network: nn.Sequential = Correlated(backbone, correlated)
    else:
        network = nn.Sequential(backbone, pixelss.CAMHead(backbone.out_channels, num_classes, dim=dim))
    if config.cam.subcategory > 0:
        network[1].add_module("subclassify", nn.Linear(dim, num_classes * config.cam.subclusters))
    return network


def build_affinity(config: Config) -> nn.Sequential:
    """Build the affinity network: images to what `AFFINITIES[config.affinity.kind]` reads.

    Its taps are conv4, conv5 and conv6 of resnet38, else the last three feature maps; a timm network must know
    `output_stride`, as convolutional ones do.
    """
    network, kind = config.network, AFFINITIES[config.affinity.kind]
    if network.backbone in TAPS:
        taps = Taps(build_backbone(network), TAPS[network.backbone], one_size=kind.trains_backbone)
    else:
        # The same tensors under the same names as timm_backbone's, which gives the last level alone.
        body = nn.Module()
        body.net = net = timm.create_model(
            network.backbone,
            features_only=True,
            out_indices=(-3, -2, -1),
            output_stride=network.output_stride,
        )  # its weights are the CAM network's
        channels: Any = net.feature_info
        taps = Taps(_freeze(body, network), tuple(channels.channels()), one_size=kind.trains_backbone)
    if not kind.trains_backbone:
        taps.requires_grad_(False)
    return nn.Sequential(taps, kind.head(taps.out_channels, config.affinity.radius))


def build_segmentation(config: Config, num_classes: int) -> nn.Sequential:
    """Build DeepLab-LargeFOV: images to logits (B, N + 1, h, w)."""
    backbone = build_backbone(config.network)
    return nn.Sequential(backbone, pixelss.LargeFOV(backbone.out_channels, num_classes, norm=config.seg.norm))


def load_trained(run: Run, stage: str) -> nn.Sequential:
    """Return the finished network of train_cam, train_affinity or train_seg, in eval mode on the run's device."""
    path = run.folder(stage) / "model.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run stage {stage} first.")
    plain = replace(run.config, network=replace(run.config.network, weights=None))  # they are in model.pt
    if stage == "train_affinity":
        network = build_affinity(plain)
    else:
        network = (build_cam if stage == "train_cam" else build_segmentation)(plain, run.data.num_classes)
    fix = f"remove it and {stage}/done.json, then run {stage} again"
    _fill(network, path, load_weights(path, fix), fix)
    return network.eval().to(run.device).to(memory_format=torch.channels_last)  # as the images are


def load_start(network: nn.Module, folder: Path) -> None:
    """Load the weights of another run's finished train_cam folder.

    A pixel correlation or a second classifier that only one of the two networks has stays untrained, or is left behind.
    """
    path = folder / "model.pt"
    if not path.is_file():
        raise FileNotFoundError(f"cam.start_from must be a finished train_cam folder, but {path} is missing.")
    fix = "name another folder as cam.start_from"
    weights = load_weights(path, fix)
    own = network.state_dict()

    def optional(name: str) -> bool:
        return ".correlation." in name or ".subclassify." in name

    kept = {name: weight for name, weight in own.items() if optional(name) and name not in weights}
    theirs = {name: weight for name, weight in weights.items() if not optional(name) or name in own}
    _fill(network, path, kept | theirs, fix)


def _fill(network: nn.Module, path: Path, weights: dict[str, Tensor], fix: str) -> None:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        why = textwrap.shorten(" ".join(str(error).split("\n")[1:2]), 200)
        raise BadFileError(f"{path} holds another network than the settings describe: {fix} ({why}).") from error


def cam_inference(run: Run) -> Callable[[Tensor], pixelss.CAMOutput]:
    """Return the finished CAM network as CAMs are inferred with it: refined where it has learned a correlation."""
    network = load_trained(run, "train_cam")
    return network.refine if isinstance(network, Correlated) else network


def normalisation(config: Config) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of RGB / 255 that the backbone expects."""
    known = None if config.network.backbone in TAPS else timm.get_pretrained_cfg(config.network.backbone)
    return (tuple(known.mean), tuple(known.std)) if known else IMAGENET


def to_tensor(image: NDArray[np.uint8], config: Config) -> Tensor:
    """Return an image (H, W, 3), uint8 RGB, as the normalised tensor (3, H, W) that the networks take."""
    mean, std = (np.array(values, np.float32) for values in normalisation(config))
    return torch.from_numpy((image.astype(np.float32) / 255 - mean) / std).permute(2, 0, 1)
