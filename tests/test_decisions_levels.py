import numpy as np
import pandas as pd
import pytest
from test_evaluation_cases import toy

from cspine_helpers.decisions.thresholds import (
    apply_decision,
    choose_decision,
    choose_per_vertebra,
    choose_threshold,
    state_threshold,
)
from cspine_helpers.evaluation.cases import Aggregation, aggregate, fit_logistic
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.metrics import confusion, rates

WHOLE = pd.concat([toy(400), toy(200, seed=7, split="test")], ignore_index=True)
VALIDATION = WHOLE[WHOLE["split"] == "validation"]


def test_only_validation_rows_choose():
    decision = choose_decision(WHOLE, level="vertebra", precision_floor=0.5)
    assert decision == choose_threshold(VALIDATION["label"], VALIDATION["probability"], precision_floor=0.5)
    assert decision == choose_decision(WHOLE.assign(
        probability=WHOLE["probability"].where(WHOLE["split"] == "validation", 0.123)
    ), level="vertebra", precision_floor=0.5)  # fmt: skip
    assert decision.cases == 2800


@pytest.mark.parametrize(
    "aggregation",
    [Aggregation(), Aggregation("noisy_or"), Aggregation("top_k", k=2), fit_logistic(WHOLE)],
    ids=str,
)
def test_a_patient_decision_keeps_its_aggregation_and_reaches_what_it_says(aggregation):
    decision = choose_decision(
        WHOLE, level="patient", aggregation=aggregation, objective="max_recall", specificity_floor=0.6
    )
    called = apply_decision(decision, VALIDATION, level="patient")
    assert (called["positive"] == (called["probability"] >= decision.require())).all()
    found = rates(confusion(called["label"], called["positive"], 0.5)).iloc[0]
    assert (found["recall"], found["specificity"]) == (decision.recall, decision.specificity)
    assert decision.aggregation == aggregation
    assert found["specificity"] >= 0.6


def test_a_threshold_is_refused_at_the_other_level():
    vertebra = choose_decision(WHOLE, level="vertebra", objective="max_f1")
    patient = choose_decision(WHOLE, level="patient", aggregation=Aggregation(), objective="max_f1")
    for decision, level in ((vertebra, "patient"), (patient, "vertebra")):
        message = (
            rf"holds at {decision.level} level, not at {level} level.*choose_decision\(..., level='{level}'"
        )
        with pytest.raises(ValueError, match=message):
            apply_decision(decision, WHOLE, level=level)
    with pytest.raises(ValueError, match="Unknown level 'C3'"):
        apply_decision(vertebra, WHOLE, level="C3")


def test_a_threshold_is_refused_with_another_aggregation():
    decision = choose_decision(WHOLE, level="patient", aggregation=Aggregation(), objective="max_f1")
    with pytest.raises(ValueError, match=r"chosen with the aggregation .*max.*, not with .*noisy_or"):
        apply_decision(decision, WHOLE, level="patient", aggregation=Aggregation("noisy_or"))
    same = apply_decision(decision, WHOLE, level="patient", aggregation=Aggregation())
    pd.testing.assert_frame_equal(same, apply_decision(decision, WHOLE, level="patient"))


def test_a_patient_decision_from_arrays_needs_its_aggregation_said():
    patients = aggregate(VALIDATION, Aggregation())
    decision = choose_threshold(
        patients["label"], patients["probability"], objective="max_f1", level="patient"
    )
    with pytest.raises(ValueError, match=r"say how the vertebrae of a patient become one probability"):
        apply_decision(decision, WHOLE, level="patient")
    assert len(apply_decision(decision, WHOLE, level="patient", aggregation=Aggregation())) == 600


def test_levels_and_aggregations_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="At patient level, say how"):
        choose_decision(WHOLE, level="patient", objective="max_f1")
    with pytest.raises(ValueError, match="An aggregation belongs to the patient level"):
        choose_decision(WHOLE, level="vertebra", aggregation=Aggregation(), objective="max_f1")
    with pytest.raises(ValueError, match="Unknown level 'all'"):
        choose_decision(WHOLE, level="all", objective="max_f1")


def test_each_vertebra_keeps_the_floor_by_itself():
    decision = choose_per_vertebra(WHOLE, min_positives=10, precision_floor=0.5)
    assert list(decision.thresholds) == list(VERTEBRAE)
    called = apply_decision(decision, VALIDATION, level="vertebra")
    for name, part in called.groupby("vertebra"):
        alone = choose_threshold(part["label"], part["probability"], precision_floor=0.5)
        assert (part["threshold"] == alone.threshold).all()
        assert part["label"][part["positive"]].mean() == alone.precision >= 0.5, name
    found = rates(confusion(called["label"], called["positive"], 0.5)).iloc[0]
    assert (decision.recall, decision.precision, decision.specificity) == tuple(
        found[["recall", "precision", "specificity"]]
    )
    assert (decision.cases, decision.positives) == (2800, VALIDATION["label"].sum())
    assert decision.reason == "Highest recall of each vertebra by itself."


def test_a_vertebra_with_too_few_positives_is_refused_with_the_counts():
    few = WHOLE.assign(label=WHOLE["label"].where(WHOLE["vertebra"] != "C3", 0))
    few.loc[few.index[(few["vertebra"] == "C3")][:4], "label"] = 1
    with pytest.raises(
        ValueError, match=r"20 fractured and 20 intact .*; found C3 4 and 396\. Choose one for"
    ):
        choose_per_vertebra(few, objective="max_f1")
    with pytest.raises(ValueError, match="found C7 0 and 0"):
        choose_per_vertebra(WHOLE[WHOLE["vertebra"] != "C7"], objective="max_f1")


def test_a_vertebra_that_cannot_keep_the_floor_leaves_no_decision():
    noise = WHOLE.copy()
    third = noise["vertebra"] == "C3"
    noise.loc[third, "probability"] = np.where(noise.loc[third, "label"] == 1, 0.1, 0.9)
    decision = choose_per_vertebra(noise, precision_floor=0.5)
    assert (decision.threshold, decision.thresholds, decision.recall) == (None, None, 0)
    assert decision.reason.startswith("C3: No threshold keeps precision at 0.500 or above")
    with pytest.raises(ValueError, match=r"C3: No threshold.*Lower the precision floor"):
        apply_decision(decision, WHOLE, level="vertebra")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (toy(split="test"), "no row of the split 'validation'"),
        (WHOLE.assign(probability=-0.1), r"no numbers in \[0, 1\]"),
        (WHOLE.assign(label=0), "All 2800 labels are 0"),
        (pd.concat([WHOLE, WHOLE[:1]]), "repeat a study and vertebra"),
        (WHOLE.assign(split=["validation", "test"] * 2100), "more than one split"),
    ],
)
def test_tables_that_cannot_choose_are_refused(table, message):
    with pytest.raises(ValueError, match=message):
        choose_decision(table, level="vertebra", objective="max_f1")


def test_a_threshold_that_rests_on_few_scores_says_so():
    rng = np.random.default_rng(0)
    table = WHOLE.assign(probability=rng.random(len(WHOLE)) * 0.9)  # a model that knows nothing …
    lucky = table.index[(table["label"] == 1) & (table["split"] == "validation")][:2]
    table.loc[lucky, "probability"] = [0.95, 0.96]  # … and was right twice
    decision = choose_decision(table, level="vertebra", precision_floor=0.9)
    assert decision.threshold == 0.95
    assert decision.recall < 0.01
    assert decision.reason.endswith(
        "Only 2 cases lie at or above it: a threshold that rests on fewer than 10 is luck, not a policy."
    )
    assert "lie" not in choose_decision(table, level="vertebra", objective="max_f1").reason
    each = choose_per_vertebra(table, min_positives=10, objective="max_precision", recall_floor=0.01)
    counts = apply_decision(each, table[table["split"] == "validation"], level="vertebra").groupby("vertebra")
    few = counts["positive"].sum().loc[lambda n: n < 10].index.tolist()
    assert few
    assert [name for name in VERTEBRAE if f"{name}: Only" in each.reason] == few


@pytest.mark.parametrize(
    ("cases", "words"), [(0, "No case lies"), (1, "Only 1 case lies"), (9, "Only 9 cases")]
)
def test_a_stated_threshold_above_few_cases_says_so_and_one_above_ten_does_not(cases, words):
    labels, probabilities = [0, 1] * 20, np.append(np.full(40 - cases, 0.2), np.full(cases, 0.9))
    assert words in state_threshold(labels, probabilities, 0.5, reason="By hand.").reason
    full = np.append(np.full(30, 0.2), np.full(10, 0.9))
    assert state_threshold(labels, full, 0.5, reason="By hand.").reason == "By hand."
