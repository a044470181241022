"""One style for every picture: what colours mean, axes and legends that recur, and how files are written."""

import io
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cspine_helpers.files.paths import atomic_path, checked_name, figures_dir
from cspine_helpers.labels import SPLITS, VERTEBRAE

# Colours that stay apart for colour-blind readers. Source: Okabe & Ito, Color Universal Design (2008),
# without its yellow, which is lost on white paper.
INK, GREY, PALE = "#22262B", "#7A7F87", "#E3E5E8"
VERMILION, BLUE, GREEN = "#D55E00", "#0072B2", "#009E73"
AMBER, SKY, PINK = "#E69F00", "#56B4E9", "#CC79A7"
# What they mean in every picture; change them here.
FRACTURED, INTACT = VERMILION, BLUE
VERTEBRA_COLOURS = dict(zip(VERTEBRAE, (INK, AMBER, SKY, GREEN, BLUE, VERMILION, PINK), strict=True))
SPLIT_COLOURS = dict(zip(SPLITS, (BLUE, AMBER, GREEN), strict=True))

UNDER = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1}  # behind words over curves
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
in_style = matplotlib.rc_context(STYLE)  # decorates what draws


class Picture(Figure):
    """A matplotlib figure that shows itself in a notebook without pyplot, so that none needs closing."""

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


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # A figure without a layout engine would be given one when it has been saved: whoever draws it decides.
    with matplotlib.rc_context(STYLE | {"figure.constrained_layout.use": False}):
        figure.savefig(buffer, format="png", dpi=STYLE["figure.dpi"], metadata={"Software": None})
    return buffer.getvalue()


def save_figure(figure: Figure, name: str, *, cohort: str = "builtin") -> Path:
    """Save a picture as `figures/<name>.png` (`figures/<cohort>/<name>.png` for other cohorts).

    The same figure gives the same bytes: the file holds no date and no version.

    Raises:
        ValueError: the name holds more than letters, digits, `-` and `_`.

    Example:
        >>> save_figure(Picture(), "01_empty", cohort="mine").name  # doctest: +SKIP
        '01_empty.png'
    """
    return write_figure(figure, figures_dir(cohort) / f"{checked_name(name, 'figure')}.png")


def write_figure(figure: Figure, path: Path) -> Path:
    """Write a picture as a PNG file in one step; returns its path."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(_png(figure))
    return path
