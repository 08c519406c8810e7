"""On a pretended CUDA device: the steps of examples/voc stay there, mix no devices and ask for no value."""

from __future__ import annotations

from pathlib import Path

import field_terms
import pytest
import torch
from batches import Batch
from config import CAM, Config, Gate, Network
from networks import build_affinity, build_cam, build_segmentation
from tables import ROWS, changed
from train_affinity import kind_by_kind, subsampled
from train_cam import Objective

import pixelss
from tests.pretend_cuda import MARKS, PretendCUDA, devices

pytestmark = MARKS
UNLIKE = {tuple(changes): row for row, changes in ROWS.items()}.values()  # once what differs in a number alone


@pytest.fixture
def cuda():
    """Everything that is made within it lies on the pretended device, unless it says otherwise."""
    with PretendCUDA(), torch.device("cuda"):
        yield


@pytest.mark.parametrize(("backbone", "row"), [*(("small", row) for row in UNLIKE), ("resnet38", "baseline")])
def test_step_of_train_cam(backbone, row, cuda, monkeypatch):
    monkeypatch.setattr(field_terms, "load_start", lambda network, folder: None)  # no file lies on a pretended device
    cam = CAM(mam_gate=Gate(iterations=0), start_from=Path("start"))
    config = changed(Config(network=Network(backbone, dim=16), cam=cam), row)
    student = build_cam(config, 5)
    objective = Objective(config, student, 5, 100)
    tags = torch.ones(2, 5, device="cpu")  # as to_device leaves them
    places = torch.arange(2, device="cpu")
    batch = Batch(torch.rand(2, 3, 48, 48), tags, torch.zeros(2, 0, 48, 48, dtype=torch.uint8), places)
    for report in {False, row in ("baseline", "MAM+RCM")}:  # of a teacher that the step needs not, and does
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
