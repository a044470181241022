"""Do probabilities mean what they say? Their reliability in bins, and scores, with intervals.

Patients are the units that vary: the seven vertebrae of one are no seven independent cases.
"""

from typing import Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cspine_helpers.evaluation.cases import resampled_units, scored_rows
from cspine_helpers.evaluation.resampling import (
    _check_confidence,
    loss_interval,
    mean_interval,
    patient_sums,
    resampled,
    score_interval,
    shares_of,
)
from cspine_helpers.metrics import check_scores, log_losses

Bins = Literal["quantile", "uniform"]
_EDGE = 1e-6  # scores nearer to 0 or 1 count as this near, where their logit is taken


def reliability_table(
    predictions: pd.DataFrame,
    *,
    level: str = "all",
    bins: int = 10,
    strategy: Bins = "quantile",
    confidence: float = 0.95,
) -> pd.DataFrame:
    """What was said against what was found, in bins of the probability.

    The interval of a bin's share of fractures is Wilson's, for as many independent cases as would leave the
    share as uncertain as the bin's patients do (never more than its cases; its patients, where all cases are
    alike).

    Args:
        predictions: see `scored_rows`; one split.
        level: one of `metrics.LEVELS`.
        bins: how many bins are asked for.
        strategy: `quantile`, bins of about equally many cases (fewer bins where scores tie), or `uniform`,
            bins of equal width. As in scikit-learn, a score on an edge belongs to the bin below.
        confidence: of the intervals.

    Returns:
        One row a bin: `lower, upper` (its edges), `cases, patients, positives, probability` (mean),
        `observed` (share of fractures), `low, high` (its interval). `undefined` marks bins without a case,
        whose `probability, observed, low, high` are NaN.

    Raises:
        ValueError: see `scored_rows`; no bin, an unknown strategy, a confidence outside (0, 1).

    Source: Korn & Graubard, Survey Methodology 24 (1998) 193-201, effective sample size; Wilson, J Am Stat
    Assoc 22 (1927) 209-212.
    """
    _check_confidence(confidence)
    rows = scored_rows(predictions, level)
    y, p = rows["label"].to_numpy(), rows["probability"].to_numpy()
    edges, place = _bins(p, bins, strategy)
    count = len(edges) - 1
    patient, names = pd.factorize(resampled_units(rows))
    cell, cells = patient * count + place, len(names) * count
    n = np.bincount(cell, minlength=cells).reshape(-1, count)  # (patients, bins)
    k = np.bincount(cell, y, cells).reshape(-1, count)
    cases, patients, positives = n.sum(axis=0), (n > 0).sum(axis=0), k.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):  # a bin without a case: the documented NaN
        observed = positives / cases
        spread = ((k - observed * n) ** 2).sum(axis=0) / cases**2 * patients / (patients - 1)
        effective = np.minimum(observed * (1 - observed) / spread, cases)
        effective = np.where((spread > 0) & (patients > 1), effective, patients)
        mean = np.bincount(place, p, count) / cases
        low, high = score_interval(observed, effective, confidence)
    table = {"lower": edges[:-1], "upper": edges[1:], "cases": cases, "patients": patients}
    table |= {"positives": positives.astype(np.int64), "probability": mean, "observed": observed}
    return pd.DataFrame(table | {"low": low, "high": high, "undefined": cases == 0})


def _bins(p: NDArray[np.float64], bins: int, strategy: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Edges (K + 1,) and the bin of each score (N,)."""
    if not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins is a whole number from 1; found {bins!r}. 10 is usual.")
    if strategy not in get_args(Bins):
        raise ValueError(f"Unknown strategy {strategy!r}. Choose one of {', '.join(get_args(Bins))}.")
    steps = np.linspace(0, 1, bins + 1)
    edges = steps if strategy == "uniform" else np.unique(np.quantile(p, steps))
    if len(edges) == 1:  # all scores alike
        edges = np.repeat(edges, 2)
    return edges, np.searchsorted(edges[1:-1], p)


def calibration_scores(
    predictions: pd.DataFrame,
    *,
    level: str = "all",
    bins: int = 10,
    strategy: Bins = "quantile",
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Scores of the probabilities with intervals from resampled patients.

    - `brier`, the mean squared error, and `log_loss`, the mean of `metrics.log_losses`; intervals as those of
      `intervals.bootstrap`.
    - `bias`, calibration-in-the-large: mean probability minus share of fractures.
    - `slope` of the observed on the predicted logit, ideally 1; below 1 probabilities come too near to 0 and
      1, above they keep too far. NaN where no slope fits best, as scores part the classes or are all alike.
    - `ece`, expected calibration error: the root mean squared distance of probability and share of fractures
      over the bins, by cases, less what chance adds to the squares (debiased; 0 where that is all). It has
      no interval: near 0 none covers with fifty patients, nor does a bootstrap with hundreds. Instead
      `p` tests that probabilities are calibrated: how often chance makes the distances so large, each
      patient's error turned round or not (all rows of a patient together).

    Args:
        predictions: see `scored_rows`; one split.
        level: one of `metrics.LEVELS`.
        bins: bins of the ECE.
        strategy: see `reliability_table`.
        resamples: of the patients, for the losses, and of the signs of their errors, for `p`.
        confidence: of the intervals.
        seed: of both.

    Returns:
        Columns `score, value, low, high, p`; NaN where a score has none.

    Raises:
        ValueError: see `reliability_table`.

    Source: Brier, Mon Weather Rev 78 (1950) 1-3; Van Calster et al., BMC Med 17 (2019) 230, bias and slope;
    Kumar, Liang & Ma, NeurIPS (2019), the debiased error; Lee et al., J Mach Learn Res 24 (2023) 335, the
    test on it; Canay, Romano & Shaikh, Econometrica 85 (2017) 1013-1030, turning signs of clusters.
    """
    _check_confidence(confidence)
    rows = scored_rows(predictions, level)
    y, p = rows["label"].to_numpy(), rows["probability"].to_numpy()
    # 1. Losses, as the headline numbers have them.
    losses = patient_sums(rows, np.column_stack([np.ones(len(y)), (p - y) ** 2, log_losses(y, p)]))
    total, drawn, patients = losses.sum(axis=0), resampled(losses, resamples, seed), len(losses)
    found: dict[str, tuple[float, float, float, float]] = {}
    for name, place in (("brier", 1), ("log_loss", 2)):
        value, draws = float(total[place] / total[0]), drawn[:, place] / drawn[:, 0]
        limits = loss_interval(value, draws, patients, confidence) if patients > 1 else (np.nan, np.nan)
        found[name] = (value, *limits, np.nan)

    # 2. Bias and slope: means over patients.
    shares = shares_of((patient_sums(rows, (p - y)[:, None])[:, 0], losses[:, 0]))
    found["bias"] = (float(shares.mean()), *mean_interval(shares, confidence), np.nan)
    shares = _slopes(rows, y, p)
    found["slope"] = (float(np.mean(shares)), *mean_interval(shares, confidence), np.nan)

    # 3. Distances of the bins.
    edges, bin_of = _bins(p, bins, strategy)
    inside = bin_of[:, None] == np.arange(len(edges) - 1)
    errors = patient_sums(rows, (p - y)[:, None] * inside)  # (patients, bins)
    value, chance = _distance(errors, inside.sum(axis=0), resamples, seed)
    found["ece"] = (value, np.nan, np.nan, chance)
    table = pd.DataFrame.from_dict(found, orient="index", columns=["value", "low", "high", "p"])
    return table.rename_axis("score").reset_index()


def written_scores(table: pd.DataFrame) -> dict[str, str]:
    """Each score of `calibration_scores` in words: its value, and its interval or the p of its test.

    Example:
        >>> written_scores(calibration_scores(validation))["ece"]
        '0.041 (p = 0.032)'
    """
    found = {}
    for score, value, low, high, p in table[["score", "value", "low", "high", "p"]].itertuples(index=False):
        beside = "" if np.isnan(low) else f" ({low:z.3f}{'–' if low >= 0 else ' to '}{high:z.3f})"
        if not np.isnan(p):
            beside = " (p < 0.001)" if p < 0.001 else f" (p = {p:.3f})"
        found[score] = "undefined" if np.isnan(value) else f"{value:z.3f}{beside}"
    return found


def _distance(
    errors: NDArray[np.float64], cases: NDArray[np.int64], resamples: int, seed: int
) -> tuple[float, float]:
    """Debiased root mean squared distance of bins from patients' errors (P, K), and the p of its test."""
    errors, cases = errors[:, cases > 0], cases[cases > 0]
    patients, weight = len(errors), 1 / cases
    if patients < 2:
        return np.nan, np.nan
    squares = errors.sum(axis=0) ** 2
    chance = patients * errors.var(axis=0, ddof=1)  # what it adds to the squares, on the average
    value = float(np.sqrt(max(0.0, ((squares - chance) * weight).sum() / cases.sum())))
    signs = np.random.default_rng(seed).integers(2, size=(resamples, patients)) * 2.0 - 1
    turned = ((signs @ errors) ** 2 * weight).sum(axis=1)
    as_large = turned >= (squares * weight).sum() * (1 - 1e-12)
    return value, float((1 + as_large.sum()) / (1 + resamples))


def _slopes(rows: pd.DataFrame, y: NDArray[np.int64], p: NDArray[np.float64]) -> NDArray[np.float64]:
    """What each patient contributes to the calibration slope, their mean, (P,); NaN where none fits best.

    Jackknife: the slope moves so far when a patient is left out, to one step of Newton's method.

    Source: Cox, Biometrika 45 (1958) 562-565; Bell & McCaffrey, Surv Methodol 28 (2002) 169-181.
    """
    z = logit(p)
    if len(np.unique(y)) < 2 or np.ptp(z) == 0 or parted(y, z):
        return np.array([np.nan])
    x = np.stack([z, np.ones_like(z)], axis=1)
    slope, intercept = logistic(y, x)
    fitted = sigmoid(slope * z + intercept)
    terms = np.column_stack([x * (y - fitted)[:, None], (fitted * (1 - fitted))[:, None] * x[:, :1] * x])
    sums = patient_sums(rows, np.column_stack([terms, fitted * (1 - fitted)]))
    curvature = sums[:, [2, 3, 3, 4]].reshape(-1, 2, 2)
    try:
        moved = np.linalg.solve(curvature.sum(axis=0) - curvature, sums[:, :2, None])[:, 0, 0]
    except np.linalg.LinAlgError:  # one patient decides alone
        return np.array([np.nan])
    return slope + (len(moved) - 1) * (moved - moved.mean())


def logit(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log odds of probabilities, which stay a millionth off 0 and 1."""
    p = np.clip(p, _EDGE, 1 - _EDGE)
    return np.log(p) - np.log1p(-p)


def sigmoid(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities of log odds."""
    return np.exp(-np.logaddexp(0, -z))


def parted(y: NDArray[np.int64], z: NDArray[np.float64]) -> bool:
    """Whether a score parts the classes, so that a steeper curve always fits better."""
    positive, negative = z[y == 1], z[y == 0]
    return bool(positive.min() >= negative.max() or positive.max() <= negative.min())


def logistic(y: NDArray[np.int64], x: NDArray[np.float64]) -> tuple[float, float]:
    """Slope and intercept (0 without its column in `x`) of the highest likelihood, by Newton's method."""

    def loss(beta: NDArray[np.float64]) -> float:
        z = x @ beta
        return float(np.logaddexp(0, np.where(y == 1, -z, z)).sum())

    beta = np.zeros(x.shape[1])
    for _ in range(100):
        p = sigmoid(x @ beta)
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x, x.T @ (y - p))
        size = 1.0  # of the step; halved while it goes too far, as the loss is convex
        while size > 1e-6 and loss(beta + size * step) > loss(beta):
            size /= 2
        beta = beta + size * step
        if np.abs(step).max() < 1e-10:
            break
    return float(beta[0]), float(beta[1]) if len(beta) > 1 else 0.0


def brier_decomposition(
    labels: ArrayLike, probabilities: ArrayLike, *, bins: int = 10, strategy: Bins = "quantile"
) -> dict[str, float]:
    """The Brier score as `reliability − resolution + uncertainty + within`.

    Reliability (small is good): squared distance of probability and share of fractures over the bins.
    Resolution (large is good): how far the bins' shares lie from the share of all. Uncertainty: the Brier
    score of always saying the share of all. Within: what the scores' spread inside the bins adds; 0 where
    each bin holds one score.

    Raises:
        ValueError: see `metrics.check_scores` and `reliability_table`.

    Source: Murphy, J Appl Meteorol 12 (1973) 595-600; Stephenson et al., Weather Forecast 23 (2008) 752-757.
    """
    y, p = check_scores(labels, probabilities)
    edges, place = _bins(p, bins, strategy)
    n, k, s = (np.bincount(place, weights, len(edges) - 1) for weights in (np.ones(len(y)), y, p))
    n, k, s = n[n > 0], k[n > 0], s[n > 0]
    base = float(y.mean())
    parts = {
        "brier": float(np.mean((p - y) ** 2)),
        "reliability": float((n * ((s - k) / n) ** 2).sum() / len(y)),
        "resolution": float((n * (k / n - base) ** 2).sum() / len(y)),
        "uncertainty": base * (1 - base),
    }
    rest = parts["brier"] - parts["reliability"] + parts["resolution"] - parts["uncertainty"]
    return parts | {"within": rest}
