"""Files to arrays and arrays to files: CAM files of other code, indexed masks, class names; masks need Pillow."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pixelss._checks import as_tensor, check_count, check_tensor
from pixelss._palette import as_palette
from pixelss._unpickle import load_arrays

__all__ = ["COCO_CLASSES", "VOC_CLASSES", "read_cam", "read_mask", "write_mask"]

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
COCO_CLASSES = (  # by category id, without the gaps: column 0 is person, column 79 toothbrush
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone"),
    *("microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear"),
    *("hair drier", "toothbrush"),
)
_FULL_SIZE = ("attn_highres", "high_res", "hr_cam")  # CLIP-ES, IRN, Puzzle-CAM


def read_cam(
    path: str | os.PathLike[str], num_classes: int, *, maps: str | None = None, background: bool = False
) -> NDArray[np.float32]:
    """Return the CAMs of one image from a file that another code base wrote, zero for the classes it does not hold.

    Known are a dict {class: (H, W)} (PSA, SEAM and their heirs) and a dict with "keys" and maps beside them (IRN,
    ReCAM, AdvCAM; Puzzle-CAM, whose keys count the background; CLIP-ES), as `np.save` or `pickle.dump` wrote it.
    Loaded by numpy or pickle such files can run code. Here they cannot: all but numbers, strings, lists, dicts, numpy
    arrays and tensors is refused.

    Args:
        path: of the file.
        num_classes: N, the foreground classes.
        maps: in a file with "keys" the name of the maps, as "cam" (IRN's at a quarter of the size); None takes those at
            full size.
        background: the file of {class: (H, W)} counts the background as class 0, as PSA's of CRF scores do: K maps.

    Shape:
        -> (N, H, W) float32; (N + 1, H, W) with `background`.

    Raises:
        TypeError, ValueError: a file of another kind, or of one that `maps` or `background` do not fit; content that is
            refused; a class out of range; no map.

    Reference:
        Ahn 2018, "Learning Pixel-level Semantic Affinity";
        Ahn 2019, "Weakly Supervised Learning of Instance Segmentation": their files.

    Example:
        >>> import tempfile
        >>> path = f"{tempfile.mkdtemp()}/2007_000032.npy"
        >>> np.save(path, {14: np.ones((3, 4), dtype=np.float32)})
        >>> cam = read_cam(path, num_classes=20)
        >>> cam.shape, float(cam[14].max()), float(cam.sum())
        ((20, 3, 4), 1.0, 12.0)
    """
    check_count("num_classes", num_classes)
    content = load_arrays(Path(path))
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a dict of CAMs, but holds {_kind(content)}.")
    if "keys" in content:
        if background:
            raise ValueError(f"{path} has keys, which name the classes as they are. Pass background=False.")
        name = maps or next((name for name in _FULL_SIZE if name in content), None)
        if name is None or name not in content:
            raise ValueError(f"{path} has no maps {maps or 'at full size'}. Pass maps=, one of {_names(content)}.")
        values = list(_array(path, content[name]))
        keys = _array(path, content["keys"]).ravel().tolist()
        if len(keys) == len(values) + 1 and keys[0] == 0:  # Puzzle-CAM's: 0, and every class + 1
            keys = [key - 1 for key in keys[1:]]
        if len(keys) != len(values):
            raise ValueError(f"{path} must hold a map a key, but holds {len(keys)} keys and {len(values)} maps.")
        pairs = list(zip(keys, values, strict=True))
    else:
        if maps is not None:
            raise ValueError(f"{path} has no keys, and one map a class. Pass maps=None, not {maps!r}.")
        pairs = [(key, _array(path, value)) for key, value in content.items()]
    if not pairs:
        raise ValueError(f"{path} holds no map, as of an image without tags: its size is unknown.")
    K = num_classes + background
    for key, value in pairs:
        if isinstance(key, bool) or not isinstance(key, (int, np.integer)) or not 0 <= key < K:
            hint = " Does the file count the background? Pass background=True." if key == K else ""
            raise ValueError(f"{path} must hold classes in 0..{K - 1}, but holds {key!r}.{hint}")
        if value.ndim != 2 or value.shape != pairs[0][1].shape:
            raise ValueError(f"{path} must hold maps (H, W) of one size, but class {key} has shape {value.shape}.")
    cam = np.zeros((K, *pairs[0][1].shape), dtype=np.float32)
    for key, value in pairs:
        cam[key] = value
    return cam


def read_mask(path: str | os.PathLike[str], *, palette: ArrayLike | None = None) -> NDArray[np.int64]:
    """Return the label map of an image file that holds class indices: a palette, grey or black-and-white PNG.

    Args:
        path: of the file.
        palette: the colours of a file that holds colours (RGB), a row a class; None refuses such a file.

    Shape:
        -> (H, W) int64; with `palette`, (K, 3) uint8, values 0..K-1.

    Raises:
        ValueError: a file with colours and no `palette`, or with a colour that it does not hold, as a resize
            or JPEG makes them.
        ImportError: Pillow is not installed.

    Reference:
        Everingham 2015, "The PASCAL Visual Object Classes Challenge", whose masks are palette PNGs with 255 void.

    Example:
        >>> import tempfile
        >>> path = f"{tempfile.mkdtemp()}/mask.png"
        >>> write_mask(path, [[0, 1, 255]])
        >>> read_mask(path)
        array([[  0,   1, 255]])
    """
    with _pillow().open(path) as image:
        mode = image.mode
        if mode in ("RGB", "RGBA"):
            colours = np.array(image.convert("RGB"))
        else:
            indices = np.array(image)
    if mode in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
        return indices.astype(np.int64)
    if mode not in ("RGB", "RGBA"):
        raise ValueError(f"{path} must hold class indices (a palette or grey PNG), but has mode {mode}.")
    if palette is None:
        raise ValueError(
            f"{path} must hold class indices (a palette or grey PNG), but holds colours ({mode}). "
            "Are they VOC's? Pass palette=pixelss.viz.voc_palette()."
        )
    return _classes_of(path, colours, as_palette(palette))


def write_mask(path: str | os.PathLike[str], mask: ArrayLike | Tensor, *, palette: ArrayLike | None = None) -> None:
    """Write a label map as an 8-bit palette PNG: what torchvision, mmsegmentation and VOC's tools read.

    The file is whole or absent, whatever happens: it is written beside `path` and then renamed. 8 bits hold the
    classes 0 to 254 and void, 255. Label maps with larger values are refused rather than written with 16 bits, which
    common readers wrap to 8 without a word: keep such maps by `np.save`.

    Args:
        path: ends in .png; its folder is made.
        mask: classes and void, 0 to 255, an array or a tensor on any device.
        palette: a colour a class, background first; None stands for VOC's, `pixelss.viz.voc_palette`.

    Shape:
        (H, W) of any integer dtype, (K, 3) uint8.

    Raises:
        TypeError, ValueError: a label map of another rank or dtype kind, or with values outside 0..255; a path that
            does not end in .png.
        OSError: the disk is full, the folder is not writable; what was at `path` is as it was.
        ImportError: Pillow is not installed.

    Reference:
        Everingham 2015, "The PASCAL Visual Object Classes Challenge".

    Example:
        >>> import tempfile, torch
        >>> write_mask(f"{tempfile.mkdtemp()}/mask.png", torch.tensor([[0, 20, 255]]))
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"path must end in .png, which keeps every value, but is {path}.")
    values = _label_map(mask)
    if (low := int(values.min())) < 0 or (high := int(values.max())) > 255:
        void = " Void is 255 in such files: mask.where(mask >= 0, 255)." if low < 0 else ""
        fix = void or " 8 bits hold no more: keep it by np.save."
        raise ValueError(f"mask must hold 0 to 255, but holds {low if low < 0 else high}.{fix}")
    image = _pillow().fromarray(values.astype(np.uint8))
    image.putpalette(as_palette(palette).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    _write_atomic(path, buffer.getvalue())


def _write_atomic(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the rename, else a power cut may leave an empty file
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"could not write {path} ({error.strerror}); nothing was changed there") from error
    finally:
        with suppress(OSError):  # on a read-only disk not even what is absent can be removed
            temporary.unlink()


def _label_map(mask: ArrayLike | Tensor) -> NDArray[np.int64]:
    values = as_tensor("mask", mask)
    check_tensor("mask", values, "HW", kind="integer", hint="One label map: of a batch take one.")
    labels: NDArray[np.int64] = values.long().numpy()
    return labels


def _classes_of(
    path: str | os.PathLike[str], pixels: NDArray[np.uint8], colours: NDArray[np.uint8]
) -> NDArray[np.int64]:
    """Return the row of `colours` (K, 3) of every pixel (H, W, 3), the first of equal rows."""
    weights = np.array([1 << 16, 1 << 8, 1])
    codes, rows = np.unique(colours @ weights, return_index=True)
    wanted = pixels @ weights
    found = np.searchsorted(codes, wanted).clip(max=len(codes) - 1)
    if (unknown := codes[found] != wanted).any():
        raise ValueError(f"{path} holds the colour {tuple(pixels[unknown][0].tolist())}, which palette does not.")
    classes: NDArray[np.int64] = rows[found].astype(np.int64)
    return classes


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('Masks as files need Pillow: python -m pip install "pixelss[viz]".') from error
    return Image


def _kind(content: object) -> str:
    return f"an array of shape {content.shape}" if isinstance(content, np.ndarray) else type(content).__name__


def _names(content: Mapping[object, object]) -> str:
    return ", ".join(repr(name) for name in content if name != "keys") or "none"


def _array(path: str | os.PathLike[str], value: object) -> NDArray[Any]:
    if isinstance(value, Tensor):  # numpy knows no bfloat16
        value = (value.detach().float() if value.is_floating_point() else value).numpy()
    array = np.asarray(value)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{path} must hold maps of numbers, but holds {type(value).__name__}, {array.dtype}.")
    return array
