"""Stage export_test: the archive that the PASCAL VOC test server takes, every mask checked before it is packed."""

from __future__ import annotations

import gzip
import io
import tarfile

from data import VOID, BadFileError
from parallel import rank
from PIL import Image
from stages import IMAGES, Run, Stage
from storage import write_atomic

_INSIDE = "results/VOC2012/Segmentation/comp6_test_cls"


def export_test(run: Run) -> None:
    """Write export_test/results.tar.gz; masks that are missing or wrong are all named, and none is packed then."""
    name = run.config.data.test
    if name is None:
        run.finish("export_test", skipped="data.test is null")
        return
    if rank() == 0:
        stems, faults = run.data.stems(name), []
        for stem in stems:
            try:
                _check(run, stem)
            except BadFileError as error:
                faults.append(str(error))
        if faults:
            raise BadFileError(
                f"nothing was packed, for {len(faults)} of {len(stems)} masks are wrong:\n" + "\n".join(faults)
            )
        write_atomic(run.folder("export_test") / "results.tar.gz", _archive(run, stems))
    run.finish("export_test", list=name, images=len(run.data.stems(name)), archive="export_test/results.tar.gz")


def _check(run: Run, stem: str) -> None:
    folder = run.folder("infer_seg") / "test"
    mask = run.data.mask(stem, folder=folder)  # its own errors name a missing, unreadable or wrong one
    path = folder / f"{stem}.png"
    if (mask == VOID).any():
        raise BadFileError(f"{path} must hold 0 to {run.data.num_classes}, but holds {VOID}, which counts as wrong.")
    with Image.open(path) as image:
        if image.mode != "P":
            raise BadFileError(f"{path} must be a palette PNG, but has mode {image.mode}.")


def _archive(run: Run, stems: list[str]) -> bytes:
    """Return the packed bytes; the same masks give the same bytes: no dates, no owners, sorted names."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as archive:
        for stem in sorted(stems):
            content = (run.folder("infer_seg") / "test" / f"{stem}.png").read_bytes()
            entry = tarfile.TarInfo(f"{_INSIDE}/{stem}.png")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


STAGE = Stage(
    "export_test",
    export_test,
    memory="the number of test images, whose archive is made in memory",
    needs=("infer_seg",),
    reads=lambda config: [(config.data.test, IMAGES)],
)
