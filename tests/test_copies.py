"""A copy of a network never writes into the network, nor shows what the network saw."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pixelss._copies import plain_copy

A, B = torch.rand(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()


class Keeper(nn.Module):
    """A network that reads what a hook has kept: five ways in which people write that."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.kept: dict[str, Tensor] = {}

        def closure(module: nn.Module, args: Any, output: Tensor) -> None:
            self.kept["map"] = output

        def nested(*arguments: Any) -> None:
            closure(*arguments)

        ways: dict[str, Callable[..., None]] = {
            "closure": closure,
            "nested": nested,
            "method": self.keep,
            "partial": partial(Keeper.keep, self),
            "container": partial(keep_in, self.kept),
        }
        self.net[0].register_forward_hook(ways[way])

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept["map"] = output

    def forward(self, x: Tensor) -> Tensor:
        self.net(x)
        return self.kept["map"]


def keep_in(kept: dict[str, Tensor], module: nn.Module, args: Any, output: Tensor) -> None:
    kept["map"] = output


@pytest.mark.parametrize("way", ["closure", "nested", "method", "partial", "container"])
def test_a_copy_keeps_its_own_maps(way):
    network = Keeper(way)
    of_a = network(A)
    copied = plain_copy(network)
    of_b = copied(B)
    assert network.kept["map"] is of_a
    assert torch.equal(of_b, network(B))
    assert not torch.equal(of_a, of_b)


def test_what_a_hook_shares_with_the_outside_stays_shared():
    kept: dict[str, Tensor] = {}
    latest = None

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal latest
        kept["map"] = latest = output

    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    network[0].register_forward_hook(hook)
    copied = plain_copy(network)
    network(A)
    of_b = copied(B)
    assert kept["map"] is of_b
    assert latest is of_b


def test_a_function_that_replaces_forward_is_the_copys():
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    network.forward = lambda x: network[0](x) + 1
    copied = plain_copy(network)
    with torch.no_grad():
        network[0].weight.zero_()
    assert not torch.equal(copied(A), network(A))


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=["weight_norm", "spectral_norm"])
def test_computed_weights(wrap):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        network = nn.Sequential(wrap(nn.Conv2d(3, 4, 3)))
    network(A)  # its weight is no leaf now
    copied = plain_copy(network).eval()
    assert torch.equal(copied(B), network.eval()(B))
    for theirs, ours in zip(network.parameters(), copied.parameters(), strict=True):
        assert theirs.data_ptr() != ours.data_ptr()


def test_kept_activations_of_any_nesting_lose_their_graph():
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    out = network(A)
    network.kept = {"list": [out, (out * 2,)]}
    copied = plain_copy(network)
    assert not any(x.requires_grad for x in (copied.kept["list"][0], copied.kept["list"][1][0]))
    assert torch.equal(copied.kept["list"][0], out)


def test_a_buffer_that_shares_memory_with_itself_gets_its_own():
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    network.register_buffer("ids", torch.zeros(1, dtype=torch.long).expand(4))
    copied = plain_copy(network)
    copied.ids.copy_(torch.arange(4))
    assert copied.ids.tolist() == [0, 1, 2, 3]
    assert not network.ids.any()


def test_handles_of_the_network_do_not_remove_the_copys_hooks():
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    handle = network[0].register_forward_hook(lambda module, args, output: output + 1)
    copied = plain_copy(network)
    handle.remove()
    torch.testing.assert_close(copied(A), network(A) + 1)


@pytest.mark.parametrize(
    "held", [[], torch.ones(3), nn.Parameter(torch.ones(1)), {}], ids=["list", "tensor", "parameter", "dict"]
)
def test_what_a_closure_holds_is_told_by_identity(held):
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    network.held, calls = held, []

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        calls.append(held)

    network[0].register_forward_hook(hook)
    copied = plain_copy(network)
    copied(A)
    assert calls[0] is copied.held
    assert calls[0] is not held
