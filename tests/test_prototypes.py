from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelss import normalize_cam, score_prototypes
from tests.blocks import Block
from tests.oracles import active, assert_refuses, field
from tests.strategies import Batch, batches

SIGNATURES = {"score_prototypes": "(features, scores, *, share=0.125)"}


def scores_of(b: Batch, cam: Tensor) -> Tensor:
    """CAMs of the present classes; a factor an image, since their maxima of 1 would tie."""
    factors = 0.5 ** torch.arange(len(cam), device=cam.device).to(cam.dtype)
    return cam.where((b.tags > 0)[:, :, None, None], 0) * factors[:, None, None, None]


BLOCKS = {
    "score_prototypes": Block(
        lambda b: score_prototypes(b.probs, scores_of(b, b.cam))[0],
        lambda b: score_prototypes_by_loops(b.probs, scores_of(b, b.cam))[0],
        but={"gradient": "a target carries none", "checks": "its entry makes the scores of other tensors"},
    )
}


def score_prototypes_by_loops(features: Tensor, scores: Tensor, share: float = 0.125) -> tuple[Tensor, Tensor]:
    B, K, h, w = scores.shape
    rows, filled = [], []
    for k in range(K):
        cells = [(active(scores[b, k, i, j]).item(), b, i, j) for b, i, j in product(range(B), range(h), range(w))]
        best = sorted(cells, reverse=True)[: max(1, int(share * h * w))]
        total = features.new_zeros(features.shape[1])
        for score, b, i, j in best:
            total = total + max(score, 0) * features[b, :, i, j]
        filled.append(any(score > 0 for score, *_ in best))
        rows.append(total / total.norm() if filled[-1] and total.norm() > 0 else total * 0)
    return torch.stack(rows).detach(), torch.tensor(filled)


def field_scores(cam: Tensor) -> Tensor:
    """PPC's: min-max, and a constant for the background."""
    scores = normalize_cam(cam, kind="minmax")
    scores[:, 0] = 0.2
    return scores


@pytest.mark.parametrize("view", "12")
def test_prototypes_are_ppcs(view):
    a = field("ppc")
    prototypes, filled = score_prototypes(a[f"features{view}"], field_scores(a[f"cam{view}"]))
    # the background's scores are all the same: which of its cells are taken is torch's affair
    torch.testing.assert_close(prototypes[1:], a[f"prototypes{view}"][1:], rtol=0, atol=2e-6)
    assert filled.all()


@given(batch=batches(side=5), share=st.sampled_from([0.01, 0.3, 1.0]))
def test_any_share_equals_the_loops(batch, share):
    scores = scores_of(batch, batch.cam)
    prototypes, filled = score_prototypes(batch.probs, scores, share=share)
    expected, known = score_prototypes_by_loops(batch.probs, scores, share)
    torch.testing.assert_close(prototypes, expected)
    assert torch.equal(filled, known)


@given(batch=batches(side=5), factor=st.floats(1e-3, 1e3))
def test_lengths_and_scales_do_not_matter(batch, factor):
    scores = scores_of(batch, batch.cam)
    prototypes, filled = score_prototypes(batch.probs, scores)
    torch.testing.assert_close(prototypes.norm(dim=1), filled.double())
    for other in (score_prototypes(factor * batch.probs, scores), score_prototypes(batch.probs, factor * scores)):
        torch.testing.assert_close(other, (prototypes, filled))


@given(batch=batches(side=5, images=3), data=st.data())
def test_images_cells_and_classes_in_any_order(batch, data):
    features, scores = batch.probs, scores_of(batch, batch.cam)
    expected, filled = score_prototypes(features, scores)
    images, classes = (torch.tensor(data.draw(st.permutations(range(n)))) for n in (3, batch.classes))
    found, known = score_prototypes(features[images].flip(-1), scores[images][:, classes].flip(-1))
    torch.testing.assert_close(found, expected[classes])
    assert torch.equal(known, filled[classes])


def test_a_class_of_one_image_takes_the_cells_of_that_image():
    features = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 2, 4, 4).clone()
    features[1, 1] = 0  # images that point elsewhere
    scores = torch.zeros(2, 2, 4, 4)
    scores[0, 0], scores[1, 1] = torch.rand(2, 4, 4) + 0.1
    prototypes, filled = score_prototypes(features, scores)
    torch.testing.assert_close(prototypes, torch.tensor([[0.5**0.5, 0.5**0.5], [1.0, 0.0]]))
    assert filled.all()


def test_no_score_is_no_prototype():
    scores = torch.tensor([0.0, -1.0, torch.nan]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    prototypes, filled = score_prototypes(torch.rand(2, 3, 4, 4), scores)
    assert not filled.any()
    assert not prototypes.any()


def test_no_gradient():
    features, scores = torch.rand(2, 3, 4, 4, requires_grad=True), torch.rand(2, 2, 4, 4, requires_grad=True)
    assert not score_prototypes(features, scores)[0].requires_grad


FEATURES, SCORES = torch.rand(2, 5, 3, 4), torch.rand(2, 3, 3, 4)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("features", FEATURES[0], ValueError),
        ("features", FEATURES.long(), TypeError),
        ("scores", SCORES[:1], ValueError),
        ("scores", SCORES[..., :3], ValueError),
        ("scores", SCORES.long(), TypeError),
        ("scores", SCORES.to("meta"), ValueError),
        ("share", 0.0, ValueError),
        ("share", 1.5, ValueError),
        ("share", None, TypeError),
    ],
)
def test_prototypes_refuse(name, value, error):
    assert_refuses(score_prototypes, {"features": FEATURES, "scores": SCORES, "share": 0.5}, name, value, error)
