"""Probabilities and predictive values where fractures are more, or less, common than in the cohort."""

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cspine_helpers.estimates import score_interval
from cspine_helpers.labels import UID
from cspine_helpers.metrics import check_scores
from cspine_helpers.paths import listing
from cspine_helpers.reliability import interval, patient_sums, scored_rows
from cspine_helpers.resampling import resampled

COMPETITION_PREVALENCE = 0.476  # patients with a fracture in the RSNA 2022 training labels
SCREENING_PREVALENCE = 0.07  # patients with a fracture in an external, unselected set


def restate(probabilities: ArrayLike, *, was: float, now: float) -> NDArray[np.float64]:
    """Probabilities for a place where fractures are more or less common, by the ratio of the odds.

    Holds where only the prevalence differs: fractured cases look the same in both places, and so do intact
    ones. Both prevalences are of the level of the probabilities: of patients for patients, of vertebrae for
    vertebrae.

    Args:
        probabilities: (N,) in [0, 1], calibrated for the prevalence `was`.
        was: prevalence where they were calibrated, `calibration.Calibrator.prevalence`.
        now: prevalence where they are to be used.

    Raises:
        ValueError: a prevalence or probability outside its range.

    Source: Saerens, Latinne & Decaestecker, Neural Comput 14 (2002) 21-41, equation 2.4.
    """
    _, p = check_scores(np.zeros(np.shape(probabilities)), probabilities)
    old, new = check_prevalence([was, now])
    up, down = p * new / old, (1 - p) * (1 - new) / (1 - old)
    return up / (up + down)


def check_prevalence(prevalence: ArrayLike) -> NDArray[np.float64]:
    """Prevalences as floats.

    Raises:
        ValueError: one lies outside (0, 1).
    """
    found = np.asarray(prevalence, dtype=np.float64)
    if not ((found > 0) & (found < 1)).all():
        wrong = listing(np.atleast_1d(found)[~np.atleast_1d((found > 0) & (found < 1))].tolist())
        raise ValueError(f"A prevalence lies between 0 and 1; found {wrong}. Give a share, 0.07 for 7 %.")
    return found


def predictive_values(sensitivity: float, specificity: float, prevalence: ArrayLike) -> pd.DataFrame:
    """What an alarm, and no alarm, mean at other prevalences: Bayes' theorem.

    Returns:
        One row a prevalence: `prevalence, ppv, npv, alarms` (share of cases called positive).

    Raises:
        ValueError: a prevalence outside (0, 1), a rate outside [0, 1], or rates under which nothing (or
            everything) is called positive, so that one of the values is undefined.

    Source: Altman & Bland, BMJ 309 (1994) 102.
    """
    if not (0 <= sensitivity <= 1 and 0 <= specificity <= 1):
        raise ValueError(f"Rates lie in [0, 1]; found sensitivity {sensitivity}, specificity {specificity}.")
    if (sensitivity, specificity) in ((0, 1), (1, 0)):
        what = "no case" if specificity == 1 else "every case"
        raise ValueError(f"At this threshold {what} is called positive: choose one that parts the cases.")
    share = np.atleast_1d(check_prevalence(prevalence))
    hits, false_alarms = sensitivity * share, (1 - specificity) * (1 - share)
    cleared, missed = specificity * (1 - share), (1 - sensitivity) * share
    values = {"ppv": hits / (hits + false_alarms), "npv": cleared / (cleared + missed)}
    return pd.DataFrame({"prevalence": share} | values | {"alarms": hits + false_alarms})


def predictive_curve(
    predictions: pd.DataFrame,
    threshold: float,
    prevalence: ArrayLike,
    *,
    level: str = "patient",
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Predictive values at other prevalences, as `predictive_values`, with intervals from resampled patients.

    No interval is narrower than the score limits of sensitivity and of specificity make it: where no healthy
    patient is called, no resample calls one either, and that is no proof that none ever will be.

    Args:
        predictions: see `reliability.scored_rows`; one split.
        threshold: of that level; a case is positive at or above it.
        prevalence: prevalences of that level.
        level: one of `metrics.LEVELS`.
        resamples: how often the patients are drawn anew.
        confidence: of the intervals.
        seed: of the draws.

    Returns:
        One row a prevalence: `prevalence, ppv, ppv_low, ppv_high, npv, npv_low, npv_high, alarms`, and
        `undefined`: how many resamples lack a class or call all cases alike, and were left out.

    Raises:
        ValueError: see `reliability.scored_rows` and `predictive_values`; the level holds one class only, or
            no resample is defined.
    """
    rows = scored_rows(predictions, level)
    y, p = check_scores(rows["label"], rows["probability"], both_classes=True)
    terms = np.column_stack([y * (p >= threshold), y, (1 - y) * (p < threshold), 1 - y])
    sums = patient_sums(rows[UID], terms)
    tp, positives, tn, negatives = sums.sum(axis=0)
    rates = tp / positives, tn / negatives
    table = predictive_values(*rates, prevalence)
    tp, positives, tn, negatives = resampled(sums, resamples, seed).T
    alike = (tp == positives) & (tn == 0) | (tp == 0) & (tn == negatives)
    defined = (positives > 0) & (negatives > 0) & ~alike
    if not defined.any():
        raise ValueError(f"None of {resamples} resamples holds both classes and calls. Use more studies.")
    tpr, tnr = (tp[defined] / positives[defined])[:, None], (tn[defined] / negatives[defined])[:, None]
    share = table["prevalence"].to_numpy()
    drawn = {
        "ppv": tpr * share / (tpr * share + (1 - tnr) * (1 - share)),  # (resamples, prevalences)
        "npv": tnr * (1 - share) / (tnr * (1 - share) + (1 - tpr) * share),
    }
    held = (sums[:, 1] > 0).sum(), (sums[:, 3] > 0).sum()  # patients with a case of either class
    least = _by_score_limits(*rates, *held, share, confidence)
    for name, values in drawn.items():
        low, high = interval(values, confidence)
        table[f"{name}_low"] = np.minimum(low, least[name].min(axis=0))
        table[f"{name}_high"] = np.maximum(high, least[name].max(axis=0))
    names = ["prevalence", *(f"{name}{end}" for name in drawn for end in ("", "_low", "_high")), "alarms"]
    return table[names].assign(undefined=int((~defined).sum()))


def _by_score_limits(
    sensitivity: float, specificity: float, fractured: int, intact: int, share: NDArray, confidence: float
) -> dict[str, NDArray[np.float64]]:
    """Predictive values (4, prevalences) at each score limit of one rate, the other as found."""
    pairs = [(float(limit), specificity) for limit in score_interval(sensitivity, fractured, confidence)]
    pairs += [(sensitivity, float(limit)) for limit in score_interval(specificity, intact, confidence)]
    found = [predictive_values(*pair, share) for pair in pairs]
    return {name: np.stack([values[name] for values in found]) for name in ("ppv", "npv")}
