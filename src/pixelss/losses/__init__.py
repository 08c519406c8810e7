"""One scalar to minimise."""

from pixelss.losses.affinity import affinity_loss
from pixelss.losses.attentive import (
    MultiScaleAttentiveLoss,
    attentive_target,
    multi_scale_attentive_loss,
    scale_dissimilarity,
)
from pixelss.losses.contrastive import RegionalContrastiveLoss, regional_contrastive_loss
from pixelss.losses.cross_entropy import multi_scale_cross_entropy
from pixelss.losses.direct import direct_loss

__all__ = [
    "MultiScaleAttentiveLoss",
    "RegionalContrastiveLoss",
    "affinity_loss",
    "attentive_target",
    "direct_loss",
    "multi_scale_attentive_loss",
    "multi_scale_cross_entropy",
    "regional_contrastive_loss",
    "scale_dissimilarity",
]
