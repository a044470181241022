"""Packed sequences: one `(T, H, W, 6)` array a vertebra on disk, and the manifest that describes them.

Channels 0–4 hold five neighbouring slices' intensity, channel 5 the vertebra mask. Files are plain `.npy` of
uint8 (mask 0/255); floats in [0, 1] and masks of 0 and 1 are converted when they are opened.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from cspine_helpers.files.paths import (
    CHECKSUMS,
    atomic_path,
    check_uids,
    inside,
    listing,
    read_checksums,
    sha256_of,
)
from cspine_helpers.files.tables import Column, checked, read_columns, require_columns, write_table
from cspine_helpers.labels import UID, VERTEBRAE

CHANNELS = 6
MASK = 5  # the mask's channel; a pixel belongs to the vertebra where it is above 127
_NPY_1_0 = b"\x93NUMPY\x01\x00"
_DTYPES = tuple(map(np.dtype, ("|u1", "<f2", "<f4", "<f8")))
_REMEDY = (
    "Make them again (the built-in cohort: make cohort), drop the studies with labels.without(...), or, if "
    "all are of another size, take settings of that size (model.size; in checkpoints/builtin/run.json 64)."
)


def sequence_path(folder: str | Path, uid: str, vertebra: str) -> Path:
    """Path of one packed sequence, `<folder>/<uid>_<c>.npy` with c = 1…7; the file need not exist.

    Raises:
        ValueError: the UID cannot be a file name, or the vertebra is none of C1 … C7.

    Example:
        >>> sequence_path("packed", "1.2.3", "C4").name
        '1.2.3_4.npy'
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
        array: `(T, H, W, 6)`, uint8 (mask 0/255 or 0/1), or float in [0, 1].

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
    array = np.ascontiguousarray(array)
    header = np.lib.format.header_data_from_array_1_0(array)
    # Synced, thousands of files take ten times as long; after a power failure readers refuse the empty ones.
    with atomic_path(path, durable=False) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array.data)  # NumPy's own tofile tells no cause where this says "No space left on device"
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
        `(T, H, W, 6)` uint8, mask 0 to 255: a memory map, or an array where the file was converted.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a packed sequence of that shape, or a link out of its folder.

    Example:
        >>> array = np.full((15, 8, 8, 6), 255, np.uint8)
        >>> open_sequence(write_sequence("packed", "1.2.3", "C4", array)).shape
        (15, 8, 8, 6)
    """
    path = Path(path)
    try:
        return _open(path, slices, size)
    except FileNotFoundError:
        raise FileNotFoundError(f"No packed sequence at {path}. {_REMEDY}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a usable packed sequence: {error}. {_REMEDY}") from None


def check_sequences(
    folder: str | Path,
    samples: pd.DataFrame,
    *,
    slices: int | None = None,
    size: int | None = None,
    verify: bool = False,
) -> None:
    """Check the file of every sample: present, complete, of the right shape and range, mask not empty.

    Args:
        folder: the cohort's `packed` folder.
        samples: StudyInstanceUID and vertebra of the sequences to check.
        slices: T that is expected; None takes any.
        size: H and W that are expected, pixels; None takes any.
        verify: whether every file is read whole and held against `SHA256SUMS` (`paths.write_checksums`).
            Without it, a pixel that changed on disk goes unnoticed.

    Raises:
        FileNotFoundError: there is no `SHA256SUMS` to verify with.
        ValueError: one for all the files that cannot be used; the first ten with their reasons.

    Example:
        >>> path = write_sequence("packed", "1.2.3", "C4", np.full((15, 8, 8, 6), 255, np.uint8))
        >>> check_sequences("packed", pd.DataFrame({UID: ["1.2.3"], "vertebra": ["C4"]}), slices=15)
    """
    bad = unusable_sequences(folder, samples, slices=slices, size=size, verify=verify)
    if bad:
        named = (f"{sequence_path(folder, *which).name} ({reason})" for which, reason in bad.items())
        raise ValueError(
            f"{len(bad)} of {len(samples)} packed sequences in {folder} cannot be used: "
            f"{listing(named, separator='; ', quoted=False)}. {_REMEDY}"
        )


def unusable_sequences(
    folder: str | Path,
    samples: pd.DataFrame,
    *,
    slices: int | None = None,
    size: int | None = None,
    verify: bool = False,
) -> dict[tuple[str, str], str]:
    """Which samples have no usable file: (StudyInstanceUID, vertebra) → the reason; arguments as above."""
    sums = read_checksums(folder) if verify else None
    bad = {}
    for uid, vertebra in zip(samples[UID], samples["vertebra"], strict=True):
        path = sequence_path(folder, uid, vertebra)
        try:
            _check_mask(_open(path, slices, size))
            if sums is not None and sums.get(path.name) != sha256_of(path):
                raise ValueError(f"its SHA-256 is not that of {CHECKSUMS}")
        except FileNotFoundError:
            bad[uid, vertebra] = "missing"
        except (ValueError, OSError) as error:
            bad[uid, vertebra] = str(error)
    return bad


def _open(path: Path, slices: int | None, size: int | None) -> np.ndarray:
    """The sequence of a file; its header is held against the file's size before anything is mapped."""
    if not inside(path).is_file():  # neither a folder nor a pipe is opened
        raise FileNotFoundError(path)
    with open(path, "rb") as file:
        if file.read(len(_NPY_1_0)) != _NPY_1_0:
            raise ValueError("not a .npy file of version 1.0")
        try:
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
        except Exception as error:  # of many kinds: NumPy lets through what Python's parser raises
            raise ValueError(f"its .npy header cannot be read ({error!r:.100})") from None
        if dtype not in _DTYPES:
            raise ValueError(f"dtype {dtype.str!r}, expected uint8 or little-endian float in [0, 1]")
        if is_fortran:
            raise ValueError("Fortran order, expected C order (numpy.ascontiguousarray before numpy.save)")
        _check_shape(shape, slices, size)
        offset, found = file.tell(), os.fstat(file.fileno()).st_size
        expected = offset + math.prod(shape) * dtype.itemsize
        if found != expected:
            kind = "truncated" if found < expected else "trailing bytes"
            raise ValueError(f"{kind}: {found} bytes, where its header declares {expected}")
        return _as_uint8(np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=shape))


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
    """The array itself, or a copy where it holds floats or a mask of 0 and 1."""
    if array.dtype == np.uint8:
        mask = np.asarray(array)[..., MASK]
        if any((plane > 1).any() for plane in mask) or not mask.any():
            return array
        array = np.array(array)
        array[..., MASK] *= 255
        return array
    if array.dtype.kind != "f":
        raise ValueError(f"dtype {array.dtype}, expected uint8 or float in [0, 1]")
    low, high = float(np.min(array)), float(np.max(array))
    if not (low >= 0 and high <= 1):  # NaN compares false
        raise ValueError(f"float values from {low:g} to {high:g}, expected [0, 1] and no NaN")
    return np.rint(np.asarray(array, dtype=np.float32) * 255).astype(np.uint8)


def _check_mask(array: np.ndarray) -> None:
    """Refuse a mask without one pixel."""
    if not any((plane > 127).any() for plane in np.asarray(array)[..., MASK]):
        raise ValueError("empty mask: no pixel of channel 5 above 127")


_MANIFEST = (
    Column(UID, "id"),
    Column("vertebra", among=VERTEBRAE),
    *(Column(f"spacing_{axis}_mm", "number", above=0) for axis in "zyx"),
    *(Column(name, "number") for name in ("z_first_mm", "z_last_mm")),
    *(Column(name, "number", above=0) for name in ("pixel_mm", "mask_volume_mm3")),
    *(Column(name, "number") for name in ("window_low_hu", "window_high_hu")),
    Column("slice_truth", pattern="[.x]+", empty=True, wrong="slice truths that are not made of '.' and 'x'"),
)
_PROVENANCE = (
    Column("completeness", "number", low=0, high=1),
    Column("source_sha256", pattern="[0-9a-f]{64}", wrong="values that are no SHA-256"),
    Column("mask"),
    Column("mask_sha256", pattern="[0-9a-f]{64}", wrong="values that are no SHA-256"),
    Column("packer"),
    Column("warnings", pattern="(?s).*"),
)
MANIFEST_COLUMNS = tuple(column.name for column in _MANIFEST)
_LENGTHS = MANIFEST_COLUMNS[2:-1]
# Where a sequence was packed from. A manifest has all of these columns, or none (the built-in cohort's).
PROVENANCE_COLUMNS = tuple(column.name for column in _PROVENANCE)
_UNKNOWN = (*_LENGTHS, "completeness", "mask", "mask_sha256")  # of sequences made of another program's slices


def write_manifest(table: pd.DataFrame, folder: str | Path) -> Path:
    """Write `manifest.csv`, one row a sequence, with its SHA-256 beside it; returns its path."""
    path = Path(folder) / "manifest.csv"
    write_table(_validate_manifest(table, path), path, sealed=True)
    return path


def read_manifest(folder: str | Path) -> pd.DataFrame:
    """Read `manifest.csv` from a `packed` folder.

    Returns:
        `MANIFEST_COLUMNS`: voxel spacing of the volume, first and last slice position, side of a packed
        pixel, mask volume, HU window, and `slice_truth`: T characters, `.` an intact slice, `x` a
        fractured one, missing where unknown. Then, where the manifest has them, `PROVENANCE_COLUMNS`: share
        of the vertebra in the field of view, SHA-256 of the CT's files, name and SHA-256 of the mask, the
        packer's version, and its warnings ("": none). Of sequences that were made of another program's
        slices, all lengths, the window, that share and the mask are missing: nobody knows them.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it breaks the schema.

    Example:
        >>> read_manifest(cohort_folder / "packed")["vertebra"].iloc[0]
        'C1'
    """
    path = Path(folder) / "manifest.csv"
    source = "Pack the cohort (notebook 00; the built-in one: make cohort)."
    text = (UID, "vertebra", "slice_truth", *PROVENANCE_COLUMNS[1:])
    return _validate_manifest(read_columns(path, what="manifest", source=source, text=text), path)


def _validate_manifest(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    columns: tuple[Column, ...] = _MANIFEST
    of_slices = False
    if not set(PROVENANCE_COLUMNS).isdisjoint(table.columns):
        require_columns(table, PROVENANCE_COLUMNS, what=str(path))
        columns += _PROVENANCE
        table = table.assign(warnings=table["warnings"].fillna(""))
        of_slices = bool(table.reindex(columns=list(_LENGTHS)).isna().all(axis=1).any())
    if not of_slices:
        return checked(table, columns, what=str(path), key=(UID, "vertebra"), may_be_empty=True)
    columns = tuple(replace(each, empty=each.empty or each.name in _UNKNOWN) for each in columns)
    return checked(table, columns, what=str(path), key=(UID, "vertebra"), rules=_known_or_not)


def _known_or_not(values: pd.DataFrame) -> Iterator[tuple[str, pd.Series]]:
    """Rows that say some of what may be unknown, and not all."""
    lacking = values[list(_UNKNOWN)].isna()
    torn = lacking.any(axis=1) & ~lacking.all(axis=1)
    if torn.any():
        yield f"rows with some of {listing(_UNKNOWN, quoted=False)} and not the others", torn


def slice_positions(first: int, last: int, slices: int) -> np.ndarray:
    """Native slices of a sequence's T positions, evenly spread from the first to the last, int `(T,)`.

    Example:
        >>> slice_positions(10, 20, 3).tolist()
        [10, 15, 20]
    """
    return np.linspace(first, last, slices).round().astype(int)


def slice_truth_array(text: object, slices: int) -> np.ndarray:
    """Truth of each slice, float32 `(T,)`: 1 fractured, 0 intact, all NaN where it is unknown.

    Args:
        text: `slice_truth` of a manifest row; NaN, None or "" means unknown.
        slices: T.

    Raises:
        ValueError: the text has another length than `slices`, or other characters.

    Example:
        >>> slice_truth_array(".xx", 3).tolist()
        [0.0, 1.0, 1.0]
    """
    if pd.isna(text) or text == "":  # type: ignore[call-overload]
        return np.full(slices, np.nan, dtype=np.float32)
    if not isinstance(text, str) or len(text) != slices or set(text) - set(".x"):
        raise ValueError(f"A slice truth is {slices} characters '.' or 'x'; found {text!r}.")
    return np.array([mark == "x" for mark in text], dtype=np.float32)


@dataclass(frozen=True)
class PackedVertebra:
    """One packed sequence, and where in the volume it came from.

    Attributes:
        array: uint8 (T, H, W, 6): five neighbouring slices, then the vertebra's mask.
        slice_indices: the T positions along Z that the middle channel shows.
        rows, columns: half-open ranges in voxels along Y and X that the square crop covers; they may pass the
            volume's edge, where the crop is filled with the window's low end.
        mask_volume_mm3: volume of the label.
    """

    array: np.ndarray
    slice_indices: np.ndarray
    rows: tuple[int, int]
    columns: tuple[int, int]
    mask_volume_mm3: float


@dataclass(frozen=True)
class Crop:
    """Where in the volume a packed sequence came from, without it; fields as of `PackedVertebra`."""

    slice_indices: np.ndarray
    rows: tuple[int, int]
    columns: tuple[int, int]
