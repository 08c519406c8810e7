"""A generated data set in the VOC layout: image tags to train on, masks to score on, no download.

Every object has a small discriminative head and a large striped body. The body's two colours also paint the clutter,
where the stripes run another way: a classifier can live on the heads alone, and finding the body is what class
activation maps must learn. `python examples/shapes.py DIR` writes it.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixelss.viz import voc_palette

CLASSES = ("beetle", "fish", "snail", "worm")
VOID = 255
Array = NDArray[np.float64]

# Per class: hue of the body (also of the clutter), hue of the head, stripe angle against the body's axis in radians,
# stripe period in pixels, body length over width.
_LOOK = {
    "beetle": ((0.55, 0.30, 0.20), (0.95, 0.85, 0.10), 0.0, 5.0, 1.2),
    "fish": ((0.20, 0.40, 0.60), (0.95, 0.25, 0.25), 1.57, 6.0, 1.9),
    "snail": ((0.45, 0.50, 0.20), (0.85, 0.30, 0.90), 0.79, 4.0, 1.0),
    "worm": ((0.60, 0.35, 0.50), (0.20, 0.95, 0.85), 1.57, 4.0, 3.0),
}


def draw_image(rng: np.random.Generator, size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], list[str]]:
    """Return an image (size, size, 3), its mask (size, size) in 0..N with void borders, and its objects' names."""
    canvas = 0.45 + 0.12 * _smooth_noise(rng, size)[..., None] * rng.uniform(0.5, 1, 3)
    mask = np.zeros((size, size), dtype=np.uint8)
    for _ in range(rng.integers(3, 7)):
        look = _LOOK[CLASSES[rng.integers(len(CLASSES))]]
        blob, along, across = _ellipse(rng, size, rng.uniform(0.06, 0.16) * size, rng.uniform(1, 2))
        angle = look[2] + rng.uniform(0.5, 1.1)
        _paint(canvas, blob < 1, _stripes(along, across, angle, look[3] * rng.uniform(0.8, 1.3)), look[0])
    names = []
    for _ in range(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15])):
        index = rng.integers(len(CLASSES))
        body_hue, head_hue, angle, period, ratio = _LOOK[CLASSES[index]]
        radius = rng.uniform(0.15, 0.24) * size / np.sqrt(ratio)
        blob, along, across = _ellipse(rng, size, radius, ratio)
        head = ((along - 0.75 * radius * ratio) ** 2 + across**2) < (0.45 * radius) ** 2
        if (mask[(blob < 1.2) | head] > 0).any():
            continue  # no overlap: every object keeps its head
        _paint(canvas, blob < 1, _stripes(along, across, angle, period), body_hue)
        _paint(canvas, head, _stripes(along, across, 0.4, 3.0), head_hue)
        inside = (blob < 1) | head
        mask[((blob < 1.12) | head) & ~inside] = VOID
        mask[inside] = index + 1
        names.append(CLASSES[index])
    canvas += rng.normal(0, 0.04, canvas.shape)
    return (canvas.clip(0, 1) * 255).astype(np.uint8), mask, names


def _smooth_noise(rng: np.random.Generator, size: int) -> Array:
    grid = Image.fromarray(rng.normal(0, 1, (7, 7)).astype(np.float32))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)


def _ellipse(rng: np.random.Generator, size: int, radius: float, ratio: float) -> tuple[Array, Array, Array]:
    """Return an ellipse's level set (< 1 inside) at a random place and turn, and the coordinates along its axes."""
    turn = rng.uniform(0, 2 * np.pi)
    cy, cx = rng.uniform(0.2 * size, 0.8 * size, 2)
    y, x = np.mgrid[:size, :size] - np.array([cy, cx])[:, None, None]
    along, across = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    return (along / (radius * ratio)) ** 2 + (across / radius) ** 2, along, across


def _stripes(along: Array, across: Array, angle: float, period: float) -> Array:
    wave: Array = np.sin(2 * np.pi / period * (np.cos(angle) * along + np.sin(angle) * across))
    return wave


def _paint(canvas: Array, where: NDArray[np.bool_], stripes: Array, hue: tuple[float, float, float]) -> None:
    canvas[where] = (np.array(hue) + 0.18 * stripes[..., None])[where]


def write_shapes(root: Path, *, train: int = 320, val: int = 80, size: int = 96, seed: int = 0) -> Path:
    """Write the data set to `root` unless it is there already; the same arguments give the same bytes.

    Args:
        root: the folder to make, in the VOC layout, with `classes.txt`.
        train: images in `train.txt`.
        val: images in `val.txt`.
        size: side of an image in pixels.
        seed: of all random choices.

    Returns:
        `root`.

    Raises:
        FileExistsError: `root` holds something else, or a set made with other arguments.
        OSError: the files cannot be written; `root` is then not there.
    """
    stamp = f"shapes 1: train={train} val={val} size={size} seed={seed}\n"
    if root.exists():
        if (root / "stamp.txt").is_file() and (root / "stamp.txt").read_text() == stamp:
            return root
        raise FileExistsError(f"root must be free for '{stamp.strip()}', but {root} exists: remove it or name another.")
    unfinished = root.with_name(root.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        _write_images(unfinished, {"train": train, "val": val}, size, seed)
        (unfinished / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
        (unfinished / "stamp.txt").write_text(stamp)
    except OSError as error:
        raise OSError(f"could not write the data set {root} ({error}): is the disk full, or read-only?") from error
    return unfinished.rename(root)


def _write_images(root: Path, counts: dict[str, int], size: int, seed: int) -> None:
    folders = [root / name for name in ("JPEGImages", "SegmentationClass", "Annotations", "ImageSets/Segmentation")]
    for folder in folders:
        folder.mkdir(parents=True)
    images, masks, tags, lists = folders
    rng = np.random.default_rng(seed)
    for split, count in counts.items():
        stems = [f"{split}_{i:04d}" for i in range(count)]
        (lists / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in stems))
        for stem in stems:
            image, mask, names = draw_image(rng, size)
            Image.fromarray(image).save(images / f"{stem}.jpg", quality=95)
            coded = Image.fromarray(mask)
            coded.putpalette(voc_palette().tobytes())
            coded.save(masks / f"{stem}.png")
            objects = "".join(f"<object><name>{name}</name></object>" for name in names)
            (tags / f"{stem}.xml").write_text(f"<annotation><filename>{stem}.jpg</filename>{objects}</annotation>\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the generated data set in the VOC layout.")
    parser.add_argument("root", type=Path, help="folder to write to")
    parser.add_argument("--train", type=int, default=320, help="images of the list train (%(default)s)")
    parser.add_argument("--val", type=int, default=80, help="images of the list val (%(default)s)")
    parser.add_argument("--size", type=int, default=96, help="side of an image in pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the generator (%(default)s)")
    write_shapes(**vars(parser.parse_args()))
