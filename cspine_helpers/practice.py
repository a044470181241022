"""Freezing to try something out: in a copy of the built-in run, and with a way back.

What the built-in run says is committed, for others to hold theirs against. A threshold that was set by hand
on it is frozen in `checkpoints/practice` instead. Its `practice_of.sha256` says which predictions were copied
there, the latest last: by that it is known from a run that only has the same name.
"""

from pathlib import Path

from cspine_helpers.openings import DECISION, OPENINGS, read_openings
from cspine_helpers.paths import atomic_path, inside, listing, seal_of, sha256_of
from cspine_helpers.records import RECORD

BUILTIN, PRACTICE = "builtin", "practice"  # the run that comes with the project, and its copy to freeze in
PREDICTIONS = "predictions.csv"
MARKER = "practice_of.sha256"
_COPIED = (DECISION, OPENINGS, RECORD, seal_of(PREDICTIONS).name, PREDICTIONS)  # what counts comes last


def practice_folder(run_folder: str | Path) -> Path:
    """Where a threshold that was set by hand is frozen: in the run, but of the built-in run in a copy."""
    folder = Path(run_folder).resolve()
    return folder.with_name(PRACTICE) if folder.name == BUILTIN else Path(run_folder)


def frozen_upon(run_folder: str | Path) -> Path:
    """Folder whose decision, and openings, freezing would go on from; writes nothing.

    It is the `practice_folder`, but the run where a copy is still to be made, or made anew as the run has
    other predictions since.

    Raises:
        FileNotFoundError: the built-in run has no predictions.
        ValueError: what stands in the copy's place is no folder, or none of ours: it may not be written over.
    """
    folder, copy = Path(run_folder), practice_folder(run_folder)
    if copy == folder:
        return folder
    predictions, mine, marker = folder / PREDICTIONS, copy / PREDICTIONS, copy / MARKER
    if not predictions.is_file():
        raise FileNotFoundError(f"{predictions} is missing. Predict with the run (notebook 03), then freeze.")
    if copy.resolve() != copy or (copy.exists() and not copy.is_dir()):
        raise ValueError(
            f"Decisions that try out the built-in run are frozen in a copy of it, and {copy} is no folder of "
            "its own, but a link or a file. Rename it, and freeze again."
        )
    held = {path.name for path in copy.glob("[!.]*")}
    own = sorted(held - {*_COPIED, MARKER})
    known = inside(marker).read_text(encoding="utf-8").split() if marker.is_file() else []
    stands = inside(mine).is_file()
    ours = bool(known) and (not stands or sha256_of(mine) in known)
    if stands and mine.read_bytes() == predictions.read_bytes() and (ours or not own):
        return copy
    if not held or (ours and not own):
        return folder
    found = listing(own or sorted(held))
    raise ValueError(
        f"{PRACTICE!r} is where decisions that try out the built-in run are frozen, and {copy} is no copy "
        f"that may be written over: it holds {found}. Rename that folder, and freeze again."
    )


def practise(run_folder: str | Path) -> Path:
    """The `practice_folder`, with what a decision rests on: predictions, record, what is frozen, openings.

    A copy stays as it is, with what was frozen there, while its predictions are those of the run; else it is
    made anew.

    Raises:
        FileNotFoundError, ValueError: see `frozen_upon`.
        OSError: the copy cannot be written.
    """
    folder, copy = Path(run_folder), practice_folder(run_folder)
    if frozen_upon(folder) == copy:
        return copy
    marker = copy / MARKER  # written first: stopped at any moment, the copy is known as ours
    known = marker.read_text(encoding="utf-8") if marker.is_file() else ""
    with atomic_path(marker) as temporary:
        temporary.write_text(f"{known}{sha256_of(folder / PREDICTIONS)}\n", encoding="utf-8")
    for name in _COPIED:
        source, place = folder / name, inside(copy / name)
        if source.is_file():
            with atomic_path(place) as temporary:
                temporary.write_bytes(source.read_bytes())
        else:
            place.unlink(missing_ok=True)
    return copy


def put_back(run_folder: str | Path, before: bytes | None, *, after: bytes, openings: int) -> None:
    """Undo a freezing: `decision.json` as it was, unless something was done with the run since.

    Args:
        run_folder: `checkpoints/<run>`.
        before: what `decision.json` held; None: there was none.
        after: what it holds since the freezing.
        openings: how often the test split had been opened.

    Raises:
        ValueError: it was opened since, or `decision.json` is gone or was changed since.
        OSError: the file cannot be written.
    """
    path = inside(Path(run_folder) / DECISION)
    named = f"{path.parent.name}/{DECISION}"
    if not path.is_file():
        raise ValueError(f"{named} is gone, so there is nothing to undo.")
    if (now := len(read_openings(path.parent))) > openings:
        raise ValueError(
            f"The test split was opened since, {now} time(s) by now, and what it was opened with stays on "
            "record. Freeze another decision; the record says that it came after."
        )
    if path.read_bytes() != after:
        raise ValueError(f"{named} was changed since. Freeze what you want it to say.")
    if before is None:
        path.unlink()
        return
    with atomic_path(path) as temporary:
        temporary.write_bytes(before)
