from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelss import attention_affinity, cam_boxes, refine_by_affinity, sinkhorn_affinity
from tests.affinity.test_attention import cell_affinity
from tests.blocks import Block
from tests.oracles import active, assert_refuses, field
from tests.strategies import Batch, batches, make_batch

SIGNATURES = {
    "cam_boxes": "(cam, *, threshold=0.4)",
    "refine_by_affinity": "(scores, affinity, *, inside=None)",
}


def refine_by_affinity_by_loops(scores: Tensor, affinity: Tensor, inside: Tensor | None = None) -> Tensor:
    B, N, h, w = scores.shape
    cells = list(product(range(h), range(w)))
    results = []
    for b, n, p in product(range(B), range(N), range(h * w)):
        spreading = [(q, y, x) for q, (y, x) in enumerate(cells) if inside is None or inside[b, n, y, x]]
        results.append(sum((affinity[b, p, q] * scores[b, n, y, x] for q, y, x in spreading), scores.sum() * 0))
    return torch.stack(results).view(B, N, h, w) if results else scores


def boxes_by_flood(cam: Tensor, threshold: float = 0.4) -> Tensor:
    B, N, h, w = cam.shape
    inside = torch.zeros(B, N, h, w, dtype=torch.bool)
    for b, n in product(range(B), range(N)):
        one = active(cam[b, n])
        left = {(y, x) for y, x in product(range(h), range(w)) if one[y, x] > threshold * one.max()}
        while left:
            edge = [left.pop()]
            blob = []
            while edge:
                y, x = edge.pop()
                blob.append((y, x))
                touching = {(y + dy, x + dx) for dy, dx in product((-1, 0, 1), repeat=2)} & left
                left -= touching
                edge += touching
            rows, columns = zip(*blob, strict=True)
            inside[b, n, min(rows) : max(rows) + 1, min(columns) : max(columns) + 1] = True
    return inside


def cells_of(batch: Batch) -> tuple[Tensor, Tensor]:
    scores = batch.features
    return scores, cell_affinity(batch, scores.shape[2] * scores.shape[3])


BLOCKS = {
    "refine_by_affinity": Block(
        lambda b: refine_by_affinity(*cells_of(b)),
        lambda b: refine_by_affinity_by_loops(*cells_of(b)),
    ),
    "refine_by_affinity inside": Block(
        lambda b: refine_by_affinity(*cells_of(b), inside=b.features > 0.25),
        lambda b: refine_by_affinity_by_loops(*cells_of(b), b.features > 0.25),
    ),
    "cam_boxes": Block(
        lambda b: cam_boxes(b.cam).long(),
        lambda b: boxes_by_flood(b.cam).long(),
        but={
            "no wait": "the number of blobs decides how often a loop runs",
            "checks": "it looks at values, which a tensor without any refuses in torch's words",
        },
    ),
}


# the public code


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=2e-6)


def test_equals_clip_es(device):
    golden = field("clipes")
    affinity = sinkhorn_affinity(attention_affinity(golden["attn"][:, None, None].to(device), layers=8))
    inside = golden["box_mask"][None, None].bool().to(device)
    close(refine_by_affinity(golden["cam"][None, None].to(device), affinity, inside=inside)[0, 0], golden["refined"])


def test_boxes_equal_clip_es_but_for_their_last_rows_and_columns():
    golden = field("clipes")
    boxes, expected = torch.zeros(6, 8, dtype=torch.bool), torch.zeros(6, 8, dtype=torch.bool)
    for x0, y0, x1, y1 in golden["boxes"].tolist():  # ends are exclusive, and clipped to w - 1 and h - 1
        boxes[y0:y1, x0:x1] = True
        expected[y0 : y1 + 1, x0 : x1 + 1] = True
    assert torch.equal(boxes, golden["box_mask"].bool())
    actual = cam_boxes(golden["cam"][None, None], threshold=float(golden["threshold"]))[0, 0]
    assert (actual | ~golden["box_mask"].bool()).all()
    assert (expected | ~actual).all()


@pytest.mark.parametrize("key", ["v2", "plus"])
def test_equals_mctformer(key, device):
    golden = field("mctformer")
    affinity = attention_affinity(golden["attn"].to(device), skip=4, reduce="sum")
    close(refine_by_affinity(golden[f"{key}_cams_fused"].to(device), affinity), golden[f"{key}_refined"])


# properties


@given(batch=batches(side=6))
def test_the_identity_leaves_the_scores(batch: Batch):
    scores, _ = cells_of(batch)
    P = scores[0, 0].numel()
    identity = torch.eye(P, dtype=scores.dtype).expand(len(scores), P, P)
    torch.testing.assert_close(refine_by_affinity(scores, identity), scores)
    inside = scores > 0.2
    torch.testing.assert_close(refine_by_affinity(scores, identity, inside=inside), scores * inside)


@given(batch=batches(side=4))
def test_a_stochastic_affinity_keeps_the_range_and_constant_maps(batch: Batch):
    scores, affinity = cells_of(batch)
    affinity = affinity / affinity.sum(2, keepdim=True)
    refined = refine_by_affinity(scores, affinity)
    low, high = scores.amin((2, 3), keepdim=True), scores.amax((2, 3), keepdim=True)
    assert (refined >= low - 1e-12).all()
    assert (refined <= high + 1e-12).all()
    ones = torch.ones_like(scores)
    torch.testing.assert_close(refine_by_affinity(ones, affinity), ones)


def test_what_is_outside_does_not_spread_but_is_reached():
    scores = torch.tensor([[[[1.0, 5.0]]]])
    affinity = torch.tensor([[[0.5, 0.5], [0.25, 0.75]]])
    inside = torch.tensor([[[[True, False]]]])
    assert torch.equal(refine_by_affinity(scores, affinity, inside=inside), torch.tensor([[[[0.5, 0.25]]]]))
    assert not refine_by_affinity(scores, affinity, inside=inside & False).any()


@given(batch=batches(), threshold=st.floats(0, 0.99))
def test_boxes_contain_what_is_above_the_threshold(batch: Batch, threshold: float):
    inside = cam_boxes(batch.cam, threshold=threshold)
    assert inside.dtype == torch.bool
    above = batch.cam > threshold * batch.cam.amax((2, 3), keepdim=True)
    assert (inside | ~above).all()
    assert torch.equal(inside.any((2, 3)), above.any((2, 3)))
    assert torch.equal(cam_boxes(batch.cam.flip(-1), threshold=threshold), inside.flip(-1))


@given(batch=batches())
def test_boxes_are_blind_to_scale_and_empty_above_the_maximum(batch: Batch):
    assert torch.equal(cam_boxes(4 * batch.cam), cam_boxes(batch.cam))
    assert not cam_boxes(batch.cam, threshold=1).any()
    assert not cam_boxes(batch.cam * 0).any()


def test_a_winding_blob_has_one_box_and_the_last_row_counts():
    snake = torch.tensor(
        [
            [1, 1, 1, 1, 1, 0],
            [0, 0, 0, 0, 1, 0],
            [1, 1, 1, 1, 1, 0],
            [1, 0, 0, 0, 0, 0],
            [1, 1, 1, 1, 1, 0],
        ]
    ).double()
    assert torch.equal(cam_boxes(snake[None, None])[0, 0], torch.tensor([True] * 5 + [False]).expand(5, 6))
    last = torch.zeros(1, 1, 4, 5)
    last[..., -1, -2:] = 1
    assert torch.equal(cam_boxes(last), last.bool())


def test_boxes_take_no_gradient():
    assert not cam_boxes(make_batch().cam.requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("scores", torch.rand(2, 4, 5), ValueError),
        ("scores", torch.ones(2, 3, 4, 5).long(), TypeError),
        ("affinity", torch.rand(2, 19, 20), ValueError),
        ("affinity", torch.rand(1, 20, 20), ValueError),
        ("affinity", None, TypeError),
        ("inside", torch.rand(2, 3, 4, 5), TypeError),
        ("inside", torch.ones(2, 1, 4, 5).bool(), ValueError),
    ],
)
def test_refine_by_affinity_refuses(name, value, error):
    arguments = {"scores": torch.rand(2, 3, 4, 5), "affinity": torch.rand(2, 20, 20), "inside": None}
    assert_refuses(refine_by_affinity, arguments, name, value, error)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("cam", torch.rand(2, 4, 5), ValueError),
        ("cam", torch.ones(2, 3, 4, 5).long(), TypeError),
        ("threshold", 1.1, ValueError),
        ("threshold", -0.1, ValueError),
        ("threshold", "high", TypeError),
    ],
)
def test_cam_boxes_refuses(name, value, error):
    assert_refuses(cam_boxes, {"cam": torch.rand(2, 3, 4, 5), "threshold": 0.4}, name, value, error)
