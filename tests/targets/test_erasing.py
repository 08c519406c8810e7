from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pixelss import choose_class, erasing_mask
from tests.blocks import Block
from tests.oracles import active, assert_refuses, field, value_and_grads
from tests.strategies import batches, noise

SIGNATURES = {
    "erasing_mask": "(cam, chosen, *, per_image=True, eps=0.0)",
    "choose_class": "(tags, *, generator=None)",
}


def first_tag(tags: Tensor) -> Tensor:
    """One-hot of an image's first present class."""
    return (tags > 0) & ((tags > 0).cumsum(-1) == 1)


BLOCKS = {
    "erasing_mask": Block(
        lambda b: erasing_mask(b.raw[2], first_tag(b.tags)),
        lambda b: erasing_mask_by_loops(b.raw[2], first_tag(b.tags)),
    ),
    "erasing_mask published": Block(
        lambda b: erasing_mask(b.raw[2], first_tag(b.tags), per_image=False, eps=1e-5),
        lambda b: erasing_mask_by_loops(b.raw[2], first_tag(b.tags), per_image=False, eps=1e-5),
    ),
    "choose_class": Block(  # which class is left to chance, whether there is one is not
        lambda b: choose_class(b.tags).long().sum(1),
        lambda b: torch.tensor([int(any(tag > 0 for tag in row)) for row in b.tags]),
    ),
}


def erasing_mask_by_loops(cam: Tensor, chosen: Tensor, per_image: bool = True, eps: float = 0.0) -> Tensor:
    B, N, *_ = cam.shape
    maps = []
    for b in range(B):
        classes = [n for n in range(N) if chosen[b, n] > 0]
        maps.append(active(cam[b, classes[0]]).relu() if classes else active(cam[b, 0]) * 0)
    masks = []
    for one in maps:
        values = [value for other in ([one] if per_image else maps) for value in other.flatten()]
        peak = max(values, key=lambda x: x.detach().item())
        masks.append(one / (peak + eps) if peak > 0 else one)
    return torch.stack(masks)[:, None] if masks else cam.sum(1, keepdim=True)


# What OC-CSE's own code returned: one maximum for the batch, and 1e-5 added to it


def classify(a: dict[str, Tensor], network: str, images: Tensor) -> Tensor:
    """Return the CAMs of one of its two tiny networks."""
    features = functional.conv2d(images, a[f"{network}_conv_w"], a[f"{network}_conv_b"], stride=2, padding=1).relu()
    return functional.conv2d(features, a[f"{network}_fc_w"])


def test_mask_and_erased_images_are_occses():
    a = field("occse")
    cam = classify(a, "er", a["image"])
    torch.testing.assert_close(cam, a["cam_er"], rtol=2e-6, atol=2e-6)
    large = functional.interpolate(cam, a["image"].shape[-2:], mode="bilinear", align_corners=False)
    mask = erasing_mask(large, a["label_mask"], per_image=False, eps=1e-5)
    torch.testing.assert_close(mask, a["mask"], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(a["image"] * (1 - mask), a["image_masked"], rtol=2e-6, atol=2e-6)


# What holds for any CAMs


@given(batch=batches(), per_image=st.booleans(), eps=st.sampled_from([0.0, 1e-5, 0.5]))
def test_any_setting_equals_the_loops(batch, per_image, eps):
    chosen = first_tag(batch.tags)
    actual = value_and_grads(lambda x: erasing_mask(x, chosen, per_image=per_image, eps=eps), batch.raw[2])
    expected = value_and_grads(lambda x: erasing_mask_by_loops(x, chosen, per_image, eps), batch.raw[2])
    torch.testing.assert_close(actual, expected)


@given(batch=batches())
def test_the_maximum_is_exactly_1_where_the_chosen_cam_is_active(batch):
    chosen = first_tag(batch.tags)
    peaks = erasing_mask(batch.raw[2], chosen).amax((1, 2, 3))
    live = ((batch.raw[2] > 0).flatten(2).any(2) & chosen).any(1)
    assert torch.equal(peaks, live.double())


@given(batch=batches(), factor=st.floats(0.01, 100))
def test_the_scale_of_the_cams_does_not_matter(batch, factor):
    chosen = first_tag(batch.tags)
    for per_image in (True, False):
        masks = [erasing_mask(cam, chosen, per_image=per_image) for cam in (batch.raw[2], factor * batch.raw[2])]
        torch.testing.assert_close(*masks)


@given(batch=batches())
def test_classes_that_are_not_chosen_have_no_influence(batch):
    chosen = first_tag(batch.tags)
    other = torch.where(chosen[:, :, None, None], batch.raw[2], float("nan"))
    assert torch.equal(erasing_mask(other, chosen), erasing_mask(batch.raw[2], chosen))


@given(data=st.data(), batch=batches())
def test_images_do_not_meet_but_in_the_batchs_maximum(data, batch):
    chosen = first_tag(batch.tags)
    order = torch.tensor(data.draw(st.permutations(range(len(chosen)))))
    for per_image in (True, False):
        mask = erasing_mask(batch.raw[2], chosen, per_image=per_image)
        assert torch.equal(erasing_mask(batch.raw[2][order], chosen[order], per_image=per_image), mask[order])
    alone = [erasing_mask(batch.raw[2][b, None], chosen[b, None]) for b in range(len(chosen))]
    assert torch.equal(erasing_mask(batch.raw[2], chosen), torch.cat(alone))
    assert torch.equal(alone[0], erasing_mask(batch.raw[2][:1], chosen[:1], per_image=False))


def test_one_maximum_for_the_batch_erases_less_of_a_weak_image():
    cam = torch.tensor([[[[2.0, 4.0]]], [[[1.0, 2.0]]]])
    chosen = torch.ones(2, 1)
    assert erasing_mask(cam, chosen).flatten().tolist() == [0.5, 1, 0.5, 1]
    assert erasing_mask(cam, chosen, per_image=False).flatten().tolist() == [0.5, 1, 0.25, 0.5]


@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("cam", [torch.zeros(2, 3, 4, 5), -torch.rand(2, 3, 4, 5), torch.full((2, 3, 4, 5), 1e-42)])
def test_nothing_active_erases_nothing_and_has_no_gradient(cam, per_image):
    cam = cam.requires_grad_()
    mask = erasing_mask(cam, torch.eye(3)[:2], per_image=per_image)
    assert not mask.any()
    mask.sum().backward()
    assert not cam.grad.any()


def test_gradcheck():
    cam, chosen = noise(2, 3, 2, 3).requires_grad_(), torch.eye(3)[:2]
    for settings in ({}, {"per_image": False}, {"eps": 0.1}):
        assert torch.autograd.gradcheck(lambda x, s=settings: erasing_mask(x, chosen, **s), cam)


# The choice


@given(batch=batches(), seed=st.integers(0, 99))
def test_the_choice_is_one_present_class_an_image(batch, seed):
    tags = batch.tags
    chosen = choose_class(tags, generator=torch.Generator().manual_seed(seed))
    assert chosen.dtype == tags.dtype
    assert torch.equal(chosen.sum(1), tags.amax(1))
    assert (chosen <= tags).all()
    assert torch.equal(chosen, choose_class(tags, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_every_present_class_is_equally_likely(classes):
    tags = torch.zeros(20_000, 6)
    tags[:, 1 : 1 + classes] = 1
    share = choose_class(tags, generator=torch.Generator().manual_seed(0)).mean(0)
    torch.testing.assert_close(share, tags[0] / classes, rtol=0, atol=0.02)


def test_images_choose_independently():
    tags = torch.ones(8000, 2)
    first, second = choose_class(tags, generator=torch.Generator().manual_seed(0))[:, 0].view(2, 4000)
    torch.testing.assert_close((first * second).mean(), torch.tensor(0.25), rtol=0, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16])
def test_the_choice_has_the_tags_dtype(dtype):
    tags = torch.tensor([[0, 1], [0, 0]]).to(dtype)
    assert torch.equal(choose_class(tags), tags)


def test_without_a_generator_torchs_seed_holds():
    tags = torch.ones(64, 20)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(choose_class(tags))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


# refusals


CAM, CHOSEN = torch.rand(2, 3, 4, 5), torch.eye(3)[:2]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("cam", CAM[0], ValueError),
        ("cam", CAM.long(), TypeError),
        ("cam", None, TypeError),
        ("chosen", CHOSEN[:, :2], ValueError),
        ("chosen", torch.tensor([0, 1]), ValueError),
        ("chosen", CHOSEN.to("meta"), ValueError),
        ("eps", -1e-5, ValueError),
        ("eps", float("nan"), ValueError),
        ("eps", "1e-5", TypeError),
    ],
)
def test_mask_refuses(name, value, error):
    assert_refuses(erasing_mask, {"cam": CAM, "chosen": CHOSEN, "eps": 0.0}, name, value, error)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("tags", CHOSEN[0], ValueError), ("tags", None, TypeError), ("generator", 0, TypeError)],
)
def test_choice_refuses(name, value, error):
    assert_refuses(choose_class, {"tags": CHOSEN, "generator": None}, name, value, error)
