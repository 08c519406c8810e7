from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelss import lost_classes, merge_by_difference
from tests.blocks import Block
from tests.oracles import assert_refuses, field
from tests.strategies import Batch, batches, make_batch

SIGNATURES = {
    "lost_classes": "(knowledge, advice, num_classes, *, share=0.5, ignore_index=255)",
    "merge_by_difference": "(knowledge, advice, knowledge_logits, advice_logits, flags=None, *, bias=0.4,"
    " background=0.0)",
}


def maps_of(b: Batch) -> tuple[Tensor, Tensor]:
    return b.mask, b.probs.argmax(1)


def logits_of(b: Batch) -> tuple[Tensor, Tensor]:
    return b.raw[2][:, :2][:, -1:], b.teacher[0][:, :2][:, -1:]  # the second class's, where there are two


def flags_of(b: Batch) -> Tensor:
    return torch.cat([torch.zeros_like(b.tags[:, :1]), b.tags], 1)


LET_OFF = {"finite": "takes logits, which must be finite", "void": "labels are returned as they are"}
BLOCKS = {
    "lost_classes": Block(
        lambda b: lost_classes(*maps_of(b), b.classes).long(),
        lambda b: lost_classes_by_loops(*maps_of(b), b.classes).long(),
    ),
    "merge_by_difference": Block(
        lambda b: merge_by_difference(*maps_of(b), *logits_of(b), bias=0.1),
        lambda b: merge_by_loops(*maps_of(b), *logits_of(b), bias=0.1),
        but=LET_OFF,
    ),
    "merge_by_difference flags": Block(
        lambda b: merge_by_difference(*maps_of(b), *logits_of(b), flags_of(b), bias=0.1, background=0.1),
        lambda b: merge_by_loops(*maps_of(b), *logits_of(b), flags_of(b), bias=0.1, background=0.1),
        but=LET_OFF,
    ),
}


def lost_classes_by_loops(
    knowledge: Tensor, advice: Tensor, num_classes: int, share: float = 0.5, ignore_index: int = 255
) -> Tensor:
    B, K = len(knowledge), num_classes + 1
    lost = torch.zeros(B, K, dtype=torch.bool)
    for b, k in product(range(B), range(K)):
        before, after = ([int(label) for label in one[b].flatten()].count(k) for one in (knowledge, advice))
        lost[b, k] = k != ignore_index and after < share * before
    return lost


def merge_by_loops(knowledge, advice, knowledge_logits, advice_logits, flags=None, *, bias=0.4, background=0.0):
    merged = knowledge.clone()
    for b, i, j in product(*map(range, knowledge.shape)):
        before, after = int(knowledge[b, i, j]), int(advice[b, i, j])
        first, second = (1 / (1 + math.exp(-d[b, 0, i, j].item())) for d in (knowledge_logits, advice_logits))
        weight = first - second + bias
        weight -= background if before == 0 else 0
        weight += background if after == 0 else 0
        if flags is not None:
            flagged = {k for k in range(flags.shape[1]) if flags[b, k] > 0}
            weight -= 1 if before in flagged else 0
            weight += 1 if after in flagged else 0
        merged[b, i, j] = after if weight >= 0 else before
    return merged


# What SSDD's own code returned


def test_lost_classes_are_ssdds():
    a = field("ssdd")
    lost = lost_classes(a["knowledge"], a["advice"], 20)
    assert torch.equal(lost[:, 1:], a["ignore_flags"][:, 1:].bool())  # its loop leaves the background out
    assert lost.any()


@pytest.mark.parametrize(
    ("name", "settings"), [("merged_b40", {}), ("merged_b10_bg10", {"bias": 0.1, "background": 0.1})]
)
def test_merged_maps_are_ssdds(name, settings):
    a = field("ssdd")
    maps = a["knowledge"], a["advice"], a["dd_knowledge"], a["dd_advice"]
    for flags in (a["ignore_flags"], a["ignore_flags"].bool(), lost_classes(*maps[:2], 20)):
        assert torch.equal(merge_by_difference(*maps, flags, **settings), a[name].long())
    assert not torch.equal(merge_by_difference(*maps, **settings), a[name].long())


# What holds for any maps


@given(batch=batches(), share=st.sampled_from([0.0, 0.3, 0.5, 1.0]), void=st.sampled_from([255, -1, 0, 1]))
def test_any_lost_classes_equal_the_loops(batch, share, void):
    actual = lost_classes(*maps_of(batch), batch.classes, share=share, ignore_index=void)
    assert actual.dtype == torch.bool
    assert torch.equal(actual, lost_classes_by_loops(*maps_of(batch), batch.classes, share, void))


@given(
    batch=batches(),
    bias=st.sampled_from([-1.0, -0.3, 0.4]),
    background=st.sampled_from([-0.2, 0.0, 0.3]),
    flagged=st.booleans(),
)
def test_any_merged_map_equals_the_loops(batch, bias, background, flagged):
    arguments = *maps_of(batch), *logits_of(batch), flags_of(batch) if flagged else None
    merged = merge_by_difference(*arguments, bias=bias, background=background)
    assert merged.dtype == torch.int64
    assert torch.equal(merged, merge_by_loops(*arguments, bias=bias, background=background))


@given(batch=batches())
def test_a_map_loses_nothing_to_itself_and_all_to_void(batch):
    mask = batch.mask
    assert not lost_classes(mask, mask, batch.classes, share=1).any()
    shown = torch.stack([(mask == k).flatten(1).any(1) for k in range(batch.classes + 1)], 1)
    assert torch.equal(lost_classes(mask, torch.full_like(mask, 255), batch.classes, share=0.01), shown)
    assert not lost_classes(torch.full_like(mask, 255), mask, batch.classes, share=1).any()


@pytest.mark.parametrize(("after", "lost"), [(0, True), (1, True), (2, False), (5, False)])
def test_a_class_must_keep_half(after, lost):
    knowledge, advice = torch.zeros(1, 2, 5).long(), torch.zeros(1, 2, 5).long()
    knowledge[0, 0, :4] = 2
    advice[0, 1, :after] = 2
    assert lost_classes(knowledge, advice, 2).tolist() == [[False, False, lost]]


def test_a_class_that_keeps_just_its_share_is_not_lost():
    knowledge, advice = torch.ones(1, 1, 25).long(), torch.zeros(1, 1, 25).long()
    advice[..., :15] = 1
    assert not lost_classes(knowledge, advice, 1, share=0.6).any()  # in float32 0.6 * 25 is more than 15


def test_the_background_counts_as_a_class():
    knowledge, advice = torch.tensor([[[0, 0, 0, 1]]]), torch.tensor([[[1, 1, 0, 1]]])
    assert lost_classes(knowledge, advice, 1).tolist() == [[True, False]]
    logits = torch.zeros(1, 1, 1, 4)
    assert merge_by_difference(knowledge, advice, logits, logits, torch.tensor([[1, 0]])).tolist() == [[[0, 0, 0, 1]]]


@given(batch=batches(), data=st.data())
def test_every_label_is_of_one_of_the_two(batch, data):
    maps, logits = maps_of(batch), logits_of(batch)
    merged = merge_by_difference(*maps, *logits, flags_of(batch))
    assert ((merged == maps[0]) | (merged == maps[1])).all()
    order = torch.tensor(data.draw(st.permutations(range(batch.classes))))
    names = torch.cat([torch.zeros(1).long(), 1 + order])
    known = (maps[0] >= 0) & (maps[0] <= batch.classes)
    renamed = [names[one.where(known, 0)].where(known, one) for one in maps]
    flags = torch.zeros_like(flags_of(batch))
    flags[:, names] = flags_of(batch)
    expected = names[merged.where(known, 0)][known]
    assert torch.equal(merge_by_difference(*renamed, *logits, flags)[known], expected)


@given(batch=batches(), biases=st.tuples(st.floats(-1, 1), st.floats(-1, 1)).map(sorted))
def test_more_bias_takes_more_advice(batch, biases):
    knowledge, advice = torch.zeros_like(batch.mask), torch.ones_like(batch.mask)
    low, high = (merge_by_difference(knowledge, advice, *logits_of(batch), bias=bias) for bias in biases)
    assert (low <= high).all()
    assert merge_by_difference(knowledge, advice, *logits_of(batch), bias=1).all()


def test_what_is_easy_to_foresee_from_the_knowledge_is_taken():
    knowledge, advice = torch.zeros(1, 1, 3).long(), torch.ones(1, 1, 3).long()
    logits = torch.tensor([[[[3.0, 0.0, -3.0]]]])
    merged = merge_by_difference(knowledge, advice, logits, torch.zeros_like(logits), bias=0)
    assert merged.tolist() == [[[1, 1, 0]]]  # at no difference the advice
    assert merge_by_difference(knowledge, advice, logits, logits).tolist() == [[[1, 1, 1]]]


def test_a_lost_class_comes_back_and_nothing_else():
    knowledge, advice = torch.tensor([[[1, 1, 2, 0]]]), torch.tensor([[[0, 0, 0, 2]]])
    logits = torch.zeros(1, 1, 1, 4)
    lost = lost_classes(knowledge, advice, 2, share=0.5)
    assert lost.tolist() == [[False, True, False]]
    assert merge_by_difference(knowledge, advice, logits, logits, lost).tolist() == [[[1, 1, 0, 2]]]


def test_labels_that_are_no_class_are_never_flagged():
    knowledge, advice = torch.tensor([[[255, -1, 3, 0]]]), torch.ones(1, 1, 4).long()
    logits = torch.zeros(1, 1, 1, 4)
    merged = merge_by_difference(knowledge, advice, logits, logits, torch.tensor([[1, 0, 0]]))
    assert merged.tolist() == [[[1, 1, 1, 0]]]
    merged = merge_by_difference(knowledge, advice, logits, logits, torch.tensor([[0, 0, 1]]), bias=-1)
    assert merged.tolist() == [[[255, -1, 3, 0]]]


# refusals


MASK, LOGITS, FLAGS = torch.zeros(2, 4, 5).long(), torch.rand(2, 1, 4, 5), torch.zeros(2, 4)
BAD_MAPS = [
    ("knowledge", MASK[0], ValueError),
    ("knowledge", MASK.float(), TypeError),
    ("knowledge", None, TypeError),
    ("advice", MASK[:1], ValueError),
    ("advice", MASK[..., :4], ValueError),
    ("advice", MASK.float(), TypeError),
    ("advice", MASK.to("meta"), ValueError),
]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        *BAD_MAPS,
        ("num_classes", 0, ValueError),
        ("num_classes", 2.0, TypeError),
        ("share", 1.1, ValueError),
        ("share", None, TypeError),
        ("ignore_index", 255.0, TypeError),
    ],
)
def test_lost_classes_refuse(name, value, error):
    arguments = {"knowledge": MASK, "advice": MASK, "num_classes": 3, "share": 0.5, "ignore_index": 255}
    assert_refuses(lost_classes, arguments, name, value, error)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        *BAD_MAPS,
        ("knowledge_logits", LOGITS[:, 0], ValueError),
        ("knowledge_logits", LOGITS.expand(-1, 2, -1, -1), ValueError),
        ("knowledge_logits", LOGITS.long(), TypeError),
        ("advice_logits", LOGITS[..., :4], ValueError),
        ("advice_logits", LOGITS.to("meta"), ValueError),
        ("flags", FLAGS[:1], ValueError),
        ("flags", FLAGS[0], ValueError),
        ("flags", FLAGS.to("meta"), ValueError),
        ("bias", 1.1, ValueError),
        ("bias", "0.4", TypeError),
        ("background", -1.1, ValueError),
    ],
)
def test_merge_refuses(name, value, error):
    arguments = {"knowledge": MASK, "advice": MASK, "knowledge_logits": LOGITS, "advice_logits": LOGITS}
    assert_refuses(merge_by_difference, arguments | {"flags": FLAGS, "bias": 0.4}, name, value, error)


def test_inputs_are_left_as_they_are():
    batch = make_batch()
    merge_by_difference(*maps_of(batch), *logits_of(batch), flags_of(batch), background=0.1)
    assert torch.equal(batch.mask, make_batch().mask)
