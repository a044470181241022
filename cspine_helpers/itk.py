"""SimpleITK, which reads every image here; imported when it is needed, as it is an optional dependency."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NIFTI = (".nii", ".nii.gz")


class Grid(NamedTuple):
    """Where the voxels of an array lie: (3, 3) whose columns are steps along its axes, and (3,) its origin.

    Both in patient coordinates (LPS, mm); the array's axes are in NumPy's order, the file's last axis first.
    """

    steps_mm: np.ndarray
    origin_mm: np.ndarray


def simpleitk() -> Any:
    """The module `SimpleITK`.

    Raises:
        ImportError: it is not installed; says how to install it.
    """
    try:
        import SimpleITK
    except ImportError as error:
        raise ImportError(
            "Reading and writing CT needs SimpleITK, which is not installed. Install this package with its "
            "group ct (pip install -e '.[ct]'), or SimpleITK alone (pip install 'SimpleITK>=2.4')."
        ) from error
    return SimpleITK


def reason(error: BaseException) -> str:
    """The last line of an error of SimpleITK, without addresses in memory and places in its source."""
    line = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    return re.sub(r"ITK ERROR: \w+\(0x[0-9a-f]+\): |^.*/\S+:\d+:\s*", "", line).strip()


def read_nifti(path: Path) -> tuple[np.ndarray, Grid, Any]:
    """A NIfTI file's values, where they lie, and SimpleITK's image of them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, is not 3-D, or its header does not say where the patient is.
    """
    sitk = simpleitk()
    if not path.is_file():
        raise FileNotFoundError(f"No file at {path}. Check its name; NIfTI ends in {' or '.join(NIFTI)}.")
    try:
        image = sitk.ReadImage(str(path), imageIO="NiftiImageIO")
    except RuntimeError as error:
        if "orthonormal" in str(error):
            cause = (
                "its axes are not at right angles (a sheared affine, as of a tilted gantry). Read the DICOM "
                "series instead, or resample it to a straight grid"
            )
        else:
            cause = (
                f"it cannot be read as NIfTI; it may be cut off or damaged ({reason(error)}). Copy it again"
            )
        raise ValueError(f"{path.name}: {cause}.") from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(
            f"{path.name}: {image.GetSize()} values; one 3-D volume is needed. Take one volume of it."
        )
    if all(image.HasMetaDataKey(k) and image.GetMetaData(k) == "0" for k in ("qform_code", "sform_code")):
        raise ValueError(
            f"{path.name}: its header does not say how the patient lies (qform and sform codes are both 0). "
            "Convert the DICOM series again with a tool that writes them."
        )
    steps = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    if not np.isfinite(steps).all() or min(image.GetSpacing()) <= 0:
        raise ValueError(f"{path.name}: its voxel size is {image.GetSpacing()} mm. Mend its header.")
    return sitk.GetArrayViewFromImage(image), Grid(steps[:, ::-1], np.array(image.GetOrigin())), image
