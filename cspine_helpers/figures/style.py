"""One style for every picture: what colours mean, axes and legends that recur, and how files are written."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cspine_helpers.files.paths import atomic_path, checked_name, figures_dir
from cspine_helpers.labels import SPLITS, VERTEBRAE

# Colours that stay apart for colour-blind readers. Source: Okabe & Ito, Color Universal Design (2008),
# without its yellow, which is lost on white paper.
INK, GREY, PALE = "#22262B", "#7A7F87", "#E3E5E8"
VERMILION, BLUE, GREEN = "#D55E00", "#0072B2", "#009E73"
AMBER, SKY, PINK = "#E69F00", "#56B4E9", "#CC79A7"
# What they mean in every picture; change them here.
FRACTURED, INTACT = VERMILION, BLUE
INCONCLUSIVE = AMBER  # neither: a reader decides
VERTEBRA_COLOURS = dict(zip(VERTEBRAE, (INK, AMBER, SKY, GREEN, BLUE, VERMILION, PINK), strict=True))
SPLIT_COLOURS = dict(zip(SPLITS, (BLUE, AMBER, GREEN), strict=True))

FEW_FRACTURES = 5  # of one vertebra; a mean or an area of fewer is drawn as no more than a hint

UNDER = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1}  # behind words over curves
# Around what is drawn over CT, so that it is seen on bone and on air: letters; lines and boxes.
OUTLINED: list[patheffects.AbstractPathEffect] = [patheffects.withStroke(linewidth=2.2, foreground="black")]
CASED: list[patheffects.AbstractPathEffect] = [patheffects.withStroke(linewidth=3.6, foreground="black")]
# Settings for the length of one drawing, `@in_style`; never set for the whole session.
STYLE: dict = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.12,  # inches
    "figure.constrained_layout.h_pad": 0.1,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": PALE,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 2.0,
    "legend.frameon": False,
}
_GREYISH = 8  # between the channels of a pixel that counts as grey
_PRINT_DPI = 200  # of images in a PDF
_DATED = ("CreationDate", "Creator", "Producer")  # that would differ between two equal PDFs
in_style = matplotlib.rc_context(STYLE)  # decorates what draws


class Picture(Figure):
    """A matplotlib figure that shows itself in a notebook without pyplot, so that none needs closing.

    Attributes:
        colours: how many its PNG has at most, up to 256: half the bytes where CT is shown; None: all.
    """

    colours: int | None = None

    def _repr_png_(self) -> bytes:
        return _png(self)

    def head(self, title: str) -> None:
        """A title above all panels."""
        self.suptitle(title, x=0.01, ha="left")


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **grid: Any) -> tuple[Picture, Any]:
    """A picture, inches wide and high, and its axes as `Figure.subplots` gives them."""
    figure = Picture(figsize=(width, height))
    return figure, figure.subplots(rows, columns, **grid)


def grid_behind(axes: Axes) -> None:
    """A light grid below everything that is drawn."""
    axes.grid(True)
    axes.set_axisbelow(True)


def unit_square(axes: Axes, x: str, y: str) -> None:
    """Axes of two rates, both from 0 to 1, over a light grid."""
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel=x, ylabel=y)
    grid_behind(axes)


def legend_beside(axes: Axes, **options: Any) -> None:
    """The legend at the right of the axes."""
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), **options)


def reference(axes: Axes, at: float, along: Literal["x", "y"], *, colour: str = INK, label: str = "") -> None:
    """A thin dashed line through `at` on that axis, such as chance or uniform weights."""
    line = axes.axvline if along == "x" else axes.axhline
    line(at, color=colour, linewidth=1, linestyle="--", label=label or None)


def whole_inches(inches: float) -> float:
    """Inches that make whole pixels."""
    return round(inches, 1)


def interval_dot(
    axes: Axes, found: Mapping[Any, Any], row: float, colour: str = BLUE, *, marker: str = "o"
) -> None:
    """A row's `value` with `low` and `high`, hollow where it has no interval; in words where undefined."""
    value, low, high = (float(found[name]) for name in ("value", "low", "high"))
    if np.isnan(value):
        axes.text(0.02, row, "not defined", transform=axes.get_yaxis_transform(), color=GREY, va="center",
                  fontsize=8)  # fmt: skip
    elif np.isnan(low):
        axes.plot(value, row, marker, mfc="white", mec=colour, mew=1.4, ms=6)
    else:
        axes.plot([low, high], [row, row], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(value, row, marker, color=colour, ms=6)


def value_axis(axes: Axes, title: str) -> None:
    """A panel of dots: its title, a light grid along x, few ticks with a true minus."""
    axes.set_title(title, fontsize=10, pad=6)
    axes.grid(True, axis="x")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))


def mark_ends(
    axes: Axes,
    left: str,
    right: str,
    sides: Sequence[float] = (0.0, 1.0),
    base: float = 0.0,
    size: float = 10,
) -> None:
    """Letters in the lower corners of a picture, whose sides and base are at these fractions of the axes."""
    for text, x, side, inwards in zip((left, right), sides, ("left", "right"), (3, -3), strict=True):
        axes.annotate(text, (x, base), (inwards, 4), "axes fraction", "offset points", ha=side, va="bottom",
                      color="white", size=size, weight="bold", path_effects=OUTLINED)  # fmt: skip


def scale_bar(axes: Axes, pixel_mm: float, length_mm: float = 10, size: float = 7) -> None:
    """A bar of that length at the lower edge of a picture with pixels as units, its length in mm above it."""
    left, right = sorted(axes.get_xlim())
    half = length_mm / pixel_mm / 2
    middle = (left + right) / 2
    across = axes.get_xaxis_transform()
    axes.plot([middle - half, middle + half], [0.035, 0.035], color="white", linewidth=2, transform=across,
              solid_capstyle="butt", path_effects=CASED, gid="scale", scalex=False, scaley=False)  # fmt: skip
    axes.text(middle, 0.05, f"{length_mm:g} mm", transform=across, color="white", size=size, ha="center",
              va="bottom", path_effects=OUTLINED)  # fmt: skip


def signed(value: float, _: object = None) -> str:
    """A change as a tick writes it: +0.02, −0.02, 0."""
    return "0" if abs(value) < 1e-9 else f"{value:+.2g}".replace("-", "−")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # A figure without a layout engine would be given one when it has been saved: whoever draws it decides.
    with matplotlib.rc_context(STYLE | {"figure.constrained_layout.use": False}):
        figure.savefig(buffer, format="png", dpi=STYLE["figure.dpi"], metadata={"Software": None})
    if (colours := getattr(figure, "colours", None)) is None:
        return buffer.getvalue()
    return _with_palette(buffer, colours)


def _pdf(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE | {"figure.constrained_layout.use": False}):
        figure.savefig(buffer, format="pdf", dpi=_PRINT_DPI, metadata=dict.fromkeys(_DATED))
    return buffer.getvalue()


def _with_palette(png: io.BytesIO, colours: int) -> bytes:
    """The same picture with a palette: half of it greys, half colours, so that rare colours stay."""
    from PIL import Image

    pixels, half = np.asarray(Image.open(png).convert("RGB")), colours // 2
    coloured = np.ptp(pixels, axis=-1) > _GREYISH
    index = (pixels.mean(axis=-1) * (half - 1) / 255).round().astype(np.uint8)
    entries = np.repeat(np.linspace(0, 255, half).round(), 3)
    if coloured.any():
        found = Image.fromarray(pixels[coloured][None]).quantize(half, dither=Image.Dither.NONE)
        index[coloured] = half + np.asarray(found)[0]
        entries = np.append(entries, found.getpalette() or [])
    few, buffer = Image.fromarray(index), io.BytesIO()
    few.putpalette(entries.astype(np.uint8).tobytes())  # which makes it one of a palette
    few.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def save_figure(
    figure: Figure, name: str, *, cohort: str = "builtin", run: str | None = None, pdf: bool = False
) -> Path:
    """Save a picture as `figures/<name>.png`, or where `files.figures_dir` has those of a cohort and a run.

    The same figure gives the same bytes: the file holds no date and no version. With `pdf`, there is also
    `<name>.pdf` beside it, whose words can be searched and whose lines stay sharp in print.

    Returns:
        The path of the PNG.

    Raises:
        ValueError: the name holds more than letters, digits, `-` and `_`.

    Example:
        >>> save_figure(Picture(), "01_empty", cohort="mine").name  # doctest: +SKIP
        '01_empty.png'
    """
    path = figures_dir(cohort, run) / f"{checked_name(name, 'figure')}.png"
    if pdf:
        write_figure(figure, path.with_suffix(".pdf"))
    return write_figure(figure, path)


def write_figure(figure: Figure, path: Path) -> Path:
    """Write a picture as a PNG file, or as PDF where the path ends in it, in one step; returns its path."""
    content = _pdf(figure) if path.suffix == ".pdf" else _png(figure)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return path
