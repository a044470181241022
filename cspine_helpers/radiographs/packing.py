"""Radiographs packed once, as uint8 frames with their masks: written, held against their cohort, read.

`packed/images/<image>.npy` holds a radiograph in the network's frame, portrait or landscape, and
`packed/masks/<image>.npy` where its fractures are (255), for annotated images only. Both open with `np.load`.
`packed/packing.json` says what they were made of, so that files of another table are noticed.
"""

import hashlib
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from cspine_helpers.files.paths import atomic_path, exclusive, inside, listing, sha256_of
from cspine_helpers.files.records import check_settings, read_sealed, setting, whole, write_sealed
from cspine_helpers.radiographs.annotations import rasterise
from cspine_helpers.radiographs.image_table import read_images, read_regions
from cspine_helpers.radiographs.images import Frame, read_radiograph

PACKING_VERSION = 1  # raised by hand when the same images give other arrays
Kind = Literal["images", "masks"]  # folders in `packed`
_AGAIN = "pack the cohort again: pack_images(cohort_folder)"


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
        for name in get_args(Kind):
            rmtree(packed / name, ignore_errors=True)
            (packed / name).mkdir(parents=True)
        write_sealed(packed / "packing.json", record)


def _pack(
    folder: Path, packed: Path, row: Any, polygons: Sequence[np.ndarray], config: ImagePackConfig
) -> None:
    """Write one image, and its mask, unless they are there and whole."""
    target, outline = (_file(packed, kind, row.image) for kind in get_args(Kind))
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


def _file(packed: Path, kind: Kind, image: str) -> Path:
    return packed / kind / f"{image}.npy"


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


def packed_shapes(
    packed: Path, images: Sequence[str], outlined: Sequence[bool], config: ImagePackConfig
) -> np.ndarray:
    """(N, 2) of H, W of each packed image, every file looked at.

    Args:
        packed: the cohort's `packed` folder.
        images: ids, N.
        outlined: N, whether an image has a mask, which then has the image's shape.
        config: the frame.

    Raises:
        ValueError: files are missing or not whole; names the first ten.
    """
    shapes, bad = np.zeros((len(images), 2), np.int64), []
    for index, (image, has_mask) in enumerate(zip(images, outlined, strict=True)):
        try:
            shape = _shape_of(_file(packed, "images", image), config)
            if has_mask and _shape_of(_file(packed, "masks", image), config) != shape:
                shape = None
        except FileNotFoundError:
            bad.append(f"{image} (missing)")
            continue
        if shape is None:
            bad.append(f"{image} (not whole)")
        else:
            shapes[index] = shape
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(shapes)} packed images in {packed} cannot be used: "
            f"{listing(bad, quoted=False)}. Now {_AGAIN}."
        )
    return shapes


def read_packed(packed: Path, kind: Kind, image: str, shape: Iterable[int]) -> np.ndarray:
    """A packed image or mask, uint8, of a shape that `packed_shapes` has found; it cannot be written to.

    Raises:
        ValueError: the file has been cut off since.
    """
    height, width = shape
    path = _file(packed, kind, image)
    with open(path, "rb") as file:
        content = file.read()
    pixels = height * width
    if len(content) <= pixels:
        raise ValueError(f"{path} is not whole any more. Now {_AGAIN}.")
    return np.frombuffer(content, np.uint8, pixels, len(content) - pixels).reshape(height, width)
