import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluation_cases import toy

from cspine_helpers.decisions.thresholds import (
    OBJECTIVES,
    Decision,
    Rule,
    apply_decision,
    choose_decision,
    choose_per_vertebra,
    choose_threshold,
    state_threshold,
)
from cspine_helpers.evaluation.cases import Aggregation, Cases, fit_logistic
from cspine_helpers.labels import UID, VERTEBRAE, read_labels
from cspine_helpers.metrics import RSNA_COSTS, confusion, rates
from cspine_helpers.predictions import from_wide

# Thresholds: 0.9: recall 1/3, precision 1, specificity 1; 0.8: 1/3, 1/2, 2/3; 0.7: 2/3, 2/3, 2/3;
# 0.4: 1, 3/5, 1/3; 0.1: 1, 3/6, 0
LABELS = [1, 0, 1, 0, 1, 0]
PROBABILITIES = [0.9, 0.8, 0.7, 0.4, 0.4, 0.1]
MAX = Aggregation("max")


def cases_of(labels, probabilities):
    """One vertebra of one study each."""
    studies = [f"1.{n}" for n in range(len(labels))]
    rows = {UID: studies, "vertebra": "C1", "split": "test", "label": labels, "probability": probabilities}
    return Cases.of(pd.DataFrame(rows))


CASES = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 8)), min_size=2, max_size=40).filter(
    lambda cases: len({label for label, _ in cases}) == 2
)
FRACTIONS = st.integers(0, 20).map(lambda twentieths: twentieths / 20)
FLOORS = st.fixed_dictionaries(
    {},
    optional={f"{name}_floor": FRACTIONS for name in ("precision", "recall", "specificity")},
)
NUMBERS = st.sampled_from([0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.3, 14.0])


@st.composite
def rules(draw):
    """Every objective, with what it needs, under any floors."""
    objective = draw(st.sampled_from(sorted(OBJECTIVES)))
    options = draw(FLOORS)
    if objective == "max_recall" and not {"precision_floor", "specificity_floor"} & set(options):
        options["specificity_floor"] = draw(FRACTIONS)
    if objective == "max_precision":
        options.setdefault("recall_floor", draw(FRACTIONS))
    if objective == "max_fbeta":
        options["beta"] = draw(NUMBERS)
    if objective == "min_cost":
        options |= {"cost_miss": draw(NUMBERS), "cost_false_alarm": draw(NUMBERS)}
    return {"objective": objective} | options


def decimal(number):
    return Fraction(str(number))


def fbeta(tp, fp, fn, tn, beta):
    precision, recall, squared = Fraction(tp, tp + fp), Fraction(tp, tp + fn), decimal(beta) ** 2
    return 0 if tp == 0 else (1 + squared) * precision * recall / (squared * precision + recall)


def mean_cost(tp, fp, fn, tn, miss, alarm):
    return (decimal(miss) * fn + decimal(alarm) * fp) / (tp + fp + fn + tn)


SLOW = {
    "max_recall": lambda c, o: Fraction(c[0], c[0] + c[2]),
    "max_precision": lambda c, o: Fraction(c[0], c[0] + c[1]),
    "max_f1": lambda c, o: fbeta(*c, 1),
    "max_fbeta": lambda c, o: fbeta(*c, o["beta"]),
    "max_youden": lambda c, o: Fraction(c[0], c[0] + c[2]) - Fraction(c[1], c[1] + c[3]),
    "min_cost": lambda c, o: -mean_cost(*c, o["cost_miss"], o["cost_false_alarm"]),
}


def counted(cases, threshold):
    tp = sum(label == 1 and score >= threshold for label, score in cases)
    fp = sum(label == 0 and score >= threshold for label, score in cases)
    positives = sum(label for label, _ in cases)
    return tp, fp, positives - tp, len(cases) - positives - fp


def slow_choice(cases, options):
    """(value, recall, precision, threshold) of the best, in fractions, from the definitions; or None."""
    found = []
    for threshold in {score for _, score in cases}:
        counts = tp, fp, fn, tn = counted(cases, threshold)
        rates = {
            "recall": Fraction(tp, tp + fn),
            "precision": Fraction(tp, tp + fp),
            "specificity": Fraction(tn, tn + fp),
        }
        floors = {name: options.get(f"{name}_floor") for name in rates}
        if tp and all(rates[name] >= decimal(floor) for name, floor in floors.items() if floor is not None):
            value = SLOW[options["objective"]](counts, options)
            found.append((value, rates["recall"], rates["precision"], threshold))
    best = max(found, default=None)
    if best and options["objective"] == "max_youden" and best[0] <= 0:
        return None
    if best and options["objective"] == "min_cost":
        fn = sum(label for label, _ in cases)
        nobody = mean_cost(0, 0, fn, len(cases) - fn, options["cost_miss"], options["cost_false_alarm"])
        if nobody < -best[0] and not options.get("precision_floor") and not options.get("recall_floor"):
            return None
    return best


@settings(max_examples=100)
@given(CASES, rules())
def test_every_choice_equals_an_exhaustive_search_in_fractions(cases, options):
    decision = choose_threshold(
        *zip(*[(label, score / 8) for label, score in cases], strict=True), Rule(**options)
    )
    best = slow_choice(cases, options)
    if best is None:
        assert decision.threshold is None
        assert decision.reason.startswith(("No threshold", "Calling nobody"))
        return
    value, recall, precision, threshold = best
    assert decision.threshold == threshold / 8
    assert (decision.recall, decision.precision) == (float(recall), float(precision))
    assert decision.value == pytest.approx(abs(float(value)), rel=1e-15)
    tp, fp, fn, tn = counted(cases, threshold)
    assert decision.specificity == tn / (tn + fp)
    assert (decision.cases, decision.positives) == (len(cases), tp + fn)


@pytest.mark.parametrize(
    ("options", "threshold", "value", "reason"),
    [
        ({"objective": "max_recall", "specificity_floor": 0.66}, 0.7, 2 / 3, "recall among the 3 of 5"),
        ({"objective": "max_recall", "specificity_floor": 0.0}, 0.4, 1, "the 5 of 5 thresholds with spec"),
        ({"objective": "max_precision", "recall_floor": 0.5}, 0.7, 2 / 3, "precision among the 3 of 5"),
        ({"objective": "max_precision", "recall_floor": 1.0}, 0.4, 3 / 5, "with recall at 1.000 or above"),
        ({"objective": "max_fbeta", "beta": 2.0}, 0.4, 15 / 17, "Highest F-beta (beta 2) among all 5"),
        ({"objective": "max_fbeta", "beta": 0.5}, 0.9, 5 / 7, "Highest F-beta (beta 0.5)"),
        # Youden index 1/3 at 0.9, 0.7 and 0.4: the highest recall
        ({"objective": "max_youden"}, 0.4, 1 / 3, "Highest Youden index among all 5 thresholds."),
        # 0.9: 2 missed; 0.7: 1 and 1 alarm; 0.4: 2 alarms
        ({"objective": "min_cost", **RSNA_COSTS["patient"]}, 0.4, 14 / 6, "(a miss 14, a false alarm 7)"),
        ({"objective": "min_cost", "cost_miss": 1.0, "cost_false_alarm": 3.0}, 0.9, 2 / 6, "expected cost"),
    ],
)  # fmt: skip
def test_worked_by_hand(options, threshold, value, reason):
    decision = choose_threshold(LABELS, PROBABILITIES, Rule(**options))
    assert (decision.threshold, decision.value) == (threshold, pytest.approx(value))
    assert reason in decision.reason


def test_costs_that_are_equal_as_decimals_are_a_tie():
    # 0.9: one miss, 0.3. 0.5: three alarms of 0.1 each, which floats sum to more than 0.3.
    labels, probabilities = [1, 0, 0, 0, 1], [0.9, 0.6, 0.6, 0.6, 0.5]
    decision = choose_threshold(labels, probabilities, Rule("min_cost", cost_miss=0.3, cost_false_alarm=0.1))
    assert (decision.threshold, decision.recall) == (0.5, 1)
    assert 3 * 0.1 > 0.3


@pytest.mark.parametrize(
    ("labels", "probabilities", "options", "message"),
    [
        (
            [0, 1, 0],
            [0.9, 0.5, 0.2],
            {"objective": "max_recall", "specificity_floor": 0.6},
            "No threshold keeps specificity at 0.600 or above: the best reachable is 0.500, "
            "with recall 1.000 at 0.5.",
        ),
        (
            LABELS,
            PROBABILITIES,
            {"objective": "max_f1", "precision_floor": 0.7, "recall_floor": 0.9},
            "No threshold keeps precision at 0.700 or above and recall at 0.900 or above: the best reachable "
            "precision with recall at 0.900 or above is 0.600, with recall 1.000 at 0.4.",
        ),
        (
            [0, 1, 0],
            [0.9, 0.5, 0.2],
            {"objective": "max_f1", "precision_floor": 0.7, "specificity_floor": 0.9},
            "and specificity at 0.900 or above: the best reachable precision is 0.500, with",
        ),
        (
            [0, 1],
            [0.9, 0.5],
            {"objective": "max_youden"},
            "No threshold is better than chance: the highest Youden index is 0.000.",
        ),
        (
            [0, 0, 0, 1],
            [0.9, 0.9, 0.9, 0.5],
            {"objective": "min_cost", "cost_miss": 1.0, "cost_false_alarm": 1.0},
            "Calling nobody positive costs 0.25 a case, less than any threshold does (0.75 at least).",
        ),
    ],
)  # fmt: skip
def test_the_unreachable_is_said_with_what_can_be_reached(labels, probabilities, options, message):
    decision = choose_threshold(labels, probabilities, Rule(**options))
    assert decision.threshold is None
    assert message in decision.reason
    assert (decision.recall, decision.precision, decision.specificity, decision.value) == (0, 0, 1, None)
    with pytest.raises(ValueError, match="another objective"):
        decision.require()


def test_many_scores_take_a_moment_and_equal_the_fractions():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    scores = rng.integers(0, 100, 300)
    options = {"objective": "max_fbeta", "beta": 0.3}
    best = slow_choice(list(zip(labels.tolist(), scores.tolist(), strict=True)), options)
    assert choose_threshold(labels, scores / 100, Rule(**options)).threshold == best[3] / 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "max_recall needs precision_floor or specificity_floor"),
        ({"recall_floor": 0.5}, "max_recall needs precision_floor or specificity_floor"),
        ({"objective": "max_precision"}, "max_precision needs recall_floor"),
        ({"precision_floor": 1.2}, r"precision_floor must be in \[0, 1\]; found 1.2"),
        ({"specificity_floor": float("nan")}, r"specificity_floor must be in \[0, 1\]"),
        ({"objective": "max_precision", "recall_floor": -0.1}, r"recall_floor must be in \[0, 1\]"),
        ({"objective": "max_luck"}, "Unknown objective 'max_luck'.*max_recall, max_f1"),
        ({"objective": "stated"}, "Unknown objective 'stated'.*max_recall, max_f1"),
        ({"objective": "max_fbeta"}, "max_fbeta needs beta, a finite number above 0; found None"),
        ({"objective": "max_fbeta", "beta": 0.0}, "found 0.0"),
        ({"objective": "max_f1", "beta": 2.0}, "beta belongs to max_fbeta, not to max_f1"),
        ({"objective": "min_cost", "cost_miss": 1.0}, "min_cost needs cost_false_alarm"),
        ({"objective": "min_cost", "cost_miss": float("inf"), "cost_false_alarm": 1.0}, "needs cost_miss"),
        ({"objective": "max_youden", "cost_miss": 1.0}, "cost_miss belongs to min_cost"),
        ({"objective": "max_f1", "level": "C3"}, "Unknown level 'C3'.*vertebra, patient"),
        ({"objective": "max_f1", "aggregation": MAX}, "An aggregation belongs to the patient level"),
    ],
)
def test_rules_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        choose_threshold(LABELS, PROBABILITIES, Rule(**options))


def test_a_threshold_that_finds_nothing_never_qualifies_and_one_that_finds_a_single_fracture_does():
    labels, scores = [0, 1, *[0] * 9], [0.9, 0.5, *[0.6] * 9]
    none = choose_threshold(labels, scores, Rule("max_recall", specificity_floor=0.9))
    assert none.threshold is None  # at 0.9 specificity is 0.9, and recall 0
    assert none.reason.startswith(
        "No threshold keeps specificity at 0.900 or above: the best reachable is 0.000"
    )
    one = choose_threshold([1, 0, 1, 0], [0.9, 0.5, 0.4, 0.1], Rule("max_precision", recall_floor=0.5))
    assert (one.threshold, one.precision) == (0.9, 1)


@pytest.mark.parametrize("floors", [{}, {"precision_floor": 0.4}, {"recall_floor": 0.9}])
def test_calling_nobody_wins_only_where_it_is_cheaper_and_no_floor_asks_for_calls(floors):
    tie = {"objective": "min_cost", "cost_miss": 1.0, "cost_false_alarm": 1.0}
    decision = choose_threshold([1, 0], [0.5, 0.5], Rule(**tie, **floors))
    assert (decision.threshold, decision.value) == (0.5, 0.5)  # as dear as calling nobody
    dearer = choose_threshold([1, 0], [0.5, 0.5], Rule(**tie | {"cost_false_alarm": 2.0}, **floors))
    assert (dearer.threshold is None) == (not floors)
    assert dearer.reason.startswith("Calling nobody positive costs 0.5 a case") == (not floors)


@pytest.mark.parametrize(
    ("floor", "threshold", "recall", "precision"),
    [(0.0, 0.4, 1, 3 / 5), (0.6, 0.4, 1, 3 / 5), (0.61, 0.7, 2 / 3, 2 / 3), (1.0, 0.9, 1 / 3, 1)],
)
def test_highest_recall_at_or_above_the_floor(floor, threshold, recall, precision):
    decision = choose_threshold(LABELS, PROBABILITIES, Rule(precision_floor=floor))
    assert (decision.threshold, decision.recall, decision.precision) == (threshold, recall, precision)
    assert decision.require() == threshold


def test_no_threshold_reaches_the_floor():
    decision = choose_threshold([0, 1, 0], [0.9, 0.5, 0.2], Rule(precision_floor=0.6))
    assert decision.threshold is None
    assert decision.recall == decision.precision == 0
    assert "best reachable is 0.500, with recall 1.000 at 0.5" in decision.reason
    with pytest.raises(ValueError, match=r"No threshold keeps precision.*Lower the precision floor"):
        decision.require()


def test_max_f1_without_and_with_a_floor():
    free = choose_threshold(LABELS, PROBABILITIES, Rule("max_f1"))
    assert (free.threshold, free.recall) == (0.4, 1)
    held = choose_threshold(LABELS, PROBABILITIES, Rule("max_f1", precision_floor=0.65))
    assert (held.threshold, held.recall) == (0.7, 2 / 3)


def test_equal_f1_takes_the_higher_recall():
    # 0.9: 1 of 1 called right, recall 1/3, F1 1/2. 0.1: 3 of 9 right, recall 1, F1 1/2.
    labels, probabilities = [1, 0, 0, 0, 0, 0, 0, 1, 1], [0.9, *[0.5] * 6, 0.1, 0.1]
    decision = choose_threshold(labels, probabilities, Rule("max_f1"))
    assert (decision.threshold, decision.recall) == (0.1, 1)


def test_equal_recall_takes_the_higher_threshold():
    decision = choose_threshold([1, 0, 0], [0.8, 0.5, 0.3], Rule(precision_floor=0.0))
    assert decision.threshold == 0.8


def test_all_probabilities_equal_leave_one_threshold():
    decision = choose_threshold([1, 0], [0.3, 0.3], Rule(precision_floor=0.5))
    assert (decision.threshold, decision.recall, decision.precision) == (0.3, 1, 0.5)


@needs_rsna
def test_choices_on_real_predictions_equal_an_exhaustive_search():
    wide = pd.read_csv(RSNA / "oof_predictions.csv", dtype={"uid": str})
    real = from_wide(wide[:250], read_labels(RSNA / "train.csv"), "validation", missing="drop")
    called = {threshold: real["label"][real["probability"] >= threshold] for threshold in real["probability"]}
    for floor in (0.15, 0.3, 0.6, 0.99):
        decision = choose_threshold(real["label"], real["probability"], Rule(precision_floor=floor))
        kept = [
            (hits.sum() / real["label"].sum(), hits.mean(), threshold)
            for threshold, hits in called.items()
            if hits.mean() >= floor and hits.any()
        ]
        found = (decision.recall, decision.precision, decision.threshold)
        assert found == max(kept, default=(0, 0, None)), floor


def test_a_decision_survives_json():
    for decision in (
        choose_threshold(LABELS, PROBABILITIES, Rule(precision_floor=0.6)),
        choose_threshold([0, 1, 0], [0.9, 0.5, 0.2], Rule(precision_floor=0.6)),
        choose_threshold(
            LABELS, PROBABILITIES, Rule("max_f1", level="patient", aggregation=Aggregation("top_k", k=2))
        ),
        replace(
            choose_threshold(LABELS, PROBABILITIES, Rule("max_f1")),
            threshold=None,
            thresholds=dict.fromkeys(VERTEBRAE, 0.5),
        ),
    ):
        assert Decision.from_record(json.loads(json.dumps(decision.record()))) == decision


def test_a_decision_of_an_earlier_record_is_read():
    record = {
        "threshold": 0.32,
        "objective": "max_recall",
        "level": "vertebra",
        "precision_floor": 0.5,
        "recall": 0.94,
        "precision": 0.61,
        "reason": "Highest recall among the 96 of 497 thresholds with precision at 0.500 or above.",
    }
    assert Decision.from_record(record).require() == 0.32


def test_a_stated_threshold_says_what_it_reaches():
    cases = cases_of(LABELS, PROBABILITIES)
    decision = state_threshold(cases.patients(), 0.75, reason="Chosen by hand.")
    assert decision.rule == Rule("stated", level="patient", aggregation=MAX)
    assert (decision.recall, decision.precision, decision.specificity) == (1 / 3, 1 / 2, 2 / 3)
    assert (decision.threshold, decision.cases, decision.positives, decision.value) == (0.75, 6, 3, None)
    assert state_threshold(cases, 1.0, reason="Nobody.").precision == 0


@pytest.mark.parametrize(
    ("threshold", "reason", "message"),
    [
        (1.5, "By hand.", r"must be in \[0, 1\]; found 1.5"),
        (float("nan"), "By hand.", "threshold is missing"),
        (0.5, " ", "needs its reason"),
    ],
)
def test_a_stated_threshold_that_is_none_is_refused(threshold, reason, message):
    with pytest.raises(ValueError, match=message):
        state_threshold(cases_of(LABELS, PROBABILITIES), threshold, reason=reason)


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([0, 0], [0.1, 0.2], "All 2 labels are 0"),
        ([0, 2], [0.1, 0.2], "1 labels are neither 0 nor 1"),
        ([0, 1], [0.1, 1.2], r"1 probabilities are missing or outside \[0, 1\]"),
        ([0, 1], [0.1, np.nan], "1 probabilities are missing"),
        ([0, 1], [0.1], "two columns of one length"),
    ],
)
def test_scores_that_cannot_choose_are_refused(labels, probabilities, message):
    with pytest.raises(ValueError, match=message):
        choose_threshold(labels, probabilities, Rule(precision_floor=0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 1.5}, r"must be in \[0, 1\]; found 1.5"),
        ({"threshold": None, "thresholds": dict.fromkeys(VERTEBRAE, 2.0)}, r"must be in \[0, 1\]; found 2"),
        ({"threshold": None, "thresholds": {"C1": 0.5}}, r"those of C1 … C7.*found \['C1'\]"),
        ({"thresholds": dict.fromkeys(VERTEBRAE, 0.5)}, "without another"),
        (
            {"thresholds": dict.fromkeys(VERTEBRAE, 0.5), "rule": Rule("max_f1", level="patient")},
            "vertebra level",
        ),
    ],
)
def test_other_fields_are_no_decision(changes, message):
    decision = choose_threshold(LABELS, PROBABILITIES, Rule(precision_floor=0.6))
    with pytest.raises(ValueError, match=message):
        replace(decision, **changes)


def test_one_threshold_is_not_asked_of_seven():
    decision = choose_threshold(LABELS, PROBABILITIES, Rule("max_f1"))
    decision = replace(decision, threshold=None, thresholds=dict.fromkeys(VERTEBRAE, 0.5))
    with pytest.raises(ValueError, match=r"one threshold a vertebra\. Use apply_decision"):
        decision.require()


WHOLE = pd.concat([toy(400), toy(200, seed=7, split="test")], ignore_index=True)
LEARNED = fit_logistic(Cases.of(WHOLE, split="validation"))
VALIDATION = WHOLE[WHOLE["split"] == "validation"]


def test_only_validation_rows_choose():
    decision = choose_decision(WHOLE, Rule(precision_floor=0.5))
    assert decision == choose_threshold(
        VALIDATION["label"], VALIDATION["probability"], Rule(precision_floor=0.5)
    )
    assert decision == choose_decision(WHOLE.assign(
        probability=WHOLE["probability"].where(WHOLE["split"] == "validation", 0.123)
    ), Rule(precision_floor=0.5))  # fmt: skip
    assert decision.cases == 2800


@pytest.mark.parametrize(
    "aggregation",
    [MAX, Aggregation("noisy_or"), Aggregation("top_k", k=2), LEARNED],
    ids=str,
)
def test_a_patient_decision_keeps_its_aggregation_and_reaches_what_it_says(aggregation):
    decision = choose_decision(
        WHOLE, Rule("max_recall", level="patient", aggregation=aggregation, specificity_floor=0.6)
    )
    called = apply_decision(decision, VALIDATION)
    assert (called["positive"] == (called["probability"] >= decision.require())).all()
    found = rates(confusion(called["label"], called["positive"], 0.5)).iloc[0]
    assert (found["recall"], found["specificity"]) == (decision.recall, decision.specificity)
    assert decision.rule.aggregation == aggregation
    assert found["specificity"] >= 0.6


def test_a_threshold_is_refused_at_the_other_level():
    cases = Cases.of(WHOLE)
    for level, others in (("vertebra", cases.patients()), ("patient", cases)):
        decision = choose_decision(WHOLE, Rule("max_f1", level=level))
        message = rf"at {level} level, not at {others.level} level.*Rule\(…, level='{others.level}'"
        with pytest.raises(ValueError, match=message):
            apply_decision(decision, others)


def test_a_threshold_is_refused_with_another_aggregation():
    decision, cases = choose_decision(WHOLE, Rule("max_f1", level="patient")), Cases.of(WHOLE)
    assert decision.rule.aggregation == MAX
    with pytest.raises(ValueError, match=r"chosen with the aggregation .*max.*, not with .*noisy_or"):
        apply_decision(decision, cases.patients(Aggregation("noisy_or")))
    pd.testing.assert_frame_equal(apply_decision(decision, WHOLE), apply_decision(decision, cases.patients()))


def test_a_patient_decision_from_arrays_needs_its_aggregation_said():
    patients = Cases.of(VALIDATION).patients()
    decision = choose_threshold(patients.label, patients.probability, Rule("max_f1", level="patient"))
    with pytest.raises(ValueError, match=r"not say how the vertebrae of a patient become one probability"):
        apply_decision(decision, WHOLE)
    assert len(apply_decision(decision, patients)) == 400


def test_an_aggregation_belongs_to_patients_and_levels_are_two():
    with pytest.raises(ValueError, match="An aggregation belongs to the patient level"):
        Rule("max_f1", aggregation=MAX)
    with pytest.raises(ValueError, match="Unknown level 'all'"):
        Rule("max_f1", level="all")


def test_each_vertebra_keeps_the_floor_by_itself():
    decision = choose_per_vertebra(WHOLE, Rule(precision_floor=0.5), min_positives=10)
    assert list(decision.thresholds) == list(VERTEBRAE)
    called = apply_decision(decision, VALIDATION)
    for name, part in called.groupby("vertebra"):
        alone = choose_threshold(part["label"], part["probability"], Rule(precision_floor=0.5))
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
        choose_per_vertebra(few, Rule("max_f1"))
    with pytest.raises(ValueError, match="found C7 0 and 0"):
        choose_per_vertebra(WHOLE[WHOLE["vertebra"] != "C7"], Rule("max_f1"))


def test_a_vertebra_that_cannot_keep_the_floor_leaves_no_decision():
    noise = WHOLE.copy()
    third = noise["vertebra"] == "C3"
    noise.loc[third, "probability"] = np.where(noise.loc[third, "label"] == 1, 0.1, 0.9)
    decision = choose_per_vertebra(noise, Rule(precision_floor=0.5))
    assert (decision.threshold, decision.thresholds, decision.recall) == (None, None, 0)
    assert decision.reason.startswith("C3: No threshold keeps precision at 0.500 or above")
    with pytest.raises(ValueError, match=r"C3: No threshold.*Lower the precision floor"):
        apply_decision(decision, WHOLE)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (toy(split="test"), "no row of the split 'validation'"),
        (WHOLE.assign(probability=-0.1), r"no numbers in \[0, 1\]"),
        (WHOLE.assign(label=0), "All 2800 labels are 0"),
        (pd.concat([WHOLE, WHOLE[:1]]), "repeat StudyInstanceUID and vertebra"),
        (WHOLE.assign(split=["validation", "test"] * 2100), "more than one split"),
    ],
)
def test_tables_that_cannot_choose_are_refused(table, message):
    with pytest.raises(ValueError, match=message):
        choose_decision(table, Rule("max_f1"))


def test_a_threshold_that_rests_on_few_scores_says_so():
    rng = np.random.default_rng(0)
    table = WHOLE.assign(probability=rng.random(len(WHOLE)) * 0.9)  # a model that knows nothing …
    lucky = table.index[(table["label"] == 1) & (table["split"] == "validation")][:2]
    table.loc[lucky, "probability"] = [0.95, 0.96]  # … and was right twice
    decision = choose_decision(table, Rule(precision_floor=0.9))
    assert decision.threshold == 0.95
    assert decision.recall < 0.01
    assert decision.reason.endswith(
        "Only 2 cases lie at or above it: a threshold that rests on fewer than 10 is luck, not a policy."
    )
    assert "lie" not in choose_decision(table, Rule("max_f1")).reason
    each = choose_per_vertebra(table, Rule("max_precision", recall_floor=0.01), min_positives=10)
    counts = apply_decision(each, table[table["split"] == "validation"]).groupby("vertebra")
    few = counts["positive"].sum().loc[lambda n: n < 10].index.tolist()
    assert few
    assert [name for name in VERTEBRAE if f"{name}: Only" in each.reason] == few


@pytest.mark.parametrize(
    ("cases", "words"), [(0, "No case lies"), (1, "Only 1 case lies"), (9, "Only 9 cases")]
)
def test_a_stated_threshold_above_few_cases_says_so_and_one_above_ten_does_not(cases, words):
    labels, probabilities = [0, 1] * 20, np.append(np.full(40 - cases, 0.2), np.full(cases, 0.9))
    assert words in state_threshold(cases_of(labels, probabilities), 0.5, reason="By hand.").reason
    full = np.append(np.full(30, 0.2), np.full(10, 0.9))
    assert state_threshold(cases_of(labels, full), 0.5, reason="By hand.").reason == "By hand."
