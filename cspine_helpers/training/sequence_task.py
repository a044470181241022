"""The task of sequences: a fracture of each vertebra, its encoders taught by single slices first.

A sequence holds fifteen slices of one vertebra that look almost the same, and most of them show no fracture.
Batches of single slices from many patients, as many fractured as intact, teach the encoders more an hour.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, Dataset

from cspine_helpers.cohort import Cohort
from cspine_helpers.dataset.augment import AugmentConfig
from cspine_helpers.dataset.sequence import EpochBatches, Key, SequenceDataset, load_batches, make_loader
from cspine_helpers.decisions.thresholds import Rule, choose_threshold
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.metrics import auroc, average_precision
from cspine_helpers.model.classifier import ClassifierOutput, FractureClassifier, ModelConfig
from cspine_helpers.model.forward import forward_pass
from cspine_helpers.training.config import TrainConfig
from cspine_helpers.training.losses import Loss
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
        accelerator: devices and processes.
    """

    def __init__(
        self, cohort: Cohort, model: ModelConfig, config: TrainConfig, accelerator: Accelerator
    ) -> None:
        torch.manual_seed(config.seed)
        self.model = FractureClassifier(model)
        if config.gradient_checkpointing:
            self.model.backbone.set_grad_checkpointing(True)
        self._cohort, self._config, self._accelerator = cohort, config, accelerator
        self._shares = {"process": accelerator.process_index, "processes": accelerator.num_processes}
        self._seen, self._held_out = self._data("train", config.augment), self._data("validation")
        self._loaders: dict[str, DataLoader[Any]] = {}
        self._loss = Loss.of(cohort.samples["train"], self._seen.slice_truth, config)
        self.stages: Sequence[Stage] = list(self._stages())
        self.record = {
            "cohort": cohort.facts(),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "loss": asdict(self._loss),
            "classes": list(VERTEBRAE),
        }

    def _data(self, split: str, augment: AugmentConfig | None = None) -> SequenceDataset:
        config = self.model.config
        return SequenceDataset(
            self._cohort.samples[split],
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
            data, schedule = SliceDataset(self._seen), slice_schedule(config)
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
                loss=slice_entropy,
                config=schedule,
                seed=(config.seed, 0),
                work=len(data.order(0, seed=0)),
            )

        def loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return self._loss(network(batch["sequence"], batch["vertebra"]), batch)

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

    def validate(
        self, network: nn.Module, advance: Advance = lambda share: None
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Metrics of the validation split at the threshold chosen there: for the history, and the record."""
        data, output = self._held_out, self.predict(network, "validation", advance)
        labels, probabilities = data.labels, output.probability.numpy()
        truth = {"label": labels, "vertebra": data.vertebrae, "slice_truth": data.slice_truth}
        decision = choose_threshold(labels, probabilities, Rule(precision_floor=self._config.precision_floor))
        metrics = {
            "loss": float(self._loss(output, {name: torch.tensor(value) for name, value in truth.items()})),
            "recall": decision.recall,
            "precision": decision.precision,
            "average_precision": average_precision(labels, probabilities),
            "auroc": auroc(labels, probabilities),
        }
        threshold = np.nan if decision.threshold is None else decision.threshold
        row = {f"validation_{name}": value for name, value in metrics.items()} | {"threshold": threshold}
        return row, {"decision": decision.record(), "metrics": {"validation": metrics}}

    def predict(
        self, network: nn.Module, split: str, advance: Advance = lambda share: None
    ) -> ClassifierOutput:
        """Output for a split's samples in their order, each computed once, by one process."""
        if split not in self._loaders:
            data = self._held_out if split == "validation" else self._data(split)
            self._loaders[split] = make_loader(
                data, batch_size=self._config.batch_size, workers=self._config.workers, **self._shares
            )
        loader, slices, accelerator = self._loaders[split], self.model.config.slices, self._accelerator
        samples = len(self._cohort.samples[split])
        whole = torch.zeros(samples, 1 + 2 * slices, device=accelerator.device)
        for index, output in forward_pass(accelerator.unwrap_model(network), loader):
            columns = torch.cat([output.logit[:, None], output.attention, output.slice_logit], dim=1)
            whole[index.to(accelerator.device)] = columns
            advance(1 / len(loader))
        whole = accelerator.reduce(whole, reduction="sum").cpu()  # each row is zero in all processes but one
        return ClassifierOutput(whole[:, 0], *whole[:, 1:].split(slices, dim=1))


class SliceDataset(Dataset[tuple[Tensor, Tensor]]):
    """The slices of known truth of a `SequenceDataset`, one an item: uint8 `(6, H, W)` and its truth.

    An item is asked for by (epoch, index), for the variation of that epoch.

    Attributes:
        truth: `(N,)` float32, 1 for a fractured slice, 0 for an intact one.

    Raises:
        ValueError: no fractured slice is known, or no intact one.
    """

    def __init__(self, sequences: SequenceDataset) -> None:
        self._sequences = sequences
        self._places = np.argwhere(~np.isnan(sequences.slice_truth))  # (N, 2): sequence, slice
        self.truth = sequences.slice_truth[tuple(self._places.T)]
        if not 0 < self.truth.sum() < len(self):
            raise ValueError(
                f"Slice-level pretraining needs fractured and intact slices of known truth; found "
                f"{int(self.truth.sum())} fractured of {len(self)}. Set slice_epochs=0, or give the manifest "
                "its slice_truth."
            )

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        epoch, index = key
        sequence, position = self._places[index].tolist()
        pixels = self._sequences.slice_at(sequence, position, epoch=epoch)
        return pixels, torch.tensor(self.truth[index])

    def order(self, epoch: int, *, seed: int) -> np.ndarray:
        """An epoch's slices in random order: all fractured ones, and as many intact ones of its own."""
        rng = np.random.default_rng((seed, epoch))
        fractured, intact = np.flatnonzero(self.truth == 1), np.flatnonzero(self.truth == 0)
        chosen = rng.choice(intact, size=min(len(fractured), len(intact)), replace=False)
        return rng.permutation(np.concatenate([fractured, chosen]))


class SliceClassifier(nn.Module):
    """The part of a classifier that single slices teach: its encoders and its slice head, shared with it."""

    def __init__(self, model: FractureClassifier) -> None:
        super().__init__()
        self.backbone, self.mask_encoder, self.slice_head = (
            model.backbone, model.mask_encoder, model.slice_head,
        )  # fmt: skip
        self._encode = model.encode

    def forward(self, pixels: Tensor) -> Tensor:
        """Logit `(N,)` of each slice, uint8 `(N, 6, H, W)`, being fractured."""
        return self.slice_head(self._encode(pixels)).squeeze(1)


def slice_entropy(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of a batch of slices (0.69 is guessing)."""
    pixels, truth = batch
    return binary_cross_entropy_with_logits(network(pixels).float(), truth)


def slice_schedule(config: TrainConfig) -> TrainConfig:
    """The settings of the pretraining in the terms of a training: its epochs, batches and learning rate."""
    return replace(
        config,
        epochs=config.slice_epochs,
        warmup_epochs=0.15 * config.slice_epochs,
        learning_rate=config.slice_learning_rate,
        batch_size=config.slice_batch_size,
        schedule="cosine",
    )
