"""Backbones: images (B, 3, H, W) to features (B, C, h, w), with `.out_channels` and `.stride`."""
