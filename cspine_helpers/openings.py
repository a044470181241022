"""What a run's test split was opened with, and when: `test_openings.csv`.

It has a row for each decision and predictions that the test split was opened with, dated when that was
first done. Doing the same again tells nothing new and adds no row, so that notebooks that run again leave
every file as it is.
"""

from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from cspine_helpers.paths import inside
from cspine_helpers.tables import read_table, write_table

OPENINGS = "test_openings.csv"
COLUMNS = ("opened_utc", "decision_sha256", "predictions_sha256", "level", "objective")


def now_utc() -> str:
    """Date and time in UTC, to the second, as ISO 8601 writes them."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_openings(run_folder: str | Path) -> pd.DataFrame:
    """Every first opening of the test split, with `COLUMNS`, in order; no rows where it never was opened.

    Raises:
        ValueError: the file is not the one that was written, or no such table, or a link out of the folder.
    """
    path = inside(Path(run_folder) / OPENINGS)
    if not path.is_file():
        return pd.DataFrame({name: pd.Series(dtype=str) for name in COLUMNS})
    return read_table(path, COLUMNS, what="record of openings", source="", text=COLUMNS)


def record_opening(
    run_folder: str | Path, *, decision_sha256: str, predictions_sha256: str, level: str, objective: str
) -> None:
    """Add a row, with its SHA-256 beside the file, unless this decision and these predictions have one.

    Raises:
        OSError: it cannot be written.
        ValueError: see `read_openings`.
    """
    known = read_openings(run_folder)
    same = (known["decision_sha256"] == decision_sha256) & (known["predictions_sha256"] == predictions_sha256)
    if same.any():
        return
    row = (now_utc(), decision_sha256, predictions_sha256, level, objective)
    new = pd.DataFrame([row], columns=list(COLUMNS))
    write_table(pd.concat([known, new], ignore_index=True), Path(run_folder) / OPENINGS, sealed=True)
