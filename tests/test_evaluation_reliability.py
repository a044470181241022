import numpy as np
import pandas as pd
import pytest
import simulated
from conftest import RSNA, needs_rsna
from scipy import stats
from simulated import patients_of
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss

from cspine_helpers.evaluation import reliability
from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.evaluation.intervals import bootstrap
from cspine_helpers.evaluation.resampling import score_interval
from cspine_helpers.labels import UID, read_labels
from cspine_helpers.metrics import log_losses
from cspine_helpers.predictions import from_wide


def vertebrae_of(probabilities, labels):
    """Cases of whole studies from (studies, 7) arrays."""
    return Cases.of(simulated.table_of(np.asarray(labels).astype(int), probabilities))


def clustered(rng, patients, *, spread=1.0):
    """Perfectly calibrated scores; the smaller `spread`, the more a patient's vertebrae agree."""
    scores = rng.choice([0.05, 0.2, 0.5], (patients, 7))
    place = rng.random((patients, 1))  # of the patient among all: the same for its seven vertebrae
    share = stats.beta.ppf(place, scores * spread, (1 - scores) * spread)
    return vertebrae_of(scores, rng.random((patients, 7)) < share)


@pytest.fixture
def cases():
    rng = np.random.default_rng(3)
    p = rng.beta(1, 5, (80, 7))
    return vertebrae_of(p, rng.random((80, 7)) < p**1.3)


@pytest.fixture(scope="module")
def real():
    wide = pd.read_csv(RSNA / "oof_predictions.csv", dtype={"uid": str})
    return Cases.of(from_wide(wide, read_labels(RSNA / "train.csv"), "validation", missing="drop"))


def test_bins_of_a_hand_worked_case():
    p = [0.1, 0.2, 0.3, 0.4, 0.8, 0.9]
    found = reliability.reliability_table(patients_of(p, [0, 1, 0, 0, 1, 1]), bins=2)
    assert found[["lower", "upper"]].to_numpy().tolist() == [[0.1, 0.35], [0.35, 0.9]]
    assert found[["cases", "patients", "positives"]].to_numpy().tolist() == [[3, 3, 1], [3, 3, 2]]
    np.testing.assert_allclose(found["probability"], [0.2, 0.7])
    np.testing.assert_allclose(found["observed"], [1 / 3, 2 / 3])


@pytest.mark.parametrize("strategy", ["quantile", "uniform"])
@pytest.mark.parametrize("bins", [1, 5, 10, 17])
def test_bins_are_those_of_scikit_learn(cases, strategy, bins):
    found = reliability.reliability_table(cases, bins=bins, strategy=strategy)
    expected = calibration_curve(cases.label, cases.probability, n_bins=bins, strategy=strategy)
    filled = found[~found["undefined"]]
    np.testing.assert_allclose(filled["observed"], expected[0], atol=1e-12)
    np.testing.assert_allclose(filled["probability"], expected[1], atol=1e-12)
    assert found["cases"].sum() == len(cases)


@needs_rsna
@pytest.mark.parametrize("level", ["all", "patient"])
def test_real_bins_and_scores_are_those_of_scikit_learn(real, level):
    cases = real.of_unit(level)
    y, p = cases.label, cases.probability
    found = reliability.reliability_table(cases, bins=12)
    expected = calibration_curve(y, p, n_bins=12, strategy="quantile")
    np.testing.assert_allclose(found["observed"], expected[0], atol=1e-12)
    np.testing.assert_allclose(found["probability"], expected[1], atol=1e-12)
    scores = reliability.calibration_scores(cases, bins=12, resamples=200).set_index("score")
    assert scores.loc["brier", "value"] == pytest.approx(brier_score_loss(y, p), abs=1e-12)
    assert scores.loc["log_loss", "value"] == pytest.approx(log_loss(y, p), abs=1e-12)
    distance = (found["probability"] - found["observed"]).abs()
    plain = np.sqrt(np.average(distance**2, weights=found["cases"]))
    assert 0.9 * plain < scores.loc["ece", "value"] < plain  # less what chance adds
    bounded = scores.drop(index="ece")
    assert (bounded["low"] < bounded["value"]).all()
    assert (bounded["value"] < bounded["high"]).all()


def test_an_empty_bin_is_marked_and_has_no_figures():
    rows = patients_of([0.05, 0.1, 0.95], [0, 1, 1])
    found = reliability.reliability_table(rows, bins=4, strategy="uniform")
    assert found["undefined"].tolist() == [False, True, True, False]
    assert found[found["undefined"]][["probability", "observed", "low", "high"]].isna().all(axis=None)
    assert found[~found["undefined"]].notna().all(axis=None)


def test_scores_that_tie_share_a_bin():
    found = reliability.reliability_table(patients_of([0.3] * 6, [0, 1] * 3))
    assert found[["cases", "observed", "probability"]].to_numpy().tolist() == [[6, 0.5, pytest.approx(0.3)]]


def test_an_interval_of_single_cases_is_that_of_wilson():
    y = np.tile([1, 0, 0, 0], 10)
    found = reliability.reliability_table(patients_of([0.3] * 40, y)).iloc[0]
    cases = 40 - 1  # the variance of a sample has one degree of freedom less
    z = stats.norm.ppf(0.975)
    for end in ("low", "high"):  # where the score test of Wilson stands at z
        assert abs(found[end] - 0.25) / np.sqrt(found[end] * (1 - found[end]) / cases) == pytest.approx(z)


def test_a_bin_where_all_are_intact_counts_its_patients_not_its_cases():
    found = reliability.reliability_table(vertebrae_of(np.full((5, 7), 0.1), np.zeros((5, 7)))).iloc[0]
    expected = stats.binomtest(0, 5).proportion_ci(method="wilson")
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))


@pytest.mark.slow
def test_intervals_of_bins_keep_their_promise_and_those_of_rows_do_not():
    rng, truth = np.random.default_rng(0), np.array([0.05, 0.2, 0.5])
    kept, kept_by_rows, draws = np.zeros(3), np.zeros(3), 200
    for _ in range(draws):
        found = reliability.reliability_table(clustered(rng, 120), bins=20, strategy="uniform")
        found = found[~found["undefined"]]
        kept += (found["low"] <= truth) & (truth <= found["high"])
        low, high = score_interval(found["observed"].to_numpy(), found["cases"].to_numpy(), 0.95)
        kept_by_rows += (low <= truth) & (truth <= high)
    assert (kept / draws > 0.92).all()
    assert (kept_by_rows[1:] / draws < 0.9).all()  # rare fractures of a patient seldom meet


KINDS = {  # vertebrae a patient; how the logit of the probabilities is shifted and stretched
    "vertebrae, calibrated": (7, 0.0, 1.0),
    "vertebrae, too high and too flat": (7, 0.8, 0.7),
    "patients, calibrated": (1, 0.0, 1.0),
    "patients, too high and too steep": (1, 0.6, 1.6),
}


def rarer_than(count, draws, share):
    """Whether so few of the draws are below what chance gives once in 1,000 where the share is true."""
    return stats.binom.cdf(count, draws, share) < 0.001


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("many", "draws"), [(50, 300), (200, 200), (800, 100)])
def test_calibration_is_stated_as_surely_as_it_is_known(many, draws, kind):
    """Intervals hold the truth 93 times in 100 or more, and the test errs 7 times or fewer."""
    vertebrae, intercept, slope = KINDS[kind]
    truth = simulated.calibration_truth(intercept, slope, vertebrae=vertebrae)
    rng, held, rejected, errors = np.random.default_rng(many), {}, 0, []
    for draw in range(draws):
        _, labels, p = simulated.calibrated(rng, many, vertebrae=vertebrae, intercept=intercept, slope=slope)
        cases = vertebrae_of(p, labels) if vertebrae == 7 else patients_of(p[:, 0], labels[:, 0])
        found = reliability.calibration_scores(cases, resamples=199, seed=draw)
        found = found.set_index("score")
        for name in ("bias", "slope", "brier"):
            low, high = found.loc[name, ["low", "high"]]
            held[name] = held.get(name, 0) + (low <= truth[name] <= high)
        rejected += found.loc["ece", "p"] <= 0.05
        errors.append(found.loc["ece", "value"])
    short = {name: count / draws for name, count in held.items() if rarer_than(count, draws, 0.93)}
    assert short == {}
    if "calibrated" in kind:
        assert not rarer_than(draws - rejected, draws, 0.93), rejected / draws
        assert np.median(errors) < 0.1 / np.sqrt(many)  # nearly all of a plain ECE would be chance
    else:
        assert np.mean(errors) == pytest.approx(truth["ece"], rel=0.25 if many == 50 else 0.15)
        assert rejected == draws or many < 800


def test_the_debiased_error_of_a_hand_worked_case():
    rows = patients_of([0.2] * 10 + [0.6] * 10, [1] * 4 + [0] * 6 + [1] * 9 + [0])
    found = reliability.calibration_scores(rows, bins=2, strategy="uniform").set_index("score")
    squares = [0.2**2, 0.3**2]  # 0.4 of ten for 0.2, 0.9 of ten for 0.6
    spread = np.array([[-0.8] * 4 + [0.2] * 6 + [0] * 10, [0] * 10 + [-0.4] * 9 + [0.6]]).var(axis=1, ddof=1)
    expected = np.sqrt(np.mean(squares - 20 * spread / 10**2))
    assert found.loc["ece", "value"] == pytest.approx(expected)
    assert found.loc["ece", ["low", "high"]].isna().all()


def test_the_test_of_calibration_turns_patients_not_rows():
    """Seven equal vertebrae are no seven witnesses: the p is that of the patients alone."""
    rng = np.random.default_rng(5)
    p = rng.random((30, 1))
    y = rng.random((30, 1)) < p**1.5
    alone = reliability.calibration_scores(patients_of(p[:, 0], y[:, 0].astype(int)), bins=5)
    seven = reliability.calibration_scores(vertebrae_of(np.repeat(p, 7, 1), np.repeat(y, 7, 1)), bins=5)
    pd.testing.assert_series_equal(alone["p"], seven["p"])
    for name in ("bias", "slope"):
        pair = [found.set_index("score").loc[name, ["value", "low", "high"]] for found in (alone, seven)]
        np.testing.assert_allclose(*[list(values) for values in pair], rtol=1e-6)


def test_the_slope_is_that_of_a_logistic_fit():
    rng = np.random.default_rng(6)
    _, labels, p = simulated.calibrated(rng, 150, slope=1.5)
    found = reliability.calibration_scores(vertebrae_of(p, labels)).set_index("score").loc["slope"]
    fit = LogisticRegression(C=np.inf, tol=1e-10).fit(np.log(p / (1 - p)).reshape(-1, 1), labels.ravel())
    assert found["value"] == pytest.approx(fit.coef_[0, 0], rel=1e-4)
    assert found["low"] < 1 / 1.5 < found["high"] < 1


@pytest.mark.parametrize("p", [[0.3] * 6, [0.1, 0.2, 0.3, 0.6, 0.7, 0.8]])
def test_scores_that_are_alike_or_part_the_classes_have_no_slope(p):
    found = reliability.calibration_scores(patients_of(p, [0, 0, 0, 1, 1, 1]), resamples=9)
    assert found.set_index("score").loc["slope", ["value", "low", "high"]].isna().all()
    assert reliability.written_scores(found)["slope"] == "undefined"


def test_one_patient_has_values_and_no_intervals():
    found = reliability.calibration_scores(vertebrae_of([[0.1] * 6 + [0.7]], [[0] * 6 + [1]]), resamples=9)
    assert found[["low", "high", "p"]].isna().all(axis=None)
    assert found.set_index("score")["value"].drop(["slope", "ece"]).notna().all()


def test_scores_in_words():
    table = pd.DataFrame(
        [
            ("bias", -0.01, -0.02, 0.01, np.nan),
            ("brier", 0.1, 0.05, 0.2, np.nan),
            ("ece", 0.04, np.nan, np.nan, 0.0313),
            ("other", 0.04, np.nan, np.nan, 0.0001),
        ],
        columns=["score", "value", "low", "high", "p"],
    )
    assert reliability.written_scores(table) == {
        "bias": "-0.010 (-0.020 to 0.010)", "brier": "0.100 (0.050–0.200)",
        "ece": "0.040 (p = 0.031)", "other": "0.040 (p < 0.001)",
    }  # fmt: skip


def test_intervals_of_single_cases_are_nearly_those_of_scipy_and_those_of_the_headline_numbers():
    rng = np.random.default_rng(2)
    p = rng.random(150)
    rows = patients_of(p, (rng.random(150) < p).astype(int))
    found = reliability.calibration_scores(rows, resamples=5000).set_index("score")
    losses = {"brier": (p - rows.label) ** 2, "log_loss": log_losses(rows.label, p)}
    same = bootstrap(rows, threshold=None, resamples=5000).set_index("metric")
    for name, loss in losses.items():
        drawn = stats.bootstrap((loss,), np.mean, n_resamples=5000, method="percentile", rng=0)
        expected = drawn.confidence_interval
        width = expected.high - expected.low
        for end in ("low", "high"):
            assert found.loc[name, end] == pytest.approx(getattr(expected, end), abs=0.1 * width)
            assert found.loc[name, end] == pytest.approx(same.loc[name, end], abs=1e-9)


def test_same_seed_same_intervals(cases):
    first, again, other = (reliability.calibration_scores(cases, seed=seed) for seed in (5, 5, 6))
    pd.testing.assert_frame_equal(first, again)
    assert not first.equals(other)


def test_mixed_splits_are_refused():
    table = simulated.cohort(many=5)
    mixed = Cases.of(table.assign(split=np.where(table[UID] == "1.3", "test", "validation")))
    for function in (reliability.reliability_table, reliability.calibration_scores):
        with pytest.raises(ValueError, match="mix the splits 'test', 'validation'"):
            function(mixed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bins": 0}, "bins is a whole number from 1; found 0"),
        ({"bins": 2.5}, "found 2.5"),
        ({"strategy": "kmeans"}, "Unknown strategy 'kmeans'. Choose one of quantile, uniform"),
        ({"confidence": 95}, "confidence lies between 0 and 1; found 95"),
    ],
)
def test_bad_options_are_refused(cases, options, message):
    for function in (reliability.reliability_table, reliability.calibration_scores):
        with pytest.raises(ValueError, match=message):
            function(cases, **options)


def test_at_least_one_resample_is_asked_for(cases):
    with pytest.raises(ValueError, match="resamples is a whole number from 1; found 0"):
        reliability.calibration_scores(cases, resamples=0)
