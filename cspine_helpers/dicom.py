"""DICOM series: which files of a folder are the slices of one CT, read whole, and everything else said aloud.

Nothing is taken from file names.
"""

import filecmp
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from cspine_helpers.headers import NO_DICOM, Header, hounsfield, no_slice, read_header, read_tags, shown
from cspine_helpers.itk import complaints, reason, simpleitk
from cspine_helpers.paths import listing
from cspine_helpers.stack import Slice, reconstructions, stack
from cspine_helpers.volume import Volume

_WORDS = ("allocated", "bits", "high_bit", "signed")
# Where these differ from file to file, they are read one by one: GDCM converts each as its own header says.
_STORED_ALIKE = (
    *("series", "modality", "image_type", "sop_class", "samples", "photometric"),
    *_WORDS,
    *("intercept", "slope", "padding", "padding_limit"),
)


@dataclass
class _Found:
    """What a folder holds: slices and their pixels, notes on these, and why each other file is no slice."""

    slices: list[Slice] = field(default_factory=list)
    pixels: Sequence[np.ndarray] | np.ndarray = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def read_series(folder: Path, *, series: str | None = None) -> Volume:
    """The CT of a folder, from its slices' headers.

    A file holds one slice, or many as frames (enhanced CT). Scouts, screen captures and files that are no
    images are left out with a warning. Slices are put in order by their positions; see `stack` for what is
    repaired and what is refused.

    Args:
        folder: holds the slices, or folders that do where it has none itself.
        series: SeriesInstanceUID, where there are several; with #1, #2 … behind it, where it holds several
            reconstructions.

    Raises:
        FileNotFoundError: the folder holds no file.
        ValueError: no CT, several series, damaged files, or slices that make no volume; names them.
    """
    sorted_out = _sort_out(folder, (series or "").partition("#")[0] or None)
    try:
        found = _read(sorted_out)
    except ValueError as error:
        raise ValueError(f"{folder.name}: {error}") from None
    if not found.slices:
        raise ValueError(
            f"{folder.name} holds no CT image among its {sorted_out.total} files "
            f"({_reasons(found.left_out)}). Give the folder of an axial CT series."
        )
    chosen = _choose(found.slices, series, folder.name)
    if len(chosen) < len(found.slices):
        kept = {id(its) for its in chosen}
        pairs = [pair for pair in zip(found.slices, found.pixels, strict=True) if id(pair[0]) in kept]
        chosen, found.pixels = [its for its, _ in pairs], [pixels for _, pixels in pairs]
    try:
        _check_words(chosen)
        lost = _without_rescale(chosen)
        volume = stack(chosen, found.pixels)
    except ValueError as error:
        raise ValueError(f"{folder.name}: {error}.") from None
    notes = sorted({*found.notes, *lost})
    if (
        found.left_out
    ):  # counted, not named: a warning is kept in tables, and a file's name may be a patient's
        kinds = (f"{count} × {why}" for why, count in Counter(found.left_out.values()).items())
        notes.insert(0, f"files left out, as they are no slices of the CT: {', '.join(kinds)}")
    if sorted_out.unseen:
        notes.append(f"folders beside the slices were not looked into ({sorted_out.unseen})")
    return replace(volume, warnings=(*notes, *volume.warnings))


def series_in(folder: Path) -> set[str]:
    """SeriesInstanceUIDs of a folder's images, which are not decoded; see `read_series` for which files."""
    return {header.series for header in _sort_out(folder).images.values()}


@dataclass
class _SortedOut:
    """A folder's files by name: those that may hold slices, why others hold none, and what is damaged."""

    images: dict[str, Header] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    total: int = 0
    unseen: int = 0  # folders that were not looked into


def _sort_out(folder: Path, series: str | None = None) -> _SortedOut:
    """The files of a folder; where none of them may hold a slice of the series, also those in folders below.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: links lead nowhere; names them.
    """
    there = _visible(folder)
    files, below = [p for p in there if not p.is_dir()], [p for p in there if p.is_dir()]
    found = _sorted_out(folder, files, series)
    is_here = any(series in (None, header.series) for header in found.images.values())
    if below and not is_here and not found.damaged:
        files += [path for each in below for path in _files_below(each)]
        found, below = _sorted_out(folder, files, series), []
    if not files:
        raise FileNotFoundError(f"No file in {folder.name}. Give the folder of a DICOM series.")
    found.unseen = len(below)
    return found


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _files_below(folder: Path) -> Iterator[Path]:
    for path in _visible(folder):
        if path.is_dir() and not path.is_symlink():
            yield from _files_below(path)
        elif not path.is_dir():
            yield path


def _sorted_out(folder: Path, files: list[Path], series: str | None) -> _SortedOut:
    if gone := [path.name for path in files if not path.is_file()]:
        raise ValueError(
            f"{folder.name}: links that lead nowhere ({len(gone)}): {listing(gone)}. Get the files that "
            "they stand for."
        )
    found = _SortedOut(total=len(files))
    headers = {path: read_header(path) for path in files}
    alike = {_pattern(path) for path, header in headers.items() if header}
    chosen = series in {header.series for header in headers.values() if header}
    seen: dict[tuple[int, str], list[Path]] = defaultdict(list)
    for path, header in headers.items():
        name = path.relative_to(folder).as_posix()
        if header is None:
            was_slice = path.suffix.lower() in (".dcm", ".dicom") or _pattern(path) in alike
            reasons = found.damaged if was_slice else found.left_out
            reasons[name] = "nothing can be read" if was_slice else NO_DICOM
        elif header.is_capture:
            found.left_out[name] = "a screen capture"
        elif chosen and header.series not in ("", series):
            found.left_out[name] = "of another series"
        elif header.damage and header.is_other:
            found.left_out[name] = "no image"
        elif header.damage:
            found.damaged[name] = header.damage
        else:
            same = seen[path.stat().st_size, header.instance]
            if any(filecmp.cmp(path, other, shallow=False) for other in same):
                found.left_out[name] = "a copy of another file"
                continue
            same.append(path)
            found.images[name] = header
    return found


def _read(files: _SortedOut) -> _Found:
    """The CT slices among the files, and why each of the others is none.

    Raises:
        ValueError: files are damaged; names them all.
    """
    found, damaged = None if files.damaged else _read_at_once(files.images), dict(files.damaged)
    if found is None:
        found, garbled = _read_one_by_one(files.images)
        damaged |= garbled
    if damaged:
        raise ValueError(
            f"{len(damaged)} of {files.total} files cannot be read ({_reasons(damaged)}). They may be cut "
            "off or damaged: copy them again; a CT with slices missing is not packed."
        )
    found.left_out |= files.left_out
    return found


def _pattern(path: Path) -> str:
    """A file's name without its numbers, decimal or hexadecimal: slices have one in common."""
    return re.sub(r"[0-9A-Fa-f.]*[0-9][0-9A-Fa-f.]*", "#", path.name)


def _read_at_once(headers: Mapping[str, Header]) -> _Found | None:
    """All files in one call, at twice the speed; None unless all are slices of one CT, stored alike."""
    names = sorted(headers, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
    if not names or any(header.frames for header in headers.values()):
        return None
    sitk = simpleitk()
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(headers[name].path) for name in names])
    reader.MetaDataDictionaryArrayUpdateOn()
    reader.LoadPrivateTagsOff()
    warns = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # of uneven steps: `stack` has the last word on them
    try:
        with complaints() as said:
            image = reader.Execute()
    except RuntimeError:
        return None  # whatever it is, reading one by one finds it and says so
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(warns)
    tags = [
        read_tags(partial(reader.HasMetaDataKey, i), partial(reader.GetMetaData, i), headers[name])
        for i, name in enumerate(names)
    ]
    alike = all(its[name] == tags[0][name] for its in tags for name in _STORED_ALIKE)
    whole = image.GetDimension() == 3 and image.GetSize()[2] == len(names)
    whole &= all(header.shape == image.GetSize()[1::-1] for header in headers.values())
    if said or not (alike and whole) or no_slice(image, tags[0], frames=len(names)):
        return None
    del reader  # it shares the image, which would be copied to be looked at
    try:
        pixels, note = hounsfield(sitk.GetArrayViewFromImage(image), tags[0])
    except ValueError:
        return None
    slices = [Slice(name, pixels.shape[1:], its) for name, its in zip(names, tags, strict=True)]
    return _Found(slices, pixels, [note] if note else [])


def _read_one_by_one(headers: Mapping[str, Header]) -> tuple[_Found, dict[str, str]]:
    """The CT slices among the files and why others are none, and the damaged ones by name."""
    sitk = simpleitk()
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.LoadPrivateTagsOff()
    found, damaged, planes = _Found(), dict[str, str](), list[np.ndarray]()
    for name, header in headers.items():
        reader.SetFileName(str(header.path))
        try:
            with complaints() as said:
                image = reader.Execute()
        except RuntimeError as error:
            kind = found.left_out if header.is_other else damaged
            kind[name] = "no image" if header.is_other else reason(error)
            continue
        tags = read_tags(reader.HasMetaDataKey, reader.GetMetaData, header)
        frames = [tags | its for its in header.frames] or [tags]
        if other := no_slice(image, tags, frames=len(frames)):
            found.left_out[name] = other
            continue
        view = sitk.GetArrayViewFromImage(image)
        view = view.reshape(-1, *view.shape[-2:])
        try:
            if said or view.shape[1:] != header.shape or len(view) != len(frames):
                raise ValueError(*said or ["its image is of another size than its header describes"])
            pixels, note = hounsfield(view, frames[0])
        except ValueError as error:
            damaged[name] = str(error)
            continue
        planes.extend(pixels)
        found.slices += [
            Slice(f"{name}, frame {its['number']}" if header.frames else name, pixels.shape[1:], its)
            for its in frames
        ]
        found.notes += [note] if note else []
    found.pixels = planes
    return found, damaged


def _choose(slices: list[Slice], series: str | None, folder: str) -> list[Slice]:
    """The slices of one series.

    Raises:
        ValueError: there are several and none was chosen, or the chosen one is not there; describes each.
    """
    by_series = defaultdict(list)
    for its in slices:
        by_series[its.tags["series"] or ""].append(its)
    uid, _, number = (series or "").partition("#")
    if not uid and len(by_series) == 1:
        uid = next(iter(by_series))
    if uid not in by_series or (series is None and len(by_series) > 1):
        described = "; ".join(_described(uid, found) for uid, found in by_series.items())
        asked = "" if series is None else f" and none of them is {series!r}"
        raise ValueError(
            f"{folder} holds {len(by_series)} CT series{asked}. Choose one by its "
            f"SeriesInstanceUID with series=... (in packing, --series), or keep one a folder: {described}."
        )
    parts, apart = reconstructions(by_series[uid])
    by_number = {str(i): part for i, part in enumerate(parts, start=1)} | ({} if apart else {"": parts[0]})
    if number not in by_number:
        cause = f"slices of {apart} lie between each other: {len(parts)} series in one"
        described = "; ".join(
            f"'{uid}#{i}' ({len(part)} slices, as {part[0].name!r})" for i, part in enumerate(parts, start=1)
        )
        raise ValueError(
            f"{folder}: {cause if apart else 'it is one series'}. Choose with series=... (in packing, "
            f"--series), or keep one a folder: {described}."
        )
    return by_number[number]


def _check_words(slices: list[Slice]) -> None:
    """A scanner stores a series in words of one kind, whatever each slice's rescale.

    Raises:
        ValueError: some slices' headers describe other words than the rest's; names them.
    """
    kinds = [tuple(its.tags[name] for name in _WORDS) for its in slices]
    usual = Counter(kinds).most_common(1)[0][0]
    odd = [its.name for its, kind in zip(slices, kinds, strict=True) if kind != usual]
    if odd:
        raise ValueError(
            f"{len(odd)} of {len(slices)} slices' headers describe pixels of another sign or of other bits "
            f"than the rest: {listing(odd)}. Take the original files"
        )


def _without_rescale(slices: list[Slice]) -> list[str]:
    """What is taken for a rescale intercept or slope that no slice has.

    Raises:
        ValueError: some slices have one, and others none, or none that is a number above or below 0.
    """
    notes = []
    for tag, taken in (("intercept", "its values are taken as Hounsfield units"), ("slope", "1 is taken")):
        numbers = [its.numbers(tag, 1) for its in slices]
        lost = [
            its.name
            for its, number in zip(slices, numbers, strict=True)
            if number is None or (tag == "slope" and number == 0)
        ]
        if lost and len(lost) < len(slices):
            raise ValueError(
                f"{len(lost)} of {len(slices)} slices have lost their rescale {tag}: {listing(lost)}. Take "
                "the original files"
            )
        if lost:
            notes.append(f"it has no rescale {tag}; {taken}")
    return notes


def _described(uid: str, slices: list[Slice]) -> str:
    kernel, thickness = (shown(slices[0].tags, name) for name in ("kernel", "thickness"))
    return f"{uid or 'without a UID'} ({len(slices)} slices, {thickness} mm, kernel {kernel})"


def _reasons(found: Mapping[str, str]) -> str:
    """File names by reason: "a scout: 'a', 'b'; no image: 'c', 'd' and 7 more"."""
    by_reason: dict[str, list[str]] = {}
    for name, why in found.items():
        by_reason.setdefault(why, []).append(name)
    return "; ".join(f"{why}: {listing(names)}" for why, names in by_reason.items())
