"""Images (B, 3, H, W) to features (B, C, h, w), with `.out_channels` and `.stride`."""

from pixelss.backbones.any_timm import timm_backbone
from pixelss.backbones.attention import vit_attention
from pixelss.backbones.checkpoints import LoadReport, load_resnet38, resnet38
from pixelss.backbones.norms import freeze_norm
from pixelss.backbones.resnet38 import ResNet38

__all__ = ["LoadReport", "ResNet38", "freeze_norm", "load_resnet38", "resnet38", "timm_backbone", "vit_attention"]
