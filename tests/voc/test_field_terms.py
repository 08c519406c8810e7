"""The terms of other systems: their values by hand, what they keep, and that a killed training continues."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from batches import Batch
from config import CAM, Optimizer
from networks import build_cam, to_tensor
from torch.nn.functional import adaptive_avg_pool2d, binary_cross_entropy_with_logits
from train_cam import Objective

import pixelss
from tests.oracles import bilinear
from tests.voc.trainings import (
    metrics,
    open_run,
    tiny_config,
    train_in_pieces,
    train_until,
)

N = 3
ALL = {"erase": 0.5, "hide": 1.0, "puzzle": 1.0, "ppc": 1.0, "icd": 1.0, "subcategory": 5.0, "ecs": 1.0}


@pytest.fixture
def batch():
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tags, maps = torch.tensor([[1.0, 0, 1], [0, 1, 0]]), torch.zeros(2, 0, 32, 32, dtype=torch.uint8)
    return Batch(images, tags, maps, torch.tensor([4, 1]))


@pytest.fixture
def start(tmp_path):
    """A finished train_cam folder."""
    torch.manual_seed(7)
    torch.save(build_cam(tiny_config(), N).state_dict(), tmp_path / "model.pt")
    return tmp_path


def parts_of(batch, **changes):
    """Return a step's parts, objective and student, whose CAMs are no longer nearly zero."""
    config = tiny_config(cam=CAM(rcm=0, mam=0, view_scales=(1.0, 0.5), **changes))
    torch.manual_seed(0)
    student = build_cam(config, N)
    with torch.no_grad():
        student[1].classify.weight *= 30
    objective = Objective(config, student, N, 100)
    torch.manual_seed(3)
    _, parts = objective(student, batch, 0, False)
    return {name: part.float() for name, part in parts.items()}, objective, student


def cam_at(student, images):
    return bilinear(student(images).cam, images.shape[-2:])


def comparable(cam, tags):
    """Each map by its own minimum and maximum, zero for absent classes."""
    cam = cam.relu()
    low, high = cam.amin((2, 3), keepdim=True), cam.amax((2, 3), keepdim=True)
    return (cam - low - 1e-5).relu() / (high - low + 1e-5) * tags[:, :, None, None]


def test_erasing_shows_the_start_s_network_the_images_without_one_class(batch, start):
    parts, objective, student = parts_of(batch, erase=0.5, start_from=start)
    torch.manual_seed(3)
    chosen = pixelss.choose_class(batch.tags)
    cam = cam_at(student, batch.images)
    erased = batch.images.clone()
    for b in range(2):
        activated = cam[b, chosen[b].argmax()].relu()
        erased[b] *= 1 - activated / activated.max()
    ordinary = build_cam(tiny_config(), N)
    ordinary.load_state_dict(torch.load(start / "model.pt", weights_only=True))
    wanted = binary_cross_entropy_with_logits(ordinary(erased).logits, batch.tags - chosen)
    torch.testing.assert_close(parts["erase"], wanted)
    assert objective.modules.keys() == {"teacher", "ordinary"}
    fixed = objective.modules["ordinary"]
    parts["erase"].backward()
    assert not fixed.training
    assert not any(weight.requires_grad for weight in fixed.parameters())
    assert student[1].classify.weight.grad.abs().sum() > 0  # through the mask


@pytest.mark.parametrize("name", ["erase", "subcategory"])
def test_terms_that_need_a_start(batch, name):
    with pytest.raises(ValueError, match=rf"cam\.start_from must be a finished .* cam\.{name} is above 0, but is null"):
        parts_of(batch, **{name: 0.5})


def test_complementary_term_compares_with_what_both_parts_show(batch):
    parts, _, student = parts_of(batch, hide=1.0)
    torch.manual_seed(3)
    kept, hidden, share = pixelss.complementary_pair(batch.images, patch=8)
    assert torch.equal(kept + hidden, batch.images)
    assert ((share > 0) & (share < 1)).all()
    full, first, second = (comparable(cam_at(student, x), batch.tags) for x in (batch.images, kept, hidden))
    weight = share[:, None, None, None]
    wanted = (weight * first + (1 - weight) * second - full).abs().mean()
    for x in (kept, hidden):
        wanted = wanted + binary_cross_entropy_with_logits(student(x).logits, batch.tags) / 2
    torch.testing.assert_close(parts["hide"], wanted)


def test_puzzle_term_puts_the_tiles_of_an_image_together(batch):
    parts, _, student = parts_of(batch, puzzle=1.0)
    merged, logits = torch.zeros(2, N, 32, 32), torch.zeros(2, N)
    for top in (0, 16):
        for left in (0, 16):
            tile = batch.images[:, :, top : top + 16, left : left + 16]
            merged[:, :, top : top + 16, left : left + 16] = cam_at(student, tile)
            logits += student(tile).logits / 4
    distance = (cam_at(student, batch.images) - merged).abs() * batch.tags[:, :, None, None]
    wanted = distance.mean() + binary_cross_entropy_with_logits(logits, batch.tags)
    torch.testing.assert_close(parts["puzzle"], wanted)


@pytest.mark.parametrize("refined", [False, True])
def test_pixel_prototype_term_compares_the_views_cells(batch, refined):
    parts, _, student = parts_of(batch, ppc=1.0, ecr=float(refined))
    views = []
    for side in (32, 16):
        images = bilinear(batch.images, (side, side))
        output = student(images, correlate=True) if refined else student(images)
        cam = bilinear(output.cam[:, -N:], (32, 32)).relu()
        low, high = cam.amin((2, 3), keepdim=True), cam.amax((2, 3), keepdim=True)
        scores = (cam - low - 1e-5).relu() / (high - low + 1e-5)
        views.append((adaptive_avg_pool2d(output.features, 2), adaptive_avg_pool2d(scores, 2)))
    torch.testing.assert_close(parts["ppc"], pixelss.pixel_prototype_loss(*views, batch.tags))
    assert parts["ppc"] > 0


def test_intra_class_term_warms_up_over_two_epochs(batch):
    parts, objective, student = parts_of(batch, icd=1.0)
    output = student(batch.images)
    features = output.features.detach()
    features = features - features.mean((0, 2, 3), keepdim=True)
    features = features / (features.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
    logits = adaptive_avg_pool2d(bilinear(output.cam, (32, 32)), 4)
    direction = pixelss.IntraClassDirection(N, 16)
    direction.update(features, logits.detach(), batch.tags)
    value = pixelss.intra_class_loss(logits, direction(features), batch.tags)
    steps = 2 * 100 / 16  # two epochs of 100 images
    torch.testing.assert_close(parts["icd"], value * torch.tensor(10 / steps - 10).exp())
    assert objective.modules.keys() == {"teacher", "direction", "intra_class_steps"}
    for _ in range(12):
        _, parts = objective(student, batch, 1, False)
    value = pixelss.intra_class_loss(logits, objective.modules["direction"](features), batch.tags)
    torch.testing.assert_close(parts["icd"].float(), value)
    assert value > 0.01


def test_subcategory_term_has_the_tags_of_the_places(batch, start):
    parts, objective, student = parts_of(batch, subcategory=5.0, subclusters=2, start_from=start)
    tags = objective.modules["subcategories"].tags
    assert tags.shape == (100, 2 * N)
    assert not tags.any()  # nobody has looked at the images
    logits = student[1].subclassify(student(batch.images).features.mean((2, 3)))
    torch.testing.assert_close(parts["subcategory"], binary_cross_entropy_with_logits(logits, torch.zeros(2, 2 * N)))
    tags[4, 1] = tags[1, 2] = 1  # the batch's images are 4 and 1 of the list
    torch.manual_seed(3)
    _, parts = objective(student, batch, 0, False)
    wanted = torch.zeros(2, 2 * N)
    wanted[0, 1] = wanted[1, 2] = 1
    torch.testing.assert_close(parts["subcategory"].float(), binary_cross_entropy_with_logits(logits, wanted))
    parts["subcategory"].backward()
    assert student[1].subclassify.weight.grad.abs().sum() > 0
    assert student[1].project.weight.grad.abs().sum() > 0


def test_subcategories_are_clusters_of_the_start_s_features(root, whole, tmp_path):
    """Of whole images in the list's order; the second classifier is trained and stays out of inference."""
    cam = replace(tiny_config().cam, subcategory=5.0, subclusters=2, start_from=whole.folder("train_cam"))
    run = open_run(root, tmp_path, tiny_config(cam=cam))
    objective = Objective(run.config, build_cam(run.config, 4), 4, len(run.data.stems("train")))
    objective.prepare(run)
    network = build_cam(tiny_config(), 4)
    network.load_state_dict(torch.load(whole.folder("train_cam") / "model.pt", weights_only=True))
    stems, features = run.data.stems("train"), []
    for stem in stems:
        with torch.no_grad():
            features.append(network.eval()(to_tensor(run.data.image(stem), run.config)[None]).features.mean((2, 3)))
    tags = torch.stack([run.data.tags(stem) for stem in stems])
    generator = torch.Generator().manual_seed(0)
    wanted = pixelss.subcategory_tags(torch.cat(features), tags, clusters=2, generator=generator)
    assert torch.equal(objective.modules["subcategories"].tags, wanted)
    assert (wanted.unflatten(1, (4, 2)).sum(2) == tags).all()


def test_erased_objects_that_are_still_found_are_labels(batch):
    """ECS-Net as we read it, by a loop over pixels."""
    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = batch._replace(images=noise * torch.linspace(0, 3, 32))  # a class is no longer recognised, but is active
    parts, _, student = parts_of(batch, ecs=1.0)
    teacher = build_cam(tiny_config(), N)
    teacher.load_state_dict(student.state_dict())  # as it starts

    def normalised(cam):
        return cam.relu() / cam.relu().amax((2, 3), keepdim=True).clamp(min=1e-9)

    torch.manual_seed(3)
    chosen = pixelss.choose_class(batch.tags)
    with torch.no_grad():
        whole = cam_at(teacher, batch.images)
        erased = normalised(whole)[range(2), chosen.argmax(1)]
        hidden = batch.images * (1 - erased[:, None])
        logits, rest = teacher(hidden).logits, normalised(cam_at(teacher, hidden))
    cam = normalised(cam_at(student, batch.images)).clamp(1e-7, 1 - 1e-7)
    losses, kinds = [], set()
    for b in range(2):
        present = batch.tags[b].nonzero().flatten().tolist()
        still = [k for k in present if logits[b, k] > 0]
        for y in range(32):
            for x in range(32):
                found = {k: rest[b, k, y, x].item() for k in still}
                seen = max([normalised(whole)[b, k, y, x].item() for k in present] + list(found.values()))
                best = max(found, key=found.get, default=None)
                if erased[b, y, x] > 0.5 or (seen > 0.2 and (best is None or found[best] <= 0.5)):
                    continue  # erased, or unsure
                label = best if best is not None and found[best] > 0.5 else None
                kinds.add(label)
                losses += [-(cam[b, k, y, x].log() if k == label else (1 - cam[b, k, y, x]).log()) for k in present]
    assert len(kinds) > 1  # background and an object
    torch.testing.assert_close(parts["ecs"], torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("one_thread")
def test_all_of_them_are_resumed_bit_for_bit(root, whole, tmp_path, monkeypatch):
    cam = replace(tiny_config().cam, **ALL, view_scales=(1.0, 0.5), start_from=whole.folder("train_cam"))
    config = tiny_config(cam=replace(cam, rcm=0.0, mam=0.0, optimizer=Optimizer(momentum=0.9)))
    unbroken = train_in_pieces(root, tmp_path, monkeypatch, config)
    assert set(ALL) <= set(metrics(unbroken)[-1])
    for name in ("erase", "icd", "subcategory"):  # what keeps something; that each is in the loss says test_terms.py
        without = open_run(root, tmp_path / name, replace(config, cam=replace(config.cam, **{name: 0.0})))
        train_until(without, monkeypatch, 3)
        assert metrics(without)[2]["cls"] != metrics(unbroken)[2]["cls"]  # of weights that two steps have changed
