"""The test split, opened with frozen decisions only, and on the record."""

from pathlib import Path
from typing import get_args

import pandas as pd

from cspine_helpers.decisions import Decision, Level
from cspine_helpers.frozen import check_belongs, read_decision, remember_openings
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.levels import apply_decision, levels_to_decide
from cspine_helpers.metrics import confusion, rates, resampled_units
from cspine_helpers.openings import record_opening
from cspine_helpers.predictions import validate_predictions


def evaluate_on_test(run_folder: str | Path, predictions: pd.DataFrame) -> pd.DataFrame:
    """What the frozen decisions reach on the test split; the opening is on record before that is told.

    Args:
        run_folder: `checkpoints/<run>`, with a frozen decision at each level where validation can choose one.
        predictions: the predictions table that they were frozen with.

    Returns:
        Columns `level, patients, studies, incomplete, tp, fp, fn, tn`, the `metrics.rates` and `undefined`.
        For the decision about vertebrae, one row for all (`all`) and one for each; then one for patients.
        Each study is called by itself; `patients` counts whose they are (`metrics.resampled_units`), and
        `incomplete` the studies with a vertebra missing. A rate whose denominator is zero is NaN;
        `undefined` counts those.

    Raises:
        FileNotFoundError: no decision is frozen there.
        ValueError: they were frozen with other predictions or another split; a level lacks its decision;
            there are no test rows; or the table breaks the schema.
        OSError: the opening cannot be put on record, so that nothing is told.
    """
    frozen, table = read_decision(run_folder), validate_predictions(predictions)
    check_belongs(frozen, table)
    test = table[table["split"] == "test"]
    if test.empty:
        found = ", ".join(sorted(table["split"].unique()))
        raise ValueError(f"The predictions have no row of the split 'test'; found {found}. Predict it.")
    if lacking := [level for level in levels_to_decide(table) if level not in frozen.decisions]:
        raise ValueError(
            f"No decision at {' or '.join(lacking)} level is frozen in {frozen.folder}: a threshold for one "
            "level says nothing about the other, and both are chosen before the test split is opened. Choose "
            f"with levels.choose_decision(..., level={lacking[0]!r}), and freeze that as well."
        )
    decisions = [frozen.decisions[level] for level in get_args(Level) if level in frozen.decisions]
    results = pd.concat([_results(each, test) for each in decisions], ignore_index=True)
    record_opening(
        frozen.folder,
        decision_sha256=frozen.sha256,
        predictions_sha256=frozen.record["predictions_sha256"],
        level=" and ".join(each.level for each in decisions),
        objective=" and ".join(each.objective for each in decisions),
    )
    remember_openings(frozen)
    return results


def _results(decision: Decision, test: pd.DataFrame) -> pd.DataFrame:
    called = apply_decision(decision, test, level=decision.level)
    parts = {"patient": called}
    if decision.level == "vertebra":
        parts = {"all": called} | {str(name): part for name, part in called.groupby("vertebra")}
    seen = test["vertebra"].isin(VERTEBRAE).groupby(test[UID]).sum()
    rows = []
    for level, part in parts.items():
        studies = part[UID].unique()
        row = rates(confusion(part["label"], part["positive"], 0.5)).drop(columns="threshold")
        row.insert(0, "level", level)
        row.insert(1, "patients", resampled_units(part).nunique())
        row.insert(2, "studies", len(studies))
        row.insert(3, "incomplete", int((seen[studies] < len(VERTEBRAE)).sum()))
        rows.append(row)
    table = pd.concat(rows, ignore_index=True)
    return table.assign(undefined=table.isna().sum(axis=1))
