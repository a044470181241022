"""Decisions on a predictions table: chosen on its validation split, applied at no other level than theirs.

Thresholds, and the reasons for them.

A threshold is chosen at one level, for vertebrae or for patients, and holds at no other: whatever applies a
decision says at which level, and is refused at the other (`levels` does that for predictions tables).

What a threshold is chosen for: objectives, floors, and the exact search over all distinct scores.
"""

from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cspine_helpers.evaluation.cases import (
    Aggregation,
    Level,
    at_level,
    check_choice,
    defined_levels,
    has_own_score,
    rows_at,
)
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.metrics import check_scores, confusion, rates, threshold_counts
from cspine_helpers.predictions import validate_predictions, validation_rows

Objective = Literal["max_recall", "max_f1", "max_precision", "max_fbeta", "max_youden", "min_cost"]
FEW_CALLED = 10  # cases; of fewer, the precision of a threshold hangs on single ones
_TITLES = {
    "max_recall": "Highest recall",
    "max_f1": "Highest F1",
    "max_precision": "Highest precision",
    "max_fbeta": "Highest F-beta (beta {rule.beta:g})",
    "max_youden": "Highest Youden index",
    "min_cost": "Lowest expected cost (a miss {rule.cost_miss:g}, a false alarm {rule.cost_false_alarm:g})",
}


@dataclass(frozen=True)
class Rule:
    """An objective with all that it needs; see `decisions.choose_threshold`.

    Attributes:
        objective: what is maximised, or for `min_cost` minimised.
        precision_floor: the least precision that is allowed; None: any.
        recall_floor: the least recall that is allowed; None: any.
        specificity_floor: the least specificity that is allowed; None: any.
        beta: of `max_fbeta`; how many times as much recall counts as precision.
        cost_miss: of `min_cost`; what a missed fracture costs.
        cost_false_alarm: of `min_cost`; what a false alarm costs.
    """

    objective: Objective = "max_recall"
    precision_floor: float | None = None
    recall_floor: float | None = None
    specificity_floor: float | None = None
    beta: float | None = None
    cost_miss: float | None = None
    cost_false_alarm: float | None = None

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, get_args(Objective))
        if self.objective == "max_recall" and self.precision_floor is None and self.specificity_floor is None:
            raise ValueError(
                "max_recall needs precision_floor or specificity_floor: "
                "without one it calls every case positive."
            )
        if self.objective == "max_precision" and self.recall_floor is None:
            raise ValueError(
                "max_precision needs recall_floor: without one it calls next to nothing positive."
            )
        for name, floor in self.floors.items():
            if not 0 <= floor <= 1:
                raise ValueError(f"{name}_floor lies in [0, 1]; found {floor}. Give a fraction.")
        owners = {"beta": "max_fbeta", "cost_miss": "min_cost", "cost_false_alarm": "min_cost"}
        for name, owner in owners.items():
            value = getattr(self, name)
            if self.objective != owner and value is not None:
                raise ValueError(f"{name} belongs to {owner}, not to {self.objective}. Leave it out.")
            if self.objective == owner and (value is None or not 0 < value < np.inf):
                raise ValueError(f"{owner} needs {name}, a finite number above 0; found {value}. Give one.")

    @property
    def floors(self) -> dict[str, float]:
        """Rate → the least that is allowed."""
        return floors_of(self)

    @property
    def title(self) -> str:
        """The objective in words."""
        return _TITLES[self.objective].format(rule=self)


def floors_of(rule: Any) -> dict[str, float]:
    """Rate → the least that is allowed, of anything with `precision_floor` and the like."""
    floors = {name: getattr(rule, f"{name}_floor") for name in ("precision", "recall", "specificity")}
    return {name: floor for name, floor in floors.items() if floor is not None}


def best_threshold(rule: Rule, counts: pd.DataFrame) -> tuple[pd.Series | None, str]:
    """The best row of the table of `metrics.threshold_counts`, with the reason; None: no threshold qualifies.

    The row has the counts, the `metrics.rates` and `value`, which is what the objective reaches there.
    """
    table = rates(counts)
    table["value"] = _values(rule, table)
    useful = table[table["tp"] > 0]
    allowed = useful[_keeps(useful, rule.floors)]
    if allowed.empty:
        return None, _unreachable(useful, rule.floors)
    best = _best(allowed, "value").copy()
    if rule.objective == "max_youden" and best["value"] <= 0:
        return None, f"No threshold is better than chance: the highest Youden index is {best['value']:.3f}."
    if rule.objective == "min_cost":
        best["value"] *= -1  # it was turned around, to be maximised
        positives, cases = int(best["tp"] + best["fn"]), int(best[["tp", "fp", "fn", "tn"]].sum())
        nobody = _cost(rule, positives, 0, cases)
        if nobody < best["value"] and not rule.precision_floor and not rule.recall_floor:
            return None, (
                f"Calling nobody positive costs {nobody:.4g} a case, less than any threshold does "
                f"({best['value']:.4g} at least)."
            )
    among = f"all {len(table)} thresholds"
    if rule.floors:
        among = f"the {len(allowed)} of {len(table)} thresholds with {_held(rule.floors)}"
    return best, f"{rule.title} among {among}.{few_called(best['tp'] + best['fp'])}"


def few_called(called: float) -> str:
    """A sentence, after another one, where fewer than ten cases lie at or above a threshold; else nothing."""
    if called >= FEW_CALLED:
        return ""
    lie = "Only 1 case lies" if called == 1 else f"Only {called:.0f} cases lie" if called else "No case lies"
    return f" {lie} at or above it: a threshold that rests on fewer than {FEW_CALLED} is luck, not a policy."


def _values(rule: Rule, table: pd.DataFrame) -> NDArray[np.float64]:
    """What is to be maximised, at each threshold; rounded once, so that equal fractions are equal floats."""
    if rule.objective in ("max_recall", "max_precision", "max_f1"):
        return table[rule.objective.removeprefix("max_")].to_numpy()
    tp, fp, fn, tn = (table[name].to_numpy(dtype=object) for name in ("tp", "fp", "fn", "tn"))
    if rule.objective == "max_youden":
        positives, negatives = tp + fn, fp + tn
        value = (tp * negatives - fp * positives) / (positives * negatives)
    elif rule.objective == "max_fbeta":
        squared = _decimal(rule.beta) ** 2
        more, less = squared.numerator, squared.denominator
        value = (more + less) * tp / ((more + less) * tp + more * fn + less * fp)
    else:
        value = -_cost(rule, fn, fp, tp + fp + fn + tn)
    return value.astype(np.float64)


def _cost(rule: Rule, misses: Any, alarms: Any, cases: Any) -> Any:
    """Expected cost a case, of whole numbers or object arrays of them."""
    miss, alarm = _decimal(rule.cost_miss), _decimal(rule.cost_false_alarm)
    whole = miss.denominator * alarm.denominator
    return (int(miss * whole) * misses + int(alarm * whole) * alarms) / (whole * cases)


def _decimal(value: float | None) -> Fraction:
    """The number as it was written, 0.1 being one tenth."""
    assert value is not None
    return Fraction(str(float(value)))


def _keeps(table: pd.DataFrame, floors: dict[str, float]) -> pd.Series:
    kept = pd.Series(True, index=table.index)
    for name, floor in floors.items():
        kept &= table[name] >= floor
    return kept


def _held(floors: dict[str, float]) -> str:
    return " and ".join(f"{name} at {floor:.3f} or above" for name, floor in floors.items())


def _unreachable(useful: pd.DataFrame, floors: dict[str, float]) -> str:
    """Why no threshold qualifies, and how far the first floor can be reached under the others."""
    name, *others = floors
    rest = {other: floors[other] for other in others}
    kept = useful[_keeps(useful, rest)]
    top = _best(useful if kept.empty else kept, name)
    where = f" with {_held(rest)}" if rest and not kept.empty else ""
    best = "the best reachable" if len(floors) == 1 else f"the best reachable {name}{where}"
    recall = "" if name == "recall" else f", with recall {top['recall']:.3f}"
    return f"No threshold keeps {_held(floors)}: {best} is {top[name]:.3f}{recall} at {top['threshold']:.4g}."


def _best(table: pd.DataFrame, column: str) -> pd.Series:
    """The row highest in `column`; ties: the higher recall, then precision, then threshold."""
    keys = [table[name].to_numpy() for name in ("threshold", "precision", "recall", column)]
    return table.iloc[np.lexsort(keys)[-1]]


@dataclass(frozen=True)
class Decision:
    """A threshold with what it was chosen for and what it reaches on the data that chose it.

    Attributes:
        threshold: a case is positive when its probability is at or above it; None: none qualified, or there
            is one for each vertebra.
        objective: what was maximised, see `choose_threshold`; `stated`: nothing, somebody gave the threshold.
        level: what the threshold applies to, `vertebra` or `patient`; it holds for no other.
        precision_floor: the least precision that was allowed; None: any.
        recall: recall at the threshold; 0 where there is none, as nothing is found then.
        precision: precision at the threshold; 0 where there is none.
        reason: why this threshold, or why none; and how many cases it rests on where those are few.
        recall_floor: the least recall that was allowed; None: any.
        specificity_floor: the least specificity that was allowed; None: any.
        beta: of `max_fbeta`; how many times as much recall counts as precision.
        cost_miss: of `min_cost`; what a missed fracture costs.
        cost_false_alarm: of `min_cost`; what a false alarm costs.
        value: what the objective reaches: F-beta, the Youden index, the cost a case and so on; None where
            there is no threshold, or no objective.
        specificity: specificity at the threshold; 1 where there is none.
        cases: how many vertebrae or patients chose it.
        positives: how many of those are fractured.
        thresholds: vertebra → its own threshold; None: one for all.
        aggregation: how the patients' probabilities are made; None at vertebra level, and where the patients'
            probabilities were handed in ready-made.
    """

    threshold: float | None
    objective: Objective | Literal["stated"]
    level: Level
    precision_floor: float | None
    recall: float
    precision: float
    reason: str
    recall_floor: float | None = None
    specificity_floor: float | None = None
    beta: float | None = None
    cost_miss: float | None = None
    cost_false_alarm: float | None = None
    value: float | None = None
    specificity: float | None = None
    cases: int | None = None
    positives: int | None = None
    thresholds: dict[str, float] | None = None
    aggregation: Aggregation | None = None

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, (*get_args(Objective), "stated"))
        check_choice("level", self.level, get_args(Level))
        for threshold in (self.threshold, *(self.thresholds or {}).values()):
            if threshold is not None and not 0 <= threshold <= 1:
                raise ValueError(f"A threshold lies in [0, 1]; found {threshold}. Choose it again.")
        if self.thresholds is not None and (
            set(self.thresholds) != set(VERTEBRAE) or self.level != "vertebra" or self.threshold is not None
        ):
            raise ValueError(
                "Thresholds of single vertebrae are those of C1 … C7, at vertebra level, without another; "
                f"found {list(self.thresholds)}, {self.level}, {self.threshold}. Use choose_per_vertebra."
            )
        if isinstance(self.aggregation, dict):  # from JSON
            object.__setattr__(self, "aggregation", Aggregation(**self.aggregation))
        if self.aggregation is not None and self.level != "patient":
            raise ValueError("An aggregation belongs to a decision at patient level. Leave it out.")

    def require(self) -> float:
        """The threshold.

        Raises:
            ValueError: there is none, or one for each vertebra; says why.
        """
        if self.thresholds is not None:
            raise ValueError("This decision has one threshold a vertebra. Use levels.apply_decision(...).")
        if self.threshold is None:
            floors = " or ".join(f"the {name} floor" for name in floors_of(self))
            lower = f"Lower {floors}, or use" if floors else "Use"
            raise ValueError(f"{self.reason} {lower} another objective.")
        return self.threshold


def choose_threshold(
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    objective: Objective = "max_recall",
    precision_floor: float | None = None,
    level: Level = "vertebra",
    aggregation: Aggregation | None = None,
    recall_floor: float | None = None,
    specificity_floor: float | None = None,
    beta: float | None = None,
    cost_miss: float | None = None,
    cost_false_alarm: float | None = None,
) -> Decision:
    """Choose the best threshold among all distinct probabilities.

    Objectives: `max_recall` (with a precision or specificity floor), `max_precision` (with a recall floor),
    `max_f1`, `max_fbeta` (with `beta`), `max_youden` (recall + specificity - 1) and `min_cost` (with
    `cost_miss` and `cost_false_alarm`). Each may be held to floors: only thresholds qualify whose precision,
    recall and specificity reach them, and that find a positive. Ties: the higher recall, then the higher
    precision, then the higher threshold; numbers are compared exactly, the given ones as decimals.

    The decision has no threshold, and says what could be reached, where none qualifies, where no Youden index
    is above 0 (no better than chance), and where calling nobody positive costs less than any threshold (and
    no floor of precision or recall is asked for).

    Args:
        labels: (N,) of 0/1.
        probabilities: (N,) in [0, 1].
        objective: what is maximised.
        precision_floor: the least precision that is allowed.
        level: what the probabilities are of, `vertebra` or `patient`.
        aggregation: how patients' probabilities were made, to be kept with the decision.
        recall_floor: the least recall that is allowed.
        specificity_floor: the least specificity that is allowed.
        beta: how many times as much recall counts as precision.
        cost_miss: what a missed fracture costs.
        cost_false_alarm: what a false alarm costs.

    Source: van Rijsbergen, Information Retrieval (1979), chapter 7 (F-beta); Youden, Cancer 3 (1950) 32-35.

    Raises:
        ValueError: see `metrics.check_scores`; one class is absent; a floor is outside [0, 1]; the objective
            lacks what it needs, or has what belongs to another one.
    """
    rule = Rule(
        objective, precision_floor, recall_floor, specificity_floor, beta, cost_miss, cost_false_alarm
    )
    y, p = check_scores(labels, probabilities, both_classes=True)
    best, reason = best_threshold(rule, threshold_counts(y, p))
    reached = {"recall": 0.0, "precision": 0.0, "specificity": 1.0}
    if best is not None:
        reached = {name: float(best[name]) for name in ("threshold", *reached, "value")}
    return Decision(
        **{"threshold": None} | asdict(rule) | reached,
        level=level,
        reason=reason,
        cases=len(y),
        positives=int(y.sum()),
        aggregation=aggregation,
    )


def state_threshold(
    labels: ArrayLike,
    probabilities: ArrayLike,
    threshold: float,
    *,
    reason: str,
    level: Level = "vertebra",
    aggregation: Aggregation | None = None,
) -> Decision:
    """The decision for a threshold that was given: by hand, or by a method that guarantees something.

    Raises:
        ValueError: see `metrics.check_scores`; one class is absent; the threshold is outside [0, 1], or
            `reason`, one sentence that says why this threshold, is empty.
    """
    if not reason.strip():
        raise ValueError("A stated threshold needs its reason, one sentence. Say why this one.")
    y, p = check_scores(labels, probabilities, both_classes=True)
    reached = rates(confusion(y, p, threshold)).iloc[0]
    return decision_of(
        reached,
        threshold=float(threshold),
        objective="stated",
        level=level,
        precision_floor=None,
        reason=f"{reason}{few_called(reached['tp'] + reached['fp'])}",
        aggregation=aggregation,
    )


def decision_of(reached: pd.Series, **facts: Any) -> Decision:
    """A decision of these facts, with the counts and rates of a row of `metrics.rates`.

    Where nothing is called positive, its precision is 0.
    """
    positives = int(reached["tp"] + reached["fn"])
    return Decision(
        recall=float(reached["recall"]),
        precision=float(np.nan_to_num(reached["precision"])),
        specificity=float(reached["specificity"]),
        cases=positives + int(reached["fp"] + reached["tn"]),
        positives=positives,
        **facts,
    )


# of a vertebra's own threshold; where 18 of 20 are found, 70 to 97 % of all may be (Wilson)
MIN_POSITIVES = 20


def choose_decision(
    predictions: pd.DataFrame, *, level: Level, aggregation: Aggregation | None = None, **options: Any
) -> Decision:
    """Choose a threshold on the validation split of a predictions table, at one level.

    Args:
        predictions: predictions table; other splits are not looked at.
        level: `vertebra`, one threshold for all of them, or `patient`.
        aggregation: how a patient's vertebrae become one probability; at patient level, and only there. The
            model's own score, where the table has it and nothing is given.
        options: objective, floors and so on, as `choose_threshold` takes them.

    Raises:
        ValueError: the table breaks the schema or has no validation rows; as `choose_threshold`; or there is
            an aggregation at vertebra level, or none at patient level.

    Example:
        >>> choose_decision(predictions, level="vertebra", objective="max_f1").threshold
    """
    table = validation_rows(predictions)
    if level == "patient" and aggregation is None and has_own_score(table):
        aggregation = Aggregation("own")
    rows = rows_at(table, level, aggregation)
    return choose_threshold(
        rows["label"], rows["probability"], level=level, aggregation=aggregation, **options
    )


def levels_to_decide(predictions: pd.DataFrame) -> tuple[Level, ...]:
    """The levels at which the validation split can choose: where it has both classes.

    Raises:
        ValueError: the table breaks the schema or has no validation rows.
    """
    defined = defined_levels(validation_rows(predictions))
    names: dict[Level, str] = {"vertebra": "all", "patient": "patient"}
    return tuple(level for level, name in names.items() if name in defined)


def choose_per_vertebra(
    predictions: pd.DataFrame, *, min_positives: int = MIN_POSITIVES, **options: Any
) -> Decision:
    """Choose a threshold for each of C1 … C7, on the validation split of a predictions table.

    Each vertebra keeps the floors by itself. `recall`, `precision` and `specificity` of the decision are
    those of all vertebrae together. Where a vertebra has no threshold that qualifies, the decision has none.

    Args:
        predictions: predictions table; other splits are not looked at.
        min_positives: how many fractures, and how many intact vertebrae, each of C1 … C7 must have.
        options: objective, floors and so on, as `choose_threshold` takes them.

    Raises:
        ValueError: a vertebra has too few fractured or intact cases, with their counts; the table breaks the
            schema or has no validation rows; as `choose_threshold`.
    """
    rule = asdict(Rule(**options))
    rows = at_level(validation_rows(predictions), "all")
    parts = {name: rows[rows["vertebra"] == name] for name in VERTEBRAE}
    counts = {name: np.bincount(part["label"], minlength=2) for name, part in parts.items()}
    if rare := [f"{name} {n[1]} and {n[0]}" for name, n in counts.items() if n.min() < min_positives]:
        raise ValueError(
            f"A threshold of its own needs {min_positives} fractured and {min_positives} intact cases of "
            f"each vertebra; found {', '.join(rare)}. Choose one for all vertebrae, or add studies."
        )
    single = {
        name: choose_threshold(part["label"], part["probability"], **rule) for name, part in parts.items()
    }
    failed = [f"{name}: {one.reason}" for name, one in single.items() if one.threshold is None]
    thresholds = None if failed else {name: one.require() for name, one in single.items()}
    called = rows["probability"] >= rows["vertebra"].map(thresholds or dict.fromkeys(VERTEBRAE, np.inf))
    counted = called.groupby(rows["vertebra"]).sum()
    few = [f"{name}:{words}" for name, n in counted.items() if (words := few_called(n))]
    return decision_of(
        rates(confusion(rows["label"], called, 0.5)).iloc[0],
        **rule,
        threshold=None,
        thresholds=thresholds,
        level="vertebra",
        reason=" ".join(failed or [f"{Rule(**rule).title} of each vertebra by itself.", *few]),
    )


def apply_decision(
    decision: Decision, predictions: pd.DataFrame, *, level: Level, aggregation: Aggregation | None = None
) -> pd.DataFrame:
    """Call each vertebra, or each patient, positive or not.

    Args:
        decision: what to apply.
        predictions: predictions table, of any splits.
        level: at which level; that of the decision.
        aggregation: at patient level, where the decision does not keep its own; never another one.

    Returns:
        The predictions, or at patient level the table of `aggregation.aggregate`, with the columns
        `threshold` and `positive` (bool).

    Raises:
        ValueError: the decision is of another level or aggregation, or has no threshold, or the table breaks
            the schema.
    """
    check_choice("level", level, get_args(Level))
    if level != decision.level:
        raise ValueError(
            f"The decision holds at {decision.level} level, not at {level} level: a threshold for one says "
            f"nothing about the other. Choose one with choose_decision(..., level={level!r})."
        )
    if None not in (aggregation, decision.aggregation) and aggregation != decision.aggregation:
        raise ValueError(
            f"The decision was chosen with the aggregation {decision.aggregation}, not with {aggregation}. "
            "Leave it out, or choose a threshold for the other."
        )
    rows = rows_at(validate_predictions(predictions), level, decision.aggregation or aggregation)
    if decision.thresholds is not None:
        threshold = rows["vertebra"].map(decision.thresholds).astype(np.float64)
    else:
        threshold = pd.Series(decision.require(), index=rows.index)
    return rows.assign(threshold=threshold, positive=rows["probability"] >= threshold)
