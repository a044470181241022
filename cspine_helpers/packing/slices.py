"""Packed sequences from an earlier program's files, one a slice: `{study}_{c}_{t}.npy`, each `(H, W, 6)`.

So programs built on the first place of RSNA 2022 store a vertebra's slices: c from 1 to 7, t from 0, five
neighbouring slices and then the mask along the last axis, uint8, 0 to 255, the mask often soft. Pixels are
taken as they are. What the files do not say stays unknown: spacing, window, order, sides, slice truth.
"""

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from cspine_helpers.files import paths
from cspine_helpers.files.paths import check_uids, listing, sha256_of
from cspine_helpers.files.records import content_sha256, write_sealed
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.packed import CHANNELS, MANIFEST_COLUMNS, MASK, PROVENANCE_COLUMNS, write_sequence
from cspine_helpers.packing.cohort import begin, write_tables
from cspine_helpers.packing.study import FORMAT, forget, is_unchanged, read_study, record_path

SLICES_VERSION = "slices 1"  # in manifests; raised when the same files would give other arrays
UNKNOWN = "packed from slices of another program: spacing, window, order and sides are not known"
SOFT = "its mask is soft, not 0 or 255"
_NAME = re.compile(r"(.+)_(\d)_(\d{1,3})\.npy")
Slices = dict[str, dict[str, dict[int, Path]]]  # study → vertebra → t → file


def find_slices(folder: str | Path) -> Slices:
    """Study → vertebra → place in the sequence → file, of a folder of `{study}_{c}_{t}.npy`.

    Raises:
        FileNotFoundError: there are none.
        ValueError: vertebrae are not numbered 1 to 7, a study's name cannot be a file name, or other `.npy`
            files lie among them; names these.
    """
    found: Slices = {}
    strange, numbers = [], set()
    for path in sorted(Path(folder).glob("[!.]*.npy")):
        if match := _NAME.fullmatch(path.name):
            uid, c, t = match[1], int(match[2]), int(match[3])
            numbers.add(c)
            name = VERTEBRAE[c - 1] if 1 <= c <= len(VERTEBRAE) else str(c)
            found.setdefault(uid, {}).setdefault(name, {})[t] = path
        else:
            strange.append(path.name)
    if not found and not strange:
        raise FileNotFoundError(f"No slices in {folder}: files <study>_<c>_<t>.npy. Name their folder.")
    if strange:
        raise ValueError(
            f"{len(strange)} files in {folder} are not named <study>_<c>_<t>.npy: {listing(strange)}. "
            "Move them away."
        )
    if wrong := sorted(numbers - {*range(1, 8)}):
        raise ValueError(
            f"Vertebrae are numbered 1 to 7, in <study>_<c>_<t>.npy; found {listing(wrong)} in {folder}. "
            "Rename the files (where C1 is 0, add one)."
        )
    check_uids(found)
    return found


def pack_slices(
    folder: Path, slices: str | Path, *, count: int | None = None, only: Collection[str] | None = None
) -> pd.DataFrame:
    """Pack a folder of slices as a cohort: sequences, manifest, report and checksums in `packed/`.

    Studies that are packed already are left as they are, while their files are the same.

    Args:
        folder: `data/<cohort>`.
        slices: folder of the slices.
        count: T that every sequence has; None: as many as most have.
        only: studies that are packed; tables keep what they hold of the others. None: all.

    Returns:
        The report, as of `pack_cohort`: a vertebra whose slices are missing or cannot be used is named.

    Raises:
        FileNotFoundError: there are no slices.
        ValueError: see `find_slices`; or a study that is asked for is not there, or `packed/` is a link out
            of the folder.
        FileExistsError: `packed/` holds sequences that were made elsewhere.
        BlockingIOError: another process packs this cohort.
    """
    found, packed = find_slices(slices), paths.inside(folder / "packed")
    if gone := {*(only or ())} - {*found}:
        raise ValueError(f"No slices in {slices} of {listing(sorted(gone))}. Check the names.")
    lengths = pd.Series([len(its) for study in found.values() for its in study.values()])
    count = count or int(lengths.mode().max())
    first = min(min(its) for study in found.values() for its in study.values())
    chosen = {uid: its for uid, its in found.items() if only is None or uid in only}
    with paths.exclusive(folder / ".packing.lock", f"packing {folder.name}"):
        settings = {"config": None, "slices": count, "scheme": "slices", "packer": SLICES_VERSION}
        others = begin(packed, None, chosen, {*found} - {*chosen}, settings)
        records = list(_records(chosen, packed, range(first, first + count)))
        report = write_tables(records, others, settings, packed)
    return report


def _records(chosen: Slices, packed: Path, places: range) -> Iterator[dict[str, Any]]:
    for uid, its in tqdm(chosen.items(), desc=f"packing {packed.parent.name}", unit="study", mininterval=1):
        record = _pack(uid, its, packed, places)
        if not record["rows"]:
            why = "; ".join(f"{name}: {text}" for name, text in record["problems"].items())
            record = {"uid": uid, "rows": [], "boxes": [], "files": {}, "error": why}
        yield record


def _pack(uid: str, its: Mapping[str, Mapping[int, Path]], packed: Path, places: range) -> dict[str, Any]:
    """A study's record; its sequences are written, unless that is done."""
    sums = {name: {t: sha256_of(path) for t, path in sorted(files.items())} for name, files in its.items()}
    key = content_sha256({"slices": sums, "places": list(places), "packer": SLICES_VERSION})
    done = read_study(packed, uid)
    if done and done["key"] == key and is_unchanged(done, packed):
        return done
    forget(packed, uid)
    rows, files = [], {}
    problems = {name: "no slices" for name in VERTEBRAE if name not in its}
    for name in (name for name in VERTEBRAE if name in its):
        try:
            array = _stack(its[name], places)
            path = write_sequence(packed, uid, name, array)
        except ValueError as error:
            problems[name] = str(error)
            continue
        files[path.name] = sha256_of(path)
        source = hashlib.sha256("".join(sums[name].values()).encode()).hexdigest()
        soft = not np.isin(array[..., MASK], (0, array[..., MASK].max())).all()
        warnings = f"{UNKNOWN}; {SOFT}" if soft else UNKNOWN
        known = {UID: uid, "vertebra": name, "source_sha256": source, "packer": SLICES_VERSION}
        columns = (*MANIFEST_COLUMNS, *PROVENANCE_COLUMNS)
        rows.append(dict.fromkeys(columns) | known | {"warnings": warnings})
    record = {"format": FORMAT, "key": key, "uid": uid, "rows": rows, "boxes": [], "files": files}
    record |= {"problems": problems, "notes": [], "grid": None, "crops": None}
    if rows:
        write_sealed(record_path(packed, uid), record)
    return record


def _stack(files: Mapping[int, Path], places: range) -> np.ndarray:
    """One sequence (T, H, W, 6) uint8 of its slices.

    Raises:
        ValueError: slices are missing or too many, cannot be read, differ, or hold other values; says which.
    """
    if gone := [t for t in places if t not in files]:
        raise ValueError(f"slices {listing(gone)} are missing of {len(places)}")
    if more := [t for t in files if t not in places]:
        raise ValueError(f"slices {listing(more)} are more than the {len(places)} of other vertebrae")
    arrays: list[np.ndarray] = []
    for t in places:
        name = files[t].name
        try:
            array = np.load(files[t], allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{name} is no whole .npy file ({error})") from None
        if array.ndim != 3 or array.shape[2] != CHANNELS or min(array.shape) < 1:
            raise ValueError(f"{name} has shape {array.shape}, expected (H, W, {CHANNELS})")
        if arrays and (array.shape, array.dtype) != (arrays[0].shape, arrays[0].dtype):
            was = f"{arrays[0].shape} of {arrays[0].dtype}"
            raise ValueError(f"{name} is {array.shape} of {array.dtype}, the slices before are {was}")
        arrays.append(array)
    return _values(np.stack(arrays))


def _values(stack: np.ndarray) -> np.ndarray:
    """Whole values from 0 to 255 as uint8, or floats in [0, 1] as they are; anything else is refused."""
    if stack.dtype.kind not in "uif":
        raise ValueError(f"values are {stack.dtype}, expected numbers")
    low, high = float(stack.min()), float(stack.max())
    if not (low >= 0 and high <= 255):  # NaN compares false
        raise ValueError(f"values from {low:g} to {high:g}, expected 0 to 255, or 0 to 1")
    if low == high:
        raise ValueError(f"all of its values are {low:g}: a crop that failed")
    if stack.dtype.kind == "f":
        if high <= 1:
            return stack
        if (stack % 1 != 0).any():
            raise ValueError(f"broken values up to {high:g}, expected whole ones to 255, or 0 to 1")
    return stack.astype(np.uint8)
