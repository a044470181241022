"""Pictures of predictions at every threshold, of what one threshold does, and of how a run learned."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cspine_helpers import metrics
from cspine_helpers.decisions.simulation import METHODS, TARGETS
from cspine_helpers.evaluation.cases import PLURALS, Cases, cleared_by_vertebrae, defined_levels
from cspine_helpers.evaluation.intervals import bootstrap, curve_bands
from cspine_helpers.evaluation.resampling import score_interval
from cspine_helpers.figures import style
from cspine_helpers.figures.style import FRACTURED, GREY, INK, INTACT, Picture, canvas, in_style
from cspine_helpers.files.paths import listing
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.predictions import SINGLE

LEVEL_NAMES = {"all": "All vertebrae", **{name: name for name in VERTEBRAE}, "patient": "Patients"}
LEVEL_NAMES |= {kind: PLURALS[kind].capitalize() for kind in SINGLE}
RATE_NAMES = {"recall": "recall", "precision": "precision", "specificity": "specificity", "f1": "F1"}
RATE_STYLES: dict[str, dict[str, Any]] = {
    "recall": {"color": FRACTURED, "linestyle": "-"},
    "precision": {"color": INTACT, "linestyle": "-"},
    "specificity": {"color": style.GREEN, "linestyle": "--"},
    "f1": {"color": INK, "linestyle": ":"},
}
_METHOD_COLOURS = dict(zip(METHODS, (INTACT, GREY, FRACTURED), strict=True))
_CURVES: dict[str, tuple[Any, str, str, Any, str]] = {  # function, its columns x and y, area and its name
    "pr": (metrics.pr_curve, "recall", "precision", metrics.average_precision, "AP"),
    "roc": (metrics.roc_curve, "false_positive_rate", "recall", metrics.auroc, "AUROC"),
}
_AXES = {"false_positive_rate": "false positive rate (1 − specificity)"}


def level_title(cases: Cases) -> str:
    """The level's name; of patients with their aggregation."""
    return f"Patients by {cases.aggregation.name}" if cases.aggregation else level_name(cases)


def level_name(cases: Cases) -> str:
    """The level's name; of images theirs."""
    return LEVEL_NAMES[cases.level if cases.level in SINGLE else cases.name]


def draw_pr(axes: Axes, cases: Cases, *, colour: str = INTACT) -> None:
    """Draw the precision–recall curve over its chance line."""
    prevalence = cases.prevalence
    _steps(axes, cases, "pr", color=colour)
    style.reference(axes, prevalence, "y", colour=GREY)
    axes.text(0.01, prevalence - 0.01, f"chance {prevalence:.2f}", color=GREY, va="top", fontsize=9)


def _steps(axes: Axes, cases: Cases, kind: str, **line: Any) -> float:
    """Draw the curve of these cases; returns the area under it."""
    curve_of, x, y, area_of, _ = _CURVES[kind]
    curve = curve_of(cases.label, cases.probability)
    axes.step(curve[x], curve[y], where="post", **line)
    style.unit_square(axes, _AXES.get(x, x), y)
    return area_of(cases.label, cases.probability)


def _panel(axes: Axes, cases: Cases, kind: Literal["pr", "roc"]) -> None:
    """The curve of one level with chance, band and area; words where it has one class only."""
    _, x, y, _, name = _CURVES[kind]
    title = level_title(cases)
    if cases.level == "patient" and len(np.unique(cases.label)) < 2:
        axes.set_title(f"{title}: one class only, no curve")
        style.unit_square(axes, _AXES.get(x, x), y)
        return
    if kind == "pr":
        draw_pr(axes, cases)
    else:
        _steps(axes, cases, kind, color=INTACT)
        axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
        axes.text(0.56, 0.53, "chance", color=GREY, va="top", fontsize=9)
    try:
        band = curve_bands(cases, kind=kind)
        axes.fill_between(band[x], band["low"], band["high"], color=INTACT, alpha=0.15, linewidth=0)
    except ValueError:  # too many resamples of one class only
        axes.text(0.99, 0.01, "no band: too few patients", color=GREY, ha="right", va="bottom", fontsize=9)
    area = _CURVES[kind][3](cases.label, cases.probability)
    axes.set_title(f"{title}: {name} {area:.2f}")


@in_style
def pr_curves(
    cases: Cases, *, threshold: float | None = None, patient_threshold: float | None = None
) -> Picture:
    """Precision–recall curves of all vertebrae and of patients, and the area under that of each vertebra.

    Of images there is one curve. Bands are pointwise 95 % bootstrap intervals, resampling patients; so are
    the intervals of single vertebrae. Operating points are those of a threshold for vertebrae (or images),
    and of one for patients.

    Raises:
        ValueError: there is one class only.

    Example:
        >>> figure = pr_curves(Cases.of(predictions, split="validation"), threshold=0.5)
    """
    if cases.level in SINGLE:
        figure, axes = canvas(5.4, 4.3)
        _panel(axes, cases, "pr")
        _operating_point(axes, cases, threshold, named=True)
        return figure
    figure, (pooled, single, patients) = canvas(13.6, 4.3, 1, 3)
    _panel(pooled, cases, "pr")
    levels = defined_levels(cases)
    _areas(single, {name: cases.of_unit(name) for name in VERTEBRAE if name in levels})
    _panel(patients, cases.patients(), "pr")
    for axes, level, mark in ((pooled, "all", threshold), (patients, "patient", patient_threshold)):
        if level in levels:
            _operating_point(axes, cases.of_unit(level), mark, named=True)
    return figure


def _areas(axes: Axes, by_vertebra: Mapping[str, Cases]) -> None:
    """Average precision of each vertebra with its interval; hollow where its fractures are too few."""
    for row, cases in enumerate(by_vertebra.values()):
        found = bootstrap(cases, threshold=None, keep_undefined=True).set_index("metric")
        value, low, high = found.loc["average_precision", ["value", "low", "high"]].to_numpy(dtype=float)
        if int(cases.label.sum()) < style.FEW_FRACTURES:
            axes.plot(value, row, "o", mfc="white", mec=INTACT, mew=1.4)
        else:
            axes.plot([low, high], [row, row], color=INTACT, linewidth=2, solid_capstyle="butt")
            axes.plot(value, row, "o", color=INTACT)
        axes.plot(cases.prevalence, row, "|", color=GREY, ms=12, mew=1.5)
    names = [f"{name}\n{its.label.sum():,} of {len(its):,}" for name, its in by_vertebra.items()]
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(-0.02, 1.02), ylim=(len(names) - 0.5, -0.5))
    axes.set_xlabel(f"average precision (hollow: below {style.FEW_FRACTURES} fractures; grey: chance)")
    axes.grid(True, axis="x")
    axes.set_title("One vertebra at a time: AP, fractures")


@in_style
def roc_curves(cases: Cases) -> Picture:
    """ROC curves of all vertebrae and of patients over the chance line, with bands as in `pr_curves`.

    Of images there is one curve.

    Raises:
        ValueError: there is one class only.

    Example:
        >>> figure = roc_curves(Cases.of(predictions, split="validation"))
    """
    shown = _levels(cases)
    figure, panels = canvas(4.6 * len(shown), 4.3, 1, len(shown), squeeze=False)
    for axes, each in zip(panels.flat, shown, strict=True):
        _panel(axes, each, "roc")
    return figure


def _levels(cases: Cases) -> list[Cases]:
    """Vertebrae and the patients made of them; images alone."""
    return [cases] if cases.level in SINGLE else [cases, cases.patients()]


def _operating_point(
    axes: Axes, cases: Cases, threshold: float | None, *, colour: str = INK, named: bool = False
) -> None:
    if threshold is None:
        return
    rates = metrics.rates(metrics.confusion(cases.label, cases.probability, threshold))
    x, y = rates[["recall", "precision"]].iloc[0]
    axes.plot(x, y, "o", color=colour, markersize=8, mec="white", zorder=4)
    if named and not np.isnan(y):
        words = f"threshold {threshold:.4f}\nrecall {x:.2f}\nprecision {y:.2f}"
        below = x > 0.5 and y > 0.35  # the empty side of the curve
        offset, across, up = ((-8, -8), "right", "top") if below else ((8, 8), "left", "bottom")
        axes.annotate(words, (x, y), offset, textcoords="offset points", ha=across, va=up, fontsize=9)


@in_style
def threshold_sweep(
    cases: Cases, *, threshold: float | None = None, precision_floor: float | None = None
) -> Picture:
    """Recall, precision, specificity and F1 against the threshold, the chosen one marked.

    Raises:
        ValueError: see `metrics.check_scores`.

    Example:
        >>> figure = threshold_sweep(Cases.of(predictions, split="validation"), threshold=0.4)
    """
    scores = (cases.label, cases.probability)
    table = metrics.rates(metrics.threshold_counts(*scores))
    figure, axes = canvas(9, 4.4)
    for name, line in RATE_STYLES.items():
        axes.step(table["threshold"], table[name], where="post", label=RATE_NAMES[name], **line)
    style.unit_square(axes, "threshold", "rate")
    if precision_floor is not None:
        style.reference(axes, precision_floor, "y", colour=INTACT)
        text = f"floor {precision_floor:.2f}"
        axes.text(1.0, precision_floor, text, color=INTACT, ha="right", va="bottom", bbox=style.UNDER)
    if threshold is not None:
        axes.axvline(threshold, color=INK, linewidth=1.2)
        side, gap = ("right", -0.01) if threshold > 0.8 else ("left", 0.01)
        axes.text(threshold + gap, 0.99, f"threshold {threshold:.4f}", transform=axes.get_xaxis_transform(),
                  ha=side, va="top", fontsize=9, bbox=style.UNDER)  # fmt: skip
        row = metrics.rates(metrics.confusion(*scores, threshold)).iloc[0]
        for name, line in RATE_STYLES.items():
            axes.plot(threshold, row[name], "o", color=line["color"], mec="white", markersize=8, zorder=4)
    style.legend_beside(axes)
    axes.set_title("Rates at every threshold")
    return figure


def ink_over(share: float) -> str:
    """Colour of figures that stay readable over a cell shaded `Blues(share / 1.2)`."""
    return "white" if share > 0.72 else INK


@in_style
def confusions(counts: Mapping[str, pd.DataFrame]) -> Picture:
    """Confusion matrices side by side, cells shaded by their share of the observed row.

    Args:
        counts: title → one row of `metrics.confusion`.

    Example:
        >>> figure = confusions({"Test": metrics.confusion([0, 1, 1], [0.2, 0.4, 0.9], 0.5)})
    """
    figure, panels = canvas(3.4 * len(counts), 3.2, 1, len(counts), squeeze=False)
    for axes, (title, row) in zip(panels.flat, counts.items(), strict=True):
        cells = row[["tp", "fn", "fp", "tn"]].iloc[0].to_numpy(dtype=int).reshape(2, 2)
        totals = cells.sum(axis=1)
        shares = cells / np.maximum(totals, 1)[:, None]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.2)
        for (y, x), count in np.ndenumerate(cells):
            middle: dict[str, Any] = {"ha": "center", "va": "center", "color": ink_over(shares[y, x])}
            axes.text(x, y - 0.08, f"{count:,}", fontsize=14, **middle)
            axes.text(x, y + 0.17, f"{shares[y, x]:.1%}", fontsize=10, **middle)
        axes.set_xticks([0, 1], ["predicted\nfractured", "predicted\nintact"])
        axes.set_yticks([0, 1], [f"fractured\n{totals[0]:,}", f"intact\n{totals[1]:,}"])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(title)
    return figure


@in_style
def score_histograms(
    cases: Cases, *, threshold: float | None = None, patient_threshold: float | None = None
) -> Picture:
    """Probabilities of fractured and intact vertebrae, and of patients, each class scaled to its own size.

    Of images there is one panel. A threshold of either level is a line through its panel.

    Example:
        >>> figure = score_histograms(Cases.of(predictions, split="validation"))
    """
    shown = _levels(cases)
    figure, panels = canvas(5.5 * len(shown), 3.9, 1, len(shown), squeeze=False)
    for axes, each, mark in zip(panels.flat, shown, (threshold, patient_threshold), strict=False):
        for truth, (name, colour) in enumerate({"intact": INTACT, "fractured": FRACTURED}.items()):
            scores = each.probability[each.label == truth]
            share = np.full(len(scores), 1 / max(len(scores), 1))
            label = f"{name} ({len(scores):,})"
            axes.hist(scores, np.linspace(0, 1, 26), weights=share, color=colour, alpha=0.55, label=label)
        axes.set(xlim=(0, 1), xlabel="probability", ylabel="share of the class")
        axes.set_ylim(0, 1.25 * axes.get_ylim()[1])  # room for the legend
        if mark is not None:
            line = {"color": INK, "linewidth": 1, "linestyle": "--", "label": f"threshold {mark:.4f}"}
            axes.axvline(mark, 0, 0.84, **line)  # up to the legend
        axes.legend(loc="upper right", ncols=2 + (mark is not None), fontsize=9, columnspacing=1.2)
        axes.set_title(level_title(each))
    return figure


@in_style
def vertebra_against_patient(
    cases: Cases, *, threshold: float, patient_threshold: float | None = None
) -> Picture:
    """Why a vertebra threshold is not a patient threshold.

    Left: the share of patients without fracture who stay below the threshold as C1, then C1 and C2, and so
    on to all seven are read. Right: the rates of vertebrae, of patients at the vertebra threshold, and of
    patients at a threshold of their own. Whiskers are 95 % intervals with patients as units.

    Raises:
        ValueError: every patient has a fracture.

    Example:
        >>> figure = vertebra_against_patient(Cases.of(predictions, split="test"), threshold=0.5)
    """
    figure, (left, right) = canvas(12, 4.4, 1, 2, width_ratios=[1, 1.25])
    cleared, independent = cleared_by_vertebrae(cases, threshold)
    places = np.arange(1, len(VERTEBRAE) + 1)
    left.plot(places, independent, color=GREY, linestyle="--", label="if vertebrae erred independently")
    left.plot(places, cleared, "o-", color=INTACT, label="observed")
    intact = int((cases.studies["label"] == 0).sum())
    left.vlines(places, *score_interval(cleared, intact), color=INTACT, linewidth=1.4)
    share = f"{cleared[-1]:.0%}"
    left.annotate(share, (7, cleared[-1]), xytext=(8, 0), textcoords="offset points", va="center")
    left.set(xlim=(0.7, 7.8), ylim=(0, 1.04), title="Still below the threshold")
    left.set(xlabel="vertebrae read", ylabel=f"share of {intact:,} patients without fracture")
    left.set_xticks(places, ["C1", *(f"C1–{name}" for name in VERTEBRAE[1:])])
    left.grid(True, axis="y")
    left.legend(loc="lower left")
    patients = cases.patients()
    groups = [("vertebrae", cases, threshold, GREY), ("patients", patients, threshold, FRACTURED)]
    if patient_threshold is not None:
        groups.append(("patients, own", patients, patient_threshold, INTACT))
    names, width = ["recall", "precision", "specificity"], 0.8 / len(groups)
    for place, (name, rows, mark, colour) in enumerate(groups):
        its = bootstrap(rows, threshold=mark, keep_undefined=True).set_index("metric").loc[names]
        x = np.arange(3) + (place - (len(groups) - 1) / 2) * width
        right.bar(x, its["value"], width * 0.94, color=colour, label=f"{name} at {mark:.4f}")
        right.vlines(x, its["low"], its["high"], color=INK, linewidth=1.4)
        for at, value, high in zip(x, its["value"], its["high"].fillna(its["value"]), strict=True):
            if np.isfinite(value):
                right.text(at, high + 0.015, f"{value:.2f}", ha="center", va="bottom", fontsize=9)
    right.set_xticks(range(3), names)
    right.tick_params(axis="x", length=0)
    right.set(ylim=(0, 1.12), title=f"Vertebrae and {level_title(patients).lower()}")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(groups), fontsize=9)
    return figure


@in_style
def guarantee_picture(table: pd.DataFrame, *, recall: float, delta: float) -> Picture:
    """True recall of the thresholds of `simulate_guarantee`, and how often it violates the guarantee.

    Raises:
        ValueError: a method never found a threshold, so that there is nothing to draw.

    Example:
        >>> from cspine_helpers.decisions.simulation import simulate_guarantee
        >>> figure = guarantee_picture(simulate_guarantee(redraws=20), recall=0.9, delta=0.1)
    """
    never = table[table["no_threshold"] == table["redraws"]]
    if len(never):
        missing = listing(f"{row.target}: {row.method}" for row in never.itertuples())
        raise ValueError(f"No redraw gave a threshold for {missing}. Simulate with more patients in each.")
    figure, (left, right) = canvas(11, 0.55 * len(table) + 1.3, 1, 2, sharey=True)
    columns = {left: ("recall_5", "recall_50", "recall_95"), right: ("low", "violation_rate", "high")}
    for row, found in enumerate(table.to_dict("records")):
        mark = {"color": _METHOD_COLOURS[found["method"]], "fmt": "o", "ms": 6, "elinewidth": 2.5}
        for axes, names in columns.items():
            low, middle, high = (found[name] for name in names)
            axes.errorbar(middle, row, xerr=[[middle - low], [high - middle]], **mark)
        text = {"va": "center", "color": mark["color"], "bbox": {"color": "white", "pad": 1}}
        right.text(found["high"] + 0.015, row, f"{found['violation_rate']:.1%}", **text)
    style.reference(left, recall, "x")
    style.reference(right, delta, "x")
    targets = table["target"].map(TARGETS)
    left.set_yticks(range(len(table)), [f"{a}\n{b}" for a, b in zip(targets, table["method"], strict=True)])
    left.set(ylim=(len(table) - 0.5, -0.5), title="Recall in new patients")
    left.set_xlabel("true recall: median, 90% of redraws (dashed: guaranteed)")
    right.set(xlim=(0, max(table["high"].max() * 1.25, 2 * delta)))
    right.set_xlabel(f"redraws with a true recall below {recall:.0%} (dashed: allowed)")
    right.set_title(f"Violation rate, {table['redraws'].iloc[0]:,} redraws, 95% intervals")
    for axes in (left, right):
        axes.grid(True, axis="x")
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


@in_style
def learning_curves(
    history: pd.DataFrame,
    *,
    best_epoch: int | None = None,
    slice_losses: Sequence[float] = (),
    title: str = "",
) -> Picture:
    """Loss, ranking and operating point over the epochs of a run's history; a line marks the epoch kept.

    Ranking and operating point are of the validation split.

    The fourth panel shows the learning rate, or the loss of the slice-level pretraining where there was one;
    the third the Dice of masks, too, where a history has them.

    Example:
        >>> from cspine_helpers.runs import read_history
        >>> figure = learning_curves(read_history(run_folder), best_epoch=3)
    """
    figure, grid = canvas(9, 6.4, 2, 2)
    rates = {"validation_recall": "recall", "validation_precision": "precision"}
    calls, unit = "At the threshold", "rate"
    if history.get("validation_dice_pos", pd.Series(dtype=float)).notna().any():
        rates["validation_dice_pos"] = "Dice of masks"
        calls, unit = "Calls and masks", "rate at the threshold;\nmean Dice of masks"
    areas = {"validation_auroc": "AUROC", "validation_average_precision": "average precision"}
    panels = [
        ("Loss", "loss", {"train_loss": "train", "validation_loss": "validation"}),
        ("Ranking, validation", "area under the curve", areas),
        (f"{calls}, validation", unit, rates),
        ("Learning rate", "learning rate", {"learning_rate": ""}),
    ]
    *three, last = grid.flat
    for axes, (name, unit, lines) in zip(three if slice_losses else grid.flat, panels, strict=False):
        for (column, label), colour in zip(lines.items(), (INTACT, FRACTURED, GREY), strict=False):
            axes.plot(history["epoch"], history[column], "o-", color=colour, ms=3.5, label=label)
        if len(lines) > 1:
            below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 3}
            axes.legend(labelcolor="linecolor", handlelength=1, **below)
        if best_epoch is not None:
            axes.axvline(best_epoch, color=GREY, linewidth=1, linestyle="--", zorder=0)
        axes.set(title=name, ylabel=unit)
        axes.set_xlabel("epoch" if best_epoch is None else f"epoch (dashed: kept, {best_epoch})")
    if slice_losses:
        last.plot(range(1, len(slice_losses) + 1), slice_losses, color=INTACT)
        last.axhline(np.log(2), color=GREY, linewidth=1, linestyle=":")
        last.text(len(slice_losses), np.log(2), "guessing", color=GREY, ha="right", va="bottom", fontsize=9)
        last.set(ylim=(0, 0.8), title="Slice-level pretraining", xlabel="epoch of single slices")
        last.set_ylabel("loss")
    else:
        last.yaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
    for axes in grid.flat:
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (grid[0, 1], grid[1, 0]):
        axes.set_ylim(0, 1.02)
    figure.head(title)
    return figure
