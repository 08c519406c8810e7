"""Pictures of images, masks and CAMs: numpy in, numpy out. Only `threshold_curves` and `grid` need matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import normalize

from pixelss._checks import check_number, check_tensor
from pixelss._resize import promote, resize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "grid",
    "heat_map",
    "overlay_cam",
    "overlay_mask",
    "prototype_similarity",
    "threshold_curves",
    "voc_palette",
]

Pixels = NDArray[np.uint8]

# "Inferno" at 0, 1/16, ..., 1: lightness rises all the way, for colour-blind eyes and in grey print too.
_INFERNO = np.frombuffer(
    bytes.fromhex(
        "0000040b0724210c4a3c096557106d70196e89226aa32b61bb3755d14644e35932f1711ef98d0afcab0ff9ca32f2e865fcffa4"
    ),
    np.uint8,
).reshape(17, 3)
# Okabe and Ito's colours, told apart by colour-blind eyes; without their yellow, which white paper swallows.
_CURVES = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = "osD^vP*"
_IMAGE_HINT = "An RGB image: of a batch take one, put the channels last; of a grey one stack three."
_DPI = 100


def voc_palette() -> Pixels:
    """Return PASCAL VOC's colours: class i has the bits of i spread over red, green and blue; 255 is void.

    It is the field's habit, not a colour-blind-safe one: give masks a legend with class names.

    Shape:
        (256, 3) uint8.

    Reference:
        Everingham et al., "The PASCAL Visual Object Classes Challenge", the development kit's `VOClabelcolormap`.

    Example:
        >>> voc_palette()[[0, 1, 15, 255]].tolist()
        [[0, 0, 0], [128, 0, 0], [192, 128, 128], [224, 224, 192]]
    """
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        colours |= ((np.arange(256)[:, None] >> (3 * bit) >> np.arange(3) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def heat_map(values: ArrayLike) -> Pixels:
    """Return the colour of every value: black at 0, purple, orange, light yellow at 1.

    Lightness rises with the value, also for colour-blind eyes. What lies outside [0, 1] takes the nearer end.

    Args:
        values: of any shape; a value that is not a number counts as 0.

    Shape:
        (...) -> (..., 3) uint8.

    Raises:
        TypeError: values that are no numbers.

    Reference:
        Smith and van der Walt, the colour map "inferno" of matplotlib, to 7 levels of 255.

    Example:
        >>> heat_map([0.0, 0.5, 1.0]).tolist()
        [[0, 0, 4], [187, 55, 85], [252, 255, 164]]
    """
    x = np.nan_to_num(_tensor("values", values).double().numpy(), nan=0, posinf=1, neginf=0).clip(0, 1)
    anchors = np.linspace(0, 1, len(_INFERNO))
    return np.stack([np.interp(x, anchors, channel) for channel in _INFERNO.T], -1).round().astype(np.uint8)


def overlay_cam(image: ArrayLike, cam: ArrayLike, *, alpha: float = 0.65) -> Pixels:
    """Return the heat map of one class over the image in grey.

    Args:
        image: RGB levels 0 to 255.
        cam: one normalised CAM, or any map in [0, 1], as of `prototype_similarity`; bilinearly resized to the image.
        alpha: share of the heat map in the mixture.

    Shape:
        (H, W, 3) uint8, (h, w) -> (H, W, 3) uint8.

    Raises:
        TypeError, ValueError: arrays of another rank, size or dtype; `alpha` outside [0, 1].

    Reference:
        Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016, whose figures show CAMs so.

    Example:
        >>> image = np.full((4, 6, 3), 200, dtype=np.uint8)
        >>> overlay_cam(image, np.eye(2), alpha=0.5).shape
        (4, 6, 3)
    """
    pixels = _image(image)
    values = _tensor("cam", cam)
    check_tensor("cam", values, "hw", hint="One class: take cam[0, k].")
    check_number("alpha", alpha, low=0, high=1)
    grey = (pixels @ np.array([0.299, 0.587, 0.114]))[..., None]
    heat = heat_map(resize(promote(values).nan_to_num(0, 0, 0), (len(pixels), len(pixels[0]))))
    return _levels((1 - alpha) * grey + alpha * heat)


def overlay_mask(image: ArrayLike, mask: ArrayLike, *, alpha: float = 0.6, palette: ArrayLike | None = None) -> Pixels:
    """Return a label map's colours over the image; the background, 0, shows the image as it is.

    Args:
        image: RGB levels 0 to 255.
        mask: classes, 0 to 255, as `class_region_mask` gives or as stored in a PNG; 255 is void.
        alpha: share of the colours in the mixture.
        palette: a colour a class, background first; None stands for `voc_palette`.

    Shape:
        (H, W, 3) uint8, (H, W) integer, (K, 3) uint8 -> (H, W, 3) uint8.

    Raises:
        TypeError, ValueError: arrays of another rank, size or dtype; a class without a colour; `alpha` outside [0, 1].

    Reference:
        Everingham et al., "The PASCAL Visual Object Classes Challenge", for the colours.

    Example:
        >>> overlay_mask(np.zeros((1, 2, 3), dtype=np.uint8), np.array([[0, 1]]), alpha=1).tolist()
        [[[0, 0, 0], [128, 0, 0]]]
    """
    pixels = _image(image)
    labels = _tensor("mask", mask)
    H, W = pixels.shape[:2]
    check_tensor("mask", labels, "HW", kind="integer", hint="The image's size, one label map.", H=H, W=W)
    check_number("alpha", alpha, low=0, high=1)
    colours = _tensor("palette", voc_palette() if palette is None else palette)
    K, _ = check_tensor("palette", colours, "KC", kind="integer", hint="A row of RGB a class.", C=3)
    index = labels.long().numpy()
    if index.min() < 0 or index.max() >= K:
        was = f"from {index.min()} to {index.max()}"
        raise ValueError(f"mask must hold classes in 0..{K - 1}, one a row of palette, but ranges {was}.")
    blend = np.where(index > 0, alpha, 0)[..., None]
    return _levels((1 - blend) * pixels + blend * colours.numpy()[index])


def prototype_similarity(features: ArrayLike, prototypes: ArrayLike) -> NDArray[np.float32]:
    """Return the cosine of one image's features and every prototype, cell by cell: what Eq. 4 compares, T aside.

    Args:
        features: pixel features X of one image.
        prototypes: one row a class, as `PrototypeBank.prototypes`; a row of zeros, not filled yet, gives 0.

    Shape:
        (D, h, w), (K, D) -> (K, h, w) float32 in [-1, 1]; in [0, 1] for features after a ReLU, as `CAMHead` gives.

    Raises:
        TypeError, ValueError: arrays of another rank, size or dtype.

    Reference:
        Yoon et al., "Exploring Pixel-level Self-supervision for Weakly Supervised Semantic Segmentation",
        Eq. 4.

    Example:
        >>> features = np.array([[[1.0, 1.0]], [[0.0, 1.0]]])
        >>> prototype_similarity(features, [[2.0, 0.0]]).tolist()
        [[[1.0, 0.7071067690849304]]]
    """
    cells, rows = _tensor("features", features), _tensor("prototypes", prototypes)
    D, h, w = check_tensor("features", cells, "Dhw", hint="One image: take features[b].")
    check_tensor("prototypes", rows, "KD", hint="One row a class, as wide as the features.", D=D)
    directions, towards = normalize(promote(cells).float().flatten(1), dim=0), normalize(promote(rows).float(), dim=1)
    similarity: NDArray[np.float32] = (towards @ directions).view(-1, h, w).clamp(-1, 1).numpy()
    return similarity


def threshold_curves(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]], *, ylabel: str = "mIoU (%)", width: int = 560
) -> Pixels:
    """Return a plot of scores against the background threshold, one curve a method, its best point marked.

    Args:
        curves: name -> (thresholds, scores as fractions); of `SweepScores` take `(s.thresholds, s.miou)`.
        ylabel: what the scores are.
        width: of the picture in pixels; its height is 0.62 of that and 20 for every two curves.

    Shape:
        Pairs of (T,) -> (H, W, 3) uint8.

    Raises:
        TypeError, ValueError: no curve, arrays of another rank or of two lengths, no finite score; a `width` below 200.
        ImportError: matplotlib is not installed.

    Reference:
        Yoon et al., "Exploring Pixel-level Self-supervision for Weakly Supervised Semantic Segmentation",
        section 4: a CAM is scored at its best threshold.

    Example:
        >>> t = np.linspace(0, 0.6, 61)
        >>> threshold_curves({"control": (t, 0.5 - (t - 0.2) ** 2), "+MAM": (t, 0.55 - (t - 0.3) ** 2)}).shape
        (367, 560, 3)
    """
    if not isinstance(curves, Mapping) or not curves:
        raise ValueError(f"curves must map one name or more to (thresholds, scores), but is {curves!r}.")
    check_number("width", width, low=200, high=10_000)
    plot, key = round(0.62 * width), 20 * -(-len(curves) // 2)  # two names a line, above the plot
    figure = _figure(width, plot + key)
    axes = figure.add_axes((60 / width, 50 / (plot + key), 1 - 75 / width, (plot - 60) / (plot + key)))
    for i, (name, (thresholds, scores)) in enumerate(curves.items()):
        x = _tensor(name, thresholds).double()
        (T,) = check_tensor(f"curves[{name!r}] thresholds", x, "T")
        y = _tensor(name, scores).double()
        check_tensor(f"curves[{name!r}] scores", y, "T", hint="One score a threshold.", T=T)
        if not y.isfinite().any():
            raise ValueError(f"curves[{name!r}] scores must hold a finite value, but are all {y[0].item()}.")
        best = int(y.nan_to_num(-torch.inf, -torch.inf).argmax())
        look: dict[str, Any] = {"color": _CURVES[i % len(_CURVES)], "marker": _MARKERS[i % len(_MARKERS)]}
        label = f"{name}: {100 * y[best].item():.1f} at {x[best].item():.2f}"
        axes.plot(x.numpy(), 100 * y.numpy(), markevery=[best], markersize=8, linewidth=1.6, label=label, **look)
    axes.set_xlabel("background threshold")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0, fontsize=9)
    return _render(figure)


def grid(
    rows: Sequence[Sequence[ArrayLike]],
    *,
    titles: Sequence[str] = (),
    names: Sequence[str] = (),
    legend: Mapping[str, ArrayLike] | None = None,
    heat: str = "",
    cell: int = 160,
) -> Pixels:
    """Return one picture of images in rows and columns, to compare methods.

    Args:
        rows: RGB images, a row a sequence, every row of one length; each is drawn `cell` wide in its own proportions.
        titles: one a column, above it; a long one is written smaller.
        names: one a row, at its left.
        legend: class name -> RGB colour, below; for instance `{"cat": voc_palette()[8]}`.
        heat: what `heat_map`'s colours mean ("CAM"); a bar from 0 to 1 is then drawn below.
        cell: width of a column in pixels, at least 40.

    Shape:
        Images (H, W, 3) uint8 -> one (H, W, 3) uint8.

    Raises:
        TypeError, ValueError: no image, rows of two lengths, a wrong number of `titles` or `names`, images of another
            rank or dtype, a `cell` out of range.
        ImportError: matplotlib is not installed.

    Reference:
        Yoon et al., "Exploring Pixel-level Self-supervision for Weakly Supervised Semantic Segmentation",
        the figures of section 4 are laid out so.

    Example:
        >>> image = np.zeros((50, 100, 3), dtype=np.uint8)
        >>> grid([[image, image], [image, image]], titles=["image", "CAM"]).shape
        (200, 338, 3)
    """
    images = [[_image(image) for image in row] for row in rows]
    if not images or not images[0]:
        raise ValueError("rows must hold one image or more, but is empty.")
    columns = len(images[0])
    for i, row in enumerate(images):
        if len(row) != columns:
            raise ValueError(f"rows must be of one length, but rows[0] has {columns} images and rows[{i}] {len(row)}.")
    for label, texts, count in (("titles", titles, columns), ("names", names, len(images))):
        if texts and len(texts) != count:
            raise ValueError(f"{label} must be empty or {count} texts, but are {len(texts)}.")
    check_number("cell", cell, low=40, high=2000)

    gap, band = 6, 22
    heights = [max(round(cell * len(image) / len(image[0])) for image in row) for row in images]
    left, top = gap + band * bool(names), gap + band * bool(titles)
    width = left + columns * (cell + gap)
    per_line = max(1, (width - 2 * gap) // max([28 + 8 * len(name) for name in legend or {}] or [1]))
    key = band * -(-len(legend or {}) // per_line) + band * bool(heat)
    height = top + sum(heights) + gap * len(heights) + key
    figure = _figure(width, height)

    def text(x: float, y: float, content: str, **style: Any) -> None:
        """Write centred text, smaller where it would not fit into its column or row."""
        written = figure.text(x / width, 1 - y / height, content, fontsize=10, va="center", ha="center", **style)
        extent = written.get_window_extent()
        room = cell / extent.width if not style else min(heights) / extent.height
        written.set_fontsize(10 * min(1, 0.92 * room))  # hinting makes small text wider

    y = top
    for i, (row, tallest) in enumerate(zip(images, heights, strict=True)):
        for j, image in enumerate(row):
            tall = round(cell * len(image) / len(image[0]))
            x = left + j * (cell + gap)
            axes = figure.add_axes((x / width, 1 - (y + tall) / height, cell / width, tall / height))
            axes.imshow(image, aspect="auto", interpolation="auto")
            axes.set_axis_off()
            if titles and i == 0:
                text(x + cell / 2, gap / 2 + band / 2, titles[j])
        if names:
            text(band / 2 + 2, y + tallest / 2, names[i], rotation=90)
        y += tallest + gap
    for i, (name, colour) in enumerate((legend or {}).items()):
        start, line = left + i % per_line * ((width - left) / per_line), y + band * (i // per_line + 0.5)
        box = figure.add_axes((start / width, 1 - (line + 6) / height, 12 / width, 12 / height))
        box.imshow(np.asarray(colour, dtype=np.uint8).reshape(1, 1, 3), aspect="auto")
        box.set_axis_off()
        figure.text((start + 17) / width, 1 - line / height, name, fontsize=9, va="center")
    if heat:
        line = height - band / 2
        bar = figure.add_axes((left / width, 1 - (line + 6) / height, min(120, cell) / width, 12 / height))
        bar.imshow(heat_map(np.linspace(0, 1, 256))[None], aspect="auto")
        bar.set_axis_off()
        start = left + min(120, cell) + 6
        figure.text(start / width, 1 - line / height, f"{heat}, 0 to 1", fontsize=9, va="center")
    return _render(figure)


def _tensor(name: str, value: ArrayLike | Tensor) -> Tensor:
    """Return what numpy makes of `value`, as a tensor of its own on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    array = np.array(value)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold numbers, but is an array of dtype {array.dtype}.")
    return torch.from_numpy(array)


def _image(image: ArrayLike) -> Pixels:
    pixels = _tensor("image", image)
    check_tensor("image", pixels, "HWC", kind="any", hint=_IMAGE_HINT, C=3)
    if pixels.dtype != torch.uint8:
        raise TypeError(f"image must be of dtype uint8 (levels 0 to 255), but is {pixels.dtype}. Undo scaling.")
    levels: Pixels = pixels.numpy()
    return levels


def _levels(x: NDArray[np.float64]) -> Pixels:
    return x.round().clip(0, 255).astype(np.uint8)


def _figure(width: int, height: int) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib: python -m pip install "pixelss[viz]".') from error
    return Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")


def _render(figure: Figure) -> Pixels:
    """Return the figure's pixels; no window, no state of pyplot is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[..., :3].copy()
