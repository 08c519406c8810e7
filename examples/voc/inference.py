"""What the stages that go through a list of images share: read ahead, batch by shape, skip bad files, show speed."""

from __future__ import annotations

import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from config import Scales
from data import BadFileError
from depthwise import FastDepthwise
from networks import normalisation
from numpy.typing import NDArray
from parallel import rank, share
from stages import Run
from torch import Tensor
from tqdm import tqdm

T = TypeVar("T")
_IMAGE_PIXELS = 375 * 500  # a VOC photograph


def shared_batches(
    run: Run,
    stems: Sequence[str],
    read: Callable[[str], T],
    *,
    desc: str,
    done: Callable[[str], bool] | None = None,
    max_batch: int = 1,
) -> Iterator[list[tuple[str, T]]]:
    """Yield this process's share of a list, images of one size together, each with what `read` returns.

    Batches that are `done` are left out after the list is shared: other processes finish theirs at the same time. A
    `BadFileError` stops, or leaves that image out with a warning, as data.on_bad_file says.
    """

    def read_all(batch: Sequence[str]) -> list[tuple[str, T]]:
        items = []
        for stem in batch:
            try:
                items.append((stem, read(stem)))
            except BadFileError as error:
                if run.config.data.on_bad_file == "stop":
                    raise
                warnings.warn(f"left out: {error}", stacklevel=2)
        return items

    batches: list[Sequence[str]] = [[stem] for stem in share(stems)]
    if max_batch > 1:
        shapes: dict[tuple[int, int], list[str]] = defaultdict(list)
        for stem in share(stems):
            shapes[_size(run, stem)].append(stem)
        batches = [group[i : i + max_batch] for group in shapes.values() for i in range(0, len(group), max_batch)]
    threads = max(1, run.config.workers)
    with ThreadPoolExecutor(threads) as pool:
        if done:  # a batch is whole or worked on again as a whole, for others would round otherwise
            finished = dict(zip(share(stems), pool.map(done, share(stems)), strict=True))
            batches = [batch for batch in batches if not all(finished[stem] for stem in batch)]
        waiting = iter(batches)
        ahead = [pool.submit(read_all, batch) for batch in islice(waiting, 2 * threads)]  # while one is worked on
        with tqdm(total=sum(map(len, batches)), desc=desc, unit="img", ncols=80, disable=rank() != 0) as bar:
            while ahead:
                items = ahead.pop(0).result()
                ahead += [pool.submit(read_all, batch) for batch in islice(waiting, 1)]
                if items:
                    yield items
                bar.update(len(items))


def _size(run: Run, stem: str) -> tuple[int, int]:
    try:
        return run.data.size(stem)
    except BadFileError:
        return 0, 0  # reading the image will say what is wrong


@contextmanager
def writing(run: Run) -> Iterator[Callable[..., None]]:
    """Yield a function that calls another one, which writes a file, beside the network's work.

    All have returned when the context ends. An error of one is raised there, or by a later call.
    """
    threads = max(1, run.config.workers)
    waiting: deque[Future[object]] = deque()
    with ThreadPoolExecutor(threads) as pool:

        def call(function: Callable[..., object], *args: object) -> None:
            while len(waiting) >= 4 * threads:  # what waits to be written takes memory
                waiting.popleft().result()
            waiting.append(pool.submit(function, *args))

        yield call
        for future in waiting:
            future.result()


def to_input(run: Run, images: Sequence[NDArray[np.uint8]]) -> tuple[Tensor, Tensor]:
    """Return images of one size as bytes for the CRF and as the network's input, (B, 3, H, W) on the run's device."""
    levels = torch.from_numpy(np.stack(images)).to(run.device).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values, device=run.device).view(3, 1, 1) for values in normalisation(run.config))
    # A permuted view has the layout of channels_last, which convolutions on CUDA are fastest with.
    return levels, (levels / 255 - mean) / std


@contextmanager
def autocast(run: Run) -> Iterator[None]:
    """Run what is inside in the run's precision; on a CPU with faster depthwise convolutions."""
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[run.config.precision]
    rounded = torch.autocast(run.device.type, dtype=dtype, enabled=dtype != torch.float32)
    eager_cpu = run.device.type == "cpu" and not run.config.compile
    with rounded, FastDepthwise() if eager_cpu else nullcontext():
        yield


def cam_stems(run: Run) -> list[str]:
    """Return the images that need CAMs and pseudo-labels: those trained on and those scored."""
    return list(dict.fromkeys(run.data.stems(run.config.data.train) + run.data.stems(run.config.data.score)))


def pixels_inferred(images: int, scales: Scales = (1.0,), *, flip: bool = True) -> float:
    """Return how many pixels an inference passes forward, over photographs of VOC's common size."""
    return images * (_IMAGE_PIXELS * (2 if flip else 1) * sum(scale * scale for scale in scales))
