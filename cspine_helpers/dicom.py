"""DICOM series: which files of a folder are the slices of one CT, read whole, and everything else said aloud.

Nothing is taken from file names.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from cspine_helpers.headers import NO_DICOM, cut_off, hounsfield, no_slice, read_tags, unreadable
from cspine_helpers.itk import reason, simpleitk
from cspine_helpers.paths import listing
from cspine_helpers.stack import Slice, stack
from cspine_helpers.volume import Volume

# Where these differ from file to file, they are read one by one: GDCM converts each as its own header says.
_STORED_ALIKE = (
    *("series", "modality", "image_type", "sop_class", "samples", "photometric", "bits", "signed"),
    *("intercept", "slope", "padding", "padding_limit"),
)
_SLICE_SHARE = 0.5  # of a slice's size in bytes


@dataclass
class _Found:
    """What a folder holds: slices and their pixels, notes on these, and why each other file is no slice."""

    slices: list[Slice] = field(default_factory=list)
    pixels: Sequence[np.ndarray] | np.ndarray = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def read_series(folder: Path, *, series: str | None = None) -> Volume:
    """The CT of a folder, from its slices' headers.

    Scouts, screen captures and files that are no images are left out with a warning. Slices are put in order
    by their positions; see `stack` for what is repaired and what is refused.

    Args:
        folder: holds the files themselves, not in folders below.
        series: SeriesInstanceUID, where there are several.

    Raises:
        FileNotFoundError: the folder holds no file.
        ValueError: no CT, several series, damaged files, or slices that make no volume; names them.
    """
    there = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files, below = [p for p in there if not p.is_dir()], [p.name for p in there if p.is_dir()]
    if gone := [path.name for path in files if not path.is_file()]:
        raise ValueError(
            f"{folder.name}: links that lead nowhere ({len(gone)}): {listing(gone)}. Get the files that "
            "they stand for."
        )
    if not files:
        cause = f" It holds the folders {listing(below)}: give one of these." if below else ""
        raise FileNotFoundError(f"No file in {folder.name}.{cause or ' Give the folder of a DICOM series.'}")
    found = _read_at_once(files) or _read_one_by_one(files)
    if not found.slices:
        raise ValueError(
            f"{folder.name} holds no CT image among its {len(files)} files ({_reasons(found.left_out)}). "
            "Give the folder of an axial CT series."
        )
    chosen = _choose(found.slices, series, folder.name)
    if len(chosen) < len(found.slices):
        kept = {id(its) for its in chosen}
        pairs = zip(found.slices, found.pixels, strict=True)
        found.pixels = [pixels for its, pixels in pairs if id(its) in kept]
    try:
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
    if below:
        notes.append(f"folders beside the slices were not looked into ({len(below)})")
    return replace(volume, warnings=(*notes, *volume.warnings))


def _read_at_once(files: list[Path]) -> _Found | None:
    """All files in one call, at twice the speed; None unless all are slices of one CT, stored alike."""
    files = sorted(files, key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)])
    if any(map(cut_off, files)):
        return None
    sitk = simpleitk()
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(path) for path in files])
    reader.MetaDataDictionaryArrayUpdateOn()
    reader.LoadPrivateTagsOff()
    warns = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # of uneven steps: `stack` has the last word on them
    try:
        image = reader.Execute()
    except RuntimeError:
        return None  # whatever it is, reading one by one finds it and says so
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(warns)
    tags = [
        read_tags(partial(reader.HasMetaDataKey, i), partial(reader.GetMetaData, i))
        for i in range(len(files))
    ]
    alike = all(its[name] == tags[0][name] for its in tags for name in _STORED_ALIKE)
    whole = image.GetDimension() == 3 and image.GetSize()[2] == len(files)
    if not (alike and whole) or no_slice(image, tags[0], frames=len(files)):
        return None
    del reader  # it shares the image, which would be copied to be looked at
    pixels, note = hounsfield(sitk.GetArrayViewFromImage(image), tags[0])
    slices = [Slice(path.name, pixels.shape[1:], its) for path, its in zip(files, tags, strict=True)]
    return _Found(slices, pixels, [note] if note else [])


def _read_one_by_one(files: list[Path]) -> _Found:
    """The CT slices among the files, and why each of the others is none.

    Raises:
        ValueError: files are damaged; names them all.
    """
    sitk = simpleitk()
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.LoadPrivateTagsOff()
    found, damaged, planes = _Found(), dict[str, str](), list[np.ndarray]()
    for path in files:
        if cut_off(path):
            damaged[path.name] = "its compressed pixels have no end"
            continue
        reader.SetFileName(str(path))
        try:
            image = reader.Execute()
        except RuntimeError as error:
            why, is_damage = unreadable(path, reason(error))
            (damaged if is_damage else found.left_out)[path.name] = why
            continue
        tags = read_tags(reader.HasMetaDataKey, reader.GetMetaData)
        if other := no_slice(image, tags):
            found.left_out[path.name] = other
            continue
        view = sitk.GetArrayViewFromImage(image)
        pixels, note = hounsfield(view.reshape(-1, *view.shape[-2:]), tags)
        planes.append(pixels[0])
        found.slices.append(Slice(path.name, pixels.shape[1:], tags))
        found.notes += [note] if note else []
    if planes:  # a file as large as a slice, of which nothing can be read, was one
        large = _SLICE_SHARE * np.median([path.stat().st_size for path in files])
        damaged |= {
            p.name: "nothing can be read"
            for p in files
            if p.name in found.left_out and found.left_out[p.name] == NO_DICOM and p.stat().st_size > large
        }
    if damaged:
        raise ValueError(
            f"{len(damaged)} of {len(files)} files cannot be read ({_reasons(damaged)}). They "
            "may be cut off or damaged: copy them again; a CT with slices missing is not packed."
        )
    found.pixels = planes
    return found


def _choose(slices: list[Slice], series: str | None, folder: str) -> list[Slice]:
    """The slices of one series.

    Raises:
        ValueError: there are several and none was chosen, or the chosen one is not there; describes each.
    """
    by_series = defaultdict(list)
    for its in slices:
        by_series[its.tags["series"] or ""].append(its)
    if series is None and len(by_series) == 1:
        return slices
    if series is not None and series in by_series:
        return by_series[series]
    described = "; ".join(_described(uid, found) for uid, found in by_series.items())
    asked = "" if series is None else f" and none of them is {series!r}"
    raise ValueError(
        f"{folder} holds {len(by_series)} CT series{asked}. Choose one with series=... (its "
        f"SeriesInstanceUID), or keep one a folder: {described}."
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
    tags = slices[0].tags
    kernel, thickness = tags["kernel"] or "not given", tags["thickness"] or "?"
    return f"{uid or 'without a UID'} ({len(slices)} slices of {thickness} mm, kernel {kernel})"


def _reasons(found: Mapping[str, str]) -> str:
    """File names by reason: "a scout: 'a', 'b'; no image: 'c', 'd' and 7 more"."""
    by_reason: dict[str, list[str]] = {}
    for name, why in found.items():
        by_reason.setdefault(why, []).append(name)
    return "; ".join(f"{why}: {listing(names)}" for why, names in by_reason.items())
