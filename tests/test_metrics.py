"""Metrics against pure Python loops over the pixels, and the ways a data set can reach them."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from itertools import product
from typing import NamedTuple
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn

from pixelss.metrics import ConfusionMatrix, SegmentationScores, ThresholdSweep
from tests.blocks import Block
from tests.distributed import run_processes
from tests.strategies import Batch

SIGNATURES = {
    "ConfusionMatrix": "(num_classes, *, ignore_index=255)",
    "SegmentationScores": "(miou, iou, precision, recall)",
    "SweepScores": "(thresholds, miou, precision, recall, best)",
    "ThresholdSweep": "(num_classes, *, thresholds=None, ignore_index=255)",
}


def confusion(b: Batch, metric: ConfusionMatrix) -> Tensor:
    target = b.mask.where((b.mask >= 0) & (b.mask <= b.classes), 0)
    metric.reset()
    metric.update(target.flip(-1), target)
    return metric.counts.clone()


def swept(b: Batch, metric: ThresholdSweep) -> Tensor:
    metric.reset()
    metric.update(b.cam, b.mask.where((b.mask >= 0) & (b.mask <= b.classes), 0))
    return metric.histogram.clone()


WAITS = "raises on bad values, as nobody waits for a metric"

BLOCKS = {
    "ConfusionMatrix": Block(confusion, make=lambda b: ConfusionMatrix(b.classes + 1), but={"no wait": WAITS}),
    "ThresholdSweep": Block(
        swept,
        make=lambda b: ThresholdSweep(b.classes, thresholds=[0.0, 0.2, 0.4]),
        but=dict.fromkeys(("no wait", "finite"), WAITS),
    ),
}

VOID = 255
THRESHOLDS = [0.0, 0.1, 0.2, 0.29, 0.7, 0.99]
INTEGERS = [torch.uint8, torch.int16, torch.int32, torch.int64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


# Loop references


def count_pixels(pred: Tensor, target: Tensor, num_classes: int, void: int = VOID) -> list[list[int]]:
    counts = [[0] * num_classes for _ in range(num_classes)]
    for p, t in zip(pred.flatten().tolist(), target.flatten().tolist(), strict=True):
        if t != void:
            counts[t][p] += 1
    return counts


def ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else math.nan


def mean(values: list[float]) -> float:
    present = [v for v in values if not math.isnan(v)]
    return sum(present) / len(present) if present else math.nan


def score(counts: list[list[int]]) -> tuple[float, list[float], list[float], list[float]]:
    iou, precision, recall = [], [], []
    for k in range(len(counts)):
        true_positive = counts[k][k]
        false_positive = sum(counts[j][k] for j in range(len(counts)) if j != k)
        false_negative = sum(counts[k][j] for j in range(len(counts)) if j != k)
        iou.append(ratio(true_positive, true_positive + false_positive + false_negative))
        precision.append(ratio(true_positive, true_positive + false_positive))
        recall.append(ratio(true_positive, true_positive + false_negative))
    return mean(iou), iou, precision, recall


def label(cam: Tensor, threshold: float) -> Tensor:
    """The class of every pixel: its strongest, lowest first, where above the threshold in the CAM's dtype."""
    dtype = torch.float64 if cam.dtype == torch.float64 else torch.float32
    threshold = torch.tensor(threshold, dtype=dtype).item()
    B, N, H, W = cam.shape
    labels = torch.zeros(B, H, W, dtype=torch.int64)
    for b, y, x in product(range(B), range(H), range(W)):
        activations = cam[b, :, y, x].tolist()
        best = max(range(N), key=lambda n: (activations[n], -n))
        labels[b, y, x] = best + 1 if activations[best] > threshold else 0
    return labels


# Strategies


class Maps(NamedTuple):
    num_classes: int  # K
    pred: Tensor  # (B, H, W)
    target: Tensor  # (B, H, W), with void


class Cams(NamedTuple):
    cam: Tensor  # (B, N, H, W), often exactly on a threshold
    target: Tensor  # (B, H, W), with void


sides = st.integers(1, 4)
sizes = st.tuples(st.integers(0, 3), sides, sides)


@st.composite
def maps(draw: st.DrawFn) -> Maps:
    K, size = draw(st.integers(1, 4)), draw(sizes)
    classes = st.integers(0, K - 1)
    pred = draw(arrays(np.int64, size, elements=classes))
    target = draw(arrays(np.int64, size, elements=classes | st.just(VOID)))
    return Maps(K, torch.from_numpy(pred), torch.from_numpy(target))


@st.composite
def cams(draw: st.DrawFn) -> Cams:
    dtype, N, (B, H, W) = draw(st.sampled_from(FLOATS)), draw(st.integers(1, 3)), draw(sizes)
    values = st.sampled_from([*THRESHOLDS, 1.0]) | st.floats(0, 1, allow_subnormal=False)
    cam = draw(arrays(np.float64, (B, N, H, W), elements=values))
    target = draw(arrays(np.int64, (B, H, W), elements=st.integers(0, N) | st.just(VOID)))
    return Cams(torch.from_numpy(cam).to(dtype), torch.from_numpy(target))


def scored_maps(num_classes: int, *batches: tuple[Tensor, Tensor]) -> SegmentationScores:
    metric = ConfusionMatrix(num_classes)
    for pred, target in batches:
        metric.update(pred, target)
    return metric.compute()


def sweep_of(*batches: tuple[Tensor, Tensor], num_classes: int) -> ThresholdSweep:
    metric = ThresholdSweep(num_classes, thresholds=THRESHOLDS)
    for cam, target in batches:
        metric.update(cam, target)
    return metric


def assert_same(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# ConfusionMatrix


@given(maps())
def test_scores_equal_the_loops(drawn: Maps) -> None:
    K, pred, target = drawn
    metric = ConfusionMatrix(K)
    metric.update(pred, target)
    expected = count_pixels(pred, target, K)
    assert metric.counts.tolist() == expected
    scores = metric.compute()
    for ours, theirs in zip(scores, score(expected), strict=True):
        torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), equal_nan=True)


@given(maps(), st.data())
def test_counts_add_up_over_batches_in_any_order(drawn: Maps, data: st.DataObject) -> None:
    K, pred, target = drawn
    cut = data.draw(st.integers(0, len(pred)))
    parts = [(pred[:cut], target[:cut]), (pred[cut:], target[cut:])]
    assert_same(scored_maps(K, *reversed(parts)), scored_maps(K, (pred, target)))


@pytest.mark.parametrize("void", [255, -1, 0])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_any_integer_dtype_and_void_value(dtype: torch.dtype, void: int) -> None:
    pred, target = torch.tensor([[[0, 1, 2, 2, 1]]]), torch.tensor([[[0, 1, 1, 2, void]]])
    if void < 0 and not dtype.is_signed:
        target = target.clamp(min=0)
    metric = ConfusionMatrix(3, ignore_index=void)
    metric.update(pred.to(dtype), target.to(dtype))
    assert metric.counts.tolist() == count_pixels(pred, target, 3, void)


def test_minus_one_is_not_255_in_uint8() -> None:
    metric = ConfusionMatrix(2, ignore_index=-1)
    with pytest.raises(ValueError, match=r"target .* 255"):
        metric.update(torch.zeros(1, 1, 1, dtype=torch.uint8), torch.full((1, 1, 1), 255, dtype=torch.uint8))


def test_one_class() -> None:
    assert scored_maps(1, (torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 2).long())).miou == 1


def test_absent_class_is_left_out_of_the_mean() -> None:
    scores = scored_maps(3, (torch.tensor([[[0, 1, 0, 0]]]), torch.tensor([[[0, 1, 1, 0]]])))
    assert scores.iou[2].isnan()
    torch.testing.assert_close(scores.miou, (torch.tensor(2 / 3).double() + 0.5) / 2)


def test_class_predicted_but_never_true_has_iou_0() -> None:
    scores = scored_maps(2, (torch.tensor([[[0, 1]]]), torch.tensor([[[0, 0]]])))
    assert scores.iou.tolist() == [0.5, 0.0]
    assert scores.miou == 0.25
    assert scores.precision.tolist() == [1.0, 0.0]
    assert scores.recall[0] == 0.5
    assert scores.recall[1].isnan()


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 2, 3)])
def test_nothing_but_void_gives_nan(shape: tuple[int, ...]) -> None:
    target = torch.full(shape, VOID)
    assert all(x.isnan().all() for x in scored_maps(3, (torch.full(shape, 77), target)))
    sweep = sweep_of((torch.ones(shape[0], 2, *shape[1:]), target), num_classes=2).compute()
    assert all(x.isnan().all() for x in (sweep.miou, sweep.precision, sweep.recall))
    assert sweep.best == 0


def test_miou_is_of_the_data_set_not_of_images() -> None:
    pred = torch.tensor([[[1, 1, 1, 1]], [[1, 0, 0, 0]]])
    target = torch.tensor([[[1, 1, 1, 1]], [[0, 0, 0, 0]]])
    assert scored_maps(2, (pred, target)).iou.tolist() == [0.75, 0.8]


# ThresholdSweep


@given(cams())
def test_sweep_equals_one_confusion_matrix_a_threshold(drawn: Cams) -> None:
    cam, target = drawn
    N = cam.shape[1]
    sweep = sweep_of((cam, target), num_classes=N)
    scores = sweep.compute()
    assert scores.thresholds.tolist() == THRESHOLDS
    for i, threshold in enumerate(THRESHOLDS):
        pred = label(cam, threshold)
        expected = scored_maps(N + 1, (pred, target))
        assert_same(scores.miou[i], expected.miou)
        torch.testing.assert_close(scores.precision[i], expected.precision.nanmean(), equal_nan=True)
        torch.testing.assert_close(scores.recall[i], expected.recall.nanmean(), equal_nan=True)
        compared = cam if cam.dtype == torch.float64 else cam.float()
        assert torch.equal(pred > 0, compared.amax(1) > threshold)
    if (target != VOID).any():
        assert scores.best == max(range(len(THRESHOLDS)), key=lambda i: (scores.miou[i].item(), -i))


@given(cams(), st.data())
def test_histogram_adds_up_over_batches_in_any_order(drawn: Cams, data: st.DataObject) -> None:
    cam, target = drawn
    cut = data.draw(st.integers(0, len(cam)))
    parts = [(cam[cut:], target[cut:]), (cam[:cut], target[:cut])]
    split, whole = (sweep_of(*x, num_classes=cam.shape[1]) for x in (parts, [(cam, target)]))
    assert_same(split.histogram, whole.histogram)


def test_default_thresholds_are_hundredths() -> None:
    assert ThresholdSweep(1).compute().thresholds.tolist() == [float(f"0.{i:02d}") for i in range(61)]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_sweep_takes_any_integer_target(dtype: torch.dtype) -> None:
    cam, target = torch.rand(2, 2, 3, 4), torch.randint(0, 3, (2, 3, 4))
    assert_same(
        sweep_of((cam, target.to(dtype)), num_classes=2).histogram,
        sweep_of((cam, target), num_classes=2).histogram,
    )


@pytest.mark.parametrize("thresholds", [None, [0.0, 0.25, 0.25 + 1e-6, 0.5, 1 - 1e-9]], ids=["apart", "close"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_sweep_histogram_counts_ties_and_values_at_thresholds(
    thresholds: list[float] | None, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    N = 3
    metric = ThresholdSweep(N, thresholds=thresholds)
    compared = metric.thresholds.to(torch.promote_types(dtype, torch.float32))
    levels = torch.cat([torch.linspace(0, 1, 41), metric.thresholds, metric.thresholds + 1e-3]).to(dtype)
    cam = levels[torch.randint(len(levels), (2, N, 13, 17))].contiguous(memory_format=layout).requires_grad_()
    target = torch.randint(0, N + 1, (2, 13, 17))
    metric.update(cam, target)
    expected = torch.zeros_like(metric.histogram)
    for scores, truth in zip(cam.permute(0, 2, 3, 1).reshape(-1, N).tolist(), target.flatten().tolist(), strict=True):
        below = sum(t < max(scores) for t in compared.tolist())
        expected[below, truth, scores.index(max(scores))] += 1
    assert_same(metric.histogram, expected)


def test_sweep_allows_rounding_just_outside_the_range() -> None:
    cam = torch.tensor([[[[1.0078, -0.001]]]], dtype=torch.bfloat16, requires_grad=True)
    sweep = sweep_of((cam, torch.tensor([[[1, 0]]])), num_classes=1)
    assert sweep.compute().miou.tolist() == [1.0] * len(THRESHOLDS)


# State


@pytest.mark.parametrize(
    ("new", "first"),
    [
        (lambda: ConfusionMatrix(3), torch.arange(40).view(2, 4, 5) % 3),
        (lambda: ThresholdSweep(2, thresholds=THRESHOLDS), torch.arange(80).view(2, 2, 4, 5) / 80),
    ],
    ids=["matrix", "sweep"],
)
def test_reading_never_writes_and_the_state_survives_copies(
    new: Callable[[], nn.Module], first: Tensor, device: str
) -> None:
    first, target = first.to(device), torch.randint(0, 3, (2, 4, 5), device=device)
    metric = new().to(device)
    empty = metric.compute()
    metric.update(first, target)
    once = metric.compute()
    assert_same(metric.compute(), once)

    resumed = new().to(device)
    resumed.load_state_dict(metric.state_dict())
    copies = [resumed, copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))]
    metric.update(first, target)
    for other in copies:
        assert_same(other.compute(), once)
        other.update(first, target)
        assert_same(other.state_dict(), metric.state_dict())
    metric.reset()
    assert_same(metric.compute(), empty)


def test_same_scores_on_every_device_under_deterministic_algorithms(device: str) -> None:
    cam, pred, target = torch.rand(2, 2, 9, 8), torch.randint(0, 3, (2, 9, 8)), torch.randint(0, 3, (2, 9, 8))
    matrix, sweep = ConfusionMatrix(3).to(device), ThresholdSweep(2).to(device)
    torch.use_deterministic_algorithms(True)
    try:
        matrix.update(pred.to(device), target.to(device))
        sweep.update(cam.to(device), target.to(device))
        actual = matrix.compute(), sweep.compute()
    finally:
        torch.use_deterministic_algorithms(False)
    on_cpu = ThresholdSweep(2)
    on_cpu.update(cam, target)
    for ours, theirs in zip(actual, (scored_maps(3, (pred, target)), on_cpu.compute()), strict=True):
        torch.testing.assert_close(ours, theirs, check_device=False)


# Errors


@pytest.mark.parametrize(
    ("pred", "target", "error", "match"),
    [
        ([[[3]]], [[[0]]], ValueError, r"pred must hold classes in 0\.\.2 .* holds 3\. num_classes"),
        ([[[-1]]], [[[0]]], ValueError, r"pred .* holds -1"),
        ([[[0]]], [[[220]]], ValueError, r"target must hold .*ignore_index=255, but holds 220.*colour mask"),
        ([[[0]]], [[[-1]]], ValueError, r"target .* holds -1"),
        ([[[0, 0]]], [[[0]]], ValueError, r"target must have shape .*W=2"),
        ([[[[0]]]], [[[0]]], ValueError, r"pred must have shape .*argmax"),
        ([[[0.5]]], [[[0]]], TypeError, r"pred must be of integer dtype"),
        ([[[0]]], [[[True]]], TypeError, r"target must be of integer dtype"),
    ],
)
def test_confusion_matrix_errors_leave_the_counts(pred: list, target: list, error: type[Exception], match: str) -> None:
    metric = ConfusionMatrix(3)
    with pytest.raises(error, match=match):
        metric.update(torch.tensor(pred), torch.tensor(target))
    assert metric.counts.sum() == 0


def test_bad_prediction_under_void_is_allowed() -> None:
    assert scored_maps(2, (torch.tensor([[[9, 1]]]), torch.tensor([[[VOID, 1]]]))).miou == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.1, 1.1, 7.0])
def test_sweep_rejects_what_is_no_normalised_cam(value: float) -> None:
    metric = ThresholdSweep(2)
    cam = torch.rand(1, 2, 1, 3)
    cam[0, 1, 0, 2] = value
    with pytest.raises(ValueError, match=r"cam must hold finite values in \[0, 1\].*normalize_cam"):
        metric.update(cam, torch.tensor([[[0, 1, VOID]]]))
    assert metric.histogram.sum() == 0


def test_sweep_input_errors() -> None:
    metric = ThresholdSweep(2)
    with pytest.raises(ValueError, match=r"cam must have shape .*N=2"):
        metric.update(torch.rand(1, 3, 1, 1), torch.zeros(1, 1, 1).long())
    with pytest.raises(ValueError, match=r"target .*Resize the CAM"):
        metric.update(torch.rand(1, 2, 1, 1), torch.zeros(1, 2, 2).long())
    with pytest.raises(ValueError, match=r"target .* holds 3"):
        metric.update(torch.rand(1, 2, 1, 1), torch.full((1, 1, 1), 3))
    with pytest.raises(TypeError, match=r"cam must be of floating dtype"):
        metric.update(torch.ones(1, 2, 1, 1).long(), torch.zeros(1, 1, 1).long())


@pytest.mark.parametrize("metric", [ConfusionMatrix, ThresholdSweep])
def test_settings_errors(metric: type) -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        metric(0)
    with pytest.raises(TypeError, match="ignore_index must be an int"):
        metric(2, ignore_index=None)


@pytest.mark.parametrize(
    "thresholds", [[], [0.2, 0.1], [0.1, 0.1], [-0.1, 0.5], [0.5, 1.0], [math.nan], [0.0, math.nan], [0, 10, 20]]
)
def test_thresholds_errors(thresholds: list[float]) -> None:
    with pytest.raises(ValueError, match="thresholds must"):
        ThresholdSweep(2, thresholds=thresholds)


def test_thresholds_are_copied_and_shown() -> None:
    values = torch.tensor([0.1, 0.2], dtype=torch.float64)
    metric = ThresholdSweep(2, thresholds=values)
    metric.compute().thresholds.zero_()
    values.zero_()
    assert metric.thresholds.tolist() == [0.1, 0.2]
    assert repr(metric) == "ThresholdSweep(num_classes=2, thresholds=2, ignore_index=255)"
    assert repr(ConfusionMatrix(3)) == "ConfusionMatrix(num_classes=3, ignore_index=255)"


# Processes


def data_set() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    pred, target = (torch.randint(0, 3, (5, 4, 6), generator=g) for _ in range(2))
    target[torch.rand(target.shape, generator=g) < 0.2] = VOID
    return torch.rand(5, 2, 4, 6, generator=g), pred, target


def score_data_set(shard: slice) -> list[tuple]:
    cam, pred, target = (x[shard] for x in data_set())
    matrix, sweep = ConfusionMatrix(3), sweep_of((cam, target), num_classes=2)
    matrix.update(pred, target)
    before = matrix.counts.clone(), sweep.histogram.clone()
    twice = [[tuple(metric.compute()) for metric in (matrix, sweep)] for _ in range(2)]
    assert_same(twice[0], twice[1])
    assert_same((matrix.counts, sweep.histogram), before)
    return twice[0]


def score_shards(rank: int, bounds: list[int]) -> list[list[tuple]]:
    return [score_data_set(slice(0, bound) if rank == 0 else slice(bound, None)) for bound in bounds]


@pytest.mark.processes
def test_two_processes_with_uneven_and_empty_shards_equal_one() -> None:
    bounds = [1, 3, 5]
    expected = [score_data_set(slice(None)) for _ in bounds]
    for scores in run_processes(score_shards, 2, bounds):
        assert_same(scores, expected)


def fail_on_rank_1(rank: int) -> int:
    if rank == 1:
        raise LookupError("reached rank 1")
    torch.distributed.barrier()
    return rank


@pytest.mark.processes
def test_run_processes_raises_what_a_process_raises() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1:.*reached rank 1"):
        run_processes(fail_on_rank_1, 2)


def test_further_scores():
    metric = ConfusionMatrix(4)
    metric.update(torch.tensor([[[0, 0, 1, 2, 1]]]), torch.tensor([[[0, 1, 1, 1, 255]]]))
    assert metric.pixel_accuracy() == 2 / 4
    assert metric.mean_accuracy() == (1 + 1 / 3) / 2
    assert metric.foreground_miou() == (1 / 3 + 0) / 2
    close = {"rtol": 1e-12, "atol": 0.0, "equal_nan": True}
    nan = math.nan
    torch.testing.assert_close(metric.false_positives(), torch.tensor([1 / 2, 0, 1, nan], dtype=torch.float64), **close)
    torch.testing.assert_close(metric.false_negatives(), torch.tensor([0, 2 / 3, 0, nan], dtype=torch.float64), **close)
    total = metric.compute().iou + metric.false_positives() + metric.false_negatives()
    assert total[:3].tolist() == pytest.approx([1, 1, 1])


def test_table(monkeypatch):
    metric = ConfusionMatrix(3)
    metric.update(torch.tensor([[[0, 0, 1, 1]]]), torch.tensor([[[0, 1, 1, 1]]]))
    lines = metric.table(["background", "cat", "potted plant"]).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[1:]] == ["background", "cat", "potted", "mean"]
    assert lines[2].split() == ["cat", "66.7", "100.0", "66.7", "0.0", "33.3"]
    assert lines[3].split()[2:] == ["-"] * 5
    monkeypatch.setattr("pixelss.metrics.sum_over_processes", calls := Mock(side_effect=lambda x: x))
    assert metric.table(["background", "cat", "potted plant"]).splitlines() == lines
    assert calls.call_count == 1
    with pytest.raises(ValueError, match="class_names must be 3, the background's first, but are 2"):
        metric.table(["cat", "dog"])


def test_a_cast_of_a_parent_does_not_round_the_thresholds():
    whole, cast = ThresholdSweep(3), nn.Sequential(ThresholdSweep(3)).bfloat16()[0]
    assert torch.equal(whole.thresholds, cast.thresholds)
    assert cast.thresholds.dtype == torch.float64
    assert ThresholdSweep(3).to("meta").thresholds.is_meta
