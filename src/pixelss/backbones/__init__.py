"""Backbones: networks that map images (B, 3, H, W) to features (B, C, h, w) and tell `.out_channels` and `.stride`."""
