"""Net benefit: is acting on the model better than acting on everybody, or on nobody?

Acting at a threshold t says that one fracture missed costs as much as (1 − t) / t needless work-ups. So the
threshold of a decision curve is a matter of values, and the probability it is held against has to be
calibrated.
"""

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cspine_helpers.metrics import check_scores
from cspine_helpers.prevalence import check_prevalence, restate
from cspine_helpers.reliability import interval, patient_sums, scored_rows
from cspine_helpers.resampling import resampled

THRESHOLDS = np.arange(1, 100) / 100


def net_benefit(
    labels: ArrayLike, probabilities: ArrayLike, thresholds: ArrayLike = THRESHOLDS
) -> pd.DataFrame:
    """True positives, less false positives weighed by the odds of the threshold, per case.

    Returns:
        One row a threshold: `threshold, net_benefit, treat_all, treat_none` (0).

    Raises:
        ValueError: see `metrics.check_scores`; one class is absent; a threshold outside [0, 1).

    Source: Vickers & Elkin, Med Decis Making 26 (2006) 565-574.
    """
    y, p = check_scores(labels, probabilities, both_classes=True)
    t = _check_thresholds(thresholds)
    model, treat_all = _benefit(_terms(y, p, t).sum(axis=0), t, None)
    return pd.DataFrame({"threshold": t, "net_benefit": model, "treat_all": treat_all, "treat_none": 0.0})


def decision_curve(
    predictions: pd.DataFrame,
    *,
    level: str = "patient",
    thresholds: ArrayLike = THRESHOLDS,
    prevalence: float | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """The decision curve of one level, with intervals from resampled patients, each threshold by itself.

    Args:
        predictions: see `reliability.scored_rows`; one split.
        level: one of `metrics.LEVELS`.
        thresholds: (K,) in [0, 1).
        prevalence: of that level, elsewhere: probabilities are restated for it (`prevalence.restate`), and
            cases weighed as often as they would occur there. The table's own where not given.
        resamples: how often the patients are drawn anew.
        confidence: of the intervals.
        seed: of the draws.

    Returns:
        One row a threshold: `threshold, net_benefit, low, high, treat_all, treat_none` (0); `gain` over the
        better of treating all and treating none, `gain_low, gain_high`; `undefined`, how many resamples lack
        a class and were left out (none, unless a prevalence is given).

    Raises:
        ValueError: see `reliability.scored_rows` and `net_benefit`; a prevalence outside (0, 1); no resample
            is defined.

    Source: Vickers & Elkin, Med Decis Making 26 (2006) 565-574; Vickers et al., BMC Med Inform Decis Mak 8
    (2008) 53.
    """
    rows = scored_rows(predictions, level)
    y, p = check_scores(rows["label"], rows["probability"], both_classes=True)
    t = _check_thresholds(thresholds)
    if prevalence is not None:
        prevalence = float(check_prevalence(prevalence))
        p = restate(p, was=float(y.mean()), now=prevalence)
    sums = patient_sums(rows, _terms(y, p, t))
    model, treat_all = _benefit(sums.sum(axis=0), t, prevalence)
    drawn = resampled(sums, resamples, seed)
    defined = (drawn[:, -2:] > 0).all(axis=1) | (prevalence is None)
    if not defined.any():
        raise ValueError(f"None of {resamples} resamples holds both classes. Use more studies.")
    models, all_of_them = _benefit(drawn[defined], t, prevalence)
    low, high = interval(models, confidence)
    gain_low, gain_high = interval(models - np.maximum(all_of_them, 0), confidence)
    table = {"threshold": t, "net_benefit": model, "low": low, "high": high}
    table |= {"treat_all": treat_all, "treat_none": np.zeros(len(t))}
    table |= {"gain": model - np.maximum(treat_all, 0), "gain_low": gain_low, "gain_high": gain_high}
    return pd.DataFrame(table).assign(undefined=int((~defined).sum()))


def _check_thresholds(thresholds: ArrayLike) -> NDArray[np.float64]:
    t = np.atleast_1d(np.asarray(thresholds, dtype=np.float64))
    if not len(t) or not ((t >= 0) & (t < 1)).all():
        raise ValueError(
            f"Thresholds of a decision curve lie in [0, 1), as at 1 no miss would count; found {t.tolist()}. "
            "Leave the others out."
        )
    return t


def _terms(y: NDArray[np.int64], p: NDArray[np.float64], t: NDArray[np.float64]) -> NDArray[np.float64]:
    """What each row adds to true positives (K), false positives (K), fractured, intact: (N, 2K + 2)."""
    called = p[:, None] >= t
    truth = np.stack([y, 1 - y], axis=1).astype(np.float64)
    return np.concatenate([called * truth[:, :1], called * truth[:, 1:], truth], axis=1)


def _benefit(
    sums: NDArray[np.float64], t: NDArray[np.float64], prevalence: float | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Net benefit of the model and of treating all, (…, K) each, from (…, 2K + 2) sums of `_terms`."""
    hits, false_alarms, totals = sums[..., : len(t)], sums[..., len(t) : -2], sums[..., -2:]
    share = totals / totals.sum(axis=-1, keepdims=True)  # fractured, intact
    weight = 1 / totals.sum(axis=-1, keepdims=True)  # of a case of either class
    if prevalence is not None:
        share = np.broadcast_to([prevalence, 1 - prevalence], totals.shape)
        weight = share / totals
    odds = t / (1 - t)
    model = hits * weight[..., :1] - false_alarms * weight[..., -1:] * odds
    return model, share[..., :1] - share[..., 1:] * odds
