import matplotlib
import numpy as np
import pandas as pd
import pytest
from drawn import line, texts

from cspine_helpers.evaluation import calibration, reliability
from cspine_helpers.evaluation import clinical_utility as benefit
from cspine_helpers.evaluation import clinical_utility as prevalence
from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.figures import calibration as evidence
from cspine_helpers.labels import UID, VERTEBRAE


def made(seed):
    rng = np.random.default_rng(seed)
    rows = [(f"1.{study}", name, "validation") for study in range(120) for name in VERTEBRAE]
    table = pd.DataFrame(rows, columns=[UID, "vertebra", "split"])
    p = rng.beta(1, 6, len(table))
    return table.assign(label=(rng.random(len(table)) < p**1.2).astype(int), probability=p)


@pytest.fixture
def table():
    return made(1)


@pytest.fixture
def patients(table):
    return Cases.of(table, level="patient")


@pytest.fixture
def mended(patients):
    fitted = calibration.fit_calibrator(Cases.of(made(2), level="patient"), kind="platt")
    return calibration.apply(fitted, patients)


def levels(table):
    """Its vertebrae and its patients."""
    cases = Cases.of(table)
    return {"Vertebrae": cases, "Patients": cases.patients()}


def ends(axes):
    """Lower and upper ends of the whiskers, or of the columns of a bar."""
    (whiskers,) = axes.collections
    return np.array([path.vertices[:, 1] for path in whiskers.get_paths()]).T


def test_reliability_diagrams_draw_the_bins_of_each_level(table):
    figure = evidence.reliability_diagrams(levels(table), bins=6)
    for axes, (title, cases) in zip(figure.axes[:2], levels(table).items(), strict=True):
        assert axes.get_title(loc="left") == title
        found = reliability.reliability_table(cases, bins=6)
        points = axes.lines[1].get_xydata()
        np.testing.assert_array_equal(points, found[["probability", "observed"]])
        np.testing.assert_allclose(ends(axes), found[["low", "high"]].to_numpy().T)
        scores = reliability.calibration_scores(cases, bins=6)
        written = reliability.written_scores(scores)
        names = {"log loss": "log_loss", "Brier": "brier", "slope": "slope", "ECE": "ece"}
        for name, key in names.items():
            assert f"{name} {written[key]}" in texts(axes)
        assert "clipped" not in texts(axes)


def test_a_logit_axis_spreads_small_probabilities_and_loses_no_case(table):
    table = table.assign(probability=table["probability"] ** 3)
    table.loc[table.index[0], "probability"] = 0.0
    figure = evidence.reliability_diagrams(levels(table), logit=["Vertebrae"])
    logit, linear, below, _ = figure.axes
    assert (logit.get_xscale(), linear.get_xscale()) == ("logit", "linear")
    points = reliability.reliability_table(Cases.of(table))["probability"]
    figure.draw_without_rendering()
    places = logit.transData.transform(np.column_stack([points, points]))[:, 0]
    low, high = logit.bbox.intervalx
    assert (np.diff(places) / (high - low)).max() < 0.35
    np.testing.assert_array_equal(logit.lines[1].get_xdata(), points)
    np.testing.assert_array_equal(*logit.lines[0].get_data())  # predicted = observed
    assert sum(bar.get_height() for bars in below.containers for bar in bars) == len(table)
    with pytest.raises(ValueError, match=r"logit names panels, 'Vertebrae', 'Patients'; found 'C1'"):
        evidence.reliability_diagrams(levels(table), logit=["C1"])


def test_a_reliability_diagram_says_how_many_log_losses_the_clip_decides(table):
    wrong = table["label"].eq(1).idxmax()
    sure = table.assign(probability=table["probability"].where(table.index != wrong, 0.0))
    figure = evidence.reliability_diagrams({"a": Cases.of(sure)})
    assert f"clipped: 1 of {len(table)} cases" in texts(figure.axes[0])


def test_histograms_count_every_case(table):
    lower = evidence.reliability_diagrams(levels(table)).axes[2:]
    for axes, cases in zip(lower, levels(table).values(), strict=True):
        heights = np.array([[bar.get_height() for bar in bars] for bars in axes.containers])
        assert heights.sum(axis=1).tolist() == [(cases.label == 0).sum(), (cases.label == 1).sum()]


def test_bins_without_a_case_are_left_out(table):
    few = table.assign(probability=table["probability"].where(table["probability"] > 0.3, 0.05))
    figure = evidence.reliability_diagrams({"a": Cases.of(few)}, strategy="uniform")
    assert len(figure.axes[0].lines[1].get_xydata()) < 10
    assert np.isfinite(figure.axes[0].lines[1].get_xydata()).all()


@pytest.mark.parametrize("elsewhere", [None, 0.07])
def test_decision_curves_are_those_of_clinical_utility(patients, mended, elsewhere):
    tables = {"before": patients, "Platt": mended}
    (axes,) = evidence.decision_curves(tables, prevalence=elsewhere).axes
    for name, rows in tables.items():
        found = benefit.decision_curve(rows, prevalence=elsewhere)
        np.testing.assert_array_equal(line(axes, name).get_ydata(), found["net_benefit"])
        np.testing.assert_array_equal(line(axes, "treat all").get_ydata(), found["treat_all"])
    assert line(axes, "treat none").get_ydata() == [0, 0]
    assert len(axes.collections) == 2
    assert ("7.0%" in axes.get_title(loc="left")) == (elsewhere is not None)


def test_bands_of_many_models_are_left_out_and_lines_differ_in_more_than_colour(patients):
    (axes,) = evidence.decision_curves(dict.fromkeys("abcd", patients)).axes
    assert len(axes.collections) == 0
    assert len({line(axes, name).get_linestyle() for name in "abcd"}) == 4


def test_predictive_values_are_written_where_marked(patients):
    (axes,) = evidence.predictive_value_curves(patients, 0.3).axes
    marks = [prevalence.SCREENING_PREVALENCE, prevalence.COMPETITION_PREVALENCE]
    found = prevalence.predictive_curve(patients, 0.3, marks)
    for row in found.itertuples():
        assert f"{row.ppv:.2f}" in texts(axes)
        assert f"{row.npv:.2f}" in texts(axes)
    assert "screening\n7.0%" in texts(axes)
    assert "competition\n47.6%" in texts(axes)
    drawn = line(axes, "positive (fractured)")
    expected = prevalence.predictive_curve(patients, 0.3, drawn.get_xdata())
    np.testing.assert_allclose(drawn.get_ydata(), expected["ppv"])


def test_prevalences_of_patients_are_not_marked_for_vertebrae(table):
    (axes,) = evidence.predictive_value_curves(Cases.of(table), 0.2).axes
    assert "screening" not in texts(axes)
    assert f"this split\n{table['label'].mean():.1%}" in texts(axes)


@pytest.mark.slow
def test_every_picture_shows_itself_and_touches_no_global_state(table, patients):
    before = dict(matplotlib.rcParams)
    for draw in (
        lambda: evidence.reliability_diagrams(levels(table)),
        lambda: evidence.decision_curves({"before": patients}),
        lambda: evidence.predictive_value_curves(patients, 0.3),
    ):
        assert draw()._repr_png_() == draw()._repr_png_()
    after = dict(matplotlib.rcParams)
    assert {name for name in before if before[name] != after[name]} <= {"backend"}


def test_what_cannot_be_drawn_is_refused(table, mended):
    with pytest.raises(ValueError, match="nothing to draw"):
        evidence.reliability_diagrams({})
    with pytest.raises(ValueError, match="One to 4 curves can be told apart; found 5"):
        evidence.decision_curves(dict.fromkeys("abcde", mended))
    with pytest.raises(ValueError, match="not of the same cases"):
        evidence.decision_curves({"a": mended, "b": Cases.of(table)})
    with pytest.raises(ValueError, match="All 840 labels are 0"):
        evidence.predictive_value_curves(Cases.of(table.assign(label=0)), 0.3)
