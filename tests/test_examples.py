"""The examples, run as a user runs them, in a tiny setting."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
VOC_MINI = Path(os.environ.get("PIXELSS_VOC_MINI", Path(__file__).parent.parent.parent / "shared/data/voc12-mini"))
ROWS = ["baseline", "control", "+RCM", "+MAM", "+RCM+MAM"]
sys.path.insert(0, str(EXAMPLES))

from shapes import CLASSES, VOID, write_shapes  # noqa: E402

from pixelss.viz import voc_palette  # noqa: E402


def run_quickstart(out: Path, *arguments: str) -> str:
    tiny = ["--warmup", "3", "--iterations", "2", "--batch", "2", "--score-images", "3", "--out", str(out)]
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), *tiny, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def check_outputs(out: Path, table: str, seeds: int) -> None:
    results = json.loads((out / "results.json").read_text())["results"]
    assert list(results) == ROWS
    assert all(
        len(runs) == seeds and np.isfinite(runs).all() and np.shape(runs) == (seeds, 8) for runs in results.values()
    )
    lines = table.splitlines()
    assert [line.split()[0] for line in lines[1:6]] == ROWS
    assert max(map(len, lines[:6])) <= 80
    with Image.open(out / "quickstart.png") as picture:
        assert picture.size[0] > 500


def test_quickstart_on_generated_images(tmp_path):
    small = write_shapes(tmp_path / "set", train=6, val=1, size=40)
    out = tmp_path / "out"
    table = run_quickstart(out, "--data", str(small), "--crop", "32", "--seeds", "0", "1")
    check_outputs(out, table, seeds=2)


@pytest.mark.skipif(not VOC_MINI.is_dir(), reason="no VOC photographs: set PIXELSS_VOC_MINI to a folder in VOC layout")
def test_quickstart_on_photographs(tmp_path):
    table = run_quickstart(tmp_path, "--data", str(VOC_MINI), "--crop", "64", "--rescale", "0.2", "0.4")
    check_outputs(tmp_path, table, seeds=1)


def digest(root: Path) -> str:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def test_shapes_are_the_same_for_the_same_seed_and_kept(tmp_path):
    first, again, other = (
        write_shapes(tmp_path / name, train=3, val=2, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert digest(first).split() == digest(again).split()
    assert digest(first) != digest(other)
    assert write_shapes(first, train=3, val=2) == first
    with pytest.raises(FileExistsError, match="root must be free"):
        write_shapes(first, train=4, val=2)


def test_shapes_are_in_the_voc_layout(tmp_path):
    root = write_shapes(tmp_path / "set", train=8, val=2)
    assert (root / "classes.txt").read_text().split() == list(CLASSES)
    stems = (root / "ImageSets/Segmentation/train.txt").read_text().split()
    assert len(stems) == 8
    for stem in stems:
        with Image.open(root / "SegmentationClass" / f"{stem}.png") as mask:
            mask.load()
        with Image.open(root / "JPEGImages" / f"{stem}.jpg") as image:
            assert image.size == mask.size
        assert mask.getpalette() == voc_palette().flatten().tolist()
        values = set(np.unique(np.array(mask))) - {0, VOID}
        tags = {
            CLASSES.index(name) + 1
            for name in CLASSES
            if f"<name>{name}</name>" in (root / f"Annotations/{stem}.xml").read_text()
        }
        assert values == tags
