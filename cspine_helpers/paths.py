"""Where files live, which names may become files, and how a file is replaced in one step."""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_UID = re.compile(r"[0-9.]{1,64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def project_root() -> Path:
    """Folder that holds `data/`, `checkpoints/` and `figures/`.

    The environment variable `CSPINE_ROOT` where it is set, else the nearest folder at or above the
    working directory that holds `notebooks/`.

    Raises:
        FileNotFoundError: neither is found.
    """
    if "CSPINE_ROOT" in os.environ:
        return Path(os.environ["CSPINE_ROOT"]).resolve()
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "notebooks").is_dir():
            return folder
    raise FileNotFoundError(
        f"No folder with notebooks/ at or above {here}. Start inside the project, or set CSPINE_ROOT to it."
    )


def cohort_dir(cohort: str) -> Path:
    """Folder of a cohort's artefacts, `data/<cohort>`; the name is checked, the folder need not exist."""
    return project_root() / "data" / _checked(cohort, "cohort")


def run_dir(run: str) -> Path:
    """Folder of a run, `checkpoints/<run>`; the name is checked, the folder need not exist."""
    return project_root() / "checkpoints" / _checked(run, "run")


def figures_dir(cohort: str = "builtin") -> Path:
    """Folder of a cohort's figures: `figures/` for the built-in cohort, else `figures/<cohort>`."""
    figures = project_root() / "figures"
    return figures if cohort == "builtin" else figures / _checked(cohort, "cohort")


def _checked(name: str, kind: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"A {kind} name is up to 64 letters, digits, '-' and '_'; found {name!r}. Rename it."
        )
    return name


def check_uids(uids: Iterable[object]) -> None:
    """Refuse study UIDs that could not be file names: a UID is 1 to 64 digits and dots, and no dots alone.

    Raises:
        ValueError: names every offender.

    Source: DICOM PS3.5 section 9.1 (UID alphabet and length).
    """
    bad = [uid for uid in uids if not (isinstance(uid, str) and _UID.fullmatch(uid) and uid.strip("."))]
    if bad:
        raise ValueError(
            f"{len(bad)} StudyInstanceUID not made of 1 to 64 digits and dots: {listing(bad)}. Correct them."
        )


def listing(items: Iterable[object]) -> str:
    """All items in one readable string, however many: whoever corrects a table needs each of them."""
    return ", ".join(repr(item) if isinstance(item, str) else str(item) for item in items)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path`: takes its place when the block ends well, goes when it does not.

    Readers therefore see the old file or the whole new one, never a part.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner may read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
