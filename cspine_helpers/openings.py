"""What a run's test split was opened with, and when: `test_openings.csv`.

It has a row for each decision and predictions that the test split was opened with, dated when that was
first done. Doing the same again tells nothing new and adds no row, so that notebooks that run again leave
every file as it is.

Each row ends with the SHA-256 of itself and of the row before, so that a row changed, left out or put in is
noticed, and one file is all that can be right or wrong. Rows cut off at the end, an older file, or none, are
noticed by `decision.json`, which remembers how many there were (`memory`). A file with more rows than are
remembered is one whose writer was stopped before it could say so: they count. Who deletes both files leaves
no trace in the folder; version control keeps one.
"""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from cspine_helpers.paths import atomic_path, inside, seal_of
from cspine_helpers.records import SEAL, content_sha256
from cspine_helpers.tables import read_table

OPENINGS = "test_openings.csv"
COLUMNS = ("opened_utc", "decision_sha256", "predictions_sha256", "level", "objective")
CHAIN = "chain_sha256"
DECISION = "decision.json"  # owned by `frozen`; what it remembers of openings stands under MEMORY
MEMORY = "openings"

Row = tuple[str, ...]


def now_utc() -> str:
    """Date and time in UTC, to the second, as ISO 8601 writes them."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_openings(run_folder: str | Path, *, whatever_is_left: bool = False) -> pd.DataFrame:
    """Every first opening of the test split, with `COLUMNS`, in order; no rows where it never was opened.

    Args:
        run_folder: `checkpoints/<run>`.
        whatever_is_left: take the file as it is, also where `decision.json` remembers rows that it lacks.

    Raises:
        ValueError: the file is not the one that was written, was deleted or is an older one, is no such
            table, or a link out of the folder.
    """
    folder = Path(run_folder)
    rows, known = _rows(folder), _remembered(folder)
    chain = ["", *_chain(rows)]
    if not whatever_is_left and chain[min(known["rows"], len(rows))] != known["last_sha256"]:
        raise ValueError(
            f"{folder / OPENINGS} has {len(rows)} row(s), and not the {known['rows']} that {DECISION} "
            "remembers: it was deleted, cut off, or is of another time. Bring it back. If it is lost for "
            f"good, freeze(..., replace=True) starts another, and {DECISION} says how many were lost."
        )
    return pd.DataFrame(rows, columns=list(COLUMNS), dtype=str)


def record_opening(
    run_folder: str | Path, *, decision_sha256: str, predictions_sha256: str, level: str, objective: str
) -> None:
    """Add a row, unless this decision and these predictions have one.

    Raises:
        OSError: it cannot be written.
        ValueError: see `read_openings`.
    """
    known, path = read_openings(run_folder), Path(run_folder) / OPENINGS
    same = (known["decision_sha256"] == decision_sha256) & (known["predictions_sha256"] == predictions_sha256)
    if same.any():
        return
    rows = [*_rows(path.parent), (now_utc(), decision_sha256, predictions_sha256, level, objective)]
    with atomic_path(path) as temporary:
        temporary.write_text(_written(rows), encoding="utf-8", newline="\n")
    seal_of(path).unlink(missing_ok=True)  # of the format before, which had its hash in a second file


def memory(run_folder: str | Path) -> dict[str, Any]:
    """What `decision.json` is to remember: rows on file, the last one's hash, and how many were lost."""
    rows, known = _rows(Path(run_folder)), _remembered(Path(run_folder))
    chain = ["", *_chain(rows)]
    kept = chain[min(known["rows"], len(rows))] == known["last_sha256"]
    lost = known["lost"] + (0 if kept else max(known["rows"] - len(rows), 1))
    return {"rows": len(rows), "last_sha256": chain[-1], "lost": lost}


def _rows(folder: Path) -> list[Row]:
    """What the file holds, whatever is remembered."""
    path = inside(folder / OPENINGS)
    if not path.is_file():
        if seal_of(path).is_file():
            raise ValueError(
                f"{path} was deleted: its SHA-256 is still there, {seal_of(path).name}. Bring it back."
            )
        return []
    content = path.read_bytes()
    head, *lines = content.decode(errors="replace").split("\n")[:-1] or [""]
    if head == ",".join(COLUMNS) and seal_of(path).is_file():  # the format before
        table = read_table(path, COLUMNS, what="record of openings", source="", text=COLUMNS)
        return list(table.itertuples(index=False, name=None))
    rows = [tuple(line.split(",")[: len(COLUMNS)]) for line in lines]
    if _written(rows).encode() != content:
        raise ValueError(
            f"{path} is not the file that was written: its rows and their {CHAIN} do not belong together. "
            "Bring the old file back."
        )
    return rows


def _chain(rows: list[Row]) -> list[str]:
    """SHA-256 of each row and of the hash before."""
    found = [""]
    for row in rows:
        found.append(hashlib.sha256(",".join((found[-1], *row)).encode()).hexdigest())
    return found[1:]


def _written(rows: list[Row]) -> str:
    lines = [(*COLUMNS, CHAIN), *((*row, link) for row, link in zip(rows, _chain(rows), strict=True))]
    return "".join(",".join(line) + "\n" for line in lines)


def _remembered(folder: Path) -> dict[str, Any]:
    """What `decision.json` remembers; nothing where it cannot be read, which its own reader says."""
    nothing = {"rows": 0, "last_sha256": "", "lost": 0}
    try:
        record = json.loads((folder / DECISION).read_bytes())
        whole = record.get(SEAL) == content_sha256(record)
    except (OSError, ValueError, AttributeError, RecursionError):
        return nothing
    return record.get(MEMORY, nothing) if whole else nothing
