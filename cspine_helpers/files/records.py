"""Records: JSON files that hold their own SHA-256, so a change by hand is noticed, as `run.json`.

A file of records that grows line by line: after a stop at any moment, whole records are left.

Settings of a config: held to their rules, made from JSON, and compared.
"""

import hashlib
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from cspine_helpers import __version__
from cspine_helpers.files.paths import atomic_path, check_own, inside, listing

SEAL = "record_sha256"
Config = TypeVar("Config")


def write_sealed(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Write a record in one step; `"record_sha256"` is added, or corrected where it is. Returns the path.

    Raises:
        ValueError: the record holds NaN or infinity, which JSON does not have, or no plain value; names each.
    """
    path, numbers = Path(path), _not_finite(content)
    if numbers:
        raise ValueError(f"A record has no NaN or infinity; found at {listing(numbers)}. Leave them out.")
    whole = {**content, SEAL: content_sha256(content)}
    text = json.dumps(whole, indent=2, default=_plain, ensure_ascii=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def content_sha256(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record's content without this hash, whatever the order of its keys."""
    rest = {key: value for key, value in record.items() if key != SEAL}
    plain = json.loads(json.dumps(rest, default=_plain))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def parse_json(text: str | bytes, what: str, *, remedy: str = "Correct it.") -> Any:
    """What a JSON text holds.

    Args:
        text: of a file.
        what: the file, for the error.
        remedy: the error's last sentence.

    Raises:
        ValueError: it is not JSON in UTF-8, an object names something twice, or it is nested deeper than
            Python reads.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        why = "nested too deep"
    except ValueError as error:
        why = str(error)
    raise ValueError(f"{what} is not JSON ({why}). {remedy}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, of which Python would keep the last of two values of one name, and say nothing."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = Counter(name for name, _ in pairs)
        raise ValueError(f"named twice: {listing(name for name, n in names.items() if n > 1)}")
    return found


def read_sealed(
    path: str | Path, *, version: int | tuple[int, ...], missing: str, again: str, writer: str
) -> dict[str, Any]:
    """Read a record.

    Args:
        path: the file.
        version: the `"format"` that it must have, or one of several; the first is what is written today.
        missing: the error's text where there is no such file.
        again: how to make it again, for the error messages: "train again".
        writer: the call that writes such a record, for a change that is meant.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, of another format than this version of the package reads, not as it was
            written, or a link out of the folder.
    """
    path = inside(Path(path))
    if not path.is_file():
        raise FileNotFoundError(missing)
    record = parse_json(path.read_bytes(), str(path), remedy=f"Restore it, or {again}.")
    found = record.get("format") if isinstance(record, dict) else None
    versions = (version,) if isinstance(version, int) else version
    if found not in versions:
        raise ValueError(
            f"{path} is of format {found!r}; this version reads format {versions[0]}. {written_by(record)} "
            f"Read it with the version that wrote it, or {again}."
        )
    try:
        sealed = record.get(SEAL) == content_sha256(record)
    except RecursionError:  # as deep as Python just reads, and no deeper
        sealed = False
    if not sealed:
        raise ValueError(
            f"{path} is not the record that was written: its content has another SHA-256 than it says "
            f"({SEAL}). Restore it, or {again}. A change that is meant goes through {writer}."
        )
    return record


def written_by(record: object) -> str:
    """A sentence that says which version of the package wrote a record, and which this is."""
    versions = record.get("versions") if isinstance(record, dict) else None
    found = versions.get("cspine_helpers") if isinstance(versions, dict) else None
    return f"It was written by cspine_helpers {found or 'of an unknown version'}; this is {__version__}."


def _plain(value: Any) -> Any:  # what json hands over
    """NumPy numbers as Python's; anything else is refused by its name."""
    if hasattr(value, "item"):
        return value.item()
    raise ValueError(f"A record holds plain values; found {type(value).__name__} {value!r}.")


def _not_finite(value: Any, place: str = "record") -> list[str]:
    """Places of numbers that JSON cannot hold."""
    if isinstance(value, Mapping):
        return [found for key, item in value.items() for found in _not_finite(item, f"{place}.{key}")]
    if isinstance(value, list | tuple):
        return [found for i, item in enumerate(value) for found in _not_finite(item, f"{place}[{i}]")]
    return [] if not isinstance(value, float) or math.isfinite(value) else [place]


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
            f"{path} could not be written ({error.strerror}). Mend that and continue: its records are kept.",
        ) from error


def whole_records(path: Path) -> list[Any]:
    """The records of the file; none where there is no file.

    A line that is torn, garbled or out of place ends them. It and what follows are cut off, so nothing needs
    to be synced to disk.

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


@dataclass(frozen=True)
class Check:
    """What a setting may be: in words for an error, and as a test."""

    words: str
    holds: Callable[[Any], bool]


def whole(least: int, most: int | None = None) -> Check:
    """A whole number from `least` to `most`, or any from `least`."""
    words = f"a whole number, {least} {'or more' if most is None else f'to {most}'}"
    return Check(words, lambda n: type(n) is int and least <= n and (most is None or n <= most))


def within(interval: str) -> Check:
    """A number in an interval such as "(0, 1]" or "[0, inf)"."""
    low, high = map(float, interval[1:-1].split(","))

    def holds(x: Any) -> bool:
        ends = (interval[0] == "[" and x == low) or (interval[-1] == "]" and x == high)
        return isinstance(x, int | float) and not isinstance(x, bool) and (low < x < high or ends)

    return Check(f"in {interval}", holds)


def one_of(*choices: Any) -> Check:
    """One of a few values."""
    return Check(f"one of {', '.join(map(str, choices))}", choices.__contains__)


def optional(check: Check) -> Check:
    """What the check allows, or None."""
    return Check(f"{check.words}, or none", lambda value: value is None or check.holds(value))


TRUE_OR_FALSE = Check("true or false", lambda value: isinstance(value, bool))


def setting(default: Any, check: Check) -> Any:
    """A field of a config, with its default and the rule that `check_settings` holds it to."""
    return field(default=default, metadata={"check": check})


def check_settings(config: Any) -> None:
    """Hold the settings of a config, a dataclass, to their checks.

    Raises:
        ValueError: names every setting that is not as it must be.
    """
    if wrong := _wrong(type(config), vars(config)):
        raise ValueError(f"{type(config).__name__} cannot have {'; '.join(wrong)}. Correct them.")


def _wrong(kind: type, values: Mapping[str, Any]) -> list[str]:
    """The values that break the check of their field."""
    checks = {each.name: each.metadata["check"] for each in fields(kind) if "check" in each.metadata}
    return [
        f"{name} = {listing([value])} ({checks[name].words})"
        for name, value in values.items()
        if name in checks and not checks[name].holds(value)
    ]


def config_of(
    kind: type[Config], found: Any, *, whole: bool = False, base: Config | None = None, what: str = ""
) -> Config:
    """A config from the JSON of its fields.

    Args:
        kind: its class, whose checks take values as JSON has them.
        found: name → value.
        whole: refuse what lacks a field.
        base: a config that has what is not in `found`; None: the defaults.
        what: the config, for errors; its class without that.

    Raises:
        ValueError: fields are unknown or missing, or values are not as they must be; names each, and for an
            unknown one the nearest that there is.
    """
    what = what or kind.__name__
    if not isinstance(found, dict):
        raise ValueError(f"{what} is made of names and values; found {listing([found])}.")
    known = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    problems = [f"{name} is unknown{nearest(name, known)}" for name in found if name not in known]
    problems += [f"{name} is missing" for name in known if whole and name not in found]
    wrong = [f"cannot have {line}" for line in _wrong(kind, found)]
    if problems or wrong:
        named = listing([*problems, *wrong], separator="; ", quoted=False)
        raise ValueError(f"{what}{':' if problems else ''} {named}. Correct it.")
    return kind(**found) if base is None else replace(base, **found)  # type: ignore[type-var]


def nearest(name: str, known: Sequence[str]) -> str:
    """For an error: in brackets, the known name that is most like this one; all where none is like it."""
    like = get_close_matches(name, known, n=1)
    return f" (did you mean {like[0]}?)" if like else f" (known: {', '.join(known)})"


def differences(found: Any, wanted: Any, place: str = "") -> list[str]:
    """Where two nested dicts differ: "train.seed is 0, not 1", what was found first; None: nothing."""
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        return [] if found == wanted else [f"{place} is {found!r}, not {wanted!r}"]
    return [
        line
        for name in {**wanted, **found}
        for line in differences(found.get(name), wanted.get(name), f"{place}.{name}".lstrip("."))
    ]
