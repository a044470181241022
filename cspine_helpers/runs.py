"""A run's record and history, read and checked without torch: `run.json` and `history.csv`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cspine_helpers.files.paths import inside, listing, previous_dirs, sha256_of, staging_dir
from cspine_helpers.files.records import SEAL, read_sealed, write_sealed
from cspine_helpers.files.tables import read_table, refuse

WEIGHTS = "model"  # the best epoch's weights are in model.safetensors
HISTORY = "history.csv"
SHARES = tuple(f"validation_{name}" for name in ("recall", "precision", "average_precision", "auroc"))
HISTORY_COLUMNS = ("epoch", "train_loss", "validation_loss", *SHARES, "threshold", "learning_rate")


def write_record(folder: str | Path, record: Mapping[str, Any]) -> Path:
    """Write `run.json` in one step; `"format"` and the SHA-256 of what it describes are added.

    `"weights_sha256"` and `"history_sha256"` are those of `model.safetensors` and, where there is one, of
    `history.csv`, so write them first. After a stop between them, the old record stands beside new files, and
    `load_run` and `read_history` notice. `"record_sha256"` is that of the record itself.

    Raises:
        FileNotFoundError: there are no weights to describe.
        ValueError: the record holds NaN or infinity, which JSON does not have; names each place.
    """
    weights, history = (Path(folder) / name for name in (f"{WEIGHTS}.safetensors", HISTORY))
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} is missing; save_weights(...) comes before write_record(...).")
    added = {"format": FORMAT, "weights_sha256": sha256_of(weights)}
    if history.is_file():
        added["history_sha256"] = sha256_of(history)
    added[SEAL] = ""  # its place; what stands there is the hash of the whole
    whole = {**added, **record, **added}  # they come first, and a record that was read cannot change them
    return write_sealed(Path(folder) / RECORD, whole)


def read_history(folder: str | Path) -> pd.DataFrame:
    """Read a run's `history.csv`: `HISTORY_COLUMNS`, one row an epoch; no threshold where none qualified.

    Raises:
        FileNotFoundError: there is none, or no record beside it.
        ValueError: it breaks the schema, or is not the file that the record describes; says what differs.
    """
    path = inside(Path(folder) / HISTORY)
    source = "Training writes it (notebook 03)."
    history = read_table(path, HISTORY_COLUMNS, what="history", source=source, text=())
    refuse(_history_problems(history), what=str(path))
    _check_described(path, read_record(folder), "history_sha256")
    return history


def _history_problems(history: pd.DataFrame) -> Iterator[str]:
    if text := [column for column in history if history[column].dtype.kind not in "fi"]:
        yield f"text in the number columns {listing(text)}"
        return
    if history["epoch"].tolist() != list(range(1, len(history) + 1)) or history.empty:
        yield f"epochs are 1, 2, 3 and so on; found {listing(history['epoch'])}"
    numbers = history.assign(threshold=history["threshold"].fillna(0))
    shares = numbers[[*SHARES, "threshold"]]
    for rule, bad in (
        ("numbers that are missing or infinite", ~np.isfinite(numbers).all(axis=1)),
        ("shares outside [0, 1]", ((shares < 0) | (shares > 1)).any(axis=1)),
    ):
        if bad.any():
            yield f"{rule}, in the epochs {listing(history['epoch'][np.asarray(bad)])}"


def _check_described(path: Path, record: Mapping[str, Any], key: str) -> None:
    stored, found = record.get(key), sha256_of(path)
    if stored != found:
        raise ValueError(
            f"{path} is not the file that {RECORD} describes: its SHA-256 is {found}, {RECORD} says "
            f"{stored or 'nothing'} ({key}); one was exchanged, or training was stopped between the two. "
            "Put back the two files of one run, or train again."
        )


RECORD = "run.json"
FORMAT = 1  # of run.json and the weights' names; rises when older runs can no longer be read


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read a run's `run.json`; see `read_sealed`."""
    return read_sealed(
        Path(folder) / RECORD,
        version=FORMAT,
        missing=f"No run at {folder}: {RECORD} is missing. Train one with notebook 03 (RETRAIN = True)."
        f"{other_runs(folder)}",
        again="train again",
        writer="checkpoints.write_record(...)",
    )


def other_runs(folder: str | Path) -> str:
    """What stands beside a run that is not there, for the end of an error: the runs, and how each is used.

    Begins with a space; empty where there is none.
    """
    folder = Path(folder)
    found = {path.parent for name in (RECORD, "predictions.csv") for path in folder.parent.glob(f"*/{name}")}
    said = ""
    if names := sorted(path.name for path in found - {folder}):
        said += f" Runs that are there: {listing(names)}; use one with RUN = {names[0]!r}."
    if (earlier := previous_dirs(folder)) and not any(folder.glob("*")):
        last, own = earlier[-1].name, folder.name
        said += (
            f" This one was set aside; paths.run_dir({last!r}).rename(paths.run_dir({own!r})) restores it."
        )
    if (training := staging_dir(folder)).is_dir():
        said += (
            f" A training of it stopped in {training.name}; RETRAIN = True in notebook 03 goes on with it."
        )
    return said
