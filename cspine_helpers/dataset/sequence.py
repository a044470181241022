"""Packed sequences as torch samples, and their batches, whatever the number of processes and workers."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from cspine_helpers.dataset.augment import Augment, AugmentConfig
from cspine_helpers.files.paths import listing
from cspine_helpers.files.tables import require_columns
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.packed import CHANNELS, open_sequence, sequence_path, slice_truth_array


class SequenceDataset(Dataset[dict[str, Tensor]]):
    """Samples of one split; files are memory-mapped when they are asked for, never held.

    `dataset[epoch, index]` (or `dataset[index]`, epoch 0) is a dict of `sequence` uint8 `(T, 6, H, W)`,
    channels last in memory, `label` float32, `vertebra` int64 (0 for C1 to 6 for C7), `slice_truth` float32
    `(T,)` (NaN where unknown) and `index` int64, its row in `samples`.

    Args:
        samples: StudyInstanceUID, vertebra and label, as `labels.expand` makes them.
        packed_dir: the cohort's `packed` folder.
        slices: T of every sequence.
        size: H and W of every sequence, pixels.
        augment: how sequences are varied; None leaves them as they are.
        seed: an item's variation depends on (seed, epoch, index) alone.
        manifest: table of `packed.read_manifest`, for the slice truth; None: unknown throughout.

    Example:
        >>> dataset = SequenceDataset(cohort.samples["test"], cohort.packed, slices=5, size=32)
        >>> dataset[0]["sequence"].shape
        torch.Size([5, 6, 32, 32])
    """

    def __init__(
        self,
        samples: pd.DataFrame,
        packed_dir: str | Path,
        *,
        slices: int,
        size: int,
        augment: AugmentConfig | None = None,
        seed: int = 0,
        manifest: pd.DataFrame | None = None,
    ) -> None:
        require_columns(samples, (UID, "vertebra", "label"), what="The samples")
        if samples.empty:
            raise ValueError("There are no samples. Pass the studies of a split that has some.")
        self._folder = Path(packed_dir)
        paths = map(sequence_path, repeat(self._folder), samples[UID], samples["vertebra"])
        # One block of bytes: workers would copy a list of paths, page by page, as they count references.
        self._files = np.array([path.name for path in paths], dtype=np.bytes_)  # (N,)
        self.slices, self.size, self.seed = slices, size, seed
        self.labels = samples["label"].to_numpy(dtype=np.float32)  # (N,)
        self.vertebrae = samples["vertebra"].map(VERTEBRAE.index).to_numpy(dtype=np.int64)  # (N,)
        self.slice_truth = _slice_truth(samples, manifest, slices)  # (N, T)
        self._augment = None if augment is None else Augment(augment)

    def __len__(self) -> int:
        return len(self._files)

    def slice_at(self, index: int, position: int, *, epoch: int = 0) -> Tensor:
        """One slice of a sample, varied by a draw of its own: uint8 `(6, H, W)`, channels last in memory."""
        pixels = np.empty((1, self.size, self.size, CHANNELS), np.uint8)
        self._fill(pixels, self._open(index)[position, None], (self.seed, epoch, index, position))
        return torch.from_numpy(pixels[0]).permute(2, 0, 1)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([key]).items()}

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> dict[str, Tensor]:
        """A batch of items, each put straight into its place; `sequence` is `(B, T, 6, H, W)`."""
        pairs = [key if isinstance(key, tuple) else (0, key) for key in keys]
        pixels = batch_memory((len(pairs), self.slices, self.size, self.size, CHANNELS))
        for place, (epoch, index) in zip(pixels.numpy(), pairs, strict=True):
            self._fill(place, self._open(index), (self.seed, epoch, index))
        indices = np.array([index for _, index in pairs])
        return {
            "sequence": pixels.permute(0, 1, 4, 2, 3),
            "label": torch.from_numpy(self.labels[indices]),
            "vertebra": torch.from_numpy(self.vertebrae[indices]),
            "slice_truth": torch.from_numpy(self.slice_truth[indices]),
            "index": torch.from_numpy(indices),
        }

    def _open(self, index: int) -> np.ndarray:
        path = self._folder / self._files[index].decode()
        return open_sequence(path, slices=self.slices, size=self.size)

    def _fill(self, place: np.ndarray, sequence: np.ndarray, seed: tuple[int, ...]) -> None:
        if self._augment is None:
            place[:] = sequence
        else:
            self._augment(sequence, seed=seed, out=place)


def collate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """For `DataLoader(collate_fn=...)`: a `SequenceDataset` hands over whole batches."""
    return batch


def batch_memory(shape: tuple[int, ...]) -> Tensor:
    """Room for uint8 values of a batch: shared with the loader's process where this is one of its workers."""
    if get_worker_info() is None:
        return torch.from_numpy(np.empty(shape, np.uint8))  # in huge pages, which torch would not ask for
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own default_collate does
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def _slice_truth(samples: pd.DataFrame, manifest: pd.DataFrame | None, slices: int) -> np.ndarray:
    if manifest is None:
        return np.full((len(samples), slices), np.nan, dtype=np.float32)
    known = manifest.set_index([UID, "vertebra"])["slice_truth"]
    asked = pd.MultiIndex.from_frame(samples[[UID, "vertebra"]])
    if len(unlisted := asked[~asked.isin(known.index)]):
        names = listing(f"{uid} {vertebra}" for uid, vertebra in unlisted)
        raise ValueError(f"{len(unlisted)} samples are not in the manifest: {names}. Pack the cohort again.")
    return np.stack([slice_truth_array(text, slices) for text in known.reindex(asked)])


Sampling = Literal["shuffle", "balanced", "weighted"]
Key = tuple[int, int]  # epoch and index: what a dataset is asked for


def draw_probabilities(labels: np.ndarray, vertebrae: np.ndarray, sampling: Sampling) -> np.ndarray | None:
    """Probability with which each draw of an epoch takes a sample: `(N,)`; None where each is taken once.

    It is the sample's share of its group, and all groups are as probable: inverse class frequency, as torch's
    `WeightedRandomSampler` is usually given. The groups of "balanced" sampling are fractured and intact
    samples, those of "weighted" sampling fractured and intact ones of each vertebra, fourteen.

    Args:
        labels: `(N,)` of 0/1.
        vertebrae: `(N,)`, 0 for C1 to 6 for C7.
        sampling: see `epoch_order`.

    Raises:
        ValueError: an unknown sampling, or a group without samples; names it.

    Example:
        >>> draw_probabilities(np.array([1, 0, 0, 0]), np.zeros(4, int), "balanced").round(2).tolist()
        [0.5, 0.17, 0.17, 0.17]
    """
    if sampling not in get_args(Sampling):
        raise ValueError(f"sampling is one of {', '.join(get_args(Sampling))}; found {sampling!r}.")
    if sampling == "shuffle":
        return None
    by_vertebra = sampling == "weighted"
    groups = np.asarray(labels).astype(np.int64) + (2 * vertebrae if by_vertebra else 0)
    sizes = np.bincount(groups, minlength=2 * len(VERTEBRAE) if by_vertebra else 2)
    if not sizes.all():
        where = [f" of {name}" for name in VERTEBRAE] if by_vertebra else [""]
        kinds = [f"{kind}{place}" for place in where for kind in ("intact", "fractured")]
        missing = listing((kinds[group] for group in np.flatnonzero(sizes == 0)), quoted=False)
        raise ValueError(
            f"{sampling.capitalize()} sampling needs fractured and intact samples"
            f"{' of every vertebra' if by_vertebra else ''}; found none that are {missing} among "
            f"{len(labels)}. Use sampling='shuffle', or another split."
        )
    return 1 / len(sizes) / sizes[groups]


def epoch_order(
    labels: np.ndarray, vertebrae: np.ndarray, sampling: Sampling, *, seed: int, epoch: int
) -> np.ndarray:
    """Order of the samples in an epoch, drawn from (seed, epoch) alone: `(N,)` indices.

    Args:
        labels: `(N,)` of 0/1.
        vertebrae: `(N,)`, 0 for C1 to 6 for C7.
        sampling: "shuffle" takes each sample once; the others draw N with replacement: "balanced" fractured
            and intact ones equally often, "weighted" fractured and intact ones of each vertebra.
        seed: of the training.
        epoch: in question.

    Raises:
        ValueError: an unknown sampling, or one of `draw_probabilities` that lacks a group.
    """
    rng, total = np.random.default_rng((seed, epoch)), len(labels)
    probabilities = draw_probabilities(labels, vertebrae, sampling)
    return rng.permutation(total) if probabilities is None else rng.choice(total, size=total, p=probabilities)


def steps_of(
    order: np.ndarray, *, batch_size: int, accumulate: int = 1, processes: int = 1
) -> list[list[np.ndarray]]:
    """An epoch's samples in optimiser steps, and each step's in `accumulate · processes` batches, none twice.

    Batches hold at most `batch_size` samples and nearly equally many, and none is empty (where samples do not
    go round, a batch has one more instead).

    Raises:
        ValueError: fewer samples than a step has batches.
    """
    batches = accumulate * processes
    _check_fill(order, accumulate, processes)
    steps = min(math.ceil(len(order) / (batch_size * batches)), len(order) // batches)
    return [np.array_split(step, batches) for step in np.array_split(order, steps)]


def grouped_steps(
    order: np.ndarray, groups: np.ndarray, *, batch_size: int, accumulate: int = 1, processes: int = 1
) -> list[list[np.ndarray]]:
    """As `steps_of`, where the samples of one batch belong to one group, as images of one shape do.

    The number of steps depends on those of samples and groups alone, not on the groups of the samples in
    `order`: every epoch has as many. Batches of the groups take turns as their samples do.

    Args:
        order: `(M,)`, an epoch's samples.
        groups: `(N,)`, the group of each sample there is.
        batch_size: most samples of a batch.
        accumulate: batches of each process whose gradients make one step.
        processes: how many share a step.

    Raises:
        ValueError: fewer samples than a step has batches, or fewer batches than groups.

    Example:
        >>> steps = grouped_steps(np.arange(6), np.array([0, 0, 1, 0, 1, 1]), batch_size=3)
        >>> [batch.tolist() for (batch,) in steps]
        [[0, 1], [3], [2, 4, 5]]
    """
    # 1. How many batches: enough for whatever groups the samples have.
    kinds, batches = len(np.unique(groups)), accumulate * processes
    _check_fill(order, accumulate, processes)
    enough = (len(order) + kinds * (batch_size - 1)) // batch_size
    steps = min(math.ceil(enough / batches), len(order) // batches)
    # 2. One more for the group with the largest batches, until there are as many.
    places = [np.flatnonzero(groups[order] == kind) for kind in np.unique(groups[order])]
    counts = [1] * len(places)
    if len(places) > steps * batches:
        raise ValueError(
            f"{len(order)} samples of {len(places)} groups cannot fill {steps * batches} batches, each of "
            "one group. Use smaller batches, or more samples."
        )
    while sum(counts) < steps * batches:
        counts[max(range(len(places)), key=lambda kind: len(places[kind]) / counts[kind])] += 1
    # 3. Dealt out, and the groups' batches mixed.
    parts = [part for each, count in zip(places, counts, strict=True) for part in np.array_split(each, count)]
    dealt = [order[part] for part in sorted(parts, key=np.mean)]
    return [dealt[i : i + batches] for i in range(0, len(dealt), batches)]


def _check_fill(order: np.ndarray, accumulate: int, processes: int) -> None:
    if len(order) < accumulate * processes:
        raise ValueError(
            f"{len(order)} samples cannot fill the {accumulate * processes} batches of one step "
            f"({accumulate} accumulated on each of {processes} processes). Use fewer processes, or "
            "accumulate less."
        )


class EpochBatches(Sampler[list[Key]]):
    """The batches of one process in one epoch; call `set_epoch` before each pass.

    Args:
        order: epoch → its samples in order.
        batch_size, accumulate, processes: see `steps_of`.
        process: which of the processes this is.
        groups: see `grouped_steps`; None: any samples share a batch.

    Attributes:
        epoch: that is set.
        accumulate: batches of each process whose gradients make one step.
        step_sizes: samples of each step, over all processes.
    """

    def __init__(
        self,
        order: Callable[[int], np.ndarray],
        *,
        batch_size: int,
        accumulate: int = 1,
        process: int = 0,
        processes: int = 1,
        groups: np.ndarray | None = None,
    ) -> None:
        self.accumulate = accumulate
        self._order, self._process, self._processes = order, process, processes
        self._groups = groups
        self._sizes = {"batch_size": batch_size, "accumulate": accumulate, "processes": processes}
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Deal out the samples of this epoch."""
        self.epoch = epoch
        order = self._order(epoch)
        if self._groups is None:
            self._steps = steps_of(order, **self._sizes)
        else:
            self._steps = grouped_steps(order, self._groups, **self._sizes)
        self.step_sizes = [sum(map(len, step)) for step in self._steps]

    def __len__(self) -> int:
        return len(self._steps) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        for step in self._steps:
            for batch in step[self._process :: self._processes]:
                yield [(self.epoch, index) for index in batch.tolist()]


def make_loader(
    dataset: SequenceDataset,
    *,
    batch_size: int,
    sampling: Sampling | None = None,
    workers: int = 0,
    seed: int = 0,
    accumulate: int = 1,
    process: int = 0,
    processes: int = 1,
) -> DataLoader[dict[str, Tensor]]:
    """A loader of a data set's batches, in pinned memory where there is a GPU.

    Args:
        dataset: what is loaded.
        batch_size: most sequences of a batch.
        sampling: order of training samples, see `epoch_order`; call `loader.batch_sampler.set_epoch(n)`
            before pass n, or every pass is the same. None: the order of the data set, the same batches
            whatever the number of processes.
        workers: processes that load, at most one a core of this machine; 0: this one loads. Batches do not
            depend on it.
        seed: of the order.
        accumulate: batches of each process whose gradients make one step.
        process: which of the processes this is.
        processes: how many share the samples.

    Raises:
        ValueError: `batch_size` or `workers` is no number of them, or the order cannot be drawn.

    Example:
        >>> dataset = SequenceDataset(cohort.samples["test"], cohort.packed, slices=5, size=32)
        >>> [len(batch["label"]) for batch in make_loader(dataset, batch_size=4)]
        [4, 3]
    """
    if batch_size < 1 or workers < 0:
        raise ValueError(
            f"A batch holds 1 sequence or more, and 0 workers or more load it; found a batch size of "
            f"{batch_size} and {workers} workers. Correct them."
        )
    if sampling is None:
        chunks = [range(i, min(i + batch_size, len(dataset))) for i in range(0, len(dataset), batch_size)]
        batches: Any = [list(chunk) for chunk in chunks[process::processes]]
    else:
        order = partial(epoch_order, dataset.labels, dataset.vertebrae, sampling, seed=seed)
        batches = EpochBatches(
            lambda epoch: order(epoch=epoch),
            batch_size=batch_size,
            accumulate=accumulate,
            process=process,
            processes=processes,
        )
    return load_batches(dataset, batches, workers=workers, seed=seed, collate_fn=collate)


def batch_contents(
    dataset: SequenceDataset,
    *,
    batch_size: int,
    sampling: Sampling,
    seed: int = 0,
    epoch: int = 1,
    accumulate: int = 1,
) -> pd.DataFrame:
    """What the batches of an epoch teach, without a pixel read; arguments as in `make_loader`.

    The first epoch of a training is 1.

    Returns:
        One row a batch: `sequences`, how many are `fractured`, and of all their slices how many are
        `known_intact`, `known_fractured` and `unknown`.

    Raises:
        ValueError: the order cannot be drawn.

    Example:
        >>> dataset = SequenceDataset(cohort.samples["train"], cohort.packed, slices=5, size=32)
        >>> batch_contents(dataset, batch_size=14, sampling="shuffle")["sequences"].tolist()
        [14, 14]
    """
    order = epoch_order(dataset.labels, dataset.vertebrae, sampling, seed=seed, epoch=epoch)
    steps = steps_of(order, batch_size=batch_size, accumulate=accumulate)
    rows = []
    for batch in (batch for step in steps for batch in step):
        truth = dataset.slice_truth[batch]
        slices = {"known_intact": truth == 0, "known_fractured": truth == 1, "unknown": np.isnan(truth)}
        counts = {name: int(its.sum()) for name, its in slices.items()}
        rows.append({"sequences": len(batch), "fractured": int(dataset.labels[batch].sum()), **counts})
    return pd.DataFrame(rows)


def load_batches(
    dataset: Dataset[Any], batches: Any, *, workers: int, seed: int, **options: Any
) -> DataLoader[Any]:
    """A loader of these batches: processes with one thread each, kept from epoch to epoch."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this machine, which share its cores
    workers = min(workers, max(_cores() // here, 1))
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_one_thread,
        generator=torch.Generator().manual_seed(seed),  # else each pass would draw from torch's global one
        **options,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(0)  # torch does the same for itself; more threads than cores slow each other down
