from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

from pixelss.backbones.norms import freeze_norm
from tests.lazily import Lazily

timm = Lazily("timm")

SIGNATURES = {
    "freeze_norm": "(module)",
}

BLOCKS = {"freeze_norm": "changes a network, no tensor"}


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.SyncBatchNorm(4), nn.GroupNorm(2, 4))


def reload(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("build", [small, lambda: timm.create_model("lcnet_050")])
@pytest.mark.parametrize("again", [lambda net: net, copy.deepcopy, reload, freeze_norm, nn.Sequential])
@torch.no_grad()
def test_freeze_norm_survives_train(build: Callable[[], nn.Module], again: Callable[[nn.Module], nn.Module]) -> None:
    net = build()
    names = list(net.state_dict())
    assert freeze_norm(net) is net
    assert list(net.state_dict()) == names
    net = again(net).train()
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(3, 3, 32, 32) + 2
    trained = net(x)
    assert torch.equal(trained, net.eval()(x))
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    for norm in net.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            assert not any(p.requires_grad for p in norm.parameters())
    free = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.GroupNorm))]
    assert all(p.requires_grad for m in free for p in m.parameters())


def test_without_freeze_norm_the_statistics_move() -> None:
    net = small()[:3].train()
    x = torch.randn(3, 3, 8, 8) + 2
    assert not torch.equal(net(x), net.eval()(x))


def test_freeze_norm_compiles_in_one_graph() -> None:
    net = freeze_norm(small()[:3]).train()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(torch.compile(net, fullgraph=True, backend="eager")(x), net.eval()(x))
