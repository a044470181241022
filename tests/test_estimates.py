import numpy as np
import pytest
from scipy import stats

from cspine_helpers.estimates import (
    combined,
    correlation,
    effective_cases,
    estimates,
    loss_interval,
    quantiles,
    score_interval,
)
from cspine_helpers.resampling import Sample, patient_weights


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


def recall_cases(hits_of_patients):
    """Effective cases of the recall of patients with so many (found, missed) fractures."""
    labels = np.ones(sum(map(sum, hits_of_patients)), int)
    scores = np.concatenate([[0.9] * found + [0.1] * missed for found, missed in hits_of_patients])
    patient = np.repeat(np.arange(len(hits_of_patients)), [sum(pair) for pair in hits_of_patients])
    numbers = estimates(Sample(labels, scores, patient, len(hits_of_patients)), 0.5)
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
