import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from cspine_helpers import metrics
from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.labels import read_labels
from cspine_helpers.predictions import from_wide

LABELS = [1, 0, 1, 0, 0]
PROBABILITIES = [0.9, 0.8, 0.5, 0.5, 0.1]
TIED = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 8)), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def real():
    wide = pd.read_csv(RSNA / "oof_predictions.csv", dtype={"uid": str})
    return Cases.of(from_wide(wide, read_labels(RSNA / "train.csv"), "validation", missing="drop"))


def test_counts_of_a_hand_worked_case_with_a_tie():
    counts = metrics.threshold_counts(LABELS, PROBABILITIES)
    expected = [[0.9, 1, 0, 1, 3], [0.8, 1, 1, 1, 2], [0.5, 2, 2, 0, 1], [0.1, 2, 3, 0, 0]]
    assert counts.to_numpy().tolist() == expected
    assert list(counts) == ["threshold", "tp", "fp", "fn", "tn"]


def test_a_probability_equal_to_the_threshold_is_called_positive():
    assert metrics.confusion(LABELS, PROBABILITIES, 0.5).loc[0, "tp"] == 2
    assert metrics.confusion(LABELS, PROBABILITIES, np.nextafter(0.5, 1)).loc[0, "tp"] == 1


def test_rates_of_a_hand_worked_case():
    row = metrics.rates(metrics.confusion(LABELS, PROBABILITIES, 0.8)).iloc[0]
    assert row["recall"] == 1 / 2
    assert row["precision"] == 1 / 2
    assert row["specificity"] == 2 / 3
    assert row["npv"] == 2 / 3
    assert row["f1"] == 1 / 2
    assert row["accuracy"] == 3 / 5


def test_rates_without_a_denominator_are_nan_and_the_others_are_not():
    none_called = metrics.rates(metrics.confusion(LABELS, PROBABILITIES, 1.0)).iloc[0]
    assert np.isnan(none_called["precision"])
    assert none_called[["recall", "f1", "specificity"]].tolist() == [0, 0, 1]
    all_called = metrics.rates(metrics.confusion(LABELS, PROBABILITIES, 0.0)).iloc[0]
    assert np.isnan(all_called["npv"])
    no_positive = metrics.rates(metrics.confusion([0, 0], [0.2, 0.7], [0.5, 0.9]))
    assert no_positive["recall"].isna().all()
    assert no_positive["f1"].isna().tolist() == [False, True]


@given(TIED, st.lists(st.integers(-1, 9), min_size=1, max_size=5))
def test_counts_equal_their_definition_at_any_threshold(cases, thresholds):
    labels = np.array([label for label, _ in cases])
    probabilities = np.array([score for _, score in cases]) / 8
    found = metrics.confusion(labels, probabilities, np.array(thresholds) / 8)
    for row in found.itertuples():
        called = probabilities >= row.threshold
        assert row.tp == (called & (labels == 1)).sum()
        assert row.fp == (called & (labels == 0)).sum()
        assert row.fn == (~called & (labels == 1)).sum()
        assert row.tn == (~called & (labels == 0)).sum()


@needs_rsna
@pytest.mark.parametrize("level", ["all", "C2", "C7", "patient"])
def test_real_predictions_agree_with_scikit_learn(real, level):
    cases = real.of_unit(level)
    labels, probabilities = cases.label, cases.probability
    precision, recall, threshold = sk.precision_recall_curve(labels, probabilities)
    table = metrics.rates(metrics.threshold_counts(labels, probabilities))[::-1]
    np.testing.assert_allclose(table["precision"], precision[:-1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(table["recall"], recall[:-1], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(table["threshold"], threshold)
    curve = metrics.pr_curve(labels, probabilities)
    np.testing.assert_array_equal(curve["precision"], precision)
    np.testing.assert_array_equal(curve["threshold"], [*threshold, np.inf])
    curve = metrics.roc_curve(labels, probabilities)
    assert np.trapezoid(curve["recall"], curve["false_positive_rate"]) == pytest.approx(
        metrics.auroc(labels, probabilities), abs=1e-12
    )
    area = -np.sum(np.diff(recall) * precision[:-1])
    assert metrics.average_precision(labels, probabilities) == pytest.approx(area, abs=1e-12)


@needs_rsna
@pytest.mark.parametrize("threshold", [0.05, 0.2458524309799504, 0.5])
def test_rates_of_real_predictions_agree_with_scikit_learn(real, threshold):
    labels, called = real.label, real.probability >= threshold
    row = metrics.rates(metrics.confusion(labels, real.probability, threshold)).iloc[0]
    assert row["recall"] == pytest.approx(sk.recall_score(labels, called), abs=1e-12)
    assert row["precision"] == pytest.approx(sk.precision_score(labels, called), abs=1e-12)
    assert row["specificity"] == pytest.approx(sk.recall_score(labels, called, pos_label=0), abs=1e-12)
    assert row["npv"] == pytest.approx(sk.precision_score(labels, called, pos_label=0), abs=1e-12)
    assert row["f1"] == pytest.approx(sk.f1_score(labels, called), abs=1e-12)
    assert row["accuracy"] == pytest.approx(sk.accuracy_score(labels, called), abs=1e-12)
    matrix = sk.confusion_matrix(labels, called)
    assert row[["tn", "fp", "fn", "tp"]].tolist() == matrix.ravel().tolist()


def test_auroc_counts_ties_half():
    assert metrics.auroc([1, 0], [0.4, 0.4]) == 0.5
    assert metrics.auroc(LABELS, PROBABILITIES) == pytest.approx(4.5 / 6)


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([], [], "at least 1"),
        ([1, 0], [0.5], "one length"),
        ([[1, 0]], [[0.5, 0.1]], "one length"),
        ([1, 2, 0, -1], [0.1] * 4, r"2 labels are neither 0 nor 1 \(row 1: 2, row 3: -1\)"),
        ([1, np.nan], [0.1] * 2, r"1 labels are neither 0 nor 1 \(row 1: nan\)"),
        ([1, 0, 1], [np.nan, 1.5, 0.2], r"2 probabilities .* \(row 0: nan, row 1: 1\.5\)"),
        ([1, 0], [-0.1, np.inf], r"2 probabilities are missing or outside \[0, 1\]"),
    ],
)
def test_undefined_input_is_refused_naming_the_offenders(labels, probabilities, message):
    with pytest.raises(ValueError, match=message):
        metrics.threshold_counts(labels, probabilities)


@pytest.mark.parametrize(
    "function", [metrics.pr_curve, metrics.roc_curve, metrics.average_precision, metrics.auroc]
)
@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_has_no_curve(function, label):
    with pytest.raises(ValueError, match=f"All 3 labels are {label}.*both classes"):
        function([label] * 3, [0.1, 0.2, 0.3])


def test_a_missing_threshold_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        metrics.confusion(LABELS, PROBABILITIES, np.nan)


def test_log_losses_of_certain_mistakes_stay_finite():
    assert metrics.log_losses([1, 0], [0.25, 0.5]) == pytest.approx([np.log(4), np.log(2)])
    assert metrics.log_losses([1, 0], [0.0, 1.0]) == pytest.approx(-np.log(np.finfo(float).eps))


def test_cases_whose_log_loss_is_the_clip_are_counted():
    assert metrics.clip_note([1, 0, 0], [1.0, 0.0, 0.9]) == ""  # certain and right
    assert metrics.clip_note([1, 0, 0], [1e-17, 0.0, 0.9]).startswith("1 of 3 cases was predicted with cert")
    note = metrics.clip_note([1, 0, 0], [0.0, 1.0, 0.9])
    assert note == (
        "2 of 3 cases were predicted with certainty and wrongly: the log loss of each is 36.0, the clip at "
        "2.2e-16."
    )


def test_a_roc_curve_has_a_point_for_every_distinct_probability():
    labels, scores = [0, 1, 1, 1, 0, 0], [0.1, 0.9, 0.8, 0.7, 0.3, 0.2]
    curve = metrics.roc_curve(labels, scores)
    assert curve["threshold"].tolist() == [np.inf, 0.9, 0.8, 0.7, 0.3, 0.2, 0.1]
    assert curve["recall"].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1, 1, 1, 1])


def as_participants_scored(labels, probabilities):
    """The participants' public code in a line of numpy each: columns are the patient, C1 … C7."""
    weights = np.where(labels == 1, [14] + 7 * [2], [7] + 7 * [1])
    loss = -(labels * np.log(probabilities) + (1 - labels) * np.log(1 - probabilities))
    return np.mean((loss * weights).sum(axis=1) / weights.sum(axis=1))


def test_the_competition_terms_of_a_hand_worked_study():
    loss, weight = metrics.rsna_terms([[1, 0, 0, 0, 0, 0, 0]], [[0.8] + 6 * [0.1]], [1], [0.5])
    assert weight.tolist() == [2 + 6 + 14]
    assert loss.tolist() == pytest.approx([-(2 * np.log(0.8) + 6 * np.log(0.9) + 14 * np.log(0.5))])


def test_the_mean_of_the_studies_losses_is_that_of_the_participants_code():
    rng = np.random.default_rng(0)
    labels, probabilities, overall = rng.integers(0, 2, (40, 7)), rng.random((40, 7)), rng.random(40)
    loss, weight = metrics.rsna_terms(labels, probabilities, labels.max(axis=1), overall)
    both = np.column_stack([labels.max(axis=1), labels]), np.column_stack([overall, probabilities])
    assert (loss / weight).mean() == pytest.approx(as_participants_scored(*both), abs=1e-12)


def test_the_competition_loss_stays_finite_at_certain_mistakes():
    labels = np.eye(2, 7, dtype=int)
    assert np.isfinite(metrics.rsna_terms(labels, 1 - labels, [1, 1], [0, 0])[0]).all()


def test_costs_are_the_weights_of_the_competition():
    assert metrics.RSNA_COSTS == {
        "vertebra": {"cost_miss": 2, "cost_false_alarm": 1},
        "patient": {"cost_miss": 14, "cost_false_alarm": 7},
    }
