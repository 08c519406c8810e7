"""A bank that takes its width from the first features: `PrototypeBank(num_classes, dim=None)`."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pixelss import PrototypeBank
from tests.distributed import run_processes


def batch(dim: int = 5, images: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.rand(images, dim, 3, 4, generator=g), torch.randint(0, 4, (images, 6, 8), generator=g)


def same(one: PrototypeBank, other: PrototypeBank) -> bool:
    return torch.equal(one.prototypes, other.prototypes) and torch.equal(one.filled, other.filled)


def test_the_width_is_that_of_the_first_features() -> None:
    bank, known = PrototypeBank(3, dim=None), PrototypeBank(3, 5)
    assert (bank.dim, bank.prototypes.shape) == (None, (4, 0))
    held = bank.prototypes
    for one in (bank, known):
        one.update(*batch())
        one.update(*batch())
    assert (bank.dim, known.dim) == (5, 5)
    assert same(bank, known)
    assert held is bank.prototypes
    with pytest.raises(ValueError, match=r"features must have shape \(B, D=5, h, w\).*D is 6. dim must be"):
        bank.update(*batch(6))


def test_an_empty_batch_knows_the_width() -> None:
    bank = PrototypeBank(3, None)
    bank.update(*batch(images=0))
    assert (bank.dim, bank.filled.any().item(), bank.prototypes.any().item()) == (5, False, False)


def test_bad_features_leave_the_width_open() -> None:
    bank = PrototypeBank(3, None)
    with pytest.raises(ValueError, match="features must have shape"):
        bank.update(torch.rand(2, 5), batch()[1])
    with pytest.raises(ValueError, match="mask must have shape"):
        bank.update(batch()[0], torch.zeros(1, 2, 2, dtype=torch.long))
    assert bank.dim is None


def test_a_dtype_is_kept() -> None:
    bank = PrototypeBank(3, None).double()
    bank.update(*batch())
    assert bank.prototypes.dtype == torch.float64


UNSEEN, SEEN, FIXED, FIXED_SEEN = "unseen", "seen", "fixed", "fixed and seen"


def make(kind: str) -> PrototypeBank:
    bank = PrototypeBank(3, 5 if kind in (FIXED, FIXED_SEEN) else None)
    if kind in (SEEN, FIXED_SEEN):
        features, mask = batch()
        bank.update(features + 1, mask)
    return bank


@pytest.mark.parametrize("target", [UNSEEN, SEEN, FIXED, FIXED_SEEN])
@pytest.mark.parametrize("source", [UNSEEN, SEEN, FIXED, FIXED_SEEN])
@pytest.mark.parametrize("nested", [False, True])
def test_every_state_loads_everywhere(source: str, target: str, nested: bool, tmp_path: Path) -> None:
    saved, bank = make(source), make(target)
    parents = [nn.ModuleDict({"bank": one}) if nested else one for one in (saved, bank)]
    torch.save(parents[0].state_dict(), tmp_path / "state.pt")
    parents[1].load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(bank.filled, saved.filled)
    if bank.filled.any():
        assert same(bank, saved)
    else:
        assert not bank.prototypes.any()
    for one in (bank, saved):  # and go on alike
        one.update(*batch())
    assert same(bank, saved)


def test_an_unseen_state_opens_the_width_again() -> None:
    bank = make(SEEN)
    bank.load_state_dict(make(UNSEEN).state_dict())
    assert bank.dim is None
    bank.update(*batch(7))
    assert bank.dim == 7


def test_a_state_of_another_width_does_not_fit_a_fixed_bank() -> None:
    other = PrototypeBank(3, 7)
    with pytest.raises(RuntimeError, match="size mismatch for prototypes"):
        make(FIXED).load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for filled"):
        make(UNSEEN).load_state_dict(PrototypeBank(4, 5).state_dict())


def test_a_copy_and_a_reset_keep_the_width() -> None:
    bank = make(SEEN)
    assert same(copy.deepcopy(bank), bank)
    bank.reset()
    assert bank.dim == 5
    assert "dim=5" in repr(bank)
    assert "dim=None" in repr(PrototypeBank(2, None))


def shard(rank: int) -> tuple[dict[str, torch.Tensor], str]:
    features, mask = batch(images=3)
    part = slice(0, 3) if rank else slice(3, 3)  # one process has no image
    bank = PrototypeBank(3, None)
    bank.update(features[part], mask[part])
    with pytest.raises(ValueError, match="in this one") as refused:
        PrototypeBank(3, None).update(*batch(5 + rank))
    return dict(bank.state_dict()), str(refused.value)


@pytest.mark.processes
def test_two_processes_agree_on_the_width() -> None:
    single = PrototypeBank(3, None)
    single.update(*batch(images=3))
    for rank, (state, message) in enumerate(run_processes(shard, 2)):
        torch.testing.assert_close(state, dict(single.state_dict()))
        assert f"but have {5 + rank} in this one" in message
