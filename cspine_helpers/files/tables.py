"""CSV files: read strictly, written in one step, and what is wrong with them said all at once."""

import codecs
import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from cspine_helpers.files.paths import atomic_path, check_seal, check_uids, listing, seal_of, sha256_of

_DECIMAL_COMMA = re.compile(rb"[;\n] *-?\d+,\d")
_SCIENTIFIC = re.compile(r"\d(\.\d+)?[eE]\+?\d+")


def read_columns(
    path: str | Path,
    columns: Sequence[str] = (),
    *,
    what: str,
    source: str,
    text: Sequence[str] | None = None,
) -> pd.DataFrame:
    """All columns of a CSV file as other programs write it.

    Separated by commas, tabs or semicolons, with a space after each, empty rows, UTF-8 or UTF-16 with a byte
    order mark. Only an empty cell is a missing value. A file with its SHA-256 beside it (`paths.seal_of`) is
    checked against that.

    Args:
        path: the file.
        columns: those that it needs.
        what: what it is, for messages.
        source: where to get it, for messages.
        text: columns to read as text (pandas would read a study id '1.20' as a number); None: all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no whole table, lacks columns, is not the file that was sealed, or has decimal
            commas.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No {what} at {path}. {source}")
    content = path.read_bytes()
    check_seal(path, content)
    content = utf8(content, path.name)
    try:
        separator = _separator(content)
        _, _, rest = content.partition(b"\n")
        # a space after each of them is somebody's style, after one of them it is damage
        spaces = separator in rest and rest.count(separator) == rest.count(separator + b" ")
        table = pd.read_csv(
            io.BytesIO(content),
            sep=separator.decode(),
            dtype=str if text is None else dict.fromkeys(text, str),
            skipinitialspace=spaces,
            keep_default_na=False,
            na_values=[""],
            low_memory=False,
        )
        _check_whole(content, table, separator)
    except ValueError as error:  # also pandas' own
        raise ValueError(f"{path.name} is no comma-separated {what}: {error}") from error
    table.columns = table.columns.str.strip()
    require_columns(table, columns, what=path.name)
    return table.dropna(how="all").reset_index(drop=True)


def utf8(content: bytes, name: str) -> bytes:
    """The text in UTF-8, without a byte order mark."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return content.decode("utf-16").encode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is no whole UTF-16 text ({error}). Save it as UTF-8.") from error
    if b"\0" in content:
        raise ValueError(f"{name} holds zero bytes, as UTF-16 without its mark does. Save it as UTF-8.")
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{name}: line {line} is not UTF-8 text. Save it in that encoding.") from error
    return content.removeprefix(codecs.BOM_UTF8)


def _separator(content: bytes) -> bytes:
    """What separates the values, by the header: a comma, a tab or a semicolon."""
    header = content.split(b"\n", 1)[0]
    separator = max((b",", b"\t", b";"), key=header.count)  # the first, a comma, where there is none
    if separator == b";" and _DECIMAL_COMMA.search(content):
        raise ValueError(
            "values are separated by semicolons, and decimals by commas. Save it with commas between values "
            "and decimal points, or read it with pd.read_csv(path, sep=';', decimal=',', dtype={'uid': str}) "
            "and hand over the table."
        )
    return separator


def _check_whole(content: bytes, table: pd.DataFrame, separator: bytes) -> None:
    """Refuse what pandas shifts, fills up, reads past or converts."""
    if not isinstance(table.index, pd.RangeIndex):
        raise ValueError("rows hold more values than the header has columns. Mend them.")
    commas = table.shape[1] - 1
    if b'"' in content or content.count(separator) < (len(table) + 1) * commas:
        rows = csv.reader(io.StringIO(content.decode(), newline=""), delimiter=separator.decode())
        short = next((rows.line_num for row in rows if any(map(str.strip, row)) and len(row) <= commas), None)
        if short is not None:
            raise ValueError(f"rows hold fewer values than the header has columns (line {short}). Mend them.")
    if not content.endswith((b"\n", b"\r")):
        raise ValueError("its last line has no end: it may be cut off. If it is whole, add a line break.")
    if logical := [name for name in table.columns if table[name].dtype == bool]:
        raise ValueError(f"the columns {listing(logical)} hold True or False. Write 1 or 0.")


def through_numbers(found: Iterable[str], known: Iterable[str]) -> str:
    """A sentence about study ids that a program has read as numbers (1.10 → 1.1, 7 → 7.0); else nothing.

    Args:
        found: ids of a table.
        known: ids of the label table.
    """
    known = set(known)
    strange = [uid for uid in dict.fromkeys(found) if uid not in known]
    values = {_value(uid): uid for uid in known}
    values.pop(None, None)
    pairs = {uid: values.get(_value(uid)) for uid in strange if _value(uid) is not None}
    pairs = {uid: was for uid, was in pairs.items() if was is not None or _SCIENTIFIC.fullmatch(uid)}
    if not pairs:
        return ""
    named = listing(f"{uid} for {was}" if was else f"{uid} for an unknown id" for uid, was in pairs.items())
    return (
        f" Ids that were read as numbers on their way ({len(pairs)}): {named}. Export them again with the "
        "ids as text: dtype={'uid': str} in pandas, a text column in a spreadsheet."
    )


def _value(uid: str) -> float | None:
    """The number that a program would take an id for."""
    try:
        return float(uid)
    except ValueError:
        return None


def write_table(table: pd.DataFrame, path: str | Path, *, sealed: bool = False) -> None:
    """Write a CSV file in one step, the same bytes on every system; `sealed`: with its SHA-256 beside it.

    Both files are complete before either takes its place. After a stop between the two, the seal does not fit
    and the table is refused until it is written again.
    """
    path = Path(path)
    with ExitStack() as files:
        seal = files.enter_context(atomic_path(seal_of(path))) if sealed else None
        temporary = files.enter_context(atomic_path(path))
        table.to_csv(temporary, index=False, lineterminator="\n")
        if seal is not None:
            seal.write_text(_seal(temporary, path.name), encoding="utf-8")


def seal_table(path: str | Path) -> None:
    """Write the SHA-256 of a file beside it, as `sha256sum --check` reads it."""
    with atomic_path(seal_of(path)) as seal:
        seal.write_text(_seal(path, Path(path).name), encoding="utf-8")


def _seal(path: str | Path, name: str) -> str:
    return f"{sha256_of(path)}  {name}\n"


def require_columns(table: pd.DataFrame, columns: Sequence[str], *, what: str) -> None:
    """Refuse a table that lacks one of `columns` or holds one of them twice.

    Raises:
        ValueError: names every such column, and the delimiter where that looks like the cause.
    """
    found = list(table.columns)
    if missing := [column for column in columns if column not in found]:
        cause = " With one column only: are the values separated by commas?" if len(found) == 1 else ""
        raise ValueError(
            f"{what} lacks the column(s) {listing(missing)}; found {listing(found)}. "
            f"It needs {', '.join(columns)}.{cause}"
        )
    # pandas renames a second 'C1' in a file to 'C1.1'
    if twice := [column for column in columns if found.count(column) > 1 or f"{column}.1" in found]:
        raise ValueError(f"{what} holds the column(s) {listing(twice)} twice. Keep one of each.")


@dataclass(frozen=True)
class Column:
    """What one column of a table may hold.

    Attributes:
        name: its header.
        kind: "id" (a study's, see `paths.check_uids`), "text", "number" (finite), or "whole" (number).
        low, high: the smallest and the largest number allowed.
        above: a number that all are larger than.
        among: the only values allowed.
        pattern: regular expression that text matches from end to end.
        optional: whether a table may lack the column.
        empty: whether cells may be empty.
        wrong: what an error calls cells that break this; made from the above where it is not given. Columns
            of the same `wrong` are named together.
    """

    name: str
    kind: Literal["id", "text", "number", "whole"] = "text"
    low: float = -np.inf
    high: float = np.inf
    above: float = -np.inf
    among: Sequence[object] = ()
    pattern: str = ""
    optional: bool = False
    empty: bool = False
    wrong: str = ""

    @property
    def _broken(self) -> str:
        """What an error calls cells that break the rule."""
        limits = (("above", self.above), ("from", self.low), ("to", self.high))
        if self.wrong:
            return self.wrong
        if self.among:
            return f"values that are none of {', '.join(map(str, self.among))}"
        if self.kind in ("number", "whole"):
            kind = "whole" if self.kind == "whole" else "finite"
            range_ = "".join(f" {word} {limit:g}" for word, limit in limits if np.isfinite(limit))
            return f"values that are not {kind} numbers{range_}"
        return f"values that are not like {self.pattern}" if self.pattern else "cells without text"

    def _read(self, cells: pd.Series) -> tuple[pd.Series, pd.Series]:
        """The cells, numbers as floats, missing where they break the rule; and which cells do."""
        values, text = cells, cells.astype(str)
        if self.kind in ("number", "whole"):
            values = numbers(cells).astype(float)
            good = values.between(self.low, self.high) & (values > self.above) & (values < np.inf)
            if self.kind == "whole":
                good &= (values % 1 == 0) & (values.abs() <= 2**53)  # beyond, floats skip whole numbers
        elif self.pattern:
            good = text.str.fullmatch(self.pattern).astype(bool)
        else:
            good = cells.notna() & (text.str.strip() != "")
        if self.among:
            good &= values.isin(self.among)
        if self.empty:
            good |= cells.isna()
        return values.where(good), ~good


def checked(
    table: pd.DataFrame,
    columns: Sequence[Column],
    *,
    what: str,
    key: Sequence[str],
    unique: bool = True,
    may_be_empty: bool = False,
    rules: Callable[[pd.DataFrame], Iterable[str | tuple[str, pd.Series]]] = lambda values: (),
) -> pd.DataFrame:
    """The table's `columns`, in their order and types, where every cell and row keeps the rules.

    Args:
        table: from a file or made in memory; other columns than these are dropped.
        columns: what each may hold.
        what: what the table is, for the error.
        key: columns that name a row.
        unique: whether no two rows may have the same key.
        may_be_empty: whether a table without rows passes.
        rules: about several columns or rows. Gets the table, with numbers as floats and missing values where
            a cell broke its column's rule; returns sentences, or pairs of what is wrong and in which rows.

    Returns:
        Text as str, "number" as float64, "whole" as int64 (float64 where cells may be empty), new index.

    Raises:
        ValueError: lists all violated rules at once, each with its number of offenders and the first ten.
    """
    # 1. The columns and rows are there.
    columns = [column for column in columns if not column.optional or column.name in table.columns]
    names = [column.name for column in columns]
    require_columns(table, names, what=what)
    if table.empty and not may_be_empty:
        raise ValueError(f"{what} has no rows. It needs one or more.")
    table = table[names].reset_index(drop=True)

    def named(rows: np.ndarray | pd.Series) -> list[str]:
        return [" ".join(map(str, row)) for row in table[list(key)].to_numpy(dtype=object)[rows]]

    # 2. Each cell by itself; columns that break the same rule are named together.
    problems: list[str] = []
    values = table.copy()
    broken: dict[str, pd.DataFrame] = {}
    for column in columns:
        if column.kind == "id":
            try:
                check_uids(table[column.name].drop_duplicates().tolist())
            except ValueError as error:
                problems.append(str(error))
            continue
        values[column.name], bad = column._read(table[column.name])
        broken.setdefault(column._broken, pd.DataFrame(index=table.index))[column.name] = bad
    for wrong, cells in broken.items():
        rows, places = np.nonzero(cells.to_numpy(dtype=bool))
        offenders = named(rows)
        for n, name in enumerate(cells.columns[places]):
            shown = f" {name}" if cells.shape[1] > 1 else ""
            offenders[n] += "" if name in key else f"{shown}: {table[name].iloc[rows[n]]}"
        if offenders:
            problems.append(f"{wrong} ({len(offenders)}): {listing(offenders)}")

    # 3. Rows beside each other.
    again = ("rows that repeat " + " and ".join(key), table.duplicated(list(key)) & unique)
    for rule in (again, *rules(values)):
        if isinstance(rule, str):
            problems.append(rule)
        elif rule[1].any():
            problems.append(f"{rule[0]} ({rule[1].sum()}): {listing(dict.fromkeys(named(rule[1])))}")
    refuse(problems, what=what)

    # 4. Types.
    for column in columns:
        if column.kind in ("id", "text"):
            values[column.name] = table[column.name].astype("str")
        elif column.kind == "whole" and not column.empty:
            values[column.name] = values[column.name].astype("int64")
    return values


def refuse(problems: Iterable[str], *, what: str) -> None:
    """Do nothing where there are no `problems`.

    Raises:
        ValueError: one that lists them all.
    """
    if found := list(problems):
        lines = "\n".join(f"- {problem}" for problem in found)
        raise ValueError(f"{what} is refused. Correct it and read it again:\n{lines}")


def numbers(column: pd.Series) -> pd.Series:
    """The values of a column as real numbers, NaN where one is none."""
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_complex_dtype(column):
        return column
    return pd.to_numeric(column.astype(str), errors="coerce")  # as text: integers too long for a float raise
