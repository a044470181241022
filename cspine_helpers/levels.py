"""Decisions on a predictions table: chosen on its validation split, applied at no other level than theirs."""

from dataclasses import asdict
from typing import Any, get_args

import numpy as np
import pandas as pd

from cspine_helpers.aggregation import Aggregation, aggregate, validation_rows
from cspine_helpers.decisions import Decision, Level, choose_threshold, decision_of
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.metrics import at_level, confusion, defined_levels, has_own_score, rates
from cspine_helpers.objectives import Rule, check_choice, few_called
from cspine_helpers.predictions import validate_predictions

# of a vertebra's own threshold; where 18 of 20 are found, 70 to 97 % of all may be (Wilson)
MIN_POSITIVES = 20


def choose_decision(
    predictions: pd.DataFrame, *, level: Level, aggregation: Aggregation | None = None, **options: Any
) -> Decision:
    """Choose a threshold on the validation split of a predictions table, at one level.

    Args:
        predictions: predictions table; other splits are not looked at.
        level: `vertebra`, one threshold for all of them, or `patient`.
        aggregation: how a patient's vertebrae become one probability; at patient level, and only there. The
            model's own score, where the table has it and nothing is given.
        options: objective, floors and so on, as `choose_threshold` takes them.

    Raises:
        ValueError: the table breaks the schema or has no validation rows; as `choose_threshold`; or there is
            an aggregation at vertebra level, or none at patient level.

    Example:
        >>> choose_decision(predictions, level="vertebra", objective="max_f1").threshold
    """
    table = validation_rows(predictions)
    if level == "patient" and aggregation is None and has_own_score(table):
        aggregation = Aggregation("own")
    rows = rows_at(table, level, aggregation)
    return choose_threshold(
        rows["label"], rows["probability"], level=level, aggregation=aggregation, **options
    )


def levels_to_decide(predictions: pd.DataFrame) -> tuple[Level, ...]:
    """The levels at which the validation split can choose: where it has both classes.

    Raises:
        ValueError: the table breaks the schema or has no validation rows.
    """
    defined = defined_levels(validation_rows(predictions))
    names: dict[Level, str] = {"vertebra": "all", "patient": "patient"}
    return tuple(level for level, name in names.items() if name in defined)


def rows_at(table: pd.DataFrame, level: str, aggregation: Aggregation | None) -> pd.DataFrame:
    """The rows of a predictions table at a level: its vertebrae, or its patients by an aggregation.

    Raises:
        ValueError: there is an aggregation at vertebra level, or none at patient level.
    """
    check_choice("level", level, get_args(Level))
    if level == "patient":
        if aggregation is None:
            raise ValueError(
                "At patient level, say how the vertebrae of a patient become one probability: "
                "aggregation=Aggregation(...)."
            )
        return aggregate(table, aggregation)
    if aggregation is not None:
        raise ValueError("An aggregation belongs to the patient level. Leave it out, or choose that level.")
    return at_level(table, "all")


def choose_per_vertebra(
    predictions: pd.DataFrame, *, min_positives: int = MIN_POSITIVES, **options: Any
) -> Decision:
    """Choose a threshold for each of C1 … C7, on the validation split of a predictions table.

    Each vertebra keeps the floors by itself. `recall`, `precision` and `specificity` of the decision are
    those of all vertebrae together. Where a vertebra has no threshold that qualifies, the decision has none.

    Args:
        predictions: predictions table; other splits are not looked at.
        min_positives: how many fractures, and how many intact vertebrae, each of C1 … C7 must have.
        options: objective, floors and so on, as `choose_threshold` takes them.

    Raises:
        ValueError: a vertebra has too few fractured or intact cases, with their counts; the table breaks the
            schema or has no validation rows; as `choose_threshold`.
    """
    rule = asdict(Rule(**options))
    rows = at_level(validation_rows(predictions), "all")
    parts = {name: rows[rows["vertebra"] == name] for name in VERTEBRAE}
    counts = {name: np.bincount(part["label"], minlength=2) for name, part in parts.items()}
    if rare := [f"{name} {n[1]} and {n[0]}" for name, n in counts.items() if n.min() < min_positives]:
        raise ValueError(
            f"A threshold of its own needs {min_positives} fractured and {min_positives} intact cases of "
            f"each vertebra; found {', '.join(rare)}. Choose one for all vertebrae, or add studies."
        )
    single = {
        name: choose_threshold(part["label"], part["probability"], **rule) for name, part in parts.items()
    }
    failed = [f"{name}: {one.reason}" for name, one in single.items() if one.threshold is None]
    thresholds = None if failed else {name: one.require() for name, one in single.items()}
    called = rows["probability"] >= rows["vertebra"].map(thresholds or dict.fromkeys(VERTEBRAE, np.inf))
    counted = called.groupby(rows["vertebra"]).sum()
    few = [f"{name}:{words}" for name, n in counted.items() if (words := few_called(n))]
    return decision_of(
        rates(confusion(rows["label"], called, 0.5)).iloc[0],
        **rule,
        threshold=None,
        thresholds=thresholds,
        level="vertebra",
        reason=" ".join(failed or [f"{Rule(**rule).title} of each vertebra by itself.", *few]),
    )


def apply_decision(
    decision: Decision, predictions: pd.DataFrame, *, level: Level, aggregation: Aggregation | None = None
) -> pd.DataFrame:
    """Call each vertebra, or each patient, positive or not.

    Args:
        decision: what to apply.
        predictions: predictions table, of any splits.
        level: at which level; that of the decision.
        aggregation: at patient level, where the decision does not keep its own; never another one.

    Returns:
        The predictions, or at patient level the table of `aggregation.aggregate`, with the columns
        `threshold` and `positive` (bool).

    Raises:
        ValueError: the decision is of another level or aggregation, or has no threshold, or the table breaks
            the schema.
    """
    check_choice("level", level, get_args(Level))
    if level != decision.level:
        raise ValueError(
            f"The decision holds at {decision.level} level, not at {level} level: a threshold for one says "
            f"nothing about the other. Choose one with choose_decision(..., level={level!r})."
        )
    if None not in (aggregation, decision.aggregation) and aggregation != decision.aggregation:
        raise ValueError(
            f"The decision was chosen with the aggregation {decision.aggregation}, not with {aggregation}. "
            "Leave it out, or choose a threshold for the other."
        )
    rows = rows_at(validate_predictions(predictions), level, decision.aggregation or aggregation)
    if decision.thresholds is not None:
        threshold = rows["vertebra"].map(decision.thresholds).astype(np.float64)
    else:
        threshold = pd.Series(decision.require(), index=rows.index)
    return rows.assign(threshold=threshold, positive=rows["probability"] >= threshold)
