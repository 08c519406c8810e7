"""Your own classes and folders: photographs of any size in a folder, and a table of tags.

Pseudo-labels of them: examples/voc/run.py --data FOLDER --tags tags.csv --out OUT
"""

from __future__ import annotations

import csv
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import pixelss

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "voc"))
from small import network, scenes
from tagged import TaggedFolder


class Squares(Dataset[tuple[Tensor, Tensor]]):
    """A folder's images, normalised and of one size, and their multi-hot tags."""

    def __init__(self, folder: TaggedFolder, *, size: int = 80) -> None:
        self.folder, self.stems, self.size = folder, folder.stems("all"), size

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        stem, sides = self.stems[index], (self.size, self.size)
        image = Image.fromarray(self.folder.image(stem)).resize(sides)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        return (pixels - 0.45) / 0.25, self.folder.tags(stem)  # no background column


def write_example(root: Path) -> None:
    """Write 16 generated images and tags.csv; your own folder takes their place."""
    (root / "garden").mkdir()
    with (root / "tags.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "tags"])
        for i, scene in enumerate(scenes(16, seed=0)):
            image = Image.fromarray(scene.image).crop((0, 0, 96, 80 + i))
            image.save(root / "garden" / f"{i:03d}.png")
            writer.writerow([f"garden/{i:03d}.png", ", ".join(sorted(set(scene.names)))])


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        write_example(Path(name))
        folder = TaggedFolder(Path(name), Path(name, "tags.csv"))
        model = network(num_classes=folder.num_classes)
        for images, tags in DataLoader(Squares(folder), batch_size=8, shuffle=True):
            outputs = pixelss.multi_scale_forward(model, images)
            cam = pixelss.msinf_cam([o.cam for o in outputs], tags)
            mask = pixelss.class_region_mask(cam, tags)
    print(f"classes {folder.classes}; the last batch's mask {tuple(mask.shape)}")


if __name__ == "__main__":
    main()
