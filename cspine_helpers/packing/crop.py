"""From a CT volume with a vertebra label map to packed sequences, without files.

Nothing is resampled along Z: each position of a sequence is a native slice. Volumes are in the frame of
`ct.volume`. The HU window is `PackConfig.window_hu`, and only there.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np

from cspine_helpers.ct.volume import Box, bounding_box
from cspine_helpers.files.records import config_of
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.packed import MANIFEST_COLUMNS, PackedVertebra, slice_positions
from cspine_helpers.runs import packing_settings


@dataclass(frozen=True)
class PackConfig:
    """How one vertebra is cut out of its CT.

    Attributes:
        slices: slice positions T, evenly spread over the vertebra's height.
        size: height and width of the packed images in pixels.
        margin_mm: free space around the vertebra, on every side in the axial plane.
        neighbours: slices taken on each side of a position; channels are 2 × neighbours + 1.
        neighbour_mm: distance from one channel's slice to the next; each takes the native slice nearest to
            it, the same one again where slices are thicker. None: native neighbours, however far apart.
        window_hu: values mapped to 0 and 255; the default is the common bone window (level 400, width 1800;
            Source: Hofer, CT Teaching Manual).
        soft_mask: the mask keeps how much of each pixel is vertebra (0 to 255), instead of 0 or 255.

    Example:
        >>> PackConfig(window_hu=(-100.0, 900.0)).slices
        15
    """

    slices: int = 15
    size: int = 224
    margin_mm: float = 4.0
    neighbours: int = 2
    neighbour_mm: float | None = 1.0
    window_hu: tuple[float, float] = (-500.0, 1300.0)
    soft_mask: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that cannot make a sequence."""
        lengths = (self.margin_mm, *map(abs, self.window_hu))
        if not all(0 <= length < math.inf for length in lengths):
            raise ValueError(
                f"margin_mm and window_hu must be finite, the margin not negative: {asdict(self)}."
            )
        if min(self.slices, self.size) < 1 or self.neighbours < 0:
            raise ValueError(f"slices and size must be positive, neighbours not negative: {asdict(self)}.")
        if self.neighbour_mm is not None and not 0 < self.neighbour_mm < math.inf:
            raise ValueError(f"neighbour_mm is a length above 0, or None; found {self.neighbour_mm}.")
        if not self.window_hu[0] < self.window_hu[1]:
            raise ValueError(f"window_hu must run from low to high; found {self.window_hu}.")


def packing_of(record: Mapping[str, Any]) -> PackConfig:
    """How the sequences were packed that a run was trained on, by its record: so is a new CT for it.

    Args:
        record: of `runs.read_record`.

    Raises:
        ValueError: the record does not say it, or it is no packing of this version.
    """
    found = packing_settings(record)
    if not found:
        raise ValueError(
            "The run's record does not say how its sequences were packed (slices, size, window, margin). "
            "Pack the CT as they were (pack --help lists the options), and predict it with --study."
        )
    if isinstance(window := found.get("window_hu"), list):  # JSON has no tuple
        found = {**found, "window_hu": tuple(window)}
    return config_of(PackConfig, found)


def pack_vertebra(
    volume_hu: np.ndarray,
    label_map: np.ndarray,
    spacing_mm: tuple[float, float, float],
    vertebra: str,
    config: PackConfig,
    *,
    box: Box | None = None,
) -> PackedVertebra:
    """Cut one vertebra out of a volume and bring it to the packed form.

    The crop is square in mm and centred on the vertebra, so that anatomy keeps its proportions. Neighbouring
    slices past the end of the volume repeat its last slice.

    Args:
        volume_hu: (Z, Y, X) Hounsfield units.
        label_map: (Z, Y, X) integers; 1–7 mark C1–C7.
        spacing_mm: (z, y, x).
        vertebra: "C1" … "C7".
        config: how to cut.
        box: where the vertebra lies, if that is known; else the label map is searched (`bounding_box`).

    Raises:
        ValueError: shapes differ, spacing is not positive, there is no such vertebra, or it has no voxel
            in the label map.

    Example:
        >>> volume_hu, label_map = np.zeros((9, 40, 40)), np.zeros((9, 40, 40), int)
        >>> label_map[2:7, 10:30, 10:30] = 4
        >>> pack_vertebra(volume_hu, label_map, (3.0, 1.0, 1.0), "C4", PackConfig(size=32)).array.shape
        (15, 32, 32, 6)
    """
    if vertebra not in VERTEBRAE:
        raise ValueError(f"A vertebra is one of {', '.join(VERTEBRAE)}; found {vertebra!r}.")
    if volume_hu.shape != label_map.shape or volume_hu.ndim != 3:
        raise ValueError(
            f"Volume and label map must be 3-D and alike; found {volume_hu.shape} and {label_map.shape}. "
            "Resample the label map to the CT first."
        )
    if len(spacing_mm) != 3 or min(spacing_mm) <= 0:
        raise ValueError(f"spacing_mm must hold three positive lengths (z, y, x); found {spacing_mm}.")
    number = VERTEBRAE.index(vertebra) + 1
    z, y, x = box = box or bounding_box(label_map, number)
    first, last = (z[0], z[1] - 1) if config.slices > 1 else ((z[0] + z[1]) // 2,) * 2
    positions = slice_positions(first, last, config.slices)
    (row0, row1), (column0, column1) = _square(y, x, spacing_mm, config.margin_mm)
    end = volume_hu.shape[0] - 1
    array = np.empty((config.slices, config.size, config.size, 2 * config.neighbours + 2), dtype=np.uint8)
    crop, edges = _window((row0, row1), (column0, column1), volume_hu.shape)
    step = 1.0 if config.neighbour_mm is None else config.neighbour_mm / spacing_mm[0]  # in slices
    offsets = [round(k * step) for k in range(-config.neighbours, config.neighbours + 1)]
    prepared: dict[int, np.ndarray] = {}  # neighbouring positions share slices
    for t, position in enumerate(positions):
        for channel, offset in enumerate(offsets):
            index = int(np.clip(position + offset, 0, end))
            if index not in prepared:
                image = to_uint8(volume_hu[index][crop], config.window_hu)
                prepared[index] = _resize(np.pad(image, edges), config.size)
            array[t, :, :, channel] = prepared[index]
        mask = np.pad((label_map[position][crop] == number).astype(np.uint8) * 255, edges)
        mask = _resize(mask, config.size)
        array[t, :, :, -1] = mask if config.soft_mask else np.where(mask > 127, 255, 0)
    voxels = np.count_nonzero(label_map[tuple(slice(*ends) for ends in box)] == number)
    volume = int(voxels) * float(np.prod(spacing_mm))
    return PackedVertebra(array, positions, (row0, row1), (column0, column1), volume)


def packed_voxels(
    voxels: np.ndarray, piece: PackedVertebra, size: int, *, least_share: float = 0.25
) -> np.ndarray:
    """What marked voxels of a volume cover in a packed sequence of it, such as its broken bone.

    Args:
        voxels: bool (Z, Y, X), the volume's shape.
        piece: of `pack_vertebra`.
        size: height and width of the packed images in pixels.
        least_share: of a pixel that has to be marked for it to count; a line of one voxel that lies across
            two pixels marks both from a quarter on, and would be lost from more than a half on.

    Returns:
        uint8 (T, size, size) of 0 and 1, on the slices that the sequence's positions are.

    Example:
        >>> label_map = np.zeros((9, 40, 40), int)
        >>> label_map[2:7, 10:30, 10:30] = 4
        >>> piece = pack_vertebra(np.zeros(label_map.shape), label_map, (3.0, 1.0, 1.0), "C4", PackConfig())
        >>> found = packed_voxels(label_map == 4, piece, 224, least_share=0.5)
        >>> np.array_equal(found, piece.array[..., 5] > 127)
        True
    """
    crop, edges = _window(piece.rows, piece.columns, voxels.shape)
    planes = (np.pad(voxels[index][crop].astype(np.uint8) * 255, edges) for index in piece.slice_indices)
    return np.stack([_resize(plane, size) > 255 * least_share for plane in planes]).astype(np.uint8)


def manifest_row(
    uid: str,
    vertebra: str,
    piece: PackedVertebra,
    spacing_mm: tuple[float, float, float],
    config: PackConfig,
    slice_truth: str | None,
) -> dict[str, object]:
    """A sequence's row of the manifest; positions are in mm below the volume's first slice."""
    z_mm = piece.slice_indices * spacing_mm[0]
    pixel_mm = (piece.rows[1] - piece.rows[0]) * spacing_mm[1] / config.size
    where = (*spacing_mm, z_mm[0], z_mm[-1], pixel_mm, piece.mask_volume_mm3)
    values = (uid, vertebra, *where, *config.window_hu, slice_truth)
    return dict(zip(MANIFEST_COLUMNS, values, strict=True))


def to_uint8(volume_hu: np.ndarray, window_hu: tuple[float, float]) -> np.ndarray:
    """Map the window linearly to 0–255; values outside it go to its ends."""
    low, high = window_hu
    scaled = (volume_hu.astype(np.float32) - low) * (255.0 / (high - low))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def _square(
    y: tuple[int, int], x: tuple[int, int], spacing_mm: tuple[float, float, float], margin_mm: float
) -> tuple[tuple[int, int], tuple[int, int]]:
    side = max((y[1] - y[0]) * spacing_mm[1], (x[1] - x[0]) * spacing_mm[2]) + 2 * margin_mm
    ranges = []
    for (low, high), step in ((y, spacing_mm[1]), (x, spacing_mm[2])):
        count = max(round(side / step), 1)
        first = round((low + high - count) / 2)
        ranges.append((first, first + count))
    return ranges[0], ranges[1]


def _window(
    rows: tuple[int, int], columns: tuple[int, int], shape: tuple[int, ...]
) -> tuple[tuple[slice, slice], list[tuple[int, int]]]:
    """The part of a plane that a crop takes, and what has to be put around it where the crop reaches out."""
    crop = tuple(slice(max(first, 0), end) for first, end in (rows, columns))
    edges = [
        (max(-first, 0), max(end - many, 0))
        for (first, end), many in zip((rows, columns), shape[-2:], strict=True)
    ]
    return (crop[0], crop[1]), edges


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    """To size × size: area average where it shrinks (no aliasing), linear where it only grows."""
    shrink = max(image.shape) > size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR)
