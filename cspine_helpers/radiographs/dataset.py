"""Packed radiographs as torch samples, whole or in patches, drawn for epochs and batched by orientation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cspine_helpers.dataset.sequence import EpochBatches, Key, batch_memory, collate, load_batches
from cspine_helpers.files.paths import listing
from cspine_helpers.files.tables import require_columns
from cspine_helpers.radiographs.augment import AS_THEY_ARE, ImageAugment, Variation
from cspine_helpers.radiographs.packing import ImagePackConfig, packed_shapes, read_packed, read_packing


class RadiographDataset(Dataset[dict[str, Tensor]]):
    """Packed radiographs of one split; files are read when they are asked for, never held.

    `dataset[epoch, index]` (or `dataset[index]`, epoch 0) is a dict of `image` uint8 `(H, W)`, `mask` uint8
    `(H / stride, W / stride)`, 255 where a cell is all fracture, `label` float32, `annotated` bool, whether
    the mask is known (of an intact image it is: empty), and `index` int64, its row in `table`.

    Args:
        table: image and label of each radiograph, as `read_images` returns them.
        packed: the cohort's `packed` folder.
        augment: how images are varied; None leaves them as they are.
        seed: an item's variation depends on (seed, epoch, index) alone.
        patch: side of a square that is cut out of each image, pixels, at the image's scale; of a fractured
            one always with a part of a fracture. None: whole images.
        stride: pixels of the image along one of the mask.

    Attributes:
        labels: float32 `(N,)`.
        shapes: int64 `(N, 2)`, H and W of each item.
        annotated: bool `(N,)`.
        weights: float64 `(N,)`, how readily an intact image is drawn for an epoch, see `image_order`; may be
            changed between epochs.
        focus: float32 `(N, 2)`, x, y in the packed image about which an intact image's patch is cut out, such
            as the model's own false mark; NaN: anywhere in the body. May be changed between epochs: it lies
            in memory that loading processes share.

    Raises:
        FileNotFoundError: nothing is packed there.
        ValueError: packed files are missing or not whole, or of other images than the cohort's; the patch
            does not fit; patches are asked for, and fractured images have no outline.

    Example:
        >>> from cspine_helpers.radiographs.image_table import read_images
        >>> from cspine_helpers.radiographs.packing import pack_images
        >>> dataset = RadiographDataset(read_images(radiographs), pack_images(radiographs))
        >>> {name: tuple(value.shape) for name, value in dataset[0].items() if value.ndim}
        {'image': (448, 384), 'mask': (112, 96)}
    """

    def __init__(
        self,
        table: pd.DataFrame,
        packed: str | Path,
        *,
        augment: ImageAugment | None = None,
        seed: int = 0,
        patch: int | None = None,
        stride: int = 4,
    ) -> None:
        require_columns(table, ("image", "label"), what="The images")
        if table.empty:
            raise ValueError("There are no images. Pass those of a split that has some.")
        record, self._folder = read_packing(packed), Path(packed)
        config, annotated = ImagePackConfig(**record["frame"]), set(record["annotated"])
        self.labels = table["label"].to_numpy(dtype=np.float32)
        self.weights = np.ones(len(table))
        self.focus = torch.full((len(table), 2), torch.nan).share_memory_()
        outlined = table["image"].isin(annotated).to_numpy() & (self.labels == 1)
        self.annotated = outlined | (self.labels == 0)
        if stride < 1 or config.short % stride or config.long % stride or (patch or 0) % stride:
            raise ValueError(
                f"The stride of masks divides all sides of an image; found {stride}. Correct it."
            )
        self._check_patch(patch, config, table["image"][~self.annotated])
        # One block of bytes: workers would copy a list of names, page by page, as they count references.
        self._images = np.array(table["image"].tolist(), dtype=np.bytes_)
        self._outlined, self.seed, self.stride, self.patch = outlined, seed, stride, patch
        self._packed_shapes = packed_shapes(self._folder, table["image"].tolist(), outlined.tolist(), config)
        self.shapes = self._packed_shapes if patch is None else np.full((len(table), 2), patch)
        if augment is None and patch is not None:
            augment = AS_THEY_ARE
        self._vary = None if augment is None else Variation(augment)

    @staticmethod
    def _check_patch(patch: int | None, config: ImagePackConfig, unknown: pd.Series) -> None:
        if patch is None:
            return
        if patch % 32 or not 32 <= patch <= config.short:
            raise ValueError(
                f"A patch's side is a multiple of 32 from 32 to {config.short}, the frame's short side; "
                f"found {patch}. Correct it."
            )
        if len(unknown):
            raise ValueError(
                f"{len(unknown)} fractured images have no outline, so that a patch might miss the fracture: "
                f"{listing(unknown)}. Leave them out, or train on whole images (patch=None)."
            )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, key: int | Key) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([key]).items()}

    def __getitems__(self, keys: Sequence[int | Key]) -> dict[str, Tensor]:
        """A batch of items of one orientation; `image` is `(B, H, W)`."""
        pairs = [key if isinstance(key, tuple) else (0, key) for key in keys]
        indices = np.array([index for _, index in pairs])
        shapes = {tuple(shape) for shape in self.shapes[indices].tolist()}
        if len(shapes) > 1:
            raise ValueError("A batch holds images of one orientation: load them with image_loader(...).")
        height, width = shapes.pop()
        images = batch_memory((len(pairs), height, width))
        masks = batch_memory((len(pairs), height // self.stride, width // self.stride))
        for image, mask, (epoch, index) in zip(images.numpy(), masks.numpy(), pairs, strict=True):
            self._fill(image, mask, epoch, index)
        return {
            "image": images,
            "mask": masks,
            "label": torch.from_numpy(self.labels[indices]),
            "annotated": torch.from_numpy(self.annotated[indices]),
            "index": torch.from_numpy(indices),
        }

    def _fill(self, place: np.ndarray, mask_place: np.ndarray, epoch: int, index: int) -> None:
        where = self._images[index].decode(), self._packed_shapes[index]
        image, mask = read_packed(self._folder, "images", *where), None
        if self._outlined[index]:
            mask = read_packed(self._folder, "masks", *where)
        if self._vary is not None:
            focus = self.focus[index].numpy()
            about = None if np.isnan(focus).any() else focus
            image, mask = self._vary(
                image, mask, seed=(self.seed, epoch, index), patch=self.patch, about=about
            )
        place[:] = image
        if mask is None:
            mask_place[:] = 0
        else:
            size = mask_place.shape[::-1]
            cv2.resize(mask, size, dst=mask_place, interpolation=cv2.INTER_AREA)


def intact_images(intact: float, fractured: int, available: int) -> int:
    """Intact images of an epoch: `intact` for each fractured one, at least one, no more than there are.

    Example:
        >>> [intact_images(ratio, 10, 100) for ratio in (0.5, 0.001, 30)]
        [5, 1, 100]
    """
    return min(max(round(intact * fractured), 1), available)


def image_order(
    labels: np.ndarray,
    *,
    intact: float | None = 1.0,
    weights: np.ndarray | None = None,
    seed: int,
    epoch: int,
) -> np.ndarray:
    """Images of an epoch in random order, drawn from (seed, epoch) alone: all fractured, some intact ones.

    Args:
        labels: `(N,)` of 0/1.
        intact: how many intact images for each fractured one, none twice, at least one; None: all images.
        weights: `(N,)`, an intact image is drawn the more readily the larger its own, at 0 never; None: all
            alike.
        seed: of the training.
        epoch: in question.

    Raises:
        ValueError: there are no fractured images, or no intact ones to draw.

    Example:
        >>> sorted(image_order(np.array([1, 0, 0, 1, 0, 0]), intact=0.5, seed=0, epoch=1).tolist())
        [0, 3, 5]
    """
    rng = np.random.default_rng((seed, epoch))
    if intact is None:
        return rng.permutation(len(labels))
    fractured, others = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    chances = np.ones(len(others)) if weights is None else np.asarray(weights, dtype=float)[others]
    wanted = intact_images(intact, len(fractured), int(np.count_nonzero(chances)))
    if not len(fractured) or not wanted:
        raise ValueError(
            f"An epoch needs fractured and intact images; found {len(fractured)} fractured and "
            f"{np.count_nonzero(chances)} intact ones to draw from. Use another split, or intact=None."
        )
    drawn = rng.choice(others, size=wanted, replace=False, p=chances / chances.sum())
    return rng.permutation(np.concatenate([fractured, drawn]))


def image_loader(
    dataset: RadiographDataset,
    *,
    batch_size: int,
    training: bool = False,
    intact: float | None = 1.0,
    workers: int = 0,
    seed: int = 0,
    accumulate: int = 1,
    process: int = 0,
    processes: int = 1,
) -> DataLoader[dict[str, Tensor]]:
    """A loader of batches of one orientation, in pinned memory where there is a GPU.

    Args:
        dataset: what is loaded.
        batch_size: most images of a batch.
        training: epochs drawn as `image_order` says; call `loader.batch_sampler.set_epoch(n)` before pass n.
            False: each image once, portrait ones first, each orientation in the order of the data set.
        intact: see `image_order`.
        workers: processes that load; 0: this one does. Batches do not depend on it.
        seed: of the order.
        accumulate: batches of each process whose gradients make one step.
        process: which of the processes this is.
        processes: how many share the images.

    Raises:
        ValueError: `batch_size` or `workers` is no number of them, or the order cannot be drawn.

    Example:
        >>> from cspine_helpers.radiographs.image_table import read_images
        >>> from cspine_helpers.radiographs.packing import pack_images
        >>> dataset = RadiographDataset(read_images(radiographs), pack_images(radiographs))
        >>> [tuple(batch["image"].shape) for batch in image_loader(dataset, batch_size=16)]
        [(16, 448, 384), (2, 448, 384), (6, 384, 448)]
    """
    if batch_size < 1 or workers < 0:
        raise ValueError(
            f"A batch holds 1 image or more, and 0 workers or more load it; found a batch size of "
            f"{batch_size} and {workers} workers. Correct them."
        )
    landscape = (dataset.shapes[:, 1] > dataset.shapes[:, 0]).astype(np.int64)
    if training:

        def order(epoch: int) -> np.ndarray:
            return image_order(dataset.labels, intact=intact, weights=dataset.weights, seed=seed, epoch=epoch)

        batches: Any = EpochBatches(
            order,
            batch_size=batch_size,
            accumulate=accumulate,
            process=process,
            processes=processes,
            groups=landscape,
        )
    else:
        chunks = []
        for kind in (0, 1):
            rows = np.flatnonzero(landscape == kind).tolist()
            chunks += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        batches = chunks[process::processes]
    return load_batches(dataset, batches, workers=workers, seed=seed, collate_fn=collate)
