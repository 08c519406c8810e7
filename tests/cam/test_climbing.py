from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from pixelss import CAMHead, CAMOutput, EMATeacher, classifier_cam, climb_cam
from tests.blocks import Block
from tests.oracles import active, assert_refuses, field
from tests.strategies import Batch, batches

SIGNATURES = {"climb_cam": "(model, images, tags, *, iterations=27, step=0.08, strength=7.0, region=0.5)"}


def network(num_classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), CAMHead(6, num_classes, dim=5)).eval()


def images_of(b: Batch) -> Tensor:
    return b.images.to(b.features.dtype) / 128 - 1


BLOCKS = {
    "climb_cam": Block(
        lambda b, net: climb_cam(net, images_of(b), b.tags, iterations=4),
        lambda b, net: climb_cam_by_loops(net, images_of(b), b.tags, iterations=4),
        make=lambda b: network(b.classes),
        but={
            "half": "the network is rounded, not the block",
            "no wait": "the classes that are present decide how often the network runs",
        },
    )
}


def climb_cam_by_loops(model, images, tags, iterations=27, step=0.08, strength=7.0, region=0.5):
    """A class and an image at a time: both of the pair in one batch."""
    total = torch.zeros_like(model(images).cam).detach()
    for b, n in product(*map(range, tags.shape)):
        if tags[b, n] <= 0:
            continue
        pair, first = torch.stack([images[b], images[b].flip(-1)]).detach(), None
        for _ in range(iterations):
            pair.requires_grad_()
            features, cam, _ = model(pair)
            g = torch.autograd.grad(active(cam[:, n]).relu().sum(), features, retain_graph=True)[0]
            positive = max(1, sum(float(x) > 0 for x in g.flatten()))
            maps = []
            for i in range(2):
                weights = [g[i, d].sum() / positive for d in range(g.shape[1])]
                maps.append(sum(w * x for w, x in zip(weights, features[i], strict=True)).relu())
            grad_cam = maps[0] + maps[1].flip(-1)
            total[b, n] += grad_cam.detach()
            first = grad_cam.detach() if first is None else first
            y = [[active(one).relu().mean() for one in cam[i]] for i in range(2)]
            goal = sum(2 * y[i][n] - sum(y[i]) for i in range(2))
            for cell in product(*map(range, grad_cam.shape)):
                if grad_cam[cell] > region * grad_cam.max():
                    goal = goal - strength * (grad_cam[cell] - first[cell]).abs()
            gradient = torch.autograd.grad(goal, pair)[0]
            pair = pair.detach()
            if gradient.any():
                moved = pair + step * gradient / gradient.abs().max()
                pair = moved.clamp(pair.min().item(), pair.max().item())
    return total


# What AdvCAM's own code returned


def golden_model(a: dict[str, Tensor], seen: list[Tensor]):
    def model(images: Tensor) -> CAMOutput:
        seen.append(images.detach().clone())
        hidden = functional.conv2d(images, a["conv1_w"], a["conv1_b"], stride=2, padding=1).relu()
        features = functional.conv2d(hidden, a["stage4_w"], a["stage4_b"], padding=1).relu()
        cam = functional.conv2d(features, a["classifier_w"])
        return CAMOutput(features, cam, cam.mean((2, 3)))

    return model


def climb_golden(a: dict[str, Tensor], iterations: int) -> tuple[Tensor, list[Tensor]]:
    seen: list[Tensor] = []
    settings = {"step": "step", "strength": "coeff", "region": "mask_threshold"}
    settings = {name: float(a[key]) for name, key in settings.items()}
    out = climb_cam(golden_model(a, seen), a["image_pair"][:1], a["tags"], iterations=iterations, **settings)
    return out, seen[1:]  # the first is for the size


def test_the_sum_and_every_step_are_advcams():
    a = field("advcam")
    total = int(a["iterations"])
    for iterations in range(1, total + 1):
        out, seen = climb_golden(a, iterations)
        expected = a["regions"][:, :iterations, 0].sum(1)
        torch.testing.assert_close(out[0, a["present"]], expected, rtol=2e-6, atol=2e-6)
        assert not out[a["tags"] == 0].any()
    torch.testing.assert_close(out[0, a["present"]], a["cam_sum"], rtol=2e-6, atol=2e-6)
    for one in range(len(a["present"])):
        own = seen[one * total : (one + 1) * total]
        assert torch.equal(own[0], a["image_pair"])  # each class from the clean image
        for pair, climbed in zip(own[1:], a["climbed"][one], strict=False):
            torch.testing.assert_close(pair, climbed, rtol=2e-6, atol=2e-6)


# What holds for any network


def ready(seed: int = 0, *, images: int = 2, classes: int = 3) -> tuple[nn.Module, Tensor, Tensor]:
    """A network that is awake, noise and all tags."""
    torch.manual_seed(seed)
    net = network(classes).double()
    with torch.no_grad():
        net[2].classify.weight.mul_(50)
    return net, torch.rand(images, 3, 9, 10, dtype=torch.float64) - 0.5, torch.ones(images, classes)


@given(
    batch=batches(side=6), seed=st.integers(0, 9), settings=st.sampled_from([(3, 0.5, 0.0, 0.2), (3, 0.1, 70.0, 0.9)])
)
def test_any_settings_equal_the_loops(batch, seed, settings):
    torch.manual_seed(seed)
    net = network(batch.classes).double()
    names = dict(zip(("iterations", "step", "strength", "region"), settings, strict=True))
    actual = climb_cam(net, images_of(batch), batch.tags, **names)
    torch.testing.assert_close(actual, climb_cam_by_loops(net, images_of(batch), batch.tags, **names))


@given(batch=batches(side=6, images=3))
def test_images_and_classes_do_not_meet(batch):
    torch.manual_seed(0)
    net = network(batch.classes).double()
    images, whole = images_of(batch), climb_cam(net, images_of(batch), batch.tags, iterations=3)
    for b, n in (batch.tags > 0).nonzero().tolist():
        alone = torch.zeros_like(batch.tags[:1])
        alone[0, n] = 1
        one = climb_cam(net, images[b : b + 1], alone, iterations=3)
        torch.testing.assert_close(one[0, n], whole[b, n])
    assert not whole[batch.tags <= 0].any()


def test_a_mirrored_image_gives_the_mirrored_map():
    net, images, tags = ready()
    images = images[..., :9]  # a stride that mirrors onto itself
    mirrored = climb_cam(net, images.flip(-1), tags, iterations=4)
    torch.testing.assert_close(mirrored, climb_cam(net, images, tags, iterations=4).flip(-1))


def test_one_iteration_is_the_grad_cam_of_the_clean_image():
    net, images, tags = ready()
    found = climb_cam(net, images, tags, iterations=1)
    assert found.any()
    assert torch.equal(climb_cam(net, images, tags, iterations=3, step=0.0), 3 * found)
    weights = net[2].classify.weight[:, :, 0, 0]
    for b, n in product(range(2), range(3)):
        maps = []
        for one in (images[b], images[b].flip(-1)):
            features, cam, _ = net(one[None])
            alive = (cam[0, n] > 0).sum()  # of a linear head, g is w_n wherever A_n > 0
            maps.append(torch.einsum("d,dhw->hw", alive * weights[n], features[0]).relu())
        expected = (maps[0] + maps[1].flip(-1)).detach()
        torch.testing.assert_close(found[b, n] / found[b, n].max(), expected / expected.max())


def spy(net: nn.Module, seen: list[Tensor], goals: list[Tensor]):
    def model(images: Tensor) -> CAMOutput:
        output = net(images)
        seen.append(images.detach().clone())
        goals.append(output.cam.detach().relu().mean((2, 3)))
        return output

    return model


def test_the_class_climbs_and_the_image_stays_in_its_range():
    net, images, tags = ready(images=1)
    seen, goals = [], []
    climb_cam(spy(net, seen, goals), images, tags * torch.tensor([0, 1, 0]), iterations=8, step=0.02, strength=0.0)
    scores = torch.stack([(2 * y[:, 1] - y.sum(1)).sum() for y in goals[1:]])
    assert (scores.diff() > 0).all()
    assert len(seen) == 9
    for before, after in pairwise(seen[1:]):
        assert 0 < (after - before).abs().max() <= 0.02 + 1e-9
        assert before.min() <= after.min() <= after.max() <= before.max()


def test_strength_holds_what_was_seen_first():
    net, images, tags = ready(images=1)
    first = climb_cam(net, images, tags, iterations=1)
    grown = [climb_cam(net, images, tags, iterations=9, strength=s, region=0.0) - 9 * first for s in (0.0, 1000.0)]
    free, held = (x.abs().sum() for x in grown)
    assert held < 0.5 * free


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_nothing_but_the_result_is_left(mode):
    net, images, tags = ready()
    net.append(nn.Identity())
    expected = climb_cam(net, images, tags, iterations=3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net[0].weight.requires_grad_(False)
    net[2].classify.weight.grad = torch.full_like(net[2].classify.weight, 3)
    with mode():
        images = images.clone()  # in inference mode, a tensor that autograd refuses
        found = climb_cam(net, images, tags, iterations=3)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert not images.requires_grad
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True]
    assert [p.grad is None for p in net.parameters()] == [True, True, True, False]
    assert (net[2].classify.weight.grad == 3).all()
    assert not net.training
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_images_that_ask_for_a_gradient_get_none():
    net, images, tags = ready()
    images.requires_grad_()
    assert not climb_cam(net, images, tags, iterations=2).requires_grad
    assert images.grad is None


def test_a_frozen_network_climbs_all_the_same():
    net, images, tags = ready()
    expected = climb_cam(net, images, tags, iterations=3)
    assert torch.equal(climb_cam(net.requires_grad_(False), images, tags, iterations=3), expected)


def test_a_trained_classifier_climbs():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU())
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.stem(x).mean((2, 3)))

    torch.manual_seed(0)
    net = classifier_cam(Plain().eval(), features="stem", classifier="fc")
    images, tags = torch.rand(2, 3, 16, 20), torch.ones(2, 3)
    found = climb_cam(net, images, tags, iterations=3)
    assert found.any()
    torch.testing.assert_close(found, climb_cam_by_loops(net, images, tags, iterations=3))


def test_under_autocast_the_network_is_rounded_alone():
    net, images, tags = ready()
    net, images = net.float(), images.float()
    expected = climb_cam(net, images, tags, iterations=3)
    with torch.autocast("cpu", torch.bfloat16):
        found = climb_cam(net, images, tags, iterations=3)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().mean() < 0.05 * expected.mean()


def test_a_cam_that_is_not_finite_is_no_activation():
    net, images, tags = ready()

    def with_(value: float):
        def model(x: Tensor) -> CAMOutput:
            features, cam, logits = net(x)
            hole = torch.zeros_like(cam, dtype=torch.bool)
            hole[:, 0, 1, 1] = hole[:, 1] = True
            filled = cam.masked_fill(hole, value)
            if value:  # an overflow lets gradients through
                filled = torch.where(hole, cam + (filled - cam).detach(), cam)
            return CAMOutput(features, filled, logits)

        return climb_cam(model, images, tags, iterations=3)

    for value in (torch.nan, torch.inf, -torch.inf):
        assert torch.equal(with_(value), with_(0.0))
    assert not with_(0.0)[:, 1].any()


def test_no_tag_and_no_image():
    net, images, tags = ready()
    assert climb_cam(net, images, 0 * tags).shape == (2, 3, 5, 5)
    assert not climb_cam(net, images, 0 * tags).any()
    assert climb_cam(net, images[:0], tags[:0]).shape == (0, 3, 5, 5)


# refusals


@pytest.mark.parametrize("kind", ["teacher", "detached", "foreign"])
def test_a_cam_off_its_features_is_refused(kind):
    net, images, tags = ready()

    def cut(x: Tensor) -> CAMOutput:
        output = net(x)
        features = output.features.detach() if kind == "detached" else 1 * output.features
        return output._replace(features=features)

    with pytest.raises(ValueError, match=r"model must compute its CAM from the features"):
        climb_cam(EMATeacher(net) if kind == "teacher" else cut, images, tags)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("images", torch.rand(3, 9, 10), ValueError),
        ("images", torch.zeros(2, 3, 9, 10).byte(), TypeError),
        ("tags", torch.ones(2, 4), ValueError),
        ("tags", torch.ones(2), ValueError),
        ("tags", torch.ones(2, 3).to("meta"), ValueError),
        ("model", lambda x: x, TypeError),
        ("iterations", 0, ValueError),
        ("iterations", 2.0, TypeError),
        ("step", -0.1, ValueError),
        ("step", "0.1", TypeError),
        ("strength", -1, ValueError),
        ("strength", float("inf"), ValueError),
        ("region", 1.1, ValueError),
        ("region", None, TypeError),
    ],
)
def test_climbing_refuses(name, value, error):
    settings = {"iterations": 1, "step": 0.1, "strength": 1.0, "region": 0.5}
    arguments = {"model": network(), "images": torch.rand(2, 3, 9, 10), "tags": torch.ones(2, 3), **settings}
    assert_refuses(climb_cam, arguments, name, value, error)
