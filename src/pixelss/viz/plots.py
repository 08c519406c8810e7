"""Pictures that matplotlib draws: curves over thresholds, and a grid of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from pixelss._checks import as_tensor, check_number, check_tensor
from pixelss.viz.pixels import Pixels, as_image, heat_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind eyes; without their yellow, which white paper swallows.
_CURVES = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = "osD^vP*"
_DPI = 100
_GAP, _BAND = 6, 22  # of a grid: between its images, for a line of text


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
        Yoon 2021, "Exploring Pixel-level Self-supervision", section 4: a CAM is scored at its best threshold.

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
    axes = figure.add_axes((75 / width, 50 / (plot + key), 1 - 90 / width, (plot - 60) / (plot + key)))
    for i, (name, (thresholds, scores)) in enumerate(curves.items()):
        x = as_tensor(name, thresholds).double()
        (T,) = check_tensor(f"curves[{name!r}] thresholds", x, "T")
        y = as_tensor(name, scores).double()
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
        Yoon 2021, "Exploring Pixel-level Self-supervision", whose figures of section 4 are laid out so.

    Example:
        >>> image = np.zeros((50, 100, 3), dtype=np.uint8)
        >>> grid([[image, image], [image, image]], titles=["image", "CAM"]).shape
        (200, 338, 3)
    """
    images = [[as_image(image) for image in row] for row in rows]
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

    legend = legend or {}
    layout = _layout(images, cell, titles=bool(titles), names=bool(names), legend=list(legend), heat=bool(heat))
    return _draw(layout, images, titles, names, legend, heat)


class _Layout(NamedTuple):
    """Where the parts of a `grid` lie, in pixels from the left and from the top."""

    size: tuple[int, int]  # width, height
    left: int  # of the first column
    columns: Sequence[int]
    rows: Sequence[int]
    heights: Sequence[int]  # of every row's tallest image
    cell: int
    entries: Sequence[tuple[float, float]]  # of the legend: left edge and middle
    bar: float  # the middle of the heat map's bar


def _layout(
    images: Sequence[Sequence[Pixels]],
    cell: int,
    *,
    titles: bool,
    names: bool,
    legend: Sequence[str],
    heat: bool,
) -> _Layout:
    left, top = _GAP + _BAND * names, _GAP + _BAND * titles
    columns = [left + j * (cell + _GAP) for j in range(len(images[0]))]
    width = columns[-1] + cell + _GAP
    heights = [max(_tall(image, cell) for image in row) for row in images]
    rows = [top + sum(heights[:i]) + _GAP * i for i in range(len(heights))]
    below = rows[-1] + heights[-1] + _GAP
    per_line = max(1, (width - 2 * _GAP) // max([28 + 8 * len(name) for name in legend] or [1]))
    lines = -(-len(legend) // per_line)
    entries = [
        (left + i % per_line * ((width - left) / per_line), below + _BAND * (i // per_line + 0.5))
        for i in range(len(legend))
    ]
    height = below + _BAND * lines + _BAND * heat
    return _Layout((width, height), left, columns, rows, heights, cell, entries, height - _BAND / 2)


def _tall(image: Pixels, cell: int) -> int:
    """Return the height of an image that is drawn `cell` wide."""
    return round(cell * len(image) / len(image[0]))


def _draw(
    layout: _Layout,
    images: Sequence[Sequence[Pixels]],
    titles: Sequence[str],
    names: Sequence[str],
    legend: Mapping[str, ArrayLike],
    heat: str,
) -> Pixels:
    (width, height), cell = layout.size, layout.cell
    figure = _figure(width, height)

    def picture(x: float, y: float, wide: float, tall: float, pixels: ArrayLike, **style: Any) -> None:
        """Draw pixels into the box whose upper left corner is (x, y)."""
        axes = figure.add_axes((x / width, 1 - (y + tall) / height, wide / width, tall / height))
        axes.imshow(pixels, aspect="auto", **style)
        axes.set_axis_off()

    def text(x: float, y: float, content: str, **style: Any) -> None:
        """Write centred text, smaller where it would not fit into its column or row."""
        written = figure.text(x / width, 1 - y / height, content, fontsize=10, va="center", ha="center", **style)
        extent = written.get_window_extent()
        room = cell / extent.width if not style else min(layout.heights) / extent.height
        written.set_fontsize(10 * min(1, 0.92 * room))  # hinting makes small text wider

    for row, y in zip(images, layout.rows, strict=True):
        for image, x in zip(row, layout.columns, strict=True):
            picture(x, y, cell, _tall(image, cell), image, interpolation="auto")
    for title, x in zip(titles, layout.columns, strict=False):
        text(x + cell / 2, _GAP / 2 + _BAND / 2, title)
    for name, y, tallest in zip(names, layout.rows, layout.heights, strict=False):
        text(_BAND / 2 + 2, y + tallest / 2, name, rotation=90)
    for (name, colour), (start, middle) in zip(legend.items(), layout.entries, strict=True):
        picture(start, middle - 6, 12, 12, np.asarray(colour, dtype=np.uint8).reshape(1, 1, 3))
        figure.text((start + 17) / width, 1 - middle / height, name, fontsize=9, va="center")
    if heat:
        wide = min(120, cell)
        picture(layout.left, layout.bar - 6, wide, 12, heat_map(np.linspace(0, 1, 256))[None])
        figure.text(
            (layout.left + wide + 6) / width, 1 - layout.bar / height, f"{heat}, 0 to 1", fontsize=9, va="center"
        )
    return _render(figure)


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
