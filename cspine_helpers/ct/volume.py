"""A CT volume in Hounsfield units, in the one frame that everything after it reads.

The frame is (Z, Y, X): cranial to caudal, front to back, the patient's right to left. Patient coordinates are
those of DICOM, in mm: x to the patient's left, y to the back, z to the head (LPS).
"""

import itertools
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

LIBRARIES = {"SimpleITK": "2.4", "nibabel": "5.3", "pydicom": "3.0"}  # and the versions that do
_HARMLESS = re.compile(  # what decoders write of files that they read right
    rb"Corrupt JPEG data: [12] extraneous bytes before marker 0xd9"  # the end; they make its length even
    rb"|Unsupported JPEG data precision \d+|Invalid SOS parameters for sequential JPEG|\s*$"
)
_STANDARD_ERROR, _ONE_AT_A_TIME = 2, Lock()


def optional(name: str) -> Any:
    """The module `SimpleITK`, `nibabel` or `pydicom`.

    Raises:
        ImportError: it is not installed; says how to install it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"Reading DICOM and CT needs {name}, which is not installed. Install this package with its group "
            f"ct (pip install -e '.[ct]'), or {name} alone (pip install '{name}>={LIBRARIES[name]}')."
        ) from error


def simpleitk() -> Any:
    """The module `SimpleITK`.

    Raises:
        ImportError: it is not installed; says how to install it.
    """
    return optional("SimpleITK")


def reason(error: BaseException) -> str:
    """The last line of an error of SimpleITK, without addresses in memory and places in its source."""
    line = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    return re.sub(r"ITK ERROR: \w+\(0x[0-9a-f]+\): |^.*/\S+:\d+:\s*", "", line).strip()


@contextmanager
def complaints(about: re.Pattern[bytes] | None = None) -> Iterator[list[str]]:
    """What decoders find wrong with data in the block; they make pixels up, and only write that they did.

    The list is filled when the block ends. Lines known to be harmless get to standard error.

    Args:
        about: what a line that counts holds; where it is not given, all lines count but harmless ones. The
            others get to standard error, where other threads may be writing, as a progress bar.
    """
    said: list[str] = []
    with _ONE_AT_A_TIME, tempfile.TemporaryFile() as file:
        outside = os.dup(_STANDARD_ERROR)
        os.dup2(file.fileno(), _STANDARD_ERROR)
        try:
            yield said
        finally:
            os.dup2(outside, _STANDARD_ERROR)
            os.close(outside)
            file.seek(0)
            for line in file:
                if not about.search(line) if about else _HARMLESS.match(line):
                    os.write(_STANDARD_ERROR, line)
                else:
                    said.append("its decoder finds its pixels corrupt")


FRAME = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])  # columns: a step along Z, Y, X in LPS
WARN_TURN_DEG = 15.0  # beyond it the neck was not scanned straight, or the volume was reformatted
MAX_TURN_DEG = 40.0  # beyond it "axial" is no word for the slices any more
AIR_HU = -1024
Box = tuple[tuple[int, int], ...]  # half-open index ranges along Z, Y and X


@dataclass(frozen=True, repr=False)
class Volume:
    """One CT.

    Attributes:
        hu: (Z, Y, X), int16, or float32 where the file holds fractions of a Hounsfield unit.
        spacing_mm: (z, y, x).
        origin_mm: (3,) patient coordinates of the middle of voxel (0, 0, 0).
        direction: (3, 3); its columns are unit vectors of a step along Z, Y and X in patient coordinates.
        frames: of a DICOM series: InstanceNumber → (3, 3), whose rows are the patient coordinates of the
            first pixel's middle, and the steps per column and per row. None: it has no such numbers.
        warnings: what a reader should know, such as repairs.
    """

    hu: np.ndarray
    spacing_mm: tuple[float, float, float]
    origin_mm: np.ndarray
    direction: np.ndarray
    frames: dict[int, np.ndarray] | None = None
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Shape, spacing and range, not the values."""
        spacing = " × ".join(f"{length:.2f}" for length in self.spacing_mm)
        return f"Volume{self.hu.shape}, {spacing} mm (z, y, x)"

    @property
    def steps_mm(self) -> np.ndarray:
        """(3, 3); its columns are the steps along Z, Y and X in patient coordinates."""
        return self.direction * np.array(self.spacing_mm)

    def points(self, indices: ArrayLike) -> np.ndarray:
        """Patient coordinates (N, 3) in mm of voxel indices (N, 3) as (z, y, x), fractions allowed."""
        return self.origin_mm + np.asarray(indices, dtype=float) @ self.steps_mm.T

    def indices(self, points: ArrayLike) -> np.ndarray:
        """Voxel indices (N, 3) as (z, y, x), with fractions, of patient coordinates (N, 3) in mm."""
        return (np.asarray(points, dtype=float) - self.origin_mm) @ np.linalg.inv(self.steps_mm).T


def in_frame(array: np.ndarray, steps_mm: np.ndarray, origin_mm: np.ndarray) -> Volume:
    """Bring an array in any order and orientation of its axes into the frame; no value is resampled.

    Args:
        array: 3-D.
        steps_mm: (3, 3); its columns are the steps along the array's axes in patient coordinates, at right
            angles to each other.
        origin_mm: (3,) patient coordinates of the middle of voxel (0, 0, 0).

    Returns:
        A volume whose array shares its memory with `array`, or is a copy where axes were swapped.

    Raises:
        ValueError: the axes are turned so far against the patient's that no order is the right one.
    """
    spacing = np.linalg.norm(steps_mm, axis=0)
    order, turn_deg = _nearest_order(steps_mm / spacing)
    array = array.transpose(order)
    steps, spacing = steps_mm[:, order], spacing[list(order)]
    if order != (0, 1, 2):
        array = np.ascontiguousarray(array)  # slices that do not lie together in memory are slow to cut from
    origin = np.array(origin_mm, dtype=float)
    for axis in range(3):
        if steps[:, axis] @ FRAME[:, axis] < 0:
            origin = origin + steps[:, axis] * (array.shape[axis] - 1)
            steps[:, axis] *= -1
            array = np.flip(array, axis)
    warnings: tuple[str, ...] = ()
    if turn_deg > WARN_TURN_DEG:
        warnings = (f"its grid is turned by {turn_deg:.0f}° against the patient's axes, and packed as it is",)
    z, y, x = spacing.tolist()
    return Volume(array, (z, y, x), origin, steps / spacing, warnings=warnings)


def _nearest_order(directions: np.ndarray) -> tuple[tuple[int, int, int], float]:
    """Which array axes lie nearest to Z, Y, X, and the largest angle between an axis and its own, degrees."""
    closeness = np.abs(FRAME.T @ directions)  # (Z Y X, array axis)
    order = max(itertools.permutations(range(3)), key=lambda order: closeness[range(3), order].sum())
    turn_deg = float(np.rad2deg(np.arccos(np.clip(closeness[range(3), order].min(), 0, 1))))
    if turn_deg > MAX_TURN_DEG:
        raise ValueError(
            f"its grid is turned by {turn_deg:.0f}° against the patient's axes; up to {MAX_TURN_DEG:.0f}° "
            "are packed as they are. Resample it to axial slices, or take the axial reconstruction"
        )
    return order, turn_deg  # type: ignore[return-value]


def slices_of(box: Box) -> tuple[slice, ...]:
    """What indexes an array by a box."""
    return tuple(slice(*ends) for ends in box)


def bounding_box(label_map: np.ndarray, value: int) -> Box:
    """Half-open index range along each axis of the voxels that carry `value`.

    Raises:
        ValueError: no voxel does.
    """
    found = ndimage.find_objects(label_map, max_label=value)[value - 1 :]
    if not found or found[0] is None:
        raise ValueError(
            f"Label {value} has no voxel in the label map; found {np.unique(label_map).tolist()}."
        )
    return tuple((axis.start, axis.stop) for axis in found[0])


def corners(shape: Sequence[int], beyond: float = 0.0) -> np.ndarray:
    """(8, 3) indices of an array's corner voxels, or of points so far beyond their middles."""
    return np.array(list(itertools.product(*((-beyond, n - 1 + beyond) for n in shape))))
