"""Building blocks for weakly supervised semantic segmentation: image-level tags in, pixel masks out.

- `backbones`: images to features.
- `cam`: features to class activation maps.
- `targets`: what a loss compares with.
- `losses`: one scalar to minimise.
- `affinity`: affinities of pairs of cells.
- `refine`: scores to better scores and label maps.
- `segmentation`, `metrics`: the network trained on the result, and its figures.
- `io`: files to arrays and back; `viz`: arrays to pictures. Their names are not imported here.
"""

from pixelss.affinity import AffinityHead, affinity_labels, pair_offsets
from pixelss.backbones import LoadReport, ResNet38, freeze_norm, load_resnet38, resnet38, timm_backbone
from pixelss.cam import CAMHead, CAMOutput, classifier_cam, msinf_cam, multi_scale_forward, normalize_cam
from pixelss.losses import (
    MultiScaleAttentiveLoss,
    RegionalContrastiveLoss,
    affinity_loss,
    attentive_target,
    direct_loss,
    multi_scale_attentive_loss,
    multi_scale_cross_entropy,
    regional_contrastive_loss,
    scale_dissimilarity,
)
from pixelss.metrics import ConfusionMatrix, SegmentationScores, SweepScores, ThresholdSweep
from pixelss.refine import (
    DenseCRF,
    PermutohedralLattice,
    background_score,
    dense_crf,
    label_probs,
    pseudo_labels,
    random_walk,
)
from pixelss.segmentation import LargeFOV, multi_scale_inference
from pixelss.targets import (
    ClassRegionMask,
    EMATeacher,
    PrototypeBank,
    class_prototypes,
    class_region_mask,
    confident_mask,
)

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
    "classifier_cam",
    "confident_mask",
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
    "pseudo_labels",
    "random_walk",
    "regional_contrastive_loss",
    "resnet38",
    "scale_dissimilarity",
    "timm_backbone",
]
