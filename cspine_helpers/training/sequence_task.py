"""The task of sequences: a fracture of each vertebra, its encoders taught by single slices first."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cspine_helpers.cohort import Cohort
from cspine_helpers.dataset.augment import AugmentConfig
from cspine_helpers.dataset.sequence import EpochBatches, SequenceDataset, load_batches, make_loader
from cspine_helpers.decisions.thresholds import Rule, choose_threshold
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.metrics import auroc, average_precision, confusion, rates
from cspine_helpers.model.classifier import ClassifierOutput, FractureClassifier, ModelConfig
from cspine_helpers.model.forward import forward_pass
from cspine_helpers.training.config import TrainConfig
from cspine_helpers.training.losses import Loss
from cspine_helpers.training.slices import SliceClassifier, SliceDataset, slice_entropy, slice_schedule
from cspine_helpers.training.trainer import Advance, Stage

# What an image costs in a batch of sequences, trained on and only looked at, by one trained on by itself:
# measured in seconds on the built-in run. Only the progress bar uses it.
_IN_SEQUENCE, _VALIDATED = 0.6, 0.2


class SequenceTask:
    """A `trainer.Task`: the classifier, a cohort's training and validation split, and the losses.

    Seeds torch's global generator.

    Args:
        cohort: with usable sequences only.
        model: what to train.
        config: how.
        rule: chooses the threshold of an epoch on the validation split.
        accelerator: devices and processes.
    """

    def __init__(
        self, cohort: Cohort, model: ModelConfig, config: TrainConfig, rule: Rule, accelerator: Accelerator
    ) -> None:
        torch.manual_seed(config.seed)
        self.model = FractureClassifier(model)
        if config.gradient_checkpointing:
            self.model.checkpoint_gradients()
        self._cohort, self._config, self._rule, self._accelerator = cohort, config, rule, accelerator
        self._shares = {"process": accelerator.process_index, "processes": accelerator.num_processes}
        samples = cohort.samples
        self._seen = self._data(samples["train"], config.augment)
        self._held_out = self._data(samples["validation"])
        self._loaders: dict[str, DataLoader[Any]] = {}
        self._trained_on: list[Tensor] = []  # labels and logits of the epoch's batches, each (2, B)
        self._loss = Loss.of(cohort.samples["train"], self._seen.slice_truth, config)
        self.stages: Sequence[Stage] = list(self._stages())
        self.record = {
            "cohort": cohort.facts(),
            "pretrained": self.model.pretrained,
            "normalisation": self.model.config.normalisation,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "loss": asdict(self._loss),
            "classes": list(VERTEBRAE),
        }

    def _data(self, samples: pd.DataFrame, augment: AugmentConfig | None = None) -> SequenceDataset:
        config = self.model.config
        return SequenceDataset(
            samples,
            self._cohort.packed,
            slices=config.slices,
            size=config.size,
            augment=augment,
            seed=self._config.seed,
            manifest=self._cohort.manifest,
        )

    def _stages(self) -> Iterator[Stage]:
        config, slices = self._config, self.model.config.slices
        options = {"workers": config.workers, "seed": config.seed}
        if config.slice_epochs:
            data = SliceDataset(
                self._seen,
                samples=config.slice_samples,
                matched=config.matched_slices,
                inherited=config.pseudo_label_after == 0,
            )
            schedule = slice_schedule(config)
            batches = EpochBatches(
                partial(data.order, seed=config.seed),
                batch_size=schedule.batch_size,
                accumulate=schedule.accumulate,
                **self._shares,
            )
            yield Stage(
                name="slices",
                network=SliceClassifier(self.model),
                backbone=self.model.backbone,
                loader=lambda: load_batches(data, batches, **options),
                before_epoch=lambda epoch: self._guess(data, epoch),
                loss=slice_entropy,
                config=schedule,
                seed=(config.seed, 0),
                work=len(data.order(0, seed=0)),
            )

        def loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            output = network(batch["sequence"], batch["vertebra"])
            self._trained_on.append(torch.stack([batch["label"], output.logit.detach().float()]))
            return self._loss(output, batch)

        yield Stage(
            name="sequences",
            network=self.model,
            backbone=self.model.backbone,
            loader=lambda: make_loader(
                self._seen,
                batch_size=config.batch_size,
                sampling=config.sampling,
                accumulate=config.accumulate,
                **options,
                **self._shares,
            ),
            loss=loss,
            config=replace(config, freeze_epochs=max(config.freeze_epochs - config.slice_epochs, 0)),
            seed=(config.seed, 1),
            work=_IN_SEQUENCE * slices * len(self._seen),
            validation_work=_VALIDATED * slices * len(self._held_out),
        )

    def _guess(self, data: SliceDataset, epoch: int) -> None:
        """Pseudo-labels for an epoch of slices, by the model as it is, once it has learned what is known."""
        known_epochs, rows = self._config.pseudo_label_after, data.unknown()
        if known_epochs is None or epoch <= max(known_epochs, 1) or not len(rows):
            return
        if "unknown" not in self._loaders:
            samples = self._cohort.samples["train"].iloc[rows].reset_index(drop=True)
            self._loaders["unknown"] = self._in_order(self._data(samples))
        data.guess(self._output(self.model, self._loaders["unknown"]).slice_logit.numpy())

    def validate(
        self, network: nn.Module, advance: Advance = lambda share: None
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Metrics of the validation split at the threshold chosen there: for the history, and the record.

        The history has those of the training samples, too, at the same threshold: as they were drawn, varied
        and answered while the epoch trained, with dropout, by weights that changed from step to step.
        """
        data, output = self._held_out, self.predict(network, "validation", advance)
        labels, probabilities = data.labels, output.probability.numpy()
        truth = {"label": labels, "vertebra": data.vertebrae, "slice_truth": data.slice_truth}
        decision = choose_threshold(labels, probabilities, self._rule)
        metrics = {
            "loss": float(self._loss(output, {name: torch.tensor(value) for name, value in truth.items()})),
            "recall": decision.recall,
            "precision": decision.precision,
            "average_precision": average_precision(labels, probabilities),
            "auroc": auroc(labels, probabilities),
        }
        row = {f"validation_{name}": value for name, value in metrics.items()}
        for name, value in (("threshold", decision.threshold), ("validation_objective", decision.value)):
            row[name] = np.nan if value is None else value
        row |= {"validation_f1": f1(decision.recall, decision.precision)}
        row |= training_metrics(self._trained_on, decision.threshold)
        for number, name in enumerate(VERTEBRAE):
            of_vertebra = data.vertebrae == number
            row[f"validation_auroc_{name}"] = _auroc(labels[of_vertebra], probabilities[of_vertebra])
        return row, {"decision": decision.record(), "metrics": {"validation": metrics}}

    def predict(
        self, network: nn.Module, split: str, advance: Advance = lambda share: None
    ) -> ClassifierOutput:
        """Output for a split's samples in their order, each computed once, by one process."""
        if split not in self._loaders:
            is_held_out = split == "validation"
            data = self._held_out if is_held_out else self._data(self._cohort.samples[split])
            self._loaders[split] = self._in_order(data)
        return self._output(self._accelerator.unwrap_model(network), self._loaders[split], advance)

    def _in_order(self, data: SequenceDataset) -> DataLoader[Any]:
        options: dict[str, Any] = {"batch_size": self._config.batch_size, "workers": self._config.workers}
        return make_loader(data, **options, **self._shares)

    def _output(
        self, model: Any, loader: DataLoader[Any], advance: Advance = lambda share: None
    ) -> ClassifierOutput:
        slices, accelerator = self.model.config.slices, self._accelerator
        samples = len(loader.dataset)  # type: ignore[arg-type]
        whole = torch.zeros(samples, 1 + 2 * slices, device=accelerator.device)
        for index, output in forward_pass(model, loader):
            columns = torch.cat([output.logit[:, None], output.attention, output.slice_logit], dim=1)
            whole[index.to(accelerator.device)] = columns
            advance(1 / len(loader))
        whole = accelerator.reduce(whole, reduction="sum").cpu()  # each row is zero in all processes but one
        return ClassifierOutput(whole[:, 0], *whole[:, 1:].split(slices, dim=1))


def _auroc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """NaN where only one class is there."""
    return auroc(labels, probabilities) if 0 < labels.sum() < len(labels) else np.nan


def training_metrics(parts: list[Tensor], threshold: float | None) -> dict[str, float]:
    """AUROC of an epoch's batches, of all processes, and recall and F1 at the threshold.

    Args:
        parts: labels and logits of this process's batches, each `(2, B)`; emptied.
        threshold: NaN without one.
    """
    own = torch.cat([torch.zeros(2, 0), *(part.cpu() for part in parts)], dim=1)
    parts.clear()
    label, logit = torch.cat(gather_object([own]), dim=1).double()  # (2, N)
    labels, probabilities = label.numpy(), logit.sigmoid().numpy()
    metrics = {"train_auroc": _auroc(labels, probabilities), "train_recall": np.nan, "train_f1": np.nan}
    if threshold is not None and len(labels):
        at = rates(confusion(labels, probabilities, threshold)).iloc[0]
        metrics |= {"train_recall": at["recall"], "train_f1": at["f1"]}
    return metrics


def f1(recall: float, precision: float) -> float:
    """Their harmonic mean; 0 where nothing is recalled."""
    return 2 * precision * recall / (precision + recall) if recall else 0.0
