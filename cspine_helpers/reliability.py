"""Do probabilities mean what they say? Their reliability in bins, and scores, with intervals.

Patients are the units that vary: the seven vertebrae of one are no seven independent cases.
"""

from typing import Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cspine_helpers.estimates import loss_interval, score_interval
from cspine_helpers.labels import UID
from cspine_helpers.metrics import LEVELS, at_level, check_scores
from cspine_helpers.paths import listing
from cspine_helpers.predictions import validate_predictions
from cspine_helpers.resampling import resampled
from cspine_helpers.tables import require_columns

Bins = Literal["quantile", "uniform"]

_SMALLEST = float(
    np.finfo(np.float64).eps
)  # how near 0 and 1 a probability may come, where a logarithm follows


def scored_rows(predictions: pd.DataFrame, level: str, *, one_split: bool = True) -> pd.DataFrame:
    """The checked rows of a predictions table at one level, or of a table of patients at level `patient`.

    Args:
        predictions: predictions table, or `StudyInstanceUID, split, label, probability` with one row a
            patient.
        level: one of `metrics.LEVELS`; vertebrae become patients by their maximum.
        one_split: refuse rows of several splits, as a figure that pools them describes neither.

    Raises:
        ValueError: the table breaks the schema, holds patients where the level is one of vertebrae, has no
            row at that level, or holds several splits.
    """
    if "vertebra" in predictions.columns:
        rows = at_level(validate_predictions(predictions), level)
    elif level in LEVELS and level != "patient":
        raise ValueError(
            f"Level {level!r} is one of vertebrae, and the table has no column 'vertebra': its rows are "
            "patients. Use level='patient', or the predictions table."
        )
    else:
        require_columns(predictions, (UID, "split", "label", "probability"), what="The table of patients")
        check_scores(predictions["label"], predictions["probability"])
        if (twice := predictions[UID].duplicated()).any():
            names = listing(predictions[UID][twice].drop_duplicates())
            raise ValueError(f"Patients that stand in the table more than once: {names}. Keep one row each.")
        rows = at_level(predictions, level)
    splits = rows["split"].drop_duplicates().tolist()
    if one_split and len(splits) > 1:
        raise ValueError(f"The table holds the splits {listing(splits)}. Pass the rows of one of them.")
    return rows


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
    patient, names = pd.factorize(rows[UID])
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


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence lies between 0 and 1; found {confidence}. 0.95 is usual.")


def interval(drawn: NDArray[np.float64], confidence: float) -> NDArray[np.float64]:
    """Percentile limits (2, …) of draws (R, …).

    Raises:
        ValueError: a confidence outside (0, 1).
    """
    _check_confidence(confidence)
    return np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)


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


def log_losses(labels: ArrayLike, probabilities: ArrayLike) -> NDArray[np.float64]:
    """−ln of the probability given to the truth, (N,); probabilities stay one rounding error off 0 and 1.

    Raises:
        ValueError: see `metrics.check_scores`.
    """
    y, p = check_scores(labels, probabilities)
    p = np.clip(p, _SMALLEST, 1 - _SMALLEST)
    return -np.where(y == 1, np.log(p), np.log1p(-p))


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

    `brier` is the mean squared error, `log_loss` the mean of `log_losses`, `bias` the mean probability minus
    the share of fractures, `ece` the expected calibration error: the mean distance between probability and
    share of fractures over the bins, by cases. Chance alone makes an ECE larger than 0 and resampling makes
    it larger again, so that its interval is mirrored at the value (basic bootstrap), stops at 0, and is drawn
    out to the value where it would end below. The intervals of both losses are those of
    `intervals.bootstrap`.

    Args:
        predictions: see `scored_rows`; one split.
        level: one of `metrics.LEVELS`.
        bins: bins of the ECE.
        strategy: see `reliability_table`.
        resamples: how often the patients are drawn anew.
        confidence: of the intervals.
        seed: of the draws.

    Returns:
        Columns `score, value, low, high`.

    Raises:
        ValueError: see `reliability_table`.

    Source: Brier, Mon Weather Rev 78 (1950) 1-3; Naeini et al., AAAI (2015) 2901-2907; Davison & Hinkley,
    Bootstrap Methods (1997), section 5.2.
    """
    rows = scored_rows(predictions, level)
    y, p = rows["label"].to_numpy(), rows["probability"].to_numpy()
    edges, place = _bins(p, bins, strategy)
    inside = place[:, None] == np.arange(len(edges) - 1)
    terms = np.column_stack(
        [np.ones(len(y)), (p - y) ** 2, log_losses(y, p), p - y, (p - y)[:, None] * inside]
    )
    sums = patient_sums(rows[UID], terms)
    found, drawn = _scores(sums.sum(axis=0)), _scores(resampled(sums, resamples, seed))
    low, high = interval(drawn, confidence)
    for loss in (0, 1) if len(sums) > 1 else ():
        low[loss], high[loss] = loss_interval(float(found[loss]), drawn[:, loss], len(sums), confidence)
    low[3], high[3] = max(0, 2 * found[3] - high[3]), max(found[3], 2 * found[3] - low[3])
    return pd.DataFrame(
        {"score": ["brier", "log_loss", "bias", "ece"], "value": found, "low": low, "high": high}
    )


def _scores(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Brier score, log loss, bias, ECE from (…, 4 + K) sums."""
    cases = sums[..., :1]
    ece = np.abs(sums[..., 4:]).sum(axis=-1, keepdims=True)
    return np.concatenate([sums[..., 1:4], ece], axis=-1) / cases


def patient_sums(uids: pd.Series, terms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Terms (N, K) of the rows added up for each patient, (patients, K)."""
    patient, names = pd.factorize(uids)
    return np.stack([np.bincount(patient, column, len(names)) for column in terms.T], axis=1)


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
