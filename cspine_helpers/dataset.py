"""Packed sequences as torch samples, and batches of them with channels last in memory."""

import math
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from cspine_helpers.augment import Augment, AugmentConfig
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.manifest import slice_truth_array
from cspine_helpers.packed import CHANNELS, open_sequence, sequence_path
from cspine_helpers.paths import listing
from cspine_helpers.tables import require_columns


class SequenceDataset(Dataset[dict[str, Tensor]]):
    """Samples of one split; files are memory-mapped when they are asked for, never held.

    Asked for with `(epoch, index)`, or with the index alone for epoch 0. An item is a dict of `sequence`
    uint8 `(T, 6, H, W)`, in memory channels last as on disk, `label` float32, `vertebra` int64 (0 for C1 to
    6 for C7), `slice_truth` float32 `(T,)` (NaN where unknown) and `index` int64, its row in `samples`.

    Args:
        samples: StudyInstanceUID, vertebra and label, as `labels.expand` makes them.
        packed_dir: the cohort's `packed` folder.
        slices: T of every sequence.
        size: H and W of every sequence, pixels.
        augment: how sequences are varied; None leaves them as they are.
        seed: the variation of an item depends on (seed, epoch, index) alone, so that it is the same
            whatever the number of workers and the order.
        manifest: table of `manifest.read_manifest`, for the slice truth; None: unknown throughout.
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
            raise ValueError("There are no samples. Hand in the studies of a split that has some.")
        self._folder = Path(packed_dir)
        names = map(sequence_path, repeat(self._folder), samples[UID], samples["vertebra"])
        # One block of bytes: workers would copy a list of paths, page by page, as they count references.
        self._files = np.array([path.name for path in names], dtype=np.bytes_)  # (N,)
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
        pixels = _memory((len(pairs), self.slices, self.size, self.size, CHANNELS))
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


def _memory(shape: tuple[int, ...]) -> Tensor:
    """Room for uint8 values: shared with the loader's process where this is one of its workers."""
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
        raise ValueError(f"{len(unlisted)} samples are not in the manifest: {names}. Pack the cohort anew.")
    return np.stack([slice_truth_array(text, slices) for text in known.reindex(asked)])
