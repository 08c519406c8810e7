from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pixelss import PrototypeBank, regional_contrastive_loss
from pixelss._distributed import sum_over_processes
from tests.distributed import run_processes
from tests.strategies import make_batch

SHARES = [(3, 2), (1, 4), (5, 0), (0, 5)]  # images of a batch of five on each of two processes
STEPS = [make_batch(seed, images=5, dtype=torch.float32) for seed in range(3)]
STEPS[1].features[3] = torch.nan  # an image that no process may take
STEPS[2].mask[:] = torch.where(STEPS[2].mask == 1, 255, STEPS[2].mask)  # class 1 keeps its row


def bank_after(shares: tuple[int, ...], rank: int) -> PrototypeBank:
    bank = PrototypeBank(3, 5)
    for step in STEPS:
        bank.update(step.features.split(shares)[rank], step.mask.split(shares)[rank])
    return bank


def loss_and_gradient(shares: tuple[int, ...], rank: int) -> tuple[Tensor, Tensor]:
    """The sum divided by the mean count of a process, averaged over processes as DDP averages gradients."""
    features, mask = (x.split(shares)[rank] for x in (STEPS[0].features, STEPS[0].mask))
    prototypes = STEPS[0].prototypes.clone().requires_grad_()
    count = sum_over_processes(((mask >= 0) & (mask <= 3)).sum()) / len(shares)
    loss = regional_contrastive_loss(features, mask, prototypes, reduction="sum") / count
    loss.backward()
    return tuple(sum_over_processes(x) / len(shares) for x in (loss.detach(), prototypes.grad))


def one_of_two(rank: int) -> dict[str, list[Tensor]]:
    own = torch.tensor([1, 10]) * (rank + 1)
    results = {"sum": [sum_over_processes(own), own], "bank": [], "loss": []}
    for shares in SHARES:
        bank = bank_after(shares, rank)
        results["bank"] += [bank.prototypes, bank.filled]
        results["loss"] += loss_and_gradient(shares, rank)
    if rank == 0:  # would wait for the other process if a loss communicated
        results["alone"] = [regional_contrastive_loss(*STEPS[0][:2], STEPS[0].prototypes)]
    return results


@pytest.fixture(scope="module")
def results() -> list[dict[str, list[Tensor]]]:
    return run_processes(one_of_two, 2)


@pytest.mark.processes
def test_sum_over_processes(results):
    for rank, result in enumerate(results):
        total, own = result["sum"]
        assert total.tolist() == [3, 30]
        assert own.tolist() == [rank + 1, 10 * (rank + 1)]  # left as it is


def test_sum_of_one_process_is_its_own(tmp_path):
    x = torch.ones(2)
    assert sum_over_processes(x) is x
    dist.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        assert sum_over_processes(x) is x
    finally:
        dist.destroy_process_group()
    assert sum_over_processes(x) is x  # the group is looked up each time


@pytest.mark.processes
def test_bank_of_two_processes_equals_one_of_all_images(results):
    whole = bank_after((5,), 0)
    assert whole.filled.all()
    for result in results:
        for prototypes, filled in zip(result["bank"][::2], result["bank"][1::2], strict=True):
            torch.testing.assert_close(prototypes, whole.prototypes)
            assert torch.equal(filled, whole.filled)


@pytest.mark.processes
def test_summed_loss_over_the_global_count_equals_one_process(results):
    prototypes = STEPS[0].prototypes.clone().requires_grad_()
    loss = regional_contrastive_loss(*STEPS[0][:2], prototypes)
    loss.backward()
    for result in results:
        for value, gradient in zip(result["loss"][::2], result["loss"][1::2], strict=True):
            torch.testing.assert_close(value, loss.detach())
            torch.testing.assert_close(gradient, prototypes.grad)


@pytest.mark.processes
def test_a_loss_does_not_communicate(results):
    (alone,) = results[0]["alone"]
    assert torch.equal(alone, regional_contrastive_loss(*STEPS[0][:2], STEPS[0].prototypes))
