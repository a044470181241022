"""One style for every picture of the series, and the pictures of labels, splits and training."""

import io
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from cspine_helpers.files.paths import atomic_path, checked_name, figures_dir
from cspine_helpers.labels import SPLITS, VERTEBRAE

# Colours that stay apart for colour-blind readers. Source: Okabe & Ito, Color Universal Design (2008),
# without its yellow, which is lost on white paper.
INK, GREY, PALE = "#22262B", "#7A7F87", "#E3E5E8"
FRACTURED, INTACT = "#D55E00", "#0072B2"
VERTEBRA_COLOURS = dict(
    zip(VERTEBRAE, ("#22262B", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"), strict=True)
)
SPLIT_COLOURS = dict(zip(SPLITS, ("#0072B2", "#E69F00", "#009E73"), strict=True))
# Settings for the length of one drawing, `@matplotlib.rc_context(STYLE)`; never set for the whole session.
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


class Picture(Figure):
    """A matplotlib figure that shows itself in a notebook without pyplot, so that none needs closing."""

    def _repr_png_(self) -> bytes:
        return _png(self)


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
    """
    return write_figure(figure, figures_dir(cohort) / f"{checked_name(name, 'figure')}.png")


def write_figure(figure: Figure, path: Path) -> Path:
    """Write a picture as a PNG file in one step; returns its path."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(_png(figure))
    return path
