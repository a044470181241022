"""How far a result could move with other patients: headline numbers, curves and differences with intervals.

Patients are resampled, never vertebrae: those of one patient are fractured, found and missed together. A rate
has the score interval (Wilson) of as many independent cases as would vary as much as the resamples do, as
percentiles of the resamples fail where positives are few: 7 of 7 found would give the interval from 1 to 1.
So has an area under a curve, with Student's t for few patients. A loss has Student's t on its logarithm, with
the error that the resamples show. In simulations of 40 to 200 patients, 95 % intervals made so held the truth
92 to 97 times in 100.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pandas as pd
from scipy.stats import t

from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.evaluation.resampling import (
    AREAS,
    RATES,
    Estimates,
    Floats,
    Ranking,
    difference_limits,
    estimates,
    mean_interval,
    patient_weights,
    quantiles,
    score_interval,
    shares_of,
)
from cspine_helpers.files.paths import listing
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.metrics import check_scores, rsna_terms

MOST_UNDEFINED = 0.05  # share of the resamples that may lack a metric


def bootstrap(
    cases: Cases,
    *,
    threshold: float | None,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    patients: Cases | None = None,
    keep_undefined: bool = False,
) -> pd.DataFrame:
    """Every headline number with its interval.

    `recall, precision, specificity, npv, f1, accuracy` at the threshold, `log_loss, brier, auroc,
    average_precision`; of all vertebrae also `rsna_loss, rsna_loss_per_patient` (see `rsna_loss`) where every
    study has all seven.

    Args:
        cases: of one split.
        threshold: positive means probability ≥ threshold; None leaves the rates out. One that was chosen at
            one level says nothing at another.
        resamples: of the patients.
        seed: of the resamples.
        confidence: of each interval by itself.
        patients: for the RSNA loss; `cases.patients()` where not given.
        keep_undefined: keep a metric that is undefined, as NaN, rather than raise.

    Returns:
        Columns `metric, value, low, high, undefined`: in how many resamples the metric is undefined, as
        they hold no positives or none is called so; the interval is of the others.

    Raises:
        ValueError: cases of several splits; an option out of range; a metric that is undefined in more than
            5 % of the resamples, unless such are kept.

    Example:
        >>> found = bootstrap(Cases.of(predictions, split="validation"), threshold=0.5).set_index("metric")
        >>> bool(found["low"]["recall"] < found["value"]["recall"] < found["high"]["recall"])
        True
    """
    _check_options(cases, threshold, resamples, confidence)
    numbers = _headline_numbers(cases, threshold, patients)
    (value,), (draws,) = _resample([numbers], cases, resamples, seed)
    found = numbers.table(value, draws, confidence)
    return found if keep_undefined else _defined(found, resamples, cases.name)


def per_vertebra(
    cases: Cases,
    *,
    threshold: float | Mapping[str, float],
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Every headline number of each vertebra with its interval, all from the same resamples.

    The threshold is one for all vertebrae, or one for each that occurs; options as in `bootstrap`. Images are
    one unit, `image`.

    Returns:
        Columns `vertebra, studies, positives, metric, value, low, high, undefined`. A metric that is not
        defined for a vertebra, as none is fractured, is NaN and undefined in all resamples.

    Raises:
        ValueError: see `bootstrap`; a vertebra without a threshold.

    Example:
        >>> found = per_vertebra(Cases.of(predictions, split="validation"), threshold=0.5, resamples=50)
        >>> found["vertebra"].unique().tolist()
        ['C1', 'C2', 'C3', 'C4', 'C5', 'C6', 'C7']
    """
    parts = cases.units()
    given = threshold if isinstance(threshold, Mapping) else dict.fromkeys(parts, threshold)
    if lacking := [name for name in parts if name not in given]:
        raise ValueError(f"No threshold for {listing(lacking)}. Give each vertebra one, or one for all.")
    for name in parts:
        _check_options(cases, given[name], resamples, confidence)
    numbers = [_headline_numbers(part, given[name]) for name, part in parts.items()]
    values, draws = _resample(numbers, cases, resamples, seed)
    tables = []
    for (name, part), of_one, value, drawn in zip(parts.items(), numbers, values, draws, strict=True):
        tables.append(of_one.table(value, drawn, confidence))
        for place, counted in enumerate(("vertebra", "studies", "positives")):
            tables[-1].insert(place, counted, (name, len(part), int(part.label.sum()))[place])
    return pd.concat(tables, ignore_index=True)


def curve_bands(
    cases: Cases,
    *,
    kind: Literal["pr", "roc"] = "pr",
    points: int = 100,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """A curve with a band: percentiles of the resamples at each point by itself.

    The band is no narrower than the score interval of as many independent cases as the point rests on: where
    all resamples agree, near a precision or recall of 1, they know too little.

    A curve of kind "pr" has the precision where recall first reaches each point, 1/points … 1; one of kind
    "roc" the highest recall at each false positive rate, 0 … 1. Options as in `bootstrap`.

    Returns:
        Columns `recall, precision` ("pr") or `false_positive_rate, recall` ("roc"), `low, high, undefined`:
        the number of resamples that hold one class only; the band is of the others.

    Raises:
        ValueError: see `bootstrap`; unknown kind; no points; one class only, here or in more than 5 % of the
            resamples.
    """
    if kind not in ("pr", "roc") or points < 1:
        raise ValueError(f"A curve is 'pr' or 'roc', at 1 point or more; found {kind!r}, {points} points.")
    _check_options(cases, None, resamples, confidence)
    check_scores(cases.label, cases.probability, both_classes=True)
    ranking, positives = Ranking(cases), float(cases.label.sum())
    across = np.arange(1, points + 1) / points if kind == "pr" else np.arange(points + 1) / points
    curve = ranking.precision_at if kind == "pr" else ranking.recall_at
    value = curve(np.ones((len(cases.population), 1)), across)[:, 0]
    weights = patient_weights(len(cases.population), resamples, seed, rows=len(cases))
    draws = np.concatenate([curve(drawn, across) for drawn in weights], axis=1)
    missing = np.isnan(draws).any(axis=0)
    names = ("recall", "precision") if kind == "pr" else ("false_positive_rate", "recall")
    lacking = {"metric": [names[1]], "value": [0.0], "undefined": [missing.sum()]}
    _defined(pd.DataFrame(lacking), resamples, cases.name)
    low, high = quantiles(draws[:, ~missing], confidence)
    rest = np.ceil(across * positives) / value if kind == "pr" else positives  # cases that a point rests on
    least, most = score_interval(value, rest, confidence)
    low, high = np.minimum(low, least), np.maximum(high, most)
    columns = {names[0]: across, names[1]: value, "low": low, "high": high, "undefined": missing.sum()}
    return pd.DataFrame(columns)


def compare(
    cases: Cases,
    other: Cases | None = None,
    *,
    threshold: float | None,
    other_threshold: float | None = None,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    keep_undefined: bool = False,
) -> pd.DataFrame:
    """Differences between two models on the same patients, or between two thresholds, with intervals.

    Both are measured on the same resamples, so that what makes a patient hard for both cancels. Intervals:
    of a rate from the two rates' intervals and their correlation, as percentiles fail where positives are
    few; of an area by Student's t; of a loss by that of the patients' differences, corrected for skewness
    (`resampling.mean_interval`).

    The other model's cases are of the same studies and vertebrae, and the same cases where not given; its
    threshold is that of the first where not given. Options as in `bootstrap`.

    Returns:
        Columns `metric, value, other, difference, low, high, undefined`; the difference is other − value.

    Raises:
        ValueError: see `bootstrap`; the two are not of the same studies and vertebrae, or differ in labels.

    Source: Newcombe, Statistics in Medicine 17 (1998), page 2635, method 10; Zou and Donner, Statistics in
    Medicine 27 (2008).

    Example:
        >>> cases = Cases.of(predictions, split="validation")
        >>> found = compare(cases, threshold=0.5, other_threshold=0.3, resamples=200).set_index("metric")
        >>> bool(found["difference"]["recall"] >= 0)
        True
    """
    second = cases if other is None else _aligned(cases, other)
    other_threshold = threshold if other_threshold is None else other_threshold
    for each in (other_threshold, threshold):
        _check_options(cases, each, resamples, confidence)
    if (threshold is None) != (other_threshold is None):
        raise ValueError("Only one threshold is given. Give both, or none to leave the rates out.")
    pair = [_headline_numbers(cases, threshold), _headline_numbers(second, other_threshold)]
    values, draws = _resample(pair, cases, resamples, seed)
    low, high = _limits(pair, values, draws, confidence)
    columns = {"metric": pair[0].names, "value": values[0], "other": values[1]}
    columns |= {"difference": values[1] - values[0], "low": low, "high": high}
    found = pd.DataFrame(columns | {"undefined": np.isnan(draws[0] + draws[1]).sum(axis=1)})
    return found if keep_undefined else _defined(found, resamples, cases.name)


def rsna_loss(cases: Cases, patients: Cases | None = None, *, per_patient: bool = False) -> float:
    """Weighted log loss of the RSNA 2022 competition (`metrics.rsna_terms`).

    Args:
        cases: all seven vertebrae of every study.
        patients: of the same studies; `cases.patients()` where not given.
        per_patient: the mean of the studies' losses, as the participants' public code had it; else all terms
            of all studies by weight at once.

    Raises:
        ValueError: a study lacks some of its vertebrae; the patients are of other studies.
    """
    loss, weight = _rsna_terms(cases, patients)
    return float((loss / weight).mean() if per_patient else loss.sum() / weight.sum())


def _rsna_terms(cases: Cases, patients: Cases | None) -> tuple[Floats, Floats]:
    labels = cases.of_unit("all").wide(cases.label)
    if (incomplete := np.isnan(labels).any(axis=1)).any():
        raise ValueError(
            f"{incomplete.sum()} studies lack some of C1…C7, so that the competition's loss is not defined: "
            f"{listing(cases.studies.index[incomplete.tolist()])}. Drop them."
        )
    patients = patients or cases.patients()
    place = pd.Index(patients.study).get_indexer(cases.studies.index)
    absent = cases.studies.index[(place < 0).tolist()]
    if len(absent):
        raise ValueError(f"{len(absent)} studies have no patient probability: {listing(absent)}. Add them.")
    return rsna_terms(labels, cases.wide(), cases.studies["label"], patients.probability[place])


def _check_options(cases: Cases, threshold: float | None, resamples: int, confidence: float) -> None:
    """Refuse what cannot be resampled, and options that make no sense."""
    if threshold is not None and not -np.inf < threshold < np.inf:
        raise ValueError(
            f"A threshold is a number; found {threshold}. Choose one with decisions.choose_threshold."
        )
    if resamples < 2 or not 0 < confidence < 1:
        raise ValueError(
            f"Intervals need 2 resamples or more, 1000 for good ones, and a confidence between 0 and 1; "
            f"found {resamples} and {confidence}."
        )
    if len(cases.require().population) < 2:
        raise ValueError("The cases are of 1 patient, which cannot be resampled. Use more studies.")


def _headline_numbers(cases: Cases, threshold: float | None, patients: Cases | None = None) -> Estimates:
    """The headline numbers; with the competition's loss if these are all vertebrae of every study."""
    vertebrae = cases.level == "vertebra" and cases.name == "all"
    whole = vertebrae and len(cases) == len(VERTEBRAE) * len(cases.studies)
    if patients is not None and not whole:
        raise ValueError(
            "Patients are for the competition's loss, which needs all seven vertebrae of each study; found "
            f"level {cases.name!r}, {len(cases)} cases of {len(cases.studies)} studies. Leave the patients "
            "out, or drop the studies that lack vertebrae."
        )
    return estimates(cases, threshold, rsna=_rsna_terms(cases, patients) if whole else None)


def _resample(
    numbers: Sequence[Estimates], cases: Cases, resamples: int, seed: int
) -> tuple[list[Floats], list[Floats]]:
    """Values (metrics,) and draws (metrics, R) of each, all on the same resamples."""
    patients = len(cases.population)
    values = [part.under(np.ones((patients, 1)))[:, 0] for part in numbers]
    drawn: list[list[Floats]] = [[] for _ in numbers]
    for weights in patient_weights(patients, resamples, seed, rows=len(cases)):
        for part, into in zip(numbers, drawn, strict=True):
            into.append(part.under(weights))
    return values, [np.concatenate(parts, axis=1) for parts in drawn]


def _defined(found: pd.DataFrame, resamples: int, level: str) -> pd.DataFrame:
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


def _limits(
    pair: list[Estimates], values: list[Floats], draws: list[Floats], confidence: float
) -> tuple[Floats, Floats]:
    """Limits of the differences, (metrics,) both; NaN where one of the two is undefined."""
    difference, drawn = values[1] - values[0], draws[1] - draws[0]
    limits = [
        part.limits(value, draw, confidence) for part, value, draw in zip(pair, values, draws, strict=True)
    ]
    freedom = max(pair[0].ranked - 1, 1)
    found = np.stack(difference_limits(values, limits, draws))
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


def _aligned(cases: Cases, other: Cases) -> Cases:
    """The other cases in the order of the first."""
    keys = [UID, "unit"]
    first, second = (
        pd.DataFrame({UID: each.study, "unit": each.unit, "label": each.label}) for each in (cases, other)
    )
    both = first.merge(second.reset_index(), on=keys, how="outer", suffixes=("", "_other"), indicator=True)
    for side, which in (("left_only", "second"), ("right_only", "first")):
        if len(alone := both[both["_merge"] == side]):
            raise ValueError(
                f"{len(alone)} cases are not in the {which} table: {_named(alone)}. "
                "Compare two models on the same studies and vertebrae."
            )
    if len(differ := both[both["label"] != both["label_other"]]):
        raise ValueError(
            f"{len(differ)} cases are labelled differently in the two tables: {_named(differ)}. "
            "Predict both with one label table."
        )
    place = first.merge(second.reset_index(), on=keys, how="left")["index"].to_numpy()
    own = other.studies["own"].reindex(cases.studies.index)
    return replace(cases, probability=other.probability[place], studies=cases.studies.assign(own=own))


def _named(rows: pd.DataFrame) -> str:
    return listing(f"{uid} {name}" for uid, name in zip(rows[UID], rows["unit"], strict=True))
