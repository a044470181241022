"""CT from disk: a folder of DICOM or a NIfTI file, to a volume in Hounsfield units in the package's frame."""

from pathlib import Path

import numpy as np

from cspine_helpers import dicom
from cspine_helpers.nifti import NIFTI, read_nifti
from cspine_helpers.volume import AIR_HU, Volume, in_frame

_HU_RANGE = (-32768, 32767)


def read_ct(path: str | Path, *, series: str | None = None) -> Volume:
    """One CT, whatever its slices are called and however its axes run: order and place come from the headers.

    Args:
        path: a folder of DICOM files of one series, or a NIfTI file.
        series: SeriesInstanceUID, where the folder holds several.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ImportError: the library that reads it is not installed.
        ValueError: it is no usable CT; says what, which file and what to do.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No CT at {path}. Give a folder of DICOM files, or a NIfTI file.")
    if path.is_dir():
        volume = dicom.read_series(path, series=series)
    elif path.name.endswith(NIFTI):
        volume = _read_nifti_ct(path)
    else:
        raise ValueError(
            f"{path.name} is neither a folder of DICOM files nor a NIfTI file ({', '.join(NIFTI)}). "
            "Of a DICOM series, give the folder that holds its slices."
        )
    _check_hu(volume.hu, path)
    return volume


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


def _check_hu(hu: np.ndarray, path: Path) -> None:
    """Refuse values that cannot be Hounsfield units: a body has fat, and skin that is part air."""
    sample = hu[:: max(1, len(hu) // 24), ::3, ::3]
    if not ((sample > -300) & (sample < 0)).any():
        low, high = float(sample.min()), float(sample.max())
        raise ValueError(
            f"{path.name}: values from {low:g} to {high:g}, but none between -300 and 0 Hounsfield units, "
            "where fat and skin are. It is no CT (MR?), was normalised, or lost its rescale intercept: take "
            "the original."
        )
