"""Resampled patients: how often each is drawn, and every metric as a count weighted by that.

A patient drawn three times counts as three, each time with all of its rows. Scores are sorted once; after
that a resample costs sums only. Shapes: N rows, P patients, R resamples.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_array

from cspine_helpers.metrics import at_level, check_scores, log_losses, resampled_units

Floats = NDArray[np.float64]
Ratio = tuple[Floats, Floats]  # numerator and denominator summed over each patient's rows, (P,) both
COUNTS = ("tp", "fp", "fn", "tn")
_ENTRIES = 2**21  # rows × resamples worked on at once: 16 MB, about a processor's cache


@dataclass(frozen=True)
class Sample:
    """Scored rows and whose they are.

    Attributes:
        labels: (N,) of 0/1.
        probabilities: (N,) in [0, 1].
        patient: (N,) numbers of the patients, 0 … patients − 1; a patient may have no row here.
        patients: P.
    """

    labels: NDArray[np.int64]
    probabilities: Floats
    patient: NDArray[np.intp]
    patients: int

    def sums(self, values: NDArray | None = None) -> Floats:
        """Values (N,) summed over the rows of each patient, (P,); rows counted where none are given."""
        return np.bincount(self.patient, values, self.patients).astype(np.float64)


def sample(predictions: pd.DataFrame, level: str = "all", *, patients: pd.Index | None = None) -> Sample:
    """The rows of a predictions table at one of `metrics.LEVELS`.

    Args:
        predictions: predictions table.
        level: all vertebrae, one of C1…C7, or patients.
        patients: names of the patients (`metrics.resampled_units`), in the order of their numbers; those of
            the table where not given.

    Raises:
        ValueError: see `metrics.at_level` and `metrics.check_scores`.
    """
    if patients is None:
        patients = pd.Index(resampled_units(predictions).unique())
    rows = at_level(predictions, level)
    labels, probabilities = check_scores(rows["label"], rows["probability"])
    whose = patients.get_indexer(pd.Index(resampled_units(rows)))
    return Sample(labels, probabilities, whose, len(patients))


def patient_weights(patients: int, resamples: int, seed: int, *, rows: int = 1) -> Iterator[Floats]:
    """How often each patient is drawn, as many draws with replacement as there are patients.

    Args:
        patients: P.
        resamples: R.
        seed: of the draws; one seed gives the same resamples for the same P and `rows`.
        rows: of the table that is resampled: many rows come in smaller pieces.

    Yields:
        (P, part of R), columns that sum to P.
    """
    rng = np.random.default_rng(seed)
    size = max(1, min(resamples, _ENTRIES // max(rows, patients)))
    for start in range(0, resamples, size):
        many = min(size, resamples - start)
        drawn = rng.integers(patients, size=(many, patients)) + patients * np.arange(many)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=many * patients)
        yield np.ascontiguousarray(counts.reshape(many, patients).T, dtype=np.float64)


def resampled(sums: Floats, resamples: int, seed: int) -> Floats:
    """Totals of patients' sums (P, K) in each resample, (R, K).

    Raises:
        ValueError: no resample is asked for.
    """
    if resamples < 1:
        raise ValueError(f"resamples is a whole number from 1; found {resamples}. 1,000 is usual.")
    return np.concatenate([drawn.T @ sums for drawn in patient_weights(len(sums), resamples, seed)])


def confusion_sums(rows: Sample, threshold: float) -> Floats:
    """Each patient's `COUNTS` at a threshold, (4, P)."""
    called, y = rows.probabilities >= threshold, rows.labels == 1
    return np.stack([rows.sums(cell) for cell in (called & y, called & ~y, ~called & y, ~called & ~y)])


def loss_ratios(rows: Sample) -> dict[str, Ratio]:
    """Log loss (see `metrics.log_losses`) and Brier score, means over rows."""
    count = rows.sums()
    return {
        "log_loss": (rows.sums(log_losses(rows.labels, rows.probabilities)), count),
        "brier": (rows.sums((rows.probabilities - rows.labels) ** 2), count),
    }


class Ranking:
    """Rows sorted by score once, for the curves and areas of any resample.

    Only scores that a positive row has are steps of recall; the negative rows between two of them matter by
    their number alone. So a resample costs one pass over the rows and then works on the steps.
    """

    def __init__(self, rows: Sample) -> None:
        score, step = np.unique(-rows.probabilities, return_inverse=True)  # from the highest score down
        y = rows.labels == 1
        found = np.bincount(step[y], minlength=len(score)) > 0  # scores with a positive row
        place: NDArray[np.intp] = (np.cumsum(found) - found)[
            step
        ]  # how many of them lie above the row's own score
        tied, many = ~y & found[step], int(found.sum())

        def counts(mask: NDArray[np.bool_]) -> csr_array:
            ones = np.ones(int(mask.sum()))
            return csr_array((ones, (place[mask], rows.patient[mask])), shape=(many + 1, rows.patients))

        self._positive, self._tied, self._between = counts(y), counts(tied), counts(~y & ~tied)

    def steps(self, weights: Floats) -> tuple[Floats, Floats, Floats]:
        """True positives, false positives above and down to each step of recall, (steps + 1, R) each.

        The last row is the end of the list: all positives and all negatives.
        """
        tied = self._tied @ weights
        down_to = np.cumsum(self._between @ weights + tied, axis=0)
        return np.cumsum(self._positive @ weights, axis=0), down_to - tied, down_to

    def areas(self, weights: Floats) -> Floats:
        """AUROC and average precision of each resample, (2, R); NaN where a class is absent.

        Source: AUROC as the share of pairs ranked rightly, ties half (Hanley and McNeil 1982); average
        precision as the sum of precision over the steps of recall, as scikit-learn defines it.
        """
        tp, above, down_to = self.steps(weights)
        gained = np.diff(tp, axis=0, prepend=0)
        with np.errstate(invalid="ignore", divide="ignore"):  # a class that is absent
            auroc = 1 - np.sum(gained * (above + down_to), axis=0) / (2 * tp[-1] * down_to[-1])
            average_precision = np.sum(gained * tp / np.maximum(tp + down_to, 1), axis=0) / tp[-1]
        average_precision[down_to[-1] == 0] = np.nan
        return np.stack([auroc, average_precision])

    def precision_at(self, weights: Floats, recall: Floats) -> Floats:
        """Precision of each resample where recall first reaches the points (K,) above 0, (K, R).

        NaN where a class is absent.
        """
        tp, _, down_to = self.steps(weights)
        found = np.empty((len(recall), weights.shape[1]))
        for j in range(weights.shape[1]):
            at = np.searchsorted(tp[:, j], recall * tp[-1, j] * (1 - 1e-12))
            found[:, j] = tp[at, j] / np.maximum(tp[at, j] + down_to[at, j], 1)
        return np.where((tp[-1] == 0) | (down_to[-1] == 0), np.nan, found)

    def recall_at(self, weights: Floats, false_positive_rate: Floats) -> Floats:
        """Highest recall of each resample at the points (K,), (K, R); straight lines through ties.

        NaN where a class is absent.
        """
        tp, above, down_to = (np.pad(table, ((0, 1), (0, 0)), mode="edge") for table in self.steps(weights))
        gained, tied = np.diff(tp, axis=0, prepend=0), np.maximum(down_to - above, 1)
        found = np.empty((len(false_positive_rate), weights.shape[1]))
        for j in range(weights.shape[1]):
            wanted = false_positive_rate * down_to[-1, j] * (1 + 1e-12)
            at = np.searchsorted(down_to[:-1, j], wanted, side="right")
            part = np.clip((wanted - above[at, j]) / tied[at, j], 0, 1)
            found[:, j] = tp[at, j] - gained[at, j] * (1 - part)
        with np.errstate(invalid="ignore", divide="ignore"):  # a class that is absent
            return np.where(down_to[-1] == 0, np.nan, found / tp[-1])
