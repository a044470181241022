"""What a run's record says against its results: the limits in a model card, each from numbers on record.

All that a run folder holds, read as one: nothing damaged, nothing that belongs to another run.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from cspine_helpers.decisions.test_split import (
    DECISION,
    MEMORY,
    Frozen,
    check_belongs,
    read_decision,
    read_openings,
)
from cspine_helpers.decisions.thresholds import MIN_POSITIVES, Decision
from cspine_helpers.evaluation.cases import aggregate, at_level
from cspine_helpers.evaluation.intervals import MOST_UNDEFINED
from cspine_helpers.files.paths import inside, sha256_of
from cspine_helpers.files.tables import read_table
from cspine_helpers.labels import UID
from cspine_helpers.model_card.results import Findings, cell, number
from cspine_helpers.predictions import predictions_sha256, read_predictions
from cspine_helpers.runs import RECORD, other_runs, read_record

_WEIGHTS, _HISTORY, _PREDICTIONS = "model.safetensors", "history.csv", "predictions.csv"
UNKNOWN = "not on record"


@dataclass(frozen=True)
class Dossier:
    """What is known of a run.

    Attributes:
        name: of the folder.
        record: the whole of `run.json`; empty where there is none, as for predictions made elsewhere.
        epochs: how many were trained, by `history.csv`; None where it is missing.
        weights: whether `model.safetensors` is there.
        predictions: predictions table; None where it is missing.
        decisions: level → the frozen decision; where none is frozen, the one that training chose, if there is
            one.
        frozen: the frozen decisions with their record; None where none is frozen.
        openings: of the test split, see `openings.read_openings`.
    """

    name: str
    record: dict[str, Any]
    epochs: int | None
    weights: bool
    predictions: pd.DataFrame | None
    decisions: dict[str, Decision]
    frozen: Frozen | None
    openings: pd.DataFrame

    def said(self, *keys: str) -> Any:
        """What `run.json` says at a place, `said("data", "cohort")`; None where it says nothing."""
        found: Any = self.record
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    def told(self, *keys: str) -> str:
        """The same in words, for a text."""
        found = self.said(*keys)
        return UNKNOWN if found is None else " ".join(str(found).split())

    @property
    def splits(self) -> dict[str, pd.DataFrame]:
        """Split → its predictions; validation first, test last."""
        if self.predictions is None:
            return {}
        parts = {str(name): rows for name, rows in self.predictions.groupby("split")}
        return dict(sorted(parts.items(), key=lambda part: (part[0] == "test", part[0] != "validation")))

    @property
    def opened(self) -> bool:
        """Whether the test split was opened with what is frozen and these predictions."""
        if self.frozen is None or self.predictions is None:
            return False
        same = self.openings["decision_sha256"] == self.frozen.sha256
        return bool((same & (self.openings["predictions_sha256"] == self.predictions_sha256)).any())

    @property
    def predictions_sha256(self) -> str | None:
        """Of the predictions table, as a frozen decision names it."""
        return None if self.predictions is None else predictions_sha256(self.predictions)

    @property
    def synthetic(self) -> bool:
        """Whether the run was trained on phantoms of this package, by its record."""
        return self.said("cohort", "phantom", "made_by") == "cspine_helpers.phantom"


def read_dossier(run_folder: str | Path) -> Dossier:
    """Read and check what a run folder holds; every file may be missing, but not all of them.

    Raises:
        FileNotFoundError: there is neither a run nor a predictions table.
        ValueError: a file is damaged, or belongs to another run than those beside it; names it.
    """
    folder = Path(run_folder)
    record = read_record(folder) if (folder / RECORD).is_file() else {}
    table = inside(folder / _PREDICTIONS)
    if not record and not table.is_file():
        raise FileNotFoundError(
            f"Nothing is known of a run at {folder}: {RECORD} and {_PREDICTIONS} are missing. Train one with "
            f"notebook 03, or put a predictions table there.{other_runs(folder)}"
        )
    weights = _described(folder / _WEIGHTS, record, "weights_sha256")
    history = _described(folder / _HISTORY, record, "history_sha256")
    predictions = read_predictions(table) if table.is_file() else None
    frozen = read_decision(folder) if (folder / DECISION).is_file() else None
    if frozen is not None and predictions is not None:
        check_belongs(frozen, predictions)
    return Dossier(
        name=folder.resolve().name,
        record=record,
        epochs=len(read_table(history, ("epoch",), what="history", source="", text=())) if history else None,
        weights=weights is not None,
        predictions=predictions,
        decisions=frozen.decisions if frozen else _decisions(record, folder),
        frozen=frozen,
        openings=read_openings(folder),
    )


def _described(path: Path, record: Mapping[str, Any], key: str) -> Path | None:
    """The file, if it is there and the record describes it; without a record nothing is known of it."""
    if not record or not inside(path).is_file():
        return None
    found = sha256_of(path)
    if record.get(key) != found:
        raise ValueError(
            f"{path} is not the file that {RECORD} describes: its SHA-256 is {found}, {RECORD} says "
            f"{record.get(key) or 'nothing'} ({key}). Put back the two files of one run, or train again."
        )
    return path


def _decisions(record: Mapping[str, Any], folder: Path) -> dict[str, Decision]:
    """Level → the decision that training chose."""
    if (found := record.get("decision")) is None:
        return {}
    try:
        decision = Decision.from_record(found)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / RECORD} holds no whole decision: {error} Restore it, or train again."
        ) from error
    return {decision.rule.level: decision}


def limits_of(run: Dossier, found: Mapping[str, Findings]) -> list[str]:
    """One sentence or two for each limit.

    Args:
        run: of `dossier.read_dossier`.
        found: split → its findings.
    """
    lines = [*_of_record(run), *(line for split, one in found.items() for line in _of_split(split, one))]
    single = [split for split, rows in run.splits.items() if len(rows[UID].unique()) == 1]
    return [*lines, *(f"On {cell(split)} there is one patient only: no results." for split in single)]


def _of_record(run: Dossier) -> Iterator[str]:
    """Limits of the run, whatever its results."""
    if run.record:
        yield (
            "Validation chose the epoch and the threshold, so that results on validation look better than "
            "those of new patients will."
        )
        yield (
            f"It is one training with one seed ({run.told('train', 'seed')}): another one would end "
            "elsewhere, and no interval here counts that."
        )
        if run.epochs is not None and run.said("best_epoch") == run.epochs:
            yield "The best epoch was the last one, so that a longer training might have found a better one."
        yield _left_out(run.said("left_out"))
        if not run.weights:
            yield "The weights (`model.safetensors`) are not in the folder."
        if run.predictions is not None:
            yield "`predictions.csv` does not say with which weights it was made."
    else:
        yield "The predictions came without a run, so that model, training data and training are not known."
        if run.decisions:
            yield "Validation chose the threshold, so that rates on validation look better than others will."
    if run.frozen is not None and run.frozen.guarantees and run.record:
        yield (
            "A guarantee is for patients drawn as those it was made on, whom training has not used; here "
            "they have also chosen the epoch, so that it holds less strictly than it says."
        )
    aggregations = [each.rule.aggregation for each in run.decisions.values()]
    if any(each and each.fitted_on for each in aggregations):
        yield "The aggregation was fitted on validation patients, whose results look the better for it."
    if run.frozen is not None and run.frozen.calibrators:
        yield "The calibrators were fitted on validation, where calibrated probabilities would look too good."
    if run.frozen is not None and (lost := run.frozen.record[MEMORY]["lost"]):
        yield f"The record of {lost} opening(s) of the test split was lost."
    if len(run.openings) > 1:
        many = len(run.openings)
        yield f"The test split was opened {many} times; results on it are less new with each."


def _left_out(left_out: Mapping[str, Mapping[str, list[str]]] | None) -> str:
    if left_out is None:
        return "The record does not say whether studies were left out of training."
    if not any(left_out.values()):
        return "No study was left out of training."
    counts = ", ".join(f"{len(studies):,} of {split}" for split, studies in left_out.items() if studies)
    return (
        f"Studies were left out, as their files could not be used ({counts}); nothing is known of such ones."
    )


def _of_split(split: str, found: Findings) -> Iterator[str]:
    """Limits of the results on one split."""
    where = f"On {cell(split)}"
    counts = found.vertebrae.drop_duplicates("vertebra")
    few = counts[counts["positives"] < MIN_POSITIVES]
    if len(few):
        named = ", ".join(f"{row.vertebra} {row.positives}" for row in few.itertuples())
        yield (
            f"{where}, few are fractured: {named}. With fewer than {MIN_POSITIVES}, the numbers of a single "
            "vertebra say little."
        )
    if lacking := found.lacking():
        yield (
            f"{where}, too few cases leave undefined, or without an interval: {'; '.join(lacking)}. A number "
            f"has no interval where more than {100 * MOST_UNDEFINED:.0f} % of the resamples do not define it."
        )
    patients = aggregate(found.rows, found.aggregation)
    if incomplete := int((patients["missing"] > 0).sum()):
        yield f"{where}, {incomplete:,} of {len(patients):,} patients lack a vertebra; nothing is said of it."
    yield (
        f"{where}, {number(at_level(found.rows, 'all')['label'].mean())} of the vertebrae and "
        f"{number(patients['label'].mean())} of the patients are fractured. Precision, negative predictive "
        "value, F1, accuracy, average precision and all losses change with these shares."
    )
