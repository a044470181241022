"""Packed sequences as torch samples, augmented with one draw for a whole sequence, and their loaders."""

import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from cspine_helpers.labels import UID, VERTEBRAE, require_columns
from cspine_helpers.packed import MASK, open_sequence, sequence_path, slice_truth_array
from cspine_helpers.paths import listing

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network for its newest version
import albumentations as A


@dataclass(frozen=True)
class AugmentConfig:
    """How sequences are varied in training; probabilities are per sequence, 0 turns a step off.

    Attributes:
        flip: probability of exchanging left and right.
        affine: probability of rotating, scaling and shifting.
        rotate_degrees: largest rotation to either side.
        scale: largest relative change of size.
        shift: largest shift, share of the image's side.
        contrast: probability of changing brightness and contrast.
        contrast_limit: largest relative change of either.
        noise: probability of Gaussian noise.
        noise_std: largest standard deviation of the noise, share of the intensity range.
        dropout: probability of blackening holes in the intensities (the mask stays).
        holes: most holes.
        hole_size: largest side of a hole, share of the image's side.
    """

    flip: float = 0.5
    affine: float = 0.7
    rotate_degrees: float = 10.0
    scale: float = 0.1
    shift: float = 0.05
    contrast: float = 0.5
    contrast_limit: float = 0.15
    noise: float = 0.2
    noise_std: float = 0.04
    dropout: float = 0.1
    holes: int = 3
    hole_size: float = 0.12

    def __post_init__(self) -> None:
        shares = ("flip", "affine", "scale", "shift", "contrast", "contrast_limit", "noise", "noise_std")
        wrong = [
            f"{name} = {getattr(self, name)!r} (in [0, 1])"
            for name in (*shares, "dropout", "hole_size")
            if not 0 <= getattr(self, name) <= 1
        ]
        if not 0 <= self.rotate_degrees <= 180:
            wrong.append(f"rotate_degrees = {self.rotate_degrees!r} (in [0, 180])")
        if self.holes < 1:
            wrong.append(f"holes = {self.holes!r} (1 or more)")
        if wrong:
            raise ValueError(f"AugmentConfig cannot have {'; '.join(wrong)}. Correct them.")


class Augment:
    """One random variation of a sequence: the same draw for all slices and channels, the mask moved along."""

    def __init__(self, config: AugmentConfig) -> None:
        c = config
        size = (c.hole_size / 2, c.hole_size)
        self._compose = A.Compose(
            [
                A.HorizontalFlip(p=c.flip),
                A.Affine(
                    rotate=(-c.rotate_degrees, c.rotate_degrees),
                    scale=(1 - c.scale, 1 + c.scale),
                    translate_percent=(-c.shift, c.shift),
                    keep_ratio=True,
                    p=c.affine,
                ),
                A.RandomBrightnessContrast(
                    (-c.contrast_limit, c.contrast_limit), (-c.contrast_limit, c.contrast_limit), p=c.contrast
                ),
                A.GaussNoise(std_range=(0, c.noise_std), p=c.noise),
                A.CoarseDropout((1, c.holes), size, size, p=c.dropout),
            ]
        )

    def __call__(self, sequence: np.ndarray, *, seed: tuple[int, ...]) -> np.ndarray:
        """Vary a uint8 `(T, H, W, 6)` sequence; the same seed gives the same variation.

        All steps draw from one stream: `Compose(seed=...)` would hand the same seed to each of them, and
        every flipped sequence would also be the noisy one.
        """
        words = np.random.SeedSequence(seed).generate_state(2, np.uint64)
        self._compose.set_random_state(np.random.default_rng(words[0]), random.Random(int(words[1])))
        varied = self._compose(
            images=np.ascontiguousarray(sequence[..., :MASK]),  # (T, H, W, 5)
            masks=np.ascontiguousarray(sequence[..., MASK]),  # (T, H, W)
        )
        return np.concatenate([varied["images"], varied["masks"][..., None]], axis=-1)


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
        manifest: table of `packed.read_manifest`, for the slice truth; None: unknown throughout.
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
        self._paths = [
            sequence_path(packed_dir, uid, vertebra)
            for uid, vertebra in zip(samples[UID], samples["vertebra"], strict=True)
        ]
        self.slices, self.size, self.seed = slices, size, seed
        self.labels = samples["label"].to_numpy(dtype=np.float32)  # (N,)
        self.vertebrae = samples["vertebra"].map(VERTEBRAE.index).to_numpy(dtype=np.int64)  # (N,)
        self.slice_truth = _slice_truth(samples, manifest, slices)  # (N, T)
        self._augment = None if augment is None else Augment(augment)

    def __len__(self) -> int:
        return len(self._paths)

    def slice_at(self, index: int, position: int, *, epoch: int = 0) -> Tensor:
        """One slice of a sample, varied by a draw of its own: uint8 `(6, H, W)`, channels last in memory."""
        sequence = self._open(index)[position, None]  # (1, H, W, 6)
        return self._varied(sequence, (self.seed, epoch, index, position))[0]

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return {
            "sequence": self._varied(self._open(index), (self.seed, epoch, index)),
            "label": torch.tensor(self.labels[index]),
            "vertebra": torch.tensor(self.vertebrae[index]),
            "slice_truth": torch.from_numpy(self.slice_truth[index]),
            "index": torch.tensor(index),
        }

    def _open(self, index: int) -> np.ndarray:
        return open_sequence(self._paths[index], slices=self.slices, size=self.size)

    def _varied(self, sequence: np.ndarray, seed: tuple[int, ...]) -> Tensor:
        varied = np.array(sequence) if self._augment is None else self._augment(sequence, seed=seed)
        return torch.from_numpy(varied).permute(0, 3, 1, 2)  # (T, 6, H, W)


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One batch of a dataset's items; `sequence` is `(B, T, 6, H, W)`, in memory channels last as on disk."""
    as_on_disk = [{**item, "sequence": item["sequence"].permute(0, 2, 3, 1)} for item in items]
    batch: dict[str, Tensor] = default_collate(as_on_disk)  # in a worker, straight into shared memory
    return {**batch, "sequence": batch["sequence"].permute(0, 1, 4, 2, 3)}


def _slice_truth(samples: pd.DataFrame, manifest: pd.DataFrame | None, slices: int) -> np.ndarray:
    if manifest is None:
        return np.full((len(samples), slices), np.nan, dtype=np.float32)
    known = manifest.set_index([UID, "vertebra"])["slice_truth"]
    asked = pd.MultiIndex.from_frame(samples[[UID, "vertebra"]])
    if len(unlisted := asked[~asked.isin(known.index)]):
        names = listing(f"{uid} {vertebra}" for uid, vertebra in unlisted)
        raise ValueError(f"{len(unlisted)} samples are not in the manifest: {names}. Pack the cohort anew.")
    return np.stack([slice_truth_array(text, slices) for text in known.reindex(asked)])
