from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pixelss import _pieces, class_token_contrast, patch_token_contrast, token_affinity_loss
from tests.blocks import Block
from tests.oracles import assert_refuses, field, value_and_grads
from tests.strategies import Batch, batches, noise

SIGNATURES = {
    "patch_token_contrast": "(features, mask, *, ignore_index=255)",
    "class_token_contrast": "(tokens, tags, *, temperature=1.0)",
    "token_affinity_loss": "(affinity, mask, *, radius=8, ignore_index=255)",
}


def affinity_of(b: Batch) -> Tensor:
    """Numbers in [0, 1] for every two pixels, not symmetric, exact in any dtype."""
    return torch.minimum(b.probs[:, 0].flatten(1)[:, :, None], b.probs[:, -1].flatten(1)[:, None])


def tokens_of(b: Batch) -> Tensor:
    """Two layers of tokens, one a class; a pixel is a channel."""
    return torch.stack([b.raw[2], b.raw[2].flip(1)]).flatten(3)


ANY_CLASS = {"void": "the number of classes is not known: what is not negative is a class"}
BLOCKS = {
    "patch_token_contrast": Block(
        lambda b: patch_token_contrast(b.probs, b.mask),
        lambda b: patch_token_contrast_by_loops(b.probs, b.mask),
        but=ANY_CLASS,
    ),
    "class_token_contrast": Block(
        lambda b: class_token_contrast(tokens_of(b), b.tags, temperature=0.5),
        lambda b: class_token_contrast_by_loops(tokens_of(b), b.tags, temperature=0.5),
        but={"finite": "takes tokens, which must be finite"},
    ),
    "token_affinity_loss": Block(
        lambda b: token_affinity_loss(affinity_of(b), b.mask, radius=2),
        lambda b: token_affinity_loss_by_loops(affinity_of(b), b.mask, radius=2),
        but=ANY_CLASS,
    ),
}


def patch_token_contrast_by_loops(features: Tensor, mask: Tensor, ignore_index: int = 255) -> Tensor:
    positive, negative = [], []
    for x, cells in zip(features.flatten(2), mask.flatten(1).tolist(), strict=True):
        tokens = [p for p, k in enumerate(cells) if k >= 0 and k != ignore_index]
        for p, q in permutations(tokens, 2):
            cosine = x[:, p] @ x[:, q] / (x[:, p].norm() * x[:, q].norm())
            (positive if cells[p] == cells[q] else negative).append(cosine.abs())
    total = features.sum() * 0
    if positive:
        total = total + (1 - sum(positive) / (len(positive) + 1)) / 2
    return total + sum(negative) / (len(negative) + 1) / 2


def class_token_contrast_by_loops(tokens: Tensor, tags: Tensor, temperature: float = 1.0) -> Tensor:
    L, B, N, _ = tokens.shape
    total = tokens.sum() * 0
    for layer in tokens:
        for x, present in zip(layer, tags.tolist(), strict=True):
            classes = [n for n in range(N) if present[n] > 0]
            for n in classes:
                cosines = [x[n] @ x[m] / (x[n].norm() * x[m].norm()) / temperature for m in range(N)]
                loss = torch.log(sum(torch.exp(c) for c in cosines)) - cosines[n]
                total = total + loss / (len(classes) * L * B)
    return total


def token_affinity_loss_by_loops(affinity: Tensor, mask: Tensor, radius: int = 8, ignore_index: int = 255) -> Tensor:
    B, h, w = mask.shape
    positive, negative = [], []
    for b in range(B):
        for p in range(h * w):
            for q in range(h * w):
                (y, x), (v, u) = divmod(p, w), divmod(q, w)
                one, other = int(mask[b, y, x]), int(mask[b, v, u])
                if min(one, other) < 0 or ignore_index in (one, other) or max(abs(y - v), abs(x - u)) > radius:
                    continue
                if one == other:
                    positive.append(1 - affinity[b, p, q])
                else:
                    negative.append(affinity[b, p, q])
    zero = affinity.sum() * 0
    return (zero + sum(positive)) / (len(positive) + 1) / 2 + (zero + sum(negative)) / (len(negative) + 1) / 2


# What the public codes returned: ToCo, AFA, MCTformer+


def assert_is(loss: Callable[[Tensor], Tensor], x: Tensor, value: Tensor, gradient: Tensor) -> None:
    actual = loss(x.requires_grad_())
    found = torch.autograd.grad(actual, x)[0]
    torch.testing.assert_close((actual, found), (value, gradient), rtol=2e-6, atol=2e-6)


def test_patch_contrast_is_tocos():
    a = field("toco")
    assert_is(lambda x: patch_token_contrast(x, a["ptc_label"]), a["ptc_features"], a["ptc_loss"], a["ptc_grad"])


def test_affinity_loss_is_afas():
    a = field("afa")
    radius = a["radius"].item()
    assert_is(
        lambda x: token_affinity_loss(x, a["aff_label_map"], radius=radius),
        a["aff_pred"],
        a["aff_loss"],
        a["aff_grad"],
    )


def test_class_contrast_is_mctformers():
    a = field("mctformer")
    last = a["cct_num"].item()
    assert_is(lambda x: class_token_contrast(x[-last:], a["cct_tags"]), a["cct_tokens"], a["cct_loss"], a["cct_grad"])


# What holds for any tokens


@given(data=st.data(), batch=batches(side=5))
def test_names_of_classes_do_not_matter(data, batch):
    names = torch.tensor(data.draw(st.permutations(range(6))))
    renamed = names[batch.mask.clamp(0, 5)].where((batch.mask >= 0) & (batch.mask < 6), batch.mask)
    for loss in (lambda m: patch_token_contrast(batch.probs, m), lambda m: token_affinity_loss(affinity_of(batch), m)):
        torch.testing.assert_close(loss(renamed), loss(batch.mask))


@given(batch=batches(side=5), factor=st.floats(0.01, 100))
def test_lengths_and_signs_do_not_matter_to_patches(batch, factor):
    signs = torch.where(batch.probs[:, :1] > 0.3, factor, -factor)
    actual, expected = (patch_token_contrast(x, batch.mask) for x in (batch.probs * signs, batch.probs))
    torch.testing.assert_close(actual, expected)


@given(batch=batches(side=5))
def test_a_flip_does_not_matter_to_patches(batch):
    expected = patch_token_contrast(batch.probs, batch.mask)
    torch.testing.assert_close(patch_token_contrast(batch.probs.flip(-1), batch.mask.flip(-1)), expected)


@given(batch=batches(side=5))
def test_patch_contrast_lies_between_nothing_and_one(batch):
    assert 0 <= patch_token_contrast(batch.probs, batch.mask) <= 1
    assert 0 <= token_affinity_loss(affinity_of(batch), batch.mask) <= 1


@given(data=st.data(), batch=batches(side=5), temperature=st.sampled_from([0.07, 0.5, 1.0]))
def test_class_tokens_in_any_order_and_at_any_temperature(data, batch, temperature):
    order = torch.tensor(data.draw(st.permutations(range(batch.classes))))
    tokens = tokens_of(batch)
    loss = class_token_contrast(tokens, batch.tags, temperature=temperature)
    torch.testing.assert_close(loss, class_token_contrast_by_loops(tokens, batch.tags, temperature))
    permuted = class_token_contrast(tokens[:, :, order], batch.tags[:, order], temperature=temperature)
    torch.testing.assert_close(permuted, loss)
    assert loss >= 0


def test_class_contrast_of_all_classes_is_torchs_cross_entropy():
    x = functional.normalize(noise(1, 4, 5, 8)[0], dim=-1)
    expected = functional.cross_entropy((x @ x.mT / 0.5).flatten(0, 1), torch.arange(5).repeat(4))
    torch.testing.assert_close(class_token_contrast(x[None], torch.ones(4, 5), temperature=0.5), expected)


def test_pairs_of_two_images_do_not_meet():
    x = torch.tensor([[[1.0, 1.0]], [[0.0, 0.0]]]).expand(2, 2, 1, 2)  # alike everywhere
    mask = torch.tensor([[[0, 0]], [[1, 1]]])  # one class in either image
    torch.testing.assert_close(patch_token_contrast(x, mask), torch.tensor((1 - 4 / 5) / 2))


def test_orthogonal_classes_of_alike_tokens_cost_what_the_plus_one_costs():
    x = torch.eye(2)[:, [0, 0, 0, 1, 1]].view(1, 2, 1, 5)
    mask = torch.tensor([[[1, 1, 1, 0, 0]]])
    torch.testing.assert_close(patch_token_contrast(x, mask), torch.tensor((1 - 8 / 9) / 2))


def test_opposite_tokens_of_two_classes_cost_as_much_as_alike_ones():
    x = torch.tensor([1.0, -1.0]).view(1, 1, 1, 2)
    mask = torch.tensor([[[0, 1]]])
    assert patch_token_contrast(x, mask) == patch_token_contrast(x.abs(), mask) == 2 / 3 / 2


def test_a_zero_token_has_a_finite_gradient():
    x = noise(1, 3, 2, 3)
    x[:, :, 0, 1] = 0
    _, gradient = value_and_grads(lambda x: patch_token_contrast(x, torch.tensor([[[0, 0, 1], [1, 1, 0]]])), x)
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 10


def test_the_affinity_of_far_pairs_has_no_influence():
    mask = torch.zeros(1, 1, 5).long()
    loss, gradient = value_and_grads(lambda p: token_affinity_loss(p, mask, radius=1), torch.full((1, 5, 5), 0.5))
    assert loss.item() == pytest.approx(13 * 0.5 / 14 / 2)
    near = (torch.arange(5)[:, None] - torch.arange(5)).abs() <= 1
    assert torch.equal(gradient[0] != 0, near)


def test_gradcheck():
    mask = torch.tensor([[[0, 0, 255], [1, 2, 1]], [[3, -1, 0], [0, 0, 3]]])
    x = noise(2, 3, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: patch_token_contrast(x, mask), x)
    p = noise(2, 6, 6).sigmoid().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: token_affinity_loss(p, mask, radius=1), p)
    tokens = noise(2, 2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: class_token_contrast(x, torch.tensor([[1, 0, 1], [0, 0, 0]])), tokens)


# refusals


FEATURES, MASK, TAGS = torch.rand(2, 4, 2, 3), torch.zeros(2, 2, 3, dtype=torch.int64), torch.ones(2, 4)
AFFINITY, TOKENS = torch.rand(2, 6, 6), torch.rand(3, 2, 4, 5)
BAD_VOID = [("ignore_index", 255.0, TypeError), ("ignore_index", None, TypeError)]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("features", FEATURES[0], ValueError),
        ("features", FEATURES.long(), TypeError),
        ("mask", MASK[:1], ValueError),
        ("mask", MASK[..., :2], ValueError),
        ("mask", MASK.float(), TypeError),
        ("mask", MASK.to("meta"), ValueError),
        *BAD_VOID,
    ],
)
def test_patch_contrast_refuses(name, value, error):
    given_ = {"features": FEATURES, "mask": MASK, "ignore_index": 255}
    assert_refuses(patch_token_contrast, given_, name, value, error)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("tokens", TOKENS[0], ValueError),
        ("tokens", TOKENS.long(), TypeError),
        ("tokens", TOKENS[:0], ValueError),
        ("tags", TAGS[:, :3], ValueError),
        ("tags", TAGS[:1], ValueError),
        ("tags", TAGS.to("meta"), ValueError),
        ("temperature", 0, ValueError),
        ("temperature", "1", TypeError),
    ],
)
def test_class_contrast_refuses(name, value, error):
    assert_refuses(class_token_contrast, {"tokens": TOKENS, "tags": TAGS, "temperature": 1}, name, value, error)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("affinity", AFFINITY[0], ValueError),
        ("affinity", AFFINITY[:, :5], ValueError),
        ("affinity", AFFINITY[..., :5], ValueError),
        ("affinity", AFFINITY.long(), TypeError),
        ("mask", MASK[0], ValueError),
        ("mask", MASK.float(), TypeError),
        ("radius", 0, ValueError),
        ("radius", 1.5, TypeError),
        *BAD_VOID,
    ],
)
def test_affinity_loss_refuses(name, value, error):
    given_ = {"affinity": AFFINITY, "mask": MASK, "radius": 8, "ignore_index": 255}
    assert_refuses(token_affinity_loss, given_, name, value, error)


def test_a_second_derivative_of_patch_contrast_is_refused():
    x = FEATURES.clone().requires_grad_()
    (slope,) = torch.autograd.grad(patch_token_contrast(x, MASK) ** 2, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_affinities_of_pairs_that_do_not_count_may_be_anything():
    affinity, mask = torch.rand(1, 6, 6), torch.tensor([[[0, 1, 1], [2, 255, 0]]])
    wild = affinity.clone()
    wild[:, 4], wild[:, :, 4] = torch.nan, torch.inf
    torch.testing.assert_close(token_affinity_loss(wild, mask), token_affinity_loss(affinity, mask))


@pytest.mark.parametrize("images", [1, 2, 3, 5])
def test_images_at_a_time_change_nothing(monkeypatch, images):
    features, mask = noise(5, 4, 3, 4), (10 * noise(5, 3, 4, seed=1)).long().remainder(4) - 1
    affinity = noise(5, 12, 12, seed=2).sigmoid()
    whole = contrasts(features, affinity, mask)
    monkeypatch.setattr(_pieces, "_CPU", 144 * images + 100)
    torch.testing.assert_close(contrasts(features, affinity, mask), whole)


def contrasts(features: Tensor, affinity: Tensor, mask: Tensor) -> list[list[Tensor]]:
    return [
        value_and_grads(lambda x: patch_token_contrast(x, mask) ** 2, features),
        value_and_grads(lambda p: token_affinity_loss(p, mask, radius=1) ** 2, affinity),
    ]
