"""On a pretended CUDA device: the blocks of a training step stay there, mix no devices and ask for no value."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pretend_cuda import PretendCUDA, devices
from strategies import convert, make_batch
from test_affinity import make_maps, make_pairs, make_scores
from test_promises import BLOCKS, FIXED_SHAPE
from torch import nn

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "voc")]

from batches import Batch  # noqa: E402
from config import CAM, Config, Gate, Network  # noqa: E402
from networks import build_affinity, build_cam, build_segmentation  # noqa: E402
from tables import ROWS  # noqa: E402
from train_affinity import kind_by_kind, subsampled  # noqa: E402
from train_cam import Objective  # noqa: E402

import pixelss  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


@pytest.fixture
def cuda():
    """Everything that is made within it lies on the pretended device, unless it says otherwise."""
    with PretendCUDA(), torch.device("cuda"):
        yield


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: torch.zeros(3, device="cpu").copy_(x),
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x + torch.ones(3, device="cpu"),
    ],
)
def test_the_pretended_device_refuses_to_wait_and_to_mix(wait, cuda):
    x = torch.rand(3)
    assert devices([x, torch.ones(3, device="cpu")]) == {"cuda", "cpu"}
    with pytest.raises(Exception, match=r"waits|data|dynamic|nonzero|scalar|devices"):
        wait(x)


@pytest.mark.parametrize("name", FIXED_SHAPE)
def test_block(name, cuda):
    assert devices(BLOCKS[name](convert(make_batch(dtype=torch.float32), "cuda"))) == {"cuda"}


def test_bank(cuda):
    batch, bank = convert(make_batch(dtype=torch.float32), "cuda"), pixelss.PrototypeBank(3, 5)
    bank.update(batch.features, batch.mask)
    assert devices(bank.state_dict()) == {"cuda"}


def test_attentive_loss_with_tags_on_the_cpu(cuda):
    batch = convert(make_batch(dtype=torch.float32), "cuda")
    tags = torch.ones(batch.tags.shape, device="cpu")
    assert devices(pixelss.multi_scale_attentive_loss(batch.student, batch.teacher, tags)) == {"cuda"}


def test_affinities(cuda):
    inputs = *make_pairs(dtype=torch.float32), *make_maps(), make_scores().float()
    affinity, labels, low, high, scores = (x.to("cuda") for x in inputs)
    head, taps = pixelss.AffinityHead((3, 4), dims=(2, 3)), [torch.rand(2, c, 8, 8) for c in (3, 4)]
    results = [
        pixelss.affinity_labels(low, high),
        pixelss.affinity_loss(affinity, labels),
        pixelss.random_walk(scores, affinity),
        head(taps),
    ]
    assert devices(results) == {"cuda"}


def test_segmentation(cuda):
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 8, 1), pixelss.LargeFOV(8, 3, norm=True)).eval()
    assert devices(pixelss.multi_scale_inference(network, torch.rand(2, 3, 40, 48), tile=32)) == {"cuda"}


def test_teacher(cuda):
    student = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), pixelss.CAMHead(8, 3))
    teacher = pixelss.EMATeacher(student)
    teacher.update(student)
    outputs = pixelss.multi_scale_forward(teacher, torch.rand(2, 3, 16, 20))
    assert devices([*outputs, *teacher.state_dict().values()]) == {"cuda"}


@pytest.mark.parametrize(("backbone", "row"), [*(("small", row) for row in ROWS), ("resnet38", "MAM+RCM")])
def test_step_of_train_cam(backbone, row, cuda):
    names = {name.removeprefix("cam."): value for name, value in ROWS[row].items()}
    config = Config(network=Network(backbone, dim=16), cam=replace(CAM(mam_gate=Gate(iterations=0)), **names))
    student = build_cam(config, 5)
    objective = Objective(config, student, 5, 100)
    tags = torch.ones(2, 5, device="cpu")  # as to_device leaves them
    batch = Batch(torch.rand(2, 3, 48, 48), tags, torch.zeros(2, 0, 48, 48, dtype=torch.uint8))
    for report in (False, True):
        assert devices(objective(student, batch, 0, report)) == {"cuda"}
    objective.teacher.update(student)
    assert all(devices(module.state_dict()) == {"cuda"} for module in objective.modules.values())


def test_steps_of_the_other_trainings(cuda):
    config, images = Config(network=Network("resnet38")), torch.rand(1, 3, 48, 48)
    affinity, maps = build_affinity(config)(images), torch.zeros(1, 48, 48, dtype=torch.uint8)
    low, high = (subsampled(maps, affinity.shape[-2:]) for _ in range(2))
    assert devices(kind_by_kind(affinity, pixelss.affinity_labels(low, high))) == {"cuda"}
    logits = [build_segmentation(config, 5)(images)]
    assert devices(pixelss.multi_scale_cross_entropy(logits, maps.long())) == {"cuda"}
