import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from test_decisions_frozen_triage import MAX, WHOLE

from cspine_helpers.decisions.confidence import fit_confidence
from cspine_helpers.decisions.frozen_triage import freeze_triage, read_triage
from cspine_helpers.decisions.guarantees import RecallTarget, guarantee_on_validation
from cspine_helpers.decisions.test_split import freeze
from cspine_helpers.decisions.threshold_table import COLUMNS, threshold_table
from cspine_helpers.decisions.thresholds import Decision, Rule, choose_decision
from cspine_helpers.decisions.triage import Triage
from cspine_helpers.evaluation.calibration import fit_calibrator
from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.files.records import write_sealed
from cspine_helpers.labels import UID
from cspine_helpers.predictions import read_predictions

ROOT = Path(__file__).parents[1]
RULES = Rule(precision_floor=0.3), Rule("max_f1", level="patient", aggregation=MAX)
CHOSEN = [choose_decision(WHOLE, rule) for rule in RULES]
PROMISE = guarantee_on_validation(WHOLE, RecallTarget(0.8, level="patient", delta=0.1, aggregation=MAX))
PLATT = fit_calibrator(Cases.of(WHOLE, split="validation"), kind="platt")


def rows_of(table):
    """Name and level → row."""
    return table.set_index(["name", "level"])


def test_decision_guarantee_and_triage_stand_in_one_table_with_their_calibrated_twins(tmp_path):
    covered = Decision(RULES[1], PROMISE.require(), 0, 0, "")
    freeze(tmp_path, CHOSEN, WHOLE, calibrators=PLATT)
    cases = Cases.of(WHOLE, split="validation")
    sure = fit_confidence("distance", cases, p_low=PROMISE.require()).of(cases)
    triage = Triage(PROMISE, "distance", 0.5, by_vertebra=True)
    known = WHOLE[[UID, "vertebra"]].assign(confidence=0.0)
    known.loc[: len(cases) - 1, "confidence"] = sure
    freeze_triage(tmp_path, triage, WHOLE, known)
    table = threshold_table(tmp_path, WHOLE, others={"promised": PROMISE, "stated": covered})
    assert tuple(table.columns) == COLUMNS
    found = rows_of(table)
    assert found.index.tolist() == [
        ("decision", "vertebra"),
        ("decision", "patient by max"),
        ("triage, p_low", "patient by max"),
        ("triage, cut", "vertebra"),
        ("promised", "patient by max"),
        ("stated", "patient by max"),
    ]
    of_vertebra = found.loc[("decision", "vertebra")]
    assert of_vertebra["threshold"] == CHOSEN[0].threshold
    by_hand = expit(PLATT.slope * logit(CHOSEN[0].threshold) + PLATT.intercept)
    assert of_vertebra["calibrated"] == pytest.approx(by_hand)
    assert of_vertebra["purpose"] == "Highest recall, precision ≥ 0.3"
    assert of_vertebra["chosen_on"] == f"validation: 420 vertebrae, {cases.label.sum()} fractured"
    assert (
        found["calibrated"].notna().sum() == 1
    )  # no calibrator for patients is frozen; a cut is no probability
    date = read_triage(tmp_path).record["frozen_utc"][:10]
    assert found["status"].tolist() == [f"frozen {date}"] * 4 + ["not frozen"] * 2
    low, cut = found.loc[("triage, p_low", "patient by max")], found.loc[("triage, cut", "vertebra")]
    assert low["threshold"] == found.loc[("promised", "patient by max"), "threshold"] == PROMISE.threshold
    assert (cut["scale"], cut["threshold"], cut["chosen_on"]) == (
        "distance",
        0.5,
        "validation: 420 vertebrae",
    )
    said = float(cut["purpose"].rpartition(" ")[2])  # of a case's answer by its probability alone
    positive = triage.answers(cases, sure) == "positive"
    assert positive.any()
    assert cases.probability[positive].min() > said - 5e-5
    assert cases.probability[~positive].max() < said + 5e-5


def test_a_frozen_guarantee_is_a_row_of_its_own(tmp_path):
    decision = Decision.from_record(CHOSEN[1].record())
    promise = guarantee_on_validation(WHOLE, RecallTarget(0.5, level="patient", delta=0.3, aggregation=MAX))
    assert promise.covers(decision)
    freeze(tmp_path, decision, WHOLE, guarantees=promise)
    found = rows_of(threshold_table(tmp_path, WHOLE)).loc[("guarantee", "patient by max")]
    assert found["threshold"] == promise.threshold
    assert found["purpose"] == "recall of patients ≥ 0.5 with confidence 0.7"
    assert found["chosen_on"] == f"validation: {promise.patients} fractured patients"


def test_what_was_frozen_with_other_predictions_says_so_and_is_not_calibrated(tmp_path):
    freeze(tmp_path, CHOSEN, WHOLE, calibrators=PLATT)
    freeze_triage(tmp_path, Triage(PROMISE, by_vertebra=True), WHOLE)
    other = WHOLE.assign(probability=WHOLE["probability"] / 2)
    table = threshold_table(tmp_path, other)
    assert table["status"].str.endswith(", for other predictions").tolist() == [True] * 3
    assert table["calibrated"].isna().all()
    freeze(tmp_path, choose_decision(WHOLE, Rule("max_youden")), WHOLE, replace=True)
    found = rows_of(threshold_table(tmp_path, WHOLE))["status"]
    assert found[("triage, p_low", "patient by max")].endswith(", beside another decision")
    assert "," not in found[("decision", "vertebra")]


def test_no_threshold_is_shown_as_none_and_one_for_each_vertebra_as_seven(tmp_path):
    each = dict(zip(("C1", "C2", "C3", "C4", "C5", "C6", "C7"), np.arange(1, 8) / 10, strict=True))
    several = Decision(Rule("max_f1"), None, 0.5, 0.5, "", thresholds=each)
    none = Decision(Rule(precision_floor=0.99), None, 0, 0, "None reaches it.")
    table = threshold_table(tmp_path, WHOLE, others={"each": several, "none": none})
    assert table["level"].tolist() == [*each, "vertebra"]
    assert table["threshold"].tolist()[:-1] == [*each.values()]
    assert table.iloc[-1][["threshold", "calibrated"]].isna().all()


def test_an_empty_folder_has_no_threshold_and_a_bare_number_is_refused(tmp_path):
    assert threshold_table(tmp_path, WHOLE).empty
    with pytest.raises(ValueError, match=r"'mine' is a float. Pass a decision of choose_decision"):
        threshold_table(tmp_path, WHOLE, others={"mine": 0.5})


def test_of_radiographs_the_blend_has_its_row_and_what_was_before_it_is_not_calibrated():
    folder = ROOT / "checkpoints" / "fracatlas"
    table = threshold_table(folder, read_predictions(folder / "predictions.csv"))
    found = table.set_index("name")
    stored = json.loads((folder / "blend.json").read_text())["decision"]["threshold"]
    assert found.loc["blend", "threshold"] == stored
    assert found.loc["training, best epoch", "scale"] == "probability before the blend"
    assert np.isnan(found.loc["training, best epoch", "calibrated"])
    assert found.loc["decision", "calibrated"] > 0


def test_a_damaged_blend_is_refused(tmp_path):
    folder = shutil.copytree(
        ROOT / "checkpoints" / "fracatlas", tmp_path / "run", ignore=lambda *_: {"measured"}
    )
    record = json.loads((folder / "blend.json").read_text())
    write_sealed(folder / "blend.json", record | {"format": 99})
    with pytest.raises(ValueError, match="of format 99"):
        threshold_table(folder, pd.DataFrame(WHOLE))
