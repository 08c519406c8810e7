"""One scalar to minimise."""

from pixelss.losses.affinity import affinity_loss
from pixelss.losses.attentive import (
    MultiScaleAttentiveLoss,
    attentive_target,
    multi_scale_attentive_loss,
    scale_dissimilarity,
)
from pixelss.losses.boundary import boundary_loss
from pixelss.losses.complementary import complementary_loss
from pixelss.losses.contrastive import RegionalContrastiveLoss, regional_contrastive_loss
from pixelss.losses.cross_entropy import balanced_cross_entropy, multi_scale_cross_entropy, underfit_cross_entropy
from pixelss.losses.difference import difference_loss
from pixelss.losses.direct import direct_loss
from pixelss.losses.displacement import displacement_loss
from pixelss.losses.energy import dense_energy_loss, energy_lattices
from pixelss.losses.equivariance import cross_equivariance_loss, equivariance_loss, min_pooling_loss
from pixelss.losses.erasing import class_erasing_loss
from pixelss.losses.intra_class import intra_class_loss
from pixelss.losses.pixel_prototype import pixel_prototype_loss
from pixelss.losses.puzzle import merge_tiles, reconstruction_loss, split_tiles
from pixelss.losses.reactivation import reactivation_loss
from pixelss.losses.segment_contrast import segment_contrast
from pixelss.losses.token_contrast import class_token_contrast, patch_token_contrast, token_affinity_loss

__all__ = [
    "MultiScaleAttentiveLoss",
    "RegionalContrastiveLoss",
    "affinity_loss",
    "attentive_target",
    "balanced_cross_entropy",
    "boundary_loss",
    "class_erasing_loss",
    "class_token_contrast",
    "complementary_loss",
    "cross_equivariance_loss",
    "dense_energy_loss",
    "difference_loss",
    "direct_loss",
    "displacement_loss",
    "energy_lattices",
    "equivariance_loss",
    "intra_class_loss",
    "merge_tiles",
    "min_pooling_loss",
    "multi_scale_attentive_loss",
    "multi_scale_cross_entropy",
    "patch_token_contrast",
    "pixel_prototype_loss",
    "reactivation_loss",
    "reconstruction_loss",
    "regional_contrastive_loss",
    "scale_dissimilarity",
    "segment_contrast",
    "split_tiles",
    "token_affinity_loss",
    "underfit_cross_entropy",
]
