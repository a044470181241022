"""Slice-level pretraining: the slice encoder learns from single slices before it learns from sequences.

A sequence holds fifteen pictures of one vertebra that tell the encoder almost the same, and most of them show
no fracture. Batches of single slices from many patients, as many fractured as intact, teach it more an hour.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import Dataset

from cspine_helpers.dataset.sequence import Key, SequenceDataset
from cspine_helpers.model.classifier import FractureClassifier
from cspine_helpers.training.config import TrainConfig


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
        """An epoch's slices in random order: every fractured one, and as many intact ones anew each epoch."""
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
