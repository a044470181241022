import numpy as np
import pandas as pd
import pytest
from drawn import legible, texts

from cspine_helpers.figures import triage
from cspine_helpers.figures.style import INCONCLUSIVE

CONFIDENCES = (
    "distance", "calibrated", "disagreement", "map_entropy", "map_area", "conformal", "combination",
)  # fmt: skip


def curve(bend=1.0, *, final=0.09):
    coverage = np.arange(1, 101) / 100
    risk = final * coverage**bend
    return pd.DataFrame({"coverage": coverage, "risk": risk, "low": 0.6 * risk, "high": risk + 0.03})


def risks():
    return {name: curve(2 - place / 4) for place, name in enumerate(CONFIDENCES)}


def gains():
    share = np.arange(1, 101) / 100
    found = {
        name: pd.DataFrame({"coverage": share, "risk": 0.09 + (0.5 - place / 12) * (1 - share)})
        for place, name in enumerate(CONFIDENCES)
    }
    return {
        name: each.assign(low=each["risk"] * 0.7, high=each["risk"] * 1.2) for name, each in found.items()
    }


def areas():
    rows = [
        (name, "aurc", 0.01 + place / 200, 0.005, 0.02 + place / 150)
        for place, name in enumerate(CONFIDENCES)
    ]
    return pd.DataFrame(rows, columns=["confidence", "metric", "value", "low", "high"])


def changes():
    rows = [
        (name, "aurc", place / 200 - 0.01, place / 200 - 0.014, place / 200 - 0.004)
        for place, name in enumerate(CONFIDENCES[1:])
    ]
    table = pd.DataFrame(rows, columns=["confidence", "metric", "difference", "low", "high"])
    return table.assign(value=0.01, other=0.01 + table["difference"])


def cuts():
    coverage = np.linspace(0.55, 1, 20)
    table = pd.DataFrame({"coverage": coverage, "recall_deferred_found": 0.97})
    table = table.assign(recall_deferred_lost=0.97 - (1 - coverage) * 1.2)
    table["fractures_deferred"] = table["recall_deferred_found"] - table["recall_deferred_lost"]
    for name in ("recall_deferred_found", "recall_deferred_lost", "fractures_deferred"):
        table[f"{name}_low"], table[f"{name}_high"] = table[name] - 0.05, table[name] + 0.02
    return table


def workload(negative=620.0, positive=80.0, missed=3.0):
    rows = {
        "negative_per_1000": negative,
        "positive_per_1000": positive,
        "inconclusive_per_1000": 1000 - negative - positive,
        "missed_per_1000": missed,
    }
    table = pd.DataFrame(list(rows.items()), columns=["metric", "value"])
    return table.assign(low=table["value"] * 0.6, high=table["value"] * 1.5)


def violations():
    rate = np.array([0.09, 0.05, 0.14])
    table = pd.DataFrame({"confidence": ["distance", "map_entropy", "adversarial"], "violation_rate": rate})
    return table.assign(low=rate - 0.02, high=rate + 0.02, redraws=1000)


def scattered(n=120):
    rng = np.random.default_rng(0)
    probability = rng.random(n)
    label = (rng.random(n) < probability).astype(int)
    confidences = {name: rng.random(n) for name in ("map_entropy", "map_area", "disagreement")}
    confidences["map_area"][:30] = -np.inf
    return {"distance": np.abs(probability - 0.2), **confidences}, probability, label


def searched(winner="map_area"):
    rows = []
    for recall, p_low in ((0.8, 0.31), (0.9, 0.18)):
        base = {"guaranteed": recall, "p_low": p_low}
        plain = {"kind": "no deferral", "confidence": "none", "alpha": np.nan, "deferred": 0.0}
        rows.append(base | plain | {"held_out_value": -0.2})
        of = [(name, np.nan) for name in CONFIDENCES if name != "map_area"]
        for place, (name, alpha) in enumerate(
            [*of, *(("map_area", alpha) for alpha in (0.2, 0.4, 0.6, 0.8))]
        ):
            for deferred in np.arange(1, 10) / 10:
                setting = {"kind": "setting", "confidence": name, "alpha": alpha, "deferred": deferred}
                rows.append(base | setting | {"held_out_value": -0.25 + 0.007 * place - 0.05 * deferred**2})
    rows.append({"kind": "search", "held_out_value": -0.21})
    table = pd.DataFrame(rows)
    named = table["confidence"] == winner
    return table.assign(winner=table.index == table["held_out_value"].where(named).idxmax())


def drawings():
    confidences, probability, label = scattered()
    few = {"distance": cuts(), "map_entropy": cuts(), "combination": cuts(), "map_area": cuts()}
    bars = {"no deferral": workload(600, 400), "distance": workload(), "map_entropy": workload(600, 200)}
    return {
        "risk": triage.risk_coverage_curves(
            risks(), perfect=curve(6), title="Risk and coverage, test patients"
        ),
        "risk, one": triage.risk_coverage_curves({"distance": curve()}),
        "gain": triage.gain_curves(gains(), risk=0.09, title="What one deferred case gains"),
        "areas": triage.confidence_dots(areas(), changes(), title="Does any confidence beat the plain one?"),
        "recall": triage.recall_at_coverage(few, recall=0.9, title="Two recalls"),
        "scatter": triage.deferral_scatter(
            confidences, probability, label, p_low=0.2, cuts={"distance": 0.3, "map_area": 0.2}, title="Whom"
        ),
        "search": triage.search_heatmap(searched(), objective="cost, turned around", title="What was tried"),
        "search, three": triage.search_heatmap(
            pd.concat([searched(), searched().query("guaranteed == 0.8").assign(guaranteed=0.85, p_low=0.25)])
        ),
        "workload": triage.workload_bars(bars, prevalence=0.05, title="A reader's 1,000 patients"),
        "violations": triage.violation_dots(violations(), delta=0.1),
    }


@pytest.mark.slow
def test_every_picture_is_legible_at_1200_pixels_and_no_two_labels_overlap():
    for name, figure in drawings().items():
        legible(figure, name)


def test_every_panel_shows_the_plain_confidence_and_the_risk_without_deferral():
    figure = triage.risk_coverage_curves({name: risks()[name] for name in CONFIDENCES[:3]})
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "calibrated probability",
        "disagreement of runs",
    ]
    for axes in figure.axes:
        plain, other, random = axes.lines
        assert plain.get_ydata().tolist() == risks()["distance"]["risk"].tolist()
        assert other.get_ydata()[10] > plain.get_ydata()[10]
        assert random.get_ydata()[0] == 0.09
    for draw in (triage.risk_coverage_curves, lambda curves: triage.gain_curves(curves, risk=0.1)):
        with pytest.raises(ValueError, match="Every panel shows 'distance'; found 'map_area'"):
            draw({"map_area": curve()})


def test_a_confidence_is_called_worse_or_better_only_where_the_interval_excludes_0():
    figure = triage.confidence_dots(areas(), changes())
    left, right = figure.axes
    verdicts = [text.get_text() for text in right.texts]
    assert verdicts == ["better", *["not told apart"] * 2, *["worse"] * 3]
    assert left.get_yticklabels()[0].get_text() == "plain probability"
    with pytest.raises(ValueError, match="no row of 'augrc'; it has 'aurc'"):
        triage.confidence_dots(areas(), changes(), metric="augrc")


def test_recall_is_drawn_once_with_deferred_fractures_found_and_once_with_them_lost():
    (axes,) = triage.recall_at_coverage({"distance": cuts()}, recall=0.9).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["recall, deferred found by the reader"].get_ydata().tolist() == [0.97] * 20
    assert lines["recall, deferred lost"].get_ydata()[0] == pytest.approx(0.97 - 0.54)
    assert lines["fractures deferred"].get_color() == INCONCLUSIVE
    assert lines["guaranteed, 0.9"].get_ydata()[0] == 0.9
    with pytest.raises(ValueError, match="nothing to draw"):
        triage.recall_at_coverage({})


def test_the_shade_holds_exactly_the_cases_that_a_cut_defers():
    confidences, probability, label = scattered()
    chosen = {"map_area": confidences["map_area"]}
    figure = triage.deferral_scatter(chosen, probability, label, p_low=0.2, cuts={"map_area": 0.5})
    (axes,) = figure.axes
    edge = axes.patches[0].get_y() + axes.patches[0].get_height()
    dots = [line for line in axes.lines if line.get_linestyle() == "None"]
    heights = np.concatenate([line.get_ydata() for line in dots])
    above = probability >= 0.2
    assert len(heights) == above.sum()
    assert (heights < edge).sum() == (confidences["map_area"][above] < 0.5).sum()
    with pytest.raises(ValueError, match="No case lies at or above p_low, 1"):
        triage.deferral_scatter(chosen, probability, label, p_low=1.0)


@pytest.mark.parametrize("winner", ["map_area", "none"])
def test_the_winner_of_the_search_has_the_star_also_where_not_deferring_won(winner):
    table = searched(winner)
    figure = triage.search_heatmap(table)
    stars = [
        (number, *line.get_xydata()[0])
        for number, axes in enumerate(figure.axes[:2])
        for line in axes.lines
        if line.get_marker() == "*"
    ]
    won = table[table["winner"]].iloc[0]
    panel = [0.8, 0.9].index(won["guaranteed"])
    if winner == "none":
        assert stars == [(panel, 8, 0)]
    else:
        assert [star[:2] for star in stars] == [(panel, round(won["deferred"] * 10) - 1)]
        names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert names[int(stars[0][2])] == f"map area, α {won['alpha']:g}"
    better = (table["held_out_value"] > -0.2) & (table["kind"] == "setting") & ~table["winner"]
    dots = [line for axes in figure.axes[:2] for line in axes.lines if line.get_marker() == "o"]
    assert len(dots) == better.sum()
    with pytest.raises(ValueError, match="found 0 and 2 rows"):
        triage.search_heatmap(table[table["kind"] == "no deferral"])
    with pytest.raises(ValueError, match=r"table of a search lacks the column\(s\) 'winner'"):
        triage.search_heatmap(table.drop(columns="winner"))


def test_a_simulation_without_rows_or_columns_is_refused():
    row = {"confidence": "none", "violation_rate": 0.1, "low": 0.0, "high": 0.2, "redraws": 10}
    with pytest.raises(ValueError, match="the table of a simulation has no rows"):
        triage.violation_dots(pd.DataFrame([row]).head(0), delta=0.1)
    with pytest.raises(ValueError, match=r"table of a simulation lacks the column\(s\) 'redraws'"):
        triage.violation_dots(pd.DataFrame([row]).drop(columns="redraws"), delta=0.1)


def test_answers_of_1000_patients_add_up_and_are_written_in_their_bars():
    figure = triage.workload_bars({"distance": workload()}, prevalence=0.05)
    left, right = figure.axes
    widths = [bar.get_width() for bar in left.patches]
    assert sum(widths) == pytest.approx(1000)
    assert texts(left).split() == ["620", "300", "80"]
    assert right.lines[-1].get_xdata()[0] == 3
    with pytest.raises(ValueError, match="no workload: 'distance'"):
        triage.workload_bars({"distance": workload().head(1)}, prevalence=0.05)


def test_a_violation_rate_surely_above_the_allowed_one_is_said():
    (axes,) = triage.violation_dots(violations(), delta=0.1).axes
    assert [text.get_text() for text in axes.texts] == ["9.0%", "5.0%", "14.0%, above"]
    assert "1,000 redraws" in axes.get_xlabel()
