"""Scores of label maps and of CAMs against the ground truth, counted over a whole data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from pixelss._checks import check_count, check_sequence, check_tensor, check_void, outside_unit
from pixelss._counts import errors, joint_counts, rates, wrong_value
from pixelss._distributed import sum_over_processes
from pixelss._dtype import promote
from pixelss._lookup import below, strongest_class

if TYPE_CHECKING:
    from typing_extensions import Self

_DEVICE_HINT = "Inputs lie on the metric's device; .to(device) moves either."


class SegmentationScores(NamedTuple):
    """Scores of one confusion matrix, float64; NaN only where the denominator is 0.

    Attributes:
        miou: mean of `iou` over the classes where it is not NaN, a scalar.
        iou: TP / (TP + FP + FN) of every class, (K,); 0 for a class that is predicted but never true.
        precision: TP / (TP + FP) of every class, (K,).
        recall: TP / (TP + FN) of every class, (K,).
    """

    miou: Tensor
    iou: Tensor
    precision: Tensor
    recall: Tensor


class SweepScores(NamedTuple):
    """Scores of a CAM at every threshold, float64, (T,) each; means are over the classes that are not NaN.

    Attributes:
        thresholds: the thresholds t; foreground is where cam > t.
        miou: mean IoU over the K classes, background included.
        precision: mean precision over the K classes.
        recall: mean recall over the K classes.
        best: index of the highest `miou`, the lowest index of several.
    """

    thresholds: Tensor
    miou: Tensor
    precision: Tensor
    recall: Tensor
    best: int


class ConfusionMatrix(nn.Module):
    """Mean IoU, precision and recall over a data set, from one confusion matrix of pixel counts.

    `update` adds a batch; `compute` sums over the processes and changes nothing, so it may be called at any
    time, by every process. The state is the buffer `counts`, (K, K) int64: row the target, column the prediction.
    A class that is neither predicted nor true anywhere is left out of the means; codes that count it as 0 print less.

    Args:
        num_classes: K, every class that counts; with a background N + 1.
        ignore_index: the target's void value; such pixels count nowhere, whatever `pred` holds there.

    Shape:
        `update` takes (B, H, W) each; `compute` gives a scalar and (K,).

    Raises:
        TypeError, ValueError: settings of another type or value; see `update` for its own.

    Reference:
        Everingham 2015, "The PASCAL Visual Object Classes Challenge", the IoU of a data set, not a mean
        over images; Yoon 2021, "Exploring Pixel-level Self-supervision", scores CAMs, pseudo-labels and segmentations
        by its mean.

    Example:
        >>> metric = ConfusionMatrix(num_classes=3)
        >>> metric.update(pred=torch.tensor([[[0, 1, 1, 0]]]), target=torch.tensor([[[0, 1, 0, 255]]]))
        >>> scores = metric.compute()
        >>> scores.miou, scores.iou
        (tensor(0.5000, dtype=torch.float64), tensor([0.5000, 0.5000,    nan], dtype=torch.float64))
    """

    counts: Tensor

    def __init__(self, num_classes: int, *, ignore_index: int = 255) -> None:
        super().__init__()
        check_count("num_classes", num_classes)
        check_void(ignore_index, num_classes)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.register_buffer("counts", torch.zeros(num_classes, num_classes, dtype=torch.int64))

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Count a batch of label maps.

        Args:
            pred: predicted classes in 0..K-1, of any integer dtype.
            target: true classes in 0..K-1 or `ignore_index`, of any integer dtype.

        Shape:
            (B, H, W) each; B may be 0.

        Raises:
            TypeError, ValueError: tensors of another rank, size, dtype kind or device; a value out of range. The
                counts are then as they were.
        """
        hint = f"Class scores? Take their argmax over the class axis. {_DEVICE_HINT}"
        B, H, W = check_tensor("pred", pred, "BHW", kind="integer", like=self.counts, hint=hint)
        check_tensor("target", target, "BHW", kind="integer", like=pred, hint="Label maps of one size.", B=B, H=H, W=W)
        counts, wrong = joint_counts(target, self.num_classes, self.ignore_index, pred, self.num_classes)
        if wrong:
            K = self.num_classes
            bad = (target.long() != self.ignore_index) & ((pred.long() < 0) | (pred.long() >= K))
            wanted = f"classes in 0..{K - 1} where target counts"
            raise wrong_value("pred", pred[bad], wanted, "num_classes counts the background too.")
        self.counts.add_(counts)

    def compute(self) -> SegmentationScores:
        """Return the scores of everything counted so far, over all processes; every process must call it."""
        iou, precision, recall = rates(self._total())
        return SegmentationScores(iou.nanmean(), iou, precision, recall)

    def _total(self) -> Tensor:
        return sum_over_processes(self.counts).double()

    def pixel_accuracy(self) -> Tensor:
        """Return the share of pixels that are right, a scalar; every process must call it."""
        counts = self._total()
        return counts.diagonal().sum() / counts.sum()

    def mean_accuracy(self) -> Tensor:
        """Return the mean recall over the classes that are true, a scalar; every process must call it."""
        return self.compute().recall.nanmean()

    def false_positives(self) -> Tensor:
        """Return FP / (TP + FP + FN) of every class, (K,): with IoU and false negatives it adds up to 1.

        Every process must call it.
        """
        return errors(self._total(), 0)

    def false_negatives(self) -> Tensor:
        """Return FN / (TP + FP + FN) of every class, (K,); every process must call it."""
        return errors(self._total(), 1)

    def foreground_miou(self) -> Tensor:
        """Return the mean IoU, where it is not NaN, over classes 1 to K - 1; every process must call it."""
        return self.compute().iou[1:].nanmean()

    def table(self, class_names: Sequence[str]) -> str:
        """Return the scores in per cent as text: a line a class, and the means.

        Every process must call it.

        Args:
            class_names: K names, the background's first.

        Raises:
            TypeError, ValueError: no sequence, or not one name a class.
        """
        check_sequence("class_names", class_names, "names, one a class")
        if len(class_names) != self.num_classes:
            count = len(class_names)
            raise ValueError(f"class_names must be {self.num_classes}, the background's first, but are {count}.")
        counts = self._total()
        columns = torch.stack([*rates(counts), errors(counts, 0), errors(counts, 1)], 1)  # (K, 5)
        width = max(10, *map(len, class_names))

        def line(name: str, values: Tensor) -> str:
            cells = ("-" if value != value else f"{100 * value:.1f}" for value in values.tolist())
            return f"{name:{width}}" + "".join(f"{cell:>11}" for cell in cells)

        heads = "".join(f"{head:>11}" for head in ("IoU", "precision", "recall", "false pos", "false neg"))
        lines = [line(name, values) for name, values in zip(class_names, columns, strict=True)]
        return "\n".join([f"{'':{width}}{heads}", *lines, line("mean", columns.nanmean(0))])

    def reset(self) -> None:
        """Forget everything counted so far."""
        self.counts.zero_()

    def extra_repr(self) -> str:
        """Describe the settings in the module's repr."""
        return f"num_classes={self.num_classes}, ignore_index={self.ignore_index}"


class ThresholdSweep(nn.Module):
    """Scores of normalised CAMs at every background threshold, in one pass over the data set.

    At a threshold t a pixel belongs to its strongest class where that class's CAM is > t, else to the
    background; ties go to the lowest class. Thresholds are compared in the CAM's dtype (float32 for half
    precision), so each row equals a `ConfusionMatrix` fed with `class_region_mask` at that threshold. The state
    is the buffer `histogram`, (T + 1, K, N) int64: over the number of thresholds below a pixel's strongest CAM,
    its target and its strongest class. `compute` changes nothing and may be called at any time.

    Args:
        num_classes: foreground classes N; K = N + 1.
        thresholds: strictly ascending, each in [0, 1); None stands for 0, 0.01, ..., 0.60.
        ignore_index: the target's void value; such pixels count nowhere.

    Shape:
        `update` takes (B, N, H, W) and (B, H, W); `compute` gives (T,) each.

    Raises:
        TypeError, ValueError: settings of another type or value; see `update` for its own.

    Reference:
        Yoon 2021, "Exploring Pixel-level Self-supervision": the quality of a CAM is its mean IoU at the
        best threshold.

    Example:
        >>> sweep = ThresholdSweep(num_classes=1, thresholds=[0.0, 0.2, 0.4])
        >>> sweep.update(cam=torch.tensor([[[[1.0, 0.1, 0.0]]]]), target=torch.tensor([[[1, 0, 0]]]))
        >>> scores = sweep.compute()
        >>> scores.miou, scores.best
        (tensor([0.5000, 1.0000, 1.0000], dtype=torch.float64), 1)
    """

    thresholds: Tensor
    histogram: Tensor

    def __init__(
        self, num_classes: int, *, thresholds: Sequence[float] | Tensor | None = None, ignore_index: int = 255
    ) -> None:
        super().__init__()
        check_count("num_classes", num_classes)
        check_void(ignore_index, num_classes + 1)
        if thresholds is None:
            thresholds = torch.arange(61, dtype=torch.float64) / 100
        values = torch.as_tensor(thresholds, dtype=torch.float64).detach().clone()
        (T,) = check_tensor("thresholds", values, "T", hint="Give at least one.")
        if not (bool((values.diff() > 0).all()) and values[0] >= 0 and values[-1] < 1):
            raise ValueError(
                f"thresholds must be strictly ascending and each in [0, 1), but are {values.tolist()}. "
                "Sort them, drop repeated ones, and divide by 100 if they are percentages."
            )
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.register_buffer("thresholds", values)
        histogram = torch.zeros(T + 1, num_classes + 1, num_classes, dtype=torch.int64)
        self.register_buffer("histogram", histogram)

    def update(self, cam: Tensor, target: Tensor) -> None:
        """Count a batch of CAMs.

        Args:
            cam: normalised CAMs in [0, 1], up to rounding, of any floating dtype; zero for absent classes.
            target: true classes in 0..N (0 is the background) or `ignore_index`, of any integer dtype.

        Shape:
            (B, N, H, W), (B, H, W); B may be 0.

        Raises:
            TypeError, ValueError: tensors of another rank, size, dtype kind or device; a value out of range or,
                in `cam`, not finite. The counts are then as they were.
        """
        N = self.num_classes
        B, _, H, W = check_tensor("cam", cam, "BNHW", like=self.histogram, hint=_DEVICE_HINT, N=N)
        hint = f"Resize the CAM to the target's size. {_DEVICE_HINT}"
        check_tensor("target", target, "BHW", kind="integer", like=cam, hint=hint, B=B, H=H, W=W)
        strongest, best = strongest_class(cam.detach())
        if B and outside_unit(torch.stack([cam.detach().amin(), strongest.amax()])).any():  # either keeps a NaN
            wrong = cam[outside_unit(cam)]
            raise wrong_value("cam", wrong, "finite values in [0, 1]", "Raw CAM? Call normalize_cam first.")
        strongest = promote(strongest)
        place = below(self.thresholds.to(strongest.dtype), strongest)
        T, K, _ = self.histogram.shape
        counts, _ = joint_counts(target, K, self.ignore_index, place.mul_(N).add_(best.int()), T * N)  # (K, T N)
        self.histogram.add_(counts.view(K, T, N).transpose(0, 1))

    def compute(self) -> SweepScores:
        """Return the scores of everything counted so far, over all processes; every process must call it."""
        histogram = sum_over_processes(self.histogram)
        background = histogram.cumsum(0)[:-1]  # (T, K, N): not above the threshold
        foreground = histogram.sum(0) - background
        confusion = torch.cat([background.sum(-1, keepdim=True), foreground], -1)  # (T, K, K)
        miou, precision, recall = (rate.nanmean(-1) for rate in rates(confusion))
        return SweepScores(self.thresholds.clone(), miou, precision, recall, int(miou.max(0).indices))

    def reset(self) -> None:
        """Forget everything counted so far; the thresholds stay."""
        self.histogram.zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move the thresholds with the module, but never round them: a cast of a parent is not meant for them."""
        exact = self.thresholds
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.thresholds = self.thresholds.double() if exact.is_meta else exact.to(self.thresholds.device)
        return self

    def extra_repr(self) -> str:
        """Describe the settings in the module's repr."""
        T = self.thresholds.numel()
        return f"num_classes={self.num_classes}, thresholds={T}, ignore_index={self.ignore_index}"
