"""The run folder: weights and the record of where they come from; strict when read, never a pickle."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.model import FractureClassifier, ModelConfig
from cspine_helpers.paths import atomic_path, listing, sha256_of

FORMAT = 1  # of run.json and the weights' names; rises when older runs can no longer be read
RECORD = "run.json"
WEIGHTS = "model"  # the best epoch's weights are in model.safetensors


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
    """Write the weights to `<folder>/<name>.safetensors` in one step, the model's config in their header."""
    path = Path(folder) / f"{name}.safetensors"
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    header = {"model": json.dumps(asdict(model.config))}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=header)
    return path


def write_record(folder: str | Path, record: Mapping[str, Any]) -> Path:
    """Write `run.json` in one step; `"format"` and `"weights_sha256"` are added.

    The second is that of `model.safetensors`, so write the weights first. After a stop between the two,
    the old record stands beside new weights, and `load_run` notices.

    Raises:
        FileNotFoundError: there are no weights to describe.
        ValueError: the record holds NaN or infinity, which JSON does not have; names each place.
    """
    numbers = _not_finite(record)
    if numbers:
        raise ValueError(
            f"A run's record has no NaN or infinity; found at {listing(numbers)}. Leave them out."
        )
    path, weights = Path(folder) / RECORD, Path(folder) / f"{WEIGHTS}.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} is missing; save_weights(...) comes before write_record(...).")
    added = {"format": FORMAT, "weights_sha256": sha256_of(weights)}
    whole = {**added, **record, **added}  # they come first, and a record that was read cannot change them
    text = json.dumps(whole, indent=2, default=_plain, ensure_ascii=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read a run's `run.json`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, or of another format than this version of the package reads.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise FileNotFoundError(f"No run at {folder}: {RECORD} is missing. Train one with notebook 03.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). Restore it, or train again.") from error
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path} is of format {found!r}; this version reads format {FORMAT}. Read it with the version of "
            "cspine_helpers that wrote it, or train again."
        )
    return record


def load_run(folder: str | Path) -> Run:
    """Load a run: its weights by name, shape and dtype, nothing guessed, nothing unpickled.

    The random state is left as it was.

    Raises:
        FileNotFoundError: `run.json` or `model.safetensors` is missing.
        ValueError: they are damaged, or do not belong to this package or to each other; says what differs.
    """
    folder = Path(folder)
    record = read_record(folder)
    config, threshold = _config(record, folder), _threshold(record, folder)
    with torch.random.fork_rng(devices=[]):
        model = FractureClassifier(replace(config, pretrained=False, pretrained_file=None))
    model.config = config
    weights = folder / f"{WEIGHTS}.safetensors"
    _load_weights(weights, model)
    stored, found = record.get("weights_sha256"), sha256_of(weights)
    if stored != found:
        raise ValueError(
            f"{weights} is not the file that {RECORD} describes: its SHA-256 is {found}, {RECORD} says "
            f"{stored or 'nothing'} (weights_sha256); one was exchanged, or training was stopped between the "
            "two. Put back the two files of one run, or train again."
        )
    return Run(folder, model.eval(), config, threshold, record)


def _config(record: dict[str, Any], folder: Path) -> ModelConfig:
    """The model's config, once classes and keys are those of this package."""
    if record.get("classes") != list(VERTEBRAE):
        raise ValueError(
            f"The run at {folder} has classes {record.get('classes')}; this package's are {list(VERTEBRAE)}."
        )
    found = record.get("model")
    if not isinstance(found, dict):
        raise ValueError(f"{folder / RECORD} has no model config under 'model'. Restore it, or train again.")
    known = {field.name for field in fields(ModelConfig)}
    problems = [f"{name} is unknown" for name in found if name not in known]
    problems += [f"{name} is missing" for name in sorted(known - set(found))]
    if problems:
        raise ValueError(f"The model config in {folder / RECORD} does not fit: {'; '.join(problems)}.")
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
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
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
    if problems:
        raise ValueError(
            f"{path} does not fit {RECORD} beside it: {'; '.join(problems)}. "
            "Put back the two files of one run, or train again."
        )
    model.load_state_dict(tensors)


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


def _plain(value: Any) -> Any:  # what json hands over
    """NumPy numbers as Python's; anything else is refused by its name."""
    if hasattr(value, "item"):
        return value.item()
    raise ValueError(f"A run's record holds plain values; found {type(value).__name__} {value!r}.")


def _not_finite(value: Any, place: str = "record") -> list[str]:
    """Places of numbers that JSON cannot hold."""
    if isinstance(value, Mapping):
        return [found for key, item in value.items() for found in _not_finite(item, f"{place}.{key}")]
    if isinstance(value, list | tuple):
        return [found for i, item in enumerate(value) for found in _not_finite(item, f"{place}[{i}]")]
    return [] if not isinstance(value, float) or math.isfinite(value) else [place]
