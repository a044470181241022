"""The steps of an epoch: gradients of all processes' batches, and running statistics that agree.

The state of an interrupted training: one file, replaced in one step, from which it goes on exactly.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from cspine_helpers.checkpoints import write_tensors
from cspine_helpers.dataset.sequence import EpochBatches
from cspine_helpers.files.records import parse_json
from cspine_helpers.model.classifier import ClassifierOutput, FractureClassifier
from cspine_helpers.runs import FORMAT

Batch = dict[str, Tensor]
Advance = Callable[[float], object]  # told what share of an epoch is done


class RunningStatistics:
    """Running means and variances of all BatchNorm layers, advanced once a step by the mean of its batches.

    Left to itself each layer would advance with every batch, in every process on its own, and twice where
    gradient checkpointing computes a batch again; validation would then depend on all of that.
    """

    def __init__(self, network: nn.Module) -> None:
        layers = [module for module in network.modules() if isinstance(module, _BatchNorm)]
        pairs = [(layer.running_mean, layer.running_var) for layer in layers]
        self._buffers = [buffer for pair in pairs for buffer in pair if buffer is not None]
        self._before = [buffer.clone() for buffer in self._buffers]
        self._sum = [torch.zeros_like(buffer) for buffer in self._buffers]

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Around the forward pass of each batch."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._before)
        yield
        if self._buffers:
            torch._foreach_add_(self._sum, self._buffers)

    def advance(self, accelerator: Accelerator, batches: int) -> None:
        """After the step's last batch of this process, which had `batches` of them."""
        if not self._buffers:
            return
        flat = torch.cat([part.flatten() for part in self._sum]) / batches
        flat = accelerator.reduce(flat, reduction="mean")
        parts = [part.view_as(b) for part, b in zip(self._split(flat), self._buffers, strict=True)]
        for kept in (self._buffers, self._before):
            torch._foreach_copy_(kept, parts)
        torch._foreach_zero_(self._sum)

    def _split(self, flat: Tensor) -> tuple[Tensor, ...]:
        return flat.split([buffer.numel() for buffer in self._buffers])


def train_epoch(
    accelerator: Accelerator,
    network: nn.Module,
    optimizer: Any,
    loader: DataLoader[Any],
    loss: Callable[[Any, Any], Tensor],
    *,
    rates: list[float],
    clip_norm: float,
    seed: tuple[int, ...],
    advance: Advance = lambda share: None,
) -> float:
    """One pass over the training samples.

    Dropout is drawn from (seed, epoch, step, batch), so it does not depend on which process has the batch.

    Args:
        accelerator: that prepared network and optimizer.
        network: what is trained.
        optimizer: of its parameters.
        loader: of `EpochBatches`, their epoch set.
        loss: (network, batch on the device) → mean over the batch's samples.
        rates: learning rate of each step.
        clip_norm: largest norm of the gradient.
        seed: of this stage of the training.
        advance: called after each step with the share of the epoch's samples that it had.

    Returns:
        Mean loss over the epoch's samples, of all processes.
    """
    network.train()
    batches: Any = loader.batch_sampler
    assert isinstance(batches, EpochBatches)
    statistics, total = RunningStatistics(network), torch.zeros((), device=accelerator.device)
    samples = sum(batches.step_sizes)
    loaded = iter(loader)
    for step, (rate, size) in enumerate(zip(rates, batches.step_sizes, strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for turn in range(batches.accumulate):
            batch, count = _on(accelerator.device, next(loaded))
            number = turn * accelerator.num_processes + accelerator.process_index
            torch.manual_seed(_draw(*seed, batches.epoch, step, number))
            alone = turn < batches.accumulate - 1  # gradients are exchanged with the step's last batch
            with accelerator.no_sync(network) if alone else nullcontext():
                with statistics.batch():
                    value = loss(network, batch)
                accelerator.backward(value * (count * accelerator.num_processes / size))
            total += value.detach() * count
        statistics.advance(accelerator, batches.accumulate)
        accelerator.clip_grad_norm_(network.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        advance(size / samples)
    return float(accelerator.reduce(total, reduction="sum")) / samples


@torch.inference_mode()
@torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
def evaluate(
    accelerator: Accelerator,
    network: nn.Module,
    loader: DataLoader[Batch],
    samples: int,
    advance: Advance = lambda share: None,
) -> ClassifierOutput:
    """Output for all samples in their order, each computed once whatever the number of processes.

    After each batch, `advance` is called with its share of this process's batches.

    In float32 as inference runs, also where training does not: else a threshold would not be its own.
    """
    plain = accelerator.unwrap_model(network).folded()
    whole = torch.empty(0)
    for loaded in loader:
        batch, _ = _on(accelerator.device, loaded)
        output = FractureClassifier.forward(plain, batch["sequence"], batch["vertebra"])  # past autocast
        columns = torch.cat([output.logit[:, None], output.attention, output.slice_logit], dim=1).float()
        if not len(whole):
            whole = columns.new_zeros(samples, columns.shape[1])  # (N, 1 + 2 · T)
        whole[batch["index"]] = columns
        advance(1 / len(loader))
    if not len(whole):  # more processes than batches: this one had none
        whole = torch.zeros(samples, 1 + 2 * plain.config.slices, device=accelerator.device)
    whole = accelerator.reduce(whole, reduction="sum").cpu()  # each row is zero in all processes but one
    logit, attention, slice_logit = whole.split([1, plain.config.slices, plain.config.slices], dim=1)
    return ClassifierOutput(logit.squeeze(1), attention, slice_logit)


def _on(device: torch.device, batch: Any) -> tuple[Any, int]:
    """A batch moved to the device, and how many samples it has."""
    if isinstance(batch, dict):
        moved: Any = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        return moved, len(moved["label"])
    moved = [tensor.to(device, non_blocking=True) for tensor in batch]
    return moved, len(moved[0])


def _draw(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


STATE = "state.safetensors"  # in the run folder while a training is not finished


@dataclass
class TrainingState:
    """Where a training stands after a complete epoch.

    Attributes:
        setting: what must be the same for the training to go on: model, train, data, processes, left_out.
        stage: "slices" (pretraining) or "sequences".
        epoch: complete epochs of that stage.
        slice_losses: of the pretraining's epochs.
        rows: of the history, one an epoch of sequences.
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
        """One row an epoch of sequences."""
        return pd.DataFrame(
            self.rows, columns=None if self.rows else ["epoch", "validation_average_precision"]
        )


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
        if found == FORMAT:
            state = TrainingState(**header)
            if _content_sha256(state, tensors) != sealed:
                raise ValueError("its content is not what was written")
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is not the whole state of a training ({error}). Move the run aside with "
            "training.set_aside(...), and train again."
        ) from error
    if found != FORMAT:
        raise ValueError(
            f"{path} is of format {found!r}; this version reads {FORMAT}. Finish the training with the "
            "version that began it, or move the run aside and train again."
        )
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
