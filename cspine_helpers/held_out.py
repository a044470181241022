"""The test split, opened with a frozen decision only, and on the record."""

from pathlib import Path

import pandas as pd

from cspine_helpers.decisions import Decision
from cspine_helpers.frozen import check_belongs, read_decision
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.levels import apply_decision
from cspine_helpers.metrics import confusion, rates
from cspine_helpers.openings import record_opening
from cspine_helpers.predictions import validate_predictions


def evaluate_on_test(run_folder: str | Path, predictions: pd.DataFrame) -> pd.DataFrame:
    """What the frozen decision reaches on the test split; the opening is on record before that is told.

    Args:
        run_folder: `checkpoints/<run>`, with a frozen decision.
        predictions: the predictions table that it was frozen with.

    Returns:
        Columns `level, patients, incomplete, tp, fp, fn, tn`, the `metrics.rates` and `undefined`. At
        vertebra level, one row for all vertebrae (`all`) and one for each; at patient level, one row.
        `incomplete` counts patients with a vertebra missing. A rate whose denominator is zero is NaN;
        `undefined` counts those.

    Raises:
        FileNotFoundError: no decision is frozen there.
        ValueError: it was frozen with other predictions or another split; there are no test rows; or the
            table breaks the schema.
        OSError: the opening cannot be put on record, so that nothing is told.
    """
    frozen, table = read_decision(run_folder), validate_predictions(predictions)
    check_belongs(frozen, table)
    test = table[table["split"] == "test"]
    if test.empty:
        found = ", ".join(sorted(table["split"].unique()))
        raise ValueError(f"The predictions have no row of the split 'test'; found {found}. Predict it.")
    results = _results(frozen.decision, test)
    record_opening(
        frozen.folder,
        decision_sha256=frozen.sha256,
        predictions_sha256=frozen.record["predictions_sha256"],
        level=frozen.decision.level,
        objective=frozen.decision.objective,
    )
    return results


def _results(decision: Decision, test: pd.DataFrame) -> pd.DataFrame:
    called = apply_decision(decision, test, level=decision.level)
    parts = {"patient": called}
    if decision.level == "vertebra":
        parts = {"all": called} | {str(name): part for name, part in called.groupby("vertebra")}
    seen = test.groupby(UID).size()
    rows = []
    for level, part in parts.items():
        patients = part[UID].unique()
        row = rates(confusion(part["label"], part["positive"], 0.5)).drop(columns="threshold")
        row.insert(0, "level", level)
        row.insert(1, "patients", len(patients))
        row.insert(2, "incomplete", int((seen[patients] < len(VERTEBRAE)).sum()))
        rows.append(row)
    table = pd.concat(rows, ignore_index=True)
    return table.assign(undefined=table.isna().sum(axis=1))
