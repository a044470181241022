import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna

from cspine_helpers.evaluation import calibration
from cspine_helpers.evaluation import clinical_utility as benefit
from cspine_helpers.evaluation.cases import patient_level
from cspine_helpers.evaluation.clinical_utility import restate
from cspine_helpers.evaluation.resampling import patient_weights
from cspine_helpers.labels import UID, read_labels
from cspine_helpers.metrics import confusion
from cspine_helpers.predictions import from_wide

LABELS = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
PROBABILITIES = [0.9, 0.7, 0.5, 0.1, 0.6, 0.3, 0.3, 0.2, 0.1, 0.0]


def patients_of(label, probability):
    uids = [f"1.{n}" for n in range(len(label))]
    return pd.DataFrame({UID: uids, "split": "test", "label": label, "probability": probability})


@pytest.fixture
def patients():
    rng = np.random.default_rng(0)
    p = rng.beta(1, 1.5, 200)
    return patients_of((rng.random(200) < p).astype(int), p)


def test_a_hand_worked_case():
    found = benefit.net_benefit(LABELS, PROBABILITIES, [0.5, 0.2])
    # at 0.5: 3 hits, 1 false alarm of weight 1; at 0.2: 3 hits, 4 false alarms of weight 1/4
    assert found["net_benefit"].tolist() == pytest.approx([0.2, 0.2])
    assert found["treat_all"].tolist() == pytest.approx([0.4 - 0.6, 0.4 - 0.6 / 4])
    assert found["treat_none"].tolist() == [0, 0]


def test_counts_are_those_of_metrics(patients):
    found = benefit.net_benefit(patients["label"], patients["probability"])
    for row in found.itertuples():
        counts = confusion(patients["label"], patients["probability"], row.threshold).iloc[0]
        expected = (counts["tp"] - counts["fp"] * row.threshold / (1 - row.threshold)) / 200
        assert row.net_benefit == pytest.approx(expected, abs=1e-12)
    assert list(found["threshold"]) == list(benefit.THRESHOLDS)


def test_at_threshold_0_everybody_is_treated(patients):
    found = benefit.net_benefit(patients["label"], patients["probability"], 0).iloc[0]
    assert found["net_benefit"] == found["treat_all"] == pytest.approx(patients["label"].mean())


def test_treating_all_is_worth_nothing_where_the_threshold_is_the_prevalence(patients):
    share = patients["label"].mean()
    assert benefit.net_benefit(patients["label"], patients["probability"], share)["treat_all"][0] == (
        pytest.approx(0, abs=1e-12)
    )


def test_perfect_scores_are_worth_the_prevalence_at_any_threshold():
    found = benefit.net_benefit([1, 1, 0, 0, 0], [1.0, 1, 0, 0, 0], [0.01, 0.5, 0.99])
    assert found["net_benefit"].tolist() == pytest.approx([0.4] * 3)


def test_the_curve_is_the_net_benefit_with_an_interval_around(patients):
    found = benefit.decision_curve(patients, thresholds=[0.1, 0.3, 0.5])
    expected = benefit.net_benefit(patients["label"], patients["probability"], [0.1, 0.3, 0.5])
    pd.testing.assert_frame_equal(found[list(expected)], expected)
    assert (found["low"] < found["net_benefit"]).all()
    assert (found["net_benefit"] < found["high"]).all()
    gain = expected["net_benefit"] - expected["treat_all"].clip(lower=0)
    np.testing.assert_allclose(found["gain"], gain, atol=1e-15)
    assert (found["undefined"] == 0).all()


@pytest.mark.parametrize("prevalence", [None, 0.07])
def test_intervals_are_those_of_a_slow_bootstrap_of_patients(prevalence):
    rng = np.random.default_rng(1)
    label = np.repeat((rng.random(60) < 0.4).astype(int), 2)
    p = np.clip(rng.normal(0.35 + 0.3 * label, 0.2), 0, 1)
    uids = np.repeat([f"1.{n}" for n in range(60)], 2)
    vertebra = np.tile(["C1", "C2"], 60)
    table = pd.DataFrame({UID: uids, "vertebra": vertebra, "split": "test", "label": label, "probability": p})
    options = {"level": "all", "thresholds": [0.3], "prevalence": prevalence}
    found = benefit.decision_curve(table, **options, resamples=5000).iloc[0]
    if prevalence is not None:
        p = restate(p, was=label.mean(), now=prevalence)
    drawn = []
    for _ in range(3000):
        rows = (2 * rng.integers(60, size=60)[:, None] + [0, 1]).ravel()  # both vertebrae of a patient
        y, called = label[rows] == 1, p[rows] >= 0.3
        share = y.mean() if prevalence is None else prevalence
        value = called[y].mean() * share - called[~y].mean() * (1 - share) * 3 / 7
        drawn.append([value, value - max(0, share - (1 - share) * 3 / 7)])
    for place, name in enumerate(("", "gain_")):
        low, high = np.quantile(np.array(drawn)[:, place], [0.025, 0.975])
        assert found[f"{name}low"] == pytest.approx(low, abs=0.1 * (high - low))
        assert found[f"{name}high"] == pytest.approx(high, abs=0.1 * (high - low))


@pytest.mark.slow
def test_intervals_keep_their_promise():
    rng, t, draws = np.random.default_rng(2), np.array([0.2, 0.5]), 300
    # scores uniform and calibrated: hits ∫ p dp, false alarms ∫ (1 − p) dp, from t to 1
    truth = (1 - t**2) / 2 - (1 - t) ** 2 / 2 * t / (1 - t)
    kept = np.zeros(2)
    for seed in range(draws):
        p = rng.random(150)
        rows = patients_of((rng.random(150) < p).astype(int), p)
        found = benefit.decision_curve(rows, thresholds=t, resamples=300, seed=seed)
        kept += (found["low"] <= truth) & (truth <= found["high"])
    assert (kept / draws > 0.91).all()


def test_another_prevalence_is_the_same_as_a_cohort_that_has_it():
    rng = np.random.default_rng(3)
    p = rng.choice([0.1, 0.3, 0.6, 0.9], 4000)
    rows = patients_of((rng.random(4000) < p).astype(int), p)
    positives, negatives = rows[rows["label"] == 1], rows[rows["label"] == 0]
    rare = pd.concat([positives, *[negatives] * 5], ignore_index=True)  # five times as many intact ones
    share = rare["label"].mean()
    restated = restate(rare["probability"], was=rows["label"].mean(), now=share)
    found = benefit.decision_curve(rows, prevalence=share, resamples=10)
    expected = benefit.net_benefit(rare["label"], restated)
    np.testing.assert_allclose(found["net_benefit"], expected["net_benefit"], atol=1e-12)
    np.testing.assert_allclose(found["treat_all"], expected["treat_all"], atol=1e-12)


def test_resamples_without_a_class_are_left_out_and_counted():
    rows = patients_of([1, 1] + [0] * 30, [0.9, 0.4] + [0.1] * 30)
    found = benefit.decision_curve(rows, prevalence=0.07, resamples=2000)
    assert 0.09 < found["undefined"].iloc[0] / 2000 < 0.17  # e^-2, that neither is drawn
    assert found.notna().all(axis=None)
    assert (benefit.decision_curve(rows)["undefined"] == 0).all()


@pytest.mark.parametrize("thresholds", [[1.0], [-0.1], [np.nan], []])
def test_thresholds_outside_are_refused(patients, thresholds):
    with pytest.raises(ValueError, match=r"lie in \[0, 1\)"):
        benefit.decision_curve(patients, thresholds=thresholds)


def test_undefined_input_is_refused(patients):
    with pytest.raises(ValueError, match="All 200 labels are 0"):
        benefit.decision_curve(patients.assign(label=0))
    with pytest.raises(ValueError, match="All 2 labels are 1"):
        benefit.net_benefit([1, 1], [0.2, 0.3])
    with pytest.raises(ValueError, match="is one of vertebrae"):
        benefit.decision_curve(patients, level="all")
    with pytest.raises(ValueError, match="A prevalence lies between 0 and 1"):
        benefit.decision_curve(patients, prevalence=1.0)
    with pytest.raises(ValueError, match="confidence lies between 0 and 1"):
        benefit.decision_curve(patients, confidence=1.0)
    lone = patients_of([1, 0], [0.9, 0.1])
    seed = next(seed for seed in range(100) if 0 in next(patient_weights(2, 1, seed)))
    with pytest.raises(ValueError, match="None of 1 resamples"):
        benefit.decision_curve(lone, prevalence=0.1, resamples=1, seed=seed)


@needs_rsna
def test_calibration_makes_the_real_model_worth_more_at_low_thresholds():
    wide = pd.read_csv(RSNA / "oof_predictions.csv", dtype={"uid": str}).drop(columns="Overall")
    labels = read_labels(RSNA / "train.csv")
    dealt = np.random.default_rng(0).permutation(len(labels)) % 2
    split = labels[[UID]].assign(split=np.where(dealt == 0, "validation", "test"))
    table = from_wide(wide, labels, split, missing="drop")
    before = table[table["split"] == "test"]
    fit = calibration.fit_calibrator(table[table["split"] == "validation"], kind="platt", level="patient")
    after = calibration.apply(fit, before)
    t = np.arange(20, 61) / 100
    raw, mended = (benefit.decision_curve(rows, thresholds=t, resamples=200) for rows in (before, after))
    assert (mended["net_benefit"] - raw["net_benefit"]).mean() > 0
    # the raw one is worse than treating all, as its probabilities are too low
    assert raw["gain"].min() < -0.01 < mended["gain"].min()
    assert len(patient_level(before)) == len(after)
