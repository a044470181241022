"""All that a run folder holds, read as one: nothing damaged, nothing that belongs to another run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any

import pandas as pd

from cspine_helpers.decisions.test_split import (
    DECISION,
    Frozen,
    check_belongs,
    read_decision,
    read_openings,
)
from cspine_helpers.decisions.thresholds import Decision
from cspine_helpers.files.paths import inside
from cspine_helpers.files.tables import read_columns
from cspine_helpers.predictions import predictions_sha256, read_predictions
from cspine_helpers.runs import RECORD, check_described, other_runs, read_record

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

    def words(self, key: str) -> Callable[[str], str]:
        """`told` of one part of the record: `words("model")("size")`."""
        return partial(self.told, key)

    @property
    def pretrained_file(self) -> str:
        """Name of the file that pretrained weights came from; empty where they came by name."""
        return PureWindowsPath(self.said("model", "pretrained_file") or "").name

    def guaranteed(self, level: str) -> str:
        """What is guaranteed of the frozen decision at a level; empty where nothing is."""
        every = self.frozen.guarantees if self.frozen is not None else ()
        reasons = [each.reason for each in every if each.target.decision_level == level]
        if reasons and self.predictions is None:
            return "not shown: without `predictions.csv` it cannot be checked"
        return " ".join(reasons)

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
        epochs=len(read_columns(history, what="history", source="")) if history else None,
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
    check_described(path, record, key)
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
