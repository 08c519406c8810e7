"""The table of the field: its refiners, its segmentation, what its lines of code are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import field
import field_refiners
import numpy as np
import pytest
import torch
import train_seg
from costs import code_lines
from crf_labels import refined_masks
from PIL import Image
from torch import Tensor, nn

import pixelss
from tests.voc.runs import cam_of, config, new_run, write_random_cams


def documented(a: int) -> int:
    """One line.

    And more.
    """
    # A comment.
    text = """not a
    docstring"""

    return a + len(text)  # code


class Documented:
    """A class."""

    a = 1

    def b(self) -> int:
        """Inside."""
        return (
            2
        )  # fmt: skip


def test_lines_of_code() -> None:
    assert code_lines(documented) == 4
    assert code_lines(Documented) == 6
    assert code_lines(documented, Documented) == 10
    assert code_lines() == 0


def test_sets_of_backgrounds(shapes: Path, tmp_path: Path) -> None:
    made = new_run(shapes, tmp_path, weights=False)
    cam = torch.rand(4, 2, 3)
    sets = field.background_sets(made, cam, torch.tensor([0, 1, 0, 1]))
    assert sets.shape == (13, 3, 2, 3)
    for background, one in zip(field_refiners.BACKGROUNDS, sets, strict=True):
        assert (one[0] == background).all()
        assert torch.equal(one[1:], cam[[1, 3]])


class Sure(nn.Module):
    """Logits of .5 for the CRF's map and -.5 for the other, or the other way round."""

    def __init__(self, after: Tensor, sign: int) -> None:
        super().__init__()
        self.after, self.sign = after, sign

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        value = 0.5 if torch.equal(mask, self.after) else -0.5
        return torch.full_like(mask[:, None], self.sign * value, dtype=torch.float32)


@pytest.mark.parametrize("sign", [1, -1])
def test_ssdd_takes_the_label_whose_change_is_harder_to_foresee(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sign: int
) -> None:
    made = new_run(shapes, tmp_path)
    write_random_cams(made, "train")
    stem = made.data.stems("train")[1]
    image, tags = made.data.image(stem), torch.tensor([1.0, 1.0, 1.0, 0.0])
    cam = torch.rand(4, *image.shape[:2], generator=torch.Generator().manual_seed(0))
    sets = field.background_sets(made, cam, tags)
    before = torch.from_numpy(np.stack(refined_masks(image, sets, tags, None))).long()
    after = torch.from_numpy(np.stack(field_refiners.by_crf(made)(image, sets, tags))).long()
    assert (before != after).any()
    monkeypatch.setattr(field_refiners, "_trained_difference", lambda run: Sure(after, sign))
    merged = torch.from_numpy(np.stack(field_refiners.merged(made)(image, sets, tags))).long()
    lost = pixelss.lost_classes(before, after, 4).float()
    flagged = [lost.gather(1, mask.flatten(1)).view_as(mask) for mask in (before, after)]
    weight = 0.1 - sign * 0.245 - 0.1 * (before == 0) + 0.1 * (after == 0) - flagged[0] + flagged[1]
    decided = weight.abs() > 0.01
    assert (decided & (before != after)).any()
    assert torch.equal(merged[decided], torch.where(weight > 0, after, before)[decided])


def test_ssdd_s_network_learns(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss falls, the same seed gives the same network, and the CAM network stays as it is."""
    monkeypatch.setattr(pixelss, "lost_classes", lambda before, after, count: before.new_zeros(1, count + 1))
    losses: list[float] = []
    loss = pixelss.difference_loss

    def told(*args: Tensor) -> Tensor:
        value = loss(*args)
        losses.append(value.item())
        return value

    monkeypatch.setattr(pixelss, "difference_loss", told)
    schedule = {"affinity.schedule.iterations": 25, "affinity.schedule.batch": 2, "infer_cam.crf.iterations": 2}
    made = new_run(shapes, tmp_path, settings=config(**schedule))
    made.finish("train_cam")
    network = (made.folder("train_cam") / "model.pt").read_bytes()
    first, second = (field_refiners._trained_difference(made) for _ in range(2))
    losses = losses[:100]  # of two images, both maps each
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 0.02
    assert not first.training
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert (made.folder("train_cam") / "model.pt").read_bytes() == network


def test_reliable_masks(shapes: Path, tmp_path: Path) -> None:
    made = new_run(shapes, tmp_path, settings=config(**{"affinity.crf.iterations": 2}))
    made.finish("train_cam")
    folder = made.out / "reliable"
    field_refiners.write_reliable(made, folder)
    stems = made.data.stems("train")
    assert {path.stem for path in folder.iterdir()} == set(stems)
    for stem in stems:
        cam, tags, image = cam_of(stem, made)[None], made.data.tags(stem), made.data.image(stem)
        levels, probs = torch.from_numpy(image).permute(2, 0, 1)[None], []
        classes = [0, *(1 + k for k in range(4) if tags[k])]
        for alpha in (4.0, 32.0):
            scores = torch.cat([(1 - cam.amax(1, keepdim=True)) ** alpha, cam], 1)[:, classes]
            every = torch.zeros(1, 5, *cam.shape[-2:])
            every[:, classes] = pixelss.dense_crf(levels, scores, **asdict(made.config.affinity.crf))
            probs.append(every)
        wanted = pixelss.reliable_mask(cam, *probs, tags[None])[0]
        assert torch.equal(torch.from_numpy(np.array(Image.open(folder / f"{stem}.png"))).long(), wanted)
    times = [path.stat().st_mtime_ns for path in folder.iterdir()]
    field_refiners.write_reliable(made, folder)
    assert [path.stat().st_mtime_ns for path in folder.iterdir()] == times


def test_energy_sees_levels_and_no_padding(shapes: Path, tmp_path: Path) -> None:
    made = new_run(shapes, tmp_path, weights=False)
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (2, 3, 16, 16), generator=generator)
    inside = torch.ones(2, 16, 16)
    inside[:, :, 12:] = 0
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = (levels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1) * inside[:, None]
    logits, mask = torch.randn(2, 5, 4, 4, generator=generator), torch.randint(0, 6, (2, 16, 16), generator=generator)
    wanted = pixelss.dense_energy_loss(
        torch.where(inside[:, None] > 0, levels.float(), 255 * mean.view(3, 1, 1)), logits, mask=mask, region=inside
    )
    torch.testing.assert_close(train_seg.energy_of(made, images, logits, mask), wanted, rtol=1e-4, atol=1e-3)


def test_weight_of_the_energy_is_rrm_s_at_its_crop(shapes: Path, tmp_path: Path) -> None:
    made = new_run(shapes, tmp_path, weights=False, settings=config(**{"seg.augment.crop": 321}))
    assert field.energy_weight(made) == pytest.approx(1e-7)
    half = replace(made, config=config(**{"seg.augment.crop": 107}))
    assert field.energy_weight(half) == pytest.approx(81e-7)


def test_a_refiner_is_an_entry(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = new_run(shapes, tmp_path)
    write_random_cams(made, "train")

    def halved(run: object) -> Callable[[str], Tensor]:
        return lambda stem: cam_of(stem, made) / 2

    monkeypatch.setitem(field_refiners.CAMS, "half", field_refiners.Refiner(halved, (halved,)))
    half, plain = (field._refined(made, name) for name in ("half", "none"))
    assert half["lines"] == 2
    assert half["threshold"] == pytest.approx(plain["threshold"] / 2, abs=0.03)
    monkeypatch.setitem(field_refiners.CAMS, "half", field_refiners.Refiner(field_refiners.plain))
    assert field._refined(made, "half") == {**half, "lines": 0}  # it is kept
