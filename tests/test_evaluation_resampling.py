import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from simulated import cases_of
from sklearn import metrics as sk

from cspine_helpers import metrics
from cspine_helpers.evaluation.resampling import (
    Ranking,
    combined,
    confusion_sums,
    correlation,
    effective_cases,
    estimates,
    loss_interval,
    mean_interval,
    patient_weights,
    quantiles,
    resampled,
    score_interval,
    share_by_patient,
    shares_of,
)

FEW = settings(max_examples=50)  # scikit-learn's checks take their time
CASES = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6), st.integers(0, 5)), min_size=1, max_size=40)


def weighted(cases, seed):
    """A sample with ties, weights of one resample, and the weight of each row."""
    labels, scores, patient = np.array(cases).T
    rows = cases_of(labels, scores / 6, patient, 6)
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


@FEW
@given(CASES, st.integers(0, 100))
def test_weighted_areas_equal_scikit_learns_with_ties(cases, seed):
    rows, weights, each = weighted(cases, seed)
    auroc, average_precision = Ranking(rows).areas(weights)[:, 0]
    y, p = rows.label, rows.probability
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
    y, p, points = rows.label, rows.probability, np.arange(1, 11) / 10
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
    y, p = rows.label[repeated], rows.probability[repeated]
    expected = metrics.confusion(y, p, threshold / 6).iloc[0]
    assert sums.tolist() == expected[["tp", "fp", "fn", "tn"]].tolist()
    (loss, count), (square, _) = estimates(rows, None).means.values()
    oracle = sk.log_loss(y, p, labels=[0, 1])
    assert loss @ weights[:, 0] / (count @ weights[:, 0]) == pytest.approx(oracle, abs=1e-10)
    assert square @ weights[:, 0] / len(y) == pytest.approx(sk.brier_score_loss(y, p), abs=1e-12)


@pytest.mark.parametrize(
    ("patients", "rows", "pieces"),
    [(10, 2**22, [1, 1, 1]), (2**20, 1, [2, 1]), (10, 2**19, [3]), (2, 2**20, [2, 1])],
)
def test_the_larger_of_rows_and_patients_sets_the_size_of_a_piece_one_resample_at_least(
    patients, rows, pieces
):
    found = [part.shape[1] for part in patient_weights(patients, 3, 0, rows=rows)]
    assert found == pieces


@pytest.mark.parametrize("found", [0, 1, 7, 19, 20])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_score_interval_is_scipys(found, confidence):
    expected = stats.binomtest(found, 20).proportion_ci(confidence, method="wilson")
    low, high = score_interval(found / 20, 20, confidence)
    np.testing.assert_allclose([low, high], [expected.low, expected.high], rtol=0, atol=1e-12)


def test_quantiles_leave_out_equal_tails():
    assert np.ravel(quantiles(np.arange(101.0), 0.9)) == pytest.approx([5, 95])


def test_a_loss_has_students_t_on_its_logarithm():
    draws = np.random.default_rng(0).normal(0.5, 0.01, 10**5)  # so narrow that the logarithm is straight
    low, high = loss_interval(0.5, draws, 11, 0.95)
    half = stats.t.ppf(0.975, 10) * 0.01 * np.sqrt(11 / 10)
    assert [low, high] == pytest.approx([0.5 - half, 0.5 + half], rel=2e-3)
    assert low * high == pytest.approx(0.5**2)
    assert loss_interval(0.0, np.zeros(5), 11, 0.95) == (0, 0)


def test_the_mean_of_shares_without_skew_has_students_t():
    shares = np.array([-1.0, 0, 1, 2, 3])
    half = stats.t.ppf(0.95, 4) * shares.std(ddof=1) / np.sqrt(5)
    assert mean_interval(shares, 0.9) == pytest.approx((1 - half, 1 + half))
    assert mean_interval(np.full(4, 0.3), 0.9) == (0.3, 0.3)
    assert np.isnan(mean_interval(np.array([0.3]), 0.9)).all()


def test_the_mean_of_skewed_shares_reaches_further_where_the_tail_is():
    shares = np.array([0.0] * 18 + [1, 4])
    half = stats.t.ppf(0.975, 19) * shares.std(ddof=1) / np.sqrt(20)
    low, high = mean_interval(shares, 0.95)
    assert low == pytest.approx(0.25 - half)
    assert 0.25 + 1.2 * half < high < 0.25 + 1.3 * half  # no outlier makes it longer than that
    assert mean_interval(-shares, 0.95) == pytest.approx((-high, -low))


def test_shares_of_a_ratio_are_what_moves_it():
    above, below = np.array([2.0, 0, 3, 0]), np.array([7.0, 7, 5, 0])
    shares = shares_of((above, below))
    assert shares.mean() == pytest.approx(5 / 19)
    assert len(shares) == 3  # the last has no row
    nudged = (5 + 1e-6 * 2) / (19 + 1e-6 * 7)  # the first patient counts a millionth more
    assert (nudged - 5 / 19) / 1e-6 == pytest.approx((shares[0] - 5 / 19) / 3, rel=1e-4)


def recall_cases(hits_of_patients):
    """Effective cases of the recall of patients with so many (found, missed) fractures."""
    labels = np.ones(sum(map(sum, hits_of_patients)), int)
    scores = np.concatenate([[0.9] * found + [0.1] * missed for found, missed in hits_of_patients])
    patient = np.repeat(np.arange(len(hits_of_patients)), [sum(pair) for pair in hits_of_patients])
    numbers = estimates(cases_of(labels, scores, patient, len(hits_of_patients)), 0.5)
    draws = np.concatenate(
        [numbers.under(part) for part in patient_weights(len(hits_of_patients), 4000, 0)], axis=1
    )
    value = numbers.under(np.ones((len(hits_of_patients), 1)))[0, 0]
    return effective_cases(value, draws[0], float(len(labels)), len(hits_of_patients))


def test_vertebrae_that_always_go_together_count_as_one_case_a_patient():
    assert recall_cases([(5, 0)] * 30 + [(0, 5)] * 10) == pytest.approx(40, rel=0.1)


def test_patients_with_one_vertebra_are_all_cases():
    assert recall_cases([(1, 0)] * 30 + [(0, 1)] * 10) == pytest.approx(40, rel=0.1)


def test_patients_count_where_everything_is_found():
    assert recall_cases([(5, 0)] * 8) == 8


def test_cases_are_never_more_than_rows():
    assert recall_cases([(3, 1)] * 10 + [(4, 0), (2, 2)]) == 48


def test_one_patient_is_one_case():
    assert effective_cases(0.5, np.array([0.5, 0.5]), 4, 1) == 1


def test_correlation_is_careful_where_one_does_not_vary():
    draws = np.array([0.1, 0.4, np.nan, 0.3])
    assert correlation(draws, 2 * draws) == pytest.approx(1)
    assert correlation(draws, np.full(4, 0.5)) == 0
    assert correlation(np.full(4, np.nan), draws) == 0


def test_half_widths_add_as_variances_do():
    three, four = np.array([3.0]), np.array([4.0])
    assert combined(three, four, np.array([0.0])).tolist() == [5]
    assert combined(three, four, np.array([1.0])).tolist() == [1]
    assert combined(three, three, np.array([1.0])).tolist() == [0]


def test_patients_that_are_drawn_bring_all_their_rows():
    many = np.random.default_rng(4).random((9, 2))
    drawn = resampled(np.column_stack([np.ones(9), many]), 4000, 0)
    assert (drawn[:, 0] == 9).all()
    np.testing.assert_allclose(drawn[:, 1:].mean(axis=0), many.sum(axis=0), rtol=0.02)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_at_its_end_counts_as_many_cases_as_patients_though_draws_vary(share):
    """Lesions hit where hardly a false mark is accepted: 0 of them, but not in every resample."""
    assert effective_cases(share, np.array([share, 0.1, 0.2]), 10, 5) == 5


def test_a_share_of_hits_has_limits_where_all_hit_and_fewer_where_patients_are_alike():
    rng = np.random.default_rng(0)
    hits, own, many = rng.integers(0, 2, 60), np.arange(60), np.arange(60) // 6
    alike = np.repeat(rng.integers(0, 2, 10), 6)
    share, low, high = share_by_patient(hits, own)
    wilson = score_interval(hits.mean(), 60)
    assert share == hits.mean()
    np.testing.assert_allclose([low, high], wilson, atol=0.02)
    _, low, high = share_by_patient(alike, many)
    assert high - low > 1.8 * np.ptp(score_interval(alike.mean(), 60))
    assert share_by_patient(np.ones(60), many)[1] < 0.8
    assert np.isnan(share_by_patient([1.0, 0.0], ["a", "a"])[1:]).all()
