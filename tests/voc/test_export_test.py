"""Stage export_test: the archive, and what it refuses."""

from __future__ import annotations

import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from data import BadFileError, VOCFolder
from export_test import export_test
from PIL import Image

from pixelss.io import write_mask
from pixelss.viz import voc_palette
from tests.voc.runs import new_run


def test_archive_is_what_the_server_takes(
    finished: tuple[Path, str], shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = finished
    data = VOCFolder(shapes)
    stems = data.stems("val")
    with tarfile.open(out / "export_test" / "results.tar.gz") as archive:
        names = archive.getnames()
        assert names == [f"results/VOC2012/Segmentation/comp6_test_cls/{stem}.png" for stem in sorted(stems)]
        for name, stem in zip(names, sorted(stems), strict=True):
            with Image.open(archive.extractfile(name)) as mask:
                assert mask.mode == "P"
                assert mask.getpalette() == voc_palette().flatten().tolist()
                assert mask.size[::-1] == data.size(stem)
    made = new_run(shapes, tmp_path / "run", weights=False)
    for stem in stems:
        write_mask(made.folder("infer_seg") / "test" / f"{stem}.png", np.ones(data.size(stem), np.uint8))
    export_test(made)
    archive_path = made.folder("export_test") / "results.tar.gz"
    first = archive_path.read_bytes()
    archive_path.unlink()
    now = time.time() + 100
    monkeypatch.setattr(time, "time", lambda: now)  # a date in the archive would now differ
    export_test(made)
    assert archive_path.read_bytes() == first


def test_archive_is_refused_naming_every_wrong_mask(shapes: Path, tmp_path: Path) -> None:
    made = new_run(shapes, tmp_path / "run", weights=False)
    folder, (missing, small, void) = made.folder("infer_seg") / "test", made.data.stems("val")
    write_mask(folder / f"{small}.png", np.zeros((7, 8), np.uint8))
    wrong = np.zeros(made.data.size(void), np.uint8)
    wrong[0, 0] = 255
    write_mask(folder / f"{void}.png", wrong)
    with pytest.raises(BadFileError, match="3 of 3 masks are wrong") as error:
        export_test(made)
    message = str(error.value)
    assert f"{missing}.png: no such mask" in message
    assert f"{small}.png must have its image's size" in message
    assert "holds 255" in message
    assert not made.folder("export_test").exists()
    wrong[0, 0] = 9
    write_mask(folder / f"{void}.png", wrong)
    with pytest.raises(BadFileError, match=r"must hold 0 to 4 or 255, but holds \[9\]"):
        export_test(made)
    Image.fromarray(np.zeros_like(wrong)).save(folder / f"{void}.png")
    with pytest.raises(BadFileError, match="palette PNG"):
        export_test(made)
