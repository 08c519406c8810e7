"""All stages in order. A new one is a file that ends with its record, and a place in this list."""

from __future__ import annotations

import evaluate
import export_labels
import export_test
import infer_cam
import infer_seg
import make_labels
import score_cam
import train_affinity
import train_cam
import train_seg
from stages import Stage

_ORDER = (
    train_cam.STAGE,
    infer_cam.STAGE,
    score_cam.STAGE,
    train_affinity.STAGE,
    make_labels.STAGE,
    export_labels.STAGE,
    train_seg.STAGE,
    infer_seg.STAGE,
    evaluate.STAGE,
    export_test.STAGE,
)
STAGES: dict[str, Stage] = {stage.name: stage for stage in _ORDER}
FIRST = _ORDER[0].name
LAST_OF_LABELS = export_labels.STAGE.name  # what comes after it learns from the labels
