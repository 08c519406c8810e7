"""Batches: augmentation, order, workers."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import Samples, colour_jitter, draw_window, turn_hue
from config import Augment, Config, Data
from data import BadFileError, VOCFolder
from hypothesis import example, given
from hypothesis import strategies as st
from networks import IMAGENET
from PIL import Image, ImageEnhance
from pixels import Picture
from torch.testing import assert_close

from tests.voc.trainings import damage, tiny_config


def collect(root: Path, config: Config, **kwargs: object) -> list[tuple[torch.Tensor, ...]]:
    data = VOCFolder(root)
    samples = Samples(
        data, data.stems("train"), config, config.cam.augment, [data.root / "SegmentationClass"], **kwargs
    )
    return list(samples.batches(5, 0, 4, pin=False))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_batches_depend_on_neither_workers_nor_start(root):
    alone, helped = collect(root, tiny_config()), collect(root, tiny_config(workers=2))
    assert len(alone) == 4
    for a, b in zip(alone, helped, strict=True):
        assert_close(a, b, rtol=0, atol=0)
    data = VOCFolder(root)
    samples = Samples(data, data.stems("train"), tiny_config(), tiny_config().cam.augment)
    later = next(samples.batches(5, 3, 4, pin=False))
    assert torch.equal(later.images, alone[3].images)
    other = collect(root, tiny_config(seed=1))
    assert not torch.equal(other[0].images, alone[0].images)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux lists them")
def test_a_process_that_is_spawned_is_sent_no_file_an_image(root):
    data = VOCFolder(root)
    samples = Samples(data, data.stems("train"), tiny_config(), tiny_config().cam.augment)

    def files_opened() -> int:
        before = len([*Path("/proc/self/fd").iterdir()])
        kept = ForkingPickler.dumps(samples)
        return len([*Path("/proc/self/fd").iterdir()]) - before if kept else 0

    files_opened()  # the first time a server is started too
    expected = files_opened()
    for stem in samples.stems:
        data.tags(stem)
    assert files_opened() == expected


def test_an_epoch_shows_every_image_once(root):
    data = VOCFolder(root)
    stems = data.stems("train")
    samples = Samples(data, stems, tiny_config(), Augment(crop=8))
    seen: list[str] = []
    draw = samples.draw

    def seen_draw(stem: str, *given: object) -> torch.Tensor:
        seen.append(stem)
        return draw(stem, *given)  # type: ignore[arg-type]

    samples.draw = seen_draw  # type: ignore[method-assign]
    for position in range(0, 3 * len(stems), 2):
        batch, _ = samples[[position, position + 1]]  # type: ignore[misc]
        assert batch.places.tolist() == [stems.index(stem) for stem in seen[-2:]]
    epochs = [seen[i * len(stems) : (i + 1) * len(stems)] for i in range(3)]
    assert all(sorted(epoch) == sorted(stems) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


class Coordinates:
    """Images whose red and green tell where a pixel comes from, and the label map that belongs to them."""

    stems = ("only",)

    def __init__(self, width: int, height: int) -> None:
        self.y, self.x = np.mgrid[:height, :width]

    @contextmanager
    def opened(self, stem: str) -> Iterator[Picture]:
        levels = np.stack([2 * self.x, 2 * self.y, 0 * self.x + 255], -1).astype(np.uint8)
        yield Picture(Path(stem), Image.fromarray(levels), None)

    def tags(self, stem: str) -> torch.Tensor:
        return torch.ones(1)

    def mask(self, stem: str, *, folder: Path) -> np.ndarray:
        return (self.x // 8 + 3 * (self.y // 8)).astype(np.uint8)


@pytest.mark.parametrize("size", [(100, 60), (31, 50), (24, 24)])
@pytest.mark.parametrize(("mode", "low", "high"), [("scale", 0.5, 1.3), ("area", 0.5, 1.0), ("longest", 30, 90)])
def test_image_and_map_are_cut_alike(mode, low, high, size):
    augment = Augment(crop=48, resize=mode, resize_range=(low, high), jitter_probability=0)
    samples = Samples(Coordinates(*size), ["only"], tiny_config(), augment, [Path("maps")])  # type: ignore[arg-type]
    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    flips = 0
    for position in range(20):
        images, _, maps, places = samples[[position]][0]  # type: ignore[index]
        colours, labels = (images[0] * std + mean) * 255, maps[0, 0]
        inside = labels != 255
        assert torch.equal(images[0].abs().sum(0) > 0, inside)
        assert places.tolist() == [0]
        x, y = colours[0] / 2, colours[1] / 2  # bilinear: exact but for rounding, and at the image's edge
        sure = inside & ((x % 8 - 3.5).abs() < 2.7) & ((y % 8 - 3.5).abs() < 2.7)
        assert sure.sum() > 0.2 * inside.sum()
        assert torch.equal(labels[sure].float(), (x // 8 + 3 * (y // 8))[sure])
        rows = x.where(inside, torch.nan).nanmean(0)
        rows = rows[~rows.isnan()]
        flips += int(rows[0] > rows[-1])
    assert 3 <= flips <= 17


class LargeWithoutMask(Coordinates):
    """A large image, whose mask can't be read, and a small one."""

    stems = ("large", "small")

    @contextmanager
    def opened(self, stem: str) -> Iterator[Picture]:
        self.y, self.x = np.mgrid[:60, :60] if stem == "large" else np.mgrid[:8, :8]
        with super().opened(stem) as picture:
            yield picture

    def mask(self, stem: str, *, folder: Path) -> np.ndarray:
        if stem == "large":
            raise BadFileError("no mask")
        return super().mask(stem, folder=folder)


def test_nothing_of_an_image_that_was_passed_over_is_left():
    data, augment = LargeWithoutMask(0, 0), Augment(crop=24, resize="scale", resize_range=(1.0, 1.0), flip=0)
    config = tiny_config(data=Data(on_bad_file="skip"))
    samples = Samples(data, data.stems, config, augment, [Path("maps")])  # type: ignore[arg-type]
    batch, skipped = samples[[0, 1]]  # type: ignore[misc]
    assert skipped == ["skipped the image large: no mask"]  # by the position whose turn it was
    assert batch.places.tolist() == [1, 1]
    for image, mask in zip(batch.images, batch.maps[:, 0], strict=True):
        assert (mask != 255).sum() == 64
        assert torch.equal(image.abs().sum(0) > 0, mask != 255)


def test_windows_keep_scale_and_stay_inside():
    rng = np.random.default_rng(0)
    for _ in range(200):
        augment = Augment(crop=64, resize="scale", resize_range=(0.5, 1.3))
        (x0, y0, x1, y1), (w, h), (left, top), _ = draw_window(rng, (100, 50), augment)
        assert 0 <= x0 < x1 <= 100
        assert 0 <= y0 < y1 <= 50
        assert 0.49 < w / (x1 - x0) < 1.31
        assert w / (x1 - x0) == pytest.approx(h / (y1 - y0), rel=0.03)
        assert left + w <= 64
        assert top + h <= 64
        augment = Augment(crop=64, resize="area", resize_range=(0.2, 0.8))
        (x0, y0, x1, y1), size, _, _ = draw_window(rng, (100, 80), augment)
        assert size == (64, 64)
        assert 0.19 < (x1 - x0) * (y1 - y0) / 8000 < 0.82
        augment = Augment(crop=400, resize="longest", resize_range=(90, 110))
        _, size, _, _ = draw_window(rng, (100, 50), augment)
        assert 90 <= size[0] <= 110
        assert size[1] == pytest.approx(size[0] / 2, abs=1)


def jittered(image: np.ndarray, seed: int, *amounts: float, probability: float = 1.0) -> np.ndarray:
    levels = torch.tensor(image).permute(2, 0, 1).float().contiguous()
    colour_jitter(levels, np.random.default_rng(seed), Augment(jitter=amounts, jitter_probability=probability))  # type: ignore[arg-type]
    return levels.permute(1, 2, 0).numpy()


def jittered_by_pillow(image: np.ndarray, seed: int, *amounts: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    factors = [rng.uniform(max(0.0, 1 - amount), 1 + amount) for amount in amounts[:3]]
    shift = round(256 * rng.uniform(-amounts[3], amounts[3]))
    picture = Image.fromarray(image)
    enhancers = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
    for i in rng.permutation(4):
        if i < 3:
            picture = enhancers[i](picture).enhance(factors[i])
        else:
            bands = list(picture.convert("HSV").split())
            bands[0] = bands[0].point([(value + shift) % 256 for value in range(256)])
            picture = Image.merge("HSV", bands).convert("RGB")
    return np.asarray(picture).astype(np.float32)


def test_colour_jitter_changes_what_it_is_asked_to():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(jittered(image, 3, 0.4, 0.4, 0.4, 0.1, probability=0), image)
    np.testing.assert_allclose(jittered(image, 3, 0, 0, 0, 0), image, atol=1e-3)
    assert abs(jittered(image, 3, 0.5, 0, 0, 0).mean() - image.mean()) > 1
    grey = np.full((8, 8, 3), 90, np.uint8)
    np.testing.assert_allclose(jittered(grey, 0, 0, 0, 0.5, 0.5), grey, atol=1e-3)
    values = {float(jittered(grey, i, 0.5, 0, 0, 0).max()) for i in range(50)}
    assert min(values) >= 45
    assert max(values) <= 135
    assert len(values) > 20


@pytest.mark.parametrize(
    "amounts",
    [(0.4, 0, 0, 0), (0, 0.4, 0, 0), (0, 0, 0.4, 0), (0, 0, 0, 0.1), (0, 0, 0, 0.5), (0.4, 0.4, 0.4, 0.1)],
    ids=["brightness", "contrast", "saturation", "hue", "any hue", "all"],
)
def test_colour_jitter_is_pillows_but_for_rounding(amounts):
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((40, 30), Image.Resampling.BICUBIC))
    ours, pillows = (
        np.stack([way(image, seed, *amounts) for seed in range(40)]) for way in (jittered, jittered_by_pillow)
    )
    assert abs(pillows - image).mean() > 3
    assert abs(ours - pillows).mean() < 2
    for moment in (np.mean, np.std):
        np.testing.assert_allclose(moment(ours, (1, 2)), moment(pillows, (1, 2)), atol=2)  # of every image
        np.testing.assert_allclose(moment(ours, 0), moment(pillows, 0), atol=6)  # of every pixel, over all draws


@given(colours=st.lists(st.tuples(*3 * [st.integers(0, 255)]), min_size=1, max_size=9), shift=st.floats(-0.5, 0.5))
@example(colours=[(0, 0, 0), (9, 9, 9), (255, 0, 0), (200, 200, 7), (7, 200, 200), (200, 7, 200), (3, 9, 3)], shift=0.4)
def test_hue_is_turned_as_in_hsv(colours, shift):
    levels = torch.tensor(colours, dtype=torch.float32).T.contiguous()[..., None]
    turn_hue(levels, shift)
    for colour, turned in zip(colours, levels[..., 0].T, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*colour)
        assert turned.tolist() == pytest.approx(colorsys.hsv_to_rgb((h + shift) % 1, s, v), abs=1e-3)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    "what", ["truncated image", "no image", "size", "16 bits", "colours", "values", "no mask", "class", "xml", "no xml"]
)
def test_bad_file_is_named_or_skipped(own_root, what):
    message = damage(own_root, what)
    workers = 1 if what == "truncated image" else 0
    with pytest.raises(BadFileError, match=message) as caught:
        collect(own_root, tiny_config(workers=workers))
    assert "Traceback" not in str(caught.value)
    assert "on_bad_file: skip" in str(caught.value)
    config = tiny_config(data=Data(train="train", on_bad_file="skip"), workers=workers)
    with pytest.warns(UserWarning, match=f"skipped the image train_0003: .*{message}"):
        batches = collect(own_root, config)
    assert all(len(batch.images) == 5 for batch in batches)


def test_a_list_without_a_usable_image_stops_even_when_skipping(own_root):
    for path in (own_root / "JPEGImages").iterdir():
        path.unlink()
    with pytest.raises(BadFileError, match="no image of the training list"):
        collect(own_root, tiny_config(data=Data(train="train", on_bad_file="skip")))
