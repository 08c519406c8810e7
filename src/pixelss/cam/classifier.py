"""A trained classifier as a CAM network (Zhou 2016): its last layer read at every cell of its features."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from pixelss._checks import check_tensor
from pixelss._dtype import full_precision, promote
from pixelss.cam.head import CAMOutput

_SIZES = ((64, 96), (224, 224), (256, 256), (384, 384))  # of the images that a model is tried with
_INSTEAD = "Train a CAMHead on its features instead: nn.Sequential(timm_backbone(name), CAMHead(...))."
_REFUSED = (AssertionError, IndexError, RuntimeError, TypeError, ValueError)  # what networks raise at a size


def classifier_cam(
    model: nn.Module, *, features: nn.Module | str | None = None, classifier: nn.Module | str | None = None
) -> ClassifierCAM:
    """Turn a trained classifier into a network that returns a `CAMOutput`; the weights are kept and shared.

    The CAM is the classifier's weight applied to every cell of the last feature map, the bias left out. What lies
    between the map and the classifier besides pooling, norms above all, is applied to the cell first. So the
    CAM at a cell plus the bias is what the network's head says of a map that holds this cell everywhere, and

    - where the head is global average pooling and a linear layer (ResNet, EfficientNet, DenseNet, Swin, a ViT with
      `global_pool="avg"` and no norm after it), the logits are the mean of the CAM plus the bias;
    - where a norm follows the pooling (ConvNeXt, ViTs with `fc_norm`) or the pooling is another (class token,
      maximum, one query's attention), they are not: the logits are the network's own. With a class token the CAM
      is the classifier's answer to each patch token in the class token's place; with two classifiers (distilled
      networks) it is the mean of both. A batch norm there takes its stored statistics, in training too.

    A network of timm needs no names. Of any other, name the two parts: `features="layer4"` and `classifier="fc"` of
    torchvision's ResNet, `features="vit"` and `classifier="classifier"` of a ViT of transformers. The
    model is run once on two random images, in a copy that shares its tensors, to see which layers lie between the parts
    and that the CAM is what is said above. It is left as it is; no hook stays on it between two calls.

    Args:
        model: a network that maps images to logits, unwrapped: compile or wrap the result instead.
        features: the module whose output is the map, or its dotted name; its output may be a map (channels first or
            last), a token sequence with or without class tokens, or a tuple or mapping that begins with one.
        classifier: the linear layer or 1x1 convolution that gives the logits, or its dotted name.

    Shape:
        The network maps images (B, 3, H, W) to `CAMOutput`: features (B, D, h, w) as the model makes them, before
        a norm that follows the pooling; raw CAMs (B, N, h, w), logits (B, N). Of further outputs (auxiliary
        logits of a training mode) the first counts. It takes the sizes that the model does: a ViT of timm takes others
        than its own with `dynamic_img_size=True, dynamic_img_pad=True`, a Swin with `strict_img_size=False`.

    Raises:
        TypeError: `model` is no module or a parallel or compiled wrapper, a part is neither a module nor a name.
        ValueError: a part is missing, is not in the model or does not fit; the model has no classifier; further layers
            lie between the map and the classifier (VGG's or MobileNetV3's head), so that no layer can be
            read at a cell. When called: images of a size that the model does not take.

    Reference:
        Zhou 2016, "Learning Deep Features for Discriminative Localization".

    Example:
        >>> import timm
        >>> net = classifier_cam(timm.create_model("resnet18", num_classes=20))
        >>> out = net.eval()(torch.rand(2, 3, 64, 96))
        >>> out.features.shape, out.cam.shape, out.logits.shape
        (torch.Size([2, 512, 2, 3]), torch.Size([2, 20, 2, 3]), torch.Size([2, 20]))
        >>> bias = net.model.get_classifier().bias
        >>> torch.allclose(out.logits, out.cam.mean((-2, -1)) + bias, atol=1e-6)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is a {type(model).__name__}.")
    if isinstance(model, (DataParallel, DistributedDataParallel)) or "_orig_mod" in model._modules:
        raise TypeError(f"model must be the plain network, but is a {type(model).__name__}: wrap the result instead.")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model must be the plain network, but is scripted: script or compile the result instead.")
    if (features is None) != (classifier is None):
        given, lacks = ("features", "classifier") if classifier is None else ("classifier", "features")
        raise ValueError(f"{lacks} must be given where {given} is: name both parts.")
    if features is None or classifier is None:
        part, heads = None, _timm_classifiers(model)
    else:
        part, head = _part_name(model, "features", features), _part_name(model, "classifier", classifier)
        found = model.get_submodule(head)
        if not _is_classifier(found):
            inner = [f"{head}.{name}" for name, module in found.named_modules() if name and _is_classifier(module)]
            hint = f" Name its layer {inner[-1]!r}." if inner else ""
            what = "be a linear layer or a 1x1 convolution"
            raise ValueError(f"classifier must {what}, but {head!r} is a {type(found).__name__}.{hint}")
        heads = (head,)
    if next((p for p in model.parameters() if p.is_meta), None) is not None:
        raise ValueError('model lies on the "meta" device, which keeps no values: build it on another.')
    refusal: ValueError | None = None
    for size in dict.fromkeys((_SIZES[0], *_own_sizes(model), *_SIZES[1:])):
        try:
            return ClassifierCAM(model, part, _plan(model, part, heads, size))
        except _UnlikeError as error:
            refusal = refusal if isinstance(refusal, _UnlikeError) else error
            if size != _SIZES[0]:  # small images misfold some maps; another size will not help
                break
        except _REFUSED as error:  # a size that this network does not take: try the next
            refusal = refusal or ValueError(
                f"model cannot be tried on images of size {size}: {_first_line(error)}. It must map images to logits."
            )
    raise ValueError(str(refusal)) from refusal


class ClassifierCAM(nn.Module):
    """What `classifier_cam` returns: the classifier as `model`, read by a plan of names.

    Attributes:
        model: the classifier itself.
    """

    if TYPE_CHECKING:  # nn.Module's own call says Any
        __call__: Callable[..., CAMOutput]

    def __init__(self, model: nn.Module, part: str | None, plan: _Plan) -> None:
        super().__init__()
        self.model = model
        self._part, self._plan = part, plan

    def forward(self, images: Tensor, **kwargs: Any) -> CAMOutput:
        """Return features, raw CAMs and logits of images (B, 3, H, W); `kwargs` go to the model."""
        weight = next(self.model.parameters())
        _, _, H, W = check_tensor("images", images, "BCHW", like=weight, hint="A single image? Pass images[None].")
        try:
            found, logits = _run(self.model, self._part, images, kwargs)
            cells = _cells(found, self._plan, (H, W))
        except torch.cuda.OutOfMemoryError:
            raise
        except _REFUSED as error:
            if images.dtype != weight.dtype or self._plan.size == (H, W) or kwargs:
                raise
            raise ValueError(
                f"model cannot take images of size ({H}, {W}): {_first_line(error)}. Resize or pad them to a size that "
                f"it takes, such as {self._plan.size}; for other sizes build a ViT of timm with dynamic_img_size=True, "
                "dynamic_img_pad=True, a windowed one with strict_img_size=False."
            ) from error
        cam = _read(self.model, self._plan.branches, cells)
        return CAMOutput(cells.permute(0, 3, 1, 2), cam.permute(0, 3, 1, 2), promote(logits))

    def extra_repr(self) -> str:
        """Say how the logits come about in the module's repr."""
        return f"logits={'mean of the CAM plus bias' if self._plan.averages else 'the own of the model'!r}"


class _Branch(NamedTuple):
    """One classifier, and the layers that a cell passes before it: (dotted name, form of its input)."""

    layers: tuple[tuple[str, str], ...]
    classifier: str


class _Plan(NamedTuple):
    layout: str  # of the features: NCHW, NHWC or NLC
    prefix: int  # tokens before those of the cells
    stride: int  # image pixels a cell, for tokens
    branches: tuple[_Branch, ...]
    averages: bool  # the logits are the mean of the CAM plus the bias
    size: tuple[int, int]  # of images that the model takes


class _UnlikeError(ValueError):
    """The model is understood, and is not one that can be read at a cell."""


def _timm_classifiers(model: nn.Module) -> tuple[str, ...]:
    """Return the dotted names of what timm calls the classifiers."""
    if not all(callable(getattr(model, name, None)) for name in ("forward_features", "forward_head", "get_classifier")):
        linear = [name for name, module in model.named_modules() if _is_classifier(module)]
        likely = linear[-1] if linear else "fc"
        raise ValueError(
            f"features and classifier must be given, for {type(model).__name__} is no network of timm: the name of the "
            f"module that gives the feature map, such as 'layer4', and that of the classifier, such as {likely!r}."
        )
    network: Any = model
    found: Any = network.get_classifier()
    names = {id(module): name for name, module in model.named_modules()}
    found = found if isinstance(found, (tuple, list, nn.ModuleList)) else (found,)
    heads = tuple(names[id(module)] for module in found if id(module) in names)
    if not any(_is_classifier(leaf) for name in heads for leaf in model.get_submodule(name).modules()):
        raise ValueError(
            f"model must have a classifier, but {type(model).__name__} has none that is a linear layer or a 1x1 "
            "convolution: build it with num_classes=N."
        )
    return heads


def _part_name(model: nn.Module, argument: str, part: nn.Module | str) -> str:
    """Return the dotted name of a part, which must lie in the model."""
    if isinstance(part, str):
        names: list[str] = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
        if part not in names:
            top = ", ".join(repr(name) for name, _ in model.named_children())
            raise ValueError(f"{argument} must be the name of a module of the model, but is {part!r}: it has {top}.")
        return part
    if not isinstance(part, nn.Module):
        raise TypeError(f"{argument} must be a module or its dotted name, but is a {type(part).__name__}.")
    name = next((name for name, module in model.named_modules() if module is part), "")
    if name:
        return name
    raise ValueError(f"{argument} must be a module inside the model, but this {type(part).__name__} is not in it.")


def _is_classifier(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return set(module.kernel_size) == {1} and module.groups == 1
    return isinstance(module, nn.Linear)


def _is_norm(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return "norm" in type(module).__name__.lower() and bool(parameters) and all(p.ndim == 1 for p in parameters)


def _is_pool(module: nn.Module) -> bool:
    return type(module).__name__ == "AttentionPoolLatent"  # timm's: one query attends to all tokens


def _own_sizes(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Yield the image sizes that the model names itself, wherever timm, torchvision and transformers keep them."""
    config = getattr(model, "config", None)
    patches = getattr(model, "patch_embed", None)
    timm_config: Any = getattr(model, "pretrained_cfg", None) or {}
    for size in (
        getattr(patches, "img_size", None),
        getattr(model, "image_size", None),
        getattr(config, "image_size", None),
        tuple(timm_config.get("input_size") or ())[-2:],
    ):
        if isinstance(size, int):
            yield size, size
        elif isinstance(size, Sequence) and len(size) == 2:
            yield int(size[0]), int(size[1])


# --- one run ---------------------------------------------------------------------------------------------------


def _run(model: nn.Module, part: str | None, images: Tensor, kwargs: Mapping[str, Any]) -> tuple[Any, Tensor]:
    """Return what the features part gave, and the logits."""
    if part is None:
        network: Any = model
        found = network.forward_features(images, **kwargs)
        return found, _first_tensor(network.forward_head(found), "logits")
    with _watch(model.get_submodule(part)) as outputs:
        logits = _first_tensor(model(images, **kwargs), "logits")
    if not outputs:
        raise _UnlikeError(f"features must be a module that the model runs, but {part!r} was not called.")
    return outputs[-1], logits


@contextmanager
def _watch(module: nn.Module) -> Iterator[list[Any]]:
    """Keep the outputs of `module` for this block alone: the hook is gone after it, from every copy too."""
    outputs: list[Any] = []
    caller = _thread()

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        if _thread() == caller:  # another thread's images are not ours
            outputs.append(output)

    handle = module.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]  # it cannot be traced
def _thread() -> int:
    return threading.get_ident()


def _first_tensor(output: Any, name: str) -> Tensor:
    """Return the tensor called `name` of a result, or its first."""
    found = output
    if not isinstance(found, Tensor):
        found = getattr(output, name, None)
    if found is None and isinstance(output, Mapping):
        found = output.get(name, next(iter(output.values()), None))
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise _UnlikeError(f"the model must give {name} as a tensor, but gives a {type(output).__name__}. {_INSTEAD}")
    return found


def _cells(found: Any, plan: _Plan, size: tuple[int, int]) -> Tensor:
    """Return the features as (B, h, w, C)."""
    x = _first_tensor(found, "last_hidden_state")
    if plan.layout == "NCHW":
        return x.permute(0, 2, 3, 1)
    if plan.layout == "NHWC":
        return x
    grid = _grid(x.shape[1] - plan.prefix, size, plan.stride)
    if grid is None:
        raise ValueError(
            f"{x.shape[1]} tokens, {plan.prefix} of them class tokens, are no map of stride {plan.stride} on {size}"
        )
    cells: Tensor = x[:, plan.prefix :].unflatten(1, grid)
    return cells


def _grid(cells: int, size: tuple[int, int], stride: int) -> tuple[int, int] | None:
    """Return (h, w) of `cells` cells of a stride: rounded up (padded images) or down."""
    H, W = size
    for grid in ((-(-H // stride), -(-W // stride)), (H // stride, W // stride)):
        if grid[0] * grid[1] == cells:
            return grid
    return None


def _read(model: nn.Module, branches: tuple[_Branch, ...], cells: Tensor, *, bias: bool = False) -> Tensor:
    """Return the mean of the classifiers' answers to every cell: (B, h, w, C) -> (B, h, w, N)."""
    answers = []
    for branch in branches:
        x = cells.flatten(0, 2)  # (B h w, C)
        for name, form in branch.layers:
            x = _apply(model.get_submodule(name), form, x)
        head: Any = model.get_submodule(branch.classifier)
        answers.append(functional.linear(x, head.weight.flatten(1), head.bias if bias else None))
    total = answers[0] if len(answers) == 1 else torch.stack(answers).mean(0)
    scores: Tensor = total.unflatten(0, cells.shape[:3])
    return scores


def _apply(layer: nn.Module, form: str, x: Tensor) -> Tensor:
    """Apply a layer of the head to each cell (M, C) alone."""
    if isinstance(layer, _BatchNorm):  # stored statistics: those of cells are not those of images
        return functional.batch_norm(
            x, layer.running_mean, layer.running_var, layer.weight, layer.bias, training=False, eps=layer.eps
        )
    if form == "tokens":
        x = x[:, None]
    elif form == "map":
        x = x[:, :, None, None]
    y: Tensor = layer(x)
    return y.flatten(1)


# --- the plan --------------------------------------------------------------------------------------------------


def _plan(model: nn.Module, part: str | None, heads: tuple[str, ...], size: tuple[int, int]) -> _Plan:
    """Find the plan from a run on random images of this size, and check it against the model."""
    trial = _Trial(model, part, heads)
    weight = next(p for p in trial.twin.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    B = 2 if size == _SIZES[0] else 1  # large images take their time
    images = torch.randn(B, _in_chans(model), *size, generator=generator).to(weight)
    with torch.no_grad(), full_precision(images):
        found, logits = trial.run(images)
        x = _first_tensor(found, "last_hidden_state")
        branches = _branches(trial, heads, logits)
        width = _weight(trial.twin, branches[0]).shape[1]
        refusal = _UnlikeError(
            f"the features {tuple(x.shape)} must be maps or tokens of {width} channels, the width of the classifier "
            f"{branches[0].classifier!r}: what lies between them does more than pool and normalise. {_INSTEAD}"
        )
        layouts = {"NCHW": 1, "NHWC": 3} if x.ndim == 4 else {"NLC": 2} if x.ndim == 3 else {}
        for layout, axis in layouts.items():
            if x.shape[axis] != width:
                continue
            prefix, stride = _tokens(model, x.shape[1], size) if layout == "NLC" else (0, 0)
            plan = _Plan(layout, prefix, stride, branches, False, size)
            cells = _cells(x, plan, size)
            cell = cells[:, -1, -1]  # (B, C)
            shape: list[int] = [B, 1, 1, 1][: x.ndim]
            shape[axis] = width
            _, constant = trial.run(images, cell.view(shape).expand(x.shape).contiguous())
            if _close(constant, _read(trial.twin, branches, cell[:, None, None], bias=True).flatten(1)):
                mean = _read(trial.twin, branches, cells, bias=True).mean((1, 2))
                return plan._replace(averages=_close(logits, mean))
            refusal = _UnlikeError(
                "the model must do no more than pool and normalise between its features and its classifier, but what "
                f"it says of a map that holds one cell everywhere is not {branches[0].classifier!r} of that cell. "
                + (_INSTEAD if part is None else "Name as features the last module before the pooling.")
            )
        raise refusal


class _Trial:
    """A copy of the model in eval mode that writes down the layers with weights which run after its features.

    It shares every tensor but the classifiers', which are random: a weight of zeros would agree with everything. A
    copy, for a run in eval mode can fill caches.
    """

    def __init__(self, model: nn.Module, part: str | None, heads: tuple[str, ...]) -> None:
        def linear(module: nn.Module) -> Iterator[nn.Parameter]:
            for leaf in (leaf for head in heads for leaf in module.get_submodule(head).modules()):
                yield from leaf.parameters(recurse=False) if _is_classifier(leaf) else ()

        kept: list[Tensor] = [*model.parameters(), *model.buffers()]
        kept += [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
        random = {id(p) for p in linear(model)}
        self.twin = copy.deepcopy(model, {id(tensor): tensor for tensor in kept if id(tensor) not in random}).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in linear(self.twin):
                p.copy_(torch.randn(p.shape, generator=generator).mul(p[0].numel() ** -0.5))
        self.part = part
        self.calls: list[tuple[str, nn.Module, tuple[int, ...]]] = []
        self.constant: Tensor | None = None
        self.found: Any = None
        whole: tuple[str, ...] = ()
        for name, module in self.twin.named_modules():
            one = _is_pool(module) or _is_norm(module) or _is_classifier(module)
            leaf = one or (not module._modules and next(module.parameters(), None) is not None)
            if leaf and not f"{name}.".startswith(whole):
                module.register_forward_hook(partial(self._note, name))
            whole += (f"{name}.",) * one
        if part is not None:
            self.twin.get_submodule(part).register_forward_hook(self._start)

    def run(self, images: Tensor, constant: Tensor | None = None) -> tuple[Any, Tensor]:
        """Return features and logits, the latter of the features `constant` where they are given."""
        self.constant = constant
        if self.part is not None:
            return _run(self.twin, self.part, images, {})
        network: Any = self.twin
        if constant is None:
            self.found = network.forward_features(images)
        found = self._start(network, images, self.found)
        return found, _first_tensor(network.forward_head(found), "logits")

    def _note(self, name: str, module: nn.Module, inputs: Any, _: Any) -> None:
        self.calls.append((name, module, tuple(inputs[0].shape) if inputs else ()))

    def _start(self, _: nn.Module, __: Any, output: Any) -> Any:
        self.calls.clear()
        if self.constant is None or isinstance(output, Tensor):
            return output if self.constant is None else self.constant
        if isinstance(output, Mapping):
            key = "last_hidden_state" if "last_hidden_state" in output else next(iter(output))
            kind: Any = type(output)
            return kind(**{**output, key: self.constant})
        return (self.constant, *output[1:])


def _branches(trial: _Trial, heads: tuple[str, ...], logits: Tensor) -> tuple[_Branch, ...]:
    """Read the classifiers, and what runs before each, from the layers that were called after the features."""
    last = {
        name
        for name, module, _ in trial.calls
        if _is_classifier(module) and f"{name}.".startswith(tuple(f"{head}." for head in heads))
        if next(module.parameters()).shape[:1] == logits.shape[1:]  # not the hidden layers of a perceptron
    }
    branches: list[_Branch] = []
    layers: list[tuple[str, str]] = []
    for name, module, shape in trial.calls:
        if name in last:
            branches.append(_Branch(tuple(layers), name))
            layers = []
        elif _is_pool(module):
            layers.append((name, "tokens"))
        elif _is_norm(module):
            width = next(module.parameters()).numel()
            layers.append((name, "map" if len(shape) == 4 and shape[1] == width != shape[3] else "vector"))
        else:
            raise _UnlikeError(
                "the model must do no more than pool and normalise between its features and its classifier, but runs "
                f"{name!r}, a {type(module).__name__}. {_INSTEAD}"
            )
    if not branches or layers:
        raise _UnlikeError(f"the classifier must be the last layer after the features, but is not. {_INSTEAD}")
    sizes = {tuple(_weight(trial.twin, branch).shape[:2]) for branch in branches}
    if len(sizes) > 1 or (tuple(logits.shape[1:]),) != tuple(size[:1] for size in sizes):
        raise _UnlikeError(f"the classifier must give logits (B, N), but they are {tuple(logits.shape)}. {_INSTEAD}")
    return tuple(branches)


def _weight(model: nn.Module, branch: _Branch) -> Tensor:
    head: Any = model.get_submodule(branch.classifier)
    weight: Tensor = head.weight
    return weight


def _in_chans(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    if config is not None and isinstance(getattr(config, "num_channels", None), int):
        return int(config.num_channels)
    stem = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    told: Any = getattr(model, "pretrained_cfg", None) or {}
    if stem is None or (stem.in_channels > 16 and told.get("input_size")):  # pixels folded into channels first
        return int((told.get("input_size") or (3,))[0])
    return stem.in_channels


def _tokens(model: nn.Module, count: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return how many tokens come before the cells', and the cells' stride."""
    known: Any = getattr(model, "num_prefix_tokens", None)
    levels: Any = getattr(model, "feature_info", None)
    told = {levels[-1]["reduction"]} if isinstance(levels, list) and levels else set()
    H, W = size
    strides = sorted(range(1, min(H, W) + 1), key=lambda s: (s not in told, H % s + W % s, s))  # then exact ones
    for prefix in range(9) if known is None else (int(known),):
        for stride in strides:
            if count - prefix > 1 and _grid(count - prefix, size, stride) is not None:
                return prefix, stride
    raise _UnlikeError(f"{count} tokens of images {size} are no map. {_INSTEAD}")


def _close(first: Tensor, second: Tensor) -> bool:
    """Tell whether two results agree up to rounding."""
    eps = torch.finfo(first.dtype).eps
    return bool((first - second).abs().amax() <= 300 * eps * (1 + second.abs().amax()))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__
