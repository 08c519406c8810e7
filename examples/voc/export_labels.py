"""Stage export_labels: the pseudo-labels beside their images as a data set that others' readers know, and overlays.

VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation/train.txt} is where torchvision's VOCSegmentation
and mmsegmentation look; the names of the classes stand in classes.txt.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from inference import cam_stems, shared_batches, writing
from numpy.typing import NDArray
from parallel import barrier, rank
from PIL import Image
from pixels import orientation, read_image, resize_mask
from stages import IMAGES, TAGS, Run, Stage
from storage import save_png, write_atomic

from pixelss import viz
from pixelss.io import write_mask

Array = NDArray[np.uint8]
_INSIDE = Path("VOCdevkit", "VOC2012")
_OVERLAYS = 48  # of the first images


def export_labels(run: Run) -> None:
    """Write what is not there yet; photographs keep their size, and labels are enlarged to it."""
    if run.config.data.tags is None:
        run.finish("export_labels", skipped="the data is in the VOC layout: its labels are make_labels/*.png")
        return
    stems, root = cam_stems(run), run.folder("export_labels") / _INSIDE
    shown = set(stems[:_OVERLAYS])

    def read(stem: str) -> tuple[Array, Array]:
        image = read_image(run.data.image_path(stem))
        return image, resize_mask(run.data.mask(stem, folder=run.folder("make_labels")), image.shape[:2])

    def done(stem: str) -> bool:
        return (root / "SegmentationClass" / f"{stem}.png").is_file()

    with writing(run) as write:
        for ((stem, (image, mask)),) in shared_batches(run, stems, read, desc="export_labels", done=done):
            if stem in shown:
                save_png(run.folder("export_labels") / "overlays" / f"{stem}.png", _overlay(run, image, mask))
            write(_write_pair, root, stem, _as_jpeg(run.data.image_path(stem), image), mask)
    barrier()
    listed = [stem for stem in stems if done(stem)]  # without those that data.on_bad_file left out
    if rank() == 0:
        write_atomic(root / "ImageSets" / "Segmentation" / "train.txt", "".join(f"{stem}\n" for stem in listed))
        write_atomic(root / "classes.txt", "".join(f"{name}\n" for name in run.data.classes))
    run.finish(
        "export_labels",
        images=len(listed),
        folder=f"export_labels/{_INSIDE.as_posix()}",
        overlays="export_labels/overlays",
    )


def _write_pair(root: Path, stem: str, image: bytes, mask: Array) -> None:
    write_atomic(root / "JPEGImages" / f"{stem}.jpg", image)
    write_mask(root / "SegmentationClass" / f"{stem}.png", mask)  # the last: it tells that the pair is done


def _as_jpeg(path: Path, image: Array) -> bytes:
    """Return an upright JPEG file's bytes; any other image is written anew, for readers do not turn it."""
    with Image.open(path) as file:
        if file.format == "JPEG" and file.mode in ("RGB", "L") and orientation(file) == 1:
            return path.read_bytes()
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def _overlay(run: Run, image: Array, mask: Array) -> Image.Image:
    """Return an image beside its label over it, with the colours of the classes that the label shows."""
    size = np.array(image.shape[:2]) * min(1.0, 480 / max(image.shape[:2]))
    H, W = (max(1, round(side)) for side in size)
    small, label = np.array(Image.fromarray(image).resize((W, H))), resize_mask(mask, (H, W))
    palette = viz.voc_palette()
    legend = {run.data.classes[k - 1]: palette[k] for k in np.unique(label).tolist() if 0 < k <= run.data.num_classes}
    picture = viz.grid(
        [[small, viz.overlay_mask(small, label)]], titles=["image", "label"], legend=legend or None, cell=320
    )
    return Image.fromarray(picture)


STAGE = Stage(
    "export_labels",
    export_labels,
    memory="the size of the images",
    needs=("make_labels",),
    reads=lambda config: [(config.data.train, {**IMAGES, **TAGS})],
)
