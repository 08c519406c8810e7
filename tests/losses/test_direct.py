from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.nn import functional

from pixelss import direct_loss
from tests import oracles
from tests.blocks import Block
from tests.oracles import active, labelled
from tests.refusals import BAD_CAM_OR_LABELS, CAM, TAGS
from tests.strategies import SIZES, batches, make_batch

SIGNATURES = {
    "direct_loss": "(cam, mask, tags, *, ignore_index=255)",
}

BLOCKS = {
    "direct_loss": Block(
        lambda b: direct_loss(b.cam, b.mask, b.tags), lambda b: direct_loss_by_loops(b.cam, b.mask, b.tags)
    ),
}

dtypes = pytest.mark.parametrize("dtype", oracles.TOLERANCE)
image_sizes = pytest.mark.parametrize("size", [target for _, target in SIZES.values()], ids=SIZES)


def direct_loss_by_loops(
    cam: Tensor, mask: Tensor, tags: Tensor, ignore_index: int = 255, eps: float = 2**-52
) -> Tensor:
    """Direct self-supervision: BCE of CAM_k against [mask = k], mean over (present pair, valid pixel)."""
    terms = []
    for b, i, j, label in labelled(mask, cam.shape[1], ignore_index):
        for k in range(1, cam.shape[1] + 1):
            if tags[b, k - 1] > 0:
                p = active(cam[b, k - 1, i, j]).clamp(eps, 1 - eps)
                terms.append(-torch.log(p if label == k else 1 - p))
    return sum(terms) / len(terms) if terms else cam.sum() * 0


@dtypes
@image_sizes
def test_direct_loss_equals_the_loop(size, dtype, device):
    batch = make_batch(image_size=size)
    assert_direct_loss(batch, dtype, device)


@pytest.mark.parametrize("ignore_index", [0, 2, -1])
def test_direct_loss_ignores_any_index(ignore_index):
    assert_direct_loss(make_batch(), torch.float64, ignore_index=ignore_index)


def assert_direct_loss(batch, dtype, device="cpu", **settings):
    oracles.assert_matches(
        lambda *inputs: direct_loss(*inputs, **settings),
        lambda *inputs: direct_loss_by_loops(*inputs, **settings, eps=torch.finfo(dtype).eps),
        batch.cam,
        batch.mask,
        batch.tags,
        dtype=dtype,
        device=device,
    )


def test_direct_loss_equals_binary_cross_entropy():
    batch = make_batch(images=1)
    cam, mask, tags = batch.cam.clamp(0.05, 0.95), batch.mask.clamp(0, 3), torch.ones(1, 3)
    target = functional.one_hot(mask, 4).movedim(-1, 1)[:, 1:].double()
    torch.testing.assert_close(direct_loss(cam, mask, tags), functional.binary_cross_entropy(cam, target))


def test_direct_loss_gradcheck():
    batch = make_batch()
    cam = batch.cam.clamp(0.05, 0.95).requires_grad_()
    assert torch.autograd.gradcheck(lambda cam: direct_loss(cam, batch.mask, batch.tags), cam, fast_mode=True)


@dtypes
def test_direct_loss_is_finite_at_its_worst(dtype):
    cam = torch.tensor([[[[1.0, 0.0]]]], dtype=dtype, requires_grad=True)
    loss = direct_loss(cam, torch.tensor([[[0, 1]]]), torch.ones(1, 1))
    torch.testing.assert_close(loss, -torch.tensor(torch.finfo(dtype).eps, dtype=dtype).log())
    loss.backward()
    assert cam.grad.isfinite().all()


@given(batch=batches())
def test_direct_loss_gives_no_gradient_to_void_pixels_and_absent_classes(batch):
    cam = batch.cam.clamp(0.05, 0.95).requires_grad_()
    direct_loss(cam, batch.mask, batch.tags).backward()
    valid = (batch.mask >= 0) & (batch.mask <= batch.tags.shape[1])
    counted = valid[:, None] & (batch.tags > 0)[:, :, None, None]
    assert torch.equal(cam.grad != 0, counted)


MASK = torch.zeros(2, 4, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        *BAD_CAM_OR_LABELS,
        ("mask", MASK[0], ValueError),
        ("mask", MASK[:1], ValueError),
        ("mask", MASK[:, 1:], ValueError),
        ("mask", MASK.float(), TypeError),
        ("mask", MASK.bool(), TypeError),
        ("mask", MASK.to("meta"), ValueError),
        ("ignore_index", None, TypeError),
        ("ignore_index", 0.5, TypeError),
    ],
)
def test_direct_loss_refuses(name, value, error):
    with pytest.raises(error, match=rf"\b{name}\b"):
        direct_loss(**{"cam": CAM, "mask": MASK, "tags": TAGS, name: value})
