"""Bootstrap over patients: how often each is drawn, and every metric as sums weighted by that.

A patient drawn three times counts as three, each time with all of its rows. Scores are sorted once; after
that a resample costs sums only. Shapes: n cases, P patients, R resamples.

Source: effective number of cases, Korn and Graubard, Survey Methodology 24 (1998); for areas, Kottas, Kuo and
Zapf, Statistics in Medicine 33 (2014).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from scipy.stats import t

from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.metrics import log_losses, rates

Floats = NDArray[np.float64]
Ratio = tuple[Floats, Floats]  # numerator and denominator summed over each patient's rows, (P,) both
COUNTS = ("tp", "fp", "fn", "tn")
_ENTRIES = 2**21  # rows × resamples worked on at once: 16 MB, about a processor's cache


def patient_weights(patients: int, resamples: int, seed: int, *, rows: int = 1) -> Iterator[Floats]:
    """How often each of P patients is drawn, with replacement: (P, part of R), columns that sum to P.

    One seed gives the same resamples for the same P; many `rows` to resample come in smaller pieces.
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


def confusion_sums(cases: Cases, threshold: float) -> Floats:
    """Each patient's `COUNTS` at a threshold, (4, P)."""
    called, y = cases.probability >= threshold, cases.label == 1
    return np.stack([cases.sums(cell) for cell in (called & y, called & ~y, ~called & y, ~called & ~y)])


class Ranking:
    """Rows sorted by score once, for the curves and areas of any resample.

    Only scores that a positive row has are steps of recall; the negative rows between two of them matter by
    their number alone. So a resample costs one pass over the rows and then works on the steps.
    """

    def __init__(self, cases: Cases) -> None:
        score, step = np.unique(-cases.probability, return_inverse=True)  # from the highest score down
        y = cases.label == 1
        found = np.bincount(step[y], minlength=len(score)) > 0  # scores with a positive row
        place: NDArray[np.intp] = (np.cumsum(found) - found)[step]  # how many lie above the row's own score
        tied, many = ~y & found[step], int(found.sum())

        def counts(mask: NDArray[np.bool_]) -> csr_array:
            ones = np.ones(int(mask.sum()))
            return csr_array(
                (ones, (place[mask], cases.number[mask])), shape=(many + 1, len(cases.population))
            )

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


RATES = {  # of which rows
    "recall": ("tp", "fn"),
    "precision": ("tp", "fp"),
    "specificity": ("tn", "fp"),
    "npv": ("tn", "fn"),
    "f1": ("tp", "fp", "fn"),
    "accuracy": COUNTS,
}
AREAS = ("auroc", "average_precision")
_MOST_SKEW = 0.5  # times √patients / t: from there on the correction grows in length, hardly in coverage
_SAME = 1e-9  # draws that differ by less are equal but for rounding


def score_interval(
    value: ArrayLike, cases: ArrayLike, confidence: float = 0.95, *, freedom: float = np.inf
) -> tuple[Floats, Floats]:
    """Lower and upper limit of shares of so many independent cases, by Wilson's formula.

    `freedom`: degrees of freedom with which the number of cases, which need not be whole, is known.

    Source: Wilson, Journal of the American Statistical Association 22 (1927), page 209.
    """
    p, n, z = np.asarray(value), np.asarray(cases), t.ppf((1 + confidence) / 2, freedom)
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return np.clip(middle - half, 0, p), np.clip(middle + half, p, 1)  # rounding must not exclude p itself


def loss_interval(value: float, draws: Floats, patients: int, confidence: float) -> tuple[float, float]:
    """Limits of a mean that is never negative, by Student's t on the logarithm.

    Of the value of so many patients and its draws (R,). Few patients can hold most of a loss: percentiles,
    and t without the logarithm, then reach too low and not high enough.
    """
    if value <= 0:
        return value, value
    error = draws.std() * np.sqrt(patients / (patients - 1)) / value  # of the logarithm, to first order
    factor = float(np.exp(t.ppf((1 + confidence) / 2, patients - 1) * error))
    return value / factor, value * factor


def mean_interval(shares: Floats, confidence: float) -> tuple[float, float]:
    """Limits of the mean of what independent patients contribute, of either sign.

    Each end is the farther of two: Student's t, and t corrected for the skewness of the shares. The first
    reaches too short on the side of a long tail, the second on the other. Percentiles of resamples are
    shorter than either where patients are few. NaN of fewer than two patients (P,); see `shares_of`.

    Source: Hall, J R Stat Soc B 54 (1992) 221-228, the cubic transformation of t.
    """
    patients, middle = len(shares), float(np.mean(shares))
    if patients < 2:
        return np.nan, np.nan
    spread = shares.std(ddof=1)
    if spread == 0:
        return middle, middle
    q = t.ppf((1 + confidence) / 2, patients - 1) / np.sqrt(patients)
    skew = np.clip(((shares - middle) ** 3).mean() / spread**3, -_MOST_SKEW / q, _MOST_SKEW / q)
    ends = np.array([q, -q])
    corrected = ends - skew / (6 * patients)
    if abs(skew) > _SAME:
        corrected = 3 * (np.cbrt(1 + skew * corrected) - 1) / skew
    low, high = middle - spread * np.stack([ends, corrected])[:, [0, 1]].T
    return float(low.min()), float(high.max())


def shares_of(ratio: Ratio) -> Floats:
    """What each patient contributes to a ratio of sums, so that the mean of the shares is the ratio, (P,).

    Patients who have no row are left out.
    """
    above, below = (part[ratio[1] > 0] for part in ratio)
    value = above.sum() / below.sum()
    return value + (above - value * below) / below.mean()


def mean_by_patient(
    values: ArrayLike, patients: ArrayLike, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean of values (n,) over cases, and its limits, whole patients being the unit; NaN is left out.

    All three are NaN where no value is there, the limits where fewer than two patients have one.

    Example:
        >>> mean, low, high = mean_by_patient([0.8, 0.9, 0.4, 0.7], ["a", "a", "b", "c"])
        >>> round(mean, 2), bool(low < mean < high)
        (0.7, True)
    """
    check_confidence(confidence)
    table = pd.DataFrame({"value": np.asarray(values, dtype=np.float64), "patient": np.asarray(patients)})
    each = table.dropna(subset="value").groupby("patient")["value"]
    if not len(each):
        return np.nan, np.nan, np.nan
    above, below = (np.asarray(part, dtype=np.float64) for part in (each.sum(), each.size()))
    return float(above.sum() / below.sum()), *mean_interval(shares_of((above, below)), confidence)


def share_by_patient(
    hits: ArrayLike, patients: ArrayLike, confidence: float = 0.95, *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Share of hits (n,) of 0 and 1 (between them where ties are averaged), as `mean_by_patient` has a mean.

    The limits are Wilson's, of as many cases as the patients make them worth: of a share of 0 or 1, too.

    Example:
        >>> share, low, high = share_by_patient([1, 1, 1, 1], ["a", "a", "b", "c"])
        >>> share, round(low, 2), high
        (1.0, 0.44, 1.0)
    """
    found = mean_by_patient(hits, patients, confidence)
    table = pd.DataFrame({"hit": np.asarray(hits, dtype=np.float64), "patient": np.asarray(patients)})
    each = table.dropna(subset="hit").groupby("patient")["hit"].agg(["sum", "size"]).to_numpy(np.float64)
    if len(each) < 2:
        return found
    drawn = resampled(each, resamples, seed)
    cases = effective_cases(found[0], drawn[:, 0] / drawn[:, 1], each[:, 1].sum(), len(each))
    low, high = score_interval(found[0], cases, confidence)
    return found[0], float(low), float(high)


def quantiles(draws: Floats, confidence: float) -> tuple[Floats, Floats]:
    """Percentile limits of draws (…, R)."""
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2], axis=-1)
    return low, high


def effective_cases(value: float, draws: Floats, rows: float, patients: float) -> float:
    """Independent cases that would vary as much as the draws (R,) of a share of rows do.

    At most as many as rows. As many as their patients where the draws do not vary or the share is 0 or 1, as
    where every fracture is found: nothing then shows how alike a patient's rows are, and counting patients is
    the careful choice.
    """
    if patients < 2 or np.ptp(draws) < _SAME or not 0 < value < 1:
        return max(patients, 1.0)
    variance = draws.var() * patients / (patients - 1)  # resamples of few patients vary too little
    return float(min(rows, value * (1 - value) / variance))


def correlation(first: Floats, second: Floats) -> float:
    """Of two metrics over the resamples that define both; 0, the careful choice, where one does not vary."""
    both = ~np.isnan(first + second)
    a, b = first[both], second[both]
    if not len(a) or np.ptp(a) < _SAME or np.ptp(b) < _SAME:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def combined(first: Floats, second: Floats, together: Floats) -> Floats:
    """Half-width of a difference from those of its parts and the correlation of the two."""
    return np.sqrt(np.maximum(first**2 + second**2 - 2 * together * first * second, 0))


def share_limits(
    value: Floats, draws: Floats, rows: Floats, patients: ArrayLike, confidence: float
) -> tuple[Floats, Floats]:
    """Limits of shares (M,) of so many rows of so many patients, from their draws (M, R); NaN if undefined.

    Those of `score_interval` with as many cases as `effective_cases` says.
    """
    found = np.full((2, len(value)), np.nan)
    for place, (one, drawn, many, held) in enumerate(
        zip(value, draws, rows, np.broadcast_to(patients, len(value)), strict=True)
    ):
        some = drawn[~np.isnan(drawn)]
        if not np.isnan(one) and len(some):
            cases = effective_cases(float(one), some, float(many), float(held))
            found[:, place] = score_interval(one, cases, confidence)
    return found[0], found[1]


def difference_limits(
    values: Sequence[Floats], limits: Sequence[tuple[Floats, Floats]], draws: Sequence[Floats]
) -> tuple[Floats, Floats]:
    """Limits of second − first, (M,) each, from those of the two and how they vary together, draws (M, R).

    Source: Zou and Donner, Statistics in Medicine 27 (2008).
    """
    together = np.array([correlation(a, b) for a, b in zip(*draws, strict=True)])
    (low, high), (other_low, other_high) = limits
    difference = values[1] - values[0]
    below = combined(values[1] - other_low, high - values[0], together)
    return difference - below, difference + combined(other_high - values[1], values[0] - low, together)


@dataclass(frozen=True)
class Estimates:
    """Metrics of one sample, as sums over patients that any weights can be put on.

    Attributes:
        counts: each patient's tp, fp, fn and tn, (4, P); None leaves the rates out.
        means: numerator and denominator of each loss, (P,) both.
        ranking: of the rows by score; None leaves the areas out.
        ranked: patients with a row of either class, the fewer of the two.
    """

    counts: Floats | None = None
    means: dict[str, Ratio] = field(default_factory=dict)
    ranking: Ranking | None = None
    ranked: int = 0

    @property
    def names(self) -> list[str]:
        """The metrics in the order of all results."""
        some_rates, some_areas = self.counts is not None, self.ranking is not None
        return [*(RATES if some_rates else ()), *self.means, *(AREAS if some_areas else ())]

    def under(self, weights: Floats) -> Floats:
        """The metrics under patient weights (P, R), (metrics, R); NaN where one is undefined."""
        found = []
        if self.counts is not None:
            sums = self.counts @ weights
            found.append(rates(pd.DataFrame(sums.T, columns=COUNTS))[[*RATES]].to_numpy().T)
        if self.means:
            above, below = (np.stack(part) @ weights for part in zip(*self.means.values(), strict=True))
            found.append(np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0))
        if self.ranking is not None:
            found.append(self.ranking.areas(weights))
        return np.concatenate(found)

    def limits(self, value: Floats, draws: Floats, confidence: float) -> tuple[Floats, Floats]:
        """Limits of the metrics from values (metrics,) and draws (metrics, R); NaN where undefined."""
        found = np.full((2, len(value)), np.nan)
        for place, name in enumerate(self.names):
            some = draws[place][~np.isnan(draws[place])]
            if np.isnan(value[place]) or not len(some):
                continue
            if name in (*RATES, *AREAS):
                rows, patients = self._size(name)
                cases = effective_cases(value[place], some, rows, patients)
                freedom = max(patients - 1, 1) if name in AREAS else np.inf
                found[:, place] = score_interval(value[place], cases, confidence, freedom=freedom)
            else:
                found[:, place] = loss_interval(value[place], some, len(self.means[name][0]), confidence)
        return found[0], found[1]

    def _size(self, name: str) -> tuple[float, float]:
        """Rows and patients that a rate or area rests on."""
        if name in AREAS:
            return np.inf, float(self.ranked)
        assert self.counts is not None
        below = self.counts[[COUNTS.index(cell) for cell in RATES[name]]].sum(axis=0)
        return float(below.sum()), float((below > 0).sum())

    def table(self, value: Floats, draws: Floats, confidence: float) -> pd.DataFrame:
        """Columns `metric, value, low, high, undefined`."""
        low, high = self.limits(value, draws, confidence)
        missing = np.isnan(draws).sum(axis=1)
        columns = {"metric": self.names, "value": value, "low": low, "high": high, "undefined": missing}
        return pd.DataFrame(columns)


def estimates(
    cases: Cases, threshold: float | None, *, rsna: tuple[Floats, Floats] | None = None
) -> Estimates:
    """The headline numbers of cases; `rsna`: of `metrics.rsna_terms` by `cases.studies`."""
    counts = None if threshold is None else confusion_sums(cases, threshold)
    count = cases.sums()
    means: dict[str, Ratio] = {
        "log_loss": (cases.sums(log_losses(cases.label, cases.probability)), count),
        "brier": (cases.sums((cases.probability - cases.label) ** 2), count),
    }
    if rsna is not None:
        loss, weight = rsna
        whose = cases.population.get_indexer(pd.Index(cases.studies["patient"]))
        terms = (loss, weight, loss / weight, np.ones(len(loss)))
        sums = [np.bincount(whose, each, len(cases.population)).astype(np.float64) for each in terms]
        means |= {"rsna_loss": (sums[0], sums[1]), "rsna_loss_per_patient": (sums[2], sums[3])}
    positive = cases.sums(cases.label)
    ranked = min((positive > 0).sum(), (count > positive).sum())
    return Estimates(counts, means, Ranking(cases), int(ranked))


def check_confidence(confidence: float) -> None:
    """Refuse a confidence outside (0, 1).

    Raises:
        ValueError: it is.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence lies between 0 and 1; found {confidence}. 0.95 is usual.")
