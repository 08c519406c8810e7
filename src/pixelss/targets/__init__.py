"""What a loss compares with: masks, prototypes, the teacher."""

from pixelss._prototypes import score_prototypes
from pixelss.targets.boundary import boundary_mask
from pixelss.targets.confident import confident_mask
from pixelss.targets.direction import IntraClassDirection
from pixelss.targets.erasing import choose_class, erasing_mask
from pixelss.targets.hiding import complementary_pair
from pixelss.targets.proportional import proportional_mask
from pixelss.targets.prototype import PrototypeBank, class_prototypes
from pixelss.targets.region import ClassRegionMask, class_region_mask
from pixelss.targets.reliable import reliable_mask
from pixelss.targets.subcategory import subcategory_tags
from pixelss.targets.teacher import EMATeacher

__all__ = [
    "ClassRegionMask",
    "EMATeacher",
    "IntraClassDirection",
    "PrototypeBank",
    "boundary_mask",
    "choose_class",
    "class_prototypes",
    "class_region_mask",
    "complementary_pair",
    "confident_mask",
    "erasing_mask",
    "proportional_mask",
    "reliable_mask",
    "score_prototypes",
    "subcategory_tags",
]
