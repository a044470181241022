"""Two models on the same patients, or two thresholds: differences with intervals.

Bands around precision–recall and ROC curves, from resampled patients.

Percentiles at each point by itself, and no narrower than the score interval (Wilson) of as many independent
rows as the point rests on: where all resamples agree, near a precision or recall of 1, they know too little.

How far a result could move with other patients: every headline number with an interval.

Patients are resampled, never vertebrae: those of one patient are broken, found and missed together. A rate
has the score interval (Wilson) of as many independent cases as would vary as much as the resamples do, as
percentiles of the resamples fail where positives are few: 7 of 7 found would give the interval from 1 to 1.
So has an area under a curve, with Student's t for few patients. A loss has Student's t on its logarithm, with
the error that the resamples show. In simulations of 40 to 200 patients, 95 % intervals made so held the truth
92 to 97 times in 100.

The parts are in `estimates`, the resamples in `resampling`; `bands` is for curves, `comparison` for pairs.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from scipy.stats import t

from cspine_helpers.evaluation.cases import resampled_units
from cspine_helpers.evaluation.competition import rsna_terms
from cspine_helpers.evaluation.resampling import (
    AREAS,
    RATES,
    Estimates,
    Floats,
    Ranking,
    combined,
    correlation,
    estimates,
    mean_interval,
    patient_weights,
    quantiles,
    sample,
    score_interval,
    shares_of,
)
from cspine_helpers.files.paths import listing
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.metrics import check_scores
from cspine_helpers.predictions import validate_predictions

MOST_UNDEFINED = 0.05  # share of the resamples that may lack a metric


def bootstrap(
    predictions: pd.DataFrame,
    *,
    threshold: float | None,
    level: str = "all",
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    patient: pd.Series | None = None,
    keep_undefined: bool = False,
) -> pd.DataFrame:
    """Every headline number with its interval.

    `recall, precision, specificity, npv, f1, accuracy` at the threshold, `log_loss, brier, auroc,
    average_precision`; at level "all" also `rsna_loss, rsna_loss_per_patient` (see `competition`) where
    every study has all seven vertebrae.

    Args:
        predictions: predictions table of one split.
        threshold: positive means probability ≥ threshold; None leaves the rates out.
        level: one of `metrics.LEVELS`. A threshold chosen at one level says nothing at another.
        resamples: of the patients.
        seed: of the resamples.
        confidence: of each interval by itself.
        patient: the patients' probabilities by study UID, for the RSNA loss; else those of
            `metrics.patient_level`: the model's own where it has them, or the highest vertebra's.
        keep_undefined: keep a metric that is undefined, as NaN, rather than raise.

    Returns:
        Columns `metric, value, low, high, undefined`: in how many resamples the metric is undefined, as
        they hold no positives or none is called so; the interval is of the others.

    Raises:
        ValueError: the table breaks the schema; unknown level; an option out of range; a metric
            that is undefined in more than 5 % of the resamples, unless such are kept.
    """
    table = validate_predictions(predictions)
    patients = check_options(table, threshold, resamples, confidence)
    numbers = headline_numbers(table, level, threshold, patients, patient)
    (value,), (draws,) = resample([numbers], len(patients), resamples, seed, len(table))
    found = numbers.table(value, draws, confidence)
    return found if keep_undefined else defined(found, resamples, level)


def per_vertebra(
    predictions: pd.DataFrame,
    *,
    threshold: float | Mapping[str, float],
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Every headline number of each vertebra with its interval, all from the same resamples.

    Args:
        predictions: predictions table of one split.
        threshold: one for all vertebrae, or one for each that the table holds.
        resamples: of the patients.
        seed: of the resamples.
        confidence: of each interval by itself.

    Returns:
        Columns `vertebra, studies, positives, metric, value, low, high, undefined`. A metric that is not
        defined for a vertebra, as none is fractured, is NaN and undefined in all resamples.

    Raises:
        ValueError: see `bootstrap`; a vertebra without a threshold.
    """
    table = validate_predictions(predictions)
    present = [name for name in VERTEBRAE if (table["vertebra"] == name).any()]
    given = threshold if isinstance(threshold, Mapping) else dict.fromkeys(present, threshold)
    if lacking := [name for name in present if name not in given]:
        raise ValueError(f"No threshold for {listing(lacking)}. Give each vertebra one, or one for all.")
    for name in present:
        patients = check_options(table, given[name], resamples, confidence)
    numbers = [headline_numbers(table, name, given[name], patients) for name in present]
    values, draws = resample(numbers, len(patients), resamples, seed, len(table))
    parts = []
    for name, of_one, value, drawn in zip(present, numbers, values, draws, strict=True):
        labels = table["label"][table["vertebra"] == name]
        part = of_one.table(value, drawn, confidence)
        part.insert(0, "vertebra", name)
        part.insert(1, "studies", len(labels))
        part.insert(2, "positives", int(labels.sum()))
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def check_options(
    table: pd.DataFrame, threshold: float | None, resamples: int, confidence: float
) -> pd.Index:
    """The table's patients (`metrics.resampled_units`), if it is of one split and the options make sense."""
    if threshold is not None and not -np.inf < threshold < np.inf:
        raise ValueError(
            f"A threshold is a number; found {threshold}. Choose one with decisions.choose_threshold."
        )
    if resamples < 2 or not 0 < confidence < 1:
        raise ValueError(
            f"Intervals need 2 resamples or more, 1000 for good ones, and a confidence between 0 and 1; "
            f"found {resamples} and {confidence}."
        )
    splits = table["split"].unique()
    if len(splits) > 1:
        raise ValueError(f"The predictions mix the splits {listing(splits)}. Pass the rows of one of them.")
    patients = pd.Index(resampled_units(table).unique())
    if len(patients) < 2:
        what = "patient" if "patient" in table.columns else "study"
        raise ValueError(f"The predictions hold 1 {what}, which cannot be resampled. Use more studies.")
    return patients


def headline_numbers(
    table: pd.DataFrame,
    level: str,
    threshold: float | None,
    patients: pd.Index,
    patient: pd.Series | None = None,
) -> Estimates:
    """The headline numbers at a level; the competition's loss at level "all" if all studies are whole."""
    studies, vertebrae = table[UID].nunique(), int(table["vertebra"].isin(VERTEBRAE).sum())
    whole = level == "all" and vertebrae == len(VERTEBRAE) * studies
    if patient is not None and not whole:
        raise ValueError(
            "Patient probabilities are for the competition's loss, which needs level 'all' and all seven "
            f"vertebrae of each study; found level {level!r} and {vertebrae} vertebrae of {studies} "
            "studies. Leave the patient probabilities out, or drop the studies that lack vertebrae."
        )
    terms = None
    if whole:
        terms, first = rsna_terms(table, patient=patient), table.drop_duplicates(UID)
        whose = pd.Series(patients.get_indexer(pd.Index(resampled_units(first))), index=first[UID])
        terms = terms.assign(patient=whose)
    return estimates(sample(table, level, patients=patients), threshold, rsna=terms)


def resample(
    numbers: Sequence[Estimates], patients: int, resamples: int, seed: int, rows: int
) -> tuple[list[Floats], list[Floats]]:
    """Values (metrics,) and draws (metrics, R) of each, all on the same resamples."""
    values = [part.under(np.ones((patients, 1)))[:, 0] for part in numbers]
    drawn: list[list[Floats]] = [[] for _ in numbers]
    for weights in patient_weights(patients, resamples, seed, rows=rows):
        for part, into in zip(numbers, drawn, strict=True):
            into.append(part.under(weights))
    return values, [np.concatenate(parts, axis=1) for parts in drawn]


def defined(found: pd.DataFrame, resamples: int, level: str) -> pd.DataFrame:
    """The table, if each of its metrics is defined and nearly always so in the resamples."""
    wrong = found["undefined"] > MOST_UNDEFINED * resamples
    if wrong.any():
        named = ", ".join(f"{row.metric} in {row.undefined}" for row in found[wrong].itertuples())
        raise ValueError(
            f"Metrics at level {level!r} are undefined in more than {MOST_UNDEFINED:.0%} of {resamples} "
            f"resamples: {named}. Too few rows are positive, negative, or called so. Use more studies, "
            "another threshold, pooled vertebrae, or keep_undefined=True."
        )
    return found


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
