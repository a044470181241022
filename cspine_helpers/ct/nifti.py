"""NIfTI files, CT and masks alike: as long as their header declares, in one place of the patient, or refused.

nibabel knows the header. The values are read here: libraries take what is left of a file that was cut off,
and the first of what is too much, without a word.
"""

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np

from cspine_helpers.ct.volume import corners, optional
from cspine_helpers.files.paths import atomic_path

NIFTI = (".nii", ".nii.gz")
_GZIP, _INFLATED = b"\x1f\x8b", 1032  # what its files begin with; bytes that one byte of them becomes at most
_CHUNK, _PADDING = 1 << 22, 512  # bytes
_STORED = ("uint8", "int16", "uint16", "int32", "float32", "float64")  # what every reader of NIfTI-1 knows
_SCANNER, _FILE_TIME = 1, 0  # nifti1.h: NIFTI_XFORM_SCANNER_ANAT; the same content gives the same bytes
_APART = 0.5  # of a voxel: what two orientations, or a shear, may move any point of the volume
_NO_NUMBERS = "its header holds no numbers where it says how the patient lies ({}). Mend its header"


class Grid(NamedTuple):
    """Where the voxels of an array lie: (3, 3) whose columns are steps along its axes, and (3,) its origin.

    Both in patient coordinates (LPS, mm); steps are at right angles to each other. The array's axes are in
    NumPy's order, the file's last axis first.
    """

    steps_mm: np.ndarray
    origin_mm: np.ndarray


def read_nifti(path: Path, *, not_finite: float = 0.0) -> tuple[np.ndarray, Grid]:
    """A NIfTI file's values, scaled as its header says, and where they lie.

    Args:
        path: the file, NIfTI-1 or NIfTI-2, packed by gzip or not.
        not_finite: value that takes the place of NaN and infinities.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: nibabel is not installed.
        ValueError: it cannot be read, is not as long as its header declares, not 3-D, or its header does not
            say where the patient is.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No file at {path}. Check its name; NIfTI ends in {' or '.join(NIFTI)}.")
    try:
        with _opened(path) as file:
            header = _read_header(file)
            shape = _shape(header)
            grid = _grid(_affine(header, shape), shape)
            longest = path.stat().st_size * (_INFLATED if isinstance(file, gzip.GzipFile) else 1)
            array = _read_values(file, header, shape, longest)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path.name}: cut off or damaged ({error}). Copy it again.") from error
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}.") from None
    if array.dtype.kind == "f":
        for plane in array:
            plane[~np.isfinite(plane)] = not_finite
    return array, grid


def write_nifti(path: Path, array: np.ndarray, grid: Grid, *, description: str = "") -> Path:
    """Write values as NIfTI-1 in one step, each at its place of the patient.

    No value is resampled or scaled. The file's axes are those of the array that run nearest to the patient's
    right, front and head (RAS+), whatever their order and direction in the array; sform and qform agree. The
    same values give the same bytes.

    Args:
        path: ends in .nii or .nii.gz, the second packed; its folder is made where it is missing.
        array: 3-D, of a type that NIfTI-1 has: uint8, int16, uint16, int32, float32 or float64.
        grid: where its voxels lie, as `read_nifti` returns it.
        description: of the header, at most 79 bytes; says what the values are.

    Returns:
        The path.

    Raises:
        ImportError: nibabel is not installed.
        OSError: the file cannot be written.
        ValueError: the file's name, the array's shape or type, the grid or the description do not fit.

    Example:
        >>> grid = Grid(np.fliplr(np.diag([0.5, 0.5, -3.0])), np.zeros(3))  # head to feet, front to back
        >>> array, there = read_nifti(write_nifti(Path("map.nii.gz"), np.ones((4, 9, 9), np.uint8), grid))
        >>> array.shape, np.abs(there.steps_mm).max(axis=0).tolist()
        ((4, 9, 9), [3.0, 0.5, 0.5])
    """
    # 1. What NIfTI can hold.
    path, array = Path(path), np.asarray(array)
    if not path.name.endswith(NIFTI):
        raise ValueError(f"A NIfTI file ends in {' or '.join(NIFTI)}; found {path.name!r}. Rename it.")
    if array.ndim != 3 or not array.size or array.dtype.name not in _STORED:
        raise ValueError(
            f"{path.name}: one 3-D array of {', '.join(_STORED)} is written; found shape {array.shape} of "
            f"{array.dtype}. Convert it."
        )
    if len(text := description.encode()) > 79:
        raise ValueError(f"{path.name}: a description has at most 79 bytes; found {len(text)}. Shorten it.")
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = grid.steps_mm[:, ::-1], grid.origin_mm
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # LPS to RAS
    if not np.isfinite(affine).all() or not np.linalg.norm(affine[:3, :3], axis=0).all():
        raise ValueError(f"{path.name}: its grid has steps that are 0 or no numbers: {grid}. Correct it.")
    try:
        affine = _straight(affine, array.shape[::-1])
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}.") from None
    # 2. The axes nearest to the patient's, and both forms alike.
    nibabel = optional("nibabel")
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(array.T, affine))
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = text
    image.set_sform(image.affine, code=_SCANNER)
    image.set_qform(image.affine, code=_SCANNER)
    # 3. In one step.
    content = image.to_bytes()
    with atomic_path(path) as temporary:
        is_packed = path.name.endswith(NIFTI[1])
        temporary.write_bytes(gzip.compress(content, 6, mtime=_FILE_TIME) if is_packed else content)
    return path


def _opened(path: Path) -> IO[bytes]:
    """The file's content; whether that is packed is seen from it, not from the name."""
    with open(path, "rb") as file:
        is_packed = file.read(len(_GZIP)) == _GZIP
    return cast("IO[bytes]", gzip.open(path)) if is_packed else open(path, "rb")


def _read_header(file: IO[bytes]) -> Any:
    """The header as it is, with nothing mended in silence.

    Source: nifti1.h, nifti2.h (`sizeof_hdr`, `magic`).
    """
    nibabel = optional("nibabel")
    kinds = {kind.sizeof_hdr: kind for kind in (nibabel.Nifti1Header, nibabel.Nifti2Header)}
    start = file.read(4)
    for sign in "<>":
        kind = kinds.get(int.from_bytes(start, "little" if sign == "<" else "big"))
        block = start + file.read(kind.sizeof_hdr - len(start)) if kind else b""
        if kind is None or len(block) < kind.sizeof_hdr:
            continue
        header = kind(block, endianness=sign, check=False)
        if header["magic"].item() == kind.pair_magic:
            raise ValueError("its values are in another file (.img). Save both as one .nii")
        if header["magic"].item() == kind.single_magic:
            return header
    raise ValueError("it cannot be read as NIfTI, and may be cut off or damaged. Copy it again")


def _shape(header: Any) -> tuple[int, int, int]:
    """Voxels along each of the three axes; later dimensions of length one are dropped."""
    count = int(header["dim"][0])
    sizes = header["dim"][1 : 1 + count].tolist() if 0 < count < 8 else []
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes.pop()
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(f"{tuple(sizes)} values; one 3-D volume is needed. Take one volume of it")
    return tuple(sizes)


def _affine(header: Any, shape: Sequence[int]) -> np.ndarray:
    """(4, 4): the file's indices to RAS mm, by the sform where there is one, else the qform.

    Refuses a header that says nothing of where the voxels lie, or two things.

    Source: nifti1.h (methods 2 and 3; `xyzt_units`, `pixdim[0]` as qfac).
    """
    voxel = header["pixdim"][1:4].astype(float)
    if not ((voxel > 0) & (voxel < np.inf)).all():
        sizes = " × ".join(f"{length:g}" for length in voxel)
        raise ValueError(f"its voxel size is {sizes} mm. Mend its header")
    if unit := {1: "metres", 3: "micrometres"}.get(int(header["xyzt_units"]) & 7):
        raise ValueError(f"its lengths are in {unit}, where mm are needed. Convert it")
    has_q, has_s = (int(header[f"{form}_code"]) > 0 for form in ("qform", "sform"))
    if not (has_q or has_s):
        raise ValueError(
            "its header does not say how the patient lies (qform and sform codes are both 0). Convert the "
            "DICOM series again with a tool that writes them"
        )
    if not has_s:
        return _qform(header)
    affine = header.get_sform().astype(float)
    if not np.isfinite(affine).all():
        raise ValueError(_NO_NUMBERS.format("its sform"))
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if (np.abs(lengths / voxel - 1) * shape > _APART).any():
        both = (" × ".join(f"{length:g}" for length in sizes) for sizes in (voxel, lengths))
        raise ValueError(
            f"its header holds two voxel sizes, in mm: {' and, by its sform, '.join(both)}. Mend it"
        )
    if has_q:
        grid, apart = _straight(affine, shape), _qform(header) - affine
        apart_mm = corners(shape, 0.5) @ apart[:3, :3].T + apart[:3, 3]
        if np.abs(apart_mm @ np.linalg.inv(grid[:3, :3]).T).max() > _APART:
            raise ValueError(
                "its header holds two orientations, qform and sform, that lie up to "
                f"{np.linalg.norm(apart_mm, axis=1).max():.1f} mm apart. Find out which is right, and write "
                "it into both"
            )
    return affine


def _qform(header: Any) -> np.ndarray:
    """(4, 4): the file's indices to RAS mm, by rotation and voxel size."""
    qfac = float(header["pixdim"][0])
    if qfac not in (-1, 0, 1):
        raise ValueError(f"its qfac (pixdim[0]) is {qfac:g}, where it is 1 or -1. Mend its header")
    header["pixdim"][0] = qfac or 1
    names = [*(f"quatern_{axis}" for axis in "bcd"), *(f"qoffset_{axis}" for axis in "xyz")]
    values = [float(header[name]) for name in names]
    if not np.isfinite(values).all() or sum(value**2 for value in values[:3]) > 1 + 1e-5:
        raise ValueError(_NO_NUMBERS.format("its qform"))
    header.quaternion_threshold = -1e-5
    return header.get_qform().astype(float)


def _straight(affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The nearest affine with axes at right angles, about the middle of the volume.

    Tools that round affines leave a shear that nobody can see; what moves a corner further is refused.
    """
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(affine[:3, :3] / lengths)
    straight = affine.copy()
    straight[:3, :3] = left @ right * lengths
    shear, middle = affine[:3, :3] - straight[:3, :3], (np.array(shape) - 1) / 2
    apart = (corners(shape, 0.5) - middle) @ shear.T @ np.linalg.inv(straight[:3, :3]).T
    if np.abs(apart).max() > _APART:
        raise ValueError(
            "its axes are not at right angles: a sheared affine, as of a tilted gantry, that moves a corner "
            f"by {np.abs(apart).max():.1f} voxels. Read the DICOM series instead, or resample it to a "
            "straight grid"
        )
    straight[:3, 3] += shear @ middle
    return straight


def _grid(affine: np.ndarray, shape: Sequence[int]) -> Grid:
    """The place of the array whose axes run the other way round, in LPS."""
    straight = np.diag([-1.0, -1.0, 1.0, 1.0]) @ _straight(affine, shape)
    return Grid(straight[:3, 2::-1], straight[:3, 3])


def _read_values(file: IO[bytes], header: Any, shape: Sequence[int], longest: int) -> np.ndarray:
    """The array, its axes in NumPy's order.

    Args:
        file: just behind the header.
        header: declares the rest.
        shape: in the file's order.
        longest: bytes that the content of the file can have at most.
    """
    # 1. What is declared.
    stored = _stored_type(header)
    begin, size = float(header["vox_offset"]), math.prod(shape) * stored.itemsize
    if not begin >= header.single_vox_offset or begin % 1:
        raise ValueError(
            f"its header declares that the values begin at byte {begin:g} (vox_offset), inside the header or "
            "nowhere. Mend its header, or convert it again"
        )
    if begin + size > longest:
        raise EOFError(f"its header declares {begin + size:.0f} bytes, which it cannot hold")
    # 2. As many bytes as that, and no more than padding behind them.
    file.seek(int(begin))
    content = np.empty(size, np.uint8)
    for start in range(0, size, _CHUNK):  # of a packed file, so that its bytes are never all there twice
        part = content.data[start : start + _CHUNK]
        if file.readinto(part) < len(part):  # type: ignore[attr-defined]
            raise EOFError("its header declares more")
    rest = file.read(_PADDING + 1)  # of a packed file, also its checksum where that is the end
    is_rows = any(len(rest) % (size // count) == 0 for count in shape)  # a dimension is too small
    if any(rest) or len(rest) > _PADDING or (rest and is_rows):
        raise ValueError(
            f"longer than the {begin + size:.0f} bytes that its header declares: a dimension there is wrong, "
            "or something else was appended. Convert it again"
        )
    # 3. As numbers of this machine, scaled.
    array = content.view(stored).reshape(shape[::-1])
    if not stored.isnative:
        array = array.byteswap(inplace=True).view(stored.newbyteorder("="))
    slope, inter = (float(header[f"scl_{name}"]) for name in ("slope", "inter"))
    if (slope == 0 or math.isnan(slope)) and (inter == 0 or math.isnan(inter)):
        slope, inter = 1.0, 0.0
    if slope == 0 or not math.isfinite(slope) or not math.isfinite(inter):
        raise ValueError(
            f"its scaling is {slope:g} × value + {inter:g} (scl_slope, scl_inter). Mend its header"
        )
    if (slope, inter) != (1, 0):
        array = array.astype(np.float32 if stored.itemsize <= 2 else np.float64)
        array *= slope
        array += inter
    return array


def _stored_type(header: Any) -> np.dtype[Any]:
    """How a value is stored: a whole number or a float of at most 8 bytes."""
    code, bits = int(header["datatype"]), int(header["bitpix"])
    types = type(header)._data_type_codes.dtype
    stored = np.dtype(types[code]).newbyteorder(header.endianness) if code in types else np.dtype("V")
    if stored.kind not in "iuf" or stored.itemsize > 8 or bits != 8 * stored.itemsize:
        raise ValueError(
            f"its values have datatype {code} and {bits} bits (bitpix); one whole number or float of up to "
            "64 bits is needed, of the size that its datatype has. Mend its header, or convert it"
        )
    return stored
