"""What several blocks refuse in the arguments that they share: (name, value, error), beside values that they take."""

from __future__ import annotations

import torch

CAM = torch.rand(2, 3, 4, 5)
TAGS = torch.ones(2, 3)
BAD_CAM_OR_LABELS = [
    ("cam", CAM[0], ValueError),
    ("cam", CAM[:, :, :0], ValueError),
    ("cam", CAM.long(), TypeError),
    ("cam", None, TypeError),
    ("tags", TAGS[0], ValueError),
    ("tags", TAGS[:1], ValueError),
    ("tags", TAGS[:, :2], ValueError),
    ("tags", TAGS.to("meta"), ValueError),
    ("tags", [[1, 1, 1]] * 2, TypeError),
]

FEATURES = torch.rand(2, 4, 3, 3)
MASK = torch.zeros(2, 5, 6, dtype=torch.int64)  # of another size
BAD_FEATURES_OR_MASK = [
    ("features", FEATURES[0], ValueError),
    ("features", FEATURES[:, :, :0], ValueError),
    ("features", FEATURES.long(), TypeError),
    ("features", None, TypeError),
    ("mask", MASK[0], ValueError),
    ("mask", MASK[:1], ValueError),
    ("mask", MASK[:, :0], ValueError),
    ("mask", MASK.float(), TypeError),
    ("mask", MASK.bool(), TypeError),
    ("mask", MASK.to("meta"), ValueError),
]
