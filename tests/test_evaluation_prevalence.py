import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from cspine_helpers.evaluation import clinical_utility as prevalence
from cspine_helpers.evaluation.cases import patient_level
from cspine_helpers.evaluation.resampling import patient_weights
from cspine_helpers.labels import UID, read_labels
from cspine_helpers.metrics import confusion, rates

RATES = st.floats(0.01, 0.99)


@pytest.fixture
def patients():
    rng = np.random.default_rng(0)
    label = (rng.random(150) < 0.4).astype(int)
    probability = np.clip(rng.normal(0.3 + 0.4 * label, 0.2), 0, 1)
    uids = [f"1.{n}" for n in range(150)]
    return pd.DataFrame({UID: uids, "split": "test", "label": label, "probability": probability})


def test_a_hand_worked_restatement():
    # odds 1 : 1 where half are fractured; 1 : 9 where a tenth are
    assert prevalence.restate([0.5, 0.9], was=0.5, now=0.1) == pytest.approx([0.1, 0.5])
    assert prevalence.restate([0.0, 1.0], was=0.5, now=0.1).tolist() == [0, 1]


@given(st.floats(0, 1), RATES, RATES)
def test_restating_there_and_back_changes_nothing(p, was, now):
    there = prevalence.restate([p], was=was, now=now)
    assert prevalence.restate(there, was=now, now=was)[0] == pytest.approx(p, abs=1e-9)


def test_restated_probabilities_are_calibrated_where_fractures_are_rare():
    rng = np.random.default_rng(1)
    score = rng.choice([0.1, 0.4, 0.8], 400_000)
    label = rng.random(400_000) < score
    kept = ~label | (rng.random(400_000) < 0.1)  # nine of ten fractured cases stay away
    now = label[kept].mean()
    for value in np.unique(score):
        restated = prevalence.restate([value], was=label.mean(), now=now)[0]
        assert label[kept & (score == value)].mean() == pytest.approx(restated, abs=0.004)


@given(RATES, RATES, st.lists(RATES, min_size=1, max_size=4))
def test_predictive_values_are_shares_of_a_thousand_counted_cases(sensitivity, specificity, shares):
    found = prevalence.predictive_values(sensitivity, specificity, shares)
    for row, share in zip(found.itertuples(), shares, strict=True):
        tp, fn = 1000 * share * sensitivity, 1000 * share * (1 - sensitivity)
        tn, fp = 1000 * (1 - share) * specificity, 1000 * (1 - share) * (1 - specificity)
        assert row.ppv == pytest.approx(tp / (tp + fp))
        assert row.npv == pytest.approx(tn / (tn + fn))
        assert row.alarms == pytest.approx((tp + fp) / 1000)


def test_a_textbook_case():
    found = prevalence.predictive_values(0.9, 0.8, [0.476, 0.07]).round(3)
    assert found["ppv"].tolist() == [0.803, 0.253]
    assert found["npv"].tolist() == [0.898, 0.991]


def test_at_its_own_prevalence_a_table_has_its_own_precision(patients):
    own = patients["label"].mean()
    found = prevalence.predictive_curve(patients, 0.5, [own, 0.07]).iloc[0]
    row = rates(confusion(patients["label"], patients["probability"], 0.5)).iloc[0]
    assert found["ppv"] == pytest.approx(row["precision"])
    assert found["npv"] == pytest.approx(row["tn"] / (row["tn"] + row["fn"]))
    assert found["ppv_low"] < found["ppv"] < found["ppv_high"]
    assert found["undefined"] == 0


@pytest.mark.slow
def test_intervals_of_predictive_values_are_those_of_a_slow_bootstrap(patients):
    rng = np.random.default_rng(5)
    drawn = []
    for _ in range(1000):
        again = patients.iloc[rng.integers(len(patients), size=len(patients))]
        row = rates(confusion(again["label"], again["probability"], 0.5)).iloc[0]
        drawn.append(prevalence.predictive_values(row["recall"], row["specificity"], 0.07).loc[0])
    found = prevalence.predictive_curve(patients, 0.5, 0.07, resamples=5000).iloc[0]
    for name in ("ppv", "npv"):
        low, high = np.quantile([row[name] for row in drawn], [0.025, 0.975])
        assert found[f"{name}_low"] == pytest.approx(low, abs=0.15 * (high - low))
        assert found[f"{name}_high"] == pytest.approx(high, abs=0.15 * (high - low))


def test_no_false_alarm_among_few_patients_is_no_proof_of_none_to_come(patients):
    label = patients["label"].to_numpy()
    found = prevalence.predictive_curve(patients.assign(probability=0.2 + 0.6 * label), 0.5, 0.07).iloc[0]
    assert found["ppv"] == found["ppv_high"] == found["npv"] == found["npv_high"] == 1
    sensitivity, specificity = (
        binomtest(int(n), int(n)).proportion_ci(method="wilson").low for n in (label.sum(), (1 - label).sum())
    )
    assert found["ppv_low"] == pytest.approx(prevalence.predictive_values(1, specificity, 0.07)["ppv"][0])
    assert found["npv_low"] == pytest.approx(prevalence.predictive_values(sensitivity, 1, 0.07)["npv"][0])


def test_resamples_without_a_class_are_left_out_and_counted(patients):
    few = patients.assign(label=0)
    few.loc[[3, 4], ["label", "probability"]] = [1, 0.9]
    found = prevalence.predictive_curve(few, 0.5, 0.07, resamples=2000)
    assert 0.10 < found["undefined"].iloc[0] / 2000 < 0.17  # e^-2, that neither is drawn
    assert found.notna().all(axis=None)


@pytest.mark.parametrize("threshold", [0.0, 1.1])
def test_thresholds_that_part_nothing_are_refused(patients, threshold):
    with pytest.raises(ValueError, match=r"(every|no) case"):
        prevalence.predictive_curve(patients, threshold, 0.07)


def test_undefined_input_is_refused(patients):
    with pytest.raises(ValueError, match=r"between 0 and 1; found 7\.0\. Give a share, 0\.07"):
        prevalence.predictive_values(0.9, 0.9, [0.1, 7])
    with pytest.raises(ValueError, match=r"found 0\.0"):
        prevalence.restate([0.5], was=0, now=0.5)
    with pytest.raises(ValueError, match=r"found nan"):
        prevalence.restate([0.5], was=0.5, now=np.nan)
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        prevalence.restate([1.5], was=0.5, now=0.5)
    with pytest.raises(ValueError, match=r"found sensitivity 1\.2"):
        prevalence.predictive_values(1.2, 0.9, 0.1)
    with pytest.raises(ValueError, match="All 150 labels are 1"):
        prevalence.predictive_curve(patients.assign(label=1), 0.5, 0.1)
    with pytest.raises(ValueError, match="is one of vertebrae"):
        prevalence.predictive_curve(patients, 0.5, 0.1, level="all")
    lone = patients[:2].assign(label=[0, 1], probability=[0.1, 0.9])
    with pytest.raises(ValueError, match="None of 1 resamples"):
        prevalence.predictive_curve(lone, 0.5, 0.1, resamples=1, seed=_seed_without_a_class())


def _seed_without_a_class():
    return next(seed for seed in range(100) if 0 in next(patient_weights(2, 1, seed)))


@needs_rsna
def test_the_competition_prevalence_is_that_of_the_real_labels():
    labels = read_labels(RSNA / "train.csv")
    assert labels["patient_overall"].mean() == pytest.approx(prevalence.COMPETITION_PREVALENCE, abs=5e-4)


def test_levels_have_their_own_curves(patients):
    rows = pd.concat([patients.assign(vertebra=name) for name in ("C1", "C2")], ignore_index=True)
    rows.loc[rows["vertebra"] == "C2", "probability"] /= 2
    found = prevalence.predictive_curve(rows, 0.5, 0.07)
    expected = prevalence.predictive_curve(patient_level(rows), 0.5, 0.07)
    pd.testing.assert_frame_equal(found, expected)
    assert prevalence.predictive_curve(rows, 0.5, 0.07, level="all").loc[0, "ppv"] != found.loc[0, "ppv"]
