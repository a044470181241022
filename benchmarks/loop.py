"""The training loop with its loader against the same steps on one batch held in memory."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from benchmarks.measure import Row, interleaved, ratio, spread
from cspine_helpers.dataset.sequence import SequenceDataset, make_loader
from cspine_helpers.labels import UID, VERTEBRAE, expand
from cspine_helpers.model.classifier import FractureClassifier, ModelConfig
from cspine_helpers.packed import write_sequence
from cspine_helpers.phantom.cohort import CohortConfig, draw_labels
from cspine_helpers.training.config import TrainConfig, adamw
from cspine_helpers.training.losses import Loss
from cspine_helpers.training.trainer import train_epoch

CUDA = torch.cuda.is_available()


class Held:
    """The loader's batches without loading: the same batch again and again."""

    def __init__(self, loader: torch.utils.data.DataLoader) -> None:
        self.batch_sampler = loader.batch_sampler
        self._batch = next(iter(loader))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        sizes = self.batch_sampler.step_sizes
        return ({name: tensor[:size] for name, tensor in self._batch.items()} for size in sizes)


def sequences(folder: Path, config: ModelConfig, studies: int) -> SequenceDataset:
    """Noisy sequences of a few studies, augmented as in training."""
    rng, labels = np.random.default_rng(0), draw_labels(CohortConfig(studies=studies, seed=0))
    samples = expand(labels, labels[UID].tolist())
    for uid in labels[UID]:
        for vertebra in VERTEBRAE:
            shape = (config.slices, config.size, config.size, 6)
            array = rng.integers(0, 256, shape, dtype=np.uint8)
            array[..., 5] = 0
            array[:, 8:24, 8:24, 5] = 255
            write_sequence(folder, uid, vertebra, array)
    augment = TrainConfig().augment
    return SequenceDataset(samples, folder, slices=config.slices, size=config.size, augment=augment)


def rows() -> Iterator[Row]:
    """An epoch with loading against an epoch without, through `trainer.train_epoch`."""
    config, settings = (ModelConfig(), TrainConfig()) if CUDA else (ModelConfig.small(), TrainConfig.small())
    with tempfile.TemporaryDirectory() as folder:
        data = sequences(Path(folder), config, studies=80 if CUDA else 8)
        torch.manual_seed(0)
        accelerator = Accelerator(mixed_precision="bf16" if CUDA else "no")
        network = FractureClassifier(config)
        network, optimizer = accelerator.prepare(network, adamw(network, 1e-4, 0.02))
        loss = Loss(alpha=0.9, slice_alpha=0.5, slice_weight=1.0, vertebra_weights=(1.0,) * 7)
        workers = settings.workers
        loader = make_loader(data, batch_size=settings.batch_size, sampling="shuffle", workers=workers)

        def epoch(source: object) -> None:
            sizes = loader.batch_sampler.step_sizes
            train_epoch(
                accelerator,
                network,
                optimizer,
                source,
                lambda net, batch: loss(net(batch["sequence"], batch["vertebra"]), batch),
                rates=[1e-4] * len(sizes),
                clip_norm=1.0,
                seed=(0,),
            )

        held = Held(loader)
        times = interleaved({"loaded": lambda: epoch(loader), "held": lambda: epoch(held)}, repeats=9)
    share = ratio(times["held"], times["loaded"])
    target = 0.97 if CUDA else 0.90
    yield Row(
        f"training loop with its loader, {'RSNA-size' if CUDA else 'built-in'} model, {workers} workers",
        "the same steps on one batch held in memory",
        f"{spread(share)} of its throughput",
        f"≥ {target:.2f}",
        share[0] >= target,
    )
