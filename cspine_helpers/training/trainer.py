"""The two stages of a training, single slices and sequences, epoch by epoch; each epoch can be the last."""

import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from cspine_helpers import __version__
from cspine_helpers.checkpoints import save_weights
from cspine_helpers.cohort import Cohort
from cspine_helpers.dataset.sequence import EpochBatches, SequenceDataset, load_batches, make_loader
from cspine_helpers.decisions.thresholds import Decision, Rule, choose_threshold
from cspine_helpers.files.tables import write_table
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.metrics import auroc, average_precision
from cspine_helpers.model.classifier import FractureClassifier, ModelConfig
from cspine_helpers.runs import HISTORY, write_record
from cspine_helpers.training.config import TrainConfig, adamw, best_epoch, learning_rate
from cspine_helpers.training.loop import (
    STATE,
    TrainingState,
    evaluate,
    read_state,
    restore,
    save_state,
    train_epoch,
)
from cspine_helpers.training.losses import Loss
from cspine_helpers.training.sequence_task import SliceClassifier, SliceDataset, slice_entropy, slice_schedule

STAGES = ("slices", "sequences")
# What an image costs in a batch of sequences, trained on and only looked at, by one trained on by itself:
# measured in seconds on the built-in run. Only the progress bar uses it.
_IN_SEQUENCE, _VALIDATED = 0.6, 0.2
_BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed} so far, about {remaining} left{postfix}"


@dataclass(frozen=True)
class Stage:
    """What one stage trains, on what, and by which schedule."""

    name: str
    network: nn.Module
    loader: DataLoader[Any]
    loss: Callable[[Any, Any], Tensor]
    config: TrainConfig


class Training:
    """A training: what it works on, and where it stands.

    Args:
        accelerator: devices and processes.
        cohort: with usable sequences only.
        folder: of the run.
        model: what to train.
        config: how.
        state: where it stands; a fresh one at the beginning.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        cohort: Cohort,
        folder: Path,
        model: ModelConfig,
        config: TrainConfig,
        state: TrainingState,
    ) -> None:
        self.accelerator, self.folder, self.config, self.state = accelerator, folder, config, state
        torch.manual_seed(config.seed)
        self.model = FractureClassifier(model)
        if config.gradient_checkpointing:
            self.model.backbone.set_grad_checkpointing(True)
        self.seen, self.held_out = (
            SequenceDataset(
                cohort.samples[name],
                cohort.packed,
                slices=model.slices,
                size=model.size,
                augment=augment,
                seed=config.seed,
                manifest=cohort.manifest,
            )
            for name, augment in (("train", config.augment), ("validation", None))
        )
        self.facts = cohort.facts()
        self.loss = Loss.of(cohort.samples["train"], self.seen.slice_truth, config)
        self.validation = make_loader(
            self.held_out, batch_size=config.batch_size, workers=config.workers, **self._shares()
        )

    def run(self, tensors: dict[str, Tensor] | None) -> pd.DataFrame:
        """All epochs that are left; returns the history.

        Args:
            tensors: of the state that is resumed; None at the beginning.
        """
        try:
            if tensors is not None:
                restore(tensors, self.model)
                self._publish()  # the stop may have come before that
            with self._progress() as self._bar:
                if self.config.slice_epochs and self.state.stage == "slices":
                    self._train(self._slices(), tensors)
                self._train(self._sequences(), tensors)
        except KeyboardInterrupt:
            if (self.folder / STATE).is_file():
                self.state, tensors = read_state(self.folder)
                restore(tensors, self.model)
                self._publish(wait=False)  # the other processes may wait elsewhere
            raise
        if self.accelerator.is_main_process:
            (self.folder / STATE).unlink()
        self.accelerator.wait_for_everyone()
        return self.state.history

    def _progress(self) -> Any:
        """A bar of the whole training, whose unit is what one image costs in the pretraining of slices."""
        config, truth, slices = self.config, self.seen.slice_truth, self.seen.slices
        fractured, intact = int((truth == 1).sum()), int((truth == 0).sum())
        self._training_work = {
            "slices": fractured + min(fractured, intact),
            "sequences": _IN_SEQUENCE * slices * len(self.seen),
        }
        self._validation_work = _VALIDATED * slices * len(self.held_out)
        epoch = {**self._training_work, "sequences": self._training_work["sequences"] + self._validation_work}
        pretraining = config.slice_epochs * epoch["slices"]
        done = self.state.epoch * epoch[self.state.stage]
        return tqdm(
            total=pretraining + config.epochs * epoch["sequences"],
            initial=done + (pretraining if self.state.stage == "sequences" else 0),
            bar_format=_BAR,
            smoothing=0,
            mininterval=0.5,
            leave=False,
            disable=not self.accelerator.is_main_process,
        )

    def _slices(self) -> Stage:
        data, schedule = SliceDataset(self.seen), slice_schedule(self.config)
        order = partial(data.order, seed=self.config.seed)
        batches = EpochBatches(
            order, batch_size=schedule.batch_size, accumulate=schedule.accumulate, **self._shares()
        )
        loader = load_batches(data, batches, workers=self.config.workers, seed=self.config.seed)
        return Stage("slices", SliceClassifier(self.model), loader, slice_entropy, schedule)

    def _sequences(self) -> Stage:
        loader = make_loader(
            self.seen,
            batch_size=self.config.batch_size,
            sampling=self.config.sampling,
            workers=self.config.workers,
            seed=self.config.seed,
            accumulate=self.config.accumulate,
            **self._shares(),
        )

        def loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return self.loss(network(batch["sequence"], batch["vertebra"]), batch)

        return Stage("sequences", self.model, loader, loss, self.config)

    def _shares(self) -> dict[str, Any]:
        return {"process": self.accelerator.process_index, "processes": self.accelerator.num_processes}

    def _train(self, stage: Stage, tensors: dict[str, Tensor] | None) -> None:
        """The epochs of a stage that are left."""
        decayed = adamw(stage.network.parameters(), stage.config.learning_rate, stage.config.weight_decay)
        network, optimizer = self.accelerator.prepare(stage.network, decayed)
        if self.state.stage != stage.name:
            self.state.stage, self.state.epoch = stage.name, 0
        elif tensors is not None and self.state.epoch:
            restore(tensors, self.model, optimizer)
            if self.state.scaler is not None:
                self.accelerator.scaler.load_state_dict(self.state.scaler)
        while self.state.epoch < stage.config.epochs and not self._out_of_patience():
            epoch = self.state.epoch + 1
            self._bar.set_description(f"{stage.name}, epoch {epoch} of {stage.config.epochs}")
            self._bar.set_postfix(self._epoch(stage, network, optimizer, epoch))
        self.accelerator.free_memory()  # the wrapped network of this stage

    def _out_of_patience(self) -> bool:
        return (
            bool(self.state.rows) and self.state.epoch - self.state.best["best_epoch"] >= self.config.patience
        )

    def _epoch(self, stage: Stage, network: nn.Module, optimizer: Any, epoch: int) -> dict[str, float]:
        """One epoch, and everything that is written after it; returns what the progress bar shows."""
        began, batches = time.perf_counter(), stage.loader.batch_sampler
        assert isinstance(batches, EpochBatches)
        batches.set_epoch(epoch)
        steps = len(batches.step_sizes)
        rates = [
            learning_rate(stage.config, epoch - 1 + (step + 0.5) / steps, self.state.history)
            for step in range(steps)
        ]
        loss = train_epoch(
            self.accelerator,
            network,
            optimizer,
            stage.loader,
            stage.loss,
            rates=rates,
            clip_norm=stage.config.clip_norm,
            seed=(self.config.seed, STAGES.index(stage.name)),
            advance=lambda share: self._bar.update(share * self._training_work[stage.name]),
        )
        finite = all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())
        if not (math.isfinite(loss) and finite):
            raise ValueError(
                f"The training loss of epoch {epoch} ({stage.name}) is {loss}"
                f"{'' if finite else ', and its weights are not finite'}. Lower the learning rate "
                f"({stage.config.learning_rate:g}), or train without mixed precision. What {self.folder} "
                "holds is of earlier epochs."
            )
        if stage.name == "slices":
            self.state.slice_losses.append(loss)
            shown = {"loss": loss}
        else:
            shown = self._validated(epoch, loss, network, rates[-1])
        self.state.epoch = epoch
        self.state.epoch_seconds.append(time.perf_counter() - began)
        if self.accelerator.scaler is not None:
            self.state.scaler = self.accelerator.scaler.state_dict()
        if self.accelerator.is_main_process:
            save_state(self.folder, self.state, self.model, optimizer)
        self._publish()
        return shown

    def _validated(self, epoch: int, loss: float, network: nn.Module, rate: float) -> dict[str, float]:
        """Validate, and add the epoch's row to the history."""
        metrics, decision = self._validate(network)
        self.state.rows.append(
            {
                "epoch": epoch,
                "train_loss": loss,
                **{f"validation_{name}": value for name, value in metrics.items()},
                "threshold": math.nan if decision.threshold is None else decision.threshold,
                "learning_rate": rate,
            }
        )
        if best_epoch(self.state.history) == epoch:
            kept = {"decision": decision.record(), "metrics": {"validation": metrics}}
            self.state.best = {"best_epoch": epoch, **kept}
        return {name: metrics[name] for name in ("recall", "average_precision")}

    def _validate(self, network: nn.Module) -> tuple[dict[str, float], Decision]:
        """Metrics of the validation split, at the threshold chosen there."""
        held_out = self.held_out
        output = evaluate(
            self.accelerator,
            network,
            self.validation,
            len(held_out),
            advance=lambda share: self._bar.update(share * self._validation_work),
        )
        labels, probabilities = held_out.labels, output.logit.double().sigmoid().numpy()
        whole = {
            "label": torch.tensor(labels),
            "vertebra": torch.tensor(held_out.vertebrae),
            "slice_truth": torch.tensor(held_out.slice_truth),
        }
        decision = choose_threshold(labels, probabilities, Rule(precision_floor=self.config.precision_floor))
        metrics = {
            "loss": float(self.loss(output, whole)),
            "recall": decision.recall,
            "precision": decision.precision,
            "average_precision": average_precision(labels, probabilities),
            "auroc": auroc(labels, probabilities),
        }
        return metrics, decision

    def _publish(self, *, wait: bool = True) -> None:
        """Write what a reader of the run needs, from the state and the model as it was after that epoch."""
        if self.accelerator.is_main_process and self.state.rows:
            write_table(self.state.history, self.folder / HISTORY)
            if self.state.best["best_epoch"] == self.state.epoch:
                save_weights(self.folder, self.model)  # right before the record that holds their hash
            write_record(self.folder, self._record())
        if wait:
            self.accelerator.wait_for_everyone()

    def _record(self) -> dict[str, Any]:
        """What `run.json` says of the inputs, the settings, the software and the outcome."""
        packages = ("torch", "timm", "accelerate", "albumentations", "numpy")
        return {
            **self.state.setting,
            "cohort": self.facts,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "loss": asdict(self.loss),
            "classes": list(VERTEBRAE),
            "versions": {
                "cspine_helpers": __version__,
                "python": platform.python_version(),
                **{name: version(name) for name in packages},
            },
            **self.state.best,
            "epochs": self.state.epoch,
            "slice_losses": self.state.slice_losses,
            "seconds": sum(self.state.epoch_seconds),
            "epoch_seconds": self.state.epoch_seconds,
        }
