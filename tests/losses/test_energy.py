from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pixelss import PermutohedralLattice, dense_energy_loss, energy_lattices
from tests.blocks import Block
from tests.oracles import assert_refuses, bilinear, field
from tests.strategies import Batch, batches, make_batch, noise

SIGNATURES = {
    "energy_lattices": "(images, *, bilateral=(100.0, 15.0), scale=0.5)",
    "dense_energy_loss": "(images, logits, *, mask=None, region=None, bilateral=(100.0, 15.0), scale=0.5, "
    "lattices=None, published_gradient=False, ignore_index=255)",
}

NARROW = (4.0, 60.0)  # at which pixels of a few cells and of noise still differ
COUNTS = {
    "no wait": "the lattice counts cells: their number decides a shape",
    "checks": "its entry makes the arguments of other tensors",
}


def arguments(b: Batch, *, known: bool) -> dict:
    """The batch's images in its dtype; where classes are known, a region that leaves out images without a tag."""
    region = (b.tags > 0).any(1)[:, None, None] & (b.images[:, 0] > 60)
    return {
        "images": b.images.to(b.probs.dtype),
        "logits": b.probs,
        "mask": b.mask if known else None,
        "region": region,
        "bilateral": NARROW,
    }


BLOCKS = {
    "energy_lattices": "gives lattices, of which `PermutohedralLattice` has the promises",
    "dense_energy_loss": Block(
        lambda b: dense_energy_loss(**arguments(b, known=True)),
        lambda b: dense_energy_loss_by_loops(**arguments(b, known=True)),
        but=COUNTS | {"gradient": "the gate carries none"},
    ),
    "dense_energy_loss unknown": Block(
        lambda b: dense_energy_loss(**arguments(b, known=False)),
        lambda b: dense_energy_loss_by_loops(**arguments(b, known=False)),
        but=COUNTS,
        compiled_by="dense_energy_loss",
    ),
}


def dense_energy_loss_by_loops(
    images: Tensor,
    logits: Tensor,
    mask: Tensor | None,
    region: Tensor,
    bilateral: tuple[float, float] = (100.0, 15.0),
    scale: float = 0.5,
) -> Tensor:
    """- 1/B sum_b sum_k sum_pq q_pk g_p F_pq q_qk, F the lattice's matrix, which test_lattice checks."""
    B, _, H, W = images.shape
    K = logits.shape[1]
    h, w = (max(1, int(side * scale)) for side in (H, W))
    pixels = [[min(int(i / scale), side - 1) for i in range(cells)] for cells, side in ((h, H), (w, W))]
    cells = [(y, x, pixels[0][y], pixels[1][x]) for y, x in product(range(h), range(w))]  # and the pixel of each
    p = logits.softmax(1)
    p = p[..., : round(h / scale), : round(w / scale)] if p.shape[2:] == (H, W) else p
    p = bilinear(p, (h, w))
    total = logits.sum() * 0
    for b in range(B):
        sxy, srgb = bilateral[0] * scale, bilateral[1]
        points = [[x / sxy, y / sxy, *(images[b, :, i, j].double() / srgb).tolist()] for y, x, i, j in cells]
        F = PermutohedralLattice(torch.tensor(points, dtype=torch.float64)).filter(torch.eye(len(cells)).double())
        inside = [float(region[b, i, j]) for _, _, i, j in cells]
        q = [p[b, :, y, x] * r for (y, x, _, _), r in zip(cells, inside, strict=True)]
        for u, (y, x, i, j) in enumerate(cells):
            known = mask is not None and 0 <= mask[b, i, j] < K and mask[b, i, j] != 255
            gate = (inside[u] - p[b, :, y, x].detach().amax()).clamp(min=0) if known else 1
            total = total - gate * (q[u] @ sum(F[u, v] * q[v] for v in range(len(cells)))) / B
    return total


# What RRM's own code returned


def rrm() -> dict:
    a = field("rrm")
    return {
        "images": a["energy_image"],
        "logits": a["energy_logits"].requires_grad_(),
        "mask": a["energy_label"][:, 0].long(),
        "region": a["energy_roi"],
    }


def test_energy_and_published_gradient_are_rrms():
    a, given_ = field("rrm"), rrm()
    loss = 1e-7 * dense_energy_loss(**given_, published_gradient=True)
    torch.testing.assert_close(loss, a["energy_loss"][0], rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss, given_["logits"])
    expected = a["energy_grad_logits"]
    torch.testing.assert_close(1e6 * gradient, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_the_published_gradient_is_not_that_of_the_loss():
    given_ = rrm()
    ours, theirs = (
        torch.autograd.grad(dense_energy_loss(**given_, published_gradient=flag), given_["logits"])[0]
        for flag in (False, True)
    )
    assert (ours - theirs).norm() > 0.01 * ours.norm()


def test_lattices_filter_as_rrms():
    a = field("rrm")
    bilateral = a["filter_sigma_xy"].item(), a["filter_sigma_rgb"].item()
    lattices = energy_lattices(a["filter_image"], bilateral=bilateral, scale=1)
    for lattice, values, expected in zip(lattices, a["filter_in"], a["filter_out"], strict=True):
        actual = lattice.filter(values.flatten(1).mT).mT.view_as(expected)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# Gradients


def small(seed: int = 0) -> tuple[Tensor, Tensor]:
    batch = make_batch(seed, images=2, classes=2, image_size=(6, 5))
    return batch.images.double(), noise(2, 3, 4, 4, seed=seed).requires_grad_()


def test_gradcheck():
    images, logits = small()
    lattices = energy_lattices(images, bilateral=NARROW, scale=1)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: dense_energy_loss(images, x, scale=1, lattices=lattices), logits, fast_mode=True)


def test_gradcheck_with_the_gate_held():
    """The gate is a constant: finite differences of the loss where it is what it was at the given logits."""
    images, logits = small()
    lattices = energy_lattices(images, bilateral=NARROW)
    mask = torch.randint(0, 3, (2, 6, 5), generator=torch.Generator().manual_seed(0))
    region = torch.ones(2, 6, 5)
    region[:, :, 2:] = 0
    (actual,) = torch.autograd.grad(
        dense_energy_loss(images, logits, mask=mask, region=region, lattices=lattices), logits
    )
    inside = region[:, ::2, :4:2].double()  # of 5 columns the last has no cell
    gate = (inside - bilinear(logits.detach()[..., :4].softmax(1), (3, 2)).amax(1)).relu().flatten(1)[:, :, None]

    def held(x: Tensor) -> Tensor:
        q = (bilinear(x[..., :4].softmax(1), (3, 2)) * inside[:, None]).flatten(2).mT
        energies = [(one * g * lattice.filter(one)).sum() for one, g, lattice in zip(q, gate, lattices, strict=True)]
        return -sum(energies) / 2

    torch.testing.assert_close(actual, torch.autograd.grad(held(logits), logits)[0])


@given(seed=st.integers(0, 10_000))
def test_the_transposed_filter_is_the_transpose(seed):
    batch = make_batch(seed, images=1)
    (lattice,) = energy_lattices(batch.images.double(), bilateral=NARROW, scale=1)
    one, two = noise(63, 2, seed=seed), noise(63, 2, seed=seed + 1)
    forward = (one * lattice.filter(two.requires_grad_())).sum()
    (transposed,) = torch.autograd.grad(forward, two)
    torch.testing.assert_close((transposed * two).sum(), forward)


# What holds for any images


@given(batch=batches(side=6), known=st.booleans())
@settings(max_examples=10)
def test_given_lattices_change_nothing(batch, known):
    given_ = arguments(batch, known=known)
    lattices = energy_lattices(given_["images"], bilateral=NARROW)
    assert torch.equal(dense_energy_loss(**given_, lattices=lattices), dense_energy_loss(**given_))


@given(data=st.data(), batch=batches(side=6))
@settings(max_examples=10)
def test_the_order_of_the_classes_does_not_matter(data, batch):
    given_ = arguments(batch, known=True)
    order = torch.tensor(data.draw(st.permutations(range(batch.classes + 1))))
    loss = dense_energy_loss(**given_ | {"logits": given_["logits"][:, order]})
    torch.testing.assert_close(loss, dense_energy_loss(**given_))


@given(batch=batches(side=6))
@settings(max_examples=10)
def test_knowing_classes_and_leaving_out_pixels_only_lowers_the_energy(batch):
    given_ = arguments(batch, known=False)
    free, known = dense_energy_loss(**given_), dense_energy_loss(**given_ | {"mask": batch.mask})
    everywhere = dense_energy_loss(**given_ | {"region": None})
    assert everywhere - 1e-9 <= free <= known + 1e-9 <= 1e-9


def test_classes_that_follow_the_colours_have_less_energy():
    images = torch.zeros(1, 3, 16, 16)
    images[..., 8:] = 255
    halves = torch.where(images[:, :1] > 0, 9.0, -9.0)
    along, across = torch.cat([halves, -halves], 1), torch.cat([halves, -halves], 1).mT
    assert dense_energy_loss(images, along) < 0.7 * dense_energy_loss(images, across)


def test_a_sure_pixel_of_known_class_counts_nothing_and_a_void_one_fully():
    images = make_batch(images=1, image_size=(8, 8)).images
    logits = torch.tensor([50.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 8, 8)
    free = dense_energy_loss(images, logits)
    assert dense_energy_loss(images, logits, mask=torch.zeros(1, 8, 8).long()) == 0
    for void in (255, -1, 2):
        torch.testing.assert_close(dense_energy_loss(images, logits, mask=torch.full((1, 8, 8), void)), free)
    torch.testing.assert_close(dense_energy_loss(images, logits, mask=torch.ones(1, 8, 8).long(), ignore_index=1), free)


def test_levels_of_uint8_and_of_floats_are_the_same():
    batch = make_batch(dtype=torch.float32)
    levels, floats = (dense_energy_loss(images, batch.probs) for images in (batch.images, batch.images.float()))
    assert torch.equal(levels, floats)


def test_the_loss_is_the_mean_over_the_images():
    images, logits = small()
    one = [dense_energy_loss(images[b : b + 1], logits[b : b + 1]) for b in range(2)]
    torch.testing.assert_close(sum(one) / 2, dense_energy_loss(images, logits))


def test_an_empty_region_gives_zero_on_the_graph():
    images, logits = small()
    loss = dense_energy_loss(images, logits, region=torch.zeros(2, 6, 5))
    assert loss == 0
    loss.backward()
    assert not logits.grad.any()


# refusals


IMAGES, LOGITS = torch.zeros(2, 3, 6, 5, dtype=torch.uint8), torch.rand(2, 3, 6, 5)
MASK = torch.zeros(2, 6, 5, dtype=torch.int64)
BAD_SETTINGS = [
    ("images", IMAGES[0], ValueError),
    ("images", IMAGES[:, :2], ValueError),
    ("images", None, TypeError),
    ("bilateral", (0, 15.0), ValueError),
    ("bilateral", 100.0, ValueError),
    ("bilateral", (100.0,), ValueError),
    ("bilateral", None, ValueError),
    ("bilateral", (100.0, 0), ValueError),
    ("bilateral", ("100", 15.0), TypeError),
    ("scale", 0, ValueError),
    ("scale", "0.5", TypeError),
]


@pytest.mark.parametrize(("name", "value", "error"), BAD_SETTINGS)
def test_lattices_refuse(name, value, error):
    given_ = {"images": IMAGES, "bilateral": (100.0, 15.0), "scale": 0.5}
    assert_refuses(energy_lattices, given_, name, value, error)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        *BAD_SETTINGS,
        ("logits", LOGITS[0], ValueError),
        ("logits", LOGITS[:1], ValueError),
        ("logits", LOGITS.long(), TypeError),
        ("logits", LOGITS.to("meta"), ValueError),
        ("mask", MASK[:1], ValueError),
        ("mask", MASK[..., :4], ValueError),
        ("mask", MASK.float(), TypeError),
        ("region", MASK[:, None], ValueError),
        ("region", MASK.to("meta"), ValueError),
        ("lattices", energy_lattices(IMAGES[:1]), ValueError),
        ("lattices", energy_lattices(IMAGES, scale=1), ValueError),
        ("lattices", (lattice for lattice in energy_lattices(IMAGES)), TypeError),
        ("lattices", [None, None], TypeError),
        ("published_gradient", "no", ValueError),
        ("ignore_index", 255.0, TypeError),
    ],
)
def test_energy_refuses(name, value, error):
    given_ = {"images": IMAGES, "logits": LOGITS, "mask": MASK, "region": MASK, "scale": 0.5, "ignore_index": 255}
    assert_refuses(dense_energy_loss, given_, name, value, error)
    if name in ("bilateral", "scale"):  # where they build nothing too
        assert_refuses(dense_energy_loss, given_ | {"lattices": energy_lattices(IMAGES)}, name, value, error)
