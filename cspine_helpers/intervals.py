"""How far a result could move with other patients: every headline number with an interval.

Patients are resampled, never vertebrae: those of one patient are broken, found and missed together. A rate
has the score interval (Wilson) of as many independent cases as would vary as much as the resamples do, as
percentiles of the resamples fail where positives are few: 7 of 7 found would give the interval from 1 to 1.
So has an area under a curve, with Student's t for few patients. A loss has Student's t on its logarithm, with
the error that the resamples show. In simulations of 40 to 200 patients, 95 % intervals made so held the truth
92 to 97 times in 100.

The parts are in `estimates`, the resamples in `resampling`; `bands` is for curves, `comparison` for pairs.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from cspine_helpers.competition import rsna_terms
from cspine_helpers.estimates import Estimates, estimates
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.metrics import resampled_units
from cspine_helpers.paths import listing
from cspine_helpers.predictions import validate_predictions
from cspine_helpers.resampling import Floats, patient_weights, sample

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
