"""The run folder: weights and the record of where they come from; strict when read, never a pickle."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.model import FractureClassifier, ModelConfig
from cspine_helpers.paths import atomic_path, inside, listing, sha256_of
from cspine_helpers.records import FORMAT, RECORD, SEAL, read_record, write_sealed, written_by
from cspine_helpers.tables import read_table, refuse

WEIGHTS = "model"  # the best epoch's weights are in model.safetensors
HISTORY = "history.csv"
SHARES = tuple(f"validation_{name}" for name in ("recall", "precision", "average_precision", "auroc"))
HISTORY_COLUMNS = ("epoch", "train_loss", "validation_loss", *SHARES, "threshold", "learning_rate")


@dataclass(frozen=True)
class Run:
    """A trained model as it was saved.

    Attributes:
        folder: where it lies.
        model: in eval mode, on the CPU.
        config: the model's.
        threshold: probability from which a vertebra counts as fractured; None where none qualified, and
            `record["decision"]["reason"]` says why.
        record: the whole of `run.json`.
    """

    folder: Path
    model: FractureClassifier
    config: ModelConfig
    threshold: float | None
    record: dict[str, Any]


def save_weights(folder: str | Path, model: FractureClassifier, name: str = WEIGHTS) -> Path:
    """Write the weights to `<folder>/<name>.safetensors` in one step, the model's config in their header.

    Raises:
        ValueError: they hold NaN or infinity; names the tensors.
    """
    path, tensors = Path(folder) / f"{name}.safetensors", model.state_dict()
    if bad := _not_finite_tensors(tensors):
        raise ValueError(
            f"{path} was not written: {listing(bad, separator='; ', quoted=False)}. Lower the learning rate, "
            "and train again."
        )
    return write_tensors(path, tensors, {"model": json.dumps(asdict(model.config))})


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], header: dict[str, str]) -> Path:
    """Write a safetensors file in one step; returns its path."""
    path = Path(path)
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(plain, metadata=header))  # save_file has errors of its own for a full disk
    return path


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


def load_run(folder: str | Path) -> Run:
    """Load a run: its weights by name, shape and dtype, nothing guessed, nothing unpickled.

    Raises:
        FileNotFoundError: `run.json` or `model.safetensors` is missing.
        ValueError: they are damaged, or do not belong to this package or to each other; says what differs.
    """
    folder = Path(folder)
    record = read_record(folder)
    config, threshold = _config(record, folder), _threshold(record, folder)
    with torch.device("meta"):  # shapes without numbers: a false config costs no memory
        model = FractureClassifier(replace(config, pretrained=False, pretrained_file=None))
    model.config = config
    weights = inside(folder / f"{WEIGHTS}.safetensors")
    _load_weights(weights, model)
    _check_described(weights, record, "weights_sha256")
    return Run(folder, model.eval(), config, threshold, record)


def _config(record: dict[str, Any], folder: Path) -> ModelConfig:
    """The model's config, once classes and keys are those of this package."""
    if record.get("classes") != list(VERTEBRAE):
        raise ValueError(
            f"The run at {folder} has classes {record.get('classes')}; this package's are {list(VERTEBRAE)}. "
            f"{written_by(record)}"
        )
    found = record.get("model")
    if not isinstance(found, dict):
        raise ValueError(f"{folder / RECORD} has no model config under 'model'. Restore it, or train again.")
    known = {field.name for field in fields(ModelConfig)}
    problems = [f"{name} is unknown" for name in found if name not in known]
    problems += [f"{name} is missing" for name in sorted(known - set(found))]
    if problems:
        raise ValueError(
            f"The model config in {folder / RECORD} does not fit: "
            f"{listing(problems, separator='; ', quoted=False)}. {written_by(record)}"
        )
    try:
        return ModelConfig(**found)
    except ValueError as error:
        raise ValueError(f"{folder / RECORD}: {error}") from error


def _threshold(record: dict[str, Any], folder: Path) -> float | None:
    decision = record.get("decision")
    threshold = decision.get("threshold", math.nan) if isinstance(decision, dict) else math.nan
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if threshold is None or (number and 0 <= threshold <= 1):
        return threshold
    raise ValueError(
        f"{folder / RECORD} has no threshold in [0, 1] (or null) under 'decision'; found {decision!r}. "
        "Restore it, or train again."
    )


def _load_weights(path: Path, model: FractureClassifier) -> None:
    """Copy the file's tensors into the model, if they are exactly the model's."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Restore it, or train again with notebook 03.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # not a dict
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}). Pickled weights are never opened here: "
            "restore the file, or train again."
        ) from error
    problems = _config_differences(header.get("model"), model.config)
    wanted = model.state_dict()
    problems += [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} is foreign" for name in tensors if name not in wanted]
    for name in wanted.keys() & tensors.keys():
        theirs, ours = _kind(tensors[name]), _kind(wanted[name])
        if theirs != ours:
            problems.append(f"{name} is {theirs}, not {ours}")
    problems += _not_finite_tensors(tensors)
    if problems:
        raise ValueError(
            f"{path} does not fit {RECORD} beside it: {listing(problems, separator='; ', quoted=False)}. "
            "Put back the two files of one run, or train again."
        )
    model.load_state_dict(tensors, assign=True)
    model.to(memory_format=torch.channels_last)  # as a new model has it


def _not_finite_tensors(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    return [f"{name} holds NaN or infinity" for name, value in tensors.items() if not value.isfinite().all()]


def _config_differences(header: str | None, config: ModelConfig) -> list[str]:
    """What the config in the weights' header says otherwise than `run.json`."""
    ours = asdict(config)
    try:
        theirs = json.loads(header or "")
    except ValueError:
        theirs = None
    if not isinstance(theirs, dict):
        return ["its header holds no model config"]
    return [
        f"{name} is {theirs.get(name)!r}, not {ours.get(name)!r}"
        for name in {**ours, **theirs}
        if theirs.get(name) != ours.get(name)
    ]


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
