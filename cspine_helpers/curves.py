"""Pictures of predictions at every threshold: precision–recall and ROC curves with their bands."""

from typing import Literal

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cspine_helpers.bands import curve_bands
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.metrics import (
    at_level,
    auroc,
    average_precision,
    confusion,
    defined_levels,
    pr_curve,
    rates,
    roc_curve,
)
from cspine_helpers.plots import GREY, INK, INTACT, STYLE, VERTEBRA_COLOURS, Picture

LEVEL_NAMES = {"all": "All vertebrae", **{name: name for name in VERTEBRAE}, "patient": "Patients"}


def draw_pr(axes: Axes, predictions: pd.DataFrame, level: str, *, colour: str = INTACT) -> pd.DataFrame:
    """Draw the precision–recall curve of one level over its chance line; returns the level's rows."""
    rows = at_level(predictions, level)
    curve = pr_curve(rows["label"], rows["probability"])
    prevalence = rows["label"].mean()
    axes.step(curve["recall"], curve["precision"], where="post", color=colour)
    axes.axhline(prevalence, color=GREY, linestyle="--", linewidth=1)
    axes.text(0.01, prevalence - 0.01, f"chance {prevalence:.2f}", color=GREY, va="top", fontsize=9)
    unit_square(axes, "recall", "precision")
    return rows


def unit_square(axes: Axes, x: str, y: str) -> None:
    """Axes of two rates, both from 0 to 1, with a light grid behind."""
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel=x, ylabel=y)
    axes.grid(True)
    axes.set_axisbelow(True)


@matplotlib.rc_context(STYLE)
def pr_curves(
    predictions: pd.DataFrame, *, threshold: float | None = None, patient_threshold: float | None = None
) -> Figure:
    """Precision–recall curves of all vertebrae, of each vertebra, and of patients, with operating points.

    Bands are 95 % intervals with patients as units, each point by itself (`bands.curve_bands`); those of
    seven single vertebrae would hide each other, and are left out.

    Args:
        predictions: predictions table of one split.
        threshold: vertebra threshold to mark on the curves of vertebrae.
        patient_threshold: patient threshold to mark on the curve of patients.

    Raises:
        ValueError: the table holds one class only.
    """
    figure = Picture(figsize=(13.6, 4.3))
    pooled, single, patients = figure.subplots(1, 3)
    _pr_panel(pooled, predictions, "all", threshold)
    levels = defined_levels(predictions)
    for name in [level for level in VERTEBRAE if level in levels]:
        rows = at_level(predictions, name)
        curve = pr_curve(rows["label"], rows["probability"])
        area = average_precision(rows["label"], rows["probability"])
        colour, label = VERTEBRA_COLOURS[name], f"{name}  {area:.2f}"
        single.step(
            curve["recall"], curve["precision"], where="post", color=colour, linewidth=1.4, label=label
        )
        _operating_point(single, rows, threshold, colour=colour, named=False)
    unit_square(single, "recall", "precision")
    beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
    single.legend(title="average\nprecision", fontsize=9, title_fontsize=9, **beside)
    single.set_title("One vertebra at a time")
    if "patient" in levels:
        _pr_panel(patients, predictions, "patient", patient_threshold)
    else:
        patients.set_title("Patients: one class only, no curve")
        unit_square(patients, "recall", "precision")
    return figure


def _pr_panel(axes: Axes, predictions: pd.DataFrame, level: str, threshold: float | None) -> None:
    rows = draw_pr(axes, predictions, level)
    _draw_band(axes, predictions, level, "pr")
    area = average_precision(rows["label"], rows["probability"])
    _operating_point(axes, rows, threshold, colour=INK, named=True)
    axes.set_title(f"{LEVEL_NAMES[level]}: average precision {area:.2f}")


def _draw_band(axes: Axes, predictions: pd.DataFrame, level: str, kind: Literal["pr", "roc"]) -> None:
    """The band of a curve that is drawn already; words where too many resamples are of one class only."""
    try:
        band = curve_bands(predictions, kind=kind, level=level)
    except ValueError:
        axes.text(0.99, 0.01, "no band: too few patients", color=GREY, ha="right", va="bottom", fontsize=9)
        return
    across = band["recall" if kind == "pr" else "false_positive_rate"]
    axes.fill_between(across, band["low"], band["high"], color=INTACT, alpha=0.15, linewidth=0)


@matplotlib.rc_context(STYLE)
def roc_curves(predictions: pd.DataFrame) -> Figure:
    """ROC curves of all vertebrae and of patients over the chance line, with bands as in `pr_curves`.

    Args:
        predictions: predictions table of one split.

    Raises:
        ValueError: the table holds one class only.
    """
    figure = Picture(figsize=(9.2, 4.3))
    for axes, level in zip(figure.subplots(1, 2), ("all", "patient"), strict=True):
        unit_square(axes, "false positive rate (1 − specificity)", "recall")
        if level == "patient" and level not in defined_levels(predictions):
            axes.set_title("Patients: one class only, no curve")
            continue
        rows = at_level(predictions, level)
        curve = roc_curve(rows["label"], rows["probability"])
        axes.step(curve["false_positive_rate"], curve["recall"], where="post", color=INTACT)
        axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
        axes.text(0.56, 0.53, "chance", color=GREY, va="top", fontsize=9)
        _draw_band(axes, predictions, level, "roc")
        axes.set_title(f"{LEVEL_NAMES[level]}: AUROC {auroc(rows['label'], rows['probability']):.2f}")
    return figure


def _operating_point(
    axes: Axes, rows: pd.DataFrame, threshold: float | None, *, colour: str, named: bool
) -> None:
    if threshold is None:
        return
    point = rates(confusion(rows["label"], rows["probability"], threshold)).iloc[0]
    axes.plot(point["recall"], point["precision"], "o", color=colour, markersize=8, mec="white", zorder=4)
    if named and not np.isnan(point["precision"]):
        below = point["recall"] > 0.5 and point["precision"] > 0.35  # the empty side of the curve
        axes.annotate(
            f"threshold {threshold:.4f}\nrecall {point['recall']:.2f}\nprecision {point['precision']:.2f}",
            (point["recall"], point["precision"]),
            xytext=(-8, -8) if below else (8, 8),
            textcoords="offset points",
            ha="right" if below else "left",
            va="top" if below else "bottom",
            fontsize=9,
        )
