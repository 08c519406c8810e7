from __future__ import annotations

import inspect
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pixelss import reliable_mask
from tests.blocks import Block
from tests.oracles import active, assert_refuses, field
from tests.strategies import Batch, batches, make_batch

SIGNATURES = {
    "reliable_mask": "(cam, low_probs, high_probs, tags, *, alpha=32.0, floor=0.1, share=0.6, background=0.8,"
    " confidence=0.8, ignore_index=255)",
}


SETTINGS = ("alpha", "floor", "share", "background", "confidence")
DEFAULTS = {name: inspect.signature(reliable_mask).parameters[name].default for name in SETTINGS}


def probs(b: Batch) -> tuple[Tensor, Tensor]:
    """Return two sure and different maps of probabilities, as two CRFs do."""
    sure = (8 * b.probs.detach()).softmax(1)
    return sure, sure.flip(-1)


BLOCKS = {
    "reliable_mask": Block(
        lambda b: reliable_mask(b.cam, *probs(b), b.tags, confidence=0.5, alpha=4.0),
        lambda b: reliable_mask_by_loops(b.cam.detach(), *probs(b), b.tags, confidence=0.5, alpha=4.0),
    ),
}


def reliable_mask_by_loops(
    cam: Tensor,
    low: Tensor,
    high: Tensor,
    tags: Tensor,
    **settings: float,
) -> Tensor:
    alpha, floor, share, background, confidence = ({**DEFAULTS, **settings}[name] for name in SETTINGS)
    B, N, H, W = cam.shape
    labels = torch.full((B, H, W), 255)
    for b in range(B):
        present = [0, *(n + 1 for n in range(N) if tags[b, n] > 0)]
        best = {}  # of every pixel its class in the CAM's map, and the value there
        for y, x in product(range(H), range(W)):
            values = [float(active(cam[b, n, y, x])) for n in range(N)]
            own = {0: (1 - max(values)) ** alpha} | {n: values[n - 1] for n in present[1:]}
            k = max(own, key=own.__getitem__)  # the lowest of several
            best[y, x] = k, own[k]
        limits = {0: background}
        for n in present[1:]:
            ordered = sorted(value for k, value in best.values() if k == n and value > floor)
            limits[n] = ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("inf")
        for (y, x), (k, value) in best.items():
            first = max(present, key=lambda n: float(low[b, n, y, x]))
            label = 0 if max(present, key=lambda n: float(high[b, n, y, x])) == 0 else first or 255
            sure = max(float(high[b, 0, y, x]), *(float(low[b, n, y, x]) for n in present[1:]), 0.0)
            if value > limits[k] and sure >= confidence:
                labels[b, y, x] = label
    return labels


@given(
    batch=batches(),
    share=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
    floor=st.sampled_from([0.0, 0.1, 0.5]),
    confidence=st.sampled_from([0.0, 0.4, 0.6]),
    alpha=st.sampled_from([1.0, 8.0]),
)
@settings(max_examples=20)
def test_mask_equals_the_loop(batch, **keywords):
    mask = reliable_mask(batch.cam, *probs(batch), batch.tags, **keywords)
    assert torch.equal(mask, reliable_mask_by_loops(batch.cam, *probs(batch), batch.tags, **keywords))


def test_mask_is_that_of_the_public_code():
    golden = field("rrm")
    classes, tags = golden["reliable_classes"], golden["reliable_tags"][None]
    (_, H, W), rows = golden["reliable_cam"].shape, torch.cat([torch.zeros(1, dtype=torch.int64), classes + 1])
    cam, low, high = torch.zeros(1, 20, H, W), torch.zeros(1, 21, H, W), torch.zeros(1, 21, H, W)
    cam[0, classes] = golden["reliable_cam"]
    low[0, rows], high[0, rows] = golden["reliable_crf_out_low"], golden["reliable_crf_out_high"]
    mask = reliable_mask(cam, low, high, tags)
    assert torch.equal(mask[0], golden["reliable_label"].long())
    assert len(mask.unique()) > 2


@given(batch=batches())
@settings(max_examples=20)
def test_absent_classes_never_appear_whatever_the_maps_say(batch):
    absent = (batch.tags == 0)[:, :, None, None]
    loud = [torch.cat([x[:, :1], x[:, 1:].masked_fill(absent, 1.0)], 1) for x in probs(batch)]
    mask = reliable_mask(batch.cam.masked_fill(absent, 0), *loud, batch.tags, confidence=0)
    for one, tags in zip(mask, batch.tags, strict=True):
        assert set(one.unique().tolist()) <= {0, 255, *(tags.nonzero().flatten() + 1).tolist()}


@given(batch=batches(), limits=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted))
@settings(max_examples=20)
def test_asking_for_more_only_takes_pixels_away(batch, limits):
    for name in ("confidence", "background", "share"):
        low, high = (
            reliable_mask(batch.cam, *probs(batch), batch.tags, **{"confidence": 0.2, name: limit}) for limit in limits
        )
        assert ((high == low) | (high == 255)).all()


def test_an_image_without_tags_is_background_where_it_is_sure():
    cam, sure = torch.zeros(1, 2, 1, 2), torch.tensor([0.9, 0.7])
    probs = torch.stack([sure, 1 - sure, 0 * sure])[None, :, None]
    assert reliable_mask(cam, probs, probs, torch.zeros(1, 2)).tolist() == [[[0, 255]]]


def test_void_is_what_it_is_told_to_be():
    batch = make_batch()
    masks = [reliable_mask(batch.cam, *probs(batch), batch.tags, ignore_index=void) for void in (255, -1)]
    assert torch.equal(masks[0].masked_fill(masks[0] == 255, -1), masks[1])
    assert (masks[1] == -1).any()


CAM, PROBS, TAGS = torch.rand(2, 3, 4, 5), torch.rand(2, 4, 4, 5), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("cam", CAM[0], ValueError),
        ("cam", CAM.long(), TypeError),
        ("low_probs", CAM, ValueError),
        ("low_probs", PROBS[..., :3], ValueError),
        ("high_probs", PROBS[:1], ValueError),
        ("high_probs", PROBS.to("meta"), ValueError),
        ("high_probs", None, TypeError),
        ("tags", TAGS[:, :2], ValueError),
        ("alpha", -1.0, ValueError),
        ("alpha", "32", TypeError),
        ("floor", 1.1, ValueError),
        ("share", -0.1, ValueError),
        ("background", float("nan"), ValueError),
        ("confidence", 80, ValueError),
        ("ignore_index", "255", TypeError),
        ("ignore_index", 0, ValueError),
        ("ignore_index", 3, ValueError),
    ],
)
def test_mask_refuses(name, value, error):
    assert_refuses(
        reliable_mask, {"cam": CAM, "low_probs": PROBS, "high_probs": PROBS, "tags": TAGS}, name, value, error
    )
