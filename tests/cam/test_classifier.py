"""A trained classifier as a CAM network: timm's families, torchvision's and transformers' models, the refused."""

from __future__ import annotations

import copy
import inspect
import threading
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pixelss import CAMOutput, EMATeacher, classifier_cam, multi_scale_forward
from tests.lazily import Lazily
from tests.oracles import data_parallel_replica

timm: Any = Lazily("timm")

SIGNATURES = {"classifier_cam": "(model, *, features=None, classifier=None)"}
BLOCKS = {"classifier_cam": "a network of the user's, which keeps what it promises"}

VIT: dict[str, Any] = {"img_size": (64, 96), "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN: dict[str, Any] = {"img_size": (64, 96), "embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)}

# name, settings, (h, w) of images (64, 96), are the logits the mean of the CAM plus the bias?
FAMILIES: list[tuple[str, dict[str, Any], tuple[int, int], bool]] = [
    ("resnet18", {}, (2, 3), True),
    ("resnet18", {"output_stride": 8}, (8, 12), True),
    ("resnetv2_18", {}, (2, 3), True),  # a 1x1 convolution as classifier
    ("seresnet18", {}, (2, 3), True),
    ("regnety_002", {}, (2, 3), True),
    ("tf_efficientnet_lite0", {}, (2, 3), True),
    ("mobilenetv2_050", {}, (2, 3), True),
    ("mnasnet_small", {}, (2, 3), True),
    ("tinynet_e", {}, (2, 3), True),
    ("test_byobnet", {}, (2, 3), True),
    ("ese_vovnet19b_slim", {}, (2, 3), True),
    ("dpn48b", {}, (2, 3), True),
    ("starnet_s050", {}, (2, 3), True),
    ("mobilevit_xxs", {}, (2, 3), True),
    ("pvt_v2_b0", {}, (2, 3), True),
    ("efficientvit_m0", {}, (1, 2), True),  # a batch norm before the classifier
    ("repvit_m0_9", {"depth": (1, 1, 1, 1)}, (2, 3), True),  # two classifiers, a batch norm before each
    ("swiftformer_xs", {}, (2, 3), True),  # two classifiers
    ("hrnet_w18_small", {}, (2, 3), True),
    ("swin_tiny_patch4_window7_224", SWIN, (2, 3), True),  # channels last
    ("twins_svt_small", {"depths": (1, 1, 1, 1)}, (2, 3), True),  # tokens
    ("levit_128s", {"img_size": (64, 96)}, (1, 2), True),  # tokens, two classifiers
    ("convnext_atto", {}, (2, 3), False),  # a norm after the pooling
    ("edgenext_xx_small", {}, (2, 3), False),
    ("poolformer_s12", {}, (2, 3), False),
    ("tiny_vit_5m_224", {"depths": (1, 1, 1, 1)}, (2, 3), False),
    ("vit_tiny_patch16_224", VIT, (4, 6), False),  # a class token
    ("vit_tiny_patch16_224", {**VIT, "global_pool": "avg", "fc_norm": False}, (4, 6), True),
    ("vit_tiny_patch16_224", {**VIT, "global_pool": "max", "fc_norm": False}, (4, 6), False),
    ("vit_tiny_patch16_224", {**VIT, "global_pool": "map"}, (4, 6), False),  # attention pooling
    ("deit_tiny_distilled_patch16_224", VIT, (4, 6), False),  # two tokens, two classifiers
    ("vit_small_patch14_reg4_dinov2", {**VIT, "patch_size": 16}, (4, 6), False),  # registers
    ("beit_base_patch16_224", VIT, (4, 6), False),
    ("eva02_tiny_patch14_224", {**VIT, "patch_size": 16}, (4, 6), False),
    ("cait_xxs24_224", VIT, (4, 6), False),
    ("xcit_nano_12_p16_224", {**VIT, "img_size": 224}, (4, 6), False),
    ("resnet18", {"global_pool": "max"}, (2, 3), False),
    ("resnet18", {"global_pool": "avgmax"}, (2, 3), False),
]
IDS = [f"{name}-{i}" for i, (name, *_) in enumerate(FAMILIES)]
families = pytest.mark.parametrize(("name", "settings", "grid", "mean"), FAMILIES, ids=IDS)


def create(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    model: Any = timm.create_model(name, num_classes=3, **settings).eval()
    for module in model.modules():  # timm starts some classifiers at zero, and all biases
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.shape[0] == 3:
            nn.init.normal_(module.weight, std=0.1)
            if module.bias is not None:
                nn.init.normal_(module.bias)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.uniform_(-0.1, 0.1)
    return model


def of_one_cell(like: Tensor, cell: Tensor, channels: int) -> Tensor:
    """Features that hold the cell (B, C) everywhere, class tokens included."""
    axis = 1 if like.ndim == 4 and like.shape[1] == channels else -1
    shape = [len(cell)] + [1] * (like.ndim - 1)
    shape[axis] = channels
    return cell.view(shape).expand(like.shape).clone()


@families
@torch.no_grad()
def test_family(name: str, settings: dict[str, Any], grid: tuple[int, int], mean: bool) -> None:
    model = create(name, **settings)
    before = copy.deepcopy(model.state_dict())
    net = classifier_cam(model)
    x = torch.randn(2, 3, 64, 96)
    out = net(x)
    assert isinstance(out, CAMOutput)
    assert torch.equal(out.logits, model(x))
    B, C, h, w = out.features.shape
    assert ((B, h, w), out.cam.shape) == ((2, *grid), (2, 3, *grid))

    head = model.get_classifier()
    heads = head if isinstance(head, tuple) else (head,)
    layers = [m for h in heads for m in h.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    bias = torch.stack([layer.bias for layer in layers]).mean(0)
    # At each cell: what the head says of a map that holds this cell everywhere.
    found = model.forward_features(x)
    for i, j in [(0, 0), (h - 1, w - 1), (0, w - 1)]:
        expected = model.forward_head(of_one_cell(found, out.features[:, :, i, j], C))
        torch.testing.assert_close(out.cam[:, :, i, j] + bias, expected, rtol=1e-5, atol=1e-5)
    # And of the map itself.
    difference = (out.cam.mean((-2, -1)) + bias - out.logits).abs().max()
    assert (difference < 1e-6 * (1 + out.logits.abs().max())) == mean, difference

    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert not [m for m in model.modules() if m._forward_hooks]


TURNABLE = ("swin", "twins", "vit_t", "vit_s", "deit", "beit", "eva", "cait", "xcit")  # tokens, channels last


@pytest.mark.parametrize(
    ("name", "settings", "grid"), [family[:3] for family in FAMILIES if family[0].startswith(TURNABLE)]
)
@torch.no_grad()
def test_the_map_is_not_turned(name: str, settings: dict[str, Any], grid: tuple[int, int]) -> None:
    net = classifier_cam(create(name, **settings).double())
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    base = net(x).features
    h, w = grid
    centres = []
    for i, j in [(0, w - 1), (h - 1, 0)]:  # a change in a corner moves the cells near it most
        other = x.clone()
        patch = other[..., i * 64 // h : (i + 1) * 64 // h, j * 96 // w : (j + 1) * 96 // w]
        patch += 0.1 * torch.randn(patch.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        change = (net(other).features - base).abs().sum(1)[0]  # (h, w)
        change = change / change.sum()
        centres.append(((change.sum(1) * torch.arange(h)).sum(), (change.sum(0) * torch.arange(w)).sum()))
    (top, right), (bottom, left) = centres
    assert left < right
    assert top < bottom


@torch.no_grad()
def test_logits_of_a_gap_network_by_a_hook_of_the_test() -> None:
    model = create("resnet18").double()
    kept: list[Tensor] = []
    handle = model.layer4.register_forward_hook(lambda _, __, output: kept.append(output.clone()))
    x = torch.randn(2, 3, 65, 97, dtype=torch.float64)
    expected = model(x)
    handle.remove()
    out = classifier_cam(model)(x)
    cam = torch.einsum("nc,bchw->bnhw", model.fc.weight, kept[0])
    torch.testing.assert_close(out.features, kept[0])
    torch.testing.assert_close(out.cam, cam, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(expected, cam.mean((-2, -1)) + model.fc.bias, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_convnext_by_hand() -> None:
    model = create("convnext_atto")
    x = torch.randn(1, 3, 64, 96)
    out = classifier_cam(model)(x)
    features = model.forward_features(x)
    for i in range(2):
        for j in range(3):
            cell = nn.functional.layer_norm(
                features[0, :, i, j], (320,), model.head.norm.weight, model.head.norm.bias, model.head.norm.eps
            )
            torch.testing.assert_close(out.cam[0, :, i, j], model.head.fc.weight @ cell)


@torch.no_grad()
@pytest.mark.parametrize(("size", "grid"), [((64, 96), (4, 6)), ((65, 97), (5, 7)), ((32, 48), (2, 3))])
def test_a_vision_transformer_of_any_size(size: tuple[int, int], grid: tuple[int, int]) -> None:
    model = create("vit_tiny_patch16_224", **VIT, dynamic_img_size=True, dynamic_img_pad=True)
    out = classifier_cam(model)(torch.randn(1, 3, *size))
    assert out.cam.shape == (1, 3, *grid)


@torch.no_grad()
def test_a_size_that_the_network_does_not_take() -> None:
    net = classifier_cam(create("vit_tiny_patch16_224", **VIT))
    message = r"model cannot take images of size \(32, 48\): .* such as \(64, 96\).*dynamic_img_size=True"
    with pytest.raises(ValueError, match=message):
        net(torch.randn(1, 3, 32, 48))
    with pytest.raises(RuntimeError, match=r"(?i)double|dtype|type"):  # what the size does not explain
        net(torch.randn(1, 3, 64, 96, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"images must have shape .* Pass images\[None\]"):
        net(torch.randn(3, 64, 96))


# --- named parts -----------------------------------------------------------------------------------------------

TORCHVISION = [
    ("resnet18", "layer4", "fc", True),
    ("densenet121", "features", "classifier", True),  # its ReLU after them works in place
    ("mobilenet_v2", "features", "classifier.1", True),
    ("shufflenet_v2_x0_5", "conv5", "fc", True),
    ("regnet_y_400mf", "trunk_output", "fc", True),
    ("googlenet", "inception5b", "fc", True),
    ("convnext_tiny", "features", "classifier.2", False),
    ("swin_t", "features", "head", True),  # channels last, a norm between
    ("swin_t", "norm", "head", True),
]


def from_torchvision(models: Any, name: str) -> Any:
    """Return a network of torchvision, of the smallest size that its class allows where its own takes a second."""
    if name == "densenet121":
        return models.DenseNet(8, (1, 1, 1, 1), 16, num_classes=3)
    if name == "convnext_tiny":
        widths = (8, 16, 24, 32, None)
        blocks = [models.convnext.CNBlockConfig(c, after, 1) for c, after in pairwise(widths)]
        return models.ConvNeXt(blocks, num_classes=3)
    if name == "swin_t":
        return models.SwinTransformer([4, 4], 8, [1, 1, 1, 1], [1, 2, 4, 8], [7, 7], num_classes=3)
    extra = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    return models.get_model(name, num_classes=3, **extra)


@pytest.mark.parametrize(("name", "features", "classifier", "mean"), TORCHVISION)
@torch.no_grad()
def test_torchvision(name: str, features: str, classifier: str, mean: bool) -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    model = from_torchvision(models, name).eval()
    check_parts(model, features, classifier, (64, 96), (2, 3), mean)


@torch.no_grad()
def test_torchvision_vit() -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    model = models.VisionTransformer(64, 16, 2, 2, 24, 48, num_classes=3).eval()
    nn.init.normal_(model.heads.head.weight)
    check_parts(model, "encoder", "heads.head", (64, 64), (4, 4), False)


def check_parts(
    model: Any, features: str, classifier: str, size: tuple[int, int], grid: tuple[int, int], mean: bool
) -> None:
    head = model.get_submodule(classifier)
    x = torch.randn(2, 3, *size)
    found: list[Any] = []
    handle = head.register_forward_hook(lambda _, inputs, __: found.append(inputs[0]))
    expected = model(x)
    expected = getattr(expected, "logits", expected)
    handle.remove()
    net = classifier_cam(model, features=features, classifier=classifier)
    by_module = classifier_cam(model, features=model.get_submodule(features), classifier=head)
    out = net(x)
    assert torch.equal(out.cam, by_module(x).cam)
    assert torch.equal(out.logits, expected)
    assert out.cam.shape == (2, 3, *grid)
    weight = head.weight.flatten(1)
    difference = (out.cam.mean((-2, -1)) + head.bias - expected).abs().max()
    assert (difference < 1e-6 * (1 + expected.abs().max())) == mean, difference
    if mean:  # the head's own input, met by a hook of the test
        torch.testing.assert_close(out.cam.mean((-2, -1)), found[0].flatten(1) @ weight.T, rtol=1e-5, atol=1e-6)
    assert not [m for m in model.modules() if m._forward_hooks]


def transformers_models(kind: str) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    small = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    levels = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    settings: dict[str, dict[str, Any]] = {
        "ViT": {**small, "image_size": 64, "patch_size": 16},
        "DeiT": {**small, "image_size": 64, "patch_size": 16},
        "ResNet": {"embedding_size": 8, **levels, "layer_type": "basic"},
        "ConvNext": levels,
        "Swin": {"image_size": 64, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings[kind], num_labels=3)
    model = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    for module in model.classifier.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
    return model


@pytest.mark.parametrize(
    ("kind", "features", "classifier", "size", "grid", "mean"),
    [
        ("ViT", "vit", "classifier", (64, 64), (4, 4), False),
        ("DeiT", "deit", "classifier", (64, 64), (4, 4), False),
        ("ResNet", "resnet.encoder", "classifier.1", (64, 96), (2, 3), True),
        ("ConvNext", "convnext.encoder", "classifier", (64, 96), (2, 3), False),
        ("Swin", "swin.layernorm", "classifier", (64, 96), (8, 12), True),
    ],
)
@torch.no_grad()
def test_transformers(
    kind: str, features: str, classifier: str, size: tuple[int, int], grid: tuple[int, int], mean: bool
) -> None:
    check_parts(transformers_models(kind), features, classifier, size, grid, mean)


@torch.no_grad()
def test_further_arguments_go_to_the_model() -> None:
    net = classifier_cam(transformers_models("ViT"), features="vit", classifier="classifier")
    assert net(torch.randn(1, 3, 64, 96), interpolate_pos_encoding=True).cam.shape == (1, 3, 4, 6)


def test_a_part_that_pools_inside_is_refused() -> None:
    with pytest.raises(ValueError, match="Name as features the last module before the pooling"):
        classifier_cam(transformers_models("ResNet"), features="resnet", classifier="classifier.1")


# --- refusals --------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """A network that is none of timm's."""

    def __init__(self, between: nn.Module | None = None, after: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 4, 1)
        self.between, self.after = between or nn.Identity(), after or nn.Identity()
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.after(self.fc(self.between(self.stem(x).mean((-2, -1)))))
        return logits


@pytest.mark.parametrize(
    ("model", "features", "classifier", "error", "message"),
    [
        (
            Plain(),
            None,
            None,
            ValueError,
            r"features and classifier must be given, for Plain is no network .*'fc'",
        ),
        (Plain(), "stem", None, ValueError, "classifier must be given where features is"),
        (Plain(), None, "fc", ValueError, "features must be given where classifier is"),
        (Plain(), "layer4", "fc", ValueError, "features must be the name of a module of the model, but is 'layer4'"),
        (Plain(), "stem", "stem", ValueError, "classifier must be a linear layer or a 1x1 convolution, but 'stem' is"),
        (Plain(), 4, "fc", TypeError, "features must be a module or its dotted name, but is a int"),
        (Plain(), "stem", nn.Linear(8, 3), ValueError, "classifier must be a module inside the model, but this Linear"),
        (Plain(nn.Linear(8, 8)), "stem", "fc", ValueError, "runs 'between', a Linear"),
        (Plain(nn.Tanh()), "stem", "fc", ValueError, "holds one cell everywhere is not 'fc'"),
        (Plain(after=nn.Sigmoid()), "stem", "fc", ValueError, "holds one cell everywhere is not 'fc'"),
        (Plain(after=nn.Linear(3, 3)), "stem", "fc", ValueError, "runs 'after', a Linear"),
        (
            nn.DataParallel(Plain()),
            "stem",
            "fc",
            TypeError,
            "the plain network, but is a DataParallel: wrap",
        ),
        (
            lambda: torch.compile(Plain(), backend="eager"),  # whose import takes a second
            "stem",
            "fc",
            TypeError,
            "the plain network, but is a OptimizedModule",
        ),
        ("resnet18", None, None, TypeError, "model must be a torch.nn.Module, but is a str"),
        (Plain().to("meta"), "stem", "fc", ValueError, '"meta" device'),
    ],
)
def test_refusals(model: Any, features: Any, classifier: Any, error: type[Exception], message: str) -> None:
    model = model() if inspect.isfunction(model) else model
    with pytest.raises(error, match=message):
        classifier_cam(model, features=features, classifier=classifier)


def test_a_model_whose_features_never_run() -> None:
    model = Plain()
    model.idle = nn.Conv2d(3, 8, 1)
    with pytest.raises(ValueError, match="features must be a module that the model runs, but 'idle' was not called"):
        classifier_cam(model, features="idle", classifier="fc")


# --- in use ----------------------------------------------------------------------------------------------------


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "timm": classifier_cam(timm.create_model("test_byobnet", num_classes=3)),
        "parts": classifier_cam(Plain(), features="stem", classifier="fc"),
    }


@pytest.mark.parametrize("kind", ["timm", "parts"])
@torch.no_grad()
def test_a_teacher_has_its_own_map(kind: str) -> None:
    student = networks()[kind].eval()
    teacher = EMATeacher(student, momentum=0.5)
    for p in student.parameters():
        p.add_(0.1)
    a, b = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 64, 64)
    fresh = copy.deepcopy(teacher.module)(b)
    of_student = student(a)
    for one, other in zip(teacher(b), fresh, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(student(a), of_student, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(of_student.features, teacher(a).features)
    teacher.update(student)


@pytest.mark.parametrize("kind", ["timm", "parts"])
@torch.no_grad()
def test_two_threads_at_once(kind: str) -> None:
    net = networks()[kind].eval()
    images = [torch.randn(1, 3, 64, 64) for _ in range(2)]
    expected = [net(x) for x in images]
    wrong: list[int] = []
    barrier = threading.Barrier(2)

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(30):
                barrier.wait()
                wrong.extend([i] * (not torch.equal(net(images[i]).cam, expected[i].cam)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_error_inside_leaves_no_hook() -> None:
    net = networks()["parts"]
    with pytest.raises(ValueError, match="cannot take images of size"):
        net(torch.randn(1, 5, 32, 32))
    assert not [m for m in net.modules() if m._forward_hooks]


@pytest.mark.parametrize("kind", ["timm", "parts"])
def test_training_reaches_the_own_weights(kind: str) -> None:
    net = networks()[kind].train()
    names = [name for name, _ in net.named_parameters()]
    assert all(name.startswith("model.") for name in net.state_dict())
    assert names == [f"model.{name}" for name, _ in net.model.named_parameters()]
    outs = multi_scale_forward(net, torch.randn(2, 3, 64, 64), flip=True)
    assert [tuple(out.cam.shape) for out in outs] == 3 * [(2, 3, 64, 64)]
    sum(out.logits.square().sum() + out.cam.square().sum() for out in outs).backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None]
    assert all(p.grad.any() for name, p in net.named_parameters() if "stem" in name or "fc.weight" in name)
    assert net.training


def test_training_of_the_cam_leaves_the_statistics_of_the_head() -> None:
    model = create("levit_128s", img_size=(64, 96)).train()
    before = model.head.bn.num_batches_tracked.item()
    classifier_cam(model)(torch.randn(2, 3, 64, 96))
    assert model.head.bn.num_batches_tracked.item() == before + 1  # the logits' own pass, nothing else


@pytest.mark.slow  # .ci/run runs it
@pytest.mark.parametrize("kind", ["timm", "parts"])
@torch.no_grad()
def test_compiled_equals_eager(kind: str) -> None:
    torch.compiler.reset()
    net = networks()[kind].eval()
    compiled = torch.compile(net, backend="eager", fullgraph=kind == "timm")
    for size in ((64, 64), (32, 64)):
        x = torch.randn(1, 3, *size)
        for one, other in zip(compiled(x), net(x), strict=True):
            torch.testing.assert_close(one, other)


def test_state_round_trip_and_repr() -> None:
    net, other = networks()["timm"], networks()["timm"]
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    other.load_state_dict(net.state_dict())
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(net.eval()(x).cam, other.eval()(x).cam)
    assert "mean of the CAM plus bias" in repr(net)


@torch.no_grad()
def test_half_precision_gives_logits_in_float32() -> None:
    net = networks()["timm"].eval()
    out = copy.deepcopy(net).bfloat16()(torch.randn(1, 3, 64, 64).bfloat16())
    assert (out.cam.dtype, out.logits.dtype) == (torch.bfloat16, torch.float32)
    assert classifier_cam(net.model.bfloat16())


@torch.no_grad()
def test_a_replica_of_data_parallel_runs() -> None:
    net, images = classifier_cam(create("resnet18")).eval(), torch.randn(1, 3, 64, 64)
    replica = data_parallel_replica(net)
    assert not list(replica.parameters())
    assert torch.equal(replica(images).cam, net(images).cam)
