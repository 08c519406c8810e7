"""What a user's type checker sees: README's blocks and a file of many names pass `mypy --strict`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy is not installed")

ROOT = Path(__file__).resolve().parents[1]
USER = """
import torch
from torch import Tensor, nn

import pixelss
from pixelss import CAMHead, CAMOutput, EMATeacher, PrototypeBank, RegionalContrastiveLoss, timm_backbone

images, tags, mask = torch.rand(2, 3, 64, 64), torch.ones(2, 4), torch.zeros(2, 64, 64, dtype=torch.long)
backbone = timm_backbone("resnet18", output_stride=8)
channels: int = backbone.out_channels + backbone.stride
x = backbone(images)
reveal_type(x)  # Tensor
head = CAMHead(backbone.out_channels, num_classes=4)
output = head(x)
reveal_type(output)  # CAMOutput
reveal_type(output.cam)  # Tensor
trained = pixelss.classifier_cam(nn.Linear(3, 4))
reveal_type(trained(images))  # CAMOutput
outputs = pixelss.multi_scale_forward(trained, images, flip=True)
reveal_type(outputs)  # CAMOutput
model = nn.Sequential(backbone, head)
teacher = EMATeacher(model)
teacher.update(model, momentum=0.9)
pixelss.multi_scale_forward(teacher, images)
cam = pixelss.normalize_cam(output.cam, kind="minmax")
cam = pixelss.msinf_cam([one.cam for one in outputs], tags)
region = pixelss.ClassRegionMask()
reveal_type(region(cam, tags))  # Tensor
mask = pixelss.class_region_mask(cam, tags)
bank = PrototypeBank(4, dim=None)
bank.update(output.features, mask)
prototypes, counts = pixelss.class_prototypes(output.features, mask, 4)
rcl = RegionalContrastiveLoss(form="ratio", reduction="sum")
reveal_type(rcl(output.features, mask, bank.prototypes, bank.filled))  # Tensor
mal = pixelss.MultiScaleAttentiveLoss(reduction="sum")
reveal_type(mal([cam], [cam], tags))  # Tensor
loss = pixelss.direct_loss(cam, mask, tags) + pixelss.multi_scale_cross_entropy([output.cam], mask)
crf = pixelss.DenseCRF(iterations=2)
probs = pixelss.label_probs(mask, 4)
reveal_type(crf(images, probs))  # Tensor
resnet = pixelss.resnet38()
reveal_type(resnet(images))  # Tensor
affinity = pixelss.AffinityHead()(resnet.forward_taps(images))
reveal_type(affinity)  # Tensor
walked = pixelss.random_walk(probs, affinity)
labels = pixelss.affinity_labels(mask, mask)
reveal_type(pixelss.LargeFOV(512, 4)(x))  # Tensor
metric = pixelss.ConfusionMatrix(5)
metric.update(mask, mask)
reveal_type(pixelss.BoundaryHead((512,))([x]))  # Tensor
reveal_type(pixelss.PixelCorrelation((512,), dims=(64,))([x], images, output.cam))  # Tensor
reveal_type(pixelss.PixelAdaptiveRefinement()(images, probs))  # Tensor
scores: pixelss.SegmentationScores = metric.compute()
frozen: nn.Sequential = pixelss.freeze_norm(model)


def step(output: CAMOutput) -> Tensor:
    return output.logits.mean()
"""
WRONG = """
import pixelss

pixelss.RegionalContrastiveLoss(form="infonec")
pixelss.MultiScaleAttentiveLoss(reduction="none")
pixelss.normalize_cam(pixelss.CAMHead(3, 4), kind="max")
pixelss.attention_affinity([], reduce="max")
"""


def check(folder: Path) -> str:
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", str(folder / "cache")]
    environment = {"MYPYPATH": str(ROOT / "src"), "PATH": ""}
    command += [
        "--follow-imports",
        "silent",
        "--config-file",
        str(folder / "mypy.ini"),
        *sorted(map(str, folder.glob("*.py"))),
    ]
    (folder / "mypy.ini").write_text("[mypy]\nuntyped_calls_exclude = torch\n")
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert not run.stderr
    return run.stdout


@pytest.mark.slow
def test_users_files_pass_mypy_strict(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for i, block in enumerate(blocks):
        (tmp_path / f"readme_{i}.py").write_text(block)
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "wrong.py").write_text(WRONG)
    lines = check(tmp_path).splitlines()
    errors = [line for line in lines if ": error: " in line]
    assert not [line for line in errors if "wrong.py" not in line]
    assert [int(line.split(":")[1]) for line in errors] == [4, 5, 6, 7]
    told = {int(line.split(":")[1]): line.split("Revealed type is ")[1] for line in lines if "Revealed type" in line}
    expected = {
        i: line.partition("# ")[2] for i, line in enumerate(USER.splitlines(), 1) if line.startswith("reveal_type")
    }
    assert told.keys() == expected.keys()
    for i, name in expected.items():
        bare = re.sub(r"[\w.]+\.(?=\w+)", "", told[i]).strip('"')
        assert name in bare, (USER.splitlines()[i - 1], told[i])
