"""What a threshold is chosen for: objectives, floors, and the exact search over all distinct scores."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cspine_helpers.competition import PATIENT_WEIGHT, VERTEBRA_WEIGHT
from cspine_helpers.metrics import rates

Objective = Literal["max_recall", "max_f1", "max_precision", "max_fbeta", "max_youden", "min_cost"]

# An example of costs: level → what the loss of RSNA 2022 weighs a miss and a false alarm with.
RSNA_COSTS = {
    level: {"cost_miss": 2 * weight, "cost_false_alarm": weight}
    for level, weight in (("vertebra", VERTEBRA_WEIGHT), ("patient", PATIENT_WEIGHT))
}

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


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        ValueError: names them.
    """
    if value not in choices:
        raise ValueError(f"Unknown {what} {value!r}. Choose one of {', '.join(choices)}.")


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
