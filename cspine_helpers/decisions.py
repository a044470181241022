"""Thresholds, and the reasons for them.

A threshold is chosen at one level, for vertebrae or for patients, and holds at no other: whatever applies a
decision says at which level, and is refused at the other (`levels` does that for predictions tables).
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from cspine_helpers.aggregation import Aggregation
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.metrics import check_scores, confusion, rates, threshold_counts
from cspine_helpers.objectives import (
    Objective,
    Rule,
    best_threshold,
    check_choice,
    few_called,
    floors_of,
)

Level = Literal["vertebra", "patient"]


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
