"""On a pretended CUDA device: the blocks of a training step stay there, mix no devices and ask for no value."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pixelss
from tests.pretend_cuda import MARKS, PretendCUDA, devices
from tests.strategies import convert, make_batch
from tests.test_promises import BLOCKS, FIXED_SHAPE

pytestmark = MARKS


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
    batch = convert(make_batch(images=2, scales=(2, 2), dtype=torch.float32), "cuda")
    assert devices(BLOCKS[name].on(batch)(batch)) == {"cuda"}


def test_attentive_loss_with_tags_on_the_cpu(cuda):
    batch = convert(make_batch(dtype=torch.float32), "cuda")
    tags = torch.ones(batch.tags.shape, device="cpu")
    assert devices(pixelss.multi_scale_attentive_loss(batch.student, batch.teacher, tags)) == {"cuda"}


def test_teacher(cuda):
    student = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), pixelss.CAMHead(8, 3))
    teacher = pixelss.EMATeacher(student)
    teacher.update(student)
    outputs = pixelss.multi_scale_forward(teacher, torch.rand(2, 3, 16, 20))
    assert devices([*outputs, *teacher.state_dict().values()]) == {"cuda"}
