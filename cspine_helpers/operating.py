"""What a threshold does at one level, with intervals, in about a millisecond: the numbers behind the slider.

The patients are resampled once. Then the counts of every resample are summed from the highest score down and
kept at every 64th row, so that a threshold costs one look-up and 63 rows at most. The intervals are those of
`intervals.bootstrap`, at another prevalence those of `prevalence.restated_rates`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from cspine_helpers.aggregation import Aggregation, aggregate
from cspine_helpers.bands import curve_bands
from cspine_helpers.estimates import RATES, Estimates, score_interval
from cspine_helpers.intervals import MOST_UNDEFINED
from cspine_helpers.labels import PATIENT, VERTEBRAE
from cspine_helpers.metrics import rates, resampled_units
from cspine_helpers.prevalence import check_prevalence, restated_rates
from cspine_helpers.resampling import confusion_sums, patient_weights, sample

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
        table: predictions table of the level: the one given, or with an aggregation one row for each patient.
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
        self.table = predictions
        if level == "patient" and aggregation is not None:  # one row a patient is a predictions table as well
            self.table = aggregate(predictions, aggregation).assign(vertebra=PATIENT)
        whose = resampled_units(predictions)
        patients = pd.Index(whose.unique())
        fractured = predictions.groupby(whose, sort=False)["label"].max().to_numpy() == 1
        self._rows = rows = sample(self.table, level, patients=patients)

        order = np.argsort(-rows.probabilities, kind="stable")
        self._falling, self._patient = -rows.probabilities[order], rows.patient[order]
        kind = np.where(rows.labels == 1, 0, np.where(fractured[rows.patient], 1, 2))[order]
        self._kinds = (kind == np.arange(3)[:, None]).astype(np.float32)  # (3, N)
        blocks = -(-len(kind) // _BLOCK) + 1  # nothing is called in the first one
        place = kind * blocks + np.arange(len(kind)) // _BLOCK + 1
        sums = csr_array(
            (np.ones(len(kind), np.float32), (place, self._patient)), shape=(3 * blocks, len(patients))
        )
        self._sums = (sums @ weights).reshape(3, blocks, -1).cumsum(axis=1)  # (3, blocks, 1 + R)
        self._holders = np.array([len(np.unique(self._patient[one > 0])) for one in self._kinds])

        present = np.bincount(rows.patient, minlength=len(patients)) > 0
        self._patients = np.stack([present & fractured, present & ~fractured]) @ weights  # (2, 1 + R)
        self.prevalence = float(self._patients[0, 0] / present.sum())
        highest = np.zeros(len(patients))
        np.maximum.at(highest, rows.patient, rows.probabilities)
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
        """The precision–recall curve with its band, of `bands.curve_bands`; None: too few patients."""
        try:
            return curve_bands(self.table, level=self.level)
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
        limits = np.array(Estimates(confusion_sums(self._rows, threshold)).limits(value, draws, CONFIDENCE))
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
