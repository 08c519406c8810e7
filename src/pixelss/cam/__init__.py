"""Features to class activation maps."""

from pixelss._maps import normalize_cam
from pixelss.cam.classifier import classifier_cam
from pixelss.cam.head import CAMHead, CAMOutput
from pixelss.cam.scales import msinf_cam, multi_scale_forward

__all__ = [
    "CAMHead",
    "CAMOutput",
    "classifier_cam",
    "msinf_cam",
    "multi_scale_forward",
    "normalize_cam",
]
