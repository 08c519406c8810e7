from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelss import proportional_mask
from tests.blocks import Block
from tests.oracles import active, assert_refuses, field
from tests.strategies import Batch, batches, make_batch

SIGNATURES = {"proportional_mask": "(cam, foreground, tags)"}


def claims(b: Batch) -> Tensor:
    """Return what the classes claim: something everywhere, much of it twice."""
    return b.probs[:, 1:] > 0.2


BLOCKS = {
    "proportional_mask": Block(
        lambda b: proportional_mask(b.cam, claims(b), b.tags),
        lambda b: proportional_mask_by_loops(b.cam.detach(), claims(b), b.tags),
    ),
}


def proportional_mask_by_loops(cam: Tensor, foreground: Tensor, tags: Tensor) -> Tensor:
    B, N, H, W = cam.shape
    mask = torch.zeros(B, H, W).long()
    for b in range(B):
        best = torch.zeros(H, W)
        for n in range(N):
            own = [(i, j) for i, j in product(range(H), range(W)) if foreground[b, n, i, j] and tags[b, n] > 0]
            values = {place: max(0.0, float(active(cam[b, n][place]))) for place in own}
            total = 1 + sum(values.values())
            for place, value in values.items():
                if value / total > best[place]:
                    best[place], mask[b][place] = value / total, n + 1
    return mask


def test_mask_is_that_of_the_public_code():
    a = field("pmm")
    classes, (_, H, W) = a["classes"], a["cams"].shape
    cam, foreground, tags = torch.zeros(1, 20, H, W), torch.zeros(1, 20, H, W, dtype=torch.bool), torch.zeros(1, 20)
    cam[0, classes], foreground[0, classes], tags[0, classes] = a["cams"], a["crf_fg"] > 0.5, 1.0
    assert torch.equal(proportional_mask(cam, foreground, tags)[0], a["label"].long())
    assert foreground[0, classes].all(0).any()  # both claim some


@given(batch=batches())
def test_any_mask_equals_the_loops(batch):
    actual = proportional_mask(batch.cam, claims(batch), batch.tags)
    assert actual.dtype == torch.int64
    assert torch.equal(actual, proportional_mask_by_loops(batch.cam, claims(batch), batch.tags))


@given(batch=batches())
def test_a_pixel_goes_to_a_present_class_that_claims_it(batch):
    claimed = claims(batch) & (batch.tags > 0)[:, :, None, None]
    mask = proportional_mask(batch.cam, claims(batch), batch.tags)
    owner = torch.cat([~(claimed & (batch.cam > 0)).any(1, keepdim=True), claimed], 1)
    assert owner.gather(1, mask[:, None]).all()


@given(batch=batches(), data=st.data())
def test_the_order_of_the_classes_does_not_matter(batch, data):
    order = torch.tensor(data.draw(st.permutations(range(batch.classes))))
    cam = batch.cam * torch.linspace(0.5, 1, batch.classes)[:, None, None]  # equal shares go to the first
    mask = proportional_mask(cam[:, order], claims(batch)[:, order], batch.tags[:, order])
    back = torch.cat([torch.zeros(1).long(), 1 + order])[mask]
    assert torch.equal(back, proportional_mask(cam, claims(batch), batch.tags))


@given(batch=batches())
def test_claims_that_do_not_overlap_are_the_mask(batch):
    first = claims(batch).int().argmax(1, keepdim=True)
    alone = torch.zeros_like(claims(batch)).scatter(1, first, claims(batch).any(1, keepdim=True))
    expected = torch.where(alone.any(1), first[:, 0] + 1, 0)
    assert torch.equal(proportional_mask(0.1 + batch.cam, alone, torch.ones_like(batch.tags)), expected)


def test_a_small_object_wins_over_a_large_one_that_is_more_active():
    cam = torch.zeros(1, 2, 8, 8)
    cam[0, 0] = 0.9
    cam[0, 1, 3:5, 3:5] = 0.3
    mask = proportional_mask(cam, cam > 0, torch.ones(1, 2))[0]
    assert (mask == 2).nonzero().tolist() == [[3, 3], [3, 4], [4, 3], [4, 4]]
    assert (mask > 0).all()


def test_what_lies_outside_of_a_claim_does_not_make_an_object_larger():
    cam = torch.tensor([[[[0.9, 0.9, 0.9, 0.9]], [[0.5, 0.0, 0.0, 0.0]]]])
    foreground = torch.tensor([[[[True, False, False, False]], [[True, False, False, False]]]])
    assert proportional_mask(cam, foreground, torch.ones(1, 2)).tolist() == [[[1, 0, 0, 0]]]  # .9 / 1.9 > .5 / 1.5


def test_the_one_in_the_share_keeps_a_faint_class_from_winning():
    cam = torch.tensor([[[[0.2, 0.0, 0.0]], [[0.5, 0.7, 0.7]]]])
    assert proportional_mask(cam, cam > 0, torch.ones(1, 2)).tolist() == [[[2, 2, 2]]]  # .2 / 1.2 < .5 / 2.9


def test_a_claim_without_activation_is_background():
    cam = torch.tensor([[[[0.0, 0.5]], [[0.0, 0.0]]]])
    assert proportional_mask(cam, torch.ones_like(cam).bool(), torch.ones(1, 2)).tolist() == [[[0, 1]]]
    assert proportional_mask(-1 - cam, torch.ones_like(cam).bool(), torch.ones(1, 2)).tolist() == [[[0, 0]]]


def test_the_mask_does_not_depend_on_the_batch():
    b = make_batch()
    mask = proportional_mask(b.cam, claims(b), b.tags)
    for i in range(3):
        assert torch.equal(proportional_mask(b.cam[i, None], claims(b)[i, None], b.tags[i, None])[0], mask[i])
    assert not mask[2].any()  # it has no tag


CAM, TAGS = torch.rand(2, 3, 4, 5), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("cam", CAM[0], ValueError),
        ("cam", CAM.long(), TypeError),
        ("cam", None, TypeError),
        ("foreground", CAM, TypeError),
        ("foreground", (CAM > 0.5)[:, :2], ValueError),
        ("foreground", (CAM > 0.5)[..., :4], ValueError),
        ("foreground", (CAM > 0.5).to("meta"), ValueError),
        ("tags", TAGS[:, :2], ValueError),
        ("tags", TAGS[:1], ValueError),
        ("tags", TAGS.to("meta"), ValueError),
    ],
)
def test_mask_refuses(name, value, error):
    assert_refuses(proportional_mask, {"cam": CAM, "foreground": CAM > 0.5, "tags": TAGS}, name, value, error)
