"""The trainer: stage after stage, epoch after epoch, on any devices, each epoch resumable.

It knows no anatomy, no data set and no threshold: a `Task` does.
"""

import hashlib
import itertools
import json
import logging
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import find_batch_size, send_to_device
from safetensors import SafetensorError, safe_open
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from cspine_helpers import __version__
from cspine_helpers.checkpoints import save_weights, write_tensors
from cspine_helpers.files.records import parse_json
from cspine_helpers.files.tables import write_table
from cspine_helpers.runs import FORMAT, HISTORY, STATE, write_record
from cspine_helpers.training.config import CHOSEN_BY, SHOWN, TrainerConfig, adamw, best_epoch, learning_rate


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
    folder: str | Path,
    state: TrainingState,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    averaged: torch.nn.Module | None = None,
) -> Path:
    """Write the state with weights, averaged weights and the optimizer's moments: `state.safetensors`."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    if averaged is not None:
        tensors |= {f"averaged.{name}": value for name, value in averaged.state_dict().items()}
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
            f"{path} is not the whole state of a training ({error}). Move the run away, and train again."
        ) from error
    return state, tensors


def restore(
    tensors: dict[str, Tensor],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    averaged: torch.nn.Module | None = None,
) -> None:
    """Put the weights and, given them, the optimizer's moments and the averaged weights back.

    Each moment gets the strides of its parameter: the fused optimizer walks both in memory order. A parameter
    that was frozen so far has none.
    """
    model.load_state_dict(_below("model.", tensors))
    if averaged is not None:
        averaged.load_state_dict(_below("averaged.", tensors))
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


def _versions() -> dict[str, str]:
    versions = {"cspine_helpers": __version__, "python": platform.python_version()}
    return versions | {name: version(name) for name in _PACKAGES}


log = logging.getLogger(__name__)
Advance = Callable[[float], object]  # is given the share of an epoch that has just been done
_BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed} so far, about {remaining} left{postfix}"
_PACKAGES = ("torch", "timm", "accelerate", "albumentations", "numpy")  # whose versions are on record


@dataclass(frozen=True)
class Stage:
    """One stage of a training.

    Attributes:
        name: "sequences".
        network: the model, or a part of it that shares its weights.
        backbone: the part of it that the config's `freeze_epochs` and `backbone_rate` are about.
        loader: makes its batches when the stage begins. Sampler: like `dataset.sequence.EpochBatches`.
        loss: (network, batch on the device) → mean over the batch's samples.
        before_epoch: is called with the epoch's number before its samples are drawn; what it does depends on
            the model's weights alone, so that a resumed training repeats it.
        config: epochs, those frozen first, learning rates, weight decay, clipping, averaging and patience.
        seed: of dropout.
        work, validation_work: cost of an epoch in any unit, for the progress bar; without validation, 0.
    """

    name: str
    network: nn.Module
    backbone: nn.Module
    loader: Callable[[], DataLoader[Any]]
    loss: Callable[[Any, Any], Tensor]
    config: TrainerConfig
    seed: tuple[int, ...]
    work: float
    validation_work: float = 0.0
    before_epoch: Callable[[int], object] = lambda epoch: None


class Task(Protocol):
    """What is trained: a model, on which data, for which aim. `sequence_task.SequenceTask` is one.

    Attributes:
        model: what is saved. What needs no gradients when the training begins never gets any.
        stages: in their order; the last one validates.
        record: what `run.json` says of the task.
    """

    model: Any
    stages: Sequence[Stage]
    record: dict[str, Any]

    def validate(self, network: nn.Module, advance: Advance) -> tuple[dict[str, float], dict[str, Any]]:
        """A row's columns of the history, and what the record says should this be the best epoch."""

    def predict(self, network: nn.Module, split: str, advance: Advance) -> Any:
        """What the network says of every sample of a split, the same as after it is saved and loaded."""


class RunningStatistics:
    """Running means and variances of BatchNorm layers, advanced once a step by the mean of its batches.

    Those of layers in eval mode, which are frozen, are not touched.

    Left to itself each layer would advance with every batch, in every process on its own, and twice where
    gradient checkpointing computes a batch again; validation would then depend on all of that.
    """

    def __init__(self, network: nn.Module) -> None:
        layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm) and layer.training]
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
        sizes = [buffer.numel() for buffer in self._buffers]
        parts = [part.view_as(b) for part, b in zip(flat.split(sizes), self._buffers, strict=True)]
        for kept in (self._buffers, self._before):
            torch._foreach_copy_(kept, parts)
        torch._foreach_zero_(self._sum)


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
    frozen: nn.Module | None = None,
    advance: Advance = lambda share: None,
) -> float:
    """One pass over the training samples.

    Dropout is drawn from (seed, epoch, step, batch), so it does not depend on which process has the batch.

    Args:
        accelerator: that prepared network and optimizer.
        network: what is trained.
        optimizer: of its parameters.
        loader: its batch sampler is like `dataset.sequence.EpochBatches`, and knows the epoch.
        loss: (network, batch on the device) → mean over the batch's samples.
        rates: learning rate of each step; of a parameter group with a "share", that share of it.
        clip_norm: largest norm of the gradient.
        seed: of this stage of the training.
        frozen: a part of the network that computes as it will in inference, without gradients.
        advance: called after each step.

    Returns:
        Mean loss over the epoch's samples, of all processes.
    """
    network.train()
    if frozen is not None:
        frozen.eval()
    batches: Any = loader.batch_sampler
    statistics, total = RunningStatistics(network), torch.zeros((), device=accelerator.device)
    samples = sum(batches.step_sizes)
    loaded = iter(loader)
    for step, (rate, size) in enumerate(zip(rates, batches.step_sizes, strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("share", 1.0)
        for turn in range(batches.accumulate):
            batch = send_to_device(next(loaded), accelerator.device, non_blocking=True)
            count = find_batch_size(batch)
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


def _draw(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Training:
    """A training: its task, and how far it has come.

    Where the last stage's config asks for `ema`, an exponential moving average of weights and BatchNorm
    statistics is advanced after each of that stage's steps, is validated instead of the model, and is kept.
    Its decay at step n is at most 1 − n^(−2/3), so that the first weights are soon forgotten.

    Source: timm's `ModelEmaV3` with its warm-up.

    Args:
        accelerator: devices and processes.
        task: what is trained.
        folder: of the run.
        state: how far it has come; a fresh one at the beginning.
    """

    def __init__(self, accelerator: Accelerator, task: Task, folder: Path, state: TrainingState) -> None:
        self.accelerator, self.task, self.folder, self.state = accelerator, task, folder, state
        self._ema = None
        self._moved = {parameter for parameter in task.model.parameters() if parameter.requires_grad}
        if decay := task.stages[-1].config.ema:
            task.model.to(accelerator.device)
            self._ema = ModelEmaV3(task.model, decay=decay, use_warmup=True)

    @property
    def _averaged(self) -> Any:
        """The averaged model, if any."""
        return None if self._ema is None else self._ema.module

    def run(self, tensors: dict[str, Tensor] | None) -> pd.DataFrame:
        """All epochs that are left; returns the history.

        Args:
            tensors: of the state that is resumed; None at the beginning.
        """
        stages = self.task.stages
        names = [stage.name for stage in stages]
        first = names.index(self.state.stage) if self.state.stage in names else 0
        self._describe()
        try:
            if tensors is not None:
                restore(tensors, self.task.model, averaged=self._averaged)
                self._publish()  # the stop may have come before that
            with self._progress(first) as self._bar:
                for stage in stages[first:]:
                    self._train(stage, tensors)
        except KeyboardInterrupt:
            if (self.folder / STATE).is_file():
                self.state, tensors = read_state(self.folder)
                restore(tensors, self.task.model, averaged=self._averaged)
                self._publish(wait=False)  # the other processes may wait elsewhere
            raise
        if self.accelerator.is_main_process:
            (self.folder / STATE).unlink()
        self.accelerator.wait_for_everyone()
        minutes = sum(self.state.epoch_seconds) / 60
        log.info("Done in %.1f minutes; epoch %d is kept.", minutes, self.state.best["best_epoch"])
        return self.state.history

    def _describe(self) -> None:
        """The head of the log: what is trained on what, with what, and from where."""
        epoch, stage = self.state.epoch, self.state.stage
        done = f"{epoch} epochs of {stage} are done" if epoch else "it begins"
        log.info("Training of %s: %s", self.folder.name, done)
        said = {**self.state.setting, **self.task.record, "versions": _versions()}
        for name, value in said.items():
            log.info("%s: %s", name, json.dumps(value, ensure_ascii=False))

    def _progress(self, first: int) -> Any:
        """A bar of the whole training, where the stage of this number is the one that is resumed."""
        each = [stage.work + stage.validation_work for stage in self.task.stages]
        whole = [stage.config.epochs * work for stage, work in zip(self.task.stages, each, strict=True)]
        return tqdm(
            total=sum(whole),
            initial=sum(whole[:first]) + self.state.epoch * each[first],
            bar_format=_BAR,
            smoothing=0,
            mininterval=0.5,
            leave=False,
            disable=not self.accelerator.is_main_process,
        )

    def _train(self, stage: Stage, tensors: dict[str, Tensor] | None) -> None:
        """The epochs of a stage that are left, those with a frozen backbone first."""
        config, loader = stage.config, stage.loader()
        if self.state.stage != stage.name:
            self.state.stage, self.state.epoch, tensors = stage.name, 0, None
            if self._ema is not None:
                self._ema.set(self.task.model)
        rates = {"rate": config.learning_rate, "backbone_rate": config.backbone_rate}
        decayed = adamw(stage.network, weight_decay=config.weight_decay, backbone=stage.backbone, **rates)
        for frozen, end in ((True, min(config.freeze_epochs, config.epochs)), (False, config.epochs)):
            if self.state.epoch >= end:
                continue
            for parameter in self._moved.intersection(stage.backbone.parameters()):
                parameter.requires_grad_(not frozen)  # before a wrapper looks for what gets gradients
            network, optimizer = self.accelerator.prepare(stage.network, decayed)
            if tensors is not None and self.state.epoch:
                restore(tensors, self.task.model, optimizer)
                if self.state.scaler is not None:
                    self.accelerator.scaler.load_state_dict(self.state.scaler)
                tensors = None
            while self.state.epoch < end and not self._out_of_patience(stage):
                epoch = self.state.epoch + 1
                self._bar.set_description(f"{stage.name}, epoch {epoch} of {config.epochs}")
                self._bar.set_postfix(self._epoch(stage, network, optimizer, loader, epoch))
            del network
            self.accelerator.free_memory()  # the wrapped network

    def _out_of_patience(self, stage: Stage) -> bool:
        waited = self.state.epoch - self.state.best.get("best_epoch", self.state.epoch)
        return waited >= stage.config.patience

    def _epoch(
        self, stage: Stage, network: nn.Module, optimizer: Any, loader: DataLoader[Any], epoch: int
    ) -> dict[str, float]:
        """One epoch, and everything that is written after it; returns what the progress bar shows."""
        # 1. Train.
        began, batches = time.perf_counter(), loader.batch_sampler
        stage.before_epoch(epoch)
        batches.set_epoch(epoch)  # type: ignore[union-attr]
        steps = len(batches.step_sizes)  # type: ignore[union-attr]
        rates = [
            learning_rate(stage.config, epoch - 1 + (step + 0.5) / steps, self.state.history)
            for step in range(steps)
        ]
        done = itertools.count((epoch - 1) * steps + 1)

        def stepped(share: float) -> None:
            if self._ema is not None and stage.validation_work:
                self._ema.update(self.task.model, next(done))
            self._bar.update(share * stage.work)

        loss = train_epoch(
            self.accelerator,
            network,
            optimizer,
            loader,
            stage.loss,
            rates=rates,
            clip_norm=stage.config.clip_norm,
            seed=stage.seed,
            frozen=stage.backbone if epoch <= stage.config.freeze_epochs else None,
            advance=stepped,
        )
        finite = all(bool(parameter.isfinite().all()) for parameter in self.task.model.parameters())
        if not (math.isfinite(loss) and finite):
            raise ValueError(
                f"The training loss of epoch {epoch} ({stage.name}) is {loss}"
                f"{'' if finite else ', and its weights are not finite'}. Lower the learning rate "
                f"({stage.config.learning_rate:g}), or train without mixed precision. What {self.folder} "
                "holds is of earlier epochs."
            )
        # 2. Validate.
        shown = {"loss": loss}
        if stage.validation_work:
            frozen = epoch <= stage.config.freeze_epochs
            last = {"learning_rate": rates[-1]}
            last["backbone_learning_rate"] = 0.0 if frozen else rates[-1] * stage.config.backbone_rate
            shown = self._validate(stage, network, {"epoch": epoch, "train_loss": loss}, last)
        else:
            self.state.slice_losses.append(loss)
        # 3. Write.
        seconds = time.perf_counter() - began
        self.state.epoch = epoch
        self.state.epoch_seconds.append(seconds)
        row = {"train_loss": loss, "learning_rate": rates[-1], "seconds": seconds}
        if stage.validation_work:
            self.state.rows[-1]["seconds"] = seconds
            row = self.state.rows[-1]
        if self.accelerator.scaler is not None:
            self.state.scaler = self.accelerator.scaler.state_dict()
        if self.accelerator.is_main_process:
            save_state(self.folder, self.state, self.task.model, optimizer, self._averaged)
        self._publish()
        values = ", ".join(f"{name} {row[name]:.4g}" for name in SHOWN if name in row)
        log.info("%s, epoch %d of %d: %s", stage.name, epoch, stage.config.epochs, values)
        self.accelerator.log({f"{stage.name}/{name}": value for name, value in row.items()}, step=epoch)
        return shown

    def _validate(
        self, stage: Stage, network: nn.Module, row: dict[str, float], rates: dict[str, float]
    ) -> dict[str, float]:
        """Complete the epoch's row of the history; returns the metrics that choose the best epoch."""
        found, kept = self.task.validate(
            network if self._averaged is None else self._averaged,
            lambda share: self._bar.update(share * stage.validation_work),
        )
        self.state.rows.append({**row, **found, **rates})
        if best_epoch(self.state.history, stage.config.keep) == row["epoch"]:
            self.state.best = {"best_epoch": row["epoch"], **kept}
        return {name.removeprefix("validation_"): found[name] for name in CHOSEN_BY}

    def _publish(self, *, wait: bool = True) -> None:
        """Write what a reader of the run needs, from the state and the model as it was after that epoch."""
        if self.accelerator.is_main_process and self.state.rows:
            write_table(self.state.history, self.folder / HISTORY)
            if self.state.best["best_epoch"] == self.state.epoch:
                kept = self.task.model if self._averaged is None else self._averaged
                save_weights(self.folder, kept)  # right before the record that holds their hash
            write_record(self.folder, self._record())
        if wait:
            self.accelerator.wait_for_everyone()

    def _record(self) -> dict[str, Any]:
        """What `run.json` says of the inputs, the settings, the software and the outcome."""
        return {
            **self.state.setting,
            **self.task.record,
            "versions": _versions(),
            **self.state.best,
            "epochs": self.state.epoch,
            "slice_losses": self.state.slice_losses,
            "seconds": sum(self.state.epoch_seconds),
            "epoch_seconds": self.state.epoch_seconds,
        }
