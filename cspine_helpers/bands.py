"""Bands around precision–recall and ROC curves, from resampled patients.

Percentiles at each point by itself, and no narrower than the score interval (Wilson) of as many independent
rows as the point rests on: where all resamples agree, near a precision or recall of 1, they know too little.
"""

from typing import Literal

import numpy as np
import pandas as pd

from cspine_helpers.estimates import quantiles, score_interval
from cspine_helpers.intervals import check_options, defined
from cspine_helpers.metrics import check_scores
from cspine_helpers.predictions import validate_predictions
from cspine_helpers.resampling import Ranking, patient_weights, sample


def curve_bands(
    predictions: pd.DataFrame,
    *,
    kind: Literal["pr", "roc"] = "pr",
    level: str = "all",
    points: int = 100,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """A curve with a band: at each point by itself, the share of resamples given as `confidence` lies within.

    Args:
        predictions: predictions table of one split.
        kind: "pr", precision where recall first reaches each point, or "roc", the highest recall at each
            false positive rate.
        level: one of `metrics.LEVELS`.
        points: on the axis across, evenly spaced: 1/points … 1 for recall, 0 … 1 for false positive rates.
        resamples: of the patients.
        seed: of the resamples.
        confidence: of the band at each point.

    Returns:
        Columns `recall, precision` ("pr") or `false_positive_rate, recall` ("roc"), `low, high, undefined`:
        the number of resamples that hold one class only; the band is of the others.

    Raises:
        ValueError: see `bootstrap`; unknown kind; no points; the level holds one class only, or more than
            5 % of the resamples do.
    """
    if kind not in ("pr", "roc") or points < 1:
        raise ValueError(f"A curve is 'pr' or 'roc', at 1 point or more; found {kind!r}, {points} points.")
    table = validate_predictions(predictions)
    patients = check_options(table, None, resamples, confidence)
    rows = sample(table, level, patients=patients)
    check_scores(rows.labels, rows.probabilities, both_classes=True)
    ranking, positives = Ranking(rows), float(rows.labels.sum())
    across = np.arange(1, points + 1) / points if kind == "pr" else np.arange(points + 1) / points
    curve = ranking.precision_at if kind == "pr" else ranking.recall_at
    value = curve(np.ones((len(patients), 1)), across)[:, 0]
    weights = patient_weights(len(patients), resamples, seed, rows=len(table))
    draws = np.concatenate([curve(drawn, across) for drawn in weights], axis=1)
    missing = np.isnan(draws).any(axis=0)
    names = ("recall", "precision") if kind == "pr" else ("false_positive_rate", "recall")
    defined(
        pd.DataFrame({"metric": [names[1]], "value": [0.0], "undefined": [missing.sum()]}), resamples, level
    )
    low, high = quantiles(draws[:, ~missing], confidence)
    rest = np.ceil(across * positives) / value if kind == "pr" else positives  # rows that a point rests on
    least, most = score_interval(value, rest, confidence)
    low, high = np.minimum(low, least), np.maximum(high, most)
    columns = {names[0]: across, names[1]: value, "low": low, "high": high, "undefined": missing.sum()}
    return pd.DataFrame(columns)
