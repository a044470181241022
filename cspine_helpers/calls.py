"""Pictures of what a threshold calls: sweeps, confusion matrices, scores, vertebrae against patients."""

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from cspine_helpers.curves import LEVEL_NAMES, unit_square
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.metrics import (
    at_level,
    cleared_by_vertebrae,
    confusion,
    patient_level,
    rates,
    threshold_counts,
)
from cspine_helpers.plots import FRACTURED, GREY, INK, INTACT, STYLE, Picture

RATE_STYLES: dict[str, dict[str, Any]] = {
    "recall": {"color": FRACTURED, "linestyle": "-"},
    "precision": {"color": INTACT, "linestyle": "-"},
    "specificity": {"color": "#009E73", "linestyle": "--"},
    "f1": {"color": INK, "linestyle": ":"},
}
UNDER = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1}  # behind words over curves
RATE_NAMES = {"recall": "recall", "precision": "precision", "specificity": "specificity", "f1": "F1"}


def ink_over(share: float) -> str:
    """Colour of figures that stay readable over a cell shaded `Blues(share / 1.2)`."""
    return "white" if share > 0.72 else INK


@matplotlib.rc_context(STYLE)
def threshold_sweep(
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    threshold: float | None = None,
    precision_floor: float | None = None,
) -> Figure:
    """Recall, precision, specificity and F1 against the threshold, the chosen one marked.

    Raises:
        ValueError: see `metrics.check_scores`.
    """
    table = rates(threshold_counts(labels, probabilities))
    figure = Picture(figsize=(9, 4.4))
    axes = figure.subplots()
    for name, style in RATE_STYLES.items():
        axes.step(table["threshold"], table[name], where="post", label=RATE_NAMES[name], **style)
    unit_square(axes, "threshold", "rate")
    if precision_floor is not None:
        axes.axhline(precision_floor, color=INTACT, linewidth=1, linestyle="--")
        text = f"floor {precision_floor:.2f}"
        axes.text(1.0, precision_floor, text, color=INTACT, ha="right", va="bottom", bbox=UNDER)
    if threshold is not None:
        _mark_threshold(axes, threshold)
        row = rates(confusion(labels, probabilities, threshold)).iloc[0]
        for name, style in RATE_STYLES.items():
            axes.plot(threshold, row[name], "o", color=style["color"], mec="white", markersize=8, zorder=4)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.set_title("What each threshold gives and takes")
    return figure


@matplotlib.rc_context(STYLE)
def confusions(counts: Mapping[str, pd.DataFrame]) -> Figure:
    """Confusion matrices side by side, cells shaded by their share of the truth's row.

    Args:
        counts: title → one row of `metrics.confusion`.
    """
    figure = Picture(figsize=(3.4 * len(counts), 3.2))
    for axes, (title, row) in zip(
        np.atleast_1d(figure.subplots(1, len(counts))), counts.items(), strict=True
    ):
        tp, fp, fn, tn = (int(row[name].iloc[0]) for name in ("tp", "fp", "fn", "tn"))
        cells = np.array([[tp, fn], [fp, tn]])
        totals = cells.sum(axis=1)
        shares = cells / np.maximum(totals, 1)[:, None]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.2)
        for (y, x), count in np.ndenumerate(cells):
            ink = ink_over(shares[y, x])
            axes.text(x, y - 0.08, f"{count:,}", ha="center", va="center", fontsize=14, color=ink)
            axes.text(x, y + 0.17, f"{shares[y, x]:.1%}", ha="center", va="center", fontsize=10, color=ink)
        axes.set_xticks([0, 1], ["called\nfractured", "called\nintact"])
        axes.set_yticks([0, 1], [f"fractured\n{totals[0]:,}", f"intact\n{totals[1]:,}"])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(title)
    return figure


@matplotlib.rc_context(STYLE)
def score_histograms(
    predictions: pd.DataFrame, *, threshold: float | None = None, patient_threshold: float | None = None
) -> Figure:
    """How probabilities are spread among fractured and intact vertebrae, and among patients.

    Each class is scaled to its own size, so that the shapes can be compared.
    """
    figure = Picture(figsize=(11, 3.9))
    levels = {"all": threshold, "patient": patient_threshold}
    for axes, (level, mark) in zip(figure.subplots(1, 2), levels.items(), strict=True):
        rows = at_level(predictions, level)
        for truth, (name, colour) in enumerate({"intact": INTACT, "fractured": FRACTURED}.items()):
            scores = rows.loc[rows["label"] == truth, "probability"].to_numpy()
            share = np.full(len(scores), 1 / max(len(scores), 1))
            label = f"{name} ({len(scores):,})"
            axes.hist(scores, np.linspace(0, 1, 26), weights=share, color=colour, alpha=0.55, label=label)
        if mark is not None:
            _mark_threshold(axes, mark)
        axes.set(xlim=(0, 1), xlabel="probability", ylabel="share of the class")
        axes.set_ylim(0, 1.25 * axes.get_ylim()[1])  # room for the legend
        axes.legend(loc="upper right", ncols=2, fontsize=9)
        axes.set_title(LEVEL_NAMES[level])
    return figure


def _mark_threshold(axes: Axes, threshold: float) -> None:
    axes.axvline(threshold, color=INK, linewidth=1.2)
    where = axes.get_xaxis_transform()
    side, gap = ("right", -0.01) if threshold > 0.8 else ("left", 0.01)
    text = f"threshold {threshold:.4f}"
    axes.text(threshold + gap, 0.99, text, transform=where, ha=side, va="top", fontsize=9, bbox=UNDER)


@matplotlib.rc_context(STYLE)
def vertebra_against_patient(
    predictions: pd.DataFrame, *, threshold: float, patient_threshold: float | None = None
) -> Figure:
    """Why a vertebra threshold is not a patient threshold.

    Left: the share of patients without any fracture who stay below the threshold while C1, then C1 and C2,
    and so on to all seven are looked at. Right: the rates of vertebrae, of patients under the vertebra
    threshold, and of patients under a threshold of their own.

    Raises:
        ValueError: every patient has a fracture.
    """
    figure = Picture(figsize=(12, 4.4))
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    _cleared_panel(left, predictions, threshold)
    patients = patient_level(predictions)
    vertebrae = at_level(predictions, "all")
    groups = [("vertebrae", vertebrae, threshold, GREY), ("patients", patients, threshold, FRACTURED)]
    if patient_threshold is not None:
        groups.append(("patients, own", patients, patient_threshold, INTACT))
    names, width = ["recall", "precision", "specificity"], 0.8 / len(groups)
    for place, (name, rows, mark, colour) in enumerate(groups):
        row = rates(confusion(rows["label"], rows["probability"], mark)).iloc[0]
        x = np.arange(3) + (place - (len(groups) - 1) / 2) * width
        bars = right.bar(x, row[names], width * 0.94, color=colour, label=f"{name} at {mark:.4f}")
        right.bar_label(bars, fmt="%.2f", padding=2, fontsize=9)
    right.set_xticks(range(3), names)
    right.tick_params(axis="x", length=0)
    right.set(ylim=(0, 1.12))
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(groups), fontsize=9)
    right.set_title("The same threshold means something else")
    return figure


def _cleared_panel(axes: Axes, predictions: pd.DataFrame, threshold: float) -> None:
    cleared, independent = cleared_by_vertebrae(predictions, threshold)
    places = np.arange(1, len(VERTEBRAE) + 1)
    axes.plot(places, independent, color=GREY, linestyle="--", label="if vertebrae erred independently")
    axes.plot(places, cleared, "o-", color=INTACT, label="found")
    share = f"{cleared[-1]:.0%}"
    axes.annotate(share, (7, cleared[-1]), xytext=(8, 0), textcoords="offset points", va="center")
    axes.set(xlim=(0.7, 7.8), ylim=(0, 1.04), xlabel="vertebrae looked at")
    axes.set_ylabel("share of patients without fracture")
    axes.set_xticks(places, ["C1", *(f"C1–{name}" for name in VERTEBRAE[1:])])
    axes.grid(True, axis="y")
    axes.legend(loc="lower left")
    axes.set_title("Still cleared when one alarm is enough")
