"""Reliability: predicted against observed in bins, and scores of calibration, with patients as units."""

from typing import Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit, logit

from cspine_helpers.evaluation.cases import Cases, check_choice
from cspine_helpers.evaluation.resampling import (
    check_confidence,
    loss_interval,
    mean_interval,
    resampled,
    score_interval,
    shares_of,
)
from cspine_helpers.metrics import log_losses

Bins = Literal["quantile", "uniform"]
_EDGE = 1e-6  # scores nearer to 0 or 1 count as this near, where their logit is taken


def reliability_table(
    cases: Cases, *, bins: int = 10, strategy: Bins = "quantile", confidence: float = 0.95
) -> pd.DataFrame:
    """Predicted against observed, in bins of the probability.

    The interval of a bin's share of fractures is Wilson's, for as many independent cases as would leave the
    share as uncertain as the bin's patients do (never more than its cases; its patients, where all cases are
    alike).

    Args:
        cases: of one split.
        bins: how many bins are asked for.
        strategy: `quantile`, bins of about equally many cases (fewer bins where scores tie), or `uniform`,
            bins of equal width. As in scikit-learn, a score on an edge belongs to the bin below.
        confidence: of the intervals.

    Returns:
        One row a bin: `lower, upper` (its edges), `cases, patients, positives, probability` (mean),
        `observed` (share of fractures), `low, high` (its interval). `undefined` marks bins without a case,
        whose `probability, observed, low, high` are NaN.

    Raises:
        ValueError: cases of several splits; no bin, an unknown strategy, a confidence outside (0, 1).

    Source: Korn & Graubard, Survey Methodology 24 (1998) 193-201, effective sample size; Wilson, J Am Stat
    Assoc 22 (1927) 209-212.

    Example:
        >>> reliability_table(Cases.of(predictions, split="validation"), bins=5)["cases"].sum().item()
        1400
    """
    check_confidence(confidence)
    y, p = cases.require().label, cases.probability
    edges, place = _bins(p, bins, strategy)
    inside = place[:, None] == np.arange(len(edges) - 1)  # (n, bins)
    n, k = cases.sums(inside), cases.sums(inside * y[:, None])  # (patients, bins)
    counted, patients, positives = n.sum(axis=0), (n > 0).sum(axis=0), k.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):  # a bin without a case: the documented NaN
        observed = positives / counted
        spread = ((k - observed * n) ** 2).sum(axis=0) / counted**2 * patients / (patients - 1)
        effective = np.minimum(observed * (1 - observed) / spread, counted)
        effective = np.where((spread > 0) & (patients > 1), effective, patients)
        mean = (inside * p[:, None]).sum(axis=0) / counted
        low, high = score_interval(observed, effective, confidence)
    table = {"lower": edges[:-1], "upper": edges[1:], "cases": counted.astype(np.int64), "patients": patients}
    table |= {"positives": positives.astype(np.int64), "probability": mean, "observed": observed}
    return pd.DataFrame(table | {"low": low, "high": high, "undefined": counted == 0})


def _bins(p: NDArray[np.float64], bins: int, strategy: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Edges (K + 1,) and the bin of each score (N,)."""
    if not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins is a whole number from 1; found {bins!r}. 10 is usual.")
    check_choice("strategy", strategy, get_args(Bins))
    steps = np.linspace(0, 1, bins + 1)
    edges = steps if strategy == "uniform" else np.unique(np.quantile(p, steps))
    if len(edges) == 1:  # all scores alike
        edges = np.repeat(edges, 2)
    return edges, np.searchsorted(edges[1:-1], p)


def calibration_scores(
    cases: Cases,
    *,
    bins: int = 10,
    strategy: Bins = "quantile",
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Scores of the probabilities with 95 % bootstrap intervals, resampling patients.

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

    The bins of the ECE are those of `reliability_table`. Patients are resampled for the losses, the signs of
    their errors for `p`; options as in `intervals.bootstrap`.

    Returns:
        Columns `score, value, low, high, p`; NaN where a score has none.

    Raises:
        ValueError: see `reliability_table`.

    Source: Brier, Mon Weather Rev 78 (1950) 1-3; Van Calster et al., BMC Med 17 (2019) 230, bias and slope;
    Kumar, Liang & Ma, NeurIPS (2019), the debiased error; Lee et al., J Mach Learn Res 24 (2023) 335, the
    test on it; Canay, Romano & Shaikh, Econometrica 85 (2017) 1013-1030, turning signs of clusters.

    Example:
        >>> scores = calibration_scores(Cases.of(predictions, split="validation"), resamples=50)
        >>> scores["score"].tolist()
        ['brier', 'log_loss', 'bias', 'slope', 'ece']
    """
    check_confidence(confidence)
    y, p = cases.require().label, cases.probability
    # 1. Losses, as the headline numbers have them.
    losses = cases.sums(np.column_stack([np.ones(len(y)), (p - y) ** 2, log_losses(y, p)]))
    losses = losses[losses[:, 0] > 0]
    total, drawn, patients = losses.sum(axis=0), resampled(losses, resamples, seed), len(losses)
    found: dict[str, tuple[float, float, float, float]] = {}
    for name, place in (("brier", 1), ("log_loss", 2)):
        value, draws = float(total[place] / total[0]), drawn[:, place] / drawn[:, 0]
        limits = loss_interval(value, draws, patients, confidence) if patients > 1 else (np.nan, np.nan)
        found[name] = (value, *limits, np.nan)

    # 2. Bias and slope: means over patients.
    for name, shares in {
        "bias": shares_of((cases.sums(p - y), cases.sums())),
        "slope": _slopes(cases),
    }.items():
        found[name] = (float(shares.mean()), *mean_interval(shares, confidence), np.nan)

    # 3. Distances of the bins.
    edges, bin_of = _bins(p, bins, strategy)
    inside = bin_of[:, None] == np.arange(len(edges) - 1)
    errors = cases.sums((p - y)[:, None] * inside)[cases.sums() > 0]  # (patients, bins)
    value, chance = _distance(errors, inside.sum(axis=0), resamples, seed)
    found["ece"] = (value, np.nan, np.nan, chance)
    table = pd.DataFrame.from_dict(found, orient="index", columns=["value", "low", "high", "p"])
    return table.rename_axis("score").reset_index()


def written_scores(table: pd.DataFrame) -> dict[str, str]:
    """Each score of `calibration_scores` in words: its value, and its interval or the p of its test.

    Example:
        >>> scores = calibration_scores(Cases.of(predictions, split="validation"))
        >>> written_scores(scores)["slope"]
        '... (...)'
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


def _slopes(cases: Cases) -> NDArray[np.float64]:
    """What each patient contributes to the calibration slope, their mean, (P,); NaN where none fits best.

    Jackknife: the slope moves so far when a patient is left out, to one step of Newton's method.

    Source: Cox, Biometrika 45 (1958) 562-565; Bell & McCaffrey, Surv Methodol 28 (2002) 169-181.
    """
    y, z = cases.label, score_logit(cases.probability)
    if len(np.unique(y)) < 2 or np.ptp(z) == 0 or parted(y, z):
        return np.array([np.nan])
    x = np.stack([z, np.ones_like(z)], axis=1)
    slope, intercept = logistic(y, z)
    fitted = expit(slope * z + intercept)
    terms = np.column_stack([x * (y - fitted)[:, None], (fitted * (1 - fitted))[:, None] * x[:, :1] * x])
    sums = cases.sums(np.column_stack([terms, fitted * (1 - fitted)]))[cases.sums() > 0]
    curvature = sums[:, [2, 3, 3, 4]].reshape(-1, 2, 2)
    try:
        moved = np.linalg.solve(curvature.sum(axis=0) - curvature, sums[:, :2, None])[:, 0, 0]
    except np.linalg.LinAlgError:  # one patient decides alone
        return np.array([np.nan])
    return slope + (len(moved) - 1) * (moved - moved.mean())


def score_logit(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log odds of scores, which are kept a millionth off 0 and 1."""
    return logit(np.clip(p, _EDGE, 1 - _EDGE))


def parted(y: NDArray[np.int_], z: NDArray[np.float64]) -> bool:
    """Whether a score separates the classes, so that a steeper curve always fits better."""
    positive, negative = z[y == 1], z[y == 0]
    return bool(positive.min() >= negative.max() or positive.max() <= negative.min())


def logistic(y: NDArray[np.int_], z: NDArray[np.float64], *, shift: bool = True) -> tuple[float, float]:
    """Slope and intercept (0 without `shift`) of the highest likelihood."""
    from sklearn.linear_model import LogisticRegression

    options = {"C": np.inf, "fit_intercept": shift, "solver": "newton-cholesky", "tol": 1e-10}
    fit = LogisticRegression(max_iter=1000, **options).fit(z[:, None], y)
    return float(fit.coef_[0, 0]), float(fit.intercept_[0]) if shift else 0.0
