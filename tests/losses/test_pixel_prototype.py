from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelss import class_region_mask, normalize_cam, pixel_prototype_loss, regional_contrastive_loss, score_prototypes
from pixelss.losses import pixel_prototype
from tests.blocks import Block
from tests.oracles import active, assert_refuses, field, unit
from tests.strategies import Batch, batches, make_batch
from tests.test_prototypes import score_prototypes_by_loops, scores_of

SIGNATURES = {
    "pixel_prototype_loss": "(first, second, tags, *, share=0.125, background=0.2, temperature=0.1)",
}

View = tuple[Tensor, Tensor]


def views_of(b: Batch) -> tuple[View, View, Tensor]:
    first = b.probs[:, 1:], scores_of(b, b.student[0])
    second = b.probs[:, :-1], scores_of(b, b.teacher[0])
    return first, second, b.tags


BLOCKS = {
    "pixel_prototype_loss": Block(
        lambda b: pixel_prototype_loss(*views_of(b), share=0.3),
        lambda b: pixel_prototype_loss_by_loops(*views_of(b), share=0.3),
        but={
            "gradient": "prototypes carry none",
            "checks": "its entry makes the arguments of other tensors",
        },
    )
}


def labels_by_loops(scores: Tensor, tags: Tensor, background: float) -> dict[tuple[int, int, int], int]:
    B, N, h, w = scores.shape
    labels = {}
    for b, i, j in product(range(B), range(h), range(w)):
        values = [background] + [active(scores[b, n, i, j]).item() * bool(tags[b, n] > 0) for n in range(N)]
        labels[b, i, j] = values.index(max(values))
    return labels


def prototypes_by_loops(features: Tensor, scores: Tensor, share: float, background: float) -> tuple[Tensor, Tensor]:
    """The background's cells are those that torch takes of equal ones."""
    B, _, h, w = scores.shape
    taken = torch.full((1, B * h * w), background, dtype=scores.dtype)
    cells = taken.topk(min(max(1, int(share * h * w)), B * h * w)).indices[0]
    constant = torch.zeros(1, B * h * w, dtype=scores.dtype).index_fill(1, cells, background).view(B, 1, h, w)
    return score_prototypes_by_loops(features, torch.cat([constant, scores], 1), share)


def contrast_by_loops(features: Tensor, labels: dict, prototypes: Tensor, filled: Tensor, temperature: float) -> Tensor:
    eps, terms = torch.finfo(features.dtype).eps, []
    for (b, i, j), label in labels.items():
        if filled[label]:
            q = unit(features[b, :, i, j], eps)
            z = [q @ prototypes[k] / temperature for k in range(len(prototypes)) if filled[k]]
            terms.append(torch.stack(z).logsumexp(0) - q @ prototypes[label] / temperature)
    return sum(terms) / len(terms) if terms else features.sum() * 0


def pixel_prototype_loss_by_loops(
    first: View, second: View, tags: Tensor, share: float = 0.125, background: float = 0.2, temperature: float = 0.1
) -> Tensor:
    """CE(q1 pt2, y1), CE(q2 pt1, y2), mean; CE(q1 pt1, y2), CE(q2 pt2, y1), mean; a tenth of both."""
    (x1, s1), (x2, s2) = first, second
    y1, y2 = (labels_by_loops(s, tags, background) for s in (s1, s2))
    pt1, pt2 = (prototypes_by_loops(*view, share, background) for view in (first, second))
    cross_prototype = contrast_by_loops(x1, y1, *pt2, temperature) + contrast_by_loops(x2, y2, *pt1, temperature)
    cross_label = contrast_by_loops(x1, y2, *pt1, temperature) + contrast_by_loops(x2, y1, *pt2, temperature)
    return 0.1 * cross_prototype / 2 + 0.1 * cross_label / 2


# What PPC's own code returned: its prototypes come from all classes, tags mask the labels alone


@pytest.fixture
def ppc():
    a = field("ppc")
    features = [a[f"features{view}"].requires_grad_() for view in "12"]
    return a, features, [normalize_cam(a[f"cam{view}"], kind="minmax") for view in "12"]


@pytest.mark.parametrize("first_map", [0, 1], ids=["with a background", "foreground"])
def test_the_cross_terms_are_ppcs(ppc, first_map):
    a, features, scores = ppc
    views = [(x, s[:, first_map:]) for x, s in zip(features, scores, strict=True)]
    loss = pixel_prototype_loss(*views, a["tags"])
    expected = a["loss_cross_proto"] + a["loss_cross_label"]
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=2e-6)
    for gradient, name in zip(torch.autograd.grad(loss, features), ("grad_cross_f1", "grad_cross_f2"), strict=True):
        torch.testing.assert_close(gradient, a[name], rtol=2e-6, atol=2e-6)


def test_each_term_is_a_regional_contrastive_loss(ppc):
    a, (x1, x2), scores = ppc
    y1, y2 = (class_region_mask(s[:, 1:], a["tags"], threshold=0.2) for s in scores)
    for view, y in (("1", y1), ("2", y2)):
        assert torch.equal(y.flatten(), a[f"pseudo_label{view}"])
    pt1, pt2 = a["prototypes1"], a["prototypes2"]
    across_prototypes, across_labels = (
        sum(regional_contrastive_loss(x, y, pt, temperature=0.1) for x, y, pt in terms) / 2
        for terms in (((x1, y1, pt2), (x2, y2, pt1)), ((x1, y2, pt1), (x2, y1, pt2)))
    )
    torch.testing.assert_close(0.1 * across_prototypes, a["loss_cross_proto"], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(0.1 * across_labels, a["loss_cross_label"], rtol=2e-6, atol=2e-6)


# What holds for any views


@given(batch=batches(side=5), share=st.sampled_from([0.1, 1.0]), background=st.floats(0.05, 0.9), data=st.data())
def test_any_settings_are_four_regional_contrasts(batch, share, background, data):
    first, second, tags = views_of(batch)
    temperature = data.draw(st.floats(0.05, 2))
    labels = [class_region_mask(s, tags, threshold=background) for _, s in (first, second)]
    full = [torch.cat([torch.full_like(s[:, :1], background), s], 1) for _, s in (first, second)]
    prototypes = [score_prototypes(x, s, share=share) for (x, _), s in zip((first, second), full, strict=True)]
    terms = [
        regional_contrastive_loss((first, second)[view][0], labels[y], *prototypes[pt], temperature=temperature)
        for view, y, pt in ((0, 0, 1), (1, 1, 0), (0, 1, 0), (1, 0, 1))
    ]
    loss = pixel_prototype_loss(first, second, tags, share=share, background=background, temperature=temperature)
    torch.testing.assert_close(loss, sum(terms) / 20, rtol=1e-7, atol=1e-7)


@given(batch=batches(side=5), factor=st.floats(0.1, 10))
def test_the_order_of_the_views_and_the_lengths_do_not_matter(batch, factor):
    first, second, tags = views_of(batch)
    loss = pixel_prototype_loss(first, second, tags)
    torch.testing.assert_close(pixel_prototype_loss(second, first, tags), loss)
    longer = (factor * first[0], first[1])
    torch.testing.assert_close(pixel_prototype_loss(longer, second, tags), loss)


def test_a_background_in_front_is_not_read():
    first, second, tags = views_of(make_batch())
    with_one = [(x, torch.cat([torch.rand_like(s[:, :1]), s], 1)) for x, s in (first, second)]
    assert torch.equal(pixel_prototype_loss(*with_one, tags), pixel_prototype_loss(first, second, tags))


def test_an_untagged_class_counts_where_it_scores():
    batch = make_batch(images=2, classes=3, dim=4)
    tags = torch.tensor([[1, 1, 0], [0, 1, 0]])
    first, second = ((x, s + 0.1) for x, s in views_of(batch)[:2])
    silent = [(x, s * torch.tensor([1, 1, 0]).view(3, 1, 1)) for x, s in (first, second)]
    fewer = [(x, s[:, :2]) for x, s in (first, second)]
    loss = pixel_prototype_loss(*silent, tags)
    torch.testing.assert_close(loss, pixel_prototype_loss(*fewer, tags[:, :2]))
    assert pixel_prototype_loss(first, second, tags) > loss  # one more to be confused with


def test_more_classes_than_255():
    features, scores = torch.rand(2, 1, 4, 3, 3), torch.rand(2, 1, 300, 3, 3)
    scores[:, :, 280] = 2
    first, second = zip(features, scores, strict=True)
    tags = torch.zeros(1, 300).index_fill(1, torch.tensor([254, 280]), 1)
    swapped = [(x, torch.cat([s[:, 280:281], s[:, :280], s[:, 281:]], 1)) for x, s in (first, second)]
    expected = pixel_prototype_loss(*swapped, tags[:, [280, *range(280), *range(281, 300)]])
    torch.testing.assert_close(pixel_prototype_loss(first, second, tags), expected)


def test_one_class_alone_is_no_contrast():
    first, second, tags = views_of(make_batch())
    nothing = [(x.requires_grad_(), 0 * s) for x, s in (first, second)]
    loss = pixel_prototype_loss(*nothing, 0 * tags)
    assert loss == 0
    loss.backward()
    assert not nothing[0][0].grad.any()


def test_gradcheck_with_prototypes_that_stay(monkeypatch):
    batch = make_batch(images=2, classes=2, image_size=(2, 3))
    fixed = batch.prototypes, torch.tensor([True, True, False])
    monkeypatch.setattr(pixel_prototype, "score_prototypes", lambda *_, **__: fixed)
    scores = [x + 0.3 for x in (batch.student[0], batch.teacher[0])]
    features = [torch.rand(2, 5, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def loss(x1: Tensor, x2: Tensor) -> Tensor:
        return pixel_prototype_loss((x1, scores[0]), (x2, scores[1]), torch.ones(2, 2), temperature=0.5)

    assert loss(*features) > 0
    assert torch.autograd.gradcheck(loss, features)


# refusals

X, S, TAGS = torch.rand(2, 5, 3, 4), torch.rand(2, 3, 3, 4), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("first", X, TypeError),
        ("first", (X,), ValueError),
        ("first", (X[0], S), ValueError),
        ("first", (X, S[..., :3]), ValueError),
        ("first", (X, S[:, :2]), ValueError),
        ("first", (X, S.long()), TypeError),
        ("second", None, TypeError),
        ("second", (X[:, :4], S), ValueError),
        ("second", (X[..., :3], S[..., :3]), ValueError),
        ("second", (X, S[:1]), ValueError),
        ("second", (X.to("meta"), S), ValueError),
        ("tags", TAGS[:1], ValueError),
        ("tags", TAGS.to("meta"), ValueError),
        ("tags", torch.ones(2, 7), ValueError),
        ("share", 0, ValueError),
        ("background", 0, ValueError),
        ("background", 1.1, ValueError),
        ("temperature", 0.0, ValueError),
        ("temperature", "0.1", TypeError),
    ],
)
def test_loss_refuses(name, value, error):
    settings = {"share": 0.5, "background": 0.2, "temperature": 0.1}
    assert_refuses(
        pixel_prototype_loss, {"first": (X, S), "second": (X, S), "tags": TAGS, **settings}, name, value, error
    )
