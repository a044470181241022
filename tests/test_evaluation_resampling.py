import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import cohort
from sklearn import metrics as sk

from cspine_helpers import metrics
from cspine_helpers.evaluation.resampling import (
    Ranking,
    Sample,
    confusion_sums,
    loss_ratios,
    patient_weights,
    sample,
)

FEW = settings(max_examples=50)  # scikit-learn's checks take their time
CASES = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6), st.integers(0, 5)), min_size=1, max_size=40)


def weighted(cases, seed):
    """A sample with ties, weights of one resample, and the weight of each row."""
    labels, scores, patient = np.array(cases).T
    rows = Sample(labels, scores / 6, patient, 6)
    weights = next(patient_weights(6, 1, seed))
    return rows, weights, weights[patient, 0]


def test_each_resample_draws_as_many_patients_as_there_are():
    weights = np.concatenate(list(patient_weights(50, 400, 3, rows=10**5)), axis=1)
    assert weights.shape == (50, 400)
    assert (weights.sum(axis=0) == 50).all()
    expected = 50 * 0.02 * 0.98 * 50  # of a multinomial, summed over patients
    assert weights.var(axis=1).sum() == pytest.approx(expected, rel=0.1)


def test_one_seed_gives_the_same_resamples():
    first, second, other = (next(patient_weights(20, 30, seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_many_rows_come_in_small_pieces():
    pieces = [part.shape[1] for part in patient_weights(10, 25, 0, rows=2**18)]
    assert pieces == [8, 8, 8, 1]


@FEW
@given(CASES, st.integers(0, 100))
def test_weighted_areas_equal_scikit_learns_with_ties(cases, seed):
    rows, weights, each = weighted(cases, seed)
    auroc, average_precision = Ranking(rows).areas(weights)[:, 0]
    y, p = rows.labels, rows.probabilities
    if each[y == 1].sum() == 0 or each[y == 0].sum() == 0:
        assert np.isnan([auroc, average_precision]).all()
        return
    assert auroc == pytest.approx(sk.roc_auc_score(y, p, sample_weight=each), abs=1e-12)
    expected = sk.average_precision_score(y, p, sample_weight=each)
    assert average_precision == pytest.approx(expected, abs=1e-12)


@FEW
@given(CASES, st.integers(0, 100))
def test_weighted_curves_equal_scikit_learns_with_ties(cases, seed):
    rows, weights, each = weighted(cases, seed)
    y, p, points = rows.labels, rows.probabilities, np.arange(1, 11) / 10
    precision_at = Ranking(rows).precision_at(weights, points)[:, 0]
    recall_at = Ranking(rows).recall_at(weights, points)[:, 0]
    if each[y == 1].sum() == 0 or each[y == 0].sum() == 0:
        assert np.isnan([precision_at, recall_at]).all()
        return
    precision, recall, _ = sk.precision_recall_curve(y, p, sample_weight=each)
    expected = [precision[np.flatnonzero(recall >= point - 1e-9)[-1]] for point in points]
    np.testing.assert_allclose(precision_at, expected, rtol=0, atol=1e-9)
    across, up, _ = sk.roc_curve(y, p, sample_weight=each, drop_intermediate=False)
    for point, found in zip(points, recall_at, strict=True):
        last = np.flatnonzero(across <= point + 1e-9)[-1]
        if last + 1 == len(across):
            assert found == pytest.approx(1, abs=1e-9)
            continue
        part = max(0, point - across[last]) / (across[last + 1] - across[last])
        assert found == pytest.approx(up[last] + part * (up[last + 1] - up[last]), abs=1e-9)


@FEW
@given(CASES, st.integers(0, 100), st.integers(0, 7))
def test_weighted_sums_equal_counts_of_repeated_rows(cases, seed, threshold):
    rows, weights, each = weighted(cases, seed)
    sums = (confusion_sums(rows, threshold / 6) @ weights)[:, 0]
    repeated = np.repeat(np.arange(len(each)), each.astype(int))
    if not len(repeated):
        assert not sums.any()
        return
    y, p = rows.labels[repeated], rows.probabilities[repeated]
    expected = metrics.confusion(y, p, threshold / 6).iloc[0]
    assert sums.tolist() == expected[["tp", "fp", "fn", "tn"]].tolist()
    (loss, count), (square, _) = loss_ratios(rows).values()
    oracle = sk.log_loss(y, p, labels=[0, 1])
    assert loss @ weights[:, 0] / (count @ weights[:, 0]) == pytest.approx(oracle, abs=1e-10)
    assert square @ weights[:, 0] / len(y) == pytest.approx(sk.brier_score_loss(y, p), abs=1e-12)


def test_a_sample_knows_whose_its_rows_are():
    table = cohort(many=3)
    rows = sample(table)
    assert rows.patient.tolist() == np.repeat([0, 1, 2], 7).tolist()
    assert rows.sums().tolist() == [7, 7, 7]
    single = sample(table[(table["vertebra"] == "C2") & (table["StudyInstanceUID"] != "1.1")])
    assert single.patients == 2
    assert sample(table, "patient").patient.tolist() == [0, 1, 2]
    assert sample(table, "C7").labels.tolist() == table["label"][table["vertebra"] == "C7"].tolist()


@pytest.mark.parametrize(
    ("patients", "rows", "pieces"),
    [(10, 2**22, [1, 1, 1]), (2**20, 1, [2, 1]), (10, 2**19, [3]), (2, 2**20, [2, 1])],
)
def test_the_larger_of_rows_and_patients_sets_the_size_of_a_piece_one_resample_at_least(
    patients, rows, pieces
):
    found = [part.shape[1] for part in patient_weights(patients, 3, 0, rows=rows)]
    assert found == pieces
