"""Pictures of predictions at every threshold: precision–recall and ROC curves with their bands.

Pictures of what a threshold calls: sweeps, confusion matrices, scores, vertebrae against patients.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from cspine_helpers.decisions.simulation import _TARGETS, METHODS
from cspine_helpers.evaluation.cases import at_level, cleared_by_vertebrae, defined_levels, patient_level
from cspine_helpers.evaluation.intervals import curve_bands
from cspine_helpers.figures.style import FRACTURED, GREY, INK, INTACT, STYLE, VERTEBRA_COLOURS, Picture
from cspine_helpers.files.paths import listing
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.metrics import (
    auroc,
    average_precision,
    confusion,
    pr_curve,
    rates,
    roc_curve,
    threshold_counts,
)

_COLOURS = dict(zip(METHODS, (INTACT, GREY, FRACTURED), strict=True))


@matplotlib.rc_context(STYLE)
def guarantee_picture(table: pd.DataFrame, *, recall: float, delta: float) -> Picture:
    """True recall of the thresholds of `simulate_guarantee`, and how often it is below what was asked for.

    Raises:
        ValueError: a method never found a threshold, so that there is nothing to draw.
    """
    never = table[table["unpromised"] == table["redraws"]]
    if len(never):
        names = listing(f"{row.target}: {row.method}" for row in never.itertuples())
        raise ValueError(f"No redraw gave a threshold for {names}. Simulate with more patients in each.")
    figure = Picture(figsize=(11, 0.55 * len(table) + 1.3))
    left, right = figure.subplots(1, 2, sharey=True)
    low, middle, high = table[["recall_5", "recall_50", "recall_95"]].to_numpy().T
    share, least, most = table[["share", "low", "high"]].to_numpy().T
    for row, method in enumerate(table["method"]):
        mark = {"color": _COLOURS[method], "fmt": "o", "ms": 6, "elinewidth": 2.5}
        left.errorbar(middle[row], row, xerr=[[middle[row] - low[row]], [high[row] - middle[row]]], **mark)
        right.errorbar(share[row], row, xerr=[[share[row] - least[row]], [most[row] - share[row]]], **mark)
        text = {"va": "center", "color": _COLOURS[method], "bbox": {"color": "white", "pad": 1}}
        right.text(most[row] + 0.015, row, f"{share[row]:.1%}", **text)
    left.axvline(recall, color=INK, linestyle="--", linewidth=1)
    right.axvline(delta, color=INK, linestyle="--", linewidth=1)
    targets = table["target"].map(_TARGETS)
    left.set_yticks(range(len(table)), [f"{a}\n{b}" for a, b in zip(targets, table["method"], strict=True)])
    left.set_ylim(len(table) - 0.5, -0.5)
    left.set(xlabel="true recall: median, 90% of redraws (dashed: asked for)")
    left.set_title("What new patients get")
    right.set(xlim=(0, max(most.max() * 1.25, 2 * delta)))
    right.set_xlabel(f"redraws with a true recall below {recall:.0%} (dashed: allowed)")
    right.set_title(f"How often it is less, of {table['redraws'].iloc[0]:,}")
    for axes in (left, right):
        axes.grid(True, axis="x")
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


@matplotlib.rc_context(STYLE)
def learning_curves(
    history: pd.DataFrame,
    *,
    best_epoch: int | None = None,
    slice_losses: Sequence[float] = (),
    title: str = "",
) -> Picture:
    """Loss, ranking and operating point over the epochs of a run's history; a line marks the best epoch.

    The fourth panel shows the learning rate, or the loss of the slice-level pretraining where there was one.
    """
    figure = Picture(figsize=(9, 6))
    grid = figure.subplots(2, 2)
    panels = {
        "Loss": {"train_loss": "train", "validation_loss": "validation"},
        "Ranking": {"validation_auroc": "AUROC", "validation_average_precision": "average precision"},
        "At the threshold": {"validation_recall": "recall", "validation_precision": "precision"},
        "Learning rate": {"learning_rate": ""},
    }
    for axes, (name, lines) in zip(grid.flat, panels.items(), strict=True):
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if name == "Learning rate" and slice_losses:
            axes.plot(range(1, len(slice_losses) + 1), slice_losses, color=INTACT)
            axes.axhline(np.log(2), color=GREY, linewidth=1, linestyle=":")
            axes.text(
                len(slice_losses), np.log(2), "guessing", color=GREY, ha="right", va="bottom", fontsize=9
            )
            axes.set_ylim(0, 0.8)
            axes.set_title("Before: loss of the slice-level pretraining")
            axes.set_xlabel("epoch of single slices")
            continue
        for (column, label), colour in zip(lines.items(), (INTACT, FRACTURED), strict=False):
            axes.plot(history["epoch"], history[column], "o-", color=colour, ms=3.5, label=label)
        if len(lines) > 1:
            axes.legend(labelcolor="linecolor", handlelength=1)
        if best_epoch is not None:
            axes.axvline(best_epoch, color=GREY, linewidth=1, linestyle="--", zorder=0)
        axes.set_title(name)
        axes.set_xlabel("epoch" if best_epoch is None else f"epoch (dashed: the best, {best_epoch})")
    for axes in (grid[0, 1], grid[1, 0]):
        axes.set_ylim(0, 1.02)
    if not slice_losses:
        grid[1, 1].yaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    return figure


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
