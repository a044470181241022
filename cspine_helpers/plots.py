"""One style for every picture of the series, and the pictures of labels, splits and training."""

import io
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.paths import atomic_path, figures_dir
from cspine_helpers.splits import SPLITS

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
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
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
    "axes.grid": False,
    "grid.color": PALE,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 2.0,
    "legend.frameon": False,
}


class Picture(Figure):
    """A matplotlib figure that shows itself in a notebook without pyplot, so that none needs closing."""

    def _repr_png_(self) -> bytes:
        return _png(self)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=STYLE["figure.dpi"], metadata={"Software": None})
    return buffer.getvalue()


def save_figure(figure: Figure, name: str, *, cohort: str = "builtin") -> Path:
    """Save a picture as `figures/<name>.png` (`figures/<cohort>/<name>.png` for other cohorts).

    The same figure gives the same bytes: the file holds no date and no version.

    Raises:
        ValueError: the name is a path, or empty.
    """
    if Path(name).name != name:
        raise ValueError(f"A figure's name is a plain file name such as '01_prevalence'; found {name!r}.")
    path = figures_dir(cohort) / f"{name}.png"
    with atomic_path(path) as temporary:
        temporary.write_bytes(_png(figure))
    return path
