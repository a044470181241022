import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from cspine_helpers import metrics
from cspine_helpers.evaluation import cases as evaluation_cases
from cspine_helpers.labels import UID, VERTEBRAE, read_labels
from cspine_helpers.predictions import from_wide

LABELS = [1, 0, 1, 0, 0]
PROBABILITIES = [0.9, 0.8, 0.5, 0.5, 0.1]
TIED = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 8)), min_size=1, max_size=40)


def table_of(probabilities, labels, studies=("1.1", "1.2")):
    """Predictions of whole studies from (studies, 7) arrays."""
    rows = [(uid, vertebra, "validation") for uid in studies for vertebra in VERTEBRAE]
    table = pd.DataFrame(rows, columns=[UID, "vertebra", "split"])
    return table.assign(label=np.ravel(labels), probability=np.ravel(probabilities))


@pytest.fixture(scope="module")
def real():
    wide = pd.read_csv(RSNA / "oof_predictions.csv", dtype={"uid": str})
    return from_wide(wide, read_labels(RSNA / "train.csv"), "validation", missing="drop")


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


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_f_beta_agrees_with_scikit_learn_at_every_threshold(beta):
    counts = metrics.threshold_counts(LABELS, PROBABILITIES)
    called = [np.array(PROBABILITIES) >= threshold for threshold in counts["threshold"]]
    expected = [sk.fbeta_score(LABELS, calls, beta=beta) for calls in called]
    np.testing.assert_allclose(metrics.f_beta(counts, beta), expected, rtol=0, atol=1e-12)


def test_f_beta_of_one_is_f1_undefined_cases_included():
    counts = metrics.confusion([0, 0], [0.2, 0.7], [0.5, 0.9])
    np.testing.assert_array_equal(metrics.f_beta(counts, 1), metrics.rates(counts)["f1"])


@pytest.mark.parametrize("beta", [0, -1, np.nan, np.inf])
def test_f_beta_refuses_other_than_positive_numbers(beta):
    with pytest.raises(ValueError, match="beta is a positive number; found"):
        metrics.f_beta(metrics.threshold_counts(LABELS, PROBABILITIES), beta)


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
@pytest.mark.parametrize("level", evaluation_cases.LEVELS)
def test_real_predictions_agree_with_scikit_learn(real, level):
    rows = evaluation_cases.at_level(real, level)
    labels, probabilities = rows["label"].to_numpy(), rows["probability"].to_numpy()
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
    labels, called = real["label"], real["probability"] >= threshold
    row = metrics.rates(metrics.confusion(labels, real["probability"], threshold)).iloc[0]
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


def test_patient_level_takes_the_highest_vertebra():
    labels, probabilities = np.zeros((2, 7), int), np.full((2, 7), 0.1)
    labels[1, 4], probabilities[0, 2], probabilities[1, 6] = 1, 0.6, 0.3
    patients = evaluation_cases.patient_level(table_of(probabilities, labels))
    assert patients.to_numpy().tolist() == [["1.1", "validation", 0, 0.6], ["1.2", "validation", 1, 0.3]]


def test_levels_select_their_rows():
    table = table_of(np.arange(14) / 20, [0, 1] * 7)
    assert evaluation_cases.at_level(table, "C3")["probability"].tolist() == [0.1, 0.45]
    assert len(evaluation_cases.at_level(table, "all")) == 14
    assert len(evaluation_cases.at_level(table, "patient")) == 2
    with pytest.raises(ValueError, match=r"Unknown level 'C8'.*all, C1, C2"):
        evaluation_cases.at_level(table, "C8")
    with pytest.raises(ValueError, match="no row at level 'C3'"):
        evaluation_cases.at_level(table[table["vertebra"] != "C3"], "C3")


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


def test_defined_levels_need_both_classes():
    labels = np.zeros((3, 7), int)
    labels[0, 1] = 1
    table = table_of(np.full((3, 7), 0.5), labels, ["1.1", "1.2", "1.3"])
    assert evaluation_cases.defined_levels(table) == ["all", "C2", "patient"]
    assert evaluation_cases.defined_levels(table[table["vertebra"] == "C1"]) == []


def test_share_of_healthy_patients_cleared_falls_with_each_vertebra():
    probabilities = np.full((3, 7), 0.1)
    probabilities[0, 1] = probabilities[0, 5] = probabilities[1, 5] = 0.9
    labels = np.zeros((3, 7), int)
    labels[2] = 1  # a fractured patient does not count
    table = table_of(probabilities, labels, ["1.1", "1.2", "1.3"])
    found, independent = evaluation_cases.cleared_by_vertebrae(table, 0.5)
    assert found.tolist() == [1, 0.5, 0.5, 0.5, 0.5, 0, 0]
    assert independent.tolist() == [1, 0.5, 0.5, 0.5, 0.5, 0, 0]
    found, _ = evaluation_cases.cleared_by_vertebrae(table[table["vertebra"] != "C6"], 0.5)
    assert found.tolist() == [1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="Every patient has a fracture"):
        evaluation_cases.cleared_by_vertebrae(table.assign(label=1), 0.5)


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


def test_a_vertebra_at_the_threshold_is_an_alarm():
    table = table_of(np.full((2, 7), 0.5), np.eye(2, 7, dtype=int) * [[0], [1]])
    cleared, independent = evaluation_cases.cleared_by_vertebrae(table, 0.5)
    assert cleared.tolist() == independent.tolist() == [0] * 7
    assert evaluation_cases.cleared_by_vertebrae(table, np.nextafter(0.5, 1))[0].tolist() == [1] * 7
