"""Packed sequences as torch samples, augmented with one draw for a whole sequence, and batches of them."""

import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from cspine_helpers.labels import UID, VERTEBRAE, require_columns
from cspine_helpers.packed import CHANNELS, MASK, open_sequence, sequence_path, slice_truth_array
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
    """One random variation of a sequence: the same draw for all slices and channels, the mask moved along.

    albumentations draws for the whole sequence. What it drew is then applied slice by slice, every step in
    turn while the slice lies in the processor's cache.
    """

    def __init__(self, config: AugmentConfig) -> None:
        c = config
        size = (c.hole_size / 2, c.hole_size)
        self._compose = A.Compose(
            [
                _Flip(p=c.flip),
                _Affine(
                    rotate=(-c.rotate_degrees, c.rotate_degrees),
                    scale=(1 - c.scale, 1 + c.scale),
                    translate_percent=(-c.shift, c.shift),
                    keep_ratio=True,
                    p=c.affine,
                ),
                _Contrast(
                    (-c.contrast_limit, c.contrast_limit), (-c.contrast_limit, c.contrast_limit), p=c.contrast
                ),
                _Noise(std_range=(0, c.noise_std), p=c.noise),
                _Dropout((1, c.holes), size, size, p=c.dropout),
            ]
        )

    def __call__(
        self, sequence: np.ndarray, *, seed: tuple[int, ...], out: np.ndarray | None = None
    ) -> np.ndarray:
        """Vary a uint8 `(T, H, W, 6)` sequence into `out`, or a new array; same seed, same variation.

        All steps draw from one stream: `Compose(seed=...)` would hand the same seed to each of them, and
        every flipped sequence would also be the noisy one.
        """
        words = np.random.SeedSequence(seed).generate_state(2, np.uint64)
        self._compose.set_random_state(np.random.default_rng(words[0]), random.Random(int(words[1])))
        self._compose(images=sequence)
        drawn = [step for step in self._compose.transforms if step.params]
        out = np.empty(sequence.shape, np.uint8) if out is None else out
        for image, place in zip(np.asarray(sequence), out, strict=True):
            for step in drawn:
                image = step.apply(image, **step.params)
            place[:] = image
        return out


class _Drawn:
    """A step that only draws when `Compose` calls it; `apply` takes and gives a slice of 6 channels."""

    def apply_to_images(self, images: np.ndarray, **_: Any) -> np.ndarray:
        return images


class _Flip(_Drawn, A.HorizontalFlip):
    def apply(self, img: np.ndarray, **_: Any) -> np.ndarray:
        return cv2.flip(img.view(np.uint16), 1).view(np.uint8)  # as three words a pixel, which is faster


class _Affine(_Drawn, A.Affine):
    # OpenCV has a fast way for 4 channels and none for 6, so a pixel goes as its first and its last four.
    _PIXEL = np.dtype({"names": ["first", "last"], "formats": ["V4"] * 2, "offsets": [0, 2], "itemsize": 6})

    def apply(self, img: np.ndarray, matrix: np.ndarray, **_: Any) -> np.ndarray:
        height, width, _channels = img.shape
        moved = np.empty_like(img)
        source, target = (image.reshape(height, -1).view(self._PIXEL) for image in (img, moved))  # (H, W)
        for four in ("first", "last"):
            part = np.ascontiguousarray(source[four]).view(np.uint8).reshape(height, width, 4)
            target[four] = cv2.warpAffine(part, matrix[:2], (width, height)).view("V4")[..., 0]
        mask = cv2.extractChannel(moved, MASK)  # interpolated, so its outline is made sharp again
        return cv2.insertChannel(cv2.threshold(mask, 127, 255, cv2.THRESH_BINARY)[1], moved, MASK)


class _Contrast(_Drawn, A.RandomBrightnessContrast):
    def apply(self, img: np.ndarray, alpha: float, beta: float, **_: Any) -> np.ndarray:
        rows = img.reshape(len(img), -1)
        varied = cv2.addWeighted(rows, alpha, rows, 0, beta).reshape(img.shape)
        varied[..., MASK] = img[..., MASK]
        return varied


class _Noise(_Drawn, A.GaussNoise):
    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        noise = super().get_params_dependent_on_data(params, data)["noise_map"]
        noise[..., MASK] = 0
        brighter, darker = (np.rint(np.maximum(part, 0)).astype(np.uint8) for part in (noise, -noise))
        return {"brighter": brighter, "darker": darker}

    def apply(self, img: np.ndarray, brighter: np.ndarray, darker: np.ndarray, **_: Any) -> np.ndarray:
        return cv2.subtract(cv2.add(img, brighter), darker)


class _Dropout(_Drawn, A.CoarseDropout):
    def apply(self, img: np.ndarray, holes: np.ndarray, **_: Any) -> np.ndarray:
        varied = img.copy()
        for left, top, right, bottom in holes:
            varied[top:bottom, left:right, :MASK] = 0
        return varied


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
