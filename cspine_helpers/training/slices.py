"""Slice-level pretraining: which slices an epoch shows, and what is known, or guessed, of each.

A sequence holds fifteen slices of one vertebra that look almost the same, and most of them show no fracture.
Batches of single slices from many patients, as many fractured as intact, teach the encoders more an hour.
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

_CERTAIN = 3  # slices of a fractured vertebra, those of the highest probability, that are taken for certain


class SliceDataset(Dataset[tuple[Tensor, Tensor]]):
    """The slices of a `SequenceDataset`, one an item: uint8 `(6, H, W)` and whether it is fractured.

    An item is asked for by (epoch, index), for the variation of that epoch; its index is sequence · T +
    position.

    Args:
        sequences: whose slices they are.
        samples: slices of an epoch, half of them fractured; 0: each that is known as fractured once, each
            other with its pseudo-label's probability, and as many intact ones.
        matched: each fractured slice is shown with an intact one of the same vertebra and position, so that
            neither of them gives the answer away.
        inherited: unknown slices of fractured vertebrae start as fractured, as the vertebra's label says.

    Attributes:
        target: `(N, T)` float32: 1 for a fractured slice, 0 for an intact one, between them a pseudo-label,
            NaN where nothing is known; how often a slice is shown as fractured is in proportion to it.

    Raises:
        ValueError: no fractured slice is known, or no intact one.
    """

    def __init__(
        self,
        sequences: SequenceDataset,
        *,
        samples: int = 0,
        matched: bool = False,
        inherited: bool = False,
    ) -> None:
        self._sequences, self._samples, self._matched = sequences, samples, matched
        self.target = sequences.slice_truth.copy()
        if inherited:
            self.target[self.unknown()] = 1
        fractured, known = int((self.target == 1).sum()), int((~np.isnan(self.target)).sum())
        if not 0 < fractured < known:
            raise ValueError(
                f"Slice-level pretraining needs fractured and intact slices of known truth; found "
                f"{fractured} fractured of {known}. Set slice_epochs=0, give the manifest its slice_truth, "
                "or let slices start with their vertebra's label (pseudo_label_after=0)."
            )

    def __len__(self) -> int:
        return self.target.size

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        epoch, index = key
        sequence, position = divmod(index, self.target.shape[1])
        pixels = self._sequences.slice_at(sequence, position, epoch=epoch)
        # What is not known as intact was chosen as fractured, also for a loader's process that began before a
        # guess and still has NaN there.
        return pixels, torch.tensor(float(self.target[sequence, position] != 0))

    def order(self, epoch: int, *, seed: int) -> np.ndarray:
        """An epoch's slices in random order, drawn from (seed, epoch) and the targets alone."""
        rng, target = np.random.default_rng((seed, epoch)), self.target.ravel()
        fractured, intact = np.flatnonzero(target > 0), np.flatnonzero(target == 0)
        weights = target[fractured].astype(np.float64)
        if not self._samples and (weights < 1).any():
            fractured = fractured[rng.random(len(fractured)) < weights]
        if self._samples:
            fractured = rng.choice(fractured, size=self._samples // 2, p=weights / weights.sum())
        if self._matched:
            chosen = self._partners(fractured, rng)
        else:
            chosen = rng.choice(intact, size=min(len(fractured), len(intact)), replace=False)
        return rng.permutation(np.concatenate([fractured, chosen]))

    def _partners(self, fractured: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """For each of these slices an intact one of the same vertebra and position, if there is any."""
        slices = self.target.shape[1]
        places = self._sequences.vertebrae[:, None] * slices + np.arange(slices)  # (N, T)
        asked, counts = np.unique(places.ravel()[fractured], return_counts=True)
        drawn = []
        for place, count in zip(asked, counts, strict=True):
            intact = np.flatnonzero((places == place).ravel() & (self.target.ravel() == 0))
            if len(intact):
                drawn.append(rng.choice(intact, size=count, replace=count > len(intact)))
        return np.concatenate(drawn) if drawn else np.empty(0, np.int64)

    def unknown(self) -> np.ndarray:
        """`(M,)`: the sequences of fractured vertebrae whose slices nobody has marked."""
        unmarked = np.isnan(self._sequences.slice_truth).all(axis=1)
        return np.flatnonzero(unmarked & (self._sequences.labels == 1))

    def guess(self, slice_logit: np.ndarray) -> None:
        """Pseudo-labels of the `unknown` sequences, from the logits `(M, T)` of their slices.

        A fractured vertebra has fractured slices: its own highest probabilities are taken for certain, and
        each slice's target is its probability as a share of theirs, at most 1.

        Source: Lee, Pseudo-label, ICML workshop 2013; the bag's label as constraint: Andrews et al., Support
        vector machines for multiple-instance learning, NeurIPS 2002.
        """
        probability = 1 / (1 + np.exp(-slice_logit.astype(np.float64)))
        highest = np.sort(probability, axis=1)[:, -_CERTAIN:].mean(axis=1, keepdims=True)
        self.target[self.unknown()] = np.clip(probability / highest, 1e-6, 1)


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
        freeze_epochs=min(config.freeze_epochs, config.slice_epochs),
        warmup_epochs=0.15 * config.slice_epochs,
        learning_rate=config.slice_learning_rate,
        batch_size=config.slice_batch_size,
        schedule="cosine",
    )
