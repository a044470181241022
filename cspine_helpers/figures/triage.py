"""Pictures of triage: what deferral gains, what it costs, and whether its guarantee holds."""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter
from numpy.typing import ArrayLike

from cspine_helpers.figures import style
from cspine_helpers.figures.style import (
    FRACTURED,
    GREY,
    INCONCLUSIVE,
    INK,
    INTACT,
    Picture,
    canvas,
    in_style,
    whole_inches,
)
from cspine_helpers.files.paths import listing
from cspine_helpers.files.tables import require_columns

PLAIN = "distance"  # from the threshold: what any other confidence has to beat
ANSWERS = {"negative": INTACT, "inconclusive": INCONCLUSIVE, "positive": FRACTURED}
_WORDS = {
    "distance": "plain probability",
    "calibrated": "calibrated probability",
    "disagreement": "disagreement of runs",
}
_MAP = style.GREEN  # the confidence beside the plain one
_COLUMNS = 3


def confidence_name(name: str) -> str:
    """A confidence in the words of pictures.

    Example:
        >>> confidence_name("distance"), confidence_name("map_entropy")
        ('plain probability', 'map entropy')
    """
    return _WORDS.get(name, name.replace("_", " "))


@in_style
def risk_coverage_curves(
    curves: Mapping[str, pd.DataFrame],
    *,
    plain: str = PLAIN,
    perfect: pd.DataFrame | None = None,
    title: str = "",
) -> Picture:
    """Share of wrong answers among the surest cases, a panel for each confidence beside the plain one.

    Dashed: deferral at random, which leaves the risk where it is. Dotted: the perfect order, all wrong
    answers last.

    Args:
        curves: confidence → `coverage, risk, low, high` of `evaluation.risk_bands`, on the same cases.
        plain: the one that every panel shows.
        perfect: the same of the perfect order.
        title: above all.

    Raises:
        ValueError: the plain one is missing.

    Example:
        >>> table = pd.DataFrame({"coverage": [0.5, 1.0], "risk": [0.02, 0.08]}).assign(low=0.01, high=0.1)
        >>> figure = risk_coverage_curves({"distance": table, "map_entropy": table})
    """
    words = "coverage, the surest first", "share of answers\nthat are wrong"
    figure, panels = _beside_plain(curves, plain, title, *words)
    top = 1.15 * max(float(table.loc[table["coverage"] >= 0.2, "high"].max()) for table in curves.values())
    for axes in panels:
        risk = float(curves[plain]["risk"].iloc[-1])
        style.reference(axes, risk, "y", colour=GREY, label="at random")
        if perfect is not None:
            axes.plot(perfect["coverage"], perfect["risk"], color=GREY, linewidth=1, linestyle=":",
                      label="perfect order")  # fmt: skip
        axes.set(xlim=(0, 1.01), ylim=(0, top))
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    _legend_of(figure, panels[0])
    return figure


@in_style
def gain_curves(
    curves: Mapping[str, pd.DataFrame], *, plain: str = PLAIN, risk: float, title: str = ""
) -> Picture:
    """What one gains per deferred case: how many of the deferred answers would have been wrong.

    A case deferred at random gains as much as the risk of all answers, the dashed line; at best each deferred
    case is a wrong answer avoided, 100 %.

    Args:
        curves: confidence → `coverage, risk, low, high` of `evaluation.risk_bands` of the confidence turned
            around, so that `coverage` is the share deferred and `risk` the share of wrong answers in it.
        plain: the one that every panel shows.
        risk: share of wrong answers where nothing is deferred.
        title: above all.

    Raises:
        ValueError: the plain one is missing.

    Example:
        >>> table = pd.DataFrame({"coverage": [0.1, 0.5], "risk": [0.4, 0.15]}).assign(low=0.1, high=0.5)
        >>> figure = gain_curves({"distance": table, "map_entropy": table}, risk=0.08)
    """
    words = "share deferred, least sure first", "wrong answers avoided\nper deferred case"
    figure, panels = _beside_plain(curves, plain, title, *words)
    for axes in panels:
        style.reference(axes, risk, "y", colour=GREY, label="at random")
        axes.set(xlim=(0, 0.51), ylim=(0, 1.02))
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _legend_of(figure, panels[0])
    return figure


def _beside_plain(
    curves: Mapping[str, pd.DataFrame], plain: str, title: str, x: str, y: str
) -> tuple[Picture, list[Axes]]:
    """A panel for each confidence, its curve and band over those of the plain one."""
    if plain not in curves:
        raise ValueError(
            f"Every panel shows {plain!r}; found {listing(curves) or 'none'}. Pass its table, too."
        )
    others = [name for name in curves if name != plain] or [plain]
    figure, panels = _panels(others, title, x, y)
    for axes, name in zip(panels, others, strict=True):
        for one in dict.fromkeys((plain, name)):
            colour, line = (INK, "-") if one == plain else (_MAP, "--")
            table = curves[one]
            axes.fill_between(table["coverage"], table["low"], table["high"], color=colour, alpha=0.13, lw=0)
            axes.plot(table["coverage"], table["risk"], color=colour, linestyle=line, linewidth=1.6,
                      label=confidence_name(plain) if one == plain else "the panel's confidence")  # fmt: skip
    return figure, panels


def _panels(names: Iterable[str], title: str, x: str, y: str) -> tuple[Picture, list[Axes]]:
    """A panel for each confidence, at most three in a row, all with the same axes, labelled at the edges."""
    named = list(names)
    if not named:
        raise ValueError("There is nothing to draw: give at least one confidence.")
    columns = 2 if len(named) == 4 else min(_COLUMNS, len(named))
    rows = -(-len(named) // columns)
    shape = whole_inches(max(3.4 * columns + 0.8, 6.5)), whole_inches(2.5 * rows + 1.3)
    figure, grid = canvas(*shape, rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(named) :]:
        axes.set_axis_off()
    for axes in grid.flat[max(0, len(named) - columns) : len(named)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel(x)
    for axes in grid[:, 0]:
        axes.set_ylabel(y)
    for axes, name in zip(grid.flat, named, strict=False):
        style.grid_behind(axes)
        axes.set_title(confidence_name(name), fontsize=10, pad=5)
    figure.head(title)
    return figure, list(grid.flat[: len(named)])


def _legend_of(figure: Picture, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=9)


@in_style
def confidence_dots(
    areas: pd.DataFrame,
    differences: pd.DataFrame,
    *,
    metric: str = "aurc",
    plain: str = PLAIN,
    title: str = "",
) -> Picture:
    """The area of each confidence, lower being better, and its distance from the plain one's.

    Args:
        areas: `confidence, metric, value, low, high` of `evaluation.selective_scores`.
        differences: `confidence, metric, difference, low, high` of `compare_selective`, of the others.
        metric: which area: aurc, e_aurc or augrc.
        plain: what the others are compared with.
        title: above both.

    Raises:
        ValueError: the tables have no row of the metric.

    Example:
        >>> row = {"confidence": "distance", "metric": "aurc", "value": 0.01, "low": 0.0, "high": 0.02}
        >>> change = {"confidence": "map_area", "metric": "aurc", "difference": 0.02, "low": 0, "high": 0.03}
        >>> figure = confidence_dots(pd.DataFrame([row]), pd.DataFrame([change]))
    """
    rows, changes = (each[each["metric"] == metric].set_index("confidence") for each in (areas, differences))
    names = list(dict.fromkeys([*rows.index, *changes.index]))
    if rows.empty:
        raise ValueError(f"The table of areas has no row of {metric!r}; it has {listing(areas['metric'])}.")
    figure, (left, right) = canvas(10, whole_inches(0.4 * len(names) + 1.3), 1, 2, sharey=True)
    for at, name in enumerate(names):
        if name in rows.index:
            style.interval_dot(left, rows.loc[name], at, INK if name == plain else _MAP)
        if name in changes.index:
            change = changes.loc[name]
            found = {"value": change["difference"], "low": change["low"], "high": change["high"]}
            style.interval_dot(right, found, at, _MAP)
            verdict = "worse" if found["low"] > 0 else "better" if found["high"] < 0 else "not told apart"
            right.annotate(verdict, (1, at), (5, 0), ("axes fraction", "data"), "offset points", va="center",
                           fontsize=9, annotation_clip=False)  # fmt: skip
    style.reference(left, float(rows["value"].get(plain, np.nan)), "x", colour=GREY)
    style.reference(right, 0, "x", colour=GREY)
    named = {"aurc": "AURC", "e_aurc": "Excess AURC", "augrc": "AUGRC"}.get(metric, metric)
    style.value_axis(left, f"{named}, lower is better")
    style.value_axis(right, f"Difference from {confidence_name(plain)}")
    for axes in (left, right):
        axes.margins(x=0.08)
    left.set_xlim(left=0)
    left.set_yticks(range(len(names)), [confidence_name(name) for name in names])
    left.set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel("95% intervals, patients resampled", fontsize=9)
    figure.head(title)
    return figure


@in_style
def recall_at_coverage(
    tables: Mapping[str, pd.DataFrame], *, recall: float | None = None, title: str = ""
) -> Picture:
    """Recall against coverage, with deferred fractures found by the reader, and with them lost.

    Args:
        tables: confidence → one row a cut: `coverage`, `recall_deferred_found`, `recall_deferred_lost` and
            `fractures_deferred`, the last three with `<name>_low` and `<name>_high` where it has a band.
        recall: guaranteed where deferred fractures are found; a dashed line.
        title: above all.

    Raises:
        ValueError: there is no table.

    Example:
        >>> rows = {"coverage": [0.6, 1.0], "recall_deferred_found": [1, 0.95]}
        >>> table = pd.DataFrame(rows).assign(recall_deferred_lost=[0.7, 0.95], fractures_deferred=[0.3, 0])
        >>> figure = recall_at_coverage({"distance": table}, recall=0.9)
    """
    figure, panels = _panels(tables, title, "coverage", "share of all fractures")
    lines = {
        "recall_deferred_found": ("recall, deferred found by the reader", INTACT, "-"),
        "recall_deferred_lost": ("recall, deferred lost", FRACTURED, "--"),
        "fractures_deferred": ("fractures deferred", INCONCLUSIVE, ":"),
    }
    for axes, each in zip(panels, tables.values(), strict=True):
        table = each.sort_values("coverage")
        for column, (words, colour, line) in lines.items():
            axes.plot(table["coverage"], table[column], color=colour, linestyle=line, label=words)
            if f"{column}_low" in table.columns:
                band = table[f"{column}_low"], table[f"{column}_high"]
                axes.fill_between(table["coverage"], *band, color=colour, alpha=0.13, linewidth=0)
        if recall is not None:
            style.reference(axes, recall, "y", colour=GREY, label=f"guaranteed, {recall:g}")
        axes.set(ylim=(0, 1.03))
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _legend_of(figure, panels[0])
    return figure


@in_style
def deferral_scatter(
    confidences: Mapping[str, ArrayLike],
    probability: ArrayLike,
    label: ArrayLike,
    *,
    p_low: float,
    cuts: Mapping[str, float] | None = None,
    title: str = "",
) -> Picture:
    """Each suspected case by probability and by rank of confidence: whom a cut defers.

    Below p_low a case is negative whatever its confidence, and is not drawn. Shaded: inconclusive.

    Args:
        confidences: name → (N,), -inf where a map says nothing.
        probability: (N,).
        label: (N,) of 0/1.
        p_low: the threshold of the guarantee.
        cuts: confidence → its cut.
        title: above all.

    Raises:
        ValueError: no case lies at or above p_low.

    Example:
        >>> figure = deferral_scatter({"distance": [0.1, 2.0]}, [0.3, 0.9], [0, 1], p_low=0.2)
    """
    p, y = np.asarray(probability, dtype=float), np.asarray(label)
    above = p >= p_low
    if not above.any():
        raise ValueError(
            f"No case lies at or above p_low, {p_low:g}: all are negative, and nothing is deferred."
        )
    x = f"probability, from p_low {p_low:.3f}"
    figure, panels = _panels(confidences, title, x, "confidence, as a rank")
    for axes, (name, values) in zip(panels, confidences.items(), strict=True):
        confidence = np.asarray(values, dtype=float)[above]
        order = pd.Series(confidence).rank(method="average", pct=True).to_numpy()
        for truth, word, colour, marker in ((0, "intact", INTACT, "o"), (1, "fractured", FRACTURED, "^")):
            rows_of = y[above] == truth
            axes.plot(p[above][rows_of], order[rows_of], marker, color=colour, ms=4.5, alpha=0.65, mec="none",
                      label=word)  # fmt: skip
        if name in (cuts or {}):
            deferred = confidence < (cuts or {})[name]
            edge = (order[deferred].max() if deferred.any() else 0) / 2
            edge += (order[~deferred].min() if (~deferred).any() else 1) / 2
            axes.axhspan(-0.02, edge, color=INCONCLUSIVE, alpha=0.15, linewidth=0)
            axes.text(0.99, edge, "inconclusive", transform=axes.get_yaxis_transform(), ha="right", va="top",
                      fontsize=8.5, color=INK, bbox=style.UNDER)  # fmt: skip
        axes.set(ylim=(-0.02, 1.04))
    _legend_of(figure, panels[0])
    return figure


@in_style
def search_heatmap(table: pd.DataFrame, *, objective: str = "value", title: str = "") -> Picture:
    """Every setting of a search on patients it has not seen, against no deferral: a panel for each p_low.

    White is as good as no deferral, green better, purple worse. A star is the winner, on the topmost row
    where not deferring won; dots are settings that beat no deferral without winning.

    Args:
        table: of `decisions.search_triage`.
        objective: what its value is, in words.
        title: above all.

    Raises:
        ValueError: the table has no row without deferral, or no setting; columns are missing.

    Example:
        >>> rows = {"kind": ["no deferral", "setting"], "confidence": ["none", "distance"]}
        >>> table = pd.DataFrame(rows).assign(guaranteed=0.9, p_low=0.2, alpha=np.nan, deferred=[0.0, 0.2])
        >>> table = table.assign(held_out_value=[-0.08, -0.09], winner=[True, False])
        >>> figure = search_heatmap(table, objective="expected cost, turned around")
    """
    columns = ("kind", "guaranteed", "p_low", "confidence", "alpha", "deferred", "held_out_value", "winner")
    require_columns(table, columns, what="The table of a search")
    tried, plain = (table[table["kind"] == kind] for kind in ("setting", "no deferral"))
    if tried.empty or plain.empty:
        raise ValueError(
            f"A grid holds settings and no deferral beside them; found {len(tried)} and {len(plain)} rows. "
            "Pass the whole table of search_triage(...)."
        )
    points = list(dict.fromkeys(zip(plain["guaranteed"], plain["p_low"], strict=True)))
    pairs = zip(tried["confidence"], tried["alpha"], strict=True)
    of = [confidence_name(name) + _alpha(alpha) for name, alpha in pairs]
    tried = tried.assign(row=of)
    rows, shares = list(dict.fromkeys(of)), sorted(tried["deferred"].unique())
    gain = tried["held_out_value"] - tried["p_low"].map(plain.set_index("p_low")["held_out_value"])
    most = max(float(gain.abs().max()), 1e-9)
    shape = whole_inches(min(11, 2.6 + 4.1 * len(points))), whole_inches(0.3 * len(rows) + 2.2)
    figure, panels = canvas(*shape, 1, len(points), sharey=True, squeeze=False)
    for axes, (recall, p_low) in zip(panels.flat, points, strict=True):
        cells = np.full((len(rows) + 1, len(shares)), np.nan)
        cells[0] = 0
        for each, value in zip(tried.to_dict("records"), gain, strict=True):
            if each["p_low"] != p_low:
                continue
            y, x = rows.index(each["row"]) + 1, shares.index(each["deferred"])
            cells[y, x] = value
            if each["winner"] or value > 1e-12:
                mark = {"marker": "*", "ms": 13} if each["winner"] else {"marker": "o", "ms": 3}
                axes.plot(x, y, color=INK, mec="white" if each["winner"] else INK, **mark)
        shown = axes.imshow(cells, cmap="PRGn", vmin=-most, vmax=most, aspect="auto")
        its = plain[plain["p_low"] == p_low].iloc[0]
        axes.text((len(shares) - 1) / 2, 0, f"{its['held_out_value']:.3f}".replace("-", "−"), ha="center",
                  va="center", fontsize=9)  # fmt: skip
        if its["winner"]:
            axes.plot(len(shares) - 1, 0, "*", color=INK, mec="white", ms=13)
        axes.axhline(0.5, color=INK, linewidth=1)
        every = slice(None, None, 1 if len(points) < 3 else 2)
        axes.set_xticks(range(len(shares))[every], [f"{share:.0%}" for share in shares[every]], fontsize=8.5)
        axes.set_xlabel("share of the suspected deferred")
        axes.set_title(f"recall ≥ {recall:g}: p_low {p_low:.3f}", fontsize=10, pad=5)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    panels[0, 0].set_yticks(range(len(rows) + 1), ["no deferral", *rows], fontsize=9)
    bar = figure.colorbar(shown, ax=panels[0, -1], fraction=0.05, pad=0.03)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter(style.signed)
    bar.set_label(f"{objective}:\nheld out, minus no deferral", fontsize=9)
    star = Line2D([], [], color=INK, marker="*", ms=11, mec="white", linestyle="", label="the winner")
    dot = Line2D([], [], color=INK, marker="o", ms=3, linestyle="", label="better than no deferral")
    figure.legend(handles=[star, dot], loc="outside lower center", ncols=2, fontsize=9)
    figure.head(title)
    return figure


def _alpha(alpha: float | None) -> str:
    return "" if alpha is None or np.isnan(alpha) else f", α {alpha:g}"


@in_style
def workload_bars(
    tables: Mapping[str, pd.DataFrame], *, prevalence: float, plural: str = "patients", title: str = ""
) -> Picture:
    """What 1,000 patients get for an answer by each triage, and in how many a fracture is missed.

    Args:
        tables: triage → `metric, value, low, high` of `decisions.evaluate_triage` at that prevalence.
        prevalence: share of fractured cases.
        plural: what is counted.
        title: above both.

    Raises:
        ValueError: there is no table, or one was made without a prevalence.

    Example:
        >>> rows = {"negative_per_1000": 700, "positive_per_1000": 100, "inconclusive_per_1000": 200}
        >>> table = pd.DataFrame([*rows.items(), ("missed_per_1000", 4)], columns=["metric", "value"])
        >>> figure = workload_bars({"distance": table.assign(low=1, high=9)}, prevalence=0.05)
    """
    if not tables:
        raise ValueError("There is nothing to draw: give at least one table.")
    found = {name: table.set_index("metric") for name, table in tables.items()}
    needed = [*(f"{answer}_per_1000" for answer in ANSWERS), "missed_per_1000"]
    if lacking := [name for name, table in found.items() if not set(needed) <= set(table.index)]:
        raise ValueError(f"Without a prevalence there is no workload: {listing(lacking)}. Evaluate with one.")
    shape = 10.5, whole_inches(0.5 * len(tables) + 1.6)
    figure, (left, right) = canvas(*shape, 1, 2, sharey=True, width_ratios=[2.4, 1])
    for at, table in enumerate(found.values()):
        start = 0.0
        for answer, colour in ANSWERS.items():
            many = float(table["value"][f"{answer}_per_1000"])
            if np.isfinite(many):
                left.barh(at, many, 0.72, left=start, color=colour, edgecolor="white")
                if many >= 45:
                    left.text(start + many / 2, at, f"{many:,.0f}", ha="center", va="center", fontsize=10,
                              weight="bold", color=INK if colour == INCONCLUSIVE else "white")  # fmt: skip
                start += many
        style.interval_dot(right, table.to_dict("index")["missed_per_1000"], at, INK)
    left.set(xlim=(0, 1000), xlabel=f"of 1,000 {plural}, {prevalence:.1%} of them fractured")
    left.set_yticks(range(len(found)), [confidence_name(name) for name in found])
    left.set_ylim(len(found) - 0.5, -0.5)
    left.tick_params(axis="y", length=0)
    left.spines[["left", "bottom"]].set_visible(False)
    left.set_title("Answers", fontsize=10, pad=6)
    style.value_axis(right, "Fractures called negative")
    right.set_xlim(-0.03 * right.get_xlim()[1], right.get_xlim()[1])
    right.set_xlabel("per 1,000, 95% interval")
    handles = [Patch(color=colour, label=answer) for answer, colour in ANSWERS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)
    figure.head(title)
    return figure


@in_style
def violation_dots(table: pd.DataFrame, *, delta: float, title: str = "") -> Picture:
    """How often the true recall of a triage, its deferred fractures found, is below the guaranteed one.

    Args:
        table: of `decisions.simulate_triage`: `confidence, violation_rate, low, high, redraws`.
        delta: the violation rate allowed.
        title: above the axes.

    Raises:
        ValueError: columns or rows are missing.

    Example:
        >>> row = {"confidence": "adversarial", "violation_rate": 0.08, "low": 0.06, "high": 0.1}
        >>> figure = violation_dots(pd.DataFrame([row | {"redraws": 1000}]), delta=0.1)
    """
    columns = ("confidence", "violation_rate", "low", "high", "redraws")
    require_columns(table, columns, what="The table of a simulation")
    if table.empty:
        raise ValueError("There is nothing to draw: the table of a simulation has no rows. Redraw some.")
    figure, axes = canvas(8, whole_inches(0.38 * len(table) + 1.3))
    for at, row in enumerate(table.rename(columns={"violation_rate": "value"}).to_dict("records")):
        style.interval_dot(axes, row, at, INK)
        words = f"{row['value']:.1%}" + (", above" if row["low"] > delta else "")
        axes.annotate(words, (1, at), (5, 0), ("axes fraction", "data"), "offset points", va="center",
                      fontsize=9, annotation_clip=False)  # fmt: skip
    style.reference(axes, delta, "x")
    style.value_axis(axes, title or "Violation rate with deferral on")
    axes.set_yticks(range(len(table)), [confidence_name(name) for name in table["confidence"]])
    axes.set_ylim(len(table) - 0.5, -0.5)
    most = max(1.2 * float(table["high"].max()), 1.5 * delta)
    axes.set_xlim(-0.01 * most, most)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(
        f"violation rate, {int(table['redraws'].iloc[0]):,} redraws (dashed: allowed, {delta:.0%})"
    )
    return figure
