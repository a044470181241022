"""`manifest.csv` of a `packed` folder: where each sequence came from, which slices are fractured."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.paths import listing
from cspine_helpers.tables import read_table, refuse, require_columns, uid_problems, write_table

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
# Where a sequence was packed from. A manifest has all of these columns, or none (the built-in cohort's).
PROVENANCE_COLUMNS = ("completeness", "source_sha256", "mask", "mask_sha256", "packer", "warnings")


def write_manifest(table: pd.DataFrame, folder: str | Path) -> Path:
    """Write `manifest.csv`, one row a sequence, with its SHA-256 beside it, into the `packed` folder.

    Returns:
        Its path.
    """
    path = Path(folder) / "manifest.csv"
    write_table(_validate_manifest(table, path), path, sealed=True)
    return path


def read_manifest(folder: str | Path) -> pd.DataFrame:
    """Read `manifest.csv` from a `packed` folder.

    Returns:
        `MANIFEST_COLUMNS`: voxel spacing of the volume, first and last slice position, side of a packed
        pixel, mask volume, HU window, and `slice_truth`: T characters, `.` an intact slice, `x` a
        fractured one, missing where nobody knows. Then, where the manifest has them,
        `PROVENANCE_COLUMNS`: share of the vertebra in the picture, SHA-256 of the CT's files, name and
        SHA-256 of the mask, the packer's version, and what it warned of ("" of nothing).

    Raises:
        FileNotFoundError: there is none.
        ValueError: it does not keep to the schema.
    """
    path = Path(folder) / "manifest.csv"
    source = "Pack the cohort (notebook 00; the built-in one: make cohort)."
    text = (UID, "vertebra", "slice_truth", *PROVENANCE_COLUMNS[1:])
    table = read_table(
        path, MANIFEST_COLUMNS, what="manifest", source=source, text=text, optional=PROVENANCE_COLUMNS
    )
    return _validate_manifest(table, path)


def _validate_manifest(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    require_columns(table, MANIFEST_COLUMNS, what=str(path))
    columns = list(MANIFEST_COLUMNS)
    if not set(PROVENANCE_COLUMNS).isdisjoint(table.columns):
        require_columns(table, PROVENANCE_COLUMNS, what=str(path))
        columns += PROVENANCE_COLUMNS
        table = table.assign(warnings=table["warnings"].fillna(""))
    refuse(_manifest_problems(table), what=str(path))
    return table[columns].reset_index(drop=True)


def _manifest_problems(table: pd.DataFrame) -> Iterator[str]:
    if table.empty:  # of a cohort whose studies all failed; its columns have no type
        return
    yield from uid_problems(table[UID])
    numbers = table[[c for c in (*MANIFEST_COLUMNS[2:-1], "completeness") if c in table.columns]]
    if text := [column for column in numbers if numbers[column].dtype.kind not in "fiu"]:
        yield f"text in the number columns {listing(text)}"
    numbers = numbers.drop(columns=text)
    truth = table["slice_truth"].fillna(".").astype(str)  # missing where nobody knows
    hashes = table[[column for column in PROVENANCE_COLUMNS if column in table and "sha256" in column]]
    good = hashes.apply(lambda column: column.astype(str).str.fullmatch("[0-9a-f]{64}"))
    for what, bad in (
        ("vertebrae that are none of C1 … C7", ~table["vertebra"].isin(VERTEBRAE)),
        ("sequences that stand there twice", table.duplicated([UID, "vertebra"])),
        ("numbers that are missing or infinite", ~np.isfinite(numbers).all(axis=1)),
        ("sizes that are not above 0", (numbers.filter(regex="^(spacing|pixel|mask)") <= 0).any(axis=1)),
        (
            "a completeness that is not in [0, 1]",
            (numbers.filter(like="completeness") - 0.5).abs().gt(0.5).any(axis=1),
        ),
        ("what is no SHA-256", ~good.all(axis=1)),
        ("slice truths that are not made of '.' and 'x'", ~truth.str.fullmatch("[.x]+")),
    ):
        if bad.any():
            rows = table[bad]
            names = (f"{uid} {level}" for uid, level in zip(rows[UID], rows["vertebra"], strict=True))
            yield f"{what} ({bad.sum()}): {listing(names)}"


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
