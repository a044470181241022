"""The threshold slider: what one move costs in the kernel.

The same three panels of 14,133 predictions, as many as RSNA 2022 has, for a move of the slider (numbers,
drawing, PNG, setting the widget) and for a new matplotlib figure each time (numbers from the same table of
counts, drawing, PNG), as most notebooks do it.
"""

import io
import statistics
from collections.abc import Iterator
from itertools import cycle

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.measure import Row, interleaved, milliseconds, ratio, spread
from cspine_helpers import metrics
from cspine_helpers.curves import RATE_NAMES, RATE_STYLES, unit_square
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.plots import INK, STYLE
from cspine_helpers.widgets import ThresholdExplorer

STUDIES = 2019
MOVES = np.random.default_rng(1).uniform(0.02, 0.9, 1000)  # as a hand drags: hardly a place twice


def predictions() -> pd.DataFrame:
    """A predictions table of RSNA 2022's size."""
    rng = np.random.default_rng(0)
    label = (rng.random(7 * STUDIES) < 0.1).astype(int)
    probability = np.clip(rng.beta(1.5, 6, len(label)) + 0.3 * label * rng.random(len(label)), 0, 1)
    table = pd.DataFrame({UID: np.repeat([f"1.{n + 1}" for n in range(STUDIES)], 7)})
    return table.assign(
        vertebra=VERTEBRAE * STUDIES, split="validation", label=label, probability=probability
    )


@matplotlib.rc_context(STYLE)
def new_figure(counts: pd.DataFrame, curve: pd.DataFrame, threshold: float) -> bytes:
    """The explorer's panels drawn from nothing."""
    now = metrics.rates(metrics.counts_at(counts, threshold)).iloc[0]
    figure = Figure(figsize=(10.4, 3.7))
    left, matrix, bars = figure.subplots(1, 3, width_ratios=[1.15, 1, 1])
    left.step(curve["recall"], curve["precision"], where="post")
    left.plot(now["recall"], now["precision"], "o", color=INK, ms=10, mec="white")
    unit_square(left, "recall", "precision")
    cells = np.array([[now["tp"], now["fn"]], [now["fp"], now["tn"]]])
    shares = cells / cells.sum(axis=1, keepdims=True)
    matrix.imshow(shares, cmap="Blues", vmin=0, vmax=1.2)
    for (row, column), count in np.ndenumerate(cells):
        matrix.text(
            column, row, f"{count:,.0f}\n{shares[row, column]:.1%}", ha="center", va="center", fontsize=12
        )
    matrix.set_xticks([0, 1], ["called\nfractured", "called\nintact"])
    matrix.set_yticks([0, 1], ["fractured", "intact"])
    matrix.set_title(f"threshold {threshold:.4f}")
    names = list(RATE_NAMES)
    drawn = bars.barh(names, now[names], color=[RATE_STYLES[name]["color"] for name in names])
    bars.bar_label(drawn, fmt="%.3f", padding=2)
    bars.set(xlim=(0, 1.2), xticks=[])
    bars.invert_yaxis()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=STYLE["figure.dpi"])
    return buffer.getvalue()


def rows() -> Iterator[Row]:
    table = predictions()
    explorer = ThresholdExplorer(table, threshold=0.2)
    counts = metrics.threshold_counts(table["label"], table["probability"])
    curve = metrics.pr_curve(table["label"], table["probability"])
    places = cycle(MOVES)
    calls = {
        "move": lambda: setattr(explorer, "threshold", next(places)),
        "new": lambda: new_figure(counts, curve, next(places)),
    }
    times = interleaved(calls, repeats=100, warm_up=3)
    found = ratio(times["new"], times["move"])
    middle, slow = statistics.median(times["move"]), statistics.quantiles(times["move"], n=20)[-1]
    yield Row(
        "a move of the slider",
        "a new figure each time",
        f"{milliseconds(times['move'])} against {milliseconds(times['new'])}: {spread(found, 1)} × faster",
        "≥ 6 ×",
        found[0] >= 6,
    )
    yield Row("a move of the slider", "25 ms", milliseconds(times["move"]), "≤ 25 ms", middle <= 0.025,
              f"one move in twenty takes {1000 * slow:.3g} ms or more.")  # fmt: skip
