"""A file of records that grows line by line: after a stop at any moment, whole records are left."""

import json
import zlib
from pathlib import Path
from typing import Any

from cspine_helpers.paths import check_own
from cspine_helpers.records import parse_json


def append(path: Path, records: list[Any]) -> None:
    """Add the last of these records, of plain JSON values, to the file; where there is none yet, all of them.

    Raises:
        OSError: it cannot be written, for instance to a full disk.
        ValueError: it is a link, see `paths.check_own`.
    """
    check_own(path)
    first = len(records) - 1 if path.exists() else 0
    lines = b"".join(_line(number, record) for number, record in enumerate(records[first:], start=first))
    try:
        with path.open("ab") as file:
            file.write(lines)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path} could not be written ({error.strerror}). Mend that and go on: its records are kept.",
        ) from error


def whole_records(path: Path) -> list[Any]:
    """The records of the file; none where there is no file.

    A line that is torn, garbled or out of place ends them. It and what follows are cut off, so that nothing
    needs to be synced to disk.

    Raises:
        ValueError: it is a link, see `paths.check_own`.
    """
    check_own(path)
    if not path.exists():
        return []
    records, end = [], 0
    with path.open("r+b") as file:
        for number, line in enumerate(file):
            text = line[9:-1]
            if line != _signed(number, text):
                break
            records.append(parse_json(text, str(path), remedy="Delete it."))
            end += len(line)
        file.truncate(end)
    if not records:
        path.unlink()
    return records


def _line(number: int, record: Any) -> bytes:
    return _signed(number, json.dumps(record).encode())


def _signed(number: int, text: bytes) -> bytes:
    """A line: its checksum, into which its number goes, and its text."""
    return b"%08x %s\n" % (zlib.crc32(text, number), text)
