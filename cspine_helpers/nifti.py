"""NIfTI files, CT and masks alike: read whole or refused, with the one orientation that the header holds.

SimpleITK reads what is left of a file that was cut off without a word, and takes one of the two orientations
that a header may hold; both are looked at here.
"""

import gzip
import itertools
import zlib
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np

from cspine_helpers.itk import reason, simpleitk

NIFTI = (".nii", ".nii.gz")
_FLOATS = {"16": "f4", "64": "f8"}  # datatype codes
_APART = 0.1  # of a voxel, that the two orientations may lie apart anywhere; headers are shown with 6 digits
_NIFTI_1, _NIFTI_2 = 348, 540  # bytes of their headers, which the headers begin with
_HEADER, _CHUNK = 352, 1 << 22  # bytes


class Grid(NamedTuple):
    """Where the voxels of an array lie: (3, 3) whose columns are steps along its axes, and (3,) its origin.

    Both in patient coordinates (LPS, mm); the array's axes are in NumPy's order, the file's last axis first.
    """

    steps_mm: np.ndarray
    origin_mm: np.ndarray


def read_nifti(path: Path, *, not_finite: float = 0.0) -> tuple[np.ndarray, Grid, Any]:
    """A NIfTI file's values, where they lie, and the image whose memory the values share.

    Args:
        path: the file.
        not_finite: value that takes the place of NaN and infinities.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, is cut off, not 3-D, or its header does not say where the patient is.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No file at {path}. Check its name; NIfTI ends in {' or '.join(NIFTI)}.")
    sitk = simpleitk()
    try:
        image = sitk.ReadImage(str(path), imageIO="NiftiImageIO")
    except RuntimeError as error:
        raise ValueError(f"{path.name}: {_unreadable(path, error)}.") from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(
            f"{path.name}: {image.GetSize()} values; one 3-D volume is needed. Take one volume of it."
        )
    header = {key: image.GetMetaData(key) for key in image.GetMetaDataKeys()}
    array = sitk.GetArrayViewFromImage(image)
    if array.dtype.kind == "f":
        array = array.copy()
    try:
        _check_place(header, image)
        _check_whole(path, header, array, not_finite)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}.") from None
    steps = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    return array, Grid(steps[:, ::-1], np.array(image.GetOrigin())), image


def _opened(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path)) if path.suffix == ".gz" else open(path, "rb")


def _unreadable(path: Path, error: Exception) -> str:
    try:
        with _opened(path) as file:
            start = file.read(4)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        start = b""
    if _NIFTI_2 in (int.from_bytes(start, "little"), int.from_bytes(start, "big")):
        return "it is NIfTI-2, which is not read here. Convert it to NIfTI-1"
    if "orthonormal" in str(error):
        return (
            "its axes are not at right angles (a sheared affine, as of a tilted gantry). Read the DICOM "
            "series instead, or resample it to a straight grid"
        )
    why = reason(error).replace(str(path), path.name)
    return f"it cannot be read as NIfTI, and may be cut off or damaged ({why}). Copy it again"


def _check_place(header: dict[str, str], image: Any) -> None:
    """Refuse a header that says nothing or two things of where the voxels lie."""
    has_q, has_s = (header.get(f"{form}_code", "0") != "0" for form in ("qform", "sform"))
    if not (has_q or has_s):
        raise ValueError(
            "its header does not say how the patient lies (qform and sform codes are both 0). Convert the "
            "DICOM series again with a tool that writes them"
        )
    if not has_s:
        return
    rows = np.array([[float(part) for part in header[f"srow_{axis}"].split()] for axis in "xyz"])  # RAS
    rows[:2] *= -1
    corners = np.array(list(itertools.product(*((0, size - 1) for size in image.GetSize()))))
    there = np.array(
        [image.TransformContinuousIndexToPhysicalPoint(c.tolist()) for c in corners.astype(float)]
    )
    apart_mm = np.linalg.norm(corners @ rows[:, :3].T + rows[:, 3] - there, axis=1).max()
    if apart_mm > _APART * min(image.GetSpacing()):
        raise ValueError(
            f"its header holds two orientations, qform and sform, that lie up to {apart_mm:.1f} mm apart (or "
            "a sheared sform, which no qform can be like). Find out which is right, and write it into both"
        )


def _check_whole(path: Path, header: dict[str, str], array: np.ndarray, not_finite: float) -> None:
    """Refuse a file that ends early, fails its checksum or has no voxel size; fill what is not finite."""
    start = int(float(header["vox_offset"]))
    size = int(header["bitpix"]) // 8 * array.size
    is_packed, kind = path.suffix == ".gz", _FLOATS.get(header["datatype"])
    if not is_packed and path.stat().st_size < start + size:
        raise ValueError(
            f"cut off: {path.stat().st_size} bytes, where its header declares {start + size}. Copy it again"
        )
    with _opened(path) as file:
        try:
            order = _check_voxel_size(file.read(_HEADER))
            if not is_packed and kind is None:
                return
            file.seek(start)
            for plane in array:
                content = file.read(size // len(array))
                if len(content) < size // len(array):
                    raise EOFError("its header declares more")
                if kind:
                    lost = ~np.isfinite(np.frombuffer(content, order + kind)).reshape(plane.shape)
                    plane[lost] = not_finite
            while file.read(_CHUNK):  # to the end, where the checksum is
                pass
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"cut off or damaged ({error}). Copy it again") from error


def _check_voxel_size(header: bytes) -> str:
    """Refuse a voxel size that is none, which SimpleITK replaces in silence; returns the byte order.

    Source: nifti1.h (`sizeof_hdr`, `pixdim`).
    """
    order = "<" if int.from_bytes(header[:4], "little") == _NIFTI_1 else ">"
    pixdim = np.frombuffer(header, order + "f4", 4, 76)[1:].astype(float)
    if not ((pixdim > 0) & (pixdim < np.inf)).all():
        sizes = " × ".join(f"{length:g}" for length in pixdim)
        raise ValueError(f"its voxel size is {sizes} mm. Mend its header")
    return order
