"""Building blocks for weakly supervised semantic segmentation: image-level tags in, pixel masks out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pixelss._pairs import pair_offsets
from pixelss.affinity import AffinityHead, affinity_labels, affinity_loss
from pixelss.attentive import (
    MultiScaleAttentiveLoss,
    attentive_target,
    multi_scale_attentive_loss,
    scale_dissimilarity,
)
from pixelss.backbones.checkpoints import LoadReport, load_resnet38
from pixelss.backbones.resnet38 import ResNet38, freeze_norm, resnet38
from pixelss.cam import CAMHead, CAMOutput, msinf_cam, multi_scale_forward, normalize_cam
from pixelss.contrastive import RegionalContrastiveLoss, regional_contrastive_loss
from pixelss.crf import DenseCRF, background_score, dense_crf, label_probs
from pixelss.lattice import PermutohedralLattice
from pixelss.metrics import ConfusionMatrix, SegmentationScores, SweepScores, ThresholdSweep
from pixelss.prototype import PrototypeBank, class_prototypes
from pixelss.region import ClassRegionMask, class_region_mask, direct_loss
from pixelss.segmentation import LargeFOV, multi_scale_cross_entropy, multi_scale_inference
from pixelss.teacher import EMATeacher
from pixelss.walk import random_walk

if TYPE_CHECKING:
    from pixelss.backbones.timm import timm_backbone

__version__ = "0.1.0.dev0"

__all__ = [
    "AffinityHead",
    "CAMHead",
    "CAMOutput",
    "ClassRegionMask",
    "ConfusionMatrix",
    "DenseCRF",
    "EMATeacher",
    "LargeFOV",
    "LoadReport",
    "MultiScaleAttentiveLoss",
    "PermutohedralLattice",
    "PrototypeBank",
    "RegionalContrastiveLoss",
    "ResNet38",
    "SegmentationScores",
    "SweepScores",
    "ThresholdSweep",
    "affinity_labels",
    "affinity_loss",
    "attentive_target",
    "background_score",
    "class_prototypes",
    "class_region_mask",
    "dense_crf",
    "direct_loss",
    "freeze_norm",
    "label_probs",
    "load_resnet38",
    "msinf_cam",
    "multi_scale_attentive_loss",
    "multi_scale_cross_entropy",
    "multi_scale_forward",
    "multi_scale_inference",
    "normalize_cam",
    "pair_offsets",
    "random_walk",
    "regional_contrastive_loss",
    "resnet38",
    "scale_dissimilarity",
    "timm_backbone",
]


def __getattr__(name: str) -> Any:
    """Import timm (seconds) only where its backbones are asked for."""
    if name == "timm_backbone":
        from pixelss.backbones.timm import timm_backbone

        return timm_backbone
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
