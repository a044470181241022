"""The state of an interrupted training: one file, replaced in one step, from which it resumes exactly."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cspine_helpers.checkpoints import write_tensors
from cspine_helpers.files.records import parse_json
from cspine_helpers.runs import FORMAT
from cspine_helpers.training.config import CHOSEN_BY

STATE = "state.safetensors"  # in the run folder while a training is not finished


@dataclass
class TrainingState:
    """How far a training has come, after a complete epoch.

    Attributes:
        setting: what must be the same for it to be resumed: model, train, data, processes, left_out.
        stage: name of the stage.
        epoch: complete epochs of that stage.
        slice_losses: of the epochs of the first stage.
        rows: of the history, one an epoch of the last stage.
        best: what the record says of the best epoch so far.
        epoch_seconds: of each epoch, of both stages.
        scaler: of the gradients' scale in float16; None without.
    """

    setting: dict[str, Any]
    stage: str = "slices"
    epoch: int = 0
    slice_losses: list[float] = field(default_factory=list)
    rows: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    epoch_seconds: list[float] = field(default_factory=list)
    scaler: dict[str, float] | None = None

    @property
    def history(self) -> pd.DataFrame:
        """One row an epoch of the last stage."""
        return pd.DataFrame(self.rows, columns=None if self.rows else ["epoch", *CHOSEN_BY])


def save_state(
    folder: str | Path, state: TrainingState, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> Path:
    """Write the state with the weights and the optimizer's moments to `<folder>/state.safetensors`."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for number, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in moments.items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    sealed = {"format": FORMAT, "sha256": _content_sha256(state, tensors), **asdict(state)}
    return write_tensors(Path(folder) / STATE, tensors, {"state": json.dumps(sealed)})


def _content_sha256(state: TrainingState, tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256(json.dumps(asdict(state)).encode())
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def read_state(folder: str | Path) -> tuple[TrainingState, dict[str, Tensor]]:
    """The state of an interrupted training, and its tensors for `restore`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged, or of another format.
    """
    path = Path(folder) / STATE
    if not path.is_file():
        raise FileNotFoundError(f"No interrupted training at {folder}: {STATE} is missing.")
    try:
        with safe_open(path, framework="pt") as file:
            header = parse_json((file.metadata() or {}).get("state", "null"), "its header", remedy="")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        found, sealed = header.pop("format"), header.pop("sha256", None)
        if found != FORMAT:
            raise ValueError(f"it is of format {found!r}; this version reads {FORMAT}")
        state = TrainingState(**header)
        if _content_sha256(state, tensors) != sealed:
            raise ValueError("its content is not what was written")
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is not the whole state of a training ({error}). Move the run aside with "
            "training.set_aside(...), and train again."
        ) from error
    return state, tensors


def restore(
    tensors: dict[str, Tensor], model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Put the weights and, given it, the optimizer's moments back.

    Each moment gets the strides of its parameter: the fused optimizer walks both in memory order.
    """
    model.load_state_dict(_below("model.", tensors))
    if optimizer is None:
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in _below("optimizer.", tensors).items():
        number, kind = int(name.split(".")[0]), name.split(".")[1]
        if value.shape == parameters[number].shape:
            value = torch.empty_like(parameters[number], device="cpu").copy_(value)
        moments.setdefault(number, {})[kind] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
