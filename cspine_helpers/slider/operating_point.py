"""The numbers behind the slider: what is marked at each level, and what any threshold does there.

The patients are resampled once. Then the counts of every resample are summed from the highest score down and
kept at every 64th row, so that a threshold costs one look-up and 63 rows at most: about a millisecond. The
intervals are those of `intervals.bootstrap`, at another prevalence those of `restated_rates`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from cspine_helpers.decisions.guarantees import Guarantee, checked_guarantees
from cspine_helpers.decisions.thresholds import (
    Decision,
    Rule,
    check_threshold,
    choose_threshold,
    few_called,
    state_threshold,
)
from cspine_helpers.evaluation.cases import Cases, defined_levels
from cspine_helpers.evaluation.clinical_utility import check_prevalence, restated_rates
from cspine_helpers.evaluation.intervals import MOST_UNDEFINED, curve_bands
from cspine_helpers.evaluation.resampling import (
    COUNTS,
    RATES,
    Estimates,
    confusion_sums,
    effective_cases,
    patient_weights,
    score_interval,
)
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.metrics import rates_of

DECIMALS = 4  # of a threshold, at least
RESAMPLES = 1000
CONFIDENCE = 0.95
_BLOCK = 64  # rows between two sums that are kept


def digits(threshold: float) -> str:
    """All decimals of a threshold, four at least."""
    return np.format_float_positional(threshold, unique=True, min_digits=DECIMALS)


def rounded(threshold: float) -> str:
    """A threshold in four decimals, as notebooks write it; in all where four would make it 0 or 1."""
    words = f"{threshold:.{DECIMALS}f}"
    return digits(threshold) if float(words) in (0, 1) else words


class Presets:
    """What is marked on the slider: the threshold to start at, the chosen one, the guaranteed one.

    Args:
        predictions: predictions table.
        decision: marked as chosen at its level; thresholds of single vertebrae at theirs.
        threshold: marked as start at every level, without a decision; starts at the level of the guarantee
            that gives it, else at the first; None: the highest F1 of that.
        guarantees: marked at their levels; made on the validation rows of these predictions, and for patients
            by the decision's aggregation.

    Attributes:
        cases: of the predictions.
        patients: the patients made of them, by the decision's aggregation.
        levels: those of `LEVELS` that can be looked at.
        level: to start at.
        start: threshold there.
        note: why there; and what is guaranteed.
        names: of levels within a sentence; C1 … C7 as they are.

    Raises:
        ValueError: the table breaks its schema, or holds one class only; the decision has no threshold; the
            threshold is not in [0, 1], or given beside a decision; a guarantee is of other predictions or
            another aggregation.
    """

    def __init__(
        self,
        predictions: pd.DataFrame,
        decision: Decision | None,
        threshold: float | None,
        guarantees: Guarantee | Iterable[Guarantee],
    ) -> None:
        if decision is not None and threshold is not None:
            raise ValueError("A decision has its threshold. Leave out the one or the other.")
        self._given, self.cases = decision, Cases.of(predictions)
        self.levels = defined_levels(self.cases)
        pooled = "all vertebrae" if self.cases.level == "vertebra" else self.cases.plural
        self.names = {"all": pooled, "patient": "patients"}
        if not self.levels:
            raise ValueError(
                f"All {len(predictions)} labels are alike, so no threshold can be judged. Use more studies."
            )
        self.patients = self.cases.patients(decision.rule.aggregation if decision else None)
        self._scores = np.sort(np.concatenate([self.cases.probability, self.patients.probability]))
        promises = list(checked_guarantees(guarantees, predictions))
        self.level, start, why = self._beginning(threshold, promises)
        self.start = self.readable(start)

        ours, self._guarantees = self.patients.aggregation, dict[str, Guarantee]()
        few = few_called((self.at_level(self.level).probability >= self.start).sum())
        self.note = f"{why}, {digits(self.start)}.{few}"
        for each in promises:
            level, theirs = self._shown(each.target.level), each.target.aggregation
            if level == "patient" and theirs != ours:
                raise ValueError(
                    f"The guarantee is for patients by {theirs and theirs.name}, those here are by "
                    f"{ours and ours.name}. Make one by the same aggregation."
                )
            self._guarantees.setdefault(level, each)
            mark = "none" if each.threshold is None else digits(self.readable(each.threshold))
            self.note += f" Guaranteed for {self.names.get(level, level)}: {mark}. {each.reason}"

    def at_level(self, level: str) -> Cases:
        """The cases of one of `levels`."""
        return self.patients if level == "patient" else self.cases.of_unit(level)

    def _beginning(self, threshold: float | None, promises: list[Guarantee]) -> tuple[str, float, str]:
        """Level and threshold to start at, and why there."""
        first, given = self.levels[0], self._given
        if given is None and threshold is not None:
            theirs = {self._shown(each.target.level) for each in promises if each.threshold == threshold}
            level = next((level for level in self.levels if level in theirs), first)
            return level, threshold, "Starts at the threshold it was given"
        if given is None:
            cases = self.at_level(first)
            best = choose_threshold(cases.label, cases.probability, Rule("max_f1")).require()
            where = self.names.get(first, first)
            return first, best, f"No threshold is chosen. Starts at the highest F1 of {where}"
        if given.thresholds is not None:
            level = next(level for level in self.levels if level in VERTEBRAE)
            return level, given.thresholds[level], f"Starts at the threshold chosen for {level}"
        level = self._shown(given.rule.level)
        if level not in self.levels:
            raise ValueError(
                f"The decision is of {given.rule.level} level, where all labels are alike here. "
                "Use more studies."
            )
        return level, given.require(), "Starts at the chosen threshold"

    def readable(self, threshold: float) -> float:
        """The threshold in the fewest decimals that call the same, so that what is shown is counted.

        A chosen threshold is itself a score as a rule: rounded up, it would leave its own case out.

        Raises:
            ValueError: it is not in [0, 1].
        """
        check_threshold(threshold)
        below = np.searchsorted(self._scores, threshold)
        rounded = (round(float(threshold), decimals) for decimals in range(DECIMALS, 18))
        alike = (value for value in rounded if np.searchsorted(self._scores, value) == below)
        return next(alike, float(threshold))

    def at(self, level: str) -> dict[str, float]:
        """Name → threshold, of what is marked at a level."""
        marks: dict[str, float | None] = {}
        if self._given is None:
            marks["start"] = self.start
        elif (self._given.rule.level == "patient") == (level == "patient"):
            marks["chosen"] = (self._given.thresholds or {}).get(level, self._given.threshold)
        if promise := self._guarantees.get(level):
            marks["guaranteed"] = promise.threshold
        return {name: self.readable(mark) for name, mark in marks.items() if mark is not None}

    def guarantee(self, level: str, threshold: float) -> Guarantee | None:
        """The guarantee that holds for a threshold at a level; None: none does."""
        highest = self.at(level).get("guaranteed")
        return None if highest is None or threshold > highest else self._guarantees[level]

    def standing(self, level: str, threshold: float) -> str:
        """Whether a threshold is a guaranteed one, and which is; empty without a guarantee."""
        if not self._guarantees:
            return ""
        here = self.names.get(level, level)
        now, highest = f"Now {digits(threshold)}, {here}", self.at(level).get("guaranteed")
        if level not in self._guarantees:
            theirs = " and ".join(self.names.get(each, each) for each in self._guarantees)
            return f"{now}: no guarantee, which is for {theirs}."
        held = "guaranteed" if self.guarantee(level, threshold) else "no guarantee"
        return f"{now}: {held}. Guaranteed: {'none' if highest is None else digits(highest)}."

    def decision(self, level: str, threshold: float) -> Decision:
        """The decision that a threshold makes: the one given where it is that one's, else a stated one.

        Raises:
            ValueError: the level is a single vertebra.
        """
        if level in VERTEBRAE:
            raise ValueError("A decision is for all vertebrae, or for patients. Choose that level.")
        if self._given is not None and self.at(level).get("chosen") == threshold:
            return self._given
        return state_threshold(self.at_level(level), threshold, reason="Set by hand on the slider.")

    def _shown(self, level: str) -> str:
        """Level of the slider, for one of a decision or a guarantee."""
        return "all" if level == self.cases.level else level


class Estimate(NamedTuple):
    """A number with its interval; NaN where undefined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class OperatingPoint:
    """What one threshold does at one level.

    Attributes:
        threshold: positive means probability ≥ threshold.
        counts: tp, fp, fn and tn in these data.
        found: rate → its value in these data, NaN where undefined.
        rates: rate → value and interval, at the prevalence asked for; the interval is NaN where more than 5 %
            of the resamples do not define the rate.
        recalls: vertebra → share found of its fractures, or at patient level of the patients who have one
            there; of images empty.
        missed: of 1,000 patients, those who are fractured and not called.
        called_back: of 1,000 patients, those who are called without a fracture; at the level of one vertebra,
            without a fracture there.
    """

    threshold: float
    counts: dict[str, int]
    found: dict[str, float]
    rates: dict[str, Estimate]
    recalls: dict[str, Estimate]
    missed: Estimate
    called_back: Estimate

    @property
    def low(self) -> Self:
        """Itself, as of a `TriagePoint` that defers nothing."""
        return self

    high = low


@dataclass(frozen=True)
class TriagePoint:
    """What two thresholds do at one level: negative below both, positive from both, inconclusive between.

    Attributes:
        low: of the lower threshold: its recall counts deferred fractures as found by the reader.
        high: of the upper threshold: its recall counts them as lost.
        coverage: share of the cases that are answered, at the prevalence asked for.
        inconclusive_rate: share of the others.
        workload: of 1,000 patients, those whom a reader has to decide about: one inconclusive vertebra makes
            the patient inconclusive unless another is positive.
    """

    low: OperatingPoint
    high: OperatingPoint
    coverage: Estimate
    inconclusive_rate: Estimate
    workload: Estimate

    @property
    def rates(self) -> dict[str, Estimate]:
        """Those of `evaluate_triage` that are shown, and `npv`, the predictive value of negative answers."""
        return {
            "coverage": self.coverage,
            "inconclusive_rate": self.inconclusive_rate,
            "recall_deferred_found": self.low.rates["recall"],
            "recall_deferred_lost": self.high.rates["recall"],
            "precision": self.high.rates["precision"],
            "npv": self.low.rates["npv"],
        }

    @property
    def counts(self) -> dict[str, int]:
        """Cases by their label and answer, in these data."""
        low, high = self.low.counts, self.high.counts
        return {
            "fractured_positive": high["tp"],
            "fractured_inconclusive": low["tp"] - high["tp"],
            "fractured_negative": low["fn"],
            "intact_positive": high["fp"],
            "intact_inconclusive": low["fp"] - high["fp"],
            "intact_negative": low["tn"],
        }


def weigh(cases: Cases, *, resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.float32]:
    """How often each patient counts, (P, 1 + R): once in the first column, as drawn in all others."""
    patients = len(cases.population)
    drawn = patient_weights(patients, resamples, seed, rows=len(cases))
    return np.concatenate([np.ones((patients, 1)), *drawn], axis=1, dtype=np.float32)


class OperatingPoints:
    """The cases of one level, ready to be asked about any threshold.

    Args:
        cases: of a level.
        vertebrae: of the same studies, whose recall is shown beside it.
        weights: of `weigh`.

    Attributes:
        cases: as given.
        level: their name, one of `LEVELS`.
        positives: fractured vertebrae, or patients, of each vertebra (see `OperatingPoint.recalls`); of
            images empty.
        prevalence: share of the level's patients who are fractured.
    """

    def __init__(self, cases: Cases, vertebrae: Cases, weights: NDArray[np.float32]) -> None:
        self.cases, self.level, self._weights = cases, cases.name, weights
        patients = cases.studies.groupby("patient", sort=False)  # in the order of `population`
        fractured = patients["label"].max().to_numpy() == 1

        self._ends: dict[tuple[float, float | None], OperatingPoint] = {}
        # Cases from the highest score down, in three kinds: fractured, intact of a fractured patient, others.
        order = np.argsort(-cases.probability, kind="stable")
        self._falling, self._patient = -cases.probability[order], cases.number[order]
        kind = np.where(cases.label == 1, 0, np.where(fractured[cases.number], 1, 2))[order]
        self._kinds = (kind == np.arange(3)[:, None]).astype(np.float32)  # (3, N)
        blocks = -(-len(kind) // _BLOCK) + 1  # nothing is called in the first one
        place = kind * blocks + np.arange(len(kind)) // _BLOCK + 1
        sums = csr_array(
            (np.ones(len(kind), np.float32), (place, self._patient)), shape=(3 * blocks, len(fractured))
        )
        self._sums = (sums @ weights).reshape(3, blocks, -1).cumsum(axis=1)  # (3, blocks, 1 + R)
        self._holders = np.array([len(np.unique(self._patient[one > 0])) for one in self._kinds])

        # Patients, by their highest score.
        present = cases.sums() > 0
        self._patients = np.stack([present & fractured, present & ~fractured]) @ weights  # (2, 1 + R)
        self.prevalence = float(self._patients[0, 0] / present.sum())
        highest = np.zeros(len(fractured))
        np.maximum.at(highest, cases.number, cases.probability)
        ill = cases.sums(cases.label) > 0 if self.level in VERTEBRAE else fractured
        self._ill = np.sort(highest[ill])
        kinds = fractured, ~fractured
        self._well, self._highest = (
            [np.sort(highest[present & among & kind]) for kind in kinds] for among in (~ill, ill | ~ill)
        )
        broken = vertebrae.where(vertebrae.label == 1)
        scores = highest[broken.number] if self.level == "patient" else broken.probability
        units = VERTEBRAE if vertebrae.level == "vertebra" else ()
        self._broken = {name: np.sort(scores[broken.unit == name]) for name in units}
        self.positives = {name: len(scores) for name, scores in self._broken.items()}

    @cached_property
    def band(self) -> pd.DataFrame | None:
        """The precision–recall curve with its band, of `intervals.curve_bands`; None: too few patients."""
        try:
            return curve_bands(self.cases)
        except ValueError:  # the table is checked, so that what is left are resamples of one class only
            return None

    def at(self, threshold: float, prevalence: float | None = None) -> OperatingPoint:
        """What the threshold does.

        Args:
            threshold: positive means probability ≥ threshold.
            prevalence: share of patients who are fractured, for the rates and the missed; None: as found.
                Fractured patients are taken to look as they do here, and so are intact ones.

        Raises:
            ValueError: a prevalence outside (0, 1), or one is given where all patients here are alike.
        """
        called = self._called(threshold)
        tp, *alarms = called
        fn, *quiet = (rows := self._sums[:, -1]) - called
        cells = np.stack([tp, sum(alarms), fn, sum(quiet)]).astype(np.float64)  # (4, 1 + R)
        counts = dict(zip(COUNTS, cells[:, 0].astype(int).tolist(), strict=True))
        every = rates_of(*cells)
        shares = np.stack([every[name] for name in RATES])  # (rates, 1 + R)
        value, draws = shares[:, 0], shares[:, 1:]
        limits = np.array(Estimates(confusion_sums(self.cases, threshold)).limits(value, draws, CONFIDENCE))
        limits[:, np.isnan(draws).mean(axis=1) > MOST_UNDEFINED] = np.nan
        found = pd.DataFrame({"value": value, "low": limits[0], "high": limits[1]}, index=list(RATES))
        restated = found
        if prevalence is not None:
            restated = self._restated(called, prevalence)
            # What one group alone decides is the same everywhere.
            alone = ["recall", "specificity"] if not rows[1, 0] else ["recall"]
            restated.loc[alone] = found.loc[alone]
        return OperatingPoint(
            threshold,
            counts,
            dict(zip(RATES, value.tolist(), strict=True)),
            {name: Estimate(*three) for name, *three in restated.itertuples()},
            self._recalls(threshold),
            self._missed(threshold, prevalence),
            self._of_1000(self._well, threshold, np.inf, prevalence),
        )

    def triage(self, low: float, high: float, prevalence: float | None = None) -> TriagePoint:
        """What two thresholds do: negative below the lower, positive from the upper, inconclusive between.

        Args:
            low: a case is negative where probability < low.
            high: a case is positive where probability ≥ high, which is not below `low`.
            prevalence: see `at`.

        Raises:
            ValueError: `high` is below `low`; see `at`.
        """
        if high < low:
            raise ValueError(
                f"Positive from {digits(high)}, negative below {digits(low)}: a case would be both. Give an "
                "upper threshold that is not below the lower."
            )
        ends = {(each, prevalence) for each in (low, high)}  # one of them stands still while the other moves
        self._ends = {end: self._ends.get(end) or self.at(*end) for end in ends}
        deferred, rows = self._called(low) - self._called(high), self._sums[:, -1]
        if prevalence is None:
            with np.errstate(invalid="ignore"):  # a resample without a case of this level
                value, *draws = (deferred.sum(axis=0, dtype=np.float64) / rows.sum(axis=0)).tolist()
            drawn = np.array(draws)[~np.isnan(draws)]
            cases = effective_cases(value, drawn, float(rows[:, 0].sum()), float(self._patients[:, 0].sum()))
            rate = Estimate(value, *map(float, score_interval(value, cases, CONFIDENCE)))
        else:
            # Were it right to defer the fractured and to answer the intact, accuracy would be this rate.
            called = np.concatenate([deferred[:1], rows[1:] - deferred[1:]])
            rate = Estimate(*map(float, self._restated(called, prevalence).loc["accuracy"]))
        return TriagePoint(
            self._ends[low, prevalence],
            self._ends[high, prevalence],
            Estimate(1 - rate.value, 1 - rate.high, 1 - rate.low),
            rate,
            self._of_1000(self._highest, low, high, prevalence),
        )

    def _called(self, threshold: float) -> NDArray[np.float32]:
        """Cases at or above the threshold, by kind, as they are and in each resample, (3, 1 + R)."""
        many = int(np.searchsorted(self._falling, -threshold, side="right"))
        rest = slice(many // _BLOCK * _BLOCK, many)
        return self._sums[:, many // _BLOCK] + self._kinds[:, rest] @ self._weights[self._patient[rest]]

    def _restated(self, called: NDArray[np.float32], prevalence: float) -> pd.DataFrame:
        """`restated_rates` of the cases called, by kind."""
        up, down = self._scales(prevalence)
        weights = np.stack([up, up, down])
        return restated_rates(called, self._sums[:, -1], self._holders, weights, CONFIDENCE)

    def _scales(self, prevalence: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What fractured and what intact patients count, in each resample, (1 + R,)."""
        check_prevalence(prevalence)
        if self.prevalence in (0, 1):
            raise ValueError(
                "Another prevalence needs patients with and without a fracture; found "
                f"{int(self._patients[0, 0])} and {int(self._patients[1, 0])}. Use more studies."
            )
        shares = np.array([[prevalence], [1 - prevalence]])
        with np.errstate(divide="ignore"):  # a resample without one of the two defines nothing
            scales = self._patients.sum(axis=0) * shares / self._patients
        scales[:, np.isinf(scales).any(axis=0)] = np.nan
        return scales[0], scales[1]

    def _recalls(self, threshold: float) -> dict[str, Estimate]:
        found = [len(scores) - np.searchsorted(scores, threshold) for scores in self._broken.values()]
        return dict(zip(self.positives, _shares(found, list(self.positives.values())), strict=True))

    def _missed(self, threshold: float, prevalence: float | None) -> Estimate:
        missed, (fractured, intact) = np.searchsorted(self._ill, threshold), self._patients[:, 0]
        of, share = (fractured + intact, 1.0) if prevalence is None else (fractured, prevalence)
        return Estimate(*(1000 * share * number for number in _shares([missed], [of])[0]))

    def _of_1000(
        self, kinds: list[NDArray[np.float64]], low: float, high: float, prevalence: float | None
    ) -> Estimate:
        """Of 1,000 patients, those whose highest score lies in [low, high).

        Of the highest scores, sorted, of some fractured patients and of some intact ones: two shares, one
        interval.
        """
        some = [int(np.diff(np.searchsorted(scores, [low, high])).item()) for scores in kinds]
        of = self._patients[:, 0]
        if prevalence is None:
            return Estimate(*(1000 * number for number in _shares([sum(some)], [of.sum()])[0]))
        # Without a patient of the first kind its share is 0 for certain, not 0 of some.
        kept = [len(scores) > 0 for scores in kinds]
        weights = np.array([prevalence, 1 - prevalence])[kept]
        shares = np.array(_shares(some, of))[kept]  # (kinds, 3)
        value = weights @ shares[:, 0]
        below, above = np.sqrt(((weights[:, None] * (shares[:, 1:] - shares[:, :1])) ** 2).sum(axis=0))
        return Estimate(*(1000 * np.array([value, value - below, value + above])).tolist())


def _shares(some: ArrayLike, of: ArrayLike) -> list[Estimate]:
    """Shares of independent cases with score intervals; NaN where there is no case."""
    cases = np.asarray(of, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.asarray(some) / cases
        low, high = score_interval(value, cases, CONFIDENCE)
    return [Estimate(*map(float, three)) for three in zip(value, low, high, strict=True)]
