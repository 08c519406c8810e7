"""Features to class activation maps."""

from pixelss._maps import normalize_cam
from pixelss.cam.classifier import classifier_cam
from pixelss.cam.climbing import climb_cam
from pixelss.cam.correlation import PixelCorrelation, pixel_correlation
from pixelss.cam.head import CAMHead, CAMOutput
from pixelss.cam.scales import msinf_cam, multi_scale_forward
from pixelss.cam.tokens import class_token_cam

__all__ = [
    "CAMHead",
    "CAMOutput",
    "PixelCorrelation",
    "class_token_cam",
    "classifier_cam",
    "climb_cam",
    "msinf_cam",
    "multi_scale_forward",
    "normalize_cam",
    "pixel_correlation",
]
