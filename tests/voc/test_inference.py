"""Batches of an inference, and files written beside it."""

from __future__ import annotations

import errno
from pathlib import Path

import inference
import pytest
from inference import writing

from tests.voc.runs import config, new_run


def test_resumed_inference_works_on_the_same_batches(shapes: Path, tmp_path: Path) -> None:
    made = new_run(shapes, tmp_path / "run", settings=config(**{"infer_cam.max_batch": 3}))
    stems = made.data.stems("train")

    def batches(finished: set[str]) -> list[list[str]]:
        shared = inference.shared_batches(made, stems, str, desc="", done=finished.__contains__, max_batch=3)
        return [[stem for stem, _ in batch] for batch in shared]

    whole = batches(set())
    assert sorted(stem for batch in whole for stem in batch) == sorted(stems)
    assert max(map(len, whole)) == 3
    for finished in ({whole[0][0]}, {*whole[0], whole[1][0]}, set(stems)):
        assert batches(finished) == [batch for batch in whole if not set(batch) <= finished]


@pytest.mark.parametrize("calls", [1, 9])  # told at the end, or by a later call
def test_a_file_that_cannot_be_written_beside_the_network_is_told(calls: int, shapes: Path, tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "full")

    def write_all() -> None:
        with writing(new_run(shapes, tmp_path, weights=False)) as write:
            for _ in range(calls):
                write(full)

    with pytest.raises(OSError, match="full"):
        write_all()
