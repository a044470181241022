"""Radiographs for training: packed once as uint8 frames, varied with their masks, batched by orientation.

`packed/images/<image>.npy` holds a radiograph in the network's frame, portrait or landscape, and
`packed/masks/<image>.npy` where its fractures are (255), for annotated images only. Both open with `np.load`.
`packed/packing.json` says what they were made of, so that files of another table are noticed.
"""

import hashlib
import io
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from cspine_helpers.dataset.augment import draw
from cspine_helpers.dataset.sequence import EpochBatches, Key, batch_memory, collate, load_batches
from cspine_helpers.files.paths import atomic_path, exclusive, inside, listing, sha256_of
from cspine_helpers.files.records import check_settings, read_sealed, setting, whole, within, write_sealed
from cspine_helpers.files.tables import require_columns
from cspine_helpers.radiographs.annotations import rasterise
from cspine_helpers.radiographs.images import Frame, read_radiograph
from cspine_helpers.radiographs.sources import read_images, read_regions

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import asks the network for a newer version
import albumentations as A

PACKING_VERSION = 1  # raised by hand when the same images give other arrays
_AGAIN = "pack the cohort again: pack_images(cohort_folder)"
_SHARE, _ANY = within("[0, 1]"), within("[0, inf)")


# 1. Packing.


@dataclass(frozen=True)
class ImagePackConfig:
    """The frame in which radiographs are packed, portrait or landscape by their own shape.

    Attributes:
        long, short: its sides, pixels, multiples of 32.
    """

    long: int = setting(448, whole(32, 4096))
    short: int = setting(384, whole(32, 4096))

    def __post_init__(self) -> None:
        check_settings(self)
        if self.long < self.short or self.long % 32 or self.short % 32:
            raise ValueError(
                f"A frame's sides are multiples of 32, long not below short; found long {self.long}, short "
                f"{self.short}. Correct them."
            )

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(H, W) of the portrait and of the landscape frame."""
        return (self.long, self.short), (self.short, self.long)


def pack_images(
    cohort_folder: str | Path, config: ImagePackConfig | None = None, *, workers: int = 0
) -> Path:
    """Bring every radiograph of a cohort into its frame and write it to `packed/`, masks beside them.

    What an earlier, interrupted call has written of the same images stays; of other images, annotations or
    another frame it is removed.

    Args:
        cohort_folder: with `images.csv` and `annotations.json`.
        config: the frame; None: 448 × 384 pixels.
        workers: threads; 0: one a core.

    Returns:
        The folder `packed`.

    Raises:
        ValueError: images cannot be read or are not as `images.csv` says; names the first ten and why. The
            others are packed.
        FileExistsError: `packed/` holds what was not written here.
        BlockingIOError: another process packs this cohort.

    Example:
        >>> sorted(path.name for path in pack_images(radiographs).iterdir())
        ['images', 'masks', 'packing.json']
    """
    # 1. What is to be packed, and what is there of it.
    folder, config = Path(cohort_folder), config or ImagePackConfig()
    table, regions = read_images(folder), read_regions(folder)
    packed = inside(folder / "packed")
    if workers < 0:
        raise ValueError(f"workers is a number of threads, 0 for one a core; found {workers}. Correct it.")
    with exclusive(folder / ".packing.lock", f"packing {folder.name}"):
        _begin(packed, _record(folder, table, config) | {"annotated": sorted(filter(regions.get, regions))})

        # 2. Pack the rest; decoders let go of Python's lock, so that threads suffice.
        def pack(row: Any) -> str | None:
            try:
                _pack(folder, packed, row, regions.get(row.image, ()), config)
            except (OSError, ValueError) as error:
                return f"{row.image} ({error})"
            return None

        with ThreadPoolExecutor(workers or os.cpu_count()) as threads:
            done = threads.map(pack, table.itertuples())
            bar = tqdm(done, total=len(table), desc=f"packing {folder.name}", unit="image", mininterval=1)
            bad = [reason for reason in bar if reason]
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(table)} images cannot be packed: "
            f"{listing(bad, separator='; ', quoted=False)}. Restore the files, or make the cohort again "
            "without them, then pack it again."
        )
    return packed


def _record(folder: Path, table: pd.DataFrame, config: ImagePackConfig) -> dict[str, Any]:
    """What the packed arrays depend on."""
    pixels = table[["image", "sha256", "height", "width"]].sort_values("image").to_csv(index=False)
    return {
        "format": 1,
        "packing": PACKING_VERSION,
        "frame": asdict(config),
        "images_sha256": hashlib.sha256(pixels.encode()).hexdigest(),
        "annotations_sha256": sha256_of(folder / "annotations.json"),
    }


def _begin(packed: Path, record: Mapping[str, Any]) -> None:
    """Make the folder; remove what was packed of other images, or differently."""
    if packed.is_dir() and any(packed.glob("[!.]*")) and not (packed / "packing.json").is_file():
        raise FileExistsError(f"{packed} holds what was not packed here. Move it aside, then pack again.")
    try:
        found = _read_record(packed)
    except (FileNotFoundError, ValueError):
        found = {}
    if any(found.get(key) != value for key, value in record.items()):
        (packed / "packing.json").unlink(missing_ok=True)
        for name in ("images", "masks"):
            rmtree(packed / name, ignore_errors=True)
            (packed / name).mkdir(parents=True)
        write_sealed(packed / "packing.json", record)


def _pack(
    folder: Path, packed: Path, row: Any, polygons: Sequence[np.ndarray], config: ImagePackConfig
) -> None:
    """Write one image, and its mask, unless they are there and whole."""
    target, outline = (packed / kind / f"{row.image}.npy" for kind in ("images", "masks"))
    wanted = (target, outline) if polygons else (target,)
    if all(path.is_file() and _shape_of(path, config) for path in wanted):
        return
    image = read_radiograph(folder / row.file)
    if image.shape != (row.height, row.width):
        raise ValueError(
            f"it has {image.shape[0]} × {image.shape[1]} pixels, images.csv says {row.height} × {row.width}"
        )
    frame = Frame.of(*image.shape, long=config.long, short=config.short)
    pixels = frame.pixels(image)
    if polygons:
        mask = 255 * rasterise([frame.points(polygon) for polygon in polygons], *pixels.shape)
        if not mask.any():
            raise ValueError("its outlines lie beside the image")
        _write(outline, mask)
    _write(target, pixels)


def _write(path: Path, pixels: np.ndarray) -> None:
    with atomic_path(path, durable=False) as temporary, open(temporary, "wb") as file:
        file.write(_header(pixels.shape) + np.ascontiguousarray(pixels, np.uint8).tobytes())


def _header(shape: tuple[int, ...]) -> bytes:
    """What a `.npy` file of uint8 in this shape begins with."""
    text = io.BytesIO()
    content = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(text, content)
    return text.getvalue()


def _shape_of(path: Path, config: ImagePackConfig) -> tuple[int, int] | None:
    """(H, W) of a packed file, by its header and size; None where it is no whole one."""
    with open(path, "rb") as file:
        for shape in config.shapes:
            header = _header(shape)
            file.seek(0)
            whole_size = len(header) + math.prod(shape)
            if file.read(len(header)) == header and os.fstat(file.fileno()).st_size == whole_size:
                return shape
    return None


def _read_record(packed: Path) -> dict[str, Any]:
    return read_sealed(
        packed / "packing.json",
        version=1,
        missing=f"No packed radiographs at {packed}. First {_AGAIN}.",
        again=_AGAIN,
        writer="pack_images",
    )


def read_packing(packed: str | Path) -> dict[str, Any]:
    """`packing.json` of packed radiographs, held against the cohort that they lie in.

    Args:
        packed: the cohort's `packed` folder.

    Raises:
        FileNotFoundError: nothing is packed there.
        ValueError: it was packed of other images or annotations than the cohort's, or by another version.

    Example:
        >>> read_packing(pack_images(radiographs))["frame"]
        {'long': 448, 'short': 384}
    """
    packed = Path(packed)
    record = _read_record(packed)
    wanted = _record(packed.parent, read_images(packed.parent), ImagePackConfig(**record["frame"]))
    words = {
        "packing": "by another version of the package",
        "images_sha256": "of other images than images.csv lists",
        "annotations_sha256": "with other outlines than annotations.json holds",
    }
    if stale := [text for key, text in words.items() if record.get(key) != wanted[key]]:
        raise ValueError(f"{packed} was packed {' and '.join(stale)}. Now {_AGAIN}.")
    return record


# 2. Variation.


@dataclass(frozen=True)
class ImageAugment:
    """How radiographs are varied in training; probabilities are per image, 0 turns a step off.

    Attributes:
        flip: probability of exchanging left and right.
        vertical_flip: probability of exchanging top and bottom.
        affine: probability of rotating, scaling and shifting.
        rotate_degrees: largest rotation to either side.
        shrink: most that the size is reduced: to e^−shrink.
        enlarge: most that the size grows: to e^enlarge.
        shift: largest shift, share of the image's side.
        gamma: probability of a gamma curve.
        gamma_limit: its exponent is at most e^gamma_limit, at least e^−gamma_limit.
        contrast: probability of changing brightness and contrast.
        contrast_limit: largest relative change of either.
        noise: probability of Gaussian noise.
        noise_std: largest standard deviation of the noise, share of the intensity range.
        blur: probability of Gaussian blur.
        blur_std: largest standard deviation of the blur, pixels.
    """

    flip: float = setting(0.5, _SHARE)
    vertical_flip: float = setting(0.5, _SHARE)
    affine: float = setting(0.9, _SHARE)
    rotate_degrees: float = setting(25.0, within("[0, 180]"))
    shrink: float = setting(0.2, within("[0, 2]"))
    enlarge: float = setting(0.25, within("[0, 2]"))
    shift: float = setting(0.06, _SHARE)
    gamma: float = setting(0.5, _SHARE)
    gamma_limit: float = setting(0.3, within("[0, 2]"))
    contrast: float = setting(0.5, _SHARE)
    contrast_limit: float = setting(0.2, _SHARE)
    noise: float = setting(0.2, _SHARE)
    noise_std: float = setting(0.03, _SHARE)
    blur: float = setting(0.15, _SHARE)
    blur_std: float = setting(1.2, within("[0.1, 10]"))

    def __post_init__(self) -> None:
        check_settings(self)


AS_THEY_ARE = ImageAugment(flip=0, vertical_flip=0, affine=0, gamma=0, contrast=0, noise=0, blur=0)


class Variation:
    """One random variation of an image, its mask moved along.

    albumentations draws; what it drew is applied to uint8 by OpenCV: flips, affine and the cut-out of a patch
    in one interpolation, gamma, brightness and contrast in one table.
    """

    def __init__(self, config: ImageAugment) -> None:
        c = config
        limits = (-c.contrast_limit, c.contrast_limit)
        self._compose = A.Compose(
            [
                _Flip(p=c.flip),
                _VerticalFlip(p=c.vertical_flip),
                _Affine(
                    rotate=(-c.rotate_degrees, c.rotate_degrees),
                    scale=(math.exp(-c.shrink), math.exp(c.enlarge)),
                    translate_percent=(-c.shift, c.shift),
                    keep_ratio=True,
                    p=c.affine,
                ),
                _Gamma((100 * math.exp(-c.gamma_limit), 100 * math.exp(c.gamma_limit)), p=c.gamma),
                _Contrast(limits, limits, p=c.contrast),
                _Blur(0, (0.1, c.blur_std), p=c.blur),
                _Noise(std_range=(0, c.noise_std), p=c.noise),
            ]
        )

    def __call__(
        self,
        image: np.ndarray,
        mask: np.ndarray | None,
        *,
        seed: tuple[int, ...],
        patch: int | None = None,
        about: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The image, uint8 (H, W), and its mask, varied; with `patch`, a square of that side cut out of them.

        The same seed gives the same variation. Whatever is drawn, a part of the mask stays inside. A patch
        keeps the image's scale and holds a pixel of the mask; where there is none, the one at x, y `about`,
        or one of the body.
        """
        # 1. Draw.
        shape = image.shape if patch is None else (patch, patch)
        drawn = draw(self._compose, seed, image=image if patch is None else np.zeros(shape, np.uint8))
        rng = np.random.default_rng((*seed, 1))

        # 2. Move.
        begin, move = np.eye(3), np.eye(3)
        if patch is not None:
            pixel = _pixel(image, rng, about) if mask is None else _inside(mask, rng)
            begin[:2, 2] = -_corner(pixel, image.shape, rng, patch)
            move = begin
        for step in drawn:
            move = step.matrix(shape) @ move
        if patch is not None:
            move = _keeping(pixel, begin, move, shape)
        if patch is not None or not np.array_equal(move, np.eye(3)):
            size = (shape[1], shape[0])
            if mask is not None:
                moved = cv2.warpAffine(mask, move[:2], size)
                if not cv2.countNonZero(moved):  # moved out of a whole image
                    move = _keeping(_inside(mask, rng), begin, move, shape)
                    moved = cv2.warpAffine(mask, move[:2], size)
                mask = moved
            image = cv2.warpAffine(image, move[:2], size)

        # 3. Change the grey levels.
        levels = np.arange(256, dtype=np.float32)
        for step in drawn:
            levels = step.levels(levels)
        table = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
        if table[0] or (np.diff(table.astype(int)) != 1).any():
            image = cv2.LUT(image, table)
        for step in drawn:
            image = step.filter(image)
        return image, mask


class _Drawn:
    """A step that only draws when `Compose` calls it, and says what it drew."""

    params: dict[str, Any]

    def apply(self, img: np.ndarray, **_: Any) -> np.ndarray:
        return img

    def matrix(self, shape: tuple[int, int]) -> np.ndarray:
        """Where pixels go, (3, 3)."""
        return np.eye(3)

    def levels(self, levels: np.ndarray) -> np.ndarray:
        """What becomes of grey levels, 0 to 255."""
        return levels

    def filter(self, image: np.ndarray) -> np.ndarray:
        """What becomes of pixels and their neighbours."""
        return image


class _Flip(_Drawn, A.HorizontalFlip):
    def matrix(self, shape: tuple[int, int]) -> np.ndarray:
        return np.array([[-1, 0, shape[1] - 1], [0, 1, 0], [0, 0, 1.0]])


class _VerticalFlip(_Drawn, A.VerticalFlip):
    def matrix(self, shape: tuple[int, int]) -> np.ndarray:
        return np.array([[1, 0, 0], [0, -1, shape[0] - 1], [0, 0, 1.0]])


class _Affine(_Drawn, A.Affine):
    def matrix(self, shape: tuple[int, int]) -> np.ndarray:
        return self.params["matrix"]


class _Gamma(_Drawn, A.RandomGamma):
    def levels(self, levels: np.ndarray) -> np.ndarray:
        return 255 * (levels / 255) ** self.params["gamma"]


class _Contrast(_Drawn, A.RandomBrightnessContrast):
    def levels(self, levels: np.ndarray) -> np.ndarray:
        return np.clip(self.params["alpha"] * levels + self.params["beta"], 0, 255)


class _Blur(_Drawn, A.GaussianBlur):
    def filter(self, image: np.ndarray) -> np.ndarray:
        kernel = self.params["kernel"]
        return cv2.sepFilter2D(image, -1, kernel, kernel)


class _Noise(_Drawn, A.GaussNoise):
    def filter(self, image: np.ndarray) -> np.ndarray:
        return cv2.add(image, self.params["noise_map"], dtype=cv2.CV_8U)


def _inside(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """x, y of any pixel of the mask."""
    pixels = np.flatnonzero(mask)
    row, column = divmod(int(pixels[rng.integers(len(pixels))]), mask.shape[1])
    return np.array([column, row])


def _pixel(image: np.ndarray, rng: np.random.Generator, about: np.ndarray | None) -> np.ndarray:
    """x, y about which to cut out; where it is not given, any of the body: what Otsu's threshold is below."""
    if about is not None:
        return np.clip(np.rint(about).astype(int), 0, np.array(image.shape[::-1]) - 1)
    small = cv2.resize(image, None, fx=1 / 8, fy=1 / 8, interpolation=cv2.INTER_AREA)
    _, body = cv2.threshold(small, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    return 8 * _inside(body if body.any() else np.ones_like(body), rng) + 4


def _corner(pixel: np.ndarray, shape: tuple[int, ...], rng: np.random.Generator, side: int) -> np.ndarray:
    """x, y of the upper left corner of a square in the image that holds this pixel, not at its very edge."""
    edge = side // 8
    return np.clip(pixel - rng.integers(edge, side - edge, size=2), 0, np.array(shape[::-1]) - side)


def _keeping(pixel: np.ndarray, begin: np.ndarray, move: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The movement, with a further shift where the pixel would come to lie at an edge, or beyond it.

    An edge is an eighth of the side, or as narrow as the pixel's distance was to `begin` with.
    """
    last = np.array(shape[::-1]) - 1
    was, place = (matrix @ [*pixel, 1] for matrix in (begin, move))
    edge = np.minimum(np.minimum(was[:2], last - was[:2]), min(shape) // 8)
    kept = move.copy()
    kept[:2, 2] += np.clip(place[:2], edge, last - edge) - place[:2]
    return kept


# 3. Data set.


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
        self._names = np.array([f"{image}.npy" for image in table["image"]], dtype=np.bytes_)
        self._outlined, self.seed, self.stride, self.patch = outlined, seed, stride, patch
        self._packed_shapes = self._checked_shapes(config)
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

    def _checked_shapes(self, config: ImagePackConfig) -> np.ndarray:
        """(N, 2) of H, W of each packed image, every file looked at."""
        shapes, bad = np.zeros((len(self._names), 2), np.int64), []
        for index, name in enumerate(self._names):
            try:
                shape = _shape_of(self._path("images", name), config)
                if self._outlined[index] and _shape_of(self._path("masks", name), config) != shape:
                    shape = None
            except FileNotFoundError:
                bad.append(f"{name.decode().removesuffix('.npy')} (missing)")
                continue
            if shape is None:
                bad.append(f"{name.decode().removesuffix('.npy')} (not whole)")
            else:
                shapes[index] = shape
        if bad:
            raise ValueError(
                f"{len(bad)} of {len(shapes)} packed images in {self._folder} cannot be used: "
                f"{listing(bad, quoted=False)}. Now {_AGAIN}."
            )
        return shapes

    def _path(self, kind: str, name: bytes) -> Path:
        return self._folder / kind / name.decode()

    def __len__(self) -> int:
        return len(self._names)

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
        image, mask = self._read("images", index), None
        if self._outlined[index]:
            mask = self._read("masks", index)
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

    def _read(self, kind: str, index: int) -> np.ndarray:
        height, width = self._packed_shapes[index]
        path = self._path(kind, self._names[index])
        with open(path, "rb") as file:
            content = file.read()
        pixels = height * width
        if len(content) <= pixels:
            raise ValueError(f"{path} is not whole any more. Now {_AGAIN}.")
        return np.frombuffer(content, np.uint8, pixels, len(content) - pixels).reshape(height, width)


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
        intact: how many intact images for each fractured one, none twice; None: all images.
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
    wanted = min(round(intact * len(fractured)), int(np.count_nonzero(chances)))
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
