from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelss import vote_segments
from tests.blocks import Block
from tests.oracles import assert_refuses, field
from tests.strategies import Batch, batches, make_batch

SIGNATURES = {
    "vote_segments": "(mask, segments, num_classes, *, share=0.5, cover=0.85, ignore_index=255)",
}


def vote_by_loops(
    mask: Tensor, segments: Tensor, num_classes: int, *, share: float = 0.5, cover: float = 0.85
) -> Tensor:
    results = []
    for label, given_segments in zip(mask.tolist(), segments, strict=True):
        of_class: dict[int, set[tuple[int, int]]] = {}
        for y, row in enumerate(label):
            for x, k in enumerate(row):
                of_class.setdefault(k, set()).add((y, x))
        if given_segments.ndim == 2:
            ids = {int(i) for i in given_segments.unique()} - {0}
            maps = [given_segments == i for i in ids if i > 0]
        else:
            maps = list(given_segments)
        free = [{tuple(cell) for cell in one.nonzero().tolist()} for one in maps]
        result = torch.full(mask.shape[1:], 255)
        for y, x in of_class.get(0, ()):
            result[y, x] = 0
        for n in range(1, num_classes + 1):
            own = of_class.get(n, set())
            if not own:
                continue
            taken = [s for s in free if len(s & own) > share * len(s) or len(s & own) >= cover * len(own)]
            alone = own - set().union(*free)
            free = [s for s in free if s not in taken]
            for y, x in own:
                result[y, x] = 0 if result[y, x] == 255 else result[y, x]  # not void: background, if nobody takes it
            for y, x in alone.union(*taken):
                result[y, x] = n
        results.append(result)
    return torch.stack(results) if results else mask.long()


def index_map(batch: Batch) -> Tensor:
    return batch.images[:, 0].long() % 5


BLOCKS = {
    "vote_segments": Block(
        lambda b: vote_segments(b.mask, b.images > 150, b.classes),
        lambda b: vote_by_loops(b.mask, b.images > 150, b.classes),
    ),
    "vote_segments index map": Block(
        lambda b: vote_segments(b.mask, index_map(b), b.classes, share=0.3, cover=0.6),
        lambda b: vote_by_loops(b.mask, index_map(b), b.classes, share=0.3, cover=0.6),
        but={"no wait": "counts the segments of an index map"},
    ),
}


def test_equals_the_public_code(device):
    golden = field("sepl")
    N = int(golden["num_classes_with_background"]) - 1
    mask, segments = golden["label"][None].to(device), golden["segments"][None].bool().to(device)
    assert torch.equal(vote_segments(mask, segments, N)[0].cpu(), golden["out_max_iou_imp2"].long())


# properties


@given(batch=batches())
def test_segments_that_are_the_classes_change_nothing(batch: Batch):
    mask = batch.mask.where((batch.mask >= 0) & (batch.mask <= batch.classes), 255)
    segments = mask.where(mask != 255, 0)
    assert torch.equal(vote_segments(mask, segments, batch.classes), mask)
    booleans = torch.stack([mask == n for n in range(1, batch.classes + 1)], 1)
    assert torch.equal(vote_segments(mask, booleans, batch.classes), mask)


@given(batch=batches())
def test_no_segment_changes_nothing(batch: Batch):
    mask = batch.mask.where((batch.mask >= 0) & (batch.mask <= batch.classes), 255)
    B, H, W = mask.shape
    assert torch.equal(vote_segments(mask, torch.zeros_like(mask), batch.classes), mask)
    assert torch.equal(vote_segments(mask, torch.zeros(B, 0, H, W, dtype=torch.bool), batch.classes), mask)


@given(batch=batches(), data=st.data())
def test_the_order_and_the_names_of_segments_do_not_matter(batch: Batch, data):
    index = index_map(batch)
    booleans = torch.stack([index == i for i in data.draw(st.permutations(range(1, 5)))], 1)
    expected = vote_segments(batch.mask, index, batch.classes)
    assert torch.equal(vote_segments(batch.mask, booleans, batch.classes), expected)
    renamed = index.where(index == 0, 7 * index + 100)
    assert torch.equal(vote_segments(batch.mask, renamed, batch.classes), expected)


@given(batch=batches())
def test_a_vote_shows_classes_of_the_image_and_void_where_it_was(batch: Batch):
    voted = vote_segments(batch.mask, index_map(batch), batch.classes)
    for before, after in zip(batch.mask, voted, strict=True):
        seen = before[(before >= 0) & (before <= batch.classes)]
        assert set(after.unique().tolist()) <= {*seen.tolist(), 0, 255}
        assert ((after != 255) | (before < 0) | (before > batch.classes)).all()


@pytest.mark.parametrize(("pixels", "taken"), [(2, False), (3, True)])
def test_a_segment_needs_more_than_its_share(pixels, taken):
    mask = torch.zeros(1, 2, 4).long()
    mask[0, 0, :pixels] = mask[0, 1, :] = 1  # the second row keeps the class from being covered
    segments = torch.tensor([[[1, 1, 1, 1], [0, 0, 0, 0]]])
    assert vote_segments(mask, segments, 1)[0, 0].eq(1).all() == taken


@pytest.mark.parametrize(("cover", "taken"), [(0.75, True), (0.76, False)])
def test_a_large_segment_is_taken_by_the_class_that_it_holds(cover, taken):
    mask, segments = torch.zeros(1, 4, 5).long(), torch.ones(1, 4, 5).long()
    mask[0, 0, :4] = 1
    segments[0, 0, 0] = 0
    assert vote_segments(mask, segments, 1, cover=cover)[0, 1:].eq(1).all() == taken


def test_a_segment_is_taken_once_and_a_later_class_goes_before():
    mask = torch.tensor([[[1, 1, 2, 2]]])
    whole = torch.ones(1, 1, 4).long()
    assert vote_segments(mask, whole, 2, share=0.4).tolist() == [[[1, 1, 2, 2]]]  # 2's pixels are free by then
    overlapping = torch.tensor([[[[True, True, True, False]], [[False, True, True, True]]]])
    assert vote_segments(mask, overlapping, 2).tolist() == [[[1, 2, 2, 2]]]


def test_void_inside_of_a_taken_segment_becomes_its_class():
    mask = torch.tensor([[[1, 1, 1, 255, 255]]])
    assert vote_segments(mask, torch.tensor([[[1, 1, 1, 1, 0]]]), 1).tolist() == [[[1, 1, 1, 1, 255]]]
    assert vote_segments(mask, torch.zeros(1, 1, 5).long(), 1, ignore_index=-1).tolist() == [[[1, 1, 1, -1, -1]]]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("mask", torch.rand(2, 4, 5), TypeError),
        ("mask", torch.zeros(4, 5).long(), ValueError),
        ("segments", torch.zeros(2, 4, 6).long(), ValueError),
        ("segments", torch.rand(2, 4, 5), TypeError),
        ("segments", torch.zeros(2, 3, 4, 5).long(), TypeError),
        ("segments", torch.zeros(4, 5).long(), ValueError),
        ("segments", None, TypeError),
        ("num_classes", 0, ValueError),
        ("share", 1.5, ValueError),
        ("cover", -1, ValueError),
        ("cover", "most", TypeError),
        ("ignore_index", 1.5, TypeError),
    ],
)
def test_vote_segments_refuses(name, value, error):
    arguments = {"mask": torch.zeros(2, 4, 5).long(), "segments": torch.zeros(2, 4, 5).long(), "num_classes": 2}
    settings = {"share": 0.5, "cover": 0.85, "ignore_index": 255}
    assert_refuses(vote_segments, arguments | settings, name, value, error)


def test_inputs_are_left_as_they_are():
    batch = make_batch()
    before, index = batch.mask.clone(), index_map(batch)
    vote_segments(batch.mask, index, batch.classes)
    assert torch.equal(batch.mask, before)
    assert torch.equal(index, index_map(batch))
