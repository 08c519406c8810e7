"""Files that are either whole or absent: atomic writes, checkpoints that prove they are undamaged, CAMs as PNG."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from texts import BadFileError, named
from torch import Tensor

_AGAIN = "remove it and infer_cam/done.json, then run infer_cam again"


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write to a temporary file beside `path`, flush it to the disk, then rename: a reader never sees a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"could not write {path} ({error.strerror}); nothing was changed there") from error
    finally:
        with suppress(OSError):  # on a read-only disk not even what is absent can be removed
            temporary.unlink()
    with suppress(OSError):  # Windows opens no folder, and some file systems sync none: the rename is done anyway
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)


def append_line(path: Path, line: str) -> None:
    """Add a line to a log; a reader may see a part of the last one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise OSError(error.errno, f"could not write {path} ({error.strerror})") from error


def remove_unfinished(folder: Path, *, below: bool = True) -> None:
    """Remove what a killed `write_atomic` left in `folder` and below it; call it in one process, while none writes."""
    for path in folder.rglob(".*.tmp") if below else folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write `state` as step-STEP-DIGEST.pt; of the older ones the newest `keep` - 1 stay."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    path = folder / f"step-{step:07d}-{_digest(content)}.pt"
    write_atomic(path, content)
    for old in _checkpoints(folder)[keep:]:
        old.unlink(missing_ok=True)
    return path


def load_checkpoint(folder: Path, *, map_location: str | torch.device = "cpu") -> dict[str, Any] | None:
    """Return the newest undamaged checkpoint's state, None where there is none; a damaged one is named and passed."""
    for path in _checkpoints(folder):
        content = path.read_bytes()
        if path.stem.endswith(_digest(content)):
            return dict(torch.load(io.BytesIO(content), map_location=map_location, weights_only=True))
        warnings.warn(f"{path} is damaged (its content does not fit its name): trying the one before it", stacklevel=2)
    return None


def load_weights(path: Path, fix: str) -> dict[str, Tensor]:
    """Return the weights of a model.pt; raises, with what mends it, where a byte of it is not as it was written."""
    with named(path, f"is damaged: {fix}"):
        with zipfile.ZipFile(path) as parts:
            if part := parts.testzip():  # torch does not look at the checksums
                raise ValueError(f"{part} in it does not fit its checksum")
        return dict(torch.load(path, map_location="cpu", weights_only=True))


def remove_checkpoints(folder: Path) -> None:
    for path in _checkpoints(folder):
        path.unlink()


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"), reverse=True)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def save_cam(path: Path, cam: Tensor, tags: Tensor) -> None:
    """Write the present classes' CAMs as one grey PNG, one below the other, in steps of 1/255.

    Args:
        path: of the PNG; the class indices stand in its text chunk `classes`.
        cam: normalised CAMs (N, H, W) in [0, 1].
        tags: (N,).
    """
    classes = tags.nonzero().flatten().tolist()
    H, W = cam.shape[1:]
    pixels = (cam[classes] * 255).round().to(torch.uint8).reshape(-1, W).cpu().numpy()
    note = PngImagePlugin.PngInfo()
    note.add_text("classes", " ".join(map(str, classes)))
    note.add_text("size", f"{H} {W}")
    # PNG knows no empty picture: an image without a tag gets one black row, which no class claims.
    save_png(path, Image.fromarray(pixels if classes else np.zeros((1, W), np.uint8)), pnginfo=note)


def load_cam(path: Path, num_classes: int) -> Tensor:
    """Return the CAMs (N, H, W) of `save_cam`, zero for absent classes."""
    with named(path, f"is no CAM file of infer_cam: {_AGAIN}"), Image.open(path) as image:
        image.load()
        notes = image.text  # type: ignore[attr-defined]
        classes = [int(word) for word in notes["classes"].split()]
        H, W = (int(word) for word in notes["size"].split())
        pixels = torch.from_numpy(np.array(image))
    if pixels.shape != (max(len(classes) * H, 1), W) or max(classes, default=0) >= num_classes:
        raise BadFileError(f"{path} must hold {len(classes)} maps {H} x {W} of {num_classes} classes: {_AGAIN}.")
    cam = torch.zeros(num_classes, H, W)
    if classes:
        cam[classes] = pixels.view(len(classes), H, W).float() / 255
    return cam


def save_png(path: Path, image: Image.Image, **options: Any) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    write_atomic(path, buffer.getvalue())
