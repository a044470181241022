"""Where files live, which names may become files, and how a file is replaced in one step.

`data/<cohort>` may be a link, to a larger disk; of one that can only be read, `link_cohort` makes a folder of
links, and outputs go beside them. A run's folder, and the files of a run or of a `packed` folder, may not be
links out of their folder.
"""

import ctypes
import errno
import glob
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

from filelock import FileLock, Timeout

_ID = re.compile(r"(?=.{1,64}\Z)[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?")
_DEVICE = re.compile(r"(?:CON|PRN|AUX|NUL|(?:COM|LPT)[0-9])(?:\..*)?", re.IGNORECASE)  # of Windows
_MISSING = re.compile(r"nan?|none|null", re.IGNORECASE)  # how programs write that a cell is empty
CHECKSUMS = "SHA256SUMS"  # a folder's, as `sha256sum --check` reads it
_NAMED, _LONG = 10, 200  # offenders that an error names, and characters of each
_CHECKSUM = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_SIGNS = ("notebooks/01_label_prevalence.ipynb", "cspine_helpers/__init__.py")  # of this project's root
PHANTOMS = ("builtin", "quick")  # cohorts that `make cohort` makes
_CURRENT, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_PATIENCE_S = 10  # a killed process's loaders hold its lock until they notice that it is gone
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def project_root() -> Path:
    """Folder that holds `data/`, `checkpoints/` and `figures/`.

    The environment variable `CSPINE_ROOT` where it is set, else the nearest folder at or above the
    working directory that holds this project's `notebooks/`: with its first ones, or beside the package.

    Raises:
        FileNotFoundError: neither is found.
    """
    if "CSPINE_ROOT" in os.environ:
        return Path(os.environ["CSPINE_ROOT"]).resolve()
    here = Path.cwd()
    with_notebooks = [folder for folder in (here, *here.parents) if (folder / "notebooks").is_dir()]
    for folder in with_notebooks:
        if any((folder / sign).is_file() for sign in _SIGNS):
            return folder
    foreign = f" ({with_notebooks[0]} has notebooks/ of another project)." if with_notebooks else ""
    raise FileNotFoundError(
        f"No folder with the notebooks of this project at or above {here}{foreign or '.'} Start inside the "
        "project, or set CSPINE_ROOT to it."
    )


def cohort_dir(cohort: str) -> Path:
    """Folder of a cohort's artefacts, `data/<cohort>`; the name is checked, the folder need not exist.

    Example:
        >>> cohort_dir("rsna2022").parts[-2:]
        ('data', 'rsna2022')
    """
    return project_root() / "data" / checked_name(cohort, "cohort")


def link_cohort(cohort: str, *sources: str | Path) -> Path:
    """Make `data/<cohort>` a folder of links to a cohort's files where they lie, which may be read-only.

    What is made of them (split, packed sequences, locks) goes into that folder, beside the links; nothing is
    ever written to the sources. Called again, it adds what is new there, and mends links that lead nowhere.

    Args:
        cohort: name of the cohort; its folder is made.
        sources: folders that hold its files, laid out as data/README.md says: `train.csv`, `train_images/`,
            `segmentations/`, perhaps `packed/` in another. All of their files and folders are linked, but
            hidden ones.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: a source is no folder, or holds nothing.
        FileExistsError: two sources hold a file of one name, or the cohort has such a file itself; or the
            cohort's folder is a link. Nothing is linked then.
        ValueError: a source and the cohort's folder lie in each other.

    Example:
        >>> Path("input").mkdir()
        >>> _ = Path("input", "train.csv").write_text("")
        >>> [path.name for path in link_cohort("mine", "input").iterdir()]
        ['train.csv']
    """
    # 1. What is to be linked, and what is in its way.
    folder = cohort_dir(cohort)
    if folder.is_symlink():
        raise FileExistsError(
            f"{folder} is a link, and what is written there would go to {folder.resolve()}. Remove the link."
        )
    wanted: dict[str, Path] = {}
    taken = []
    for source in map(Path, sources):
        inner, outer = source.resolve(), folder.resolve()
        if inner.is_relative_to(outer) or outer.is_relative_to(inner):
            raise ValueError(f"{source} and {folder} lie in each other. Name the folder where the files are.")
        found = sorted(source.glob("[!.]*")) if source.is_dir() else []
        if not found:
            raise FileNotFoundError(f"No cohort at {source}: it is no folder, or empty. Check its name.")
        taken += [path for path in found if path.name in wanted]
        wanted |= {path.name: inner / path.name for path in found}
    links = {folder / name: path for name, path in wanted.items()}
    taken += [
        link
        for link, path in links.items()
        if link.exists() and not (link.is_symlink() and link.resolve() == path.resolve())
    ]
    if taken:
        raise FileExistsError(
            f"There are files of one name ({len(taken)}): {listing(map(str, taken))}. Each file of a cohort "
            "is in one place: move the others aside."
        )
    # 2. Link it.
    folder.mkdir(parents=True, exist_ok=True)
    for link, path in links.items():
        if link.is_symlink() and not link.exists():  # what it led to is elsewhere now
            link.unlink()
        if not link.exists():
            link.symlink_to(path)
    return folder


def cohort_remedy(folder: str | Path) -> str:
    """What to do about a missing cohort, for the end of an error: how to get it, and which there are."""
    folder = Path(folder)
    said = "data/README.md says where the files of RSNA 2022 go; `make cohort` makes the built-in cohort."
    if folder.name in PHANTOMS:
        said = f"Make this cohort of phantoms: `make cohort COHORT={folder.name}`."
    holds = ("train.csv", "train_images")
    found = sorted({path.parent.name for name in holds for path in folder.parent.glob(f"*/{name}")})
    return f"{said} Cohorts that are there: {listing(found)}." if found else said


def run_dir(run: str) -> Path:
    """Folder of a run, `checkpoints/<run>`; the name is checked, the folder need not exist.

    Example:
        >>> run_dir("mine").parts[-2:]
        ('checkpoints', 'mine')
    """
    return inside(project_root() / "checkpoints" / checked_name(run, "run"))


def fold_dir(run_folder: str | Path, fold: int) -> Path:
    """Folder of one fold's run, `fold_<n>` in the run's, n from 0."""
    return inside(Path(run_folder) / f"fold_{fold}")


def staging_dir(run_folder: str | Path) -> Path:
    """Folder in which a new run is trained while an earlier one is kept, `<run>-training` beside it."""
    folder = Path(run_folder)
    return folder.with_name(f"{folder.name}-training")


def previous_dirs(run_folder: str | Path) -> list[Path]:
    """Where earlier runs of this name were set aside, `<run>-previous-<n>` beside it, by n."""
    folder = Path(run_folder)
    start = f"{folder.name}-previous-"
    found = (path for path in folder.parent.glob(f"{glob.escape(start)}*") if path.is_dir())
    numbered = {int(n): path for path in found if (n := path.name.removeprefix(start)).isdecimal()}
    return [numbered[n] for n in sorted(numbered)]


def next_previous_dir(run_folder: str | Path) -> Path:
    """Where the run is set aside next: `<run>-previous-<n>` with the first free n."""
    folder, n = Path(run_folder), 1
    while (path := folder.with_name(f"{folder.name}-previous-{n}")).exists():
        n += 1
    return path


def exchange(one: Path, other: Path) -> None:
    """Let two folders of one disk take each other's name.

    Linux does it in one step: at any moment each name leads to a whole folder. Where system or disk cannot,
    a third name serves: a process killed just then leaves `<other>-moved`.

    Raises:
        OSError: one of them is not there, or may not be renamed.

    Source: renameat2(2), RENAME_EXCHANGE.
    """
    try:
        in_one_step = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # another system
        in_one_step = None
    names = (os.fsencode(one), os.fsencode(other))
    if in_one_step and in_one_step(_CURRENT, names[0], _CURRENT, names[1], ctypes.c_uint(_EXCHANGE)) == 0:
        return
    moved = other.rename(other.with_name(f"{other.name}-moved"))
    try:
        one.rename(other)
    except BaseException:
        moved.rename(other)
        raise
    moved.rename(one)


def figures_dir(cohort: str = "builtin", run: str | None = None) -> Path:
    """Folder of figures: `figures/` for the built-in cohort and its run, else `figures/<cohort>`.

    Those of a run with another name than its cohort have a folder of that name in `figures/<cohort>`.
    """
    figures, run = project_root() / "figures", run or cohort
    if cohort == run == "builtin":
        return figures
    folder = inside(figures / checked_name(cohort, "cohort"))
    return folder if run == cohort else inside(folder / checked_name(run, "run"))


def checked_name(name: str, kind: str) -> str:
    """The name, where it can be that of a file or folder on any system, and leads nowhere else.

    Raises:
        ValueError: it holds anything but letters, digits, `-` and `_`, or more than 64 of them.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"A {kind} name is up to 64 letters, digits, '-' and '_'; found {name!r}. Rename it."
        )
    return name


def inside(path: Path) -> Path:
    """The path, which need not exist; a link there may not lead out of its folder.

    Raises:
        ValueError: it does.
    """
    if path.is_symlink() and not (target := path.resolve()).is_relative_to(path.parent.resolve()):
        raise ValueError(
            f"{path} is a link out of its folder, to {target}. Put what it leads to in its place."
        )
    return path


def check_uids(uids: Iterable[object]) -> None:
    """Refuse study ids that could not be file names on every system.

    A StudyInstanceUID is one; so is any name of 1 to 64 letters, digits, `.`, `_` and `-` that begins with a
    letter or digit, ends without a dot, is no device of Windows (`CON`, `NUL.1`) and spells no missing value
    (`nan`, `NA`, `None`, `null`).

    Raises:
        ValueError: names the first ten offenders and counts the rest.
    """
    bad = [
        uid
        for uid in uids
        if not (isinstance(uid, str) and _ID.fullmatch(uid))
        or _DEVICE.fullmatch(uid)
        or _MISSING.fullmatch(uid)
    ]
    if bad:
        raise ValueError(
            f"{len(bad)} StudyInstanceUID that cannot be file names: {listing(bad)}. One has 1 to 64 "
            "letters, digits, '.', '_' and '-', the first a letter or digit, the last no dot, and is no "
            "device of Windows such as CON, nor a word for a missing value such as nan. Rename them."
        )


def printable(text: str) -> str:
    """The text on one line that can be printed and written: bytes of no text, and controls, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def listing(items: Iterable[object], *, separator: str = ", ", quoted: bool = True) -> str:
    """The first ten items and how many more there are, each cut to 200 characters: an error stays readable.

    Args:
        items: what is named; of the rest, only the number.
        separator: between two.
        quoted: whether text is in quotation marks, as names are and phrases are not.

    Example:
        >>> listing(["C1"] * 10 + ["C2", "C3"], separator=" ")
        "'C1' 'C1' 'C1' 'C1' 'C1' 'C1' 'C1' 'C1' 'C1' 'C1' and 2 more"
    """
    rest = iter(items)
    named = [repr(item) if quoted and isinstance(item, str) else str(item) for item in islice(rest, _NAMED)]
    named = [text if len(text) <= _LONG else f"{text[:_LONG]}…" for text in named]
    more = sum(1 for _ in rest)
    return separator.join(named) + (f" and {more:,} more" if more else "")


@contextmanager
def atomic_path(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary file beside `path`: takes its place when the block ends well, goes when it does not.

    Readers see the old file or the whole new one, never a part; with `durable` also after a power failure
    (without it, the file may then be empty).

    Raises:
        OSError: the file cannot be written; says which file and why.
    """
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        if durable:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        temporary.chmod(_mode(path))
        os.replace(temporary, path)
    except OSError as error:
        if isinstance(error.__cause__, OSError):  # it names a file that is written together with this one
            raise
        raise OSError(
            error.errno or errno.EIO,
            f"{path} was not written ({error.strerror or error}); the old file is unchanged. Check the right "
            f"to write to {path.parent} and the free space there.{_read_only(error)}",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _read_only(error: OSError) -> str:
    """What to do about a disk that can only be read, for the end of an error; nothing about others."""
    if error.errno != errno.EROFS:
        return ""
    return (
        " Data on a disk that can only be read are used through links: python -m cspine_helpers link --help."
    )


def _mode(path: Path) -> int:
    """Permissions that a file keeps when it is replaced; those of a new file where there is none."""
    if path.is_file() and not path.is_symlink():
        return stat.S_IMODE(path.stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def check_own(path: str | Path) -> None:
    """Refuse to write in place what a link, symbolic or hard, shares with another file.

    `atomic_path` needs no such check: it replaces the link.

    Raises:
        ValueError: it is such a link.
    """
    path = Path(path)
    if path.is_symlink() or (path.is_file() and path.stat().st_nlink > 1):
        raise ValueError(
            f"{path} is a link, and writing there would change another file. Remove it, or put a copy in its "
            "place."
        )


@contextmanager
def exclusive(lock: str | Path, doing: str) -> Iterator[None]:
    """Let one process at a time into the block; the lock ends with the block or the process, however it ends.

    Its folder is made where there is none, and goes again where the block leaves it empty.

    Args:
        lock: file that is there meanwhile.
        doing: what another process would be doing, for the error.

    Raises:
        BlockingIOError: another process is in the block.
        OSError: the lock cannot be written.
        ValueError: it is a link.
    """
    lock = Path(lock)
    check_own(lock)
    is_new = not lock.parent.exists()
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock)
        held.acquire(timeout=_PATIENCE_S)
    except Timeout:
        raise BlockingIOError(
            errno.EWOULDBLOCK, f"another process is {doing}. Wait for it, or stop it."
        ) from None
    except OSError as error:
        raise OSError(
            error.errno or errno.EIO,
            f"{lock.parent} cannot be written to ({error.strerror or error}). Check the right to write there "
            f"and the free space.{_read_only(error)}",
        ) from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        held.release()
        if is_new:
            with suppress(OSError):  # it holds something by now
                lock.parent.rmdir()


def remove_unfinished(path: str | Path) -> None:
    """Remove what `atomic_path` was writing for this path when its process was killed."""
    path = Path(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        left.unlink()


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal_of(path: str | Path) -> Path:
    """Where the SHA-256 of a file is kept, if it is: `<path>.sha256`, as `sha256sum --check` reads it."""
    path = Path(path)
    return path.with_name(f"{path.name}.sha256")


def check_seal(path: str | Path, content: bytes) -> None:
    """Refuse content that is not what the file's seal says; without a seal, nothing is known.

    Raises:
        ValueError: the file was changed after it was sealed; gives both hashes.
    """
    path, seal = Path(path), seal_of(path)
    if not seal.is_file():
        return
    stored, found = seal.read_bytes().split()[:1], hashlib.sha256(content).hexdigest()
    if stored != [found.encode()]:
        says = b"".join(stored).decode(errors="replace") or "nothing"
        raise ValueError(
            f"{path.name} is not the file that was written: its SHA-256 is {found}, {seal.name} says {says}. "
            f"Bring the old file back, or make it again; if the change is meant: "
            f"sha256sum {path.name} > {seal.name}"
        )


def write_checksums(folder: str | Path, *, known: Mapping[str, str] | None = None) -> Path:
    """Write the SHA-256 of each file in the folder to its `SHA256SUMS`; returns that file's path.

    Args:
        folder: whose files, not those in folders below.
        known: file name → SHA-256 where somebody has just computed it.
    """
    path = Path(folder) / CHECKSUMS
    files = sorted(file for file in path.parent.glob("[!.]*") if file.is_file() and file != path)
    with atomic_path(path) as temporary:
        sums = known or {}
        lines = (f"{sums.get(file.name) or sha256_of(file)}  {file.name}\n" for file in files)
        temporary.write_text("".join(lines), encoding="utf-8")
    return path


def read_checksums(folder: str | Path) -> dict[str, str]:
    """File name → SHA-256, from the folder's `SHA256SUMS`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not as `sha256sum` writes it.
    """
    path = Path(folder) / CHECKSUMS
    if not path.is_file():
        raise FileNotFoundError(
            f"No {CHECKSUMS} in {folder} to verify its files with. paths.write_checksums(...) makes it."
        )
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [_CHECKSUM.fullmatch(line) for line in lines]
    if bad := [number for number, match in enumerate(found, start=1) if match is None]:
        raise ValueError(f"{path} is not as sha256sum writes it in the lines {listing(bad)}. Make it again.")
    return {match[2]: match[1] for match in found if match}
