"""CSV files: read strictly, written in one step, and what is wrong with them said all at once."""

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd

from cspine_helpers.paths import atomic_path, check_seal, check_uids, listing, seal_of, sha256_of


def read_table(
    path: str | Path,
    columns: Sequence[str],
    *,
    what: str,
    source: str,
    text: Sequence[str],
    optional: Sequence[str] = (),
) -> pd.DataFrame:
    """A CSV file's `columns`, those in `text` as text (pandas would read a study UID '1.2' as a number).

    Then the `optional` ones that it has. Only an empty cell is a missing value. A file with its SHA-256
    beside it (`paths.seal_of`) is checked against that. `what` it is and its `source` are for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no whole comma-separated table, not the file that was sealed, or columns are missing
            or stand there twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No {what} at {path}. {source}")
    content = path.read_bytes()
    check_seal(path, content)
    try:
        content.decode()
        table = pd.read_csv(
            io.BytesIO(content),
            dtype=dict.fromkeys(text, str),
            encoding="utf-8-sig",
            keep_default_na=False,
            na_values=[""],
            low_memory=False,
        )
        _check_whole(content, table)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path.name}: line {line} is not UTF-8 text. Save it in that encoding.") from error
    except ValueError as error:  # also pandas' own
        raise ValueError(f"{path.name} is no comma-separated {what}: {error}") from error
    require_columns(table, columns, what=path.name)
    return table[[*columns, *(column for column in optional if column in table.columns)]]


def _check_whole(content: bytes, table: pd.DataFrame) -> None:
    """Refuse what pandas shifts, fills up, reads past or converts."""
    if not isinstance(table.index, pd.RangeIndex):
        raise ValueError("rows hold more values than the header has columns. Mend them.")
    commas = table.shape[1] - 1
    if content.count(b",") < (len(table) + 1) * commas:  # commas inside quotes can only add to them
        lines = enumerate(content.splitlines(), start=1)
        short = next(number for number, line in lines if line.strip(b" \t") and line.count(b",") < commas)
        raise ValueError(f"rows hold fewer values than the header has columns (line {short}). Mend them.")
    if not content.endswith((b"\n", b"\r")):
        raise ValueError("its last line has no end: it may be cut off. If it is whole, add a line break.")
    if logical := [name for name in table.columns if table[name].dtype == bool]:
        raise ValueError(f"the columns {listing(logical)} hold True or False. Write 1 or 0.")


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
            seal.write_text(f"{sha256_of(temporary)}  {path.name}\n", encoding="utf-8")


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


def refuse(problems: Iterable[str], *, what: str) -> None:
    """Do nothing where there are no `problems`.

    Raises:
        ValueError: one that lists them all.
    """
    if found := list(problems):
        lines = "\n".join(f"- {problem}" for problem in found)
        raise ValueError(f"{what} is refused. Correct it and read it again:\n{lines}")


def uid_problems(uids: pd.Series) -> Iterator[str]:
    """The sentence of `paths.check_uids` about bad UIDs, if there are any."""
    try:
        check_uids(uids.tolist())
    except ValueError as error:
        yield str(error)


def is_binary(column: pd.Series) -> np.ndarray:
    """Which values are the number 0 or 1 (bool mask); text, 0.5 and missing values are not."""
    return numbers(column).isin((0, 1)).to_numpy()


def numbers(column: pd.Series) -> pd.Series:
    """The values of a column as numbers, NaN where one is none."""
    if pd.api.types.is_numeric_dtype(column):
        return column
    return pd.to_numeric(column.astype(str), errors="coerce")  # as text: integers too long for a float raise
