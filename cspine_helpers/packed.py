"""Packed sequences: one `(T, H, W, 6)` array a vertebra on disk, and the manifest that describes them.

Channels 0–4 hold five neighbouring slices' intensity, channel 5 the vertebra mask. Written as uint8
(mask 0/255); a float file in [0, 1] is converted when it is opened. Files are plain `.npy`.
"""

import ast
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.paths import atomic_path, check_uids, listing

CHANNELS = 6
MASK = 5  # the mask's channel; a pixel belongs to the vertebra where it is above 127
MANIFEST_COLUMNS = (
    UID,
    "vertebra",
    "spacing_z_mm",
    "spacing_y_mm",
    "spacing_x_mm",
    "z_first_mm",
    "z_last_mm",
    "pixel_mm",
    "mask_volume_mm3",
    "window_low_hu",
    "window_high_hu",
    "slice_truth",
)
_NPY_1_0 = b"\x93NUMPY\x01\x00"
_DTYPES = ("|u1", "<f2", "<f4", "<f8")
_REMEDY = "Make them anew (the built-in cohort: make cohort), or drop the studies with labels.without(...)."


def sequence_path(folder: str | Path, uid: str, vertebra: str) -> Path:
    """Path of one packed sequence, `<folder>/<uid>_<c>.npy` with c = 1…7; the file need not exist.

    Raises:
        ValueError: the UID cannot be a file name, or the vertebra is none of C1 … C7.
    """
    check_uids([uid])
    if vertebra not in VERTEBRAE:
        raise ValueError(f"A vertebra is one of {', '.join(VERTEBRAE)}; found {vertebra!r}.")
    return Path(folder) / f"{uid}_{VERTEBRAE.index(vertebra) + 1}.npy"


def write_sequence(folder: str | Path, uid: str, vertebra: str, array: np.ndarray) -> Path:
    """Write one sequence in one step, as uint8.

    Args:
        folder: the cohort's `packed` folder; made where it does not exist.
        uid: StudyInstanceUID.
        vertebra: C1 … C7.
        array: `(T, H, W, 6)`, uint8, or float in [0, 1].

    Returns:
        Where it was written.

    Raises:
        ValueError: what a reader would refuse is not written.
    """
    path = sequence_path(folder, uid, vertebra)
    try:
        array = np.asarray(array)
        _check_shape(array.shape, None, None)
        array = _as_uint8(array)
        _check_mask(array)
    except ValueError as error:
        raise ValueError(f"{path.name} was not written: {error}.") from None
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return path


def open_sequence(path: str | Path, *, slices: int | None = None, size: int | None = None) -> np.ndarray:
    """Open one sequence, read-only.

    The header is compared with the file's size before anything is mapped, so a false header costs no
    memory; pickles are never read.

    Args:
        path: the `.npy` file.
        slices: T that is expected; None takes any.
        size: H and W that are expected, pixels; None takes any.

    Returns:
        `(T, H, W, 6)` uint8: a memory map, or an array where the file holds floats.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a packed sequence of that shape.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No packed sequence at {path}. {_REMEDY}")
    try:
        return _open(path, slices, size)
    except ValueError as error:
        raise ValueError(f"{path} is not a usable packed sequence: {error}. {_REMEDY}") from None


def check_sequences(
    folder: str | Path, samples: pd.DataFrame, *, slices: int | None = None, size: int | None = None
) -> None:
    """Check the file of every sample: present, complete, of the right shape and range, mask not empty.

    Args:
        folder: the cohort's `packed` folder.
        samples: StudyInstanceUID and vertebra of the sequences to check.
        slices: T that is expected; None takes any.
        size: H and W that are expected, pixels; None takes any.

    Raises:
        ValueError: one for all the files that cannot be used, each with its reason.
    """
    bad = unusable_sequences(folder, samples, slices=slices, size=size)
    if bad:
        named = (f"{sequence_path(folder, *which).name} ({reason})" for which, reason in bad.items())
        raise ValueError(
            f"{len(bad)} of {len(samples)} packed sequences in {folder} cannot be used: "
            f"{'; '.join(named)}. {_REMEDY}"
        )


def unusable_sequences(
    folder: str | Path, samples: pd.DataFrame, *, slices: int | None = None, size: int | None = None
) -> dict[tuple[str, str], str]:
    """Which samples have no usable file: (StudyInstanceUID, vertebra) → the reason; arguments as above."""
    bad = {}
    for uid, vertebra in zip(samples[UID], samples["vertebra"], strict=True):
        path = sequence_path(folder, uid, vertebra)
        try:
            if not path.is_file():
                raise ValueError("missing")
            _check_mask(_open(path, slices, size))
        except (ValueError, OSError) as error:
            bad[uid, vertebra] = str(error)
    return bad


def _open(path: Path, slices: int | None, size: int | None) -> np.ndarray:
    shape, dtype, offset = _read_header(path)
    _check_shape(shape, slices, size)
    expected, found = offset + math.prod(shape) * dtype.itemsize, path.stat().st_size
    if found != expected:
        kind = "truncated" if found < expected else "trailing bytes"
        raise ValueError(f"{kind}: {found} bytes, where its header declares {expected}")
    return _as_uint8(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape))


def _read_header(path: Path) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, dtype and length of the header of a `.npy` file of version 1.0, in C order.

    Source: numpy.lib.format. Only what this project writes is read, so headers of at most 64 KiB.
    """
    with open(path, "rb") as file:
        if file.read(8) != _NPY_1_0:
            raise ValueError("not a .npy file of version 1.0")
        length = int.from_bytes(file.read(2), "little")
        text = file.read(length)
        offset = file.tell()
    try:
        header = ast.literal_eval(text.decode("latin1").strip())
        descr, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        raise ValueError("its .npy header cannot be read") from None
    if descr not in _DTYPES:
        raise ValueError(f"dtype {descr!r}, expected uint8 or little-endian float in [0, 1]")
    if fortran is not False:
        raise ValueError("Fortran order, expected C order (numpy.ascontiguousarray before numpy.save)")
    if not isinstance(shape, tuple) or any(type(length) is not int for length in shape):
        raise ValueError(f"shape {shape!r} in its header is no tuple of whole numbers")
    return shape, np.dtype(descr), offset


def _check_shape(shape: tuple[int, ...], slices: int | None, size: int | None) -> None:
    fits = (
        len(shape) == 4
        and min(shape) > 0
        and shape[3] == CHANNELS
        and slices in (None, shape[0])
        and (size is None or shape[1:3] == (size, size))
    )
    if not fits:
        wanted = f"({slices or 'T'}, {size or 'H'}, {size or 'W'}, {CHANNELS})"
        raise ValueError(f"shape {shape}, expected {wanted}")


def _as_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f":
        raise ValueError(f"dtype {array.dtype}, expected uint8 or float in [0, 1]")
    low, high = float(np.min(array)), float(np.max(array))
    if not (low >= 0 and high <= 1):  # NaN compares false
        raise ValueError(f"float values from {low:g} to {high:g}, expected [0, 1] and no NaN")
    return np.rint(np.asarray(array, dtype=np.float32) * 255).astype(np.uint8)


def _check_mask(array: np.ndarray) -> None:
    """Refuse a mask without one pixel; starts in the middle, where a good sequence answers at once."""
    middle = len(array) // 2
    if not any((array[t, ..., MASK] > 127).any() for t in (middle, *range(len(array)))):
        raise ValueError("empty mask: no pixel of channel 5 above 127")


def write_manifest(table: pd.DataFrame, folder: str | Path) -> Path:
    """Write `manifest.csv`, one row a sequence, into the `packed` folder; returns its path."""
    path = Path(folder) / "manifest.csv"
    table = _validate_manifest(table, str(path))
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")
    return path


def read_manifest(folder: str | Path) -> pd.DataFrame:
    """Read `manifest.csv` from a `packed` folder.

    Returns:
        `MANIFEST_COLUMNS`: voxel spacing of the volume, first and last slice position, side of a packed
        pixel, mask volume, HU window, and `slice_truth`: T characters, `.` an intact slice, `x` a
        fractured one, missing where nobody knows.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it does not keep to the schema.
    """
    path = Path(folder) / "manifest.csv"
    if not path.is_file():
        raise FileNotFoundError(f"No manifest at {path}. Pack the cohort (the built-in one: make cohort).")
    text = {UID: str, "vertebra": str, "slice_truth": str}
    return _validate_manifest(pd.read_csv(path, dtype=text), str(path))


def _validate_manifest(table: pd.DataFrame, name: str) -> pd.DataFrame:
    missing = [column for column in MANIFEST_COLUMNS if column not in table]
    if missing:
        raise ValueError(f"{name} lacks the columns {listing(missing)}. Pack the cohort anew.")
    check_uids(table[UID])
    numbers = [column for column in MANIFEST_COLUMNS[2:-1] if table[column].dtype.kind not in "fiu"]
    if numbers:
        raise ValueError(f"{name} holds text in the number columns {listing(numbers)}. Correct them.")
    truth = table["slice_truth"].dropna()
    for what, bad in (
        ("vertebrae that are none of C1 … C7", table.loc[~table["vertebra"].isin(VERTEBRAE), "vertebra"]),
        ("sequences twice", table.loc[table.duplicated([UID, "vertebra"]), UID]),
        ("slice truths that are not made of '.' and 'x'", truth[~truth.astype(str).str.fullmatch("[.x]+")]),
    ):
        if len(bad):
            raise ValueError(f"{name} holds {len(bad)} {what}: {listing(bad)}. Correct them.")
    return table[list(MANIFEST_COLUMNS)].reset_index(drop=True)


def slice_truth_array(text: object, slices: int) -> np.ndarray:
    """Truth of each slice, float32 `(T,)`: 1 fractured, 0 intact, NaN throughout where it is unknown.

    Args:
        text: `slice_truth` of a manifest row; NaN, None or "" means unknown.
        slices: T.

    Raises:
        ValueError: the text has another length than `slices`, or other characters.
    """
    if pd.isna(text) or text == "":  # type: ignore[call-overload]
        return np.full(slices, np.nan, dtype=np.float32)
    if not isinstance(text, str) or len(text) != slices or set(text) - set(".x"):
        raise ValueError(f"A slice truth is {slices} characters '.' or 'x'; found {text!r}.")
    return np.array([mark == "x" for mark in text], dtype=np.float32)
