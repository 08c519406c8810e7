"""ResNet38 among timm's models: importing this module registers it."""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.classifier import ClassifierHead
from timm.models import build_model_with_cfg, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from pixelss._checks import check_choice
from pixelss.backbones.resnet38 import ResNet38


class _Classifier(nn.Module):
    """ResNet38 with a pooled classifier, under the names of attributes and methods that timm calls."""

    def __init__(
        self, num_classes: int = 1000, in_chans: int = 3, global_pool: str = "avg", drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        if in_chans != 3:
            raise ValueError(f"in_chans must be 3, for ResNet38 takes RGB images, but is {in_chans}.")
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = ResNet38.out_channels
        channels, strides = (128, 256, 512, 1024, 4096), (2, 4, 8, 8, 8)
        modules = ("b3.bn_branch2a", "b4.bn_branch2a", "b5.bn_branch2a", "b6.bn_branch2a", "bn7")
        self.feature_info = [
            {"num_chs": c, "reduction": s, "module": f"backbone.{m}"}
            for c, s, m in zip(channels, strides, modules, strict=True)
        ]
        self.backbone = ResNet38()
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        features: Tensor = self.backbone(x)
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        output: Tensor = self.head(x, pre_logits=pre_logits)
        return output

    def get_classifier(self) -> nn.Module:
        classifier: nn.Module = self.head.fc
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the stages at `indices`; `norm` and `stop_early` change nothing: every stage is normalised."""
        check_choice("output_fmt", output_fmt, ("NCHW",))
        stages = self.backbone.forward_stages(x)
        taken, _ = feature_take_indices(len(stages), indices)
        chosen = [stages[i] for i in taken]
        return chosen if intermediates_only else (stages[-1], chosen)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the classifier, which intermediates do not need; returns `indices` counted from the front."""
        if prune_head:
            self.reset_classifier(0, "")
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        return taken


default_cfgs = {
    "resnet38": {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (28, 28),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "backbone.conv1a",
        "classifier": "head.fc",
    }
}


@register_model
def resnet38(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Entry point of `timm.create_model("resnet38")`.

    Args:
        pretrained: must be False, for timm hosts no weights of it.
        **kwargs: `num_classes` (0 gives pooled features), `global_pool`, `drop_rate`, `features_only`, `out_indices`.

    Raises:
        ValueError: `pretrained` is True, or `in_chans` is not 3.
        TypeError: a setting that ResNet38 does not have.

    Example:
        >>> import timm, torch
        >>> with torch.device("meta"):
        ...     net = timm.create_model("resnet38", features_only=True)
        >>> net.feature_info.channels(), net.feature_info.reduction()
        ([128, 256, 512, 1024, 4096], [2, 4, 8, 8, 8])
    """
    if pretrained:
        raise ValueError(
            "pretrained must be False for resnet38, whose weights timm does not host: load a published file with "
            "pixelss.load_resnet38(model, path)."
        )
    features = {"out_indices": (0, 1, 2, 3, 4), "feature_cls": "getter"}
    return build_model_with_cfg(_Classifier, "resnet38", False, feature_cfg=features, **kwargs)
