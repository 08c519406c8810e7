"""What a run needs and costs, told before it starts."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from config import Config, Schedule
from data import BadFileError, VOCFolder, read_list
from parallel import world_size
from training import total_steps

# A step of train_cam with ResNet38 at batch 16, crop 192, scales .5, 1 and 2 costs 49.7 TFLOP: student forward and
# backward (3 forwards) and teacher forward (1). So much is one forward pass of one pixel:
_TFLOP_PER_PIXEL = 49.7 / (16 * 192**2 * (0.5**2 + 1 + 2**2) * 4)
_TFLOPS = 450  # of bf16 a second: 57% of an H100's measured 790
_IMAGE_PIXELS = 375 * 500  # a VOC photograph


def missing(config: Config, root: Path, stages: list[str]) -> list[str]:
    """Return what the stages lack, one sentence a fault: data set, lists, images, masks, weights, packages, device."""
    folders = {
        "JPEGImages": "the images, STEM.jpg",
        "Annotations": "the tags, STEM.xml",
        "SegmentationClass": "the masks for scoring, STEM.png",
    }
    lists = _lists(config, stages)
    first_places = {places[0] for needs in lists.values() for places in needs.values()}
    needed = {place.split("/")[0] for place in first_places} | {"JPEGImages"}
    absent = [name for name in folders if name in needed and not (root / name).is_dir()]
    faults = [f"{root / name} is missing: it holds {folders[name]}." for name in absent]
    if config.data.classes is None and not (root / "classes.txt").is_file():
        faults.append(f"{root / 'classes.txt'} is missing, and data.classes names no classes either.")
    for name, needs in lists.items():
        try:
            stems = read_list(root, name)
        except (FileNotFoundError, BadFileError) as error:
            optional = [field for field in ("score", "val", "test") if getattr(config.data, field) == name]
            hint = f" Where there is none, data.{optional[0]}: null." if optional and name != config.data.train else ""
            faults.append(str(error) + hint)
            continue
        for what, places in needs.items():
            lacking = [s for s in stems if not any((root / place.format(s)).is_file() for place in places)]
            if len(lacking) > (0 if config.data.on_bad_file == "stop" else len(stems) - 1):
                first = " or ".join(str(root / place.format(lacking[0])) for place in places)
                faults.append(f"{len(lacking)} of {len(stems)} {what} of {name}.txt are missing, the first: {first}.")
    trains = any(stage.startswith("train") for stage in stages)
    for setting, path in (("network.weights", config.network.weights), ("cam.start_from", config.cam.start_from)):
        if trains and path and not path.exists():
            faults.append(f"{setting} is {path}, which does not exist.")
    if config.tensorboard and not importlib.util.find_spec("tensorboard"):
        faults.append("tensorboard is true, but the package is missing: python -m pip install tensorboard.")
    if config.device == "cuda" and not torch.cuda.is_available():
        faults.append(
            "device is cuda, but torch sees none: add --device cpu --precision float32 --compile false (slow)."
        )
    return faults


def _lists(config: Config, stages: list[str]) -> dict[str, dict[str, list[str]]]:
    """Return the lists that the stages use and what each of their images needs."""
    image, tags = {"images": ["JPEGImages/{}.jpg"]}, {"annotations": ["Annotations/{}.xml"]}
    masks = {"masks": ["SegmentationClass/{}.png", "SegmentationClassAug/{}.png"]}
    data = config.data
    reads: dict[str, list[tuple[str | None, dict[str, list[str]]]]] = {
        "train_cam": [(data.train, image | tags)],
        "infer_cam": [(data.train, image | tags), (data.score, image | tags)],
        "score_cam": [(data.score, image | tags | masks)],
        "train_affinity": [(data.train, image | tags)],
        "make_labels": [(data.train, image | tags), (data.score, image | tags | masks)],
        "train_seg": [(data.train, image | tags)],
        "infer_seg": [(data.val, image), (data.test, image)],
        "evaluate": [(data.val, image | masks)],
        "export_test": [(data.test, image)],
    }
    lists: dict[str, dict[str, list[str]]] = {}
    for name, needs in (pair for stage in stages for pair in reads[stage]):
        if name is not None:
            lists[name] = lists.get(name, {}) | needs
    return lists


def cost(config: Config, data: VOCFolder, stages: Sequence[str]) -> dict[str, float]:
    """Return the estimated TFLOP of those of the stages that run ResNet38, from one measured step of train_cam."""
    lists, cam, affinity, seg = config.data, config.cam, config.affinity, config.seg

    def images(*names: str | None) -> int:
        return len({stem for name in names for stem in data.stems(name)})

    def passes(schedule: Schedule, crop: int, scales: tuple[float, ...], forwards: int) -> float:
        count = total_steps(schedule, images(lists.train)) * schedule.batch
        return count * crop**2 * sum(s * s for s in scales) * forwards

    def flipped(scales: tuple[float, ...]) -> float:
        return _IMAGE_PIXELS * 2 * sum(s * s for s in scales)

    pixels: dict[str, Callable[[], float]] = {
        "train_cam": lambda: passes(cam.schedule, cam.augment.crop, cam.scales, 4),
        "infer_cam": lambda: images(lists.train, lists.score) * flipped(config.infer_cam.scales),
        "train_affinity": lambda: passes(affinity.schedule, affinity.augment.crop, (1.0,), 3),
        "make_labels": lambda: images(lists.train, lists.score) * _IMAGE_PIXELS,
        "train_seg": lambda: passes(seg.schedule, seg.augment.crop, seg.scales, 3),
        "infer_seg": lambda: (images(lists.val) + images(lists.test)) * flipped(seg.test_scales),
    }
    if "infer_cam" not in stages:
        pixels["score_cam"] = lambda: images(lists.score) * flipped(config.infer_cam.scales)
    return {stage: pixels[stage]() * _TFLOP_PER_PIXEL for stage in stages if stage in pixels}


def print_plan(config: Config, data: VOCFolder | None, stages: list[str], finished: list[str]) -> None:
    """Print the stages, which are finished, and what the others cost; `data` is None where it is incomplete."""
    estimate = cost(config, data, stages) if data and config.network.backbone == "resnet38" else {}
    print(f"{'stage':15}{'state':10}{'PFLOP':>8}{'hours':>8}")
    for stage in stages:
        tflop = 0 if stage in finished else estimate.get(stage, 0)
        numbers = f"{tflop / 1e3:8.0f}{tflop / _TFLOPS / 3600 / world_size():8.2f}" if tflop else ""
        print(f"{stage:15}{'finished' if stage in finished else 'to do':10}{numbers}")
    if estimate:
        print(
            f"An estimate, not a measurement: ResNet38 alone, at {_TFLOPS} TFLOP/s in bf16 (57% of what an H100 gave),"
        )
        print("photographs of 500 x 375; loading, CRF and random walk come on top.")
    elif data:
        print("No estimate: the figures at hand are ResNet38's.")
