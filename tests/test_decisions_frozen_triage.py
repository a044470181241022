import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
from test_evaluation_cases import toy

from cspine_helpers.decisions import frozen_triage as room
from cspine_helpers.decisions.frozen_triage import freeze_triage, read_triage, triage_on_test
from cspine_helpers.decisions.guarantees import RecallTarget, guarantee_on_validation
from cspine_helpers.decisions.test_split import evaluate_on_test, freeze, read_decision, read_openings
from cspine_helpers.decisions.thresholds import Rule, choose_decision
from cspine_helpers.decisions.triage import Triage, evaluate_triage, patient_answers
from cspine_helpers.evaluation.cases import Aggregation, Cases
from cspine_helpers.files.records import write_sealed
from cspine_helpers.labels import PATIENT, UID
from cspine_helpers.predictions import predictions_sha256

WHOLE = pd.concat([toy(60), toy(30, seed=7, split="test")], ignore_index=True)
MAX = Aggregation("max")
DECISIONS = [choose_decision(WHOLE, Rule("max_f1", level=level)) for level in ("vertebra", "patient")]
PROMISE = guarantee_on_validation(WHOLE, RecallTarget(0.8, level="patient", delta=0.1))
TRIAGE = Triage(PROMISE, "distance", 0.1, settings={"from": "p_low"}, by_vertebra=True)
ALONE = TRIAGE.without_deferral()
SURE = WHOLE[[UID, "vertebra"]].assign(confidence=np.abs(WHOLE["probability"] - PROMISE.require()))
SURE.loc[5, "confidence"] = -np.inf  # a zero map
FEW = {"resamples": 50}


@pytest.fixture
def run(tmp_path):
    """A run folder with frozen decisions."""
    freeze(tmp_path, DECISIONS, WHOLE)
    return tmp_path


def test_a_frozen_triage_comes_back_and_says_what_it_was_chosen_with(run):
    made = freeze_triage(run, TRIAGE, WHOLE, SURE)
    found = read_triage(run)
    assert made == found
    assert (found.triage, found.folder) == (TRIAGE, run)
    assert found.record["decision_sha256"] == read_decision(run).sha256
    assert found.record["predictions_sha256"] == predictions_sha256(WHOLE)
    assert found.record["test_openings_before"] == 0
    cases = Cases.of(WHOLE, split="validation")
    answers = TRIAGE.answers(cases, SURE["confidence"][: len(cases)])
    assert answers[5] != "positive"
    table = evaluate_triage(cases, answers, **FEW).set_index("metric")
    assert found.record["reached"] == pytest.approx(table["value"].to_dict())
    before = (run / "triage.json").read_bytes()
    for again in (False, True):
        freeze_triage(run, TRIAGE, WHOLE, SURE, replace=again)
        assert (run / "triage.json").read_bytes() == before


def test_the_test_split_is_opened_on_the_record_that_decisions_share(run):
    freeze_triage(run, TRIAGE, WHOLE, SURE)
    found = triage_on_test(run, WHOLE, SURE.sample(frac=1, random_state=0), prevalence=0.07, **FEW)
    cases = Cases.of(WHOLE, split="test")
    answers = TRIAGE.answers(cases, SURE["confidence"][-len(cases) :])
    pd.testing.assert_frame_equal(
        found[found["level"] == "vertebra"].drop(columns="level"), evaluate_triage(cases, answers, **FEW)
    )
    patients = evaluate_triage(cases.patients(), patient_answers(cases, answers), prevalence=0.07, **FEW)
    of_patients = found[found["level"] == "patient"].drop(columns="level").reset_index(drop=True)
    pd.testing.assert_frame_equal(of_patients, patients)

    before = {path.name: path.read_bytes() for path in run.iterdir()}
    pd.testing.assert_frame_equal(triage_on_test(run, WHOLE, SURE, prevalence=0.07, **FEW), found)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    evaluate_on_test(run, WHOLE)
    opened = read_openings(run)
    assert opened["decision_sha256"].tolist() == [read_triage(run).sha256, read_decision(run).sha256]
    assert opened[["level", "objective"]].to_numpy().tolist() == [
        ["vertebra and patient", "triage by distance"],
        ["vertebra and patient", "max_f1 and max_f1"],
    ]
    assert read_decision(run).record["openings"]["rows"] == 2

    freeze_triage(run, ALONE, WHOLE, replace=True)
    assert read_triage(run).record["test_openings_before"] == 2
    triage_on_test(run, WHOLE, **FEW)
    assert read_openings(run)["objective"].tolist()[-1] == "triage by its threshold alone"
    (run / "test_openings.csv").unlink()
    with pytest.raises(ValueError, match=r"has 0 row\(s\), and not the 3"):
        triage_on_test(run, WHOLE, **FEW)


def test_patients_are_answered_by_confidences_of_their_own(run):
    promise = guarantee_on_validation(WHOLE, RecallTarget(0.8, level="patient", aggregation=MAX, delta=0.1))
    uids = WHOLE[UID].unique()
    sure = pd.DataFrame({UID: uids, "vertebra": PATIENT, "confidence": np.arange(len(uids), dtype=float)})
    freeze_triage(run, Triage(promise, "order", 75.0), WHOLE, sure)
    found = triage_on_test(run, WHOLE, sure, **FEW)
    assert found["level"].unique().tolist() == ["patient"]
    patients = Cases.of(WHOLE, split="test").patients()
    above = patients.probability >= promise.require()
    expected = (above & (np.arange(60, 90) < 75)).mean()
    assert found.set_index("metric")["value"]["inconclusive_rate"] == pytest.approx(expected)


def test_another_triage_is_put_in_its_place_only_where_that_is_asked_for(run):
    freeze_triage(run, TRIAGE, WHOLE, SURE)
    with pytest.raises(FileExistsError, match=r"holds another triage\. The test split was opened 0 time"):
        freeze_triage(run, ALONE, WHOLE)
    assert freeze_triage(run, ALONE, WHOLE, replace=True).triage == ALONE
    (run / "triage.json").write_text("{}")
    with pytest.raises(ValueError, match="is of format None"):
        freeze_triage(run, TRIAGE, WHOLE, SURE)
    assert freeze_triage(run, TRIAGE, WHOLE, SURE, replace=True).triage == TRIAGE


def test_a_triage_beside_another_decision_is_refused(run):
    freeze_triage(run, TRIAGE, WHOLE, SURE)
    freeze(run, choose_decision(WHOLE, Rule("max_youden")), WHOLE, replace=True)
    for act in (partial(read_triage, run), partial(triage_on_test, run, WHOLE, SURE)):
        with pytest.raises(ValueError, match=r"triage\.json was frozen beside another decision"):
            act()
    assert read_openings(run).empty


def test_nothing_is_opened_without_a_decision_at_each_level(tmp_path):
    with pytest.raises(FileNotFoundError, match="No frozen decision at"):
        freeze_triage(tmp_path, ALONE, WHOLE)
    freeze(tmp_path, DECISIONS[0], WHOLE)
    with pytest.raises(FileNotFoundError, match="No frozen triage at"):
        triage_on_test(tmp_path, WHOLE)
    freeze_triage(tmp_path, ALONE, WHOLE)
    with pytest.raises(ValueError, match="No decision at patient level is frozen"):
        triage_on_test(tmp_path, WHOLE)
    assert read_openings(tmp_path).empty


def edited(table, row, value):
    return table.assign(confidence=table["confidence"].where(table.index != row, value))


@pytest.mark.parametrize(
    ("confidences", "message"),
    [
        (None, r"needs confidences; found none"),
        (SURE.drop(columns="confidence"), "confidence"),
        (SURE.drop(index=[3, 600]), "1 cases that are answered have no confidence: '1.0.0 C4'"),
        (edited(SURE, 3, np.nan), r"1 confidences are missing \(NaN\)"),
        (pd.concat([SURE, SURE.head(2)]), "2 cases occur twice: '1.0.0 C1', '1.0.0 C2'"),
    ],
    ids=["none", "no column", "cases lack one", "NaN", "twice"],
)
def test_confidences_that_do_not_serve_are_refused(run, confidences, message):
    with pytest.raises(ValueError, match=message):
        freeze_triage(run, TRIAGE, WHOLE, confidences)
    assert not (run / "triage.json").exists()


def test_the_test_split_stays_closed_for_what_was_not_frozen(run):
    freeze_triage(run, TRIAGE, WHOLE, SURE)
    other = WHOLE.assign(probability=WHOLE["probability"] ** 2)
    acts = {
        "frozen with other predictions": (other, SURE),
        "frozen with other confidences": (WHOLE, edited(SURE, 500, 0.5)),  # of a test case
        "needs confidences; found none": (WHOLE, None),
    }
    for message, given in acts.items():
        with pytest.raises(ValueError, match=message):
            triage_on_test(run, *given, **FEW)
    assert read_openings(run).empty
    with pytest.raises(ValueError, match="guarantee is for the predictions it was made on"):
        freeze_triage(run, Triage(guarantee_on_validation(other, PROMISE.target)), WHOLE, replace=True)
    with pytest.raises(ValueError, match="takes no confidences; found a table"):
        freeze_triage(run, ALONE, WHOLE, SURE, replace=True)


def test_a_record_that_was_changed_is_refused(run):
    freeze_triage(run, TRIAGE, WHOLE, SURE)
    path = run / "triage.json"
    record = json.loads(path.read_text())
    path.write_text(path.read_text().replace('"cut": 0.1', '"cut": 0.2'))
    with pytest.raises(ValueError, match="is not the record that was written"):
        read_triage(run)
    for gone in ("triage", "confidences_sha256"):
        write_sealed(path, {name: value for name, value in record.items() if name != gone})
        with pytest.raises(ValueError, match=f"no whole triage: it lacks '{gone}'"):
            read_triage(run)
    higher = record["triage"]["guarantee"] | {"threshold": 0.9}  # a promise that these rows do not make
    write_sealed(path, record | {"triage": record["triage"] | {"guarantee": higher}})
    with pytest.raises(ValueError, match="guarantee is for the predictions it was made on"):
        triage_on_test(run, WHOLE, SURE)
    assert read_openings(run).empty


def test_nothing_is_told_where_the_opening_cannot_be_recorded(run, monkeypatch):
    freeze_triage(run, TRIAGE, WHOLE, SURE)
    monkeypatch.setattr(room, "record_opening", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        triage_on_test(run, WHOLE, SURE, **FEW)
