"""Thresholds: a rule says which one is best, a decision holds the rule, its threshold and what that reaches.

A threshold is chosen at one level, for vertebrae or for patients, and is refused at the other.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass, fields, replace
from fractions import Fraction
from numbers import Real
from typing import Any, NamedTuple, Self, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cspine_helpers.evaluation.cases import Aggregation, Cases, Level, check_choice
from cspine_helpers.files.records import Check, one_of, optional, setting, within
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.metrics import check_scores, confusion, rates, threshold_counts

STATED = "stated"  # in place of an objective, where a person or a guarantee gave the threshold
FEW_CALLED = 10  # cases; of fewer, the precision of a threshold hangs on single ones
MIN_POSITIVES = 20  # of a vertebra's own threshold; where 18 of 20 are found, 70 to 97 % may be (Wilson)


class Objective(NamedTuple):
    """What a threshold can be chosen for; another one needs nothing but its entry in `OBJECTIVES`.

    Attributes:
        title: in words; may name settings of the `rule`.
        value: what is maximised, (K,), of a rule and of tp, fp, fn and tn at K thresholds. The counts are
            Python's integers, so that fractions are exact until they are rounded, once, to floats.
        settings: fields of `Rule` that it needs and no other objective takes.
        floors: those of which it needs one, as its best threshold is trivial without.
    """

    title: str
    value: Callable[["Rule", NDArray, NDArray, NDArray, NDArray], NDArray]
    settings: tuple[str, ...] = ()
    floors: tuple[str, ...] = ()


def _f_beta(rule: "Rule", tp: NDArray, fp: NDArray, fn: NDArray, _: NDArray) -> NDArray:
    weight = _decimal(rule.beta) ** 2
    return (1 + weight) * tp / ((1 + weight) * tp + weight * fn + fp)


def _cost(rule: "Rule", misses: Any, alarms: Any, cases: Any) -> Any:
    """Expected cost a case, an exact fraction, or an array of them."""
    return (_decimal(rule.cost_miss) * misses + _decimal(rule.cost_false_alarm) * alarms) / cases


def _decimal(value: float | None) -> Fraction:
    """The number as it was written, 0.1 being one tenth."""
    assert value is not None, "a rule is checked when it is made"
    return Fraction(str(float(value)))


OBJECTIVES = {
    "max_recall": Objective(
        "Highest recall",
        lambda _, tp, fp, fn, tn: tp / (tp + fn),
        floors=("precision_floor", "specificity_floor"),
    ),
    "max_f1": Objective("Highest F1", lambda _, tp, fp, fn, tn: 2 * tp / (2 * tp + fp + fn)),
    "max_precision": Objective(
        "Highest precision", lambda _, tp, fp, fn, tn: tp / (tp + fp), floors=("recall_floor",)
    ),
    "max_fbeta": Objective("Highest F-beta (beta {rule.beta:g})", _f_beta, settings=("beta",)),
    "max_youden": Objective(
        "Highest Youden index",
        lambda _, tp, fp, fn, tn: (tp * (fp + tn) - fp * (tp + fn)) / ((tp + fn) * (fp + tn)),
    ),
    "min_cost": Objective(
        "Lowest expected cost (a miss {rule.cost_miss:g}, a false alarm {rule.cost_false_alarm:g})",
        lambda rule, tp, fp, fn, tn: -_cost(rule, fn, fp, tp + fp + fn + tn),
        settings=("cost_miss", "cost_false_alarm"),
    ),
}
_FLOORS = ("precision", "recall", "specificity")
_SHARE, _ABOVE_0 = optional(within("[0, 1]")), optional(within("(0, inf)"))


@dataclass(frozen=True)
class Rule:
    """How a threshold is chosen, and what it is for.

    Attributes:
        objective: one of `OBJECTIVES`, or `stated`: the threshold is given, not chosen.
        level: what the threshold applies to, `vertebra` or `patient`; `image` (or `study`) where predictions
            are of those.
        aggregation: at patient level, how the patients' probabilities are made; None: they come ready-made.
        precision_floor: the least precision that is allowed; None: any.
        recall_floor: the least recall that is allowed; None: any.
        specificity_floor: the least specificity that is allowed; None: any.
        beta: of `max_fbeta`; how many times as much recall counts as precision.
        cost_miss: of `min_cost`; what a missed fracture costs.
        cost_false_alarm: of `min_cost`; what a false alarm costs.

    Example:
        >>> Rule(precision_floor=0.5).title
        'Highest recall'

    Source: van Rijsbergen, Information Retrieval (1979), chapter 7 (F-beta); Youden, Cancer 3 (1950) 32-35.

    Raises:
        ValueError: a floor is outside [0, 1]; the objective lacks what it needs, or has what belongs to
            another one; there is an aggregation at vertebra level.
    """

    objective: str = setting("max_recall", one_of(*OBJECTIVES, STATED))
    _: KW_ONLY
    level: Level = setting("vertebra", one_of(*get_args(Level)))
    aggregation: Aggregation | None = setting(
        None, optional(Check("an Aggregation", lambda value: isinstance(value, Aggregation)))
    )
    precision_floor: float | None = setting(None, _SHARE)
    recall_floor: float | None = setting(None, _SHARE)
    specificity_floor: float | None = setting(None, _SHARE)
    beta: float | None = setting(None, _ABOVE_0)
    cost_miss: float | None = setting(None, _ABOVE_0)
    cost_false_alarm: float | None = setting(None, _ABOVE_0)

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, (*OBJECTIVES, STATED))
        check_choice("level", self.level, get_args(Level))
        if isinstance(self.aggregation, dict):  # from JSON
            object.__setattr__(self, "aggregation", Aggregation(**self.aggregation))
        if self.aggregation is not None and self.level != "patient":
            raise ValueError("An aggregation belongs to the patient level. Leave it out.")
        for name, floor in self.floors.items():
            if not 0 <= floor <= 1:
                raise ValueError(f"{name}_floor must be in [0, 1]; found {floor}. Give a fraction.")
        for owner, objective in OBJECTIVES.items():
            mine = self.objective == owner
            if mine and objective.floors and all(getattr(self, floor) is None for floor in objective.floors):
                raise ValueError(
                    f"{owner} needs {' or '.join(objective.floors)}: without one its best threshold calls "
                    "every case positive, or next to none."
                )
            for name in objective.settings:
                value = getattr(self, name)
                if not mine and value is not None:
                    raise ValueError(f"{name} belongs to {owner}, not to {self.objective}. Leave it out.")
                if mine and (value is None or not 0 < value < np.inf):
                    raise ValueError(
                        f"{owner} needs {name}, a finite number above 0; found {value}. Give one."
                    )

    @property
    def floors(self) -> dict[str, float]:
        """Rate → the least that is allowed."""
        floors = {name: getattr(self, f"{name}_floor") for name in _FLOORS}
        return {name: floor for name, floor in floors.items() if floor is not None}

    @property
    def title(self) -> str:
        """The objective in words."""
        if self.objective == STATED:
            return "Stated threshold"
        return OBJECTIVES[self.objective].title.format(rule=self)


@dataclass(frozen=True)
class Decision:
    """A threshold with the rule that chose it and what it reaches on the data that it was chosen on.

    Attributes:
        rule: what was asked for, and the level that the threshold applies to; it holds for no other.
        threshold: a case is positive when its probability is at or above it; None: none qualified, or there
            is one for each vertebra.
        recall: recall at the threshold; 0 where there is none, as nothing is found then.
        precision: precision at the threshold; 0 where there is none.
        reason: why this threshold, or why none; and how many cases it rests on where those are few.
        value: what the objective reaches: F-beta, the Youden index, the cost a case and so on; None where
            there is no threshold, or no objective.
        specificity: specificity at the threshold; 1 where there is none.
        cases: how many vertebrae or patients chose it.
        positives: how many of those are fractured.
        thresholds: vertebra → its own threshold; None: one for all.

    Example:
        >>> choose_decision(predictions, Rule("max_f1")).reason
        'Highest F1 among all 1400 thresholds.'
    """

    rule: Rule
    threshold: float | None
    recall: float
    precision: float
    reason: str
    value: float | None = None
    specificity: float | None = None
    cases: int | None = None
    positives: int | None = None
    thresholds: dict[str, float] | None = None

    def __post_init__(self) -> None:
        for threshold in (self.threshold, *(self.thresholds or {}).values()):
            if threshold is not None:
                check_threshold(threshold)
        level = self.rule.level
        if self.thresholds is not None and (
            set(self.thresholds) != set(VERTEBRAE) or level != "vertebra" or self.threshold is not None
        ):
            raise ValueError(
                "Thresholds of single vertebrae are those of C1 … C7, at vertebra level, without another; "
                f"found {list(self.thresholds)}, {level}, {self.threshold}. Use choose_per_vertebra."
            )

    def require(self) -> float:
        """The threshold.

        Raises:
            ValueError: there is none, or one for each vertebra; says why.
        """
        if self.thresholds is not None:
            raise ValueError("This decision has one threshold a vertebra. Use apply_decision(...).")
        if self.threshold is None:
            floors = " or ".join(f"the {name} floor" for name in self.rule.floors)
            lower = f"Lower {floors}, or use" if floors else "Use"
            raise ValueError(f"{self.reason} {lower} another objective.")
        return self.threshold

    def record(self) -> dict[str, Any]:
        """Plain values for JSON: the fields of the rule and those of the decision, side by side."""
        whole = asdict(self)
        return whole.pop("rule") | whole

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """The decision of a `record`; what an earlier version did not write yet is None.

        Raises:
            ValueError: it is no such record: says which fields are missing or unknown.
        """
        if not isinstance(record, Mapping):
            raise ValueError("its decision is no object.")
        names = [{each.name for each in fields(kind)} for kind in (Rule, cls)]
        missing = {"objective", "level", "threshold", "recall", "precision", "reason"} - set(record)
        problems = [f"decision.{name} is missing" for name in sorted(missing)]
        problems += [f"decision.{name} is unknown" for name in record if name not in set.union(*names)]
        if problems:
            raise ValueError(f"it is no whole decision: {'; '.join(problems)}.")
        rule, rest = ({name: record[name] for name in record if name in known} for known in names)
        return cls(Rule(**rule), **rest)


def check_threshold(threshold: float) -> None:
    """Refuse what is no threshold.

    Raises:
        ValueError: it is outside [0, 1], or NaN.
    """
    if not isinstance(threshold, Real) or not 0 <= float(threshold) <= 1:
        raise ValueError(f"A threshold must be in [0, 1]; found {threshold}. Choose it again.")


def choose_threshold(labels: ArrayLike, probabilities: ArrayLike, rule: Rule) -> Decision:
    """Choose the best threshold among all distinct probabilities.

    Only thresholds qualify that keep the rule's floors and find a positive. Ties: the higher recall, then the
    higher precision, then the higher threshold; numbers are compared exactly, the given ones as decimals.

    The decision has no threshold, and says what could be reached, where none qualifies, where no Youden index
    is above 0 (no better than chance), and where calling nobody positive costs less than any threshold (and
    no floor of precision or recall is asked for).

    Args:
        labels: (N,) of 0/1.
        probabilities: (N,) in [0, 1], of the rule's level.
        rule: what is best.

    Example:
        >>> choose_threshold([0, 1, 0, 1], [0.1, 0.4, 0.6, 0.8], Rule(precision_floor=0.6)).threshold
        0.4

    Raises:
        ValueError: see `metrics.check_scores`; one class is absent; the rule has no objective.
    """
    check_choice("objective", rule.objective, tuple(OBJECTIVES))
    y, p = check_scores(labels, probabilities, both_classes=True)
    best, reason = _best_threshold(rule, threshold_counts(y, p))
    if best is None:
        return Decision(rule, None, 0.0, 0.0, reason, None, 1.0, len(y), int(y.sum()))
    return _decision(rule, best, reason, threshold=float(best["threshold"]), value=float(best["value"]))


def choose_decision(predictions: pd.DataFrame, rule: Rule) -> Decision:
    """Choose a threshold on the validation split of a predictions table; other splits are not looked at.

    Where the rule names no aggregation of patients, the decision's has that of `Cases.patients`. Of a table
    of images, the decision is at level `image`, also where the rule names no level.

    Example:
        >>> choose_decision(predictions, Rule("max_f1")).rule.level
        'vertebra'

    Raises:
        ValueError: the table breaks the schema or has no validation rows; or as `choose_threshold`.
    """
    cases = Cases.of(predictions, split="validation", level=rule.level, aggregation=rule.aggregation)
    rule = replace(rule, level=cases.level, aggregation=cases.aggregation)
    return choose_threshold(cases.label, cases.probability, rule)


def choose_per_vertebra(
    predictions: pd.DataFrame, rule: Rule, *, min_positives: int = MIN_POSITIVES
) -> Decision:
    """Choose a threshold for each of C1 … C7, on the validation split of a predictions table.

    Each vertebra keeps the floors by itself. `recall`, `precision` and `specificity` of the decision are
    those of all vertebrae together. Where a vertebra has no threshold that qualifies, the decision has none.

    Args:
        predictions: predictions table; other splits are not looked at.
        rule: of each vertebra.
        min_positives: how many fractures, and how many intact vertebrae, each of C1 … C7 must have.

    Example:
        >>> list(choose_per_vertebra(predictions, Rule("max_f1"), min_positives=1).thresholds)[:2]
        ['C1', 'C2']

    Raises:
        ValueError: a vertebra has too few fractured or intact cases, with their counts; the table breaks the
            schema or has no validation rows; as `choose_threshold`.
    """
    cases = Cases.of(predictions, split="validation")
    if cases.level != "vertebra":
        raise ValueError(
            f"Thresholds of single vertebrae: these are {cases.plural}. Choose one for all of them."
        )
    parts = {name: cases.where(cases.unit == name) for name in VERTEBRAE}
    counts = {name: np.bincount(part.label, minlength=2) for name, part in parts.items()}
    if rare := [f"{name} {n[1]} and {n[0]}" for name, n in counts.items() if n.min() < min_positives]:
        raise ValueError(
            f"A threshold of its own needs {min_positives} fractured and {min_positives} intact cases of "
            f"each vertebra; found {', '.join(rare)}. Choose one for all vertebrae, or add studies."
        )
    single = {name: choose_threshold(part.label, part.probability, rule) for name, part in parts.items()}
    failed = [f"{name}: {one.reason}" for name, one in single.items() if one.threshold is None]
    thresholds = None if failed else {name: one.require() for name, one in single.items()}
    lowest = pd.Series(cases.unit).map(thresholds or dict.fromkeys(VERTEBRAE, np.inf))
    called = cases.with_probability(cases.probability >= lowest)
    counted = {name: called.probability[called.unit == name].sum() for name in VERTEBRAE}
    few = [f"{name}:{words}" for name, n in counted.items() if (words := few_called(n))]
    reason = " ".join(failed or [f"{rule.title} of each vertebra by itself.", *few])
    reached = rates(confusion(called.label, called.probability, 0.5)).iloc[0]
    return _decision(rule, reached, reason, threshold=None, thresholds=thresholds)


def state_threshold(cases: Cases, threshold: float, *, reason: str) -> Decision:
    """The decision for a threshold that was given: by a person, or by a method that guarantees something.

    Args:
        cases: at the level that it applies to.
        threshold: as given.
        reason: one sentence that says why this threshold.

    Raises:
        ValueError: one class is absent; the threshold is outside [0, 1], or `reason` is empty.
    """
    if not reason.strip():
        raise ValueError("A stated threshold needs its reason, one sentence. Say why this one.")
    y, p = check_scores(cases.label, cases.probability, both_classes=True)
    reached = rates(confusion(y, p, threshold)).iloc[0]
    rule = Rule(STATED, level=cases.level, aggregation=cases.aggregation)
    few = few_called(reached["tp"] + reached["fp"])
    return _decision(rule, reached, f"{reason}{few}", threshold=float(threshold))


def at_level_of(rule: Rule, cases: Cases) -> Cases:
    """The cases, vertebrae, at the level of a rule: themselves, or the patients by its aggregation.

    Raises:
        ValueError: the rule is of patients, and does not say how they are made; or see `Cases.patients`.
    """
    if rule.level == "patient" and rule.aggregation is None:
        raise ValueError(
            "The rule does not say how the vertebrae of a patient become one probability: it was chosen on "
            "arrays. Give it the aggregation that made them: Rule(..., level='patient', aggregation=...)."
        )
    return cases.patients(rule.aggregation) if rule.level == "patient" else cases


def apply_decision(decision: Decision, cases: Cases | pd.DataFrame) -> pd.DataFrame:
    """Call each vertebra, or each patient, positive or not.

    Args:
        decision: what to apply.
        cases: at the level of the decision's rule, patients by its aggregation; or a predictions table, of
            which those are made.

    Returns:
        `Cases.table` with the columns `threshold` and `positive` (bool).

    Example:
        >>> decision = choose_decision(predictions, Rule("max_f1"))
        >>> int(apply_decision(decision, predictions)["positive"].sum()) > 0
        True

    Raises:
        ValueError: the cases are of another level or aggregation; the decision has no threshold, or does not
            say how patients are made; the table breaks the schema.
    """
    rule = decision.rule
    if not isinstance(cases, Cases):
        cases = at_level_of(rule, Cases.of(cases))
    if cases.level != rule.level:
        raise ValueError(
            f"The decision holds at {rule.level} level, not at {cases.level} level: a threshold for one says "
            f"nothing about the other. Choose one with choose_decision(…, Rule(…, level={cases.level!r}))."
        )
    if None not in (cases.aggregation, rule.aggregation) and cases.aggregation != rule.aggregation:
        raise ValueError(
            f"The decision was chosen with the aggregation {rule.aggregation}, not with {cases.aggregation}. "
            "Make patients by the same, or choose a threshold for the other."
        )
    if decision.thresholds is not None:
        threshold = pd.Series(cases.unit).map(decision.thresholds).to_numpy(dtype=np.float64)
    else:
        threshold = np.full(len(cases), decision.require())
    return cases.table().assign(threshold=threshold, positive=cases.probability >= threshold)


def few_called(called: float) -> str:
    """A sentence, after another one, where fewer than ten cases lie at or above a threshold; else nothing."""
    if called >= FEW_CALLED:
        return ""
    lie = "Only 1 case lies" if called == 1 else f"Only {called:.0f} cases lie" if called else "No case lies"
    return f" {lie} at or above it: a threshold that rests on fewer than {FEW_CALLED} is luck, not a policy."


def _decision(rule: Rule, reached: pd.Series, reason: str, **facts: Any) -> Decision:
    """With the counts and rates of a row of `metrics.rates`; without an alarm, precision is 0."""
    positives = int(reached["tp"] + reached["fn"])
    return Decision(
        rule,
        recall=float(reached["recall"]),
        precision=float(np.nan_to_num(reached["precision"])),
        reason=reason,
        specificity=float(reached["specificity"]),
        cases=positives + int(reached["fp"] + reached["tn"]),
        positives=positives,
        **facts,
    )


def _best_threshold(rule: Rule, counts: pd.DataFrame) -> tuple[pd.Series | None, str]:
    """The best row of the table of `metrics.threshold_counts`, with the reason; None: no threshold qualifies.

    The row has the counts, the `metrics.rates` and `value`, which is what the objective reaches there.
    """
    table = rates(counts)
    whole = (table[name].to_numpy(dtype=object) for name in ("tp", "fp", "fn", "tn"))
    table["value"] = OBJECTIVES[rule.objective].value(rule, *whole).astype(np.float64)
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
        nobody = float(_cost(rule, positives, 0, cases))
        if nobody < best["value"] and not rule.precision_floor and not rule.recall_floor:
            return None, (
                f"Calling nobody positive costs {nobody:.4g} a case, less than any threshold does "
                f"({best['value']:.4g} at least)."
            )
    among = f"all {len(table)} thresholds"
    if rule.floors:
        among = f"the {len(allowed)} of {len(table)} thresholds with {_held(rule.floors)}"
    return best, f"{rule.title} among {among}.{few_called(best['tp'] + best['fp'])}"


def _keeps(table: pd.DataFrame, floors: dict[str, float]) -> pd.Series:
    return (table[list(floors)] >= pd.Series(floors, dtype=np.float64)).all(axis=1)


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
