import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from cspine_helpers import reliability
from cspine_helpers.estimates import score_interval
from cspine_helpers.intervals import bootstrap
from cspine_helpers.labels import UID, VERTEBRAE, read_labels
from cspine_helpers.metrics import patient_level
from cspine_helpers.predictions import from_wide
from cspine_helpers.resampling import resampled


def table_of(probabilities, labels, *, split="validation"):
    """Predictions of whole studies from (studies, 7) arrays."""
    rows = [(f"1.{study}", name, split) for study in range(len(labels)) for name in VERTEBRAE]
    table = pd.DataFrame(rows, columns=[UID, "vertebra", "split"])
    return table.assign(label=np.ravel(labels).astype(int), probability=np.ravel(probabilities))


def patients_of(probabilities, labels):
    """A table of patients from two columns."""
    uids = [f"1.{n}" for n in range(len(labels))]
    return pd.DataFrame({UID: uids, "split": "test", "label": labels, "probability": probabilities})


def clustered(rng, patients, *, spread=1.0):
    """Perfectly calibrated scores; the smaller `spread`, the more a patient's vertebrae agree."""
    scores = rng.choice([0.05, 0.2, 0.5], (patients, 7))
    place = rng.random((patients, 1))  # of the patient among all: the same for its seven vertebrae
    share = stats.beta.ppf(place, scores * spread, (1 - scores) * spread)
    return table_of(scores, rng.random((patients, 7)) < share)


@pytest.fixture
def table():
    rng = np.random.default_rng(3)
    p = rng.beta(1, 5, (80, 7))
    return table_of(p, rng.random((80, 7)) < p**1.3)


@pytest.fixture(scope="module")
def real():
    wide = pd.read_csv(RSNA / "oof_predictions.csv", dtype={"uid": str})
    return from_wide(wide, read_labels(RSNA / "train.csv"), "validation", missing="drop")


def test_bins_of_a_hand_worked_case():
    p = [0.1, 0.2, 0.3, 0.4, 0.8, 0.9]
    found = reliability.reliability_table(patients_of(p, [0, 1, 0, 0, 1, 1]), level="patient", bins=2)
    assert found[["lower", "upper"]].to_numpy().tolist() == [[0.1, 0.35], [0.35, 0.9]]
    assert found[["cases", "patients", "positives"]].to_numpy().tolist() == [[3, 3, 1], [3, 3, 2]]
    np.testing.assert_allclose(found["probability"], [0.2, 0.7])
    np.testing.assert_allclose(found["observed"], [1 / 3, 2 / 3])


@pytest.mark.parametrize("strategy", ["quantile", "uniform"])
@pytest.mark.parametrize("bins", [1, 5, 10, 17])
def test_bins_are_those_of_scikit_learn(table, strategy, bins):
    found = reliability.reliability_table(table, bins=bins, strategy=strategy)
    expected = calibration_curve(table["label"], table["probability"], n_bins=bins, strategy=strategy)
    filled = found[~found["undefined"]]
    np.testing.assert_allclose(filled["observed"], expected[0], atol=1e-12)
    np.testing.assert_allclose(filled["probability"], expected[1], atol=1e-12)
    assert found["cases"].sum() == len(table)


@needs_rsna
@pytest.mark.parametrize("level", ["all", "patient"])
def test_real_bins_and_scores_are_those_of_scikit_learn(real, level):
    rows = real if level == "all" else patient_level(real)
    y, p = rows["label"], rows["probability"]
    found = reliability.reliability_table(real, level=level, bins=12)
    expected = calibration_curve(y, p, n_bins=12, strategy="quantile")
    np.testing.assert_allclose(found["observed"], expected[0], atol=1e-12)
    np.testing.assert_allclose(found["probability"], expected[1], atol=1e-12)
    scores = reliability.calibration_scores(real, level=level, bins=12, resamples=200).set_index("score")
    assert scores.loc["brier", "value"] == pytest.approx(brier_score_loss(y, p), abs=1e-12)
    assert scores.loc["log_loss", "value"] == pytest.approx(log_loss(y, p), abs=1e-12)
    distance = (found["probability"] - found["observed"]).abs()
    ece = np.average(distance, weights=found["cases"])
    assert scores.loc["ece", "value"] == pytest.approx(ece, abs=1e-12)
    assert (scores["low"] < scores["value"]).all()
    assert (scores["value"] < scores["high"]).all()


def test_an_empty_bin_is_marked_and_has_no_figures():
    rows = patients_of([0.05, 0.1, 0.95], [0, 1, 1])
    found = reliability.reliability_table(rows, level="patient", bins=4, strategy="uniform")
    assert found["undefined"].tolist() == [False, True, True, False]
    assert found[found["undefined"]][["probability", "observed", "low", "high"]].isna().all(axis=None)
    assert found[~found["undefined"]].notna().all(axis=None)


def test_scores_that_tie_share_a_bin():
    found = reliability.reliability_table(patients_of([0.3] * 6, [0, 1] * 3), level="patient")
    assert found[["cases", "observed", "probability"]].to_numpy().tolist() == [[6, 0.5, pytest.approx(0.3)]]


def test_an_interval_of_single_cases_is_that_of_wilson():
    y = np.tile([1, 0, 0, 0], 10)
    found = reliability.reliability_table(patients_of([0.3] * 40, y), level="patient").iloc[0]
    cases = 40 - 1  # the variance of a sample has one degree of freedom less
    z = stats.norm.ppf(0.975)
    for end in ("low", "high"):  # where the score test of Wilson stands at z
        assert abs(found[end] - 0.25) / np.sqrt(found[end] * (1 - found[end]) / cases) == pytest.approx(z)


def test_a_bin_where_all_are_intact_counts_its_patients_not_its_cases():
    found = reliability.reliability_table(table_of(np.full((5, 7), 0.1), np.zeros((5, 7)))).iloc[0]
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


@pytest.mark.slow
def test_intervals_of_scores_keep_their_promise():
    rng, draws = np.random.default_rng(1), 100
    truth = {"bias": 0.1, "brier": np.mean([0.05 * 0.95, 0.2 * 0.8, 0.5 * 0.5]) + 0.1**2, "ece": 0.1}
    kept = dict.fromkeys(truth, 0)
    for draw in range(draws):
        table = clustered(rng, 150)
        table["probability"] += 0.1  # 0.15, 0.3, 0.6: each a bin of its own
        found = reliability.calibration_scores(table, bins=20, strategy="uniform", resamples=200, seed=draw)
        for row in found[found["score"].isin(truth)].itertuples():
            kept[row.score] += row.low <= truth[row.score] <= row.high
    assert {name: count for name, count in kept.items() if count < 0.9 * draws} == {}


def test_an_interval_of_ece_holds_the_value_where_the_mirror_ends_below_it():
    rng = np.random.default_rng(0)
    mirrored_below = 0
    for _ in range(20):
        p = rng.random(150)  # calibrated, so that nearly all of the ECE is chance
        rows = patients_of(p, (rng.random(150) < p).astype(int))
        ece = (
            reliability.calibration_scores(rows, level="patient", resamples=200).set_index("score").loc["ece"]
        )
        assert ece["low"] <= ece["value"] <= ece["high"]
        mirrored_below += ece["high"] == ece["value"]
    assert mirrored_below > 0


def test_intervals_of_single_cases_are_nearly_those_of_scipy_and_those_of_the_headline_numbers():
    rng = np.random.default_rng(2)
    p = rng.random(150)
    rows = patients_of(p, (rng.random(150) < p).astype(int))
    found = reliability.calibration_scores(rows, level="patient", resamples=5000).set_index("score")
    losses = {"brier": (p - rows["label"]) ** 2, "log_loss": reliability.log_losses(rows["label"], p)}
    same = bootstrap(rows.assign(vertebra="C1"), threshold=None, resamples=5000).set_index("metric")
    for name, loss in losses.items():
        drawn = stats.bootstrap((loss,), np.mean, n_resamples=5000, method="percentile", rng=0)
        expected = drawn.confidence_interval
        width = expected.high - expected.low
        for end in ("low", "high"):
            assert found.loc[name, end] == pytest.approx(getattr(expected, end), abs=0.1 * width)
            assert found.loc[name, end] == pytest.approx(same.loc[name, end], abs=1e-9)


def test_patients_that_are_drawn_bring_all_their_rows():
    rng = np.random.default_rng(4)
    uids = pd.Series(["1.1", "1.2", "1.1", "1.3"])
    sums = reliability.patient_sums(uids, np.array([[1.0, 2], [3, 4], [5, 6], [7, 8]]))
    assert sums.tolist() == [[6, 8], [3, 4], [7, 8]]
    many = rng.random((9, 2))
    drawn = resampled(np.column_stack([np.ones(9), many]), 4000, 0)
    assert (drawn[:, 0] == 9).all()
    np.testing.assert_allclose(drawn[:, 1:].mean(axis=0), many.sum(axis=0), rtol=0.02)


def test_same_seed_same_intervals(table):
    first, again, other = (reliability.calibration_scores(table, seed=seed) for seed in (5, 5, 6))
    pd.testing.assert_frame_equal(first, again)
    assert not first.equals(other)


@pytest.mark.parametrize("strategy", ["quantile", "uniform"])
def test_the_parts_of_the_brier_score_add_up(table, strategy):
    y, p = table["label"], table["probability"]
    parts = reliability.brier_decomposition(y, p, strategy=strategy)
    whole = parts["reliability"] - parts["resolution"] + parts["uncertainty"] + parts["within"]
    assert whole == pytest.approx(brier_score_loss(y, p), abs=1e-12)
    bins = reliability.reliability_table(table, strategy=strategy).dropna()
    rows = bins["cases"] / len(table)
    assert parts["reliability"] == pytest.approx((rows * (bins["probability"] - bins["observed"]) ** 2).sum())
    assert parts["resolution"] == pytest.approx((rows * (bins["observed"] - y.mean()) ** 2).sum())


def test_nothing_lies_within_bins_of_one_score_each():
    rng = np.random.default_rng(6)
    p = rng.choice([0.1, 0.4, 0.9], 300)
    parts = reliability.brier_decomposition(rng.random(300) < p, p, bins=20, strategy="uniform")
    assert parts["within"] == pytest.approx(0, abs=1e-12)


def test_log_losses_of_certain_mistakes_stay_finite():
    assert reliability.log_losses([1, 0], [0.25, 0.5]) == pytest.approx([np.log(4), np.log(2)])
    assert np.isfinite(reliability.log_losses([1, 0], [0.0, 1.0])).all()


@pytest.mark.parametrize("level", ["all", "C3"])
def test_patients_are_not_taken_for_vertebrae(level):
    with pytest.raises(ValueError, match=f"Level '{level}' is one of vertebrae.*its rows are patients"):
        reliability.scored_rows(patients_of([0.1], [0]), level)


def test_levels_take_their_rows(table):
    assert len(reliability.scored_rows(table, "all")) == 560
    assert (reliability.scored_rows(table, "C3")["vertebra"] == "C3").all()
    rows = reliability.scored_rows(table, "patient")
    pd.testing.assert_frame_equal(rows, patient_level(table))
    pd.testing.assert_frame_equal(reliability.scored_rows(rows, "patient"), rows)


def test_bad_tables_are_refused(table):
    patients = patients_of([0.1, 0.2], [0, 1])
    with pytest.raises(ValueError, match="Unknown level 'C8'"):
        reliability.scored_rows(patients, "C8")
    with pytest.raises(ValueError, match=r"lacks the column\(s\) 'label'"):
        reliability.scored_rows(patients.drop(columns="label"), "patient")
    with pytest.raises(ValueError, match=r"1 probabilities are missing or outside \[0, 1\]"):
        reliability.scored_rows(patients.assign(probability=[0.1, np.nan]), "patient")
    with pytest.raises(ValueError, match=r"more than once: '1\.1'"):
        reliability.scored_rows(patients.assign(**{UID: "1.1"}), "patient")
    with pytest.raises(ValueError, match="repeat a study and vertebra"):
        reliability.scored_rows(pd.concat([table, table[:1]]), "all")
    mixed = table.assign(split=np.where(table[UID] == "1.3", "test", "validation"))
    with pytest.raises(ValueError, match=r"splits 'validation', 'test'\. Pass the rows of one"):
        reliability.reliability_table(mixed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bins": 0}, "bins is a whole number from 1; found 0"),
        ({"bins": 2.5}, "found 2.5"),
        ({"strategy": "kmeans"}, "Unknown strategy 'kmeans'. Choose one of quantile, uniform"),
        ({"confidence": 95}, "confidence lies between 0 and 1; found 95"),
    ],
)
def test_bad_options_are_refused(table, options, message):
    for function in (reliability.reliability_table, reliability.calibration_scores):
        with pytest.raises(ValueError, match=message):
            function(table, **options)


def test_at_least_one_resample_is_asked_for(table):
    with pytest.raises(ValueError, match="resamples is a whole number from 1; found 0"):
        reliability.calibration_scores(table, resamples=0)
