"""Headline numbers of one sample under any patient weights, and the limits of their intervals.

`intervals` says which interval is made how, and why.

Source: effective number of cases, Korn and Graubard, Survey Methodology 24 (1998); for areas, Kottas, Kuo and
Zapf, Statistics in Medicine 33 (2014).
"""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import t

from cspine_helpers.metrics import rates
from cspine_helpers.resampling import (
    COUNTS,
    Floats,
    Ranking,
    Ratio,
    Sample,
    confusion_sums,
    loss_ratios,
)

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

    Args:
        value: shares in [0, 1].
        cases: how many; need not be whole numbers.
        confidence: of the interval.
        freedom: degrees of freedom with which the number of cases is known.

    Source: Wilson, Journal of the American Statistical Association 22 (1927), page 209.
    """
    p, n, z = np.asarray(value), np.asarray(cases), t.ppf((1 + confidence) / 2, freedom)
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return np.clip(middle - half, 0, p), np.clip(middle + half, p, 1)  # rounding must not exclude p itself


def loss_interval(value: float, draws: Floats, patients: int, confidence: float) -> tuple[float, float]:
    """Limits of a mean that is never negative, by Student's t on the logarithm.

    Few patients can hold most of a loss: percentiles, and t without the logarithm, then reach too low and
    not high enough.

    Args:
        value: the mean.
        draws: the mean in the resamples, (R,).
        patients: that it is of.
        confidence: of the interval.
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
    shorter than either where patients are few.

    Args:
        shares: of the patients, (P,); their mean is the estimate. See `shares_of`.
        confidence: of the interval.

    Returns:
        Lower and upper limit; NaN of fewer than two patients.

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


def quantiles(draws: Floats, confidence: float) -> tuple[Floats, Floats]:
    """Percentile limits of draws (…, R)."""
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2], axis=-1)
    return low, high


def effective_cases(value: float, draws: Floats, rows: float, patients: float) -> float:
    """Independent cases that would vary as much as the draws of a share do.

    At most as many as rows. As many as patients where the draws do not vary, as where every fracture is
    found: nothing then tells how alike a patient's rows are, and counting patients is the careful choice.

    Args:
        value: the share.
        draws: the share in the resamples, (R,).
        rows: that it is a share of; infinite where it is none of rows.
        patients: that those rows belong to.
    """
    if patients < 2 or np.ptp(draws) < _SAME:
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


def estimates(rows: Sample, threshold: float | None, *, rsna: pd.DataFrame | None = None) -> Estimates:
    """The headline numbers of a sample.

    Args:
        rows: the sample.
        threshold: for the rates; None leaves them out.
        rsna: `competition.rsna_terms` with the column `patient`, the number of the study's patient in the
            sample; None leaves its losses out.
    """
    counts = None if threshold is None else confusion_sums(rows, threshold)
    means = loss_ratios(rows)
    if rsna is not None:
        each = rsna.assign(mean=rsna["loss"] / rsna["weight"], studies=1.0).groupby("patient").sum()
        sums = each.reindex(range(rows.patients), fill_value=0.0).to_dict("series")
        loss, weight, mean, studies = (
            sums[name].to_numpy() for name in ("loss", "weight", "mean", "studies")
        )
        means["rsna_loss"] = (loss, weight)
        means["rsna_loss_per_patient"] = (mean, studies)
    positive = rows.sums(rows.labels)
    ranked = min((positive > 0).sum(), (rows.sums() > positive).sum())
    return Estimates(counts, means, Ranking(rows), int(ranked))
