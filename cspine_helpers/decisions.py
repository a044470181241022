"""Thresholds, and the reasons for them."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from cspine_helpers.metrics import check_scores, rates, threshold_counts

Objective = Literal["max_recall", "max_f1"]
Level = Literal["vertebra", "patient"]


@dataclass(frozen=True)
class Decision:
    """A threshold with what it was chosen for and what it reaches on the data that chose it.

    Attributes:
        threshold: a case is positive when its probability is at or above it; None: none qualified.
        objective: what was maximised, `max_recall` or `max_f1`.
        level: what the threshold applies to, `vertebra` or `patient`; it holds for no other.
        precision_floor: the least precision that was allowed; None: any.
        recall: recall at the threshold; 0 where there is none, as nothing is found then.
        precision: precision at the threshold; 0 where there is none.
        reason: one sentence that says why this threshold, or why none.
    """

    threshold: float | None
    objective: Objective
    level: Level
    precision_floor: float | None
    recall: float
    precision: float
    reason: str

    def __post_init__(self) -> None:
        _check_choice("objective", self.objective, get_args(Objective))
        _check_choice("level", self.level, get_args(Level))
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"A threshold lies in [0, 1]; found {self.threshold}. Choose it again.")

    def require(self) -> float:
        """The threshold.

        Raises:
            ValueError: there is none; says why.
        """
        if self.threshold is None:
            raise ValueError(f"{self.reason} Lower the precision floor, or use another objective.")
        return self.threshold


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"Unknown {what} {value!r}. Choose one of {', '.join(choices)}.")


def choose_threshold(
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    objective: Objective = "max_recall",
    precision_floor: float | None = None,
    level: Level = "vertebra",
) -> Decision:
    """Choose the best threshold among all distinct probabilities.

    `max_recall` takes the highest recall, `max_f1` the highest F1, among the thresholds whose precision is
    at least `precision_floor`. Ties: the higher recall, then the higher precision, then the higher
    threshold. Where no threshold reaches the floor the decision has none, and says what could be reached.

    Raises:
        ValueError: see `metrics.check_scores`; one class is absent; `max_recall` without a floor (every
            case would be called positive), or a floor outside [0, 1].
    """
    _check_choice("objective", objective, get_args(Objective))
    if precision_floor is None and objective == "max_recall":
        raise ValueError("max_recall needs precision_floor: without one it calls every case positive.")
    if precision_floor is not None and not 0 <= precision_floor <= 1:
        raise ValueError(f"precision_floor lies in [0, 1]; found {precision_floor}. Give a fraction.")
    table = rates(threshold_counts(*check_scores(labels, probabilities, both_classes=True)))
    allowed = table if precision_floor is None else table[table["precision"] >= precision_floor]
    if allowed.empty:
        top = _best(table, "precision")
        return Decision(
            threshold=None,
            objective=objective,
            level=level,
            precision_floor=precision_floor,
            recall=0.0,
            precision=0.0,
            reason=f"No threshold keeps precision at {precision_floor:.3f} or above: the best reachable "
            f"is {top['precision']:.3f}, with recall {top['recall']:.3f} at {top['threshold']:.4g}.",
        )
    column, what = ("recall", "recall") if objective == "max_recall" else ("f1", "F1")
    best = _best(allowed, column)
    among = f"all {len(table)} thresholds"
    if precision_floor is not None:
        among = (
            f"the {len(allowed)} of {len(table)} thresholds with precision at {precision_floor:.3f} or above"
        )
    return Decision(
        threshold=float(best["threshold"]),
        objective=objective,
        level=level,
        precision_floor=precision_floor,
        recall=float(best["recall"]),
        precision=float(best["precision"]),
        reason=f"Highest {what} among {among}.",
    )


def _best(table: pd.DataFrame, column: str) -> pd.Series:
    """The row highest in `column`; ties: the higher recall, then precision, then threshold."""
    keys = [table[name].to_numpy() for name in ("threshold", "precision", "recall", column)]
    return table.iloc[np.lexsort(keys)[-1]]
