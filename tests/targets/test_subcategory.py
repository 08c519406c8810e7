from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelss import subcategory_tags
from tests.blocks import Block
from tests.oracles import assert_refuses
from tests.strategies import Batch, batches, make_batch, noise

SIGNATURES = {"subcategory_tags": "(features, tags, *, clusters=10, generator=None)"}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pooled(b: Batch) -> Tensor:
    return b.features.detach().mean((2, 3))


BLOCKS = {
    "subcategory_tags": Block(
        lambda b: subcategory_tags(pooled(b), b.tags, clusters=2, generator=seeded()),
        lambda b: subcategory_tags_by_search(pooled(b), b.tags, 2),
        but={"no wait": "k-means runs until nothing moves"},
    ),
}


def spread_of(rows: list[Tensor]) -> float:
    """Return the sum of squared distances of some rows to their mean."""
    mean = sum(rows) / len(rows)
    return sum(float(((row - mean) ** 2).sum()) for row in rows)


def partition_by_search(x: Tensor, k: int) -> list[int]:
    """Return the clusters of the rows, the best of all partitions; clusters are counted as they come."""
    best, smallest = [0] * len(x), float("inf")
    for names in product(range(k), repeat=len(x)):
        order = list(dict.fromkeys(names))
        if order != sorted(order) or order[0] != 0:
            continue  # another name of one that is seen
        spread = sum(spread_of([x[i] for i, c in enumerate(names) if c == cluster]) for cluster in order)
        if spread < smallest - 1e-12:
            best, smallest = list(names), spread
    return best


def subcategory_tags_by_search(features: Tensor, tags: Tensor, clusters: int) -> Tensor:
    B, N = tags.shape
    found = features.new_zeros(B, N * clusters)
    for n in range(N):
        images = [b for b in range(B) if tags[b, n] > 0]
        if images:
            for b, c in zip(images, partition_by_search(features[images], clusters), strict=True):
                found[b, n * clusters + c] = 1
    return found


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("clusters", [1, 2, 3])
def test_clusters_are_the_best_of_all_partitions(seed, clusters):
    features, tags = noise(7, 2, seed=seed), torch.ones(7, 1)
    actual = subcategory_tags(features, tags, clusters=clusters, generator=seeded(seed))
    assert torch.equal(actual, subcategory_tags_by_search(features, tags, clusters))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("far", [0.0, 1e4])
def test_groups_that_lie_apart_are_found_wherever_they_lie(seed, far):
    g = seeded(seed)
    group = torch.randint(0, 10, (150,), generator=g)
    features = far + 9 * torch.randn(10, 16, generator=g)[group] + 0.5 * torch.randn(150, 16, generator=g)
    found = subcategory_tags(features, torch.ones(150, 1), generator=g)
    assert found.shape == (150, 10)
    for k in range(10):
        (column,) = found[group == k].argmax(1).unique()
        assert torch.equal(found[:, column] > 0, group == k)


@given(batch=batches(), data=st.data(), clusters=st.integers(1, 4))
def test_every_image_has_one_subcategory_of_each_of_its_classes(batch, data, clusters):
    images = data.draw(st.integers(0, 8))
    features = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=2 * images, max_size=2 * images)))
    tags = torch.tensor(data.draw(st.lists(st.booleans(), min_size=3 * images, max_size=3 * images))).view(-1, 3)
    found = subcategory_tags(features.view(-1, 2).double(), tags, clusters=clusters, generator=seeded())
    blocks = found.view(images, 3, clusters)
    assert torch.equal(blocks.sum(2) > 0, tags.bool())
    assert (blocks.sum(2) <= 1).all()
    for n in range(3):
        shown = [int(c) for c in blocks[tags[:, n].bool(), n].argmax(1)]
        order = list(dict.fromkeys(shown))
        assert order == list(range(len(order)))  # counted as they come
        different = features.view(-1, 2)[tags[:, n].bool()].unique(dim=0)
        assert len(order) <= min(clusters, len(different))
        if len(different) <= clusters:  # then each is a cluster
            assert len(order) == len(different)


@pytest.mark.parametrize("seed", range(6))
def test_every_image_is_nearest_to_the_mean_of_its_own_cluster(seed):
    features, tags = noise(30, 3, seed=seed), torch.ones(30, 1)
    found = subcategory_tags(features, tags, clusters=5, generator=seeded(seed))
    means = found.mT @ features / found.sum(0)[:, None]
    assert torch.equal(torch.cdist(features, means).argmin(1), found.argmax(1))
    assert (found.sum(0) > 0).all()


def test_classes_do_not_know_of_each_other():
    features, tags = noise(12, 3), torch.eye(2).repeat(6, 1)
    tags[3] = 1
    both = subcategory_tags(features, tags, clusters=2, generator=seeded())
    alone = subcategory_tags(features, tags * torch.tensor([1, 0]), clusters=2, generator=seeded())
    assert torch.equal(both[:, :2], alone[:, :2])
    assert not alone[:, 2:].any()
    assert both[3].sum() == 2


def test_a_scale_and_a_shift_change_nothing():
    features, tags = noise(20, 4), torch.ones(20, 1)
    expected = subcategory_tags(features, tags, clusters=3, generator=seeded())
    assert torch.equal(subcategory_tags(64 * features + 32, tags, clusters=3, generator=seeded()), expected)


def test_the_generator_decides_and_torchs_own_is_the_default():
    features, tags = noise(40, 2), torch.ones(40, 1)  # without groups: starts differ in where they end
    several = [subcategory_tags(features, tags, clusters=9, generator=seeded(seed)) for seed in (0, 0, 1)]
    assert torch.equal(several[0], several[1])
    assert not torch.equal(several[0], several[2])
    torch.manual_seed(5)
    first = subcategory_tags(features, tags, clusters=9)
    torch.manual_seed(5)
    assert torch.equal(subcategory_tags(features, tags, clusters=9), first)
    state = torch.get_rng_state()
    subcategory_tags(features, tags, clusters=9, generator=seeded())
    assert torch.equal(torch.get_rng_state(), state)


def test_tags_fit_a_loss():
    features = noise(6, 4, dtype=torch.float16)
    found = subcategory_tags(features, torch.ones(6, 3), clusters=2, generator=seeded())
    assert found.dtype == torch.float32
    loss = torch.nn.functional.multilabel_soft_margin_loss(torch.zeros(6, 6), found)
    assert loss.isfinite()


def test_features_that_need_a_gradient_pass():
    batch = make_batch()
    found = subcategory_tags(pooled(batch).requires_grad_(), batch.tags, clusters=2)
    assert not found.requires_grad


FEATURES, TAGS = torch.rand(4, 5), torch.ones(4, 3)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("features", torch.rand(4, 5, 2, 2), ValueError),
        ("features", torch.ones(4, 5).long(), TypeError),
        ("features", FEATURES.where(FEATURES < 0.5, float("nan")), ValueError),
        ("features", FEATURES.where(FEATURES < 0.5, float("inf")), ValueError),
        ("tags", TAGS[:3], ValueError),
        ("tags", TAGS[0], ValueError),
        ("tags", TAGS / 2, ValueError),
        ("tags", TAGS.to("meta"), ValueError),
        ("clusters", 0, ValueError),
        ("clusters", 2.0, TypeError),
        ("generator", 0, TypeError),
    ],
)
def test_tags_refuse(name, value, error):
    arguments = {"features": FEATURES, "tags": TAGS, "clusters": 2, "generator": None}
    assert_refuses(subcategory_tags, arguments, name, value, error)
