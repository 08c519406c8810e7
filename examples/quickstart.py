r"""Train a CAM network with and without the self-supervised blocks, score it.

Prints a table and saves a picture.

    python examples/quickstart.py     # generated images, CPU, a few minutes
    python examples/quickstart.py --data VOC2012 --device cuda \
        --backbone resnet38 --weights resnet38.params

One baseline is trained per seed on the classification loss; every row of the
table continues from that checkpoint for the same number of iterations over the
same batches, so that rows differ in their losses alone. The rows' setting was
chosen on the generator's seeds 11 and 12 (python examples/shapes.py DIR
--seed 11, then --data DIR); the images drawn here are seed 0.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from compare import Compared, picture
from numpy.typing import NDArray
from PIL import Image
from shapes import write_shapes
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from tqdm import tqdm

import pixelss

sys.path.insert(0, str(Path(__file__).parent / "voc"))
from config import Network
from data import VOCFolder
from networks import build_backbone
from survey import mask_lines, tag_lines
from texts import read_list, read_names

ROWS = ("baseline", "control", "+RCM", "+MAM", "+RCM+MAM")
SCORE_SCALES = (0.5, 1.0, 1.5, 2.0)
LAG = 3.3  # of the paper's teacher: .01 / (1 - .997), for it has no momentum in effect
POWER = 0.9  # of the rate's decay
CPUINFO = Path("/proc/cpuinfo")  # on Linux


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="a VOC-layout folder; default: generated images")
    add(
        "--out", type=Path, default=Path("runs/quickstart"), help="folder of the picture and results.json (%(default)s)"
    )
    add("--backbone", default="small", help="small, resnet38 or any timm name")
    add("--weights", type=Path, help="a weight file of the backbone; its norms are then frozen")
    add("--seeds", type=int, nargs="+", default=[0], help="one baseline and its rows each (0)")
    add("--device", default="cpu", help="cpu or cuda")
    add(
        "--precision",
        choices=["float32", "bf16"],
        help="of the networks; default: bf16 where the device multiplies it faster, a CPU that has AMX for one",
    )
    add("--form", default="infonce", choices=["infonce", "ratio"], help="of the regional contrastive loss")
    add("--warmup", type=int, default=300, help="iterations of the baseline (%(default)s)")
    add("--iterations", type=int, default=100, help="iterations of every row after it (%(default)s)")
    add("--warmup-lr", type=float, help="of the baseline: momentum 0.9, head x10 on weights; 0.02, with weights 0.005")
    add("--lr", type=float, help="of the rows: head x1, poly decay; 0.01, with weights 0.005")
    add("--momentum", type=float, default=0.9, help="of the rows' SGD (%(default)s)")
    add("--alpha", type=float, help="the teacher's momentum; default: what keeps the paper's lag, 3.3")
    add("--threshold", type=float, default=0.4, help="of the region mask (%(default)s)")
    add("--batch", type=int, default=16, help="images a step (%(default)s)")
    add("--crop", type=int, default=80, help="side of a training crop in pixels (%(default)s)")
    add(
        "--rescale",
        type=float,
        nargs=2,
        default=(0.8, 1.3),
        help="range of the training images' random rescale (0.8 1.3)",
    )
    add("--score-images", type=int, default=120, help="score the first so many images of train.txt (%(default)s)")
    args = parser.parse_args()
    if args.weights and args.backbone == "small":
        parser.error("--weights is of a published backbone: name it with --backbone")
    if args.warmup_lr is None:
        args.warmup_lr = 0.005 if args.weights else 0.02
    if args.lr is None:
        args.lr = 0.005 if args.weights else 0.01
    if not 0 <= args.momentum < 1:
        parser.error(f"--momentum must be at least 0 and below 1, but is {args.momentum}")
    if args.alpha is None:
        args.alpha = 1 - args.lr / (1 - args.momentum) / LAG
    if args.precision is None:
        args.precision = "bf16" if multiplies_bf16(args.device) else "float32"
    return args


def multiplies_bf16(device: str) -> bool:
    """Say whether the device has units for products in bf16: newer GPUs, and CPUs with AMX."""
    if device != "cpu":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return CPUINFO.is_file() and "amx_bf16" in CPUINFO.read_text()


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16")


def pace(args: argparse.Namespace) -> str:
    """Say how far the rows' training goes and the teacher lags, in units of the learning rate times the gradient."""
    rate = args.lr / (1 - args.momentum)
    distance = rate * sum((1 - step / args.iterations) ** POWER for step in range(args.iterations))
    lag = rate / (1 - args.alpha) if args.alpha < 1 else float("inf")
    how_far = f"distance {distance:.1f}, lag {lag:.1f} (in the paper 68 and {LAG})"
    return f"Rows: {args.iterations} iterations, {how_far}; {args.precision}."


@dataclass
class Data:
    """A folder in the VOC layout, its images to train on and to score, and the colours that the backbone expects."""

    folder: VOCFolder
    trained: list[str]
    scored: list[str]
    tags: dict[str, Tensor]
    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    def tensor(self, image: NDArray[np.uint8]) -> Tensor:
        pixels = (image.astype(np.float32) / 255 - self.mean) / self.std
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def batch(self, seed: int, step: int, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
        """Rescaled, flipped, randomly cropped (zero-padded) images and their tags; the same for the same step."""
        rng = np.random.default_rng((seed, step))
        stems = rng.choice(self.trained, args.batch, replace=len(self.trained) < args.batch)
        images = torch.zeros(args.batch, 3, args.crop, args.crop)
        for canvas, stem in zip(images, stems, strict=True):
            image, scale = Image.fromarray(self.folder.image(stem)), rng.uniform(*args.rescale)
            width, height = (max(1, round(side * scale)) for side in image.size)
            pixels = self.tensor(np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)))
            pixels = pixels.flip(-1) if rng.random() < 0.5 else pixels
            for axis in (1, 2):
                slack = pixels.shape[axis] - args.crop
                pixels = pixels.narrow(axis, rng.integers(slack + 1), args.crop) if slack > 0 else pixels
            top, left = (rng.integers(args.crop - side + 1) for side in pixels.shape[1:])
            canvas[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
        return images, torch.stack([self.tags[stem] for stem in stems])


def read_data(args: argparse.Namespace) -> Data:
    """Train on train_aug.txt, or without it on train.txt, and score the first images of train.txt."""
    root = args.data or write_shapes(args.out / "shapes")
    stems = read_list(root, "train")
    larger = (root / "ImageSets" / "Segmentation" / "train_aug.txt").exists()
    trained = read_list(root, "train_aug") if larger else stems
    listed = (root / "classes.txt").exists()
    names = set().union(*(read_names(root / "Annotations" / f"{stem}.xml") for stem in {*trained, *stems}))
    folder = VOCFolder(root, None if listed else sorted(names))
    tags = {stem: folder.tags(stem) for stem in {*trained, *stems}}
    scored = stems[: args.score_images]
    for line in tag_lines(folder, "train_aug" if larger else "train", trained) + mask_lines(folder, "train", scored):
        print(textwrap.fill(line, 80), file=sys.stderr)
    known = timm.get_pretrained_cfg(args.backbone) or timm.models.PretrainedCfg()
    mean, std = (np.array(values, np.float32) for values in (known.mean, known.std))
    return Data(folder, trained, scored, tags, mean, std)


def build_model(args: argparse.Namespace, num_classes: int) -> nn.Sequential:
    """A backbone and a CAM head; with weights its norms stay as they were trained."""
    stride = 8 if args.backbone in ("small", "resnet38") else 16
    backbone = build_backbone(Network(args.backbone, args.weights, output_stride=stride))
    return nn.Sequential(backbone, pixelss.CAMHead(backbone.out_channels, num_classes))


def train(student: nn.Sequential, data: Data, args: argparse.Namespace, seed: int, row: str) -> None:
    """Train in place: the baseline from scratch, any other row with its losses on top of the converged baseline."""
    first = row == "baseline"
    steps, start, lr = (args.warmup, 0, args.warmup_lr) if first else (args.iterations, args.warmup, args.lr)
    head_lr = lr * (10 if args.weights and first else 1)
    groups = [{"params": student[:-1].parameters(), "lr": lr}, {"params": student[-1].parameters(), "lr": head_lr}]
    optimizer = torch.optim.SGD(groups, momentum=0.9 if first else args.momentum, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=POWER)

    teacher = pixelss.EMATeacher(student, momentum=args.alpha)
    region = pixelss.ClassRegionMask(args.threshold)
    bank = pixelss.PrototypeBank(data.folder.num_classes).to(args.device)
    rcl, mal = pixelss.RegionalContrastiveLoss(form=args.form), pixelss.MultiScaleAttentiveLoss()
    student.train()
    torch.manual_seed(seed)
    with ThreadPoolExecutor(1) as pool, tqdm(total=steps, desc=f"seed {seed} {row:9}", ncols=80) as bar:
        upcoming = pool.submit(data.batch, seed, start, args)
        for step in range(start, start + steps):
            images, tags = upcoming.result()
            upcoming = pool.submit(data.batch, seed, step + 1, args)
            images, tags = images.to(args.device, memory_format=torch.channels_last), tags.to(args.device)
            # The step of recipes/plain_loop.py, line by line; a row takes the lines of its blocks.
            with autocast(args):
                student_out = pixelss.multi_scale_forward(student, images)
                loss = torch.stack([bce(o.logits, tags) for o in student_out]).mean()
                if "+" in row:
                    teacher_out = pixelss.multi_scale_forward(teacher, images)
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
            teacher.update(student)
            schedule.step()
            bar.update()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def infer(model: nn.Module, data: Data, stem: str, args: argparse.Namespace) -> list[Tensor]:
    """The CAM of all scales together and of every single one, each with its flip, at the image's size."""
    image, tags = (x.to(args.device)[None] for x in (data.tensor(data.folder.image(stem)), data.tags[stem]))
    with autocast(args):
        outputs = pixelss.multi_scale_forward(model, torch.cat([image, image.flip(-1)]), scales=SCORE_SCALES)
    pairs = [[o.cam[:1], o.cam[1:].flip(-1)] for o in outputs]
    return [pixelss.msinf_cam(cams, tags) for cams in ([cam for pair in pairs for cam in pair], *pairs)]


def score(model: nn.Module, data: Data, args: argparse.Namespace, desc: str) -> list[float]:
    """mIoU, precision, recall (%) and the threshold at the best mIoU; then the best mIoU of every single scale."""
    model.eval()
    sweeps = [pixelss.ThresholdSweep(data.folder.num_classes).to(args.device) for _ in range(1 + len(SCORE_SCALES))]
    for stem in tqdm(data.scored, desc=desc, ncols=80, leave=False):
        mask = torch.from_numpy(data.folder.mask(stem)).to(args.device)[None]
        for sweep, cam in zip(sweeps, infer(model, data, stem, args), strict=True):
            sweep.update(cam, mask)
    whole, *single = (sweep.compute() for sweep in sweeps)
    percent = [100 * values[whole.best].item() for values in (whole.miou, whole.precision, whole.recall)]
    return [*percent, whole.thresholds[whole.best].item(), *(100 * s.miou.max().item() for s in single)]


def against_control(results: dict[str, list[list[float]]], row: str, column: int = 0) -> list[float]:
    """The row's mIoU, or another column, less control's, seed by seed."""
    return [run[column] - control[column] for run, control in zip(results[row], results["control"], strict=True)]


def mean(values: Sequence[float], sign: str = "") -> str:
    return f"{round(statistics.fmean(values), 1) + 0:{sign}.1f}"  # + 0: no "-0.0"


def mean_and_spread(values: Sequence[float], sign: str = "") -> str:
    """The mean over the seeds and, where there are several, half their range."""
    return mean(values, sign) + (f"±{(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else "")


def print_table(results: dict[str, list[list[float]]], images: int) -> None:
    """Print all rows, and in words what they say; fits 80 columns."""
    seeds = len(results["control"])
    over = f"mean of {seeds} seeds ± half their range" if seeds > 1 else "one seed"
    print(f"CAMs of {images} images, in per cent; {over}")
    print(f"{'against':>27}{'best':>29}   mIoU of single scales")
    print(f"{'mIoU':>17}{'control':>10}{'precision':>10}{'recall':>9}{'threshold':>10}", end="")
    print("".join(f"{f'x{scale}':>6}" for scale in SCORE_SCALES))
    for row, runs in results.items():
        miou, precision, recall, threshold, *single = zip(*runs, strict=True)
        gain = "" if row == "control" else mean_and_spread(against_control(results, row), "+")
        print(f"{row:8}{mean_and_spread(miou):>9}{gain:>10}{mean_and_spread(precision):>10}", end="")
        print(f"{mean_and_spread(recall):>9}{statistics.fmean(threshold):>10.2f}", end="")
        print("".join(f"{mean(values):>6}" for values in single))
    print(in_words(results))


def in_words(results: dict[str, list[list[float]]]) -> str:
    """Say whether a row with blocks is above control, by how much, how sure that is, and at which scale most."""
    gains = {row: against_control(results, row) for row in results if "+" in row}
    best, gain = max(gains.items(), key=lambda item: statistics.fmean(item[1]))
    points = round(statistics.fmean(gain), 1)
    by_seed = f"{mean([min(gain)], '+')} to {mean([max(gain)], '+')}"
    trust = f"seeds {by_seed}" if len(gain) > 1 else "one seed"
    if points <= 0:
        how = f"{-points:.1f} below" if points else "level with it"
        return f"No row beats control: {best}, the best, is {how}; {trust}."
    sure = "the best row; " + trust if min(gain) > 0 else "but not in every seed: " + by_seed
    at_scales = {scale: against_control(results, best, 4 + k) for k, scale in enumerate(SCORE_SCALES)}
    scale, most = max(at_scales.items(), key=lambda item: statistics.fmean(item[1]))
    at_best = f"Its best single scale against control is x{scale}: {mean_and_spread(most, '+')}."
    return f"{best} is {points:.1f} points above control, {sure}.\n{at_best}"


def save_picture(
    models: dict[str, nn.Sequential], thresholds: dict[str, float], data: Data, args: argparse.Namespace
) -> None:
    """Show control, and what the blocks change in its masks, for the four scored images of the most classes."""
    compared = []
    for stem in sorted(data.scored, key=lambda stem: -data.tags[stem].sum().item())[:4]:
        cams, tags = {}, data.tags[stem]
        for row in ROWS[1:]:
            cams[row] = infer(models[row].eval(), data, stem, args)[0].cpu()
        masks = {
            row: pixelss.class_region_mask(cam, tags[None], threshold=thresholds[row])[0] for row, cam in cams.items()
        }
        names = [name for name, tag in zip(data.folder.classes, tags, strict=True) if tag]
        truth = torch.from_numpy(data.folder.mask(stem)).long()
        compared.append(Compared(data.folder.image(stem), names, truth, cams["control"].amax((0, 1)), masks))
    Image.fromarray(picture(compared, data.folder.classes)).save(args.out / "quickstart.png")


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = read_data(args)
    results: dict[str, list[list[float]]] = {row: [] for row in ROWS}
    for seed in args.seeds:
        torch.manual_seed(seed)
        models = {"baseline": build_model(args, data.folder.num_classes).to(args.device)}
        for row in ROWS:
            model = models.setdefault(row, copy.deepcopy(models["baseline"]))
            train(model, data, args, seed, row)
        for row, model in models.items():
            results[row].append(score(model, data, args, f"score {row}"))
            torch.save(model.state_dict(), args.out / f"{row.strip('+')}_{seed}.pth")
        report = {"setting": vars(args), "results": results}
        (args.out / "results.json").write_text(json.dumps(report, indent=1, default=str))
    print_table(results, len(data.scored))
    print(pace(args))
    thresholds = {row: runs[-1][3] for row, runs in results.items()}  # of the last seed, as the models are
    save_picture(models, thresholds, data, args)
    print("picture:", args.out / "quickstart.png")


if __name__ == "__main__":
    main()
