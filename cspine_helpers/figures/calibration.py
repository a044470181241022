"""Pictures of what probabilities are worth: reliability, net benefit, predictive values."""

from collections.abc import Collection, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator
from numpy.typing import ArrayLike
from scipy.special import expit

from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.evaluation.clinical_utility import (
    COMPETITION_PREVALENCE,
    SCREENING_PREVALENCE,
    THRESHOLDS,
    decision_curve,
    predictive_curve,
)
from cspine_helpers.evaluation.reliability import (
    Bins,
    calibration_scores,
    reliability_table,
    score_logit,
    written_scores,
)
from cspine_helpers.figures import style
from cspine_helpers.figures.curves import level_title
from cspine_helpers.figures.style import FRACTURED, GREY, INK, INTACT, Picture, canvas, in_style
from cspine_helpers.files.paths import listing
from cspine_helpers.metrics import clip_note

_SCORE_NAMES = {"log_loss": "log loss", "brier": "Brier", "slope": "slope", "ece": "ECE"}
# One look for each model of a comparison, colour and line together, so that none rests on colour alone.
_LOOKS = ((style.VERMILION, "-"), (style.BLUE, "--"), (style.GREEN, "-."), (style.PINK, ":"))


@in_style
def reliability_diagrams(
    panels: Mapping[str, Cases],
    *,
    bins: int = 10,
    strategy: Bins = "quantile",
    logit: Collection[str] = (),
) -> Picture:
    """Reliability: predicted vs observed, a panel for each title, over the histogram of the probabilities.

    Whiskers are 95 % intervals with patients as units; beside them the scores of `calibration_scores`. Cases
    are of one split, which fitted no calibrator. Bins without a case are left out.

    Raises:
        ValueError: nothing to draw; see `reliability.reliability_table`.

    Example:
        >>> cases = Cases.of(predictions, split="validation")
        >>> figure = reliability_diagrams({"Vertebrae": cases, "Patients": cases.patients()}, bins=3)
    """
    if not panels:
        raise ValueError("There is nothing to draw: give at least one panel.")
    if unknown := [title for title in logit if title not in panels]:
        raise ValueError(f"logit names panels, {listing(panels)}; found {listing(unknown)}.")
    shape: dict = {"height_ratios": [3.4, 1], "sharex": "col", "squeeze": False}
    figure, grid = canvas(1.2 + 3.8 * len(panels), 5.3, 2, len(panels), **shape)
    for (upper, lower), (title, cases) in zip(grid.T, panels.items(), strict=True):
        # 1. Bins and scores above
        found = reliability_table(cases, bins=bins, strategy=strategy).query("not undefined")
        x, y = found["probability"], found["observed"]
        ends = _logit_ends(cases.probability) if title in logit else (0.0, 1.0)
        equal = np.linspace(ends[0], ends[1], 2 if title not in logit else 400)
        upper.plot(equal, equal, color=GREY, linestyle="--", linewidth=1)
        upper.plot(x, y, color=INTACT, linewidth=1, alpha=0.5)
        look: dict = {
            "fmt": "o",
            "color": INTACT,
            "ms": 5.5,
            "elinewidth": 1.4,
            "capsize": 2.5,
            "mec": "white",
        }
        upper.errorbar(x, y, yerr=[y - found["low"], found["high"] - y], **look)
        style.unit_square(upper, "", "observed share of fractures")
        scores = calibration_scores(cases, bins=bins, strategy=strategy)
        lines = [f"{name} {written_scores(scores)[key]}" for key, name in _SCORE_NAMES.items()]
        if note := clip_note(cases.label, cases.probability):
            lines.insert(1, f"  clipped: {note.partition(' cases')[0]} cases")
        too_high = scores.set_index("score")["value"]["bias"] > 0  # then points are below the diagonal
        at, side, end = ((0.03, 0.97), "left", "top") if too_high else ((0.97, 0.03), "right", "bottom")
        upper.annotate("\n".join(lines), at, xycoords="axes fraction", ha=side, va=end, fontsize=9)
        upper.set_title(title)
        # 2. All probabilities below
        truth = {"intact": INTACT, "fractured": FRACTURED}
        shown = [cases.probability[cases.label == label] for label in range(2)]
        edges = np.linspace(0, 1, 41)
        if title in logit:
            least, most = score_logit(np.array(ends)).tolist()
            edges = expit(np.linspace(least, most, 41))
            edges[[0, -1]] = ends  # to the last digit, so that no case falls outside
            shown = [each.clip(*ends) for each in shown]
        lower.hist(shown, edges.tolist(), stacked=True, color=list(truth.values()), label=list(truth))
        lower.set(xlim=(-0.02, 1.02), xlabel="predicted probability", ylabel="cases")
        if title in logit:
            _logit_axis(lower, ends)
        lower.yaxis.set_major_formatter("{x:,.0f}")
    for axes in grid[:, 1:].flat:
        axes.set_ylabel("")
    style.legend_beside(grid[1, -1], fontsize=9, handlelength=1)
    return figure


_TICKS = (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999)
_LEAST = 1e-4  # what is nearer to 0 or 1 is drawn there


def _logit_ends(probabilities: np.ndarray) -> tuple[float, float]:
    """Limits of a logit axis that holds them, and 0.5."""
    inside = probabilities.clip(_LEAST, 1 - _LEAST)
    return min(float(inside.min()), 0.4), max(float(inside.max()), 0.6)


def _logit_axis(axes: Axes, ends: tuple[float, float]) -> None:
    axes.set_xscale("logit", nonpositive="clip")
    axes.set_xlim(*ends)
    axes.set_xticks([tick for tick in _TICKS if ends[0] <= tick <= ends[1]])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("predicted probability (logit axis)")


@in_style
def decision_curves(
    cases: Mapping[str, Cases], *, prevalence: float | None = None, thresholds: ArrayLike = THRESHOLDS
) -> Picture:
    """Net benefit of treating by each model's probabilities, against treating all and none.

    Bands are pointwise 95 % intervals, patients as units; of three models or more they would hide each other,
    and are left out.

    Args:
        cases: name → cases, all of the same patients and level; at most four.
        prevalence: of that level, elsewhere; see `clinical_utility.decision_curve`.
        thresholds: where to draw.

    Raises:
        ValueError: none, or more than four; not of the same patients; see `clinical_utility.decision_curve`.

    Example:
        >>> figure = decision_curves({"as predicted": Cases.of(predictions, level="patient", split="test")})
    """
    if not 1 <= len(cases) <= len(_LOOKS):
        raise ValueError(f"One to {len(_LOOKS)} curves can be told apart; found {len(cases)}.")
    found = {
        name: decision_curve(each, prevalence=prevalence, thresholds=thresholds)
        for name, each in cases.items()
    }
    first, banded = next(iter(found.values())), len(found) <= 2
    if any(not np.allclose(curve["treat_all"], first["treat_all"]) for curve in found.values()):
        raise ValueError("The models differ in their share of fractures: they are not of the same cases.")
    figure, axes = canvas(9, 4.6)
    axes.plot(first["threshold"], first["treat_all"], color=GREY, linewidth=1.4, label="treat all")
    axes.axhline(0, color=INK, linewidth=1, label="treat none")
    for (name, curve), (colour, line) in zip(found.items(), _LOOKS, strict=False):
        t = curve["threshold"]
        if banded:
            axes.fill_between(t, curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0)
        axes.plot(t, curve["net_benefit"], color=colour, linestyle=line, label=name)
    highest = "high" if banded else "net_benefit"
    top = max(first["treat_all"].max(), *(curve[highest].max() for curve in found.values()))
    axes.set(ylim=(-0.25 * top, 1.05 * top), xlim=(0, first["threshold"].max()))
    axes.set(xlabel="threshold probability", ylabel=f"net benefit per {next(iter(cases.values())).level}")
    style.grid_behind(axes)
    style.legend_beside(axes)
    where = "" if prevalence is None else f" at a prevalence of {prevalence:.1%}"
    axes.set_title(f"{level_title(next(iter(cases.values())))}: net benefit{where}")
    return figure


@in_style
def predictive_value_curves(cases: Cases, threshold: float) -> Picture:
    """Positive and negative predictive value of a threshold at other prevalences.

    Values are written, for patients, at the prevalence of a screening set and of the competition; for
    vertebrae or images at their own. Bands are 95 % intervals, patients as units. All of it takes sensitivity
    and specificity to be the same everywhere, which external tests have not borne out: the better case.

    Raises:
        ValueError: see `clinical_utility.predictive_curve`.

    Example:
        >>> figure = predictive_value_curves(Cases.of(predictions, level="patient", split="test"), 0.5)
    """
    marks = {"screening": SCREENING_PREVALENCE, "competition": COMPETITION_PREVALENCE}
    if cases.level != "patient":
        marks = {"this split": cases.prevalence}
    curve = predictive_curve(cases, threshold, np.geomspace(0.005, 0.9, 120))
    figure, axes = canvas(9, 4.6)
    names = {"ppv": ("positive (fractured)", FRACTURED, "-"), "npv": ("negative (intact)", INTACT, "--")}
    x = curve["prevalence"]
    for key, (name, colour, line) in names.items():
        axes.fill_between(x, curve[f"{key}_low"], curve[f"{key}_high"], color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, curve[key], color=colour, linestyle=line, label=name)
    for name, share in marks.items():
        axes.axvline(share, color=GREY, linewidth=1, linestyle=":")
        axes.text(share * 0.97, 1.13, f"{name}\n{share:.1%}", ha="right", va="top", fontsize=9, color=GREY)
    values = predictive_curve(cases, threshold, list(marks.values()))
    for share, pair in zip(marks.values(), values[["ppv", "npv"]].to_numpy(), strict=True):
        lower, higher = sorted(pair.tolist())  # the lower is written below its point, the higher one above
        for value, offset, end in ((lower, (7, -4), "top"), (higher, (7, 4), "bottom")):
            axes.plot(share, value, "o", color=INK, ms=6, mec="white", zorder=4)
            axes.annotate(f"{value:.2f}", (share, value), offset, textcoords="offset points", va=end,
                          fontsize=9, bbox=style.UNDER)  # fmt: skip
    axes.set_xscale("log")
    axes.set(xlim=(0.005, 0.9), ylim=(-0.02, 1.15))
    axes.set(xlabel="prevalence of fractures", ylabel="predictive value")
    axes.set_xticks([0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    style.grid_behind(axes)
    style.legend_beside(axes)
    axes.set_title(f"{level_title(cases)} at threshold {threshold:.4f}: predictive values")
    return figure
