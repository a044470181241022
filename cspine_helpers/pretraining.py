"""Slice-level pretraining: the slice encoder learns from single slices before it learns from sequences.

A sequence holds fifteen pictures of one vertebra that tell the encoder almost the same, and most of them show
no fracture. Batches of single slices from many patients, as many fractured as intact, teach it more an hour.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from cspine_helpers.dataset import SequenceDataset, loader_options
from cspine_helpers.model import FractureClassifier
from cspine_helpers.recipe import TrainConfig, adamw, learning_rate


class SliceDataset(Dataset[tuple[Tensor, Tensor]]):
    """The slices of known truth of a `SequenceDataset`, one an item: uint8 `(6, H, W)` and its truth.

    Attributes:
        truth: `(N,)`, 1 for a fractured slice, 0 for an intact one.
    """

    def __init__(self, sequences: SequenceDataset) -> None:
        self._sequences = sequences
        self._places = np.argwhere(~np.isnan(sequences.slice_truth))  # (N, 2): sequence, slice
        self.truth = sequences.slice_truth[tuple(self._places.T)]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        sequence, position = self._places[index].tolist()
        return self._sequences.slice_at(sequence, position), torch.tensor(self.truth[index])

    def draw(self, epoch: int, seed: int) -> list[int]:
        """An epoch's slices in random order: every fractured one, and as many intact ones anew each epoch."""
        rng = np.random.default_rng((seed, epoch))
        fractured, intact = np.flatnonzero(self.truth == 1), np.flatnonzero(self.truth == 0)
        chosen = rng.choice(intact, size=min(len(fractured), len(intact)), replace=False)
        return rng.permutation(np.concatenate([fractured, chosen])).tolist()


def pretrain(
    accelerator: Accelerator, model: FractureClassifier, sequences: SequenceDataset, config: TrainConfig
) -> list[float]:
    """Train the encoder and the slice head on single slices for `config.slice_epochs` epochs, in place.

    Every process of a launch does all of it, alike.

    Returns:
        Mean cross-entropy of each epoch (0.69 is guessing).

    Raises:
        ValueError: no fractured slice is known, or no intact one.
    """
    data = SliceDataset(sequences)
    if not 0 < data.truth.sum() < len(data):
        raise ValueError(
            f"Slice-level pretraining needs fractured and intact slices of known truth; found "
            f"{int(data.truth.sum())} fractured of {len(data)}. Set slice_epochs=0, or give the manifest its "
            "slice_truth."
        )
    model.to(accelerator.device).train()
    learned = [*model.backbone.parameters(), *model.mask_encoder.parameters(), *model.slice_head.parameters()]
    optimizer = adamw(learned, config.slice_learning_rate, config.weight_decay)
    schedule = replace(
        config,
        epochs=config.slice_epochs,
        warmup_epochs=0.15 * config.slice_epochs,
        learning_rate=config.slice_learning_rate,
        schedule="cosine",
    )
    losses = []
    quiet = not accelerator.is_main_process
    bar = tqdm(range(config.slice_epochs), desc="slice epochs", leave=False, disable=quiet)
    for epoch in bar:
        sequences.set_epoch(epoch)
        drawn = data.draw(epoch, config.seed)
        loader = DataLoader(
            data,
            batch_size=config.slice_batch_size,
            sampler=drawn,
            drop_last=len(drawn) > config.slice_batch_size,  # a last batch of one would upset BatchNorm
            **loader_options(config.workers, config.seed),
        )
        total = 0.0
        for step, (pixels, truth) in enumerate(loader):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(schedule, epoch + (step + 0.5) / len(loader), pd.DataFrame())
            with accelerator.autocast():
                logit = model.slice_head(model.encode(pixels.to(accelerator.device))).squeeze(1)
            loss = binary_cross_entropy_with_logits(logit.float(), truth.to(accelerator.device))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, config.clip_norm)
            optimizer.step()
            total += loss.item()
        losses.append(total / len(loader))
        bar.set_postfix(loss=losses[-1])
    return losses
