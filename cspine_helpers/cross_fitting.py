"""Calibrators judged on patients who had no part in the fit, and one chosen so, without the test split."""

from typing import Any, cast, get_args

import numpy as np
import pandas as pd

from cspine_helpers.aggregation import Aggregation, validation_rows
from cspine_helpers.calibration import Calibrator, Kind, calibrated, fit_calibrator
from cspine_helpers.decisions import Level
from cspine_helpers.levels import rows_at
from cspine_helpers.metrics import log_losses, resampled_units
from cspine_helpers.reliability import scored_rows

AS_PREDICTED = "as predicted"


def choose_calibrator(
    predictions: pd.DataFrame, *, level: Level, aggregation: Aggregation | None = None
) -> tuple[Calibrator | None, pd.DataFrame]:
    """Choose a kind of calibrator by the lowest cross-fitted log loss, and fit it on all of validation.

    The probabilities as predicted take part, and win where no kind helps.

    Args:
        predictions: predictions table; splits other than validation are not looked at.
        level: `vertebra`, one calibrator for all of them, or `patient`.
        aggregation: how a patient's vertebrae become one probability; at patient level, and only there.

    Returns:
        The calibrator, which `frozen.freeze` takes; None: as predicted. And columns `kind, log_loss,
        refused`, one row a kind: the log loss on patients that were not fitted on, or why there is none.

    Example:
        >>> calibrator, scores = choose_calibrator(predictions, level="vertebra")
        >>> calibrator.kind
        'platt'

    Raises:
        ValueError: the table breaks the schema or has no validation rows; see `levels.rows_at`.
    """
    rows = rows_at(validation_rows(predictions), level, aggregation)
    options: dict[str, Any] = {} if aggregation is None else {"level": level, "aggregation": aggregation.name}
    losses = {AS_PREDICTED: float(log_losses(rows["label"], rows["probability"]).mean())}
    refused = {}
    for kind in get_args(Kind):
        try:
            found = cross_fitted(rows, kind=kind, **options)
        except ValueError as error:
            refused[kind] = str(error)
        else:
            losses[kind] = float(log_losses(found["label"], found["probability"]).mean())
    scores = pd.DataFrame(
        [(kind, losses.get(kind, np.nan), refused.get(kind, "")) for kind in (AS_PREDICTED, *get_args(Kind))],
        columns=["kind", "log_loss", "refused"],
    )
    best = min(losses, key=losses.__getitem__)
    chosen = None if best == AS_PREDICTED else fit_calibrator(rows, kind=cast(Kind, best), **options)
    return chosen, scores


def cross_fitted(
    predictions: pd.DataFrame,
    *,
    kind: Kind,
    level: str = "all",
    aggregation: str | None = None,
    folds: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """The validation rows at a level, each calibrated by a calibrator that saw other patients only.

    So kinds can be compared, and calibrated probabilities judged, without the test split. Patients with and
    without a fracture are dealt to the folds evenly.

    Args:
        predictions: see `fit_calibrator`.
        kind: see there.
        level: see there.
        aggregation: see there.
        folds: how many calibrators are fitted, each without one part of the patients.
        seed: of the dealing.

    Raises:
        ValueError: see `fit_calibrator`, for all patients or for all but one fold; fewer than 2 folds.
    """
    fit_calibrator(predictions, kind=kind, level=level, aggregation=aggregation)
    if folds < 2:
        raise ValueError(f"Cross-fitting needs 2 folds or more, as somebody has to be left; found {folds}.")
    rows = scored_rows(predictions, level)
    whose = resampled_units(rows)
    fractured = rows.groupby(whose, sort=False)["label"].max()
    order = np.lexsort((np.random.default_rng(seed).random(len(fractured)), fractured))
    fold = pd.Series(np.argsort(order) % folds, index=fractured.index)  # by place in that order
    found = rows["probability"].to_numpy(copy=True)
    for held_out in range(folds):
        others = predictions[resampled_units(predictions).map(fold) != held_out]
        try:
            calibrator = fit_calibrator(others, kind=kind, level=level, aggregation=aggregation)
        except ValueError as error:
            raise ValueError(f"With 1 of {folds} parts of the patients held out: {error}") from error
        here = (whose.map(fold) == held_out).to_numpy()
        found[here] = calibrated(calibrator, rows["probability"][here])
    return rows.assign(probability=found).reset_index(drop=True)
