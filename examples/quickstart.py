"""Train a CAM network with and without the self-supervised blocks, score its CAMs, print a table, save a picture.

    python examples/quickstart.py                                          # generated images, CPU, a few minutes
    python examples/quickstart.py --data VOC2012 --backbone resnet38 --weights resnet38.params --device cuda

One baseline is trained per seed on the classification loss; every row of the table continues from that checkpoint
for the same number of iterations over the same batches, so that rows differ in their losses alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from shapes import write_shapes
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

import pixelss
from pixelss import viz

ROWS = ("baseline", "control", "+RCM", "+MAM", "+RCM+MAM")
TRAIN_SCALES, SCORE_SCALES = (0.5, 1.0, 2.0), (0.5, 1.0, 1.5, 2.0)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="a VOC-layout folder; default: generated images")
    add("--out", type=Path, default=Path("runs/quickstart"), help="folder of the picture and results.json")
    add("--backbone", default="small", help="small, resnet38 or any timm name")
    add("--weights", type=Path, help="a weight file of the backbone; its norms are then frozen")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--device", default="cpu")
    add("--form", default="infonce", choices=["infonce", "ratio"], help="of the regional contrastive loss")
    add("--warmup", type=int, default=300, help="iterations of the baseline")
    add("--iterations", type=int, default=100, help="iterations of every row after it")
    add("--warmup-lr", type=float, default=0.02, help="of the baseline: momentum 0.9, head x10 on given weights")
    add("--lr", type=float, default=0.02, help="of the rows: no momentum, head x1, poly decay")
    add("--batch", type=int, default=16)
    add("--crop", type=int, default=80, help="side of a training crop in pixels")
    add("--rescale", type=float, nargs=2, default=(0.8, 1.3), help="range of the training images' random rescale")
    add("--score-images", type=int, default=120, help="score the first so many images of train.txt")
    args = parser.parse_args()
    if args.weights and args.backbone == "small":
        parser.error("--weights is of a published backbone: name it with --backbone")
    return args


class VOCFolder:
    """A folder in the VOC layout; classes from classes.txt, in the masks' order, or sorted from the annotations."""

    def __init__(self, root: Path, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.root, self.mean, self.std = root, np.array(mean, np.float32), np.array(std, np.float32)
        lists = root / "ImageSets" / "Segmentation"
        self.scored = (lists / "train.txt").read_text().split()
        larger = lists / "train_aug.txt"
        self.trained = larger.read_text().split() if larger.exists() else self.scored
        names = {stem: self.names(stem) for stem in self.trained + self.scored}
        listed = root / "classes.txt"
        self.classes = listed.read_text().splitlines() if listed.exists() else sorted(set().union(*names.values()))
        self.tags = {s: torch.tensor([float(c in tags) for c in self.classes]) for s, tags in names.items()}

    def names(self, stem: str) -> set[str]:
        objects = ET.parse(self.root / "Annotations" / f"{stem}.xml").iterfind("object/name")
        return {str(name.text) for name in objects}

    def image(self, stem: str) -> Image.Image:
        return Image.open(self.root / "JPEGImages" / f"{stem}.jpg").convert("RGB")

    def tensor(self, image: Image.Image) -> Tensor:
        pixels = (np.asarray(image, dtype=np.float32) / 255 - self.mean) / self.std
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def mask(self, stem: str) -> Tensor:
        return torch.from_numpy(np.array(Image.open(self.root / "SegmentationClass" / f"{stem}.png")))

    def batch(self, seed: int, step: int, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
        """Rescaled, flipped, randomly cropped (zero-padded) images and their tags; the same for the same step."""
        rng = np.random.default_rng((seed, step))
        stems = rng.choice(self.trained, args.batch, replace=len(self.trained) < args.batch)
        images = torch.zeros(args.batch, 3, args.crop, args.crop)
        for canvas, stem in zip(images, stems, strict=True):
            image, scale = self.image(stem), rng.uniform(*args.rescale)
            width, height = (max(1, round(side * scale)) for side in image.size)
            pixels = self.tensor(image.resize((width, height), Image.Resampling.BILINEAR))
            pixels = pixels.flip(-1) if rng.random() < 0.5 else pixels
            for axis in (1, 2):
                slack = pixels.shape[axis] - args.crop
                pixels = pixels.narrow(axis, rng.integers(slack + 1), args.crop) if slack > 0 else pixels
            top, left = (rng.integers(args.crop - side + 1) for side in pixels.shape[1:])
            canvas[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
        return images, torch.stack([self.tags[stem] for stem in stems])


def build_model(args: argparse.Namespace, num_classes: int) -> nn.Sequential:
    """A backbone and a CAM head; with weights its norms stay as they were trained."""
    backbone: Any
    if args.backbone == "small":
        layers: list[nn.Module] = []
        for c_in, c_out, stride in ((3, 32, 2), (32, 64, 2), (64, 128, 2), (128, 128, 1), (128, 128, 1)):
            dilation = 3 - stride
            conv = nn.Conv2d(c_in, c_out, 3, stride, dilation, dilation, bias=False)
            layers += [conv, nn.GroupNorm(8, c_out), nn.ReLU()]
        return nn.Sequential(nn.Sequential(*layers), pixelss.CAMHead(128, num_classes))
    if args.backbone == "resnet38":
        backbone = pixelss.resnet38(args.weights)
        backbone = backbone.freeze_stem() if args.weights else backbone
    else:
        build = partial(pixelss.timm_backbone, args.backbone, output_stride=16)
        backbone = build(pretrained=True, pretrained_cfg_overlay={"file": args.weights}) if args.weights else build()
    if args.weights:
        pixelss.freeze_norm(backbone)
    return nn.Sequential(backbone, pixelss.CAMHead(backbone.out_channels, num_classes))


def train(model: nn.Sequential, data: VOCFolder, args: argparse.Namespace, seed: int, row: str) -> None:
    """Train in place: the baseline from scratch, any other row with its losses on top of the converged baseline."""
    first = row == "baseline"
    steps, start, lr = (args.warmup, 0, args.warmup_lr) if first else (args.iterations, args.warmup, args.lr)
    head_lr = lr * (10 if args.weights and first else 1)
    groups = [{"params": model[:-1].parameters(), "lr": lr}, {"params": model[-1].parameters(), "lr": head_lr}]
    optimizer = torch.optim.SGD(groups, momentum=0.9 if first else 0, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)

    teacher = pixelss.EMATeacher(model)
    region, mal = pixelss.ClassRegionMask(), pixelss.MultiScaleAttentiveLoss()
    rcl, bank = (
        pixelss.RegionalContrastiveLoss(form=args.form),
        pixelss.PrototypeBank(len(data.classes)).to(args.device),
    )
    model.train()
    torch.manual_seed(seed)
    with ThreadPoolExecutor(1) as pool, tqdm(total=steps, desc=f"seed {seed} {row:9}", ncols=80) as bar:
        upcoming = pool.submit(data.batch, seed, start, args)
        for step in range(start, start + steps):
            images, tags = upcoming.result()
            upcoming = pool.submit(data.batch, seed, step + 1, args)
            images, tags = images.to(args.device, memory_format=torch.channels_last), tags.to(args.device)
            student_out = pixelss.multi_scale_forward(model, images, scales=TRAIN_SCALES)
            loss = torch.stack([binary_cross_entropy_with_logits(o.logits, tags) for o in student_out]).mean()
            if "+" in row:
                teacher_out = pixelss.multi_scale_forward(teacher, images, scales=TRAIN_SCALES)
            if "RCM" in row:
                mask = region(pixelss.msinf_cam([o.cam for o in teacher_out], tags), tags)
                bank.update(teacher_out[1].features, mask)
                loss = loss + rcl(student_out[1].features, mask, bank.prototypes, bank.filled)
            if "MAM" in row:
                cams = [[pixelss.normalize_cam(o.cam) for o in out] for out in (student_out, teacher_out)]
                loss = loss + mal(*cams, tags)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            teacher.update(model)
            bar.update()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def infer(model: nn.Module, data: VOCFolder, stem: str, device: str) -> list[Tensor]:
    """The CAM of all scales together and of every single one, each with its flip, at the image's size."""
    image, tags = (x.to(device)[None] for x in (data.tensor(data.image(stem)), data.tags[stem]))
    outputs = pixelss.multi_scale_forward(model, torch.cat([image, image.flip(-1)]), scales=SCORE_SCALES)
    pairs = [[o.cam[:1], o.cam[1:].flip(-1)] for o in outputs]
    return [pixelss.msinf_cam(cams, tags) for cams in ([cam for pair in pairs for cam in pair], *pairs)]


def score(model: nn.Module, data: VOCFolder, args: argparse.Namespace, desc: str) -> list[float]:
    """mIoU, precision, recall (%) and the threshold at the best mIoU; then the best mIoU of every single scale."""
    model.eval()
    sweeps = [pixelss.ThresholdSweep(len(data.classes)).to(args.device) for _ in range(1 + len(SCORE_SCALES))]
    for stem in tqdm(data.scored[: args.score_images], desc=desc, ncols=80, leave=False):
        for sweep, cam in zip(sweeps, infer(model, data, stem, args.device), strict=True):
            sweep.update(cam, data.mask(stem).to(args.device)[None])
    whole, *single = (sweep.compute() for sweep in sweeps)
    percent = [100 * values[whole.best].item() for values in (whole.miou, whole.precision, whole.recall)]
    return [*percent, whole.thresholds[whole.best].item(), *(100 * s.miou.max().item() for s in single)]


def print_table(results: dict[str, list[list[float]]]) -> None:
    """Mean over the seeds, and half the range where there are several; fits 80 columns."""
    print(f"{'':9}{'mIoU':>9}{'prec.':>9}{'recall':>9}{'best t':>7}" + "".join(f"{f'x{s}':>9}" for s in SCORE_SCALES))
    for row, runs in results.items():
        columns = [(statistics.fmean(v), (max(v) - min(v)) / 2) for v in zip(*runs, strict=True)]
        cells = [f"{mean:.1f}" + f"±{spread:.1f}" * (len(runs) > 1) for mean, spread in columns]
        cells[3] = f"{columns[3][0]:.2f}"
        print(f"{row:9}" + "".join(f"{cell:>{7 if i == 3 else 9}}" for i, cell in enumerate(cells)))


def save_picture(models: dict[str, nn.Sequential], data: VOCFolder, args: argparse.Namespace) -> None:
    """Image, truth and the strongest CAM of every row, for the four scored images of the most classes."""
    stems = sorted(data.scored[: args.score_images], key=lambda stem: -data.tags[stem].sum().item())[:4]
    lines = []
    for stem in stems:
        image = np.asarray(data.image(stem))
        cams = (infer(model.eval(), data, stem, args.device)[0] for model in models.values())
        overlays = [viz.overlay_cam(image, cam.amax((0, 1)).cpu()) for cam in cams]
        lines.append([image, viz.overlay_mask(image, data.mask(stem)), *overlays])
    shown = torch.stack([data.tags[stem] for stem in stems]).amax(0)
    colours = zip(data.classes, viz.voc_palette()[1:], strict=False)
    legend = {name: colour for (name, colour), tag in zip(colours, shown, strict=True) if tag}
    titles = ["image", "truth", *models]
    picture = viz.grid(lines, titles=titles, legend={**legend, "void": viz.voc_palette()[255]}, heat="CAM", cell=120)
    Image.fromarray(picture).save(args.out / "quickstart.png")


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    trained_on = timm.get_pretrained_cfg(args.backbone) or timm.models.PretrainedCfg()
    data = VOCFolder(args.data or write_shapes(args.out / "shapes"), trained_on.mean, trained_on.std)
    results: dict[str, list[list[float]]] = {row: [] for row in ROWS}
    for seed in args.seeds:
        torch.manual_seed(seed)
        models = {"baseline": build_model(args, len(data.classes)).to(args.device)}
        for row in ROWS:
            model = models.setdefault(row, copy.deepcopy(models["baseline"]))
            train(model, data, args, seed, row)
        for row, model in models.items():
            results[row].append(score(model, data, args, f"score {row}"))
            torch.save(model.state_dict(), args.out / f"{row.strip('+')}_{seed}.pth")
        report = {"setting": vars(args), "results": results}
        (args.out / "results.json").write_text(json.dumps(report, indent=1, default=str))
    print_table(results)
    save_picture(models, data, args)
    print("picture:", args.out / "quickstart.png")


if __name__ == "__main__":
    main()
