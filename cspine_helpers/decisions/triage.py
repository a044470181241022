"""Triage: three answers — negative, positive, or inconclusive, which a reader decides.

Below `p_low` a case is negative. p_low comes from a guarantee of recall, never from a person: with a deferred
fracture counted as found, as its reader finds it, recall is that of the threshold p_low, whatever the
confidence is and however it was chosen. At or above it a case is positive where the model is sure, and
inconclusive where it is not. A confidence of -∞, as that of a zero or constant map, is never sure.

A patient answered by vertebrae is positive where one is, else inconclusive where one is, else negative.
"""

import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from functools import partial
from numbers import Real
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cspine_helpers.decisions.guarantees import Guarantee
from cspine_helpers.evaluation.cases import Aggregation, Cases
from cspine_helpers.evaluation.clinical_utility import check_prevalence
from cspine_helpers.evaluation.resampling import (
    Floats,
    combined,
    correlation,
    difference_limits,
    share_limits,
)
from cspine_helpers.evaluation.selective import Accepted, checked_confidences, resample, same_order
from cspine_helpers.files.paths import listing
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.metrics import check_scores

_NAME = re.compile(r"\w[\w -]*")  # it is written into the record of openings
ANSWERS = ("negative", "positive", "inconclusive")
CELLS = tuple((answer, label) for answer in ANSWERS for label in (0, 1))  # what a case can be
_TN, _FN, _FP, _TP, _INTACT, _FRACTURED = np.eye(len(CELLS))  # the last two: deferred
_CONFIDENT, _DEFERRED, _ILL = _TN + _FN + _FP + _TP, _INTACT + _FRACTURED, _FN + _TP + _FRACTURED
RATES = {  # numerator and denominator, and why the rate may be undefined
    "coverage": (_CONFIDENT, _CONFIDENT + _DEFERRED, ""),
    "inconclusive_rate": (_DEFERRED, _CONFIDENT + _DEFERRED, ""),
    "accuracy": (_TN + _TP, _CONFIDENT, "All cases are deferred."),
    "precision": (_TP, _TP + _FP, "No case is called positive."),
    "recall": (_TP, _TP + _FN, "No fracture is among the confident cases."),
    "specificity": (_TN, _TN + _FP, "No intact case is among the confident cases."),
    "f1": (2 * _TP, 2 * _TP + _FP + _FN, "No confident case is fractured or called positive."),
    "recall_deferred_found": (_TP + _FRACTURED, _ILL, "No case is fractured."),
    "recall_deferred_lost": (_TP, _ILL, "No case is fractured."),
    "fractures_deferred": (_FRACTURED, _ILL, "No case is fractured."),
    "fractures_among_deferred": (_FRACTURED, _DEFERRED, "No case is deferred."),
}
_UNMOVED = ("coverage", "inconclusive_rate", "recall_deferred_found")  # by who is deferred, but by how many
SHARES = np.arange(20) / 20  # of the suspected cases, that a curve defers
PER_1000 = {  # of the cells of either class
    "negative_per_1000": _TN + _FN,
    "positive_per_1000": _FP + _TP,
    "inconclusive_per_1000": _DEFERRED,
    "missed_per_1000": _FN,
}
_NUMERATORS, _DENOMINATORS = (np.stack([each[part] for each in RATES.values()]) for part in (0, 1))


@dataclass(frozen=True)
class Triage:
    """Which cases are negative, positive, or inconclusive.

    Attributes:
        guarantee: of recall; its threshold is `p_low`, its target says the level and aggregation.
        confidence: name of the confidence that defers; None: nothing is deferred.
        cut: at or above p_low, positive where the confidence is at least this; None: nothing is deferred.
        settings: what the confidence was computed with: its α, the grid of the map and so on.
        by_vertebra: of a guarantee for patients by the highest vertebra: each vertebra is answered by itself,
            and the patient by `patient_answers`.

    Example:
        >>> from cspine_helpers.decisions import RecallTarget, guarantee_on_validation
        >>> guarantee = guarantee_on_validation(predictions, RecallTarget(0.5, level="patient"))
        >>> triage = Triage(guarantee, "distance", 1.5)
        >>> patients = Cases.of(predictions, split="validation").patients()
        >>> answers = triage.answers(patients, abs(patients.probability - 0.5))
        >>> sorted(set(answers.tolist()))
        ['inconclusive', 'negative']
    """

    guarantee: Guarantee
    confidence: str | None = None
    cut: float | None = None
    _: KW_ONLY
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    by_vertebra: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.guarantee, Guarantee):
            raise ValueError(
                f"A triage rests on a Guarantee; found {type(self.guarantee).__name__}. Make one with "
                "guarantee_on_validation(...)."
            )
        self.guarantee.require()
        if self.guarantee.target.level in VERTEBRAE:
            raise ValueError(
                f"The guarantee is for {self.guarantee.target.level} alone, and triage answers for every "
                "vertebra. Make it with RecallTarget(…, level='vertebra') or level='patient'."
            )
        if (self.confidence is None) != (self.cut is None):
            raise ValueError(
                f"A confidence and its cut belong together; found {self.confidence!r} and {self.cut}. Give "
                "both, or none to defer nothing."
            )
        is_name = isinstance(self.confidence, str) and _NAME.fullmatch(self.confidence)
        if self.confidence is not None and not is_name:
            raise ValueError(
                f"A confidence is named by letters, digits, '_', '-' and spaces; found {self.confidence!r}."
            )
        is_number = isinstance(self.cut, Real) and not isinstance(self.cut, bool)
        if self.cut is not None and not (is_number and np.isfinite(self.cut)):
            raise ValueError(
                f"A cut is a finite number; found {self.cut!r}. To defer nothing, leave the confidence out."
            )
        if self.by_vertebra and self.aggregation != Aggregation("max"):
            raise ValueError(
                "Vertebrae answer for a patient where the guarantee is for patients by their highest "
                f"vertebra; found level {self.level!r}, aggregation {self.aggregation}. Make it with "
                "RecallTarget(…, level='patient', aggregation=Aggregation('max'))."
            )

    @property
    def p_low(self) -> float:
        """Below it a case is negative: the threshold that the guarantee gives."""
        return self.guarantee.require()

    @property
    def level(self) -> str:
        """What recall is guaranteed of: vertebra, patient, image or study."""
        return self.guarantee.target.level

    @property
    def aggregation(self) -> Aggregation | None:
        """At patient level, how the vertebrae become one probability."""
        return self.guarantee.target.aggregation

    @property
    def answered(self) -> str:
        """The level of the cases that are answered."""
        return "vertebra" if self.by_vertebra else self.level

    def without_deferral(self) -> Self:
        """The same p_low, and everything at or above it positive."""
        return replace(self, confidence=None, cut=None, settings={})

    def answers(self, cases: Cases, confidence: ArrayLike | None = None) -> NDArray[np.str_]:
        """The answer to each case, (n,) of `ANSWERS`.

        Args:
            cases: at the level that is answered, patients by the guarantee's aggregation.
            confidence: (n,) higher is surer; None where nothing is deferred.

        Raises:
            ValueError: cases of another level or aggregation; a confidence is missing (NaN), or there is one
                too many or too few.
        """
        self._check(cases)
        if (confidence is None) != (self.confidence is None):
            wanted = "takes no confidence" if self.confidence is None else f"needs {self.confidence!r}"
            raise ValueError(f"This triage {wanted} for each case. Pass what it was made for.")
        sure = np.ones(len(cases), dtype=bool)
        if confidence is not None and self.cut is not None:
            sure = checked_confidences(confidence, len(cases)) >= self.cut
        above = np.where(sure, "positive", "inconclusive")
        return np.where(cases.probability < self.p_low, "negative", above)

    def record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {each.name: getattr(self, each.name) for each in fields(self)} | {
            "guarantee": self.guarantee.record()
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """The triage of a `record`.

        Raises:
            ValueError: it is no such record.
        """
        names = {each.name for each in fields(cls)}
        if (
            not isinstance(record, Mapping)
            or set(record) != names
            or not isinstance(record["guarantee"], Mapping)
        ):
            raise ValueError(f"a triage has {listing(sorted(names))}.")
        return cls(**{**record, "guarantee": Guarantee.from_record(record["guarantee"])})

    def _check(self, cases: Cases) -> None:
        if cases.level != self.answered:
            raise ValueError(
                f"This triage answers at {self.answered} level, not at {cases.level} level: p_low for one "
                "says nothing about the other. Pass those cases, or make a guarantee for these."
            )
        if cases.aggregation != (None if self.by_vertebra else self.aggregation):
            raise ValueError(
                f"The guarantee was made with the aggregation {self.aggregation}, not with "
                f"{cases.aggregation}. Make patients by the same: cases.patients(triage.aggregation)."
            )


def checked_answers(answers: ArrayLike, cases: int) -> NDArray[np.str_]:
    """The answers, one a case.

    Raises:
        ValueError: another number of them, or one that is none of `ANSWERS`.
    """
    found = np.asarray(answers).astype(np.str_)
    if found.shape != (cases,):
        raise ValueError(
            f"Each of {cases} cases has an answer; found shape {found.shape}. Pass triage.answers(…)."
        )
    if len(unknown := np.setdiff1d(found, ANSWERS)):
        raise ValueError(
            f"Answers are {', '.join(ANSWERS)}; found {listing(unknown.tolist())}. Pass triage.answers(…)."
        )
    return found


def patient_answers(cases: Cases, answers: ArrayLike) -> NDArray[np.str_]:
    """The answer to each patient from those to the vertebrae, in the order of `cases.patients()`.

    Positive where a vertebra is, else inconclusive where one is, else negative: one inconclusive vertebra
    makes the patient inconclusive unless another is positive. A vertebra that is missing says nothing.

    Args:
        cases: all vertebrae, n of them.
        answers: (n,) to these.

    Raises:
        ValueError: these are patients, images, or some vertebrae only; or see `checked_answers`.

    Example:
        >>> cases = Cases.of(predictions, split="validation")
        >>> answers = np.where(cases.unit == "C2", "inconclusive", "negative")
        >>> set(patient_answers(cases, answers).tolist())
        {'inconclusive'}
    """
    found = checked_answers(answers, len(cases))
    if cases.level != "vertebra":
        raise ValueError(
            f"These cases are {cases.plural}: their answers are made of no vertebrae. Use those."
        )
    cases.patients(Aggregation("max"))  # refuses some vertebrae, and patients without any
    inconclusive, positive = (
        (np.nan_to_num(cases.wide(found == each)) > 0).any(axis=1) for each in ("inconclusive", "positive")
    )
    return np.where(positive, "positive", np.where(inconclusive, "inconclusive", "negative"))


def triage_rates(labels: ArrayLike, answers: ArrayLike) -> dict[str, float]:
    """The `RATES` of answers, without intervals; NaN where one is undefined.

    Args:
        labels: (N,) of 0/1.
        answers: (N,) of `ANSWERS`.

    Raises:
        ValueError: labels that are not 0/1; see `checked_answers`.
    """
    y, _ = check_scores(labels, np.zeros(np.shape(labels)))
    found = checked_answers(answers, len(y))
    counts = [((found == answer) & (y == label)).sum() for answer, label in CELLS]
    return dict(zip(RATES, _rates(np.array(counts, dtype=np.float64)[:, None])[:, 0].tolist(), strict=True))


def evaluate_triage(
    cases: Cases,
    answers: ArrayLike,
    *,
    prevalence: float | None = None,
    resamples: int = 1000,
    seed: int = 0,
    interval: float = 0.95,
) -> pd.DataFrame:
    """What the answers are worth, with intervals; patients are resampled.

    `coverage` and `inconclusive_rate`; `accuracy, precision, recall, specificity, f1` of the confident cases,
    those not deferred; recall of all fractures with deferred ones counted as found by the reader
    (`recall_deferred_found`) and as lost (`recall_deferred_lost`); the share of all fractures that are
    deferred, and of the deferred cases that are fractured. With a prevalence also how many of 1,000 cases get
    each answer, and in how many a fracture is missed, called negative.

    Args:
        cases: of one split, n of them.
        answers: (n,) of `ANSWERS`.
        prevalence: share of fractured cases where the triage is to be used, at the level of the cases: give
            that of patients with the patients' answers.
        resamples: of the patients.
        seed: of the resamples.
        interval: confidence of each interval by itself.

    Returns:
        Columns `metric, value, low, high, undefined, why`: in how many resamples the metric is undefined, and
        the reason, in a sentence, where it is undefined here (NaN); else empty. Limits are score limits of as
        many independent cases as vary as much as the resamples do.

    Raises:
        ValueError: see `checked_answers`; cases of several splits; an option out of range.

    Example:
        >>> cases = Cases.of(predictions, split="validation", level="patient")
        >>> place = np.digitize(cases.probability, [0.3, 0.6])
        >>> answers = np.array(["negative", "inconclusive", "positive"])[place]
        >>> found = evaluate_triage(cases, answers, prevalence=0.07, resamples=50).set_index("metric")
        >>> bool(found["value"]["recall_deferred_found"] > found["value"]["recall_deferred_lost"])
        True
    """
    (found,) = _measure(cases, [answers], prevalence, resamples, seed, interval)
    columns = {"metric": found.names, "value": found.value, "low": found.limits[0], "high": found.limits[1]}
    return pd.DataFrame(columns | {"undefined": found.undefined, "why": found.why})


def compare_triage(
    cases: Cases,
    answers: ArrayLike,
    other: ArrayLike,
    *,
    prevalence: float | None = None,
    resamples: int = 1000,
    seed: int = 0,
    interval: float = 0.95,
) -> pd.DataFrame:
    """Differences between two sets of answers to the same cases, with intervals.

    Both are measured on the same resamples; an interval is made of those of the two and their correlation.
    Options as in `evaluate_triage`.

    Returns:
        Columns `metric, value, other, difference, low, high, undefined, why`; difference is other − value.

    Raises:
        ValueError: see `evaluate_triage`.

    Source: Zou and Donner, Statistics in Medicine 27 (2008).

    Example:
        >>> cases = Cases.of(predictions, split="validation")
        >>> all_sure = np.where(cases.probability < 0.5, "negative", "positive")
        >>> none_sure = np.where(cases.probability < 0.5, "negative", "inconclusive")
        >>> found = compare_triage(cases, all_sure, none_sure, resamples=50).set_index("metric")
        >>> float(found["difference"]["recall_deferred_found"])
        0.0
    """
    one, two = _measure(cases, [answers, other], prevalence, resamples, seed, interval)
    low, high = difference_limits(
        (one.value, two.value),
        [(each.limits[0], each.limits[1]) for each in (one, two)],
        (one.draws, two.draws),
    )
    columns = {"metric": one.names, "value": one.value, "other": two.value}
    columns |= {"difference": two.value - one.value, "low": low, "high": high}
    undefined = np.isnan(one.draws + two.draws).sum(axis=1)
    return pd.DataFrame(columns | {"undefined": undefined, "why": np.where(one.why == "", two.why, one.why)})


def deferral_curve(
    guarantee: Guarantee,
    cases: Cases,
    confidence: ArrayLike,
    *,
    deferred: ArrayLike = SHARES,
    resamples: int = 1000,
    seed: int = 0,
    interval: float = 0.95,
) -> pd.DataFrame:
    """The rates of triage as more and more of the suspected cases are deferred, the least sure first.

    Where a share cuts a tie, the tied are deferred in proportion. Cases whose confidence is -∞ are deferred
    at any share.

    Args:
        guarantee: whose threshold is p_low.
        cases: at its level, patients by its aggregation, n of them.
        confidence: (n,) higher is surer.
        deferred: shares of the suspected cases, those at or above p_low.
        resamples: of the patients.
        seed: of the resamples.
        interval: confidence of each interval by itself.

    Returns:
        One row a share: `deferred`, and of each of `RATES` its value, `<rate>_low` and `<rate>_high`; NaN
        where a rate is undefined.

    Raises:
        ValueError: see `Triage.answers` and `evaluate_triage`; no case is suspected; a share outside [0, 1].

    Example:
        >>> from cspine_helpers.decisions import RecallTarget, guarantee_on_validation
        >>> guarantee = guarantee_on_validation(predictions, RecallTarget(0.7, level="patient"))
        >>> cases = Cases.of(predictions, split="validation", level="patient")
        >>> found = deferral_curve(guarantee, cases, cases.probability, deferred=[0, 0.5], resamples=50)
        >>> bool(found["coverage"][0] > found["coverage"][1])
        True
    """
    curve = _Curve(guarantee, cases, confidence, deferred)
    (value,), (draws,) = resample([curve.rates], cases, resamples, seed, interval)
    low, high = curve.limits(value, draws, interval)
    table = {"deferred": curve.shares}
    for place, name in enumerate(RATES):
        of = slice(place, None, len(RATES))
        table |= {name: value[of], f"{name}_low": low[of], f"{name}_high": high[of]}
    return pd.DataFrame(table)


def compare_deferral(
    guarantee: Guarantee,
    cases: Cases,
    confidence: ArrayLike,
    other: ArrayLike,
    *,
    deferred: ArrayLike = (0.1, 0.2, 0.3, 0.5),
    resamples: int = 1000,
    seed: int = 0,
    interval: float = 0.95,
) -> pd.DataFrame:
    """Differences between two confidences that defer the same share of the suspected: at equal coverage.

    Both are measured on the same resamples. Arguments as in `deferral_curve`.

    Returns:
        Columns `deferred, metric, value, other, difference, low, high`; difference is other − value. The
        interval is 0 where the two cannot differ: both order the suspected alike, or the metric counts who is
        deferred, not whom.

    Raises:
        ValueError: see `deferral_curve`; a share of 0, which defers nobody by either.

    Source: Zou and Donner, Statistics in Medicine 27 (2008).

    Example:
        >>> from cspine_helpers.decisions import RecallTarget, guarantee_on_validation
        >>> guarantee = guarantee_on_validation(predictions, RecallTarget(0.7, level="patient"))
        >>> cases = Cases.of(predictions, split="validation", level="patient")
        >>> sure, unsure = cases.probability, -cases.probability
        >>> found = compare_deferral(guarantee, cases, sure, unsure, deferred=[0.2], resamples=50)
        >>> bool(found.set_index("metric")["difference"]["precision"] < 0)
        True
    """
    pair = [_Curve(guarantee, cases, each, deferred) for each in (confidence, other)]
    if (pair[0].shares == 0).any():
        raise ValueError(
            "Where nobody is deferred, no confidence differs from another. Leave the share 0 out."
        )
    values, draws = resample([curve.rates for curve in pair], cases, resamples, seed, interval)
    limits = [
        curve.limits(value, drawn, interval) for curve, value, drawn in zip(pair, values, draws, strict=True)
    ]
    one, two = (curve.sure[curve.suspected] for curve in pair)
    same = np.tile([name in _UNMOVED for name in RATES], len(pair[0].shares)) | same_order(one, two)
    same &= (draws[0] == draws[1]).all(axis=1)
    low, high = (np.where(same, 0, each) for each in difference_limits(values, limits, draws))
    columns = {"deferred": np.repeat(pair[0].shares, len(RATES)), "metric": [*RATES] * len(pair[0].shares)}
    columns |= {"value": values[0], "other": values[1], "difference": values[1] - values[0]}
    return pd.DataFrame(columns | {"low": low, "high": high})


class _Curve:
    """Rates at several shares of deferred cases, share by share, each in the order of `RATES`."""

    def __init__(
        self, guarantee: Guarantee, cases: Cases, confidence: ArrayLike, deferred: ArrayLike
    ) -> None:
        triage = Triage(guarantee)
        self.cases, self.alone = cases, triage.answers(cases)  # without deferral
        self.shares = np.atleast_1d(np.asarray(deferred, dtype=np.float64))
        if not len(self.shares) or not ((self.shares >= 0) & (self.shares <= 1)).all():
            raise ValueError(
                f"Shares that are deferred are in [0, 1]; found {listing(self.shares.tolist()) or 'none'}."
                " 0.2 defers a fifth of the suspected."
            )
        self.suspected = self.alone == "positive"
        if not self.suspected.any():
            raise ValueError(
                f"No case lies at or above p_low, {triage.p_low:.4g}, so that none can be deferred. Use more "
                "cases, or a guarantee of more recall."
            )
        self.sure = checked_confidences(confidence, len(cases))
        judged = cases.where(self.suspected)
        sure = self.sure[self.suspected]
        self.accepted = Accepted(judged, sure, np.stack([judged.label == 0, judged.label == 1], axis=1))
        self.possible = cases.sums(self.suspected & (self.sure > -np.inf))
        self.cells = _cells(cases, self.alone)

    def rates(self, weights: Floats) -> Floats:
        """Under patient weights (P, R), (shares · RATES, R)."""
        totals = self.cells @ weights  # without deferral
        false_alarms, hits = totals[[int(each.argmax()) for each in (_FP, _TP)]]
        most = self.possible @ weights
        count = np.minimum((1 - self.shares[:, None]) * (false_alarms + hits), most)
        kept = self.accepted.first(count, weights)
        found = np.empty((len(self.shares), len(RATES), weights.shape[1]))
        for place, (intact, fractured) in enumerate(zip(*kept, strict=True)):
            moved = np.outer(_INTACT - _FP, false_alarms - intact) + np.outer(
                _FRACTURED - _TP, hits - fractured
            )
            found[place] = _rates((totals + moved).clip(0))
        return found.reshape(-1, weights.shape[1])

    def limits(self, value: Floats, draws: Floats, interval: float) -> tuple[Floats, Floats]:
        """Limits of those, (shares · RATES,) each."""
        order = np.flatnonzero(self.suspected)[np.argsort(-self.sure[self.suspected], kind="stable")]
        rows, patients = [], []
        for share in self.shares:
            answers = self.alone.astype("<U12")
            answers[order[int((1 - share) * len(order) + 0.5) :]] = "inconclusive"
            cells = _cells(self.cases, answers)
            below = (_DENOMINATORS > 0).astype(np.float64)
            rows.append(below @ cells.sum(axis=1))
            patients.append(((below @ (cells > 0)) > 0).sum(axis=1))
        return share_limits(value, draws, np.concatenate(rows), np.concatenate(patients), interval)


def _cells(cases: Cases, answers: ArrayLike) -> Floats:
    """Each patient's number of cases by answer and label, (CELLS, P)."""
    found = checked_answers(answers, len(cases))
    return np.stack([cases.sums((found == answer) & (cases.label == label)) for answer, label in CELLS])


def _rates(totals: Floats) -> Floats:
    """`RATES` of totals (CELLS, R), (RATES, R); NaN where undefined."""
    above, below = _NUMERATORS @ totals, _DENOMINATORS @ totals
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def _classes(totals: Floats) -> Floats:
    """Shares of the fractured cases, then of the intact ones, that `PER_1000` counts, (2 · PER_1000, R)."""
    counted, found = np.stack([*PER_1000.values()]), []
    for of_class in (_ILL, 1 - _ILL):
        above, below = (counted * of_class) @ totals, of_class @ totals
        found.append(np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0))
    return np.concatenate(found)


class _Measured:
    """The metrics of answers with their draws and limits; see `evaluate_triage`.

    Attributes:
        names: (M,) of the metrics.
        value: (M,)
        draws: (M, R)
        limits: low and high, (M,) each.
        why: (M,) the reason where a metric is undefined.
    """

    def __init__(
        self, cells: Floats, value: Floats, draws: Floats, prevalence: float | None, interval: float
    ) -> None:
        counted, held = cells.sum(axis=1), (cells > 0).astype(np.float64)

        def limits(first: int, last: int, below: NDArray) -> Floats:
            """Of those metrics, each a share of the cells below (last − first, CELLS)."""
            patients = ((below > 0) @ held > 0).sum(axis=1)
            rows = (below > 0) @ counted
            return np.stack(share_limits(value[first:last], draws[first:last], rows, patients, interval))

        many = len(RATES)
        self.names = [*RATES]
        self.value, self.draws, self.limits = value[:many], draws[:many], limits(0, many, _DENOMINATORS)
        reasons = [each[2] for each in RATES.values()]
        if prevalence is not None:
            more = len(PER_1000)
            ill, well = slice(many, many + more), slice(many + more, many + 2 * more)
            of = [np.tile(each, (more, 1)) for each in (_ILL, 1 - _ILL)]
            limits_ill, limits_well = limits(many, ill.stop, of[0]), limits(ill.stop, well.stop, of[1])
            limits_well[:, [*PER_1000].index("missed_per_1000")] = 0  # no intact case can be missed
            parts = 1000 * prevalence, 1000 * (1 - prevalence)
            together = np.array([correlation(*pair) for pair in zip(draws[ill], draws[well], strict=True)])
            restated = parts[0] * value[ill] + parts[1] * value[well]
            half = combined(
                parts[0] * (limits_ill - value[ill]), parts[1] * (limits_well - value[well]), -together
            )
            self.names += [*PER_1000]
            self.value = np.concatenate([self.value, restated])
            self.draws = np.concatenate([self.draws, parts[0] * draws[ill] + parts[1] * draws[well]])
            ends = np.stack([restated - half[0], restated + half[1]])
            self.limits = np.concatenate([self.limits, ends], axis=1)
            absent = "No case is fractured." if np.isnan(value[many]) else "Every case is fractured."
            reasons += [absent] * more
        self.why = np.where(np.isnan(self.value), reasons, "")

    @property
    def undefined(self) -> NDArray[np.int_]:
        """In how many resamples a metric is undefined, (M,)."""
        return np.isnan(self.draws).sum(axis=1)


def _measure(
    cases: Cases,
    each: list[ArrayLike],
    prevalence: float | None,
    resamples: int,
    seed: int,
    interval: float,
) -> list[_Measured]:
    """The metrics of several sets of answers, all on the same resamples."""
    share = None if prevalence is None else float(check_prevalence(prevalence))
    all_cells = [_cells(cases, answers) for answers in each]

    def measure(cells: Floats, weights: Floats) -> Floats:
        return np.concatenate([_rates(cells @ weights), _classes(cells @ weights)])

    values, draws = resample(
        [partial(measure, cells) for cells in all_cells], cases, resamples, seed, interval
    )
    return [
        _Measured(cells, value, drawn, share, interval)
        for cells, value, drawn in zip(all_cells, values, draws, strict=True)
    ]
