"""Two models on the same patients, or two thresholds: differences with intervals."""

import numpy as np
import pandas as pd
from scipy.stats import t

from cspine_helpers.estimates import (
    AREAS,
    RATES,
    Estimates,
    combined,
    correlation,
    mean_interval,
    shares_of,
)
from cspine_helpers.intervals import check_options, defined, headline_numbers, resample
from cspine_helpers.labels import UID
from cspine_helpers.paths import listing
from cspine_helpers.predictions import validate_predictions
from cspine_helpers.resampling import Floats


def compare(
    predictions: pd.DataFrame,
    other: pd.DataFrame | None = None,
    *,
    threshold: float | None,
    other_threshold: float | None = None,
    level: str = "all",
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    keep_undefined: bool = False,
) -> pd.DataFrame:
    """Differences between two models on the same patients, or between two thresholds, with intervals.

    Both are measured on the same resamples, so that what makes a patient hard for both cancels. Intervals:
    of a rate from the two rates' intervals and their correlation, as percentiles fail where positives are
    few; of an area by Student's t; of a loss by that of the patients' differences, corrected for skewness
    (`estimates.mean_interval`).

    Args:
        predictions: predictions table of one split.
        other: the other model's, of the same studies and vertebrae; the same table where not given.
        threshold: of the first; None leaves the rates out.
        other_threshold: of the other; that of the first where not given.
        level: one of `metrics.LEVELS`.
        resamples: of the patients.
        seed: of the resamples.
        confidence: of each interval by itself.
        keep_undefined: keep a metric that is undefined, as NaN, rather than raise.

    Returns:
        Columns `metric, value, other, difference, low, high, undefined`; the difference is other − value.

    Raises:
        ValueError: see `intervals.bootstrap`; the tables do not hold the same vertebrae, or label them
            differently.

    Source: Newcombe, Statistics in Medicine 17 (1998), page 2635, method 10; Zou and Donner, Statistics in
    Medicine 27 (2008).
    """
    table = validate_predictions(predictions)
    second = table if other is None else _aligned(table, validate_predictions(other))
    other_threshold = threshold if other_threshold is None else other_threshold
    check_options(table, other_threshold, resamples, confidence)
    patients = check_options(table, threshold, resamples, confidence)
    if (threshold is None) != (other_threshold is None):
        raise ValueError("Only one threshold is given. Give both, or none to leave the rates out.")
    pair = [
        headline_numbers(table, level, threshold, patients),
        headline_numbers(second, level, other_threshold, patients),
    ]
    values, draws = resample(pair, len(patients), resamples, seed, len(table))
    difference = values[1] - values[0]
    low, high = _limits(pair, values, draws, confidence)
    columns = {"metric": pair[0].names, "value": values[0], "other": values[1], "difference": difference}
    missing = np.isnan(draws[0] + draws[1]).sum(axis=1)
    found = pd.DataFrame(columns | {"low": low, "high": high, "undefined": missing})
    return found if keep_undefined else defined(found, resamples, level)


def _limits(
    pair: list[Estimates], values: list[Floats], draws: list[Floats], confidence: float
) -> tuple[Floats, Floats]:
    """Limits of the differences, (metrics,) both; NaN where one of the two is undefined."""
    difference, drawn = values[1] - values[0], draws[1] - draws[0]
    (low, high), (other_low, other_high) = (
        part.limits(value, draw, confidence) for part, value, draw in zip(pair, values, draws, strict=True)
    )
    together = np.array([correlation(a, b) for a, b in zip(*draws, strict=True)])
    below = combined(values[1] - other_low, high - values[0], together)
    above = combined(other_high - values[1], values[0] - low, together)
    freedom = max(pair[0].ranked - 1, 1)
    found = np.stack([difference - below, difference + above])
    for place, name in enumerate(pair[0].names):
        some = drawn[place][~np.isnan(drawn[place])]
        if np.isnan(difference[place]) or not len(some):
            found[:, place] = np.nan
        elif name in AREAS:
            half = t.ppf((1 + confidence) / 2, freedom) * some.std() * np.sqrt((freedom + 1) / freedom)
            found[:, place] = difference[place] - half, difference[place] + half
        elif name not in RATES:
            first, second = (shares_of(part.means[name]) for part in pair)
            found[:, place] = mean_interval(second - first, confidence)
    return found[0], found[1]


def _aligned(table: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """The other table's rows in the order of the first's."""
    keys = [UID, "vertebra"]
    both = table[[*keys, "label"]].merge(other, on=keys, how="outer", suffixes=("", "_other"), indicator=True)
    for side, which in (("left_only", "second"), ("right_only", "first")):
        alone = both[both["_merge"] == side]
        if len(alone):
            raise ValueError(
                f"{len(alone)} vertebrae are not in the {which} table: {_named(alone)}. "
                "Compare two models on the same studies and vertebrae."
            )
    differ = both[both["label"] != both["label_other"]]
    if len(differ):
        raise ValueError(
            f"{len(differ)} vertebrae are labelled differently in the two tables: {_named(differ)}. "
            "Predict both with one label table."
        )
    return table[keys].merge(other, on=keys, how="left")[list(other.columns)]


def _named(rows: pd.DataFrame) -> str:
    return listing(f"{uid} {name}" for uid, name in zip(rows[UID], rows["vertebra"], strict=True))
