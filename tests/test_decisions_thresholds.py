import json
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna
from hypothesis import given
from hypothesis import strategies as st

from cspine_helpers.decisions.thresholds import Decision, choose_threshold, state_threshold
from cspine_helpers.evaluation.cases import Aggregation
from cspine_helpers.labels import VERTEBRAE, read_labels
from cspine_helpers.predictions import from_wide

# Thresholds, recall, precision: 0.9: 1/3, 1; 0.8: 1/3, 1/2; 0.7: 2/3, 2/3; 0.4: 1, 3/5; 0.1: 1, 3/6
LABELS = [1, 0, 1, 0, 1, 0]
PROBABILITIES = [0.9, 0.8, 0.7, 0.4, 0.4, 0.1]
CASES = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 8)), min_size=2, max_size=40).filter(
    lambda cases: len({label for label, _ in cases}) == 2
)


def slow_choice(labels, probabilities, floor):
    """(recall, precision, threshold) of the best qualifying threshold, straight from the definition."""
    options = []
    for threshold in set(probabilities):
        called = probabilities >= threshold
        hits = (called & (labels == 1)).sum()
        if hits / called.sum() >= floor:
            options.append((hits / (labels == 1).sum(), hits / called.sum(), threshold))
    return max(options, default=None)


@pytest.mark.parametrize(
    ("floor", "threshold", "recall", "precision"),
    [(0.0, 0.4, 1, 3 / 5), (0.6, 0.4, 1, 3 / 5), (0.61, 0.7, 2 / 3, 2 / 3), (1.0, 0.9, 1 / 3, 1)],
)
def test_highest_recall_at_or_above_the_floor(floor, threshold, recall, precision):
    decision = choose_threshold(LABELS, PROBABILITIES, precision_floor=floor)
    assert (decision.threshold, decision.recall, decision.precision) == (threshold, recall, precision)
    assert decision.require() == threshold
    assert "Highest recall" in decision.reason


@given(CASES, st.integers(0, 20))
def test_choice_equals_an_exhaustive_search_with_its_ties(cases, twentieths):
    labels = np.array([label for label, _ in cases])
    probabilities = np.array([score for _, score in cases]) / 8
    decision = choose_threshold(labels, probabilities, precision_floor=twentieths / 20)
    best = slow_choice(labels, probabilities, twentieths / 20)
    if best is None:
        assert decision.threshold is None
    else:
        assert (decision.recall, decision.precision, decision.threshold) == best


def test_no_threshold_reaches_the_floor():
    decision = choose_threshold([0, 1, 0], [0.9, 0.5, 0.2], precision_floor=0.6)
    assert decision.threshold is None
    assert decision.recall == decision.precision == 0
    assert "best reachable is 0.500, with recall 1.000 at 0.5" in decision.reason
    with pytest.raises(ValueError, match=r"No threshold keeps precision.*Lower the precision floor"):
        decision.require()


def test_max_f1_without_and_with_a_floor():
    free = choose_threshold(LABELS, PROBABILITIES, objective="max_f1")
    assert (free.threshold, free.recall) == (0.4, 1)
    held = choose_threshold(LABELS, PROBABILITIES, objective="max_f1", precision_floor=0.65)
    assert (held.threshold, held.recall) == (0.7, 2 / 3)


def test_equal_f1_takes_the_higher_recall():
    # 0.9: 1 of 1 called right, recall 1/3, F1 1/2. 0.1: 3 of 9 right, recall 1, F1 1/2.
    labels, probabilities = [1, 0, 0, 0, 0, 0, 0, 1, 1], [0.9, *[0.5] * 6, 0.1, 0.1]
    decision = choose_threshold(labels, probabilities, objective="max_f1")
    assert (decision.threshold, decision.recall) == (0.1, 1)


def test_equal_recall_takes_the_higher_threshold():
    decision = choose_threshold([1, 0, 0], [0.8, 0.5, 0.3], precision_floor=0.0)
    assert decision.threshold == 0.8


def test_all_probabilities_equal_leave_one_threshold():
    decision = choose_threshold([1, 0], [0.3, 0.3], precision_floor=0.5)
    assert (decision.threshold, decision.recall, decision.precision) == (0.3, 1, 0.5)


@needs_rsna
@pytest.mark.parametrize("floor", [0.15, 0.3, 0.6, 0.99])
def test_choice_on_real_predictions_equals_an_exhaustive_search(floor):
    wide = pd.read_csv(RSNA / "oof_predictions.csv", dtype={"uid": str})
    real = from_wide(wide[:250], read_labels(RSNA / "train.csv"), "validation", missing="drop")
    labels, probabilities = real["label"].to_numpy(), real["probability"].to_numpy()
    decision = choose_threshold(labels, probabilities, precision_floor=floor)
    best = slow_choice(labels, probabilities, floor)
    if best is None:
        assert decision.threshold is None
    else:
        assert (decision.recall, decision.precision, decision.threshold) == best


def test_a_decision_survives_json():
    for decision in (
        choose_threshold(LABELS, PROBABILITIES, precision_floor=0.6),
        choose_threshold([0, 1, 0], [0.9, 0.5, 0.2], precision_floor=0.6),
        choose_threshold(
            LABELS, PROBABILITIES, objective="max_f1", level="patient", aggregation=Aggregation("top_k", k=2)
        ),
        replace(
            choose_threshold(LABELS, PROBABILITIES, objective="max_f1"),
            threshold=None,
            thresholds=dict.fromkeys(VERTEBRAE, 0.5),
        ),
    ):
        assert Decision(**asdict(decision)) == decision
        assert Decision(**json.loads(json.dumps(asdict(decision)))) == decision


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
    assert Decision(**record).require() == 0.32


def test_a_stated_threshold_says_what_it_reaches():
    decision = state_threshold(LABELS, PROBABILITIES, 0.75, reason="Chosen by hand.", level="patient")
    assert (decision.objective, decision.level, decision.threshold) == ("stated", "patient", 0.75)
    assert (decision.recall, decision.precision, decision.specificity) == (1 / 3, 1 / 2, 2 / 3)
    assert (decision.cases, decision.positives, decision.value) == (6, 3, None)
    assert state_threshold(LABELS, PROBABILITIES, 1.0, reason="Nobody.").precision == 0


@pytest.mark.parametrize(
    ("threshold", "reason", "message"),
    [
        (1.5, "By hand.", r"lies in \[0, 1\]; found 1.5"),
        (float("nan"), "By hand.", "threshold is missing"),
        (0.5, " ", "needs its reason"),
    ],
)
def test_a_stated_threshold_that_is_none_is_refused(threshold, reason, message):
    with pytest.raises(ValueError, match=message):
        state_threshold(LABELS, PROBABILITIES, threshold, reason=reason)


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
        choose_threshold(labels, probabilities, precision_floor=0.5)
    with pytest.raises(ValueError, match=message):
        state_threshold(labels, probabilities, 0.5, reason="By hand.")


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match=r"Unknown level 'C3'.*vertebra, patient"):
        choose_threshold(LABELS, PROBABILITIES, precision_floor=0.5, level="C3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 1.5}, r"lies in \[0, 1\]; found 1.5"),
        ({"threshold": None, "thresholds": dict.fromkeys(VERTEBRAE, 2.0)}, r"lies in \[0, 1\]; found 2"),
        ({"threshold": None, "thresholds": {"C1": 0.5}}, r"those of C1 … C7.*found \['C1'\]"),
        ({"thresholds": dict.fromkeys(VERTEBRAE, 0.5)}, "without another"),
        (
            {"threshold": None, "thresholds": dict.fromkeys(VERTEBRAE, 0.5), "level": "patient"},
            "vertebra level",
        ),
        ({"aggregation": Aggregation()}, "belongs to a decision at patient level"),
        ({"objective": "max_luck"}, "Unknown objective 'max_luck'"),
    ],
)
def test_other_fields_are_no_decision(changes, message):
    decision = choose_threshold(LABELS, PROBABILITIES, precision_floor=0.6)
    with pytest.raises(ValueError, match=message):
        replace(decision, **changes)


def test_one_threshold_is_not_asked_of_seven():
    decision = choose_threshold(LABELS, PROBABILITIES, objective="max_f1")
    decision = replace(decision, threshold=None, thresholds=dict.fromkeys(VERTEBRAE, 0.5))
    with pytest.raises(ValueError, match=r"one threshold a vertebra\. Use levels\.apply_decision"):
        decision.require()
