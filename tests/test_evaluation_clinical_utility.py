import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from simulated import patients_of

from cspine_helpers.evaluation import calibration
from cspine_helpers.evaluation import clinical_utility as utility
from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.evaluation.clinical_utility import restate
from cspine_helpers.evaluation.resampling import patient_weights
from cspine_helpers.labels import UID, read_labels
from cspine_helpers.metrics import confusion, rates
from cspine_helpers.predictions import from_wide

LABELS = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
PROBABILITIES = [0.9, 0.7, 0.5, 0.1, 0.6, 0.3, 0.3, 0.2, 0.1, 0.0]


def net_benefit(labels, probabilities, thresholds=utility.THRESHOLDS):
    """The curve alone, without its intervals."""
    found = utility.decision_curve(patients_of(probabilities, labels), thresholds=thresholds, resamples=1)
    return found[["threshold", "net_benefit", "treat_all", "treat_none"]]


@pytest.fixture(scope="module")
def patients():
    rng = np.random.default_rng(0)
    p = rng.beta(1, 1.5, 200)
    return patients_of(p, rng.random(200) < p)


def test_a_hand_worked_case():
    found = net_benefit(LABELS, PROBABILITIES, [0.5, 0.2])
    # at 0.5: 3 hits, 1 false alarm of weight 1; at 0.2: 3 hits, 4 false alarms of weight 1/4
    assert found["net_benefit"].tolist() == pytest.approx([0.2, 0.2])
    assert found["treat_all"].tolist() == pytest.approx([0.4 - 0.6, 0.4 - 0.6 / 4])
    assert found["treat_none"].tolist() == [0, 0]


def test_counts_are_those_of_metrics(patients):
    found = net_benefit(patients.label, patients.probability)
    for row in found[::10].itertuples():
        counts = confusion(patients.label, patients.probability, row.threshold).iloc[0]
        expected = (counts["tp"] - counts["fp"] * row.threshold / (1 - row.threshold)) / 200
        assert row.net_benefit == pytest.approx(expected, abs=1e-12)
    assert list(found["threshold"]) == list(utility.THRESHOLDS)


def test_at_threshold_0_everybody_is_treated(patients):
    found = net_benefit(patients.label, patients.probability, 0).iloc[0]
    assert found["net_benefit"] == found["treat_all"] == pytest.approx(patients.label.mean())


def test_treating_all_is_worth_nothing_where_the_threshold_is_the_prevalence(patients):
    share = patients.label.mean()
    assert net_benefit(patients.label, patients.probability, share)["treat_all"][0] == (
        pytest.approx(0, abs=1e-12)
    )


def test_perfect_scores_are_worth_the_prevalence_at_any_threshold():
    found = net_benefit([1, 1, 0, 0, 0], [1.0, 1, 0, 0, 0], [0.01, 0.5, 0.99])
    assert found["net_benefit"].tolist() == pytest.approx([0.4] * 3)


def test_the_curve_is_the_net_benefit_with_an_interval_around(patients):
    found = utility.decision_curve(patients, thresholds=[0.1, 0.3, 0.5])
    expected = net_benefit(patients.label, patients.probability, [0.1, 0.3, 0.5])
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
    options = {"thresholds": [0.3], "prevalence": prevalence, "resamples": 5000}
    found = utility.decision_curve(Cases.of(table), **options).iloc[0]
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
        rows = patients_of(p, rng.random(150) < p)
        found = utility.decision_curve(rows, thresholds=t, resamples=300, seed=seed)
        kept += (found["low"] <= truth) & (truth <= found["high"])
    assert (kept / draws > 0.91).all()


def test_another_prevalence_is_the_same_as_a_cohort_that_has_it():
    rng = np.random.default_rng(3)
    p = rng.choice([0.1, 0.3, 0.6, 0.9], 4000)
    rows = patients_of(p, rng.random(4000) < p)
    rare = np.repeat(np.arange(4000), np.where(rows.label == 1, 1, 5))  # five times as many intact ones
    share = rows.label[rare].mean()
    restated = restate(p[rare], was=rows.prevalence, now=share)
    found = utility.decision_curve(rows, prevalence=share, resamples=10)
    expected = net_benefit(rows.label[rare], restated)
    np.testing.assert_allclose(found["net_benefit"], expected["net_benefit"], atol=1e-12)
    np.testing.assert_allclose(found["treat_all"], expected["treat_all"], atol=1e-12)


def test_resamples_without_a_class_have_no_net_benefit_and_are_counted():
    rows = patients_of([0.9, 0.4] + [0.1] * 30, [1, 1] + [0] * 30)
    found = utility.decision_curve(rows, prevalence=0.07, resamples=2000)
    assert 0.09 < found["undefined"].iloc[0] / 2000 < 0.17  # e^-2, that neither is drawn
    assert found.notna().all(axis=None)
    assert (utility.decision_curve(rows)["undefined"] == 0).all()


@pytest.mark.parametrize("thresholds", [[1.0], [-0.1], [np.nan], []])
def test_thresholds_outside_are_refused(patients, thresholds):
    with pytest.raises(ValueError, match=r"are in \[0, 1\)"):
        utility.decision_curve(patients, thresholds=thresholds)


def test_net_benefit_of_undefined_input_is_refused(patients):
    with pytest.raises(ValueError, match="All 200 labels are 0"):
        utility.decision_curve(patients_of(patients.probability, np.zeros(200)))
    with pytest.raises(ValueError, match="All 2 labels are 1"):
        net_benefit([1, 1], [0.2, 0.3])
    mixed = pd.concat([patients.table(), patients.table().assign(split="x", **{UID: "2.1"})[:1]])
    with pytest.raises(ValueError, match="mix the splits 'validation', 'x'"):
        utility.decision_curve(Cases.of(mixed.assign(vertebra="C1")))
    with pytest.raises(ValueError, match="A prevalence lies between 0 and 1"):
        utility.decision_curve(patients, prevalence=1.0)
    with pytest.raises(ValueError, match="confidence lies between 0 and 1"):
        utility.decision_curve(patients, confidence=1.0)
    lone = patients_of([0.9, 0.1], [1, 0])
    seed = next(seed for seed in range(100) if 0 in next(patient_weights(2, 1, seed)))
    with pytest.raises(ValueError, match="None of 1 resamples"):
        utility.decision_curve(lone, prevalence=0.1, resamples=1, seed=seed)


@needs_rsna
def test_calibration_makes_the_real_model_worth_more_at_low_thresholds():
    wide = pd.read_csv(RSNA / "oof_predictions.csv", dtype={"uid": str}).drop(columns="Overall")
    labels = read_labels(RSNA / "train.csv")
    dealt = np.random.default_rng(0).permutation(len(labels)) % 2
    split = labels[[UID]].assign(split=np.where(dealt == 0, "validation", "test"))
    table = from_wide(wide, labels, split, missing="drop")
    validation, before = (Cases.of(table, split=name, level="patient") for name in ("validation", "test"))
    after = calibration.apply(calibration.fit_calibrator(validation, kind="platt"), before)
    t = np.arange(20, 61) / 100
    raw, mended = (utility.decision_curve(rows, thresholds=t, resamples=200) for rows in (before, after))
    assert (mended["net_benefit"] - raw["net_benefit"]).mean() > 0
    # the raw one is worse than treating all, as its probabilities are too low
    assert raw["gain"].min() < -0.01 < mended["gain"].min()


RATES = st.floats(0.01, 0.99)


@pytest.fixture(scope="module")
def screened():
    rng = np.random.default_rng(0)
    label = (rng.random(150) < 0.4).astype(int)
    probability = np.clip(rng.normal(0.3 + 0.4 * label, 0.2), 0, 1)
    return patients_of(probability, label)


def test_a_hand_worked_restatement():
    # odds 1 : 1 where half are fractured; 1 : 9 where a tenth are
    assert utility.restate([0.5, 0.9], was=0.5, now=0.1) == pytest.approx([0.1, 0.5])
    assert utility.restate([0.0, 1.0], was=0.5, now=0.1).tolist() == [0, 1]


@given(st.floats(0, 1), RATES, RATES)
def test_restating_there_and_back_changes_nothing(p, was, now):
    there = utility.restate([p], was=was, now=now)
    assert utility.restate(there, was=now, now=was)[0] == pytest.approx(p, abs=1e-9)


def test_restated_probabilities_are_calibrated_where_fractures_are_rare():
    rng = np.random.default_rng(1)
    score = rng.choice([0.1, 0.4, 0.8], 400_000)
    label = rng.random(400_000) < score
    kept = ~label | (rng.random(400_000) < 0.1)  # nine of ten fractured cases stay away
    now = label[kept].mean()
    for value in np.unique(score):
        restated = utility.restate([value], was=label.mean(), now=now)[0]
        assert label[kept & (score == value)].mean() == pytest.approx(restated, abs=0.004)


@given(RATES, RATES, st.lists(RATES, min_size=1, max_size=4))
def test_predictive_values_are_shares_of_a_thousand_counted_cases(sensitivity, specificity, shares):
    found = utility.predictive_values(sensitivity, specificity, shares)
    for row, share in zip(found.itertuples(), shares, strict=True):
        tp, fn = 1000 * share * sensitivity, 1000 * share * (1 - sensitivity)
        tn, fp = 1000 * (1 - share) * specificity, 1000 * (1 - share) * (1 - specificity)
        assert row.ppv == pytest.approx(tp / (tp + fp))
        assert row.npv == pytest.approx(tn / (tn + fn))
        assert row.alarms == pytest.approx((tp + fp) / 1000)


def test_a_textbook_case():
    found = utility.predictive_values(0.9, 0.8, [0.476, 0.07]).round(3)
    assert found["ppv"].tolist() == [0.803, 0.253]
    assert found["npv"].tolist() == [0.898, 0.991]


def test_at_its_own_prevalence_a_table_has_its_own_precision(screened):
    own = screened.prevalence
    found = utility.predictive_curve(screened, 0.5, [own, 0.07]).iloc[0]
    row = rates(confusion(screened.label, screened.probability, 0.5)).iloc[0]
    assert found["ppv"] == pytest.approx(row["precision"])
    assert found["npv"] == pytest.approx(row["tn"] / (row["tn"] + row["fn"]))
    assert found["ppv_low"] < found["ppv"] < found["ppv_high"]
    assert found["undefined"] == 0


@pytest.mark.slow
def test_intervals_of_predictive_values_are_those_of_a_slow_bootstrap(screened):
    rng = np.random.default_rng(5)
    drawn = []
    for _ in range(1000):
        again = rng.integers(len(screened), size=len(screened))
        row = rates(confusion(screened.label[again], screened.probability[again], 0.5)).iloc[0]
        drawn.append(utility.predictive_values(row["recall"], row["specificity"], 0.07).loc[0])
    found = utility.predictive_curve(screened, 0.5, 0.07, resamples=5000).iloc[0]
    for name in ("ppv", "npv"):
        low, high = np.quantile([row[name] for row in drawn], [0.025, 0.975])
        assert found[f"{name}_low"] == pytest.approx(low, abs=0.15 * (high - low))
        assert found[f"{name}_high"] == pytest.approx(high, abs=0.15 * (high - low))


def test_no_false_alarm_among_few_patients_is_no_proof_of_none_to_come(screened):
    label = screened.label
    found = utility.predictive_curve(screened.with_probability(0.2 + 0.6 * label), 0.5, 0.07).iloc[0]
    assert found["ppv"] == found["ppv_high"] == found["npv"] == found["npv_high"] == 1
    sensitivity, specificity = (
        binomtest(int(n), int(n)).proportion_ci(method="wilson").low for n in (label.sum(), (1 - label).sum())
    )
    assert found["ppv_low"] == pytest.approx(utility.predictive_values(1, specificity, 0.07)["ppv"][0])
    assert found["npv_low"] == pytest.approx(utility.predictive_values(sensitivity, 1, 0.07)["npv"][0])


def test_resamples_without_a_class_are_left_out_and_counted(screened):
    label, p = np.zeros(150, int), screened.probability.copy()
    label[[3, 4]], p[[3, 4]] = 1, 0.9
    few = patients_of(p, label)
    found = utility.predictive_curve(few, 0.5, 0.07, resamples=2000)
    assert 0.10 < found["undefined"].iloc[0] / 2000 < 0.17  # e^-2, that neither is drawn
    assert found.notna().all(axis=None)


@pytest.mark.parametrize("threshold", [0.0, 1.1])
def test_thresholds_that_part_nothing_are_refused(screened, threshold):
    with pytest.raises(ValueError, match=r"(every|no) case"):
        utility.predictive_curve(screened, threshold, 0.07)


def test_predictive_values_of_undefined_input_are_refused(screened):
    with pytest.raises(ValueError, match=r"between 0 and 1; found 7\.0\. Give a share, 0\.07"):
        utility.predictive_values(0.9, 0.9, [0.1, 7])
    with pytest.raises(ValueError, match=r"found 0\.0"):
        utility.restate([0.5], was=0, now=0.5)
    with pytest.raises(ValueError, match=r"found nan"):
        utility.restate([0.5], was=0.5, now=np.nan)
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        utility.restate([1.5], was=0.5, now=0.5)
    with pytest.raises(ValueError, match=r"found sensitivity 1\.2"):
        utility.predictive_values(1.2, 0.9, 0.1)
    with pytest.raises(ValueError, match="All 150 labels are 1"):
        utility.predictive_curve(patients_of(screened.probability, np.ones(150)), 0.5, 0.1)
    lone = patients_of([0.1, 0.9], [0, 1])
    with pytest.raises(ValueError, match="None of 1 resamples"):
        utility.predictive_curve(lone, 0.5, 0.1, resamples=1, seed=_seed_without_a_class())


def _seed_without_a_class():
    return next(seed for seed in range(100) if 0 in next(patient_weights(2, 1, seed)))


@needs_rsna
def test_the_competition_prevalence_is_that_of_the_real_labels():
    labels = read_labels(RSNA / "train.csv")
    assert labels["patient_overall"].mean() == pytest.approx(utility.COMPETITION_PREVALENCE, abs=5e-4)
