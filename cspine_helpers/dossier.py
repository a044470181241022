"""All that a run folder holds, read as one: nothing damaged, nothing that belongs to another run."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from cspine_helpers.decisions import Decision
from cspine_helpers.frozen import DECISION, Frozen, check_belongs, read_decision
from cspine_helpers.labels import UID, expand, validate_labels
from cspine_helpers.openings import read_openings
from cspine_helpers.paths import inside, sha256_of
from cspine_helpers.phantom import COHORTS, draw_labels
from cspine_helpers.predictions import predictions_sha256, read_predictions
from cspine_helpers.records import RECORD, other_runs, parse_json, read_record
from cspine_helpers.tables import read_table

_WEIGHTS, _HISTORY, _PREDICTIONS = "model.safetensors", "history.csv", "predictions.csv"
UNKNOWN = "not on record"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of batch norm; not learned


@dataclass(frozen=True)
class Dossier:
    """What is known of a run.

    Attributes:
        name: of the folder.
        record: the whole of `run.json`; empty where there is none, as for predictions made elsewhere.
        epochs: how many were trained, by `history.csv`; None where it is missing.
        parameters: learned numbers of the model, by the weights' header; None without weights.
        predictions: predictions table; None where it is missing.
        decisions: level → the frozen decision; where none is frozen, the one that training chose, if there is
            one.
        frozen: the frozen decisions with their record; None where none is frozen.
        openings: of the test split, see `openings.read_openings`.
    """

    name: str
    record: dict[str, Any]
    epochs: int | None
    parameters: int | None
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

    def phantom_labels(self) -> pd.DataFrame | None:
        """The label table of the run's cohort, if it is one of this package's synthetic ones.

        It is drawn anew, and is the cohort's where it has the SHA-256 that the record says. None: the record
        does not tell where the labels come from.
        """
        config = COHORTS.get(self.said("data", "cohort"))
        if config is None:
            return None
        labels = validate_labels(draw_labels(config))
        text = labels.to_csv(index=False, lineterminator="\n")
        same = hashlib.sha256(text.encode()).hexdigest() == self.said("data", "labels_sha256")
        return labels if same else None

    def training_labels(self, labels: pd.DataFrame | None) -> pd.DataFrame | None:
        """The training samples: the labels' patients who are not in the predictions, nor left out.

        Args:
            labels: of the cohort; None where they are not known.

        Returns:
            StudyInstanceUID, vertebra, label; None where they are not known, by the prevalence in the loss.
        """
        if labels is None or self.predictions is None:
            return None
        elsewhere = set(self.predictions[UID]).union(*(self.said("left_out") or {}).values())
        rest = expand(labels, [uid for uid in labels[UID] if uid not in elsewhere])
        alpha = self.said("loss", "alpha")
        return rest if alpha is not None and math.isclose(1 - rest["label"].mean(), alpha) else None


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
        parameters=_parameters(weights) if weights else None,
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


def _parameters(weights: Path) -> int:
    """Learned numbers, from the header of a safetensors file: 8 bytes with its length, then JSON."""
    with open(weights, "rb") as file:
        length = min(int.from_bytes(file.read(8), "little"), weights.stat().st_size)
        header = file.read(length)
    try:
        tensors = {
            name: tensor
            for name, tensor in parse_json(header, str(weights)).items()
            if name != "__metadata__"
        }
        return sum(
            math.prod(each["shape"]) for name, each in tensors.items() if not name.endswith(_STATISTICS)
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{weights} is no whole safetensors file ({error}). Restore it, or train again."
        ) from error


def _decisions(record: Mapping[str, Any], folder: Path) -> dict[str, Decision]:
    """Level → the decision that training chose."""
    if (found := record.get("decision")) is None:
        return {}
    try:
        decision = Decision(**found)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / RECORD} holds no whole decision: {error}. Restore it, or train again."
        ) from error
    return {decision.level: decision}
