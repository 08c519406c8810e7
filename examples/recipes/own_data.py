"""Your own classes and folders: images, and a CSV `image,tags`, tags split by spaces."""

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
from small import network, scenes


class TaggedFolder(Dataset[tuple[Tensor, Tensor]]):
    """Normalised images of one size, multi-hot tags; `classes` are sorted from the CSV."""

    def __init__(self, root: Path, *, size: int = 80) -> None:
        with (root / "tags.csv").open(newline="") as file:
            self.rows = [
                (root / row["image"], row["tags"].split()) for row in csv.DictReader(file)
            ]
        self.classes = sorted({name for _, names in self.rows for name in names})
        self.size = size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path, names = self.rows[index]
        image = Image.open(path).convert("RGB").resize((self.size, self.size))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        tags = torch.tensor(
            [float(name in names) for name in self.classes]
        )  # no background
        return (pixels - 0.45) / 0.25, tags


def write_example(root: Path) -> None:
    """Write 16 generated images and tags.csv; your own folder takes their place."""
    with (root / "tags.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "tags"])
        for i, scene in enumerate(scenes(16, seed=0)):
            Image.fromarray(scene.image).save(root / f"{i:03d}.png")
            writer.writerow([f"{i:03d}.png", " ".join(sorted(set(scene.names)))])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_example(Path(folder))
        data = TaggedFolder(Path(folder))
        model = network(num_classes=len(data.classes))
        for images, tags in DataLoader(data, batch_size=8, shuffle=True):
            outputs = pixelss.multi_scale_forward(model, images)
            cam = pixelss.msinf_cam([o.cam for o in outputs], tags)
            mask = pixelss.class_region_mask(cam, tags)
    print(f"classes {data.classes}; the last batch's mask {tuple(mask.shape)}")


if __name__ == "__main__":
    main()
