import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna
from sklearn import metrics as sk
from test_metrics import table_of

from cspine_helpers.evaluation.cases import patient_level
from cspine_helpers.evaluation.competition import rsna_terms, rsna_weighted_log_loss
from cspine_helpers.evaluation.intervals import bootstrap
from cspine_helpers.labels import PATIENT, UID, VERTEBRAE, read_labels
from cspine_helpers.predictions import from_wide
from cspine_helpers.splits import split_patients


@pytest.fixture(scope="module")
def real_wide():
    return pd.read_csv(RSNA / "oof_predictions.csv", dtype={"uid": str})


@pytest.fixture(scope="module")
def real(real_wide):
    """As read from their seven vertebrae alone."""
    return from_wide(
        real_wide.drop(columns="Overall"), read_labels(RSNA / "train.csv"), "validation", missing="drop"
    )


def as_participants_scored(labels, probabilities):
    """The participants' public code in a line of numpy each: columns are the patient, C1 … C7."""
    weights = np.where(labels == 1, [14] + 7 * [2], [7] + 7 * [1])
    loss = -(labels * np.log(probabilities) + (1 - labels) * np.log(1 - probabilities))
    return np.mean((loss * weights).sum(axis=1) / weights.sum(axis=1))


@needs_rsna
def test_real_weighted_log_loss_agrees_with_scikit_learn(real):
    patients = patient_level(real)
    labels = np.concatenate([real["label"], patients["label"]])
    probabilities = np.concatenate([real["probability"], patients["probability"]])
    weights = np.repeat([1, 7], [len(real), len(patients)]) * (1 + labels)
    oracle = sk.log_loss(labels, probabilities, sample_weight=weights)
    assert rsna_weighted_log_loss(real) == pytest.approx(oracle, abs=1e-12)


def test_weighted_log_loss_of_a_hand_worked_study():
    labels = np.array([[1, 0, 0, 0, 0, 0, 0]])
    probabilities = np.array([[0.8, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]])
    table = table_of(probabilities, labels, ["1.1"])
    expected = -(2 * np.log(0.8) + 6 * np.log(0.9) + 14 * np.log(0.8)) / (2 + 6 + 14)
    assert rsna_weighted_log_loss(table) == pytest.approx(expected, abs=1e-12)
    expected += 14 / 22 * (np.log(0.8) - np.log(0.5))
    patient = pd.Series({"1.1": 0.5})
    assert rsna_weighted_log_loss(table, patient=patient) == pytest.approx(expected, abs=1e-12)


def test_per_patient_loss_weighs_patients_alike():
    labels = np.zeros((2, 7), int)
    labels[1] = 1
    probabilities = np.full((2, 7), 0.5)
    probabilities[1] = 0.9
    table = table_of(probabilities, labels)
    each = [-np.log(0.5), -np.log(0.9)]
    assert rsna_weighted_log_loss(table, per_patient=True) == pytest.approx(np.mean(each), abs=1e-12)
    pooled = np.average(each, weights=[14, 28])
    assert rsna_weighted_log_loss(table) == pytest.approx(pooled, abs=1e-12)


def test_weighted_log_loss_stays_finite_at_certain_mistakes():
    labels = np.eye(2, 7, dtype=int)
    assert np.isfinite(rsna_weighted_log_loss(table_of(1.0 - labels, labels)))


def test_weighted_log_loss_refuses_incomplete_studies_and_patients_by_name():
    table = table_of(np.full((2, 7), 0.5), np.eye(2, 7, dtype=int))
    with pytest.raises(ValueError, match=r"1 studies lack some of C1…C7.*'1\.2'"):
        rsna_weighted_log_loss(table[:-1])
    with pytest.raises(ValueError, match=r"1 studies have no patient probability: '1\.2'"):
        rsna_weighted_log_loss(table, patient=pd.Series({"1.1": 0.5}))


def test_per_patient_loss_is_that_of_the_participants_code():
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, 2, (40, 7)), rng.random((40, 7))
    studies = [f"1.{i}" for i in range(40)]
    overall = pd.Series(rng.random(40), index=studies)
    expected = as_participants_scored(
        np.column_stack([labels.max(axis=1), labels]), np.column_stack([overall, probabilities])
    )
    table = table_of(probabilities, labels, studies).sample(frac=1, random_state=0)
    found = rsna_weighted_log_loss(table, patient=overall, per_patient=True)
    assert found == pytest.approx(expected, abs=1e-12)


@needs_rsna
def test_real_per_patient_loss_is_that_of_the_participants_code(real, real_wide):
    truth = read_labels(RSNA / "train.csv").set_index(UID)
    wide = real_wide.set_index("uid")
    columns = ["patient_overall", *VERTEBRAE]
    expected = as_participants_scored(
        truth.loc[wide.index, columns].to_numpy(), wide[["Overall", *VERTEBRAE]].clip(1e-15, 1 - 1e-15)
    )
    found = rsna_weighted_log_loss(real, patient=wide["Overall"], per_patient=True)
    assert found == pytest.approx(expected, abs=1e-12)


def test_terms_keep_the_order_of_the_studies():
    table = table_of(np.full((2, 7), 0.5), np.zeros((2, 7), int), ["1.9", "1.2"])
    terms = rsna_terms(table)
    assert terms.index.tolist() == ["1.9", "1.2"]
    assert terms["weight"].tolist() == [14, 14]


def test_a_vertebra_that_stands_there_twice_is_refused():
    table = table_of(np.full((2, 7), 0.5), np.zeros((2, 7), int))
    with pytest.raises(ValueError, match=r"1 studies hold a vertebra twice: '1\.1'"):
        rsna_terms(pd.concat([table, table[:1]]))


@needs_rsna
def test_real_predictions_are_judged_by_the_patient_score_that_their_file_holds(real_wide):
    labels = read_labels(RSNA / "train.csv")
    table = from_wide(real_wide, labels, split_patients(labels, seed=0), missing="drop")
    validation = table[table["split"] == "validation"]
    vertebrae = validation[validation["vertebra"] != PATIENT]
    assert validation[UID].nunique() == 402
    assert rsna_weighted_log_loss(vertebrae) == pytest.approx(0.632, abs=0.0005)
    found = bootstrap(validation, threshold=None).set_index("metric").loc["rsna_loss"]
    assert found[["value", "low", "high"]].round(3).tolist() == [0.493, 0.462, 0.525]


def test_the_models_own_patient_score_enters_the_loss_where_the_table_has_it():
    labels, probabilities = np.eye(2, 7, dtype=int), np.full((2, 7), 0.5)
    table = table_of(probabilities, labels)
    own = pd.DataFrame({UID: ["1.1", "1.2"], "vertebra": PATIENT, "split": table["split"][0], "label": 1})
    whole = pd.concat([table, own.assign(probability=[0.9, 0.8])], ignore_index=True)
    of_vertebrae = 8 * np.log(0.5)  # six intact of weight 1, one fractured of weight 2
    expected = -(2 * of_vertebrae + 14 * np.log(0.9) + 14 * np.log(0.8)) / (2 * 22)
    assert rsna_weighted_log_loss(whole) == pytest.approx(expected, abs=1e-12)
    assert rsna_weighted_log_loss(table) == pytest.approx(-np.log(0.5), abs=1e-12)
    with pytest.raises(ValueError, match=r"1 studies lack some of C1…C7.*'1\.1'"):
        rsna_weighted_log_loss(whole[7:])
