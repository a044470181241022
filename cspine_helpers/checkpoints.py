"""The run folder: weights and the record of where they come from; strict when read, never a pickle."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from cspine_helpers.files.paths import atomic_path, inside, listing
from cspine_helpers.files.records import config_of, differences, parse_json, written_by
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.model.classifier import FractureClassifier, ModelConfig
from cspine_helpers.runs import (
    RECORD,
    SEQUENCES,
    STATE,
    WEIGHTS,
    check_described,
    check_task,
    read_record,
    write_record,
)

_LATER = {"slice_evidence": False}  # settings that came after some runs, and how those were trained
DTYPE, HALF = "weights_dtype", "float16"  # of kernels and matrices, where a record says so; else float32
Model = TypeVar("Model", bound=nn.Module)
Config = TypeVar("Config")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}


@dataclass(frozen=True)
class Run(Generic[Model, Config]):
    """A trained model as it was saved, of whatever task.

    Attributes:
        folder: where it was saved.
        model: in eval mode, on the CPU until `to` moves it.
        config: the model's.
        threshold: probability from which a unit (a vertebra, an image) is called fractured; None where none
            qualified, and `record["decision"]["reason"]` says why.
        record: the whole of `run.json`.
    """

    folder: Path
    model: Model
    config: Config
    threshold: float | None
    record: dict[str, Any]

    def to(self, device: str) -> Self:
        """Move the model to a device, "cpu" or "cuda", on which it then computes; returns the run.

        Raises:
            ValueError: there is no such device here, or torch cannot use it.
        """
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch knows each of them
            raise ValueError(
                f"{device!r} is no device that torch can use here ({str(error).splitlines()[0]}). Choose cpu."
            ) from error
        self.model.to(device)
        return self


def save_weights(folder: str | Path, model: Any, name: str = WEIGHTS) -> Path:
    """Write the weights to `<folder>/<name>.safetensors` in one step, the model's config in their header.

    The model is any network with a `config`, a dataclass.

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


def halve_weights(folder: str | Path) -> Path:
    """Store a run's kernels and weight matrices in float16, for sharing: half the size.

    They are loaded as float32 again. Vectors (biases, norms) stay float32. What the run predicts changes by
    rounding, about three digits, so predict after it.

    Returns:
        The file of the weights.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: its training has not ended, its files do not belong to each other, or a weight is too
            large for float16.

    Example:
        >>> halve_weights("checkpoints/nobody")
        Traceback (most recent call last):
        ...
        FileNotFoundError: No run at checkpoints/nobody: run.json is missing. ...
    """
    folder = Path(folder)
    record, path = read_record(folder), folder / f"{WEIGHTS}.safetensors"
    if (folder / STATE).is_file():
        raise ValueError(
            f"The training in {folder} has not ended. Resume it, then store its weights in half."
        )
    check_described(path, record, "weights_sha256")
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    halved = {name: value.half() if _is_halved(value) else value for name, value in tensors.items()}
    if bad := _not_finite_tensors(halved):
        raise ValueError(f"{path} stays as it is: in float16 {listing(bad, separator='; ', quoted=False)}.")
    write_tensors(path, halved, header)
    write_record(folder, record | {DTYPE: HALF})
    return path


def _is_halved(value: torch.Tensor) -> bool:
    return value.ndim > 1 and value.dtype == torch.float32


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], header: dict[str, str]) -> Path:
    """Write a safetensors file in one step; returns its path."""
    path = Path(path)
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(plain, metadata=header))  # save_file has errors of its own for a full disk
    return path


def load_run(folder: str | Path) -> Run[FractureClassifier, ModelConfig]:
    """Load a run of sequences: its weights by name, shape and dtype, nothing guessed, nothing unpickled.

    Raises:
        FileNotFoundError: `run.json` or `model.safetensors` is missing.
        ValueError: they are damaged, of another task, or do not belong to this package or to each other;
            says what differs.

    Example:
        >>> run = load_run(run_folder)
        >>> run.config.backbone, round(run.threshold, 2)
        ('tf_efficientnetv2_b0', 0.16)
    """
    return load_task_run(folder, SEQUENCES, ModelConfig, FractureClassifier, classes=VERTEBRAE, later=_LATER)


def load_task_run(
    folder: str | Path,
    task: str,
    config: Callable[..., Config],
    network: Callable[..., Model],
    *,
    classes: Sequence[str],
    later: Mapping[str, Any] | None = None,
) -> Run[Model, Config]:
    """Load a run of one task; see `load_run`.

    Args:
        folder: of the run.
        task: that the record must name.
        config: the model's class of settings, which has a `normalisation`.
        network: (config, load_pretrained=False) → the model.
        classes: what it tells apart.
        later: settings of the model that came after some runs, and how those were trained.
    """
    folder = Path(folder)
    record = read_record(folder)
    check_task(record, task, folder)
    later = later or {}
    made, threshold = _config(record, folder, config, classes, later), _threshold(record, folder)
    weights = inside(folder / f"{WEIGHTS}.safetensors")
    model = _load_weights(weights, made, network, later, halved=record.get(DTYPE) == HALF)
    check_described(weights, record, "weights_sha256")
    return Run(folder, model.eval(), made, threshold, record)


def _config(
    record: dict[str, Any],
    folder: Path,
    kind: Callable[..., Config],
    classes: Sequence[str],
    later: Mapping[str, Any],
) -> Config:
    """The model's config, once classes and keys are those of this package."""
    if record.get("classes") != list(classes):
        raise ValueError(
            f"The run at {folder} has classes {record.get('classes')}; this package's are {list(classes)}. "
            f"{written_by(record)}"
        )
    try:
        found = record.get("model")
        config: Any = config_of(kind, {**later, **found} if isinstance(found, dict) else found, whole=True)  # type: ignore[arg-type]
        stored, own = record.get("normalisation"), config.normalisation
        if stored is not None and stored != own:  # another version of timm may have corrected its numbers
            raise ValueError(f"pixels were normalised by {stored}; here they would be by {own}.")
        return config
    except ValueError as error:
        raise ValueError(f"{folder / RECORD}: {error} {written_by(record)}") from error


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


def _load_weights(
    path: Path,
    config: Config,
    network: Callable[..., Model],
    later: Mapping[str, Any],
    *,
    halved: bool = False,
) -> Model:
    """A model of the file's tensors, if config and tensors are exactly those wanted, by the header first."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Restore it, or train again with notebook 03.")
    try:
        with safe_open(path, framework="pt") as file:
            _refuse(path, _config_differences((file.metadata() or {}).get("model"), config, later))
            with torch.device("meta"):  # shapes without numbers
                model = network(config, load_pretrained=False)
            dtypes = {
                name: HALF if halved and _is_halved(value) else str(value.dtype).removeprefix("torch.")
                for name, value in model.state_dict().items()
            }
            wanted = {
                name: f"{dtypes[name]} {tuple(value.shape)}" for name, value in model.state_dict().items()
            }
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # not a dict
            found = {
                name: f"{_DTYPES.get(s.get_dtype(), s.get_dtype())} {tuple(s.get_shape())}"
                for name, s in slices.items()
            }
            _refuse(path, differences(found, wanted))
            tensors = {name: file.get_tensor(name).clone() for name in wanted}
            tensors |= {name: tensors[name].float() for name in wanted if dtypes[name] == HALF}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}). Pickled weights are never opened here: "
            "restore the file, or train again."
        ) from error
    _refuse(path, _not_finite_tensors(tensors))
    model.load_state_dict(tensors, assign=True)
    return model.to(memory_format=torch.channels_last)  # as a new model has it


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        raise ValueError(
            f"{path} does not fit {RECORD} beside it: {listing(problems, separator='; ', quoted=False)}. "
            "Put back the two files of one run, or train again."
        )


def _not_finite_tensors(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    return [f"{name} holds NaN or infinity" for name, value in tensors.items() if not value.isfinite().all()]


def _config_differences(header: str | None, config: Any, later: Mapping[str, Any]) -> list[str]:
    """What the config in the weights' header says otherwise than `run.json`."""
    try:
        found = parse_json(header or "", "header")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        return ["its header holds no model config"]
    if found.get("pretrained") is False:  # how runs said it before there were several sources
        found["pretrained"] = None
    wanted = json.loads(json.dumps(asdict(config)))  # lists for tuples
    return differences({**later, **found}, wanted)
