"""Calibrated probabilities of patients that had no part in the fit, without the test split."""

import numpy as np
import pandas as pd

from cspine_helpers.calibration import Kind, calibrated, fit_calibrator
from cspine_helpers.labels import UID
from cspine_helpers.reliability import scored_rows


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
    fractured = rows.groupby(UID, sort=False)["label"].max()
    order = np.lexsort((np.random.default_rng(seed).random(len(fractured)), fractured))
    fold = pd.Series(np.argsort(order) % folds, index=fractured.index)  # by place in that order
    found = rows["probability"].to_numpy(copy=True)
    for held_out in range(folds):
        others = predictions[predictions[UID].map(fold) != held_out]
        try:
            calibrator = fit_calibrator(others, kind=kind, level=level, aggregation=aggregation)
        except ValueError as error:
            raise ValueError(f"With 1 of {folds} parts of the patients held out: {error}") from error
        here = (rows[UID].map(fold) == held_out).to_numpy()
        found[here] = calibrated(calibrator, rows["probability"][here])
    return rows.assign(probability=found).reset_index(drop=True)
