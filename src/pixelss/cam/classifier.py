"""A trained classifier as a CAM network (Zhou 2016): its last layer read at every cell of its features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pixelss._checks import channels_hint, check_tensor
from pixelss._copies import unwrap
from pixelss._dtype import promote
from pixelss.cam.head import CAMOutput
from pixelss.cam.reading import Plan, UnlikeError, cells_of, is_classifier, read_cells, run
from pixelss.cam.trial import SIZES, find_plan

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
    if unwrap(model) is not model:
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
        if not is_classifier(found):
            inner = [f"{head}.{name}" for name, module in found.named_modules() if name and is_classifier(module)]
            hint = f" Name its layer {inner[-1]!r}." if inner else ""
            what = "be a linear layer or a 1x1 convolution"
            raise ValueError(f"classifier must {what}, but {head!r} is a {type(found).__name__}.{hint}")
        heads = (head,)
    if next((p for p in model.parameters() if p.is_meta), None) is not None:
        raise ValueError('model lies on the "meta" device, which keeps no values: build it on another.')
    refusal: ValueError | None = None
    for size in dict.fromkeys((SIZES[0], *_own_sizes(model), *SIZES[1:])):
        try:
            return ClassifierCAM(model, part, find_plan(model, part, heads, size))
        except UnlikeError as error:
            refusal = refusal if isinstance(refusal, UnlikeError) else error
            if size != SIZES[0]:  # small images misfold some maps; another size will not help
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

    def __init__(self, model: nn.Module, part: str | None, plan: Plan) -> None:
        super().__init__()
        self.model = model
        self._part, self._plan = part, plan

    def forward(self, images: Tensor, **kwargs: Any) -> CAMOutput:
        """Return features, raw CAMs and logits of images (B, 3, H, W); `kwargs` go to the model."""
        weight = next(self.model.parameters(), images)  # a replica of DataParallel has none
        _, _, H, W = check_tensor("images", images, "BCHW", like=weight, hint="A single image? Pass images[None].")
        try:
            found, logits = run(self.model, self._part, images, kwargs)
            cells = cells_of(found, self._plan, (H, W))
        except torch.cuda.OutOfMemoryError:
            raise
        except _REFUSED as error:
            if images.dtype != weight.dtype or self._plan.size == (H, W) or kwargs:
                raise
            raise ValueError(
                f"model cannot take images of size ({H}, {W}): {_first_line(error)}. Resize or pad them to a size that "
                f"it takes, such as {self._plan.size}; for other sizes build a ViT of timm with dynamic_img_size=True, "
                f"dynamic_img_pad=True, a windowed one with strict_img_size=False.{channels_hint(images)}"
            ) from error
        features = cells.permute(0, 3, 1, 2)
        cam = read_cells(self.model, self._plan.branches, features.permute(0, 2, 3, 1))  # on the graph of the features
        return CAMOutput(features, cam.permute(0, 3, 1, 2), promote(logits))

    def extra_repr(self) -> str:
        """Say how the logits come about in the module's repr."""
        return f"logits={'mean of the CAM plus bias' if self._plan.averages else 'the own of the model'!r}"


def _timm_classifiers(model: nn.Module) -> tuple[str, ...]:
    """Return the dotted names of what timm calls the classifiers."""
    if not all(callable(getattr(model, name, None)) for name in ("forward_features", "forward_head", "get_classifier")):
        linear = [name for name, module in model.named_modules() if is_classifier(module)]
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
    if not any(is_classifier(leaf) for name in heads for leaf in model.get_submodule(name).modules()):
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


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__
