"""Which triage is best on validation, and whether deferral is worth anything: a search that can lose.

Tried is each guarantee's p_low without deferral, and with each confidence, α and share of suspected cases
that a cut defers. A setting is judged on patients whom neither the confidence's fit nor its cut has seen, and
wins only where it beats no deferral there; ties go to less deferral, then to the plainer confidence. What
choosing itself is worth is a row of its own: each part of the patients answered by what wins among others.

p_low stays that of its guarantee, in every fold: what deferral gains at one p_low is held out, which of two
p_lows costs less is judged by the patients who set them. Where several are tried, the winner's was picked by
a look at the data: it holds with 1 − δ where they share δ (Bonferroni), as those of `shared_guarantees` do.

Source: the cost of a deferral, Chow, IEEE Transactions on Information Theory 16 (1970).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cspine_helpers.decisions.confidence import (
    ALPHAS,
    CONFIDENCES,
    Confidence,
    fit_confidence,
    needs_alpha,
    usable,
)
from cspine_helpers.decisions.guarantees import Guarantee, RecallTarget, guarantee_on_validation
from cspine_helpers.decisions.triage import Triage, triage_rates
from cspine_helpers.evaluation.calibration import patient_folds
from cspine_helpers.evaluation.cases import Aggregation, Cases, check_choice
from cspine_helpers.evaluation.selective import checked_confidences

Floats = NDArray[np.float64]
OBJECTIVES = ("cost", "accuracy", "f1")
DEFERRED = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # shares of the suspected cases
NO_DEFERRAL, SETTING, SEARCH = "no deferral", "setting", "search"  # kinds of rows
_RATES = (
    *("coverage", "accuracy", "precision", "recall", "f1"),
    *("recall_deferred_found", "recall_deferred_lost", "fractures_among_deferred"),
)
_SAME = 1e-12


@dataclass(frozen=True)
class SearchRule:
    """What a triage is best by.

    Attributes:
        objective: `cost`, the lowest expected cost a case; `accuracy` or `f1`, the highest of the confident
            cases.
        cost_miss: of a fracture called negative.
        cost_false_alarm: of an intact case called positive.
        cost_deferral: of a case that a reader decides; below a false alarm's, or deferral never pays.
        coverage_floor: the least share of cases that are answered. `accuracy` and `f1` need one: without it
            the best triage answers hardly anybody.

    Example:
        >>> SearchRule("accuracy", coverage_floor=0.8).title
        'highest accuracy of confident cases, coverage at 0.8 or above'

    Raises:
        ValueError: an unknown objective; a cost that is not above 0; a floor outside [0, 1], or none where
            one is needed.
    """

    objective: str = "cost"
    cost_miss: float = 10.0
    cost_false_alarm: float = 1.0
    cost_deferral: float = 0.5
    coverage_floor: float | None = None

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        for name in ("cost_miss", "cost_false_alarm", "cost_deferral"):
            cost = getattr(self, name)
            if not isinstance(cost, Real) or not 0 < float(cost) < np.inf:
                raise ValueError(f"{name} is a finite number above 0; found {cost!r}. Correct it.")
        floor = self.coverage_floor
        if floor is None and self.objective != "cost":
            raise ValueError(
                f"{self.objective} of confident cases needs a coverage_floor, as few answers are easily "
                "right. Give the least share of cases to be answered, such as 0.8."
            )
        if floor is not None and not 0 <= floor <= 1:
            raise ValueError(f"coverage_floor is in [0, 1]; found {floor}. Give a fraction.")

    @property
    def title(self) -> str:
        """The rule in words."""
        floor = "" if self.coverage_floor is None else f", coverage at {self.coverage_floor:g} or above"
        if self.objective == "cost":
            return (
                f"lowest expected cost a case (a miss {self.cost_miss:g}, a false alarm "
                f"{self.cost_false_alarm:g}, a deferral {self.cost_deferral:g}){floor}"
            )
        return f"highest {self.objective} of confident cases{floor}"

    def value(self, labels: NDArray, answers: NDArray[np.str_]) -> float:
        """What answers (N,) to cases with these labels reach: more is better; NaN where it is undefined."""
        if self.objective != "cost":
            return triage_rates(labels, answers)[self.objective]
        cost = self.cost_miss * (answers == "negative") * labels
        cost = cost + self.cost_false_alarm * (answers == "positive") * (1 - labels)
        return -float((cost + self.cost_deferral * (answers == "inconclusive")).mean())

    def allows(self, answers: NDArray[np.str_]) -> bool:
        """Whether enough cases are answered."""
        return (
            self.coverage_floor is None or (answers != "inconclusive").mean() >= self.coverage_floor - _SAME
        )


def shared_guarantees(
    predictions: pd.DataFrame,
    recalls: Iterable[float],
    *,
    level: str,
    delta: float = 0.1,
    aggregation: Aggregation | None = None,
) -> list[Guarantee]:
    """Guarantees of several recalls that share δ, so that whichever is picked holds with 1 − δ.

    Args:
        predictions: predictions table; only validation is looked at.
        recalls: to be guaranteed, one or more.
        level: see `RecallTarget`.
        delta: of all of them together.
        aggregation: see `RecallTarget`.

    Returns:
        Those that have a threshold, each made with its part of δ; of equal thresholds that of most recall.

    Example:
        >>> found = shared_guarantees(predictions, [0.5, 0.7], level="patient")
        >>> [(each.target.recall, each.target.delta) for each in found]
        [(0.5, 0.05), (0.7, 0.05)]

    Raises:
        ValueError: none has a threshold; says why. See `guarantee_on_validation`.
    """
    asked = sorted(set(recalls))
    if not asked:
        raise ValueError("A search needs a recall to guarantee; found none. Give one, such as 0.9.")
    targets = [
        RecallTarget(recall, level=level, delta=delta / len(asked), aggregation=aggregation)
        for recall in asked
    ]
    made = [guarantee_on_validation(predictions, target) for target in targets]
    by_threshold = {each.threshold: each for each in made if each.threshold is not None}  # recalls rise
    if by_threshold:
        return list(by_threshold.values())
    made[0].require()
    raise AssertionError("a guarantee without a threshold says so")


def patient_confidence(cases: Cases, confidence: ArrayLike, p_low: float) -> Floats:
    """The confidence of each patient: of the surest suspected vertebra, −∞ where none is suspected.

    A patient is positive just where one vertebra at or above p_low is sure enough, whatever the cut: so this
    orders patients as `patient_answers` answers them. In the order of `cases.patients()`.

    Args:
        cases: all vertebrae, n of them.
        confidence: (n,)
        p_low: at or above it a vertebra is suspected.

    Example:
        >>> cases = Cases.of(predictions, split="validation")
        >>> len(patient_confidence(cases, cases.probability, 0.2)) == len(cases.patients())
        True

    Raises:
        ValueError: a confidence is missing; these are patients or images.
    """
    sure = checked_confidences(confidence, len(cases))
    suspected = np.where(cases.probability >= p_low, sure, -np.inf)
    return np.nanmax(cases.wide(suspected), axis=1)


class Answered(NamedTuple):
    """Patients by their vertebrae, or other cases, with all that an answer depends on.

    Attributes:
        labels: (N,) of 0/1.
        below: (N,) below p_low.
        confidence: (N,) of the case, or `patient_confidence`.
    """

    labels: NDArray[np.int_]
    below: NDArray[np.bool_]
    confidence: Floats

    @classmethod
    def of(cls, cases: Cases, confidence: Floats, p_low: float, *, by_vertebra: bool) -> "Answered":
        """Of cases; patients, where vertebrae answer for them."""
        if by_vertebra:
            confidence = patient_confidence(cases, confidence, p_low)
            cases = cases.patients(Aggregation("max"))
        return cls(cases.label, cases.probability < p_low, confidence)

    def cut(self, deferred: float) -> float | None:
        """The cut that defers a share of the suspected; None: nobody suspected is sure of anything."""
        sure = np.sort(self.confidence[~self.below])
        sure = sure[int(deferred * len(sure) + 1e-9) :]
        finite = sure[np.isfinite(sure)]
        return float(finite[0]) if len(finite) else None

    def answers(self, cut: float | None) -> NDArray[np.str_]:
        """As `Triage.answers` and `patient_answers`; None: without deferral."""
        sure = True if cut is None else self.confidence >= cut
        return np.where(self.below, "negative", np.where(sure, "positive", "inconclusive"))


class _Setting(NamedTuple):
    """A setting of the grid, and what it answers.

    Attributes:
        row: its settings, as the table has them.
        whole: answers to everybody, the cut of all.
        others: value among the patients outside each part, of the cut that is theirs; −∞ where not allowed.
        held_out: answers to each part by the cut of the others.
    """

    row: dict[str, Any]
    whole: NDArray[np.str_]
    others: list[float]
    held_out: list[NDArray[np.str_]]


def search_triage(
    cases: Cases,
    guarantees: Guarantee | Sequence[Guarantee],
    features: pd.DataFrame | None = None,
    *,
    rule: SearchRule | None = None,
    names: Sequence[str] | None = None,
    alphas: Sequence[float] = ALPHAS,
    deferred: Sequence[float] = DEFERRED,
    folds: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Every setting of a grid on validation, the honest winner, and no deferral beside them.

    Args:
        cases: of validation: those that are answered. With a guarantee for patients by the highest vertebra
            these are vertebrae, and patients are judged, answered as `patient_answers` does.
        guarantees: whose thresholds are tried as p_low, see `shared_guarantees`.
        features: as `fit_confidence` takes them.
        rule: what is best; None: `SearchRule()`.
        names: of confidences; None: all that these features allow.
        alphas: of those that take one.
        deferred: shares of the suspected cases that cuts defer.
        folds: parts of the patients.
        seed: of the dealing.

    Returns:
        One row a setting: `kind` ("no deferral", "setting", or "search", what choosing itself is worth),
        `guaranteed` (recall), `p_low`, `confidence`, `alpha`, `deferred` (share aimed at), `cut`, `value`
        (of the rule, more is better) and rates of `triage_rates`, all fitted, cut and judged on the same
        patients, as the frozen triage will reach; `held_out_value` and the same rates, each part of the
        patients judged by fit and cut of the others; `winner` (1: the highest held out, no "search").

    Raises:
        ValueError: cases of another split or level; no positive in validation; no guarantee; a confidence
            needs features that are missing; shares outside (0, 1).

    Example:
        >>> cases = Cases.of(predictions, split="validation")
        >>> made = shared_guarantees(predictions, [0.7], level="patient")
        >>> table = search_triage(cases, made, names=["distance"], deferred=[0.2])
        >>> table["kind"].tolist(), int(table["winner"].sum())
        (['no deferral', 'setting', 'search'], 1)
    """
    rule = rule or SearchRule()
    made = [guarantees] if isinstance(guarantees, Guarantee) else list(guarantees)
    by_vertebra = _check(cases, made, deferred, folds)
    names = usable(features) if names is None else [names] if isinstance(names, str) else names
    judged = cases.patients(Aggregation("max")) if by_vertebra else cases
    fold = patient_folds(cases, folds, seed)
    of_judged = patient_folds(judged, folds, seed)  # the same dealing: each patient's fold
    settings = [
        setting
        for guarantee in made
        for setting in _settings(
            cases, fold, guarantee, features, rule, names, alphas, deferred, folds, by_vertebra=by_vertebra
        )
    ]

    def pooled(parts: list[NDArray[np.str_]]) -> NDArray[np.str_]:
        found = np.empty(len(judged), dtype="<U12")
        for each, part in enumerate(parts):
            found[of_judged == each] = part
        return found

    rows = []
    for setting in settings:
        held_out = pooled(setting.held_out)
        rows.append(
            setting.row
            | _measured(rule, judged.label, setting.whole, "")
            | _measured(rule, judged.label, held_out, "held_out_")
            | {"allowed": rule.allows(held_out)}
        )
    best_of_others = [int(np.argmax([each.others[k] for each in settings])) for k in range(folds)]
    chosen = pooled([settings[best].held_out[k] for k, best in enumerate(best_of_others)])
    rows.append({"kind": SEARCH} | _measured(rule, judged.label, chosen, "held_out_"))
    table = pd.DataFrame(rows)
    score = np.where(table.pop("allowed").fillna(False).astype(bool), table["held_out_value"], -np.inf)
    best = np.flatnonzero(score >= np.nanmax(score) - _SAME)
    first = best[np.argmax(table["held_out_coverage"].to_numpy()[best])]
    return table.assign(winner=(np.arange(len(table)) == first).astype(int))


def winner_of(
    table: pd.DataFrame,
    cases: Cases,
    guarantees: Guarantee | Sequence[Guarantee],
    features: pd.DataFrame | None = None,
) -> tuple[Triage, Confidence | None]:
    """The triage that won a search, and its confidence fitted on all of validation; None: no deferral won.

    Args:
        table: of `search_triage`.
        cases: as there.
        guarantees: as there.
        features: as there.

    Raises:
        ValueError: the table has no winner, or several; no guarantee has the winner's p_low.

    Example:
        >>> cases = Cases.of(predictions, split="validation")
        >>> made = shared_guarantees(predictions, [0.7], level="patient")
        >>> table = search_triage(cases, made, names=["distance"], deferred=[0.2])
        >>> winner_of(table, cases, made)[0].level
        'patient'
    """
    if (table["winner"] == 1).sum() != 1:
        raise ValueError(
            f"A search has one winner; found {(table['winner'] == 1).sum()}. Pass the whole table of "
            "search_triage(...)."
        )
    row = table[table["winner"] == 1].iloc[0]
    made = [guarantees] if isinstance(guarantees, Guarantee) else list(guarantees)
    found = [each for each in made if each.threshold == row["p_low"]]
    if not found:
        raise ValueError(
            f"The winner's p_low is {row['p_low']}, which none of {len(made)} guarantees gives. Pass those "
            "that were searched."
        )
    by_vertebra = _by_vertebra(cases, found[0])
    if row["kind"] == NO_DEFERRAL:
        return Triage(found[0], by_vertebra=by_vertebra), None
    options = {"alpha": float(row["alpha"])} if needs_alpha(row["confidence"]) else {}
    fit = fit_confidence(row["confidence"], cases, features, p_low=row["p_low"], **options)
    triage = Triage(found[0], fit.name, float(row["cut"]), settings=fit.record(), by_vertebra=by_vertebra)
    return triage, fit


def _check(cases: Cases, made: list[Guarantee], deferred: Sequence[float], folds: int) -> bool:
    """Refuse what cannot be searched; whether vertebrae answer for patients."""
    positives = int(cases.require("validation").label.sum())
    if not made:
        raise ValueError("A search needs a guarantee, as p_low is never typed. See shared_guarantees(...).")
    if positives == 0:
        raise ValueError(
            f"None of {len(cases)} {cases.plural} of validation is fractured, so that no triage can be "
            "judged. Use more studies."
        )
    if wrong := [share for share in deferred if not 0 < share < 1]:
        raise ValueError(
            f"A share of the suspected to defer lies between 0 and 1; found {wrong[0]}. No deferral is tried "
            "in any case, and deferring all answers nobody."
        )
    found = {_by_vertebra(cases, each) for each in made}
    if len(found) > 1 or (not found.pop() and any(each.target.level != cases.level for each in made)):
        levels = ", ".join(sorted({each.target.level for each in made}))
        raise ValueError(
            f"These cases are {cases.plural}; the guarantees are of level {levels}. Pass the cases that are "
            "answered: of patients by the highest vertebra, the vertebrae."
        )
    return _by_vertebra(cases, made[0])


def _by_vertebra(cases: Cases, guarantee: Guarantee) -> bool:
    return cases.level == "vertebra" and guarantee.target.level == "patient"


def _settings(
    cases: Cases,
    fold: NDArray[np.intp],
    guarantee: Guarantee,
    features: pd.DataFrame | None,
    rule: SearchRule,
    names: Sequence[str],
    alphas: Sequence[float],
    deferred: Sequence[float],
    folds: int,
    *,
    by_vertebra: bool,
) -> Iterator[_Setting]:
    """The settings of one p_low: first no deferral, then the plainest confidence first."""
    p_low = guarantee.require()
    at = {"guaranteed": guarantee.target.recall, "p_low": p_low}
    of = [(name, alpha) for name in CONFIDENCES if name in names for alpha in _alphas(name, alphas)]
    if unknown := [name for name in names if name not in CONFIDENCES]:
        check_choice("confidence", unknown[0], CONFIDENCES)
    for name, alpha in [(None, None), *of]:
        made_of = partial(
            _answered,
            features=features,
            name=name,
            alpha=alpha,
            p_low=p_low,
            by_vertebra=by_vertebra,
        )
        whole, pairs = made_of(cases), []
        for each in range(folds):
            among, out = _alone(cases, fold != each), _alone(cases, fold == each)
            pairs.append((made_of(among), made_of(out, among)))
        for share in (0.0,) if name is None else deferred:
            cut = None if name is None else whole.cut(share)
            if name is not None and cut is None:
                continue  # no map marks anything
            row = {"kind": SETTING, **at, "confidence": name, "alpha": alpha, "deferred": share, "cut": cut}
            if name is None:
                row |= {"kind": NO_DEFERRAL, "confidence": "none"}
            values, held_out = [], []
            for known, unseen in pairs:
                own = None if name is None else known.cut(share)
                own = np.inf if own is None and name is not None else own  # nobody there is sure: defer all
                answers = known.answers(own)
                value = rule.value(known.labels, answers)
                values.append(value if rule.allows(answers) and not np.isnan(value) else -np.inf)
                held_out.append(unseen.answers(own))
            yield _Setting(row, whole.answers(cut), values, held_out)


def _answered(
    cases: Cases,
    others: Cases | None = None,
    *,
    features: pd.DataFrame | None,
    name: str | None,
    alpha: float | None,
    p_low: float,
    by_vertebra: bool,
) -> Answered:
    """Cases as they are answered: by a confidence fitted on others, or on themselves."""
    options: dict[str, Any] = {} if alpha is None else {"alpha": alpha}
    if name is None:
        sure = np.zeros(len(cases))
    else:
        fit = fit_confidence(name, cases if others is None else others, features, p_low=p_low, **options)
        sure = fit.of(cases, features)
    return Answered.of(cases, sure, p_low, by_vertebra=by_vertebra)


def _alone(cases: Cases, kept: NDArray[np.bool_]) -> Cases:
    """The cases of a mask as if there were no others, so that patients can be made of them."""
    some = cases.where(kept)
    return replace(some, studies=cases.studies[cases.studies.index.isin(np.unique(some.study))])


def _alphas(name: str, alphas: Sequence[float]) -> Sequence[float | None]:
    return list(alphas) if needs_alpha(name) else [None]


def _measured(
    rule: SearchRule, labels: NDArray[np.int_], answers: NDArray[np.str_], prefix: str
) -> dict[str, float]:
    """The rule's value and the rates of answers."""
    found = triage_rates(labels, answers)
    return {f"{prefix}value": rule.value(labels, answers)} | {
        f"{prefix}{name}": found[name] for name in _RATES
    }
