"""Building blocks for weakly supervised semantic segmentation: image-level tags in, pixel masks out."""

__version__ = "0.1.0.dev0"
