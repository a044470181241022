"""A run's record and history, read and checked without torch: `run.json` and `history.csv`.

An ensemble of runs has neither, but predictions, and `ensemble.json`, which says how they were made.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from cspine_helpers.files.paths import cohort_dir, inside, listing, previous_dirs, sha256_of, staging_dir
from cspine_helpers.files.records import SEAL, read_sealed, write_sealed
from cspine_helpers.files.tables import Column, checked, read_columns

WEIGHTS = "model"  # the best epoch's weights are in model.safetensors
HISTORY = "history.csv"
STATE = "state.safetensors"  # in the run folder while a training is not finished
_OF_UNITS = (
    *("train_auroc", "train_recall", "train_f1"),
    *(f"validation_auroc_C{number}" for number in range(1, 8)),
)
_SHARES = ("recall", "precision", "average_precision", "auroc")
_COLUMNS = (
    Column("epoch", "whole"),
    Column("train_loss", "number"),
    Column("validation_loss", "number"),
    *(Column(f"validation_{name}", "number", low=0, high=1) for name in _SHARES),
    Column("threshold", "number", low=0, high=1, empty=True),
    Column("validation_objective", "number", empty=True, optional=True),  # from here on later than some runs
    Column("validation_f1", "number", low=0, high=1, optional=True),
    *(Column(name, "number", low=0, high=1, empty=True, optional=True) for name in _OF_UNITS),
    Column("learning_rate", "number"),
    Column("backbone_learning_rate", "number", optional=True),
    Column("seconds", "number", low=0, optional=True),
)
HISTORY_COLUMNS = tuple(column.name for column in _COLUMNS)
SEQUENCES, RADIOGRAPHS = "sequences", "radiographs"  # tasks that runs are trained for
_DICE = Column("validation_dice_pos", "number", low=0, high=1, empty=True)
_OF_IMAGES = tuple(  # masks in the place of single vertebrae
    each
    for column in _COLUMNS
    if not column.name.startswith("validation_auroc_C")
    for each in ([_DICE, column] if column.name == "threshold" else [column])
)


def write_record(folder: str | Path, record: Mapping[str, Any]) -> Path:
    """Write `run.json` in one step, with the SHA-256 of weights, of history where there is one, and its own.

    Write those first. After a stop in between, the old record is beside new files, and `load_run` and
    `read_history` notice.

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
    added[SEAL] = ""  # its place
    whole = {**added, **record, **added}  # they come first, and a record that was read cannot change them
    return write_sealed(Path(folder) / RECORD, whole)


def read_history(folder: str | Path) -> pd.DataFrame:
    """Read a run's `history.csv`: `HISTORY_COLUMNS`, one row an epoch; NaN where no threshold qualified.

    Of radiographs, validation_dice_pos takes the place of the single vertebrae's areas. Earlier versions
    wrote fewer columns; those that their runs lack are left out.

    Raises:
        FileNotFoundError: there is none, or no record beside it.
        ValueError: it breaks the schema, or is not the file that the record describes; says what differs.

    Example:
        >>> len(read_history(run_folder))
        8
    """
    path = inside(Path(folder) / HISTORY)
    source = "Training writes it (notebook 03)."
    table = read_columns(path, what="history", source=source, text=())
    record = read_record(folder)
    columns = _OF_IMAGES if task_of(record) == RADIOGRAPHS else _COLUMNS
    history = checked(table, columns, what=str(path), key=("epoch",), rules=_consecutive)
    check_described(path, record, "history_sha256")
    return history


def task_of(record: Mapping[str, Any]) -> str:
    """What a run was trained for, by its record: `SEQUENCES`, which no record needs to say, or another.

    Example:
        >>> task_of(read_record(run_folder))
        'sequences'
    """
    return str(record.get("task", SEQUENCES))


def check_task(record: Mapping[str, Any], task: str, folder: Path) -> None:
    """Refuse a run that was trained for another task.

    Raises:
        ValueError: says for which, and what reads it.
    """
    readers = {
        SEQUENCES: "checkpoints.load_run(...)",
        RADIOGRAPHS: "radiographs.task.load_radiograph_run(...)",
    }
    if (found := task_of(record)) != task:
        reader = f", or load it with {readers[found]}" if found in readers else ""
        raise ValueError(
            f"The run at {folder} was trained on {found}, not on {task}. Name another run{reader}."
        )


def of_radiographs(folder: Path) -> bool:
    """Whether a run, or an ensemble, is of radiographs; False where there is none."""
    for name, read in ((RECORD, read_record), (ENSEMBLE, read_ensemble)):
        if (folder / name).is_file():
            return task_of(read(folder)) == RADIOGRAPHS
    return False


def _consecutive(history: pd.DataFrame) -> Iterator[str]:
    if history["epoch"].tolist() != list(range(1, len(history) + 1)):
        found = listing(map("{:g}".format, history["epoch"]), quoted=False)
        yield f"epochs are 1, 2, 3 and so on; found {found}"


RECORD = "run.json"
ENSEMBLE = "ensemble.json"


def check_described(path: Path, record: Mapping[str, Any], key: str, *, by: str = RECORD) -> None:
    """Refuse a file of a run whose SHA-256 is not the one on record, in the file `by`.

    Raises:
        ValueError: says both.
    """
    stored, found = record.get(key), sha256_of(path)
    if stored != found:
        raise ValueError(
            f"{path} is not the file that {by} describes: its SHA-256 is {found}, {by} says "
            f"{stored or 'nothing'} ({key}); one was exchanged, or training was stopped between the two. "
            "Put back the two files of one run, or train again."
        )


FORMAT = 1  # of run.json and the weights' names; rises when older runs can no longer be read


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read a run's `run.json`; see `read_sealed`.

    Example:
        >>> read_record(run_folder)["best_epoch"]
        7
    """
    return read_sealed(
        Path(folder) / RECORD,
        version=FORMAT,
        missing=f"No run at {folder}: {RECORD} is missing. Train one with notebook 03 (RETRAIN = True)."
        f"{other_runs(folder)}",
        again="train again",
        writer="runs.write_record(...)",
    )


_ENSEMBLE_FORMAT = 1


def write_ensemble(folder: str | Path, record: Mapping[str, Any]) -> Path:
    """Write `ensemble.json` in one step: what the predictions beside it are the mean of.

    Raises:
        ValueError: the record holds NaN or infinity, which JSON does not have; names each place.
    """
    return write_sealed(Path(folder) / ENSEMBLE, {"format": _ENSEMBLE_FORMAT, SEAL: "", **record})


def read_ensemble(folder: str | Path) -> dict[str, Any]:
    """Read `ensemble.json`; see `read_sealed`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, of another format, or not as it was written.
    """
    return read_sealed(
        Path(folder) / ENSEMBLE,
        version=_ENSEMBLE_FORMAT,
        missing=f"No ensemble at {folder}: {ENSEMBLE} is missing. Predict one with `python -m cspine_helpers "
        "predict --ensemble A B --run NAME`.",
        again="predict the ensemble again",
        writer="runs.write_ensemble(...)",
    )


def member_folders(folder: str | Path) -> list[Path]:
    """The runs that predict in a folder: itself, or the members that its `ensemble.json` names.

    A member lies in the ensemble's folder, or beside it.

    Raises:
        FileNotFoundError: there is neither a run nor an ensemble.

    Example:
        >>> [path.name for path in member_folders(run_folder)]
        ['run']
    """
    folder = Path(folder)
    if (folder / RECORD).is_file():
        return [folder]
    if not (folder / ENSEMBLE).is_file():
        raise FileNotFoundError(
            f"No run at {folder}: {RECORD} is missing. Train one: python -m cspine_helpers train."
            f"{other_runs(folder)}"
        )
    names = [each["run"] for each in read_ensemble(folder)["members"]]
    return [inner if (inner := folder / name).is_dir() else folder.parent / name for name in names]


def recorded_cohort(data: Mapping[str, Any]) -> Path | None:
    """Folder of the cohort that a record's `data` names; None outside a project, or without such a name."""
    try:
        return cohort_dir(data.get("cohort", ""))
    except (FileNotFoundError, ValueError):
        return None


def packing_settings(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the sequences were packed that a run was trained on, by its record; None where it does not say.

    Of packed CT, that is what `packed/packing.json` said; of phantoms, what `cohort.json` did.

    Example:
        >>> packing_settings(read_record(run_folder))["size"]
        64
    """
    cohort = record.get("cohort") or {}
    packed, phantom = cohort.get("packing") or {}, cohort.get("phantom") or {}
    return packed.get("config") or phantom.get("config", {}).get("pack")


def other_runs(folder: str | Path) -> str:
    """What there is beside a run that is missing, for the end of an error: other runs, and how to use them.

    Begins with a space; empty where there is nothing.
    """
    folder = Path(folder)
    found = {path.parent for name in (RECORD, "predictions.csv") for path in folder.parent.glob(f"*/{name}")}
    said = ""
    if (folder / ENSEMBLE).is_file():
        said += f" It holds an ensemble ({ENSEMBLE}): predictions, and no weights of its own."
    if names := sorted(path.name for path in found - {folder}):
        said += f" Runs that are there: {listing(names)}; use one with RUN = {names[0]!r}."
    if (earlier := previous_dirs(folder)) and not any(folder.glob("*")):
        last, own = earlier[-1].name, folder.name
        said += (
            f" This one was set aside; paths.run_dir({last!r}).rename(paths.run_dir({own!r})) restores it."
        )
    if (training := staging_dir(folder)).is_dir():
        said += f" A training of it stopped in {training.name}; RETRAIN = True in notebook 03 resumes it."
    return said
