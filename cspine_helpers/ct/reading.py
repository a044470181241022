"""CT from disk: a folder of DICOM or a NIfTI file, to a volume in Hounsfield units in the package's frame."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from scipy import ndimage

from cspine_helpers.ct.dicom import read_series
from cspine_helpers.ct.nifti import NIFTI, read_nifti
from cspine_helpers.ct.volume import AIR_HU, Volume, in_frame

_HU_RANGE = (-32768, 32767)
# Where things lie on the scale, and how much of them there must be to be looked at.
_AIR_HU, _GAS_HU = (-1060, -940), (-1300, -400)
_SOFT_HU, _FAT_HU, _BODY_HU = (-150, 150), (-300, -10), (-300, 1500)
_LUNG_HU = -650  # air in tissue lies lower than that
_LIMIT_HU, _SMOOTH_HU = 4096, 20
_SHIFTS_HU = [shift for shift in range(-2500, 3001, 25) if abs(shift) >= 175]
_SOME_FAT, _SOME_AIR, _AIR_SHARE = 0.005, 0.001, 0.05  # of all voxels
_SOFT_SHARE = 0.45  # of the body
_BETTER = 0.02  # of all voxels
_BYTE = 256  # values that an image of 8 bits has
_BONE_HU, _SOME_BONE, _TOO_FEW = 300, 0.001, 2000  # of the body; of so few voxels, none need be bone
_SCANNER_HU = 2500  # what no scanner's own highest value lies below; that of 12 bits is 3071
_HEAP = 0.001  # of all voxels, at one end of the scale


def read_ct(path: str | Path, *, series: str | None = None) -> Volume:
    """One CT, whatever its slices are called and however its axes run: order and place come from the headers.

    Args:
        path: a folder of DICOM files (one a slice, or enhanced CT; in folders below where it has none),
            or a NIfTI file.
        series: SeriesInstanceUID, where the folder holds several.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ImportError: the library that reads it is not installed.
        ValueError: it is no usable CT; says what, which file and what to do.

    Example:
        >>> volume = read_ct("train_images/1.2.3")  # doctest: +SKIP
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No CT at {path}. Give a folder of DICOM files, or a NIfTI file.")
    if path.is_dir():
        volume = read_series(path, series=series)
    elif path.name.endswith(NIFTI):
        volume = _read_nifti_ct(path)
    else:
        raise ValueError(
            f"{path.name} is neither a folder of DICOM files nor a NIfTI file ({', '.join(NIFTI)}). "
            "Of a DICOM series, give the folder that holds its slices."
        )
    warnings = _check_hu(volume.hu, path)
    return replace(volume, warnings=(*volume.warnings, *warnings))


def _read_nifti_ct(path: Path) -> Volume:
    array, grid = read_nifti(path, not_finite=AIR_HU)
    if array.dtype.kind == "f":
        array = array.astype(np.float32, copy=False)
    elif array.dtype != np.int16:
        array = np.clip(array, *_HU_RANGE).astype(np.int16)
    try:
        return in_frame(array, *grid)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}.") from None


def _check_hu(hu: np.ndarray, path: Path) -> tuple[str, ...]:
    """Refuse values whose distribution is not that of Hounsfield units.

    Returns:
        A warning where the field of view holds no air, which shows best where the scale lies.
    """
    sample = hu[tuple(slice(None, None, max(1, size // 64)) for size in hu.shape)]
    if fault := _cut_or_inverted(sample) or _no_hounsfield(_Distribution.of(sample)):
        raise ValueError(
            f"{path.name}: values from {sample.min():g} to {sample.max():g} are no Hounsfield units: {fault}."
            " It is no CT (MR?), was normalised, windowed or inverted, or its rescale intercept or slope was "
            "lost or used twice: take the original."
        )
    if (sample < _AIR_HU[1]).mean() < _SOME_AIR:
        return ("no air in its field of view: fat and soft tissue alone say that these are Hounsfield units",)
    return ()


def _cut_or_inverted(sample: np.ndarray) -> str | None:
    """Why values are a window of Hounsfield units, or none of bone; None where neither.

    Padding and air make a heap at the lowest value, metal at a scanner's highest. Elsewhere, the three real
    CT and pydicom's had a voxel or two at an end of their scale, and 343 different values or more. Of the
    body, bone was 0.2 % or more in any crop, and gas in an inverted CT, where bone would be, 0.05 %.
    """
    low, high = sample.min(), sample.max()
    if len(np.unique(sample)) <= _BYTE:
        return f"they are {_BYTE} different ones at most, as in an image of 8 bits"
    if high < _SCANNER_HU and (heap := (sample == high).mean()) > _HEAP:
        return f"{heap:.1%} are {high:g}, the highest, as if clipped"
    if low > _FAT_HU[0] and (heap := (sample == low).mean()) > _HEAP:
        return f"{heap:.1%} are {low:g}, the lowest, as if clipped"
    body = sample[sample > _BODY_HU[0]]
    if sample.size > _TOO_FEW and (body > _BONE_HU).sum() <= _SOME_BONE * body.size:
        return f"hardly one lies above {_BONE_HU}, where bone is"
    return None


def _no_hounsfield(values: "_Distribution") -> str | None:
    """Why values are no Hounsfield units; None where fat, soft tissue and air lie as in a CT.

    Tried on three real CT and on phantoms: whole, cropped, mostly bone, fat or air, with metal, padding, and
    noise of 200 HU. Soft tissue was 59 % of the body or more, and no shift of the scale explained more.
    """
    if values.share(_FAT_HU) < _SOME_FAT:
        return f"hardly one lies between {_FAT_HU[0]} and {_FAT_HU[1]}, where fat is"
    if not values.has_soft_peak() or values.share(_SOFT_HU) < _SOFT_SHARE * values.share(_BODY_HU):
        return f"no peak lies between {_SOFT_HU[0]} and {_SOFT_HU[1]}, where soft tissue is"
    peak = values.highest(_GAS_HU)
    if peak > _LUNG_HU and values.share((peak - 60, peak + 60)) > _AIR_SHARE:
        return f"air lies at {peak}, not near -1000"
    inverted_air = values.share((-_AIR_HU[1], -_AIR_HU[0]))
    if inverted_air > max(_AIR_SHARE, values.share(_AIR_HU)):
        return "air lies at 1000, as if inverted"
    explained = values.share(_AIR_HU) + values.share(_SOFT_HU)
    for shift in _SHIFTS_HU:
        air = values.share(_AIR_HU, shift)
        better = air + values.share(_SOFT_HU, shift) > explained + _BETTER
        if air > _BETTER and better and values.has_soft_peak(shift):
            return f"air and soft tissue lie at about {shift - 1000} and {shift}, not at -1000 and 0"
    return None


@dataclass(frozen=True)
class _Distribution:
    """Of each whole value from -4096 to 4096: share of the voxels below it, smoothed count of those at it."""

    below: np.ndarray
    smooth: np.ndarray

    @classmethod
    def of(cls, sample: np.ndarray) -> Self:
        """Without what padding and clipping make: the lowest value, and isolated values far below."""
        whole = np.clip(np.rint(sample), -_LIMIT_HU, _LIMIT_HU).astype(int).ravel() + _LIMIT_HU
        counts = np.bincount(whole, minlength=2 * _LIMIT_HU + 1).astype(float)
        alone = counts > 4 * np.maximum(np.roll(counts, 1), np.roll(counts, -1))
        alone &= (counts > 0.01 * whole.size) & (np.arange(len(counts)) < _LIMIT_HU + _AIR_HU[1])
        counts[alone] = counts[whole.min()] = 0
        below = np.concatenate([[0.0], np.cumsum(counts) / max(counts.sum(), 1)])
        return cls(below, ndimage.gaussian_filter1d(counts, _SMOOTH_HU, mode="constant"))

    def share(self, between: tuple[int, int], shift: int = 0) -> float:
        """Of the voxels, whose value lies between two, moved by so much."""
        low, high = np.clip(np.add(between, shift) + _LIMIT_HU, 0, 2 * _LIMIT_HU)
        return float(self.below[high + 1] - self.below[low])

    def highest(self, between: tuple[int, int]) -> int:
        """The most frequent value between two."""
        low, high = np.clip(np.add(between, _LIMIT_HU), 0, 2 * _LIMIT_HU)
        return int(low + self.smooth[low : high + 1].argmax()) - _LIMIT_HU

    def has_soft_peak(self, shift: int = 0) -> bool:
        """Whether values from fat to soft tissue, on a scale moved by so much, peak within the latter."""
        low, high = _SOFT_HU[0] + shift, _SOFT_HU[1] + shift
        return low < self.highest((_FAT_HU[0] + shift, high)) < high
