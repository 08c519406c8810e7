from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelss import DenseCRF, background_score, confident_mask, dense_crf, label_probs, pseudo_labels
from pixelss.refine import labels as module
from tests.blocks import Block

SIGNATURES = {
    "pseudo_labels": "(images, cam, tags, *, threshold=0.3, alpha=None, refine='label_crf', void=None, "
    "confidence=None, ignore_index=255)",
}

_WAITS = "an image's present classes are taken out and put back: how many there are decides a shape"
BLOCKS = {
    "pseudo_labels": Block(
        lambda b: pseudo_labels(b.images, b.cam, b.tags, refine=None),
        lambda b: pseudo_labels_by_loops(b.images, b.cam, b.tags, lambda images, scores: scores),
        but={"no wait": _WAITS, "finite": "raises on CAMs outside [0, 1]: nobody waits for labels"},
    ),
}

TESTS = Path(__file__).parents[1]


def make(
    seed: int = 0, *, B: int = 2, N: int = 3, H: int = 5, W: int = 6, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, CAMs with ties and saturated values, and tags, of which the last image has none."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (B, 3, H, W), generator=g, dtype=torch.uint8)
    cam = torch.randint(0, 11, (B, N, H, W), generator=g).to(dtype) / 10
    tags = (torch.rand(B, N, generator=g) < 0.7).long()
    tags[:1, :1] = 1
    tags[max(1, B - 1) :] = 0
    return images, cam, tags


def pseudo_labels_by_loops(
    images, cam, tags, refine, *, background=0.3, alpha=None, confidence=None, void=None, ignore_index=255
):
    """The definition, an image, a label set and a pixel at a time; `refine` takes (1, 3, H, W) and (1, 1 + P, H, W)."""
    B, N, H, W = cam.shape
    mask = torch.zeros(B, H, W, dtype=torch.int64)
    for b in range(B):
        present = [n for n in range(N) if tags[b, n] > 0]
        if not present:
            continue
        found = []  # of every label set: class and probability of each pixel
        for level in [background] if void is None else [void[1], void[0]]:
            scores = torch.zeros(1, 1 + len(present), H, W, dtype=cam.dtype)
            for i, j in product(range(H), range(W)):
                values = [cam[b, n, i, j] for n in present]
                scores[0, :, i, j] = torch.stack(
                    [torch.as_tensor(level).to(cam) if alpha is None else (1 - max(values)) ** alpha, *values]
                )
            probs = refine(images[b : b + 1], scores)[0]
            result = {}
            for i, j in product(range(H), range(W)):
                column = probs[:, i, j].tolist()
                best = column.index(max(column))  # the first of several
                result[i, j] = (0 if best == 0 else 1 + present[best - 1]), max(column)
            found.append(result)
        for pixel in product(range(H), range(W)):
            (label, sure), (low, sure_low) = found[0][pixel], found[-1][pixel]
            if void is not None and label == 0:
                label, sure = (0, sure_low) if low == 0 else (ignore_index, sure_low)
            mask[b][pixel] = ignore_index if confidence is not None and sure < confidence else label
    return mask


def label_crf(images, scores):
    K = scores.shape[1]
    seeds = torch.zeros(1, *scores.shape[2:], dtype=torch.int64)
    for i, j in product(*map(range, scores.shape[2:])):
        column = scores[0, :, i, j].tolist()
        seeds[0, i, j] = column.index(max(column))
    probs = label_probs(seeds, K - 1, gt_prob=0.7)
    return dense_crf(images, probs, iterations=10, gaussian=(3.0, 3.0), bilateral=(50.0, 5.0, 10.0))


def softened(images, scores):
    """A refiner for the tests: depends on the image and on all scores, and is unlike any of ours."""
    return (scores * 3 + images[:, :1].to(scores) / 255).softmax(1)


REFINERS = {"label_crf": label_crf, "crf": dense_crf, None: lambda images, scores: scores}
SETTINGS = [{}, {"threshold": 0.5}, {"alpha": 2.0}, {"void": (0.2, 0.6)}]
seeds = st.integers(0, 10_000)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("refine", REFINERS, ids=str)
def test_equals_the_loop(refine, settings):
    inputs = make()
    slow = {"background" if name == "threshold" else name: value for name, value in settings.items()}
    expected = pseudo_labels_by_loops(*inputs, REFINERS[refine], **slow)
    actual = pseudo_labels(*inputs, refine=refine, **settings)
    assert actual.dtype == torch.int64
    assert torch.equal(actual, expected)


@given(
    seeds, st.sampled_from(SETTINGS), st.none() | st.floats(0.2, 0.9), st.integers(1, 4), st.sampled_from([255, -1, 9])
)
def test_equals_the_loop_with_a_refiner_and_confidence(seed, settings, confidence, N, ignore_index):
    inputs = make(seed, N=N, H=3, W=4)
    slow = {"background" if name == "threshold" else name: value for name, value in settings.items()}
    common = {"confidence": confidence, "ignore_index": ignore_index}
    expected = pseudo_labels_by_loops(*inputs, softened, **slow, **common)
    assert torch.equal(pseudo_labels(*inputs, refine=softened, **settings, **common), expected)


@given(seeds)
def test_void_is_confident_mask_of_two_calls(seed):
    inputs = make(seed)
    high, low = (pseudo_labels(*inputs, threshold=t, refine=None) for t in (0.6, 0.2))
    mask = pseudo_labels(*inputs, void=(0.2, 0.6), refine=None)
    assert torch.equal(mask, confident_mask(high, low))
    assert torch.equal(pseudo_labels(*inputs, void=(0.4, 0.4), refine=None) == 255, torch.zeros_like(mask).bool())


@given(seeds, st.permutations(range(4)))
def test_the_order_of_classes_does_not_matter(seed, order):
    images, cam, tags = make(seed, N=4)
    cam = cam + torch.arange(4)[:, None, None] / 100  # without ties
    cam = cam / cam.amax()
    mask = pseudo_labels(images, cam, tags, refine=softened)
    permuted = pseudo_labels(images, cam[:, order], tags[:, order], refine=softened)
    assert torch.equal(torch.tensor([0, *(1 + n for n in order)])[permuted], mask)


@given(seeds)
def test_images_do_not_meet(seed):
    inputs = make(seed, B=3)
    alone = [pseudo_labels(*(x[b : b + 1] for x in inputs), refine=softened) for b in range(3)]
    assert torch.equal(pseudo_labels(*inputs, refine=softened), torch.cat(alone))


def test_present_classes_alone_are_labels():
    images, cam, tags = make(B=1)
    cam[:] = 0.9
    tags[:] = torch.tensor([0, 1, 0])
    assert pseudo_labels(images, cam, tags).unique().tolist() == [2]
    cam[:, 0] = float("nan")  # of an absent class: not read
    assert pseudo_labels(images, cam, tags).unique().tolist() == [2]


def test_ties_go_to_the_background_then_to_the_lowest_class():
    images, cam, tags = make(B=1)
    cam[:] = 0.3
    tags[:] = 1
    assert not pseudo_labels(images, cam, tags, refine=None).any()
    assert pseudo_labels(images, cam, tags, refine=None, threshold=0.2).unique().tolist() == [1]


@pytest.mark.parametrize("settings", [{}, {"void": (0.1, 0.3)}, {"confidence": 1.0}], ids=str)
def test_no_tags_is_background(settings):
    images, cam, tags = make(B=3)
    assert not pseudo_labels(images, cam, tags * 0, **settings).any()


def test_empty_batch():
    assert pseudo_labels(*make(B=0)).shape == (0, 5, 6)


@pytest.mark.parametrize("confidence", [0.55, 0.6, 0.7])
def test_confidence_is_that_of_the_label_set_that_decides(confidence):
    inputs = make(1, B=1, N=1)  # one class: many pixels that both label sets call background
    expected = pseudo_labels_by_loops(*inputs, softened, void=(0.2, 0.6), confidence=confidence)
    assert torch.equal(pseudo_labels(*inputs, refine=softened, void=(0.2, 0.6), confidence=confidence), expected)


@pytest.mark.parametrize(("refine", "expected"), [("label_crf", {"bilateral": (50.0, 5.0, 10.0)}), ("crf", {})])
def test_both_label_sets_share_one_lattice(refine, expected, monkeypatch):
    seen = []

    def crf(images, probs, **settings):
        seen.append((images.shape[0], images.stride(0), settings))
        trusted = probs.amax(1).unique()
        assert refine == "crf" or torch.allclose(trusted, torch.tensor(0.7).to(trusted))
        return dense_crf(images, probs, **settings)

    monkeypatch.setattr(module, "dense_crf", crf)
    pseudo_labels(*make(), void=(0.2, 0.6), refine=refine)
    assert seen == [(2, 0, expected)]  # one image with tags, twice without a copy


def test_a_module_is_a_refiner_and_gives_no_gradient():
    images, cam, tags = make()
    mask = pseudo_labels(images, cam, tags, refine=DenseCRF())
    assert torch.equal(mask, pseudo_labels(images, cam, tags, refine="crf"))
    weight = torch.ones(1, dtype=cam.dtype, requires_grad=True)
    grads = []
    pseudo_labels(images, cam, tags, refine=lambda _, scores: grads.append((scores * weight).requires_grad) or scores)
    assert grads == [False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    images, cam, tags = make(dtype=dtype)
    for refine in ("label_crf", None):
        expected = pseudo_labels(images, cam.float(), tags, refine=refine)
        for form in (tags.bool(), tags.byte(), tags.half(), 3 * tags - 1):
            assert torch.equal(pseudo_labels(images, cam, form, refine=refine), expected)


def test_inputs_are_left_as_they_are():
    inputs = make()
    pseudo_labels(*inputs, void=(0.2, 0.6))
    assert all(map(torch.equal, inputs, make()))


def test_many_classes():
    images, cam, tags = make(B=1, N=300)
    cam[:], tags[:] = 0, 0
    cam[:, 254], tags[:, 254] = 1, 1
    with pytest.raises(
        ValueError, match=r"ignore_index must be no class \(0 to 300\), but is 255. Pass ignore_index=-1"
    ):
        pseudo_labels(images, cam, tags)
    assert pseudo_labels(images, cam, tags, ignore_index=-1).unique().tolist() == [255]
    with pytest.raises(ValueError, match="ignore_index must be no class"):
        pseudo_labels(*make(), ignore_index=0)


@pytest.mark.parametrize(
    ("change", "settings", "error", "message"),
    [
        (lambda i, c, t: (i.permute(0, 2, 3, 1), c, t), {}, ValueError, r"Pass images\.permute\(0, 3, 1, 2\)\.$"),
        (lambda i, c, t: (i.permute(1, 2, 3, 0)[..., 0], c, t), {}, ValueError, r"Pass images\[None\]\.$"),
        (lambda i, c, t: (i.float(), c, t), {}, TypeError, "images must be of dtype torch.uint8"),
        (lambda i, c, t: (i, c[..., :3], t), {}, ValueError, r"W is 3\. CAMs lie at the images' size: msinf_cam"),
        (lambda i, c, t: (i, 3 * c, t), {}, ValueError, r"cam must lie in \[0, 1\], .* Raw CAMs\? Call msinf_cam"),
        (lambda i, c, t: (i, c * float("nan"), t), {}, ValueError, r"cam must lie in \[0, 1\], but holds nan"),
        (
            lambda i, c, t: (i, c, t * 0.97),
            {},
            ValueError,
            r"tags must be multi-hot, but hold 0\.97\. Probab.*tags > 0",
        ),
        (lambda i, c, t: (i, c, t[:, :2]), {}, ValueError, r"tags must have shape \(B=2, N=3\).*background column"),
        (None, {"refine": "CRF"}, ValueError, "refine must be one of 'label_crf', 'crf', None, but is 'CRF'"),
        (None, {"refine": lambda _, s: s[:, 1:]}, ValueError, "the result of refine must have shape"),
        (None, {"refine": lambda _, s: s / 0}, ValueError, "the result of refine must be finite"),
        (None, {"threshold": 1.5}, ValueError, "threshold must be between 0 and 1"),
        (None, {"alpha": -1}, ValueError, "alpha must be between 0"),
        (None, {"void": 0.3}, ValueError, r"void must be None or \(low, high\), but is 0.3"),
        (None, {"void": (0.3, 0.1)}, ValueError, "low <= high.*Swap them"),
        (None, {"void": (0.3, 2)}, ValueError, "void high must be between 0 and 1"),
        (None, {"void": (0.1, 0.3), "alpha": 4}, ValueError, "void must be None where alpha is given"),
        (None, {"confidence": 2}, ValueError, "confidence must be between 0 and 1"),
        (None, {"confidence": 0.5, "refine": None}, ValueError, "confidence must be None where refine is None"),
    ],
)
def test_errors(change, settings, error, message):
    inputs = make()
    with pytest.raises(error, match=message):
        pseudo_labels(*(change(*inputs) if change else inputs), **settings)


def test_rounding_beyond_one_is_no_raw_cam():
    images, cam, tags = make()
    assert torch.equal(pseudo_labels(images, cam * 1.005, tags), pseudo_labels(images, cam, tags))


# the recipe for scripts that used pydensecrf


def test_crf_inference_of_the_recipe_equals_the_c_code():
    sys.path.insert(0, str(TESTS.parent / "examples" / "recipes"))
    from crf_inference import crf_inference, crf_inference_label

    with np.load(TESTS / "golden" / "crf.npz") as data:
        image, probs, expected = (data[name] for name in ("img", "p", "q_b80_13_10_t10"))
        seeds, unary = data["lab"], data["unary_from_labels_gt0.7"]
    image.setflags(write=False)  # as np.asarray(PIL image) is
    assert np.abs(crf_inference(image, probs) - expected).max() < 1e-4
    labels = crf_inference_label(image, seeds, n_labels=len(unary))
    assert labels.shape == image.shape[:2]
    levels = torch.tensor(image).permute(2, 0, 1)[None]
    ours = dense_crf(levels, torch.from_numpy(np.exp(-unary))[None], bilateral=(50.0, 5.0, 10.0)).argmax(1)
    assert (labels == ours[0].numpy()).all()
    assert (labels != seeds).any()
    swapped = crf_inference(np.ascontiguousarray(image[..., ::-1])[..., ::-1], probs)
    assert np.abs(swapped - expected).max() < 1e-4


def test_background_score_of_raw_cams_is_what_the_docstring_says():
    raw = torch.tensor([7.0, 1.0, 0.5, -3.0]).view(4, 1, 1, 1)
    assert background_score(raw, alpha=2).flatten().tolist() == [0, 0, 0.25, 1]
