from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna
from hypothesis import given
from hypothesis import strategies as st

from cspine_helpers.decisions import Decision, choose_threshold
from cspine_helpers.labels import read_labels
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


def test_a_decision_survives_json_fields():
    decision = choose_threshold(LABELS, PROBABILITIES, precision_floor=0.6)
    assert Decision(**asdict(decision)) == decision


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "max_recall needs precision_floor"),
        ({"precision_floor": 1.2}, r"precision_floor lies in \[0, 1\]; found 1.2"),
        ({"precision_floor": float("nan")}, r"precision_floor lies in \[0, 1\]"),
        ({"objective": "max_luck"}, "Unknown objective 'max_luck'.*max_recall, max_f1"),
        ({"precision_floor": 0.5, "level": "C3"}, "Unknown level 'C3'.*vertebra, patient"),
    ],
)
def test_unusable_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        choose_threshold(LABELS, PROBABILITIES, **options)


def test_one_class_alone_gives_no_threshold():
    with pytest.raises(ValueError, match="All 2 labels are 0"):
        choose_threshold([0, 0], [0.1, 0.2], precision_floor=0.5)


def test_a_threshold_outside_0_to_1_is_no_decision():
    decision = choose_threshold(LABELS, PROBABILITIES, precision_floor=0.6)
    with pytest.raises(ValueError, match="lies in"):
        replace(decision, threshold=1.5)
