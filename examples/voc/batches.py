"""Training batches that depend on nothing but the seed and the step.

Position p of the stream is one augmented image: epoch p // len, a permutation per (seed, epoch), a random generator
per (seed, p). Step i takes the positions i * batch to (i + 1) * batch, whatever the number of processes and workers.
So there is no random state of a worker to save: a run resumes at a step by asking for that step.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from config import Augment, Config
from data import VOID, BadFileError, DataFolder
from networks import normalisation
from numpy.typing import NDArray
from parallel import share, world_size
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

_HUES = torch.tensor([0.0, 2.0, 4.0])[:, None, None]  # of red, green and blue, in sixths of the circle


class Batch(NamedTuple):
    """This process's share of a step.

    Attributes:
        images: normalised (B, 3, crop, crop), zero outside the image.
        tags: (B, N), on the CPU.
        maps: masks (B, M, crop, crop), uint8, void outside the image.
        places: of the images in the training list (B,), on the CPU.
    """

    images: Tensor
    tags: Tensor
    maps: Tensor
    places: Tensor = torch.zeros(0, dtype=torch.int64)


class Window(NamedTuple):
    """What an augmentation takes of an image and where it puts it: a float box, its new size, its corner."""

    box: tuple[float, float, float, float]
    size: tuple[int, int]
    corner: tuple[int, int]
    flip: bool


def draw_window(rng: np.random.Generator, size: tuple[int, int], augment: Augment) -> Window:
    """Draw rescale, crop and flip of an image of `size` (width, height) at once: only the crop is ever resized."""
    W, H = size
    crop = augment.crop
    flip = bool(rng.random() < augment.flip)
    if augment.resize == "area":
        return Window(_draw_area(rng, size, augment.resize_range), (crop, crop), (0, 0), flip)
    factor = rng.uniform(*augment.resize_range) / (max(size) if augment.resize == "longest" else 1)
    full = [max(1, round(side * factor)) for side in size]
    part = [min(side, crop) for side in full]
    x, y = (int(rng.integers(whole - side + 1)) for whole, side in zip(full, part, strict=True))
    left, top = (int(rng.integers(crop - side + 1)) for side in part)
    box = x * W / full[0], y * H / full[1], (x + part[0]) * W / full[0], (y + part[1]) * H / full[1]
    return Window((box[0], box[1], min(box[2], W), min(box[3], H)), (part[0], part[1]), (left, top), flip)


def _draw_area(
    rng: np.random.Generator, size: tuple[int, int], areas: tuple[float, float]
) -> tuple[float, float, float, float]:
    """Draw a box of a share of the area in `areas`, sides 3:4 to 4:3; as large as fits where ten draws do not."""
    W, H = size
    w = h = min(W, H)
    for _ in range(10):
        area, ratio = W * H * rng.uniform(*areas), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        wide, high = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
        if 0 < wide <= W and 0 < high <= H:
            w, h = wide, high
            break
    x, y = int(rng.integers(W - w + 1)), int(rng.integers(H - h + 1))
    return x, y, x + w, y + h


def colour_jitter(levels: Tensor, rng: np.random.Generator, augment: Augment) -> None:
    """Change brightness, contrast, saturation and hue of levels (3, h, w) in 0..255, in random order and in place.

    As Pillow's enhancers and its HSV, but for their rounding.
    """
    *amounts, hue = augment.jitter
    brightness, contrast, saturation = (rng.uniform(max(0.0, 1 - amount), 1 + amount) for amount in amounts)
    shift = rng.uniform(-hue, hue)
    order = rng.permutation(4)
    if rng.random() >= augment.jitter_probability:
        return
    for i in order:
        if i == 0:
            levels.mul_(brightness).clamp_(0, 255)
        elif i == 1:
            mean = float(_grey(levels).numpy().mean())  # torch's sum depends on the number of threads
            torch.add(torch.tensor((1 - contrast) * mean), levels, alpha=contrast, out=levels).clamp_(0, 255)
        elif i == 2:
            torch.lerp(_grey(levels), levels, saturation, out=levels).clamp_(0, 255)
        else:
            turn_hue(levels, shift)


def _grey(levels: Tensor) -> Tensor:
    return levels[:1].mul(0.299).add_(levels[1:2], alpha=0.587).add_(levels[2:], alpha=0.114)


def turn_hue(levels: Tensor, shift: float) -> None:
    """Turn the hue of HSV by a share of the circle, a half at most, in place.

    With the lowest channel at 0 and the highest at 1, the hue's distance to red is 1 + G + B - R sixths of the circle,
    on green's side or on blue's.
    """
    R, G, B = levels
    low = levels.amin(0)
    chroma = levels.amax(0).sub_(low)
    hue = (G + B).sub_(R).sub_(low).add_(chroma).div_(chroma.clamp(min=1e-6)).copysign_(G - B)  # in sixths, -3 to 3
    # A channel is lowest within a sixth of the hue opposite to its own, highest beyond two. Red's opposites lie at 3,
    # 9, -3 and -9: folded at 0 and at 6, the distance to the nearest is left.
    torch.sub(hue.add_(6 * shift), _HUES, out=levels)
    above = levels.abs_().sub_(6).abs_().sub_(3).abs_().sub_(1).clamp_(0, 1)
    torch.addcmul(low, above, chroma, out=levels)


class Samples(Dataset["tuple[Batch, list[str]] | BadFileError"]):
    """The stream of augmented images of one training stage.

    Args:
        data: the data set.
        stems: the training list.
        config: its seed, normalisation and `data.on_bad_file` count.
        augment: of the stage.
        map_folders: folders of masks STEM.png that are cut like their image; None: the data set's masks.
    """

    def __init__(
        self,
        data: DataFolder,
        stems: Sequence[str],
        config: Config,
        augment: Augment,
        map_folders: Sequence[Path | None] = (),
    ) -> None:
        self.data, self.stems, self.config, self.augment, self.map_folders = data, stems, config, augment, map_folders
        mean, std = (torch.tensor(values)[:, None, None] for values in normalisation(config))
        self.factor, self.offset = 1 / (255 * std), -mean / std

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, positions: Sequence[int]) -> tuple[Batch, list[str]] | BadFileError:
        """Return a batch and the complaints about images passed over; an error is returned, not raised.

        An exception of a worker process would reach the user as a traceback in a traceback.
        """
        B, M, crop = len(positions), len(self.map_folders), self.augment.crop
        images, maps = torch.empty(B, 3, crop, crop), torch.empty(B, M, crop, crop, dtype=torch.uint8)
        skipped: list[str] = []
        try:
            drawn = [self._usable(*each, skipped) for each in zip(positions, images, maps, strict=True)]
        except BadFileError as error:
            return error
        places, tags = zip(*drawn, strict=True)
        return Batch(images, torch.stack(tags), maps, torch.tensor(places)), skipped

    def _usable(self, position: int, image: Tensor, maps: Tensor, skipped: list[str]) -> tuple[int, Tensor]:
        """Draw the image of a position or, where it can't be used, the next one; return its place and tags."""
        epoch, start = divmod(position, len(self))
        order = _order(self.config.seed, epoch, len(self))
        for i in range(len(self)):
            place = int(order[(start + i) % len(self)])
            try:
                rng = np.random.default_rng((self.config.seed, 1, position))
                return place, self.draw(self.stems[place], rng, image, maps)
            except BadFileError as error:
                if self.config.data.on_bad_file == "stop":
                    raise BadFileError(f"{error} To pass over such images set data.on_bad_file: skip.") from None
                skipped.append(f"skipped the image {self.stems[place]}: {error}")
        raise BadFileError(f"no image of the training list can be used; {skipped[-1]}")

    def draw(self, stem: str, rng: np.random.Generator, image: Tensor, maps: Tensor) -> Tensor:
        """Draw an augmented image into (3, crop, crop) and its masks into (M, crop, crop); return its tags (N,)."""
        with self.data.opened(stem) as picture:
            window = draw_window(rng, (picture.size[1], picture.size[0]), self.augment)
            planes = picture.part(window.box, window.size)
        tags = self.data.tags(stem)
        levels = torch.from_numpy(planes.astype(np.float32, order="C"))
        levels = levels.flip(-1) if window.flip else levels
        colour_jitter(levels, rng, self.augment)
        (left, top), (w, h), crop = window.corner, window.size, self.augment.crop
        if (w, h) != (crop, crop):
            image.zero_()
            maps.fill_(VOID)
        torch.mul(levels, self.factor, out=image[:, top : top + h, left : left + w]).add_(self.offset)
        for canvas, folder in zip(maps, self.map_folders, strict=True):
            mask = Image.fromarray(self.data.mask(stem, folder=folder))
            part = torch.from_numpy(np.array(mask.resize(window.size, Image.Resampling.NEAREST, window.box)))
            canvas[top : top + h, left : left + w] = part.flip(-1) if window.flip else part
        return tags

    def batches(self, batch: int, start: int, stop: int, *, pin: bool) -> Iterator[Batch]:
        """Yield this process's share of the steps `start` to `stop`."""
        if batch < world_size():
            raise ValueError(f"schedule.batch must be at least the number of processes {world_size()}, but is {batch}.")
        shares = [list(share(range(step * batch, (step + 1) * batch))) for step in range(start, stop)]
        workers = self.config.workers
        loader: DataLoader[object] = DataLoader(
            self, batch_size=None, sampler=shares, num_workers=workers, pin_memory=pin
        )
        for item in loader:  # one pass is the whole training: workers start once
            if isinstance(item, BadFileError):
                raise item
            images, skipped = item
            for complaint in skipped:
                warnings.warn(complaint, stacklevel=2)
            yield images


@lru_cache(2)  # a batch may span two epochs
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, 0, epoch)).permutation(count)
