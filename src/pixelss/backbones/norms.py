"""Batch norms that stay as they were trained."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def freeze_norm(module: ModuleT) -> ModuleT:
    """Keep every batch norm inside `module` as it is: stored statistics, no training of scale and shift.

    It holds for any network and survives `.train()`, a deep copy and pickling: a hook puts each norm back into
    eval mode whenever it runs. Names and number of tensors stay. Layer and group norms are left alone. Freeze
    after any conversion that makes new norms, such as `convert_sync_batchnorm`.

    Args:
        module: any network, changed in place.

    Returns:
        `module` itself.

    Reference:
        Ahn 2018, "Learning Pixel-level Semantic Affinity", trains ResNet38 so.

    Example:
        >>> import torch
        >>> net = freeze_norm(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())).train()
        >>> x = torch.rand(2, 3, 4, 4)
        >>> torch.equal(net(x), net.eval()(x))
        True
    """
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            norm.eval().requires_grad_(False)
            norm.register_forward_pre_hook(_stay_in_eval)
    return module


def _stay_in_eval(norm: nn.Module, _: object) -> None:
    if norm.training:  # asked first, since torch.compile before 2.5 cannot trace the change
        norm.eval()
