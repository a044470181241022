"""Net benefit: is acting on the model better than acting on everybody, or on nobody?

Acting at a threshold t says that one fracture missed costs as much as (1 − t) / t needless work-ups. So the
threshold of a decision curve is a matter of values, and the probability it is held against has to be
calibrated.

Probabilities and predictive values where fractures are more, or less, common than in the cohort.
"""

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.evaluation.intervals import MOST_UNDEFINED
from cspine_helpers.evaluation.resampling import (
    RATES,
    check_confidence,
    effective_cases,
    quantiles,
    resampled,
    score_interval,
)
from cspine_helpers.files.paths import listing
from cspine_helpers.metrics import check_scores, rates_of

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

    Example:
        >>> restate([0.5, 0.9], was=0.5, now=0.1).round(2).tolist()
        [0.1, 0.5]
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
        raise ValueError(f"Rates are in [0, 1]; found sensitivity {sensitivity}, specificity {specificity}.")
    if (sensitivity, specificity) in ((0, 1), (1, 0)):
        what = "no case" if specificity == 1 else "every case"
        raise ValueError(f"At this threshold {what} is called positive: choose one that parts the cases.")
    share = np.atleast_1d(check_prevalence(prevalence))
    hits, false_alarms = sensitivity * share, (1 - specificity) * (1 - share)
    cleared, missed = specificity * (1 - share), (1 - sensitivity) * share
    values = {"ppv": hits / (hits + false_alarms), "npv": cleared / (cleared + missed)}
    return pd.DataFrame({"prevalence": share} | values | {"alarms": hits + false_alarms})


def predictive_curve(
    cases: Cases,
    threshold: float,
    prevalence: ArrayLike,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Predictive values at other prevalences, as `predictive_values`, with intervals of `restated_rates`.

    The prevalences are of the level of the cases; options as in `intervals.bootstrap`.

    Returns:
        One row a prevalence: `prevalence, ppv, ppv_low, ppv_high, npv, npv_low, npv_high, alarms`, and
        `undefined`: how many resamples lack a class or call all cases alike, and were left out.

    Raises:
        ValueError: cases of several splits or of one class; see `predictive_values`; no resample is defined.

    Example:
        >>> patients = Cases.of(predictions, split="validation", level="patient")
        >>> found = predictive_curve(patients, 0.5, [0.07, 0.476], resamples=50)
        >>> bool(found["ppv"][0] < found["ppv"][1])
        True
    """
    y, p = check_scores(cases.require().label, cases.probability, both_classes=True)
    sums = cases.sums(np.column_stack([y * (p >= threshold), y, (1 - y) * (p < threshold), 1 - y]))
    tp, positives, tn, negatives = sums.sum(axis=0)
    table = predictive_values(tp / positives, tn / negatives, prevalence)
    tp, positives, tn, negatives = resampled(sums, resamples, seed).T
    alike = (tp == positives) & (tn == 0) | (tp == 0) & (tn == negatives)
    defined = (positives > 0) & (negatives > 0) & ~alike
    if not defined.any():
        raise ValueError(f"None of {resamples} resamples holds both classes and calls. Use more studies.")
    counts = np.concatenate(
        [sums.sum(axis=0, keepdims=True), np.stack([tp, positives, tn, negatives], 1)[defined]]
    )
    tp, positives, tn, negatives = counts.T
    called, counted = np.stack([tp, negatives - tn]), np.stack([positives, negatives])
    held = (sums[:, [1, 3]] > 0).sum(axis=0)  # patients with a case of either class
    for place, share in enumerate(table["prevalence"]):
        weights = np.array([[share], [1 - share]]) / counted
        found = restated_rates(called, counted, held, weights, confidence).loc[["precision", "npv"]]
        for name, (_, low, high) in zip(("ppv", "npv"), found.to_numpy(), strict=True):
            table.loc[place, [f"{name}_low", f"{name}_high"]] = low, high
    names = [f"{name}{end}" for name in ("ppv", "npv") for end in ("", "_low", "_high")]
    return table[["prevalence", *names, "alarms"]].assign(undefined=int((~defined).sum()))


def restated_rates(
    called: NDArray[np.floating],
    rows: NDArray[np.floating],
    patients: NDArray[np.integer],
    weights: NDArray[np.float64],
    confidence: float,
) -> pd.DataFrame:
    """Rates where groups of cases count more, or less, than they were observed.

    The intervals are percentiles of the resamples, and no narrower than the score limits of any one group's
    share of alarms make them, the other groups as observed: where no intact case raised an alarm, no resample
    raises one either, and that is no proof that none ever will.

    Of G groups, the first fractured, all others intact: the cases called and all rows, and what a case counts
    (NaN where undefined), as observed in the first column and then in each resample, (G, 1 + R); and their
    numbers of patients, (G,).

    Returns:
        Columns `value, low, high` by rate, one of `resampling.RATES`; NaN where undefined, the interval also
        where more than 5 % of the resamples do not define the rate.
    """
    value, draws = _rates_of(called * weights, rows * weights)
    limits = np.full((2, len(value)), np.nan)
    for place, drawn in enumerate(draws):
        some = drawn[~np.isnan(drawn)]
        if len(some) >= (1 - MOST_UNDEFINED) * len(drawn):
            limits[:, place] = quantiles(some, confidence)
    observed, shares = rows[:, :1], called / np.where(rows > 0, rows, np.nan)
    ends = []
    for group in np.flatnonzero(observed[:, 0] > 0):
        share, drawn = float(shares[group, 0]), shares[group, 1:]
        cases = effective_cases(
            share, drawn[~np.isnan(drawn)], float(observed[group, 0]), float(patients[group])
        )
        for end in score_interval(share, cases, confidence):
            moved = called[:, :1].astype(np.float64)
            moved[group] = end * observed[group]
            ends.append(moved)
    _, least = _rates_of(np.hstack([called[:, :1], *ends]) * weights[:, :1], observed * weights[:, :1])
    low, high = np.fmin.reduce(least, axis=1), np.fmax.reduce(least, axis=1)
    undefined = np.isnan(limits[0]) | np.isnan(value)
    low = np.where(undefined, np.nan, np.minimum(limits[0], low))
    high = np.where(undefined, np.nan, np.maximum(limits[1], high))
    return pd.DataFrame({"value": value, "low": low, "high": high}, index=list(RATES))


def _rates_of(
    called: NDArray[np.float64], rows: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rates of the first column (rates,) and of the others (rates, R), of groups as in `restated_rates`."""
    quiet = rows - called
    rates = rates_of(called[0], called[1:].sum(axis=0), quiet[0], quiet[1:].sum(axis=0))
    found = np.stack([rates[name] for name in RATES])
    return found[:, 0], found[:, 1:]


THRESHOLDS = np.arange(1, 100) / 100


def decision_curve(
    cases: Cases,
    *,
    thresholds: ArrayLike = THRESHOLDS,
    prevalence: float | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """The decision curve: true positives less false positives by the odds of the threshold, per case.

    With a `prevalence` of the cases' level elsewhere, probabilities are restated for it (`restate`), and
    cases weighted as often as they would occur there. Options as in `intervals.bootstrap`.

    Returns:
        One row a threshold: `threshold, net_benefit, low, high, treat_all, treat_none` (0); `gain` over the
        better of treating all and treating none, `gain_low, gain_high`; `undefined`, how many resamples lack
        a class and were left out (none, unless a prevalence is given).

    Raises:
        ValueError: cases of several splits or of one class; a threshold outside [0, 1); a prevalence outside
            (0, 1); no resample is defined.

    Source: Vickers & Elkin, Med Decis Making 26 (2006) 565-574; Vickers et al., BMC Med Inform Decis Mak 8
    (2008) 53.

    Example:
        >>> patients = Cases.of(predictions, split="validation", level="patient")
        >>> decision_curve(patients, thresholds=[0.1, 0.3], resamples=50)["treat_none"].tolist()
        [0.0, 0.0]
    """
    check_confidence(confidence)
    y, p = check_scores(cases.require().label, cases.probability, both_classes=True)
    t = _check_thresholds(thresholds)
    if prevalence is not None:
        prevalence = float(check_prevalence(prevalence))
        p = restate(p, was=float(y.mean()), now=prevalence)
    sums = cases.sums(_terms(y, p, t))
    model, treat_all = _benefit(sums.sum(axis=0), t, prevalence)
    drawn = resampled(sums, resamples, seed)
    defined = (drawn[:, -2:] > 0).all(axis=1) | (prevalence is None)
    if not defined.any():
        raise ValueError(f"None of {resamples} resamples holds both classes. Use more studies.")
    models, all_of_them = _benefit(drawn[defined], t, prevalence)
    low, high = quantiles(models.T, confidence)
    gain_low, gain_high = quantiles((models - np.maximum(all_of_them, 0)).T, confidence)
    table = {"threshold": t, "net_benefit": model, "low": low, "high": high}
    table |= {"treat_all": treat_all, "treat_none": np.zeros(len(t))}
    table |= {"gain": model - np.maximum(treat_all, 0), "gain_low": gain_low, "gain_high": gain_high}
    return pd.DataFrame(table).assign(undefined=int((~defined).sum()))


def _check_thresholds(thresholds: ArrayLike) -> NDArray[np.float64]:
    t = np.atleast_1d(np.asarray(thresholds, dtype=np.float64))
    if not len(t) or not ((t >= 0) & (t < 1)).all():
        raise ValueError(
            f"Thresholds of a decision curve are in [0, 1), as at 1 no miss would count; found {t.tolist()}. "
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
