"""What a threshold does at one level, with intervals, in about a millisecond: the numbers behind the slider.

The patients are resampled once. Then the counts of every resample are summed from the highest score down and
kept at every 64th row, so that a threshold costs one look-up and 63 rows at most. The intervals are those of
`intervals.bootstrap`, at another prevalence those of `prevalence.restated_rates`.

The chosen and the guaranteed threshold of each level, and the decision that any other one makes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from cspine_helpers.decisions.guarantees import Guarantee, checked_guarantees
from cspine_helpers.decisions.thresholds import Decision, Rule, choose_threshold, few_called, state_threshold
from cspine_helpers.evaluation.cases import (
    Aggregation,
    Cases,
    aggregate,
    at_level,
    default_aggregation,
    defined_levels,
    resampled_units,
)
from cspine_helpers.evaluation.clinical_utility import check_prevalence, restated_rates
from cspine_helpers.evaluation.intervals import MOST_UNDEFINED, curve_bands
from cspine_helpers.evaluation.resampling import (
    RATES,
    Estimates,
    confusion_sums,
    patient_weights,
    score_interval,
)
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.metrics import rates

DECIMALS = 4  # of a threshold, at least
NAMES = {"all": "all vertebrae", "patient": "patients"}  # of levels within a sentence; C1 … C7 as they are


def digits(threshold: float) -> str:
    """All decimals of a threshold, four at least."""
    return np.format_float_positional(threshold, unique=True, min_digits=DECIMALS)


class Marks:
    """What is marked on the slider.

    Args:
        predictions: predictions table, checked.
        decision: marked as chosen at its level; thresholds of single vertebrae at theirs.
        threshold: marked as start at every level, without a decision; None: the highest F1 of the first.
        guarantees: marked at their levels; made on the validation rows of these predictions, and for patients
            by the decision's aggregation.

    Attributes:
        levels: those of `metrics.LEVELS` that can be looked at.
        aggregation: how vertebrae become patients.
        level: to start at.
        start: threshold there.
        note: why there; and apart from it, what is guaranteed.

    Raises:
        ValueError: there is one class only, no threshold, one outside [0, 1], or one beside a decision; or a
            guarantee is of other predictions or another aggregation.
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
        self._predictions, self._given = predictions, decision
        self.levels = defined_levels(Cases.of(predictions))
        if not self.levels:
            raise ValueError(
                f"All {len(predictions)} labels are alike, so no threshold can be judged. Use more studies."
            )
        chosen = decision.rule.aggregation if decision else None
        self.aggregation = chosen or default_aggregation(predictions)
        patients = aggregate(predictions, self.aggregation)["probability"]
        self._scores = np.sort(np.concatenate([predictions["probability"], patients]))
        self.level, start, why = self._beginning(threshold)
        self.start = self.readable(start)

        self._guarantees = checked_guarantees(guarantees, predictions)
        for each in self._guarantees:
            if each.target.level == "patient" and each.target.aggregation != self.aggregation:
                raise ValueError(
                    f"The guarantee is for patients by {_by(each)}, those "
                    f"here are by {self.aggregation.name}. Make one by the same aggregation."
                )
        reasons = []
        for each in self._guarantees:
            highest = self.at(_shown(each.target.level)).get("guaranteed")
            mark = "none" if highest is None else digits(highest)
            reasons.append(f"Guaranteed for {_named(each)}: {mark}. {each.reason}")
        few = few_called((self._rows(self.level)["probability"] >= self.start).sum())
        self.note = " ".join([f"{why}, {digits(self.start)}.{few}", *reasons])

    def _rows(self, level: str) -> pd.DataFrame:
        """Labels and probabilities at a level; patients by the aggregation."""
        if level == "patient":
            return aggregate(self._predictions, self.aggregation)
        return at_level(self._predictions, level)

    def _beginning(self, threshold: float | None) -> tuple[str, float, str]:
        """Level and threshold to start at, and why there."""
        first, given = self.levels[0], self._given
        if given is None and threshold is not None:
            return first, threshold, "Starts at the threshold it was given"
        if given is None:
            rows = at_level(self._predictions, first)
            best = choose_threshold(rows["label"], rows["probability"], Rule("max_f1")).require()
            return (
                first,
                best,
                f"No threshold is chosen. Starts at the highest F1 of {NAMES.get(first, first)}",
            )
        if given.thresholds is not None:
            level = next(level for level in self.levels if level in VERTEBRAE)
            return level, given.thresholds[level], f"Starts at the threshold chosen for {level}"
        level = _shown(given.rule.level)
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
        if not 0 <= threshold <= 1:
            raise ValueError(f"A threshold lies in [0, 1]; found {threshold}. Choose it again.")
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
        if promise := self._promise(level):
            marks["guaranteed"] = promise.threshold
        return {name: self.readable(mark) for name, mark in marks.items() if mark is not None}

    def guarantee(self, level: str, threshold: float) -> Guarantee | None:
        """The guarantee that holds for a threshold at a level; None: none does."""
        highest = self.at(level).get("guaranteed")
        return None if highest is None or threshold > highest else self._promise(level)

    def standing(self, level: str, threshold: float) -> str:
        """Whether a threshold is a guaranteed one, and apart from it which is; empty without a guarantee."""
        if not self._guarantees:
            return ""
        promise, highest = self._promise(level), self.at(level).get("guaranteed")
        now = f"Now {digits(threshold)}, {NAMES.get(level, level)}"
        if promise is None:
            return f"{now}: no guarantee, which is for {' and '.join(self._guaranteed_levels())}."
        if highest is None:
            return f"{now}: no guarantee. Guaranteed: none."
        held = "no guarantee" if self.guarantee(level, threshold) is None else "guaranteed"
        return f"{now}: {held}. Guaranteed: {digits(highest)}."

    def _guaranteed_levels(self) -> list[str]:
        """Levels with a guarantee, in words."""
        return [_named(each) for each in self._guarantees]

    def decision(self, level: str, threshold: float) -> Decision:
        """The decision that a threshold makes: the one given where it is that one's, else a stated one.

        Raises:
            ValueError: the level is a single vertebra.
        """
        if level in VERTEBRAE:
            raise ValueError("A decision is for all vertebrae, or for patients. Choose that level.")
        if self._given is not None and self.at(level).get("chosen") == threshold:
            return self._given
        cases = Cases.of(self._predictions)
        cases = cases.patients(self.aggregation) if level == "patient" else cases
        return state_threshold(cases, threshold, reason="Set by hand on the slider.")

    def _promise(self, level: str) -> Guarantee | None:
        return next((each for each in self._guarantees if _shown(each.target.level) == level), None)


def _named(guarantee: Guarantee) -> str:
    """Its level in words."""
    return NAMES.get(_shown(guarantee.target.level), guarantee.target.level)


def _by(guarantee: Guarantee) -> str:
    aggregation = guarantee.target.aggregation
    return aggregation.name if aggregation else "no aggregation"


def _shown(level: str) -> str:
    """Level of the slider, for one of a decision or a guarantee."""
    return "all" if level == "vertebra" else level


RESAMPLES = 1000
CONFIDENCE = 0.95
_BLOCK = 64  # rows between two sums that are kept


class Estimate(NamedTuple):
    """A number with its interval; NaN where undefined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """What one threshold does at one level.

    Attributes:
        threshold: positive means probability ≥ threshold.
        counts: tp, fp, fn and tn in these data.
        found: rate → its value in these data, NaN where undefined.
        rates: rate → value and interval, at the prevalence asked for; the interval is NaN where more than 5 %
            of the resamples do not define the rate.
        recalls: vertebra → share found of its fractures, or at patient level of the patients who have one
            there.
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


def weigh(predictions: pd.DataFrame, *, resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.float32]:
    """How often each patient counts, (P, 1 + R): once in the first column, as drawn in all others."""
    patients = resampled_units(predictions).nunique()
    drawn = patient_weights(patients, resamples, seed, rows=len(predictions))
    return np.concatenate([np.ones((patients, 1)), *drawn], axis=1, dtype=np.float32)


class Operating:
    """A predictions table at one level, ready to be asked about any threshold.

    Args:
        predictions: predictions table, checked.
        level: one of `metrics.LEVELS`.
        weights: of `weigh`.
        aggregation: how vertebrae become patients, at patient level; else by `metrics.patient_level`.

    Attributes:
        level: as given.
        cases: of the level.
        positives: fractured vertebrae, or patients, of each vertebra (see `Point.recalls`).
        prevalence: share of the level's patients who are fractured.
    """

    def __init__(
        self,
        predictions: pd.DataFrame,
        level: str,
        weights: NDArray[np.float32],
        *,
        aggregation: Aggregation | None = None,
    ) -> None:
        self.level, self._weights = level, weights
        vertebrae = Cases.of(predictions)
        self.cases = rows = (
            vertebrae.patients(aggregation) if level == "patient" else vertebrae.of_unit(level)
        )
        whose, patients = resampled_units(predictions), rows.population
        fractured = predictions.groupby(whose, sort=False)["label"].max().to_numpy() == 1
        order = np.argsort(-rows.probability, kind="stable")
        self._falling, self._patient = -rows.probability[order], rows.number[order]
        kind = np.where(rows.label == 1, 0, np.where(fractured[rows.number], 1, 2))[order]
        self._kinds = (kind == np.arange(3)[:, None]).astype(np.float32)  # (3, N)
        blocks = -(-len(kind) // _BLOCK) + 1  # nothing is called in the first one
        place = kind * blocks + np.arange(len(kind)) // _BLOCK + 1
        sums = csr_array(
            (np.ones(len(kind), np.float32), (place, self._patient)), shape=(3 * blocks, len(patients))
        )
        self._sums = (sums @ weights).reshape(3, blocks, -1).cumsum(axis=1)  # (3, blocks, 1 + R)
        self._holders = np.array([len(np.unique(self._patient[one > 0])) for one in self._kinds])

        present = rows.sums() > 0
        self._patients = np.stack([present & fractured, present & ~fractured]) @ weights  # (2, 1 + R)
        self.prevalence = float(self._patients[0, 0] / present.sum())
        highest = np.zeros(len(patients))
        np.maximum.at(highest, rows.number, rows.probability)
        at_level = predictions["vertebra"].to_numpy() == level if level in VERTEBRAE else True
        ill = np.unique(patients.get_indexer(pd.Index(whose[at_level & (predictions["label"] == 1)])))
        self._ill = np.sort(highest[ill])
        well = np.setdiff1d(np.flatnonzero(present), ill)
        self._well = [np.sort(highest[well[fractured[well] == kind]]) for kind in (True, False)]
        broken = predictions[(predictions["label"] == 1) & predictions["vertebra"].isin(VERTEBRAE)]
        scores = broken["probability"].to_numpy()
        if level == "patient":
            scores = highest[patients.get_indexer(pd.Index(whose[broken.index]))]
        self._broken = {name: np.sort(scores[(broken["vertebra"] == name).to_numpy()]) for name in VERTEBRAE}
        self.positives = {name: len(scores) for name, scores in self._broken.items()}

    @cached_property
    def band(self) -> pd.DataFrame | None:
        """The precision–recall curve with its band, of `intervals.curve_bands`; None: too few patients."""
        try:
            return curve_bands(self.cases)
        except ValueError:  # the table is checked, so that what is left are resamples of one class only
            return None

    def at(self, threshold: float, prevalence: float | None = None) -> Point:
        """What the threshold does.

        Args:
            threshold: positive means probability ≥ threshold.
            prevalence: share of patients who are fractured, for the rates and the missed; None: as found.
                Fractured patients are taken to look as they do here, and so are intact ones.

        Raises:
            ValueError: a prevalence outside (0, 1), or one is given where all patients here are alike.
        """
        many = int(np.searchsorted(self._falling, -threshold, side="right"))  # called rows
        rest = slice(many // _BLOCK * _BLOCK, many)
        called = self._sums[:, many // _BLOCK] + self._kinds[:, rest] @ self._weights[self._patient[rest]]
        tp, *alarms = called
        fn, *quiet = (rows := self._sums[:, -1]) - called
        cells = np.stack([tp, sum(alarms), fn, sum(quiet)], axis=1).astype(np.float64)  # (1 + R, 4)
        names = ("tp", "fp", "fn", "tn")
        counts = dict(zip(names, cells[0].astype(int).tolist(), strict=True))
        draws = rates(pd.DataFrame(cells, columns=names))[[*RATES]].to_numpy().T  # (rates, 1 + R)
        value, draws = draws[:, 0], draws[:, 1:]
        limits = np.array(Estimates(confusion_sums(self.cases, threshold)).limits(value, draws, CONFIDENCE))
        limits[:, np.isnan(draws).mean(axis=1) > MOST_UNDEFINED] = np.nan
        found = pd.DataFrame({"value": value, "low": limits[0], "high": limits[1]}, index=list(RATES))
        restated = found
        if prevalence is not None:
            up, down = self._scales(prevalence)
            restated = restated_rates(called, rows, self._holders, np.stack([up, up, down]), CONFIDENCE)
            # What one group alone decides is the same everywhere.
            alone = ["recall", "specificity"] if not rows[1, 0] else ["recall"]
            restated.loc[alone] = found.loc[alone]
        return Point(
            threshold,
            counts,
            dict(zip(RATES, value.tolist(), strict=True)),
            {name: Estimate(*three) for name, *three in restated.itertuples()},
            self._recalls(threshold),
            self._missed(threshold, prevalence),
            self._called_back(threshold, prevalence),
        )

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
        return dict(zip(VERTEBRAE, _shares(found, list(self.positives.values())), strict=True))

    def _missed(self, threshold: float, prevalence: float | None) -> Estimate:
        missed, (fractured, intact) = np.searchsorted(self._ill, threshold), self._patients[:, 0]
        of, share = (fractured + intact, 1.0) if prevalence is None else (fractured, prevalence)
        return Estimate(*(1000 * share * number for number in _shares([missed], [of])[0]))

    def _called_back(self, threshold: float, prevalence: float | None) -> Estimate:
        """Patients with a fracture elsewhere only, and without any: two shares, one interval."""
        called = [int((scores >= threshold).sum()) for scores in self._well]
        of = self._patients[:, 0]
        if prevalence is None:
            return Estimate(*(1000 * number for number in _shares([sum(called)], [of.sum()])[0]))
        # Without a patient of the first kind its share is 0 for certain, not 0 of some.
        parts = [
            (weight, share)
            for weight, share, scores in zip(
                (prevalence, 1 - prevalence), _shares(called, of), self._well, strict=True
            )
            if len(scores)
        ]
        value = sum(weight * share.value for weight, share in parts)
        below, above = (
            np.sqrt(sum((weight * (share.value - share[end])) ** 2 for weight, share in parts))
            for end in (1, 2)
        )
        return Estimate(1000 * value, 1000 * (value - below), 1000 * (value + above))


def _shares(some: ArrayLike, of: ArrayLike) -> list[Estimate]:
    """Shares of independent cases with score intervals; NaN where there is no case."""
    cases = np.asarray(of, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.asarray(some) / cases
        low, high = score_interval(value, cases, CONFIDENCE)
    return [Estimate(*map(float, three)) for three in zip(value, low, high, strict=True)]
