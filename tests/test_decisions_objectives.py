from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cspine_helpers.decisions.thresholds import Rule, best_threshold, choose_threshold
from cspine_helpers.evaluation.competition import RSNA_COSTS
from cspine_helpers.metrics import threshold_counts

# Thresholds: 0.9: recall 1/3, precision 1, specificity 1; 0.8: 1/3, 1/2, 2/3; 0.7: 2/3, 2/3, 2/3;
# 0.4: 1, 3/5, 1/3; 0.1: 1, 3/6, 0
LABELS = [1, 0, 1, 0, 1, 0]
PROBABILITIES = [0.9, 0.8, 0.7, 0.4, 0.4, 0.1]
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
    objective = draw(st.sampled_from(sorted(SLOW)))
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


@pytest.mark.slow
@settings(max_examples=400)
@given(CASES, rules())
def test_every_choice_equals_an_exhaustive_search_in_fractions(cases, options):
    decision = choose_threshold(*zip(*[(label, score / 8) for label, score in cases], strict=True), **options)
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
    decision = choose_threshold(LABELS, PROBABILITIES, **options)
    assert (decision.threshold, decision.value) == (threshold, pytest.approx(value))
    assert reason in decision.reason


def test_costs_that_are_equal_as_decimals_are_a_tie():
    # 0.9: one miss, 0.3. 0.5: three alarms of 0.1 each, which floats sum to more than 0.3.
    labels, probabilities = [1, 0, 0, 0, 1], [0.9, 0.6, 0.6, 0.6, 0.5]
    decision = choose_threshold(
        labels, probabilities, objective="min_cost", cost_miss=0.3, cost_false_alarm=0.1
    )
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
    decision = choose_threshold(labels, probabilities, **options)
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
    row, _ = best_threshold(Rule(**options), threshold_counts(labels, scores / 100))
    assert isinstance(row, pd.Series)
    assert row["threshold"] == best[3] / 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "max_recall needs precision_floor or specificity_floor"),
        ({"recall_floor": 0.5}, "max_recall needs precision_floor or specificity_floor"),
        ({"objective": "max_precision"}, "max_precision needs recall_floor"),
        ({"precision_floor": 1.2}, r"precision_floor lies in \[0, 1\]; found 1.2"),
        ({"specificity_floor": float("nan")}, r"specificity_floor lies in \[0, 1\]"),
        ({"objective": "max_precision", "recall_floor": -0.1}, r"recall_floor lies in \[0, 1\]"),
        ({"objective": "max_luck"}, "Unknown objective 'max_luck'.*max_recall, max_f1"),
        ({"objective": "stated"}, "Unknown objective 'stated'"),
        ({"objective": "max_fbeta"}, "max_fbeta needs beta, a finite number above 0; found None"),
        ({"objective": "max_fbeta", "beta": 0.0}, "found 0.0"),
        ({"objective": "max_f1", "beta": 2.0}, "beta belongs to max_fbeta, not to max_f1"),
        ({"objective": "min_cost", "cost_miss": 1.0}, "min_cost needs cost_false_alarm"),
        ({"objective": "min_cost", "cost_miss": float("inf"), "cost_false_alarm": 1.0}, "needs cost_miss"),
        ({"objective": "max_youden", "cost_miss": 1.0}, "cost_miss belongs to min_cost"),
    ],
)
def test_rules_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        choose_threshold(LABELS, PROBABILITIES, **options)


def test_a_threshold_that_finds_nothing_never_qualifies_and_one_that_finds_a_single_fracture_does():
    labels, scores = [0, 1, *[0] * 9], [0.9, 0.5, *[0.6] * 9]
    none = choose_threshold(labels, scores, objective="max_recall", specificity_floor=0.9)
    assert none.threshold is None  # at 0.9 specificity is 0.9, and recall 0
    assert none.reason.startswith(
        "No threshold keeps specificity at 0.900 or above: the best reachable is 0.000"
    )
    one = choose_threshold([1, 0, 1, 0], [0.9, 0.5, 0.4, 0.1], objective="max_precision", recall_floor=0.5)
    assert (one.threshold, one.precision) == (0.9, 1)


@pytest.mark.parametrize("floors", [{}, {"precision_floor": 0.4}, {"recall_floor": 0.9}])
def test_calling_nobody_wins_only_where_it_is_cheaper_and_no_floor_asks_for_calls(floors):
    tie = {"objective": "min_cost", "cost_miss": 1.0, "cost_false_alarm": 1.0}
    decision = choose_threshold([1, 0], [0.5, 0.5], **tie, **floors)
    assert (decision.threshold, decision.value) == (0.5, 0.5)  # as dear as calling nobody
    dearer = choose_threshold([1, 0], [0.5, 0.5], **tie | {"cost_false_alarm": 2.0}, **floors)
    assert (dearer.threshold is None) == (not floors)
    assert dearer.reason.startswith("Calling nobody positive costs 0.5 a case") == (not floors)
