"""DICOM series: which files of a folder are the slices of one CT, read whole, and everything else said aloud.

Nothing is taken from file names. What identifies a patient (names, dates, descriptions) is never read.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cspine_helpers.itk import reason, simpleitk
from cspine_helpers.paths import listing
from cspine_helpers.stack import Slice, stack
from cspine_helpers.volume import AIR_HU, Volume

_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # also .7.1 to .7.4, with several frames
_CT = ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
_TAGS = {
    "series": "0020|000e",
    "modality": "0008|0060",
    "image_type": "0008|0008",
    "sop_class": "0008|0016",
    "number": "0020|0013",
    "position": "0020|0032",
    "orientation": "0020|0037",
    "pixel_spacing": "0028|0030",
    "signed": "0028|0103",
    "padding": "0028|0120",
    "padding_limit": "0028|0121",
    "intercept": "0028|1052",
    "slope": "0028|1053",
    "kernel": "0018|1210",
    "thickness": "0018|0050",
}
_MEDIA_SOP_CLASS = re.compile(rb"\x02\x00\x02\x00UI..([0-9.]+)", re.DOTALL)
_TISSUE_HU = (-900, 3000)  # a padding value in here would be taken for the patient
_LEFT_OUT_NAMED = 5


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
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if not files:
        below = sorted(path.name for path in folder.iterdir() if path.is_dir())
        cause = f" It holds the folders {listing(below)}: give one of these." if below else ""
        raise FileNotFoundError(f"No file in {folder.name}.{cause or ' Give the folder of a DICOM series.'}")
    slices, left_out = _read_files(files)
    if not slices:
        raise ValueError(
            f"{folder.name} holds no CT image among its {len(files)} files{_reasons(left_out)}. "
            "Give the folder of an axial CT series."
        )
    chosen = _choose(slices, series, folder.name)
    try:
        volume = stack(chosen)
    except ValueError as error:
        raise ValueError(f"{folder.name}: {error}.") from None
    notes = [f"{len(left_out)} files are no slices of the CT{_reasons(left_out)}"] if left_out else []
    if any(s.tags["intercept"] is None for s in chosen):
        notes.append("it has no rescale intercept; its values are taken as Hounsfield units")
    notes += sorted({s.note for s in chosen if s.note})
    return Volume(**(vars(volume) | {"warnings": (*notes, *volume.warnings)}))


def _read_files(files: list[Path]) -> tuple[list[Slice], dict[str, str]]:
    """The CT slices among the files, read whole, and why each of the others is none.

    Raises:
        ValueError: files are damaged; names them all.
    """
    reader = simpleitk().ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.LoadPrivateTagsOff()
    slices: list[Slice] = []
    left_out: dict[str, str] = {}
    damaged: dict[str, str] = {}
    for path in files:
        reader.SetFileName(str(path))
        try:
            image = reader.Execute()
        except RuntimeError as error:
            why, is_damage = _unreadable(path, error)
            (damaged if is_damage else left_out)[path.name] = why
            continue
        tags = {name: _text(reader, tag) for name, tag in _TAGS.items()}
        if other := _no_slice(image, tags):
            left_out[path.name] = other
        else:
            slices.append(_slice(path, image, tags))
    if damaged:
        raise ValueError(
            f"{len(damaged)} of {len(files)} files cannot be read{_reasons(damaged, len(damaged))}. They "
            "may be cut off or damaged: copy them again; a CT with slices missing is not packed."
        )
    return slices, left_out


def _text(reader: Any, tag: str) -> str | None:
    """A header's text, None where it is missing or empty."""
    text = reader.GetMetaData(tag).strip(" \0") if reader.HasMetaDataKey(tag) else ""
    return text or None


def _unreadable(path: Path, error: Exception) -> tuple[str, bool]:
    """Why a file has no pixels, and whether that is damage: of what is an image, or calls itself DICOM."""
    with open(path, "rb") as file:
        start = file.read(1024)
    if not start:
        return "empty", True
    if start[128:132] != b"DICM":
        is_damage = path.suffix.lower() in (".dcm", ".dicom")
        return ("no DICOM content", True) if is_damage else ("no DICOM file", False)
    found = _MEDIA_SOP_CLASS.search(start)
    if found and found[1].decode() not in _CT:
        return "no image", False  # a report, a directory, a presentation state
    return reason(error), True


def _no_slice(image: Any, tags: Mapping[str, str | None]) -> str | None:
    """Why an image is no slice of a CT, None where it is one."""
    if tags["modality"] != "CT":
        return f"modality {tags['modality'] or 'not given'}, not CT"
    if (tags["sop_class"] or "").startswith(_SECONDARY_CAPTURE) or image.GetNumberOfComponentsPerPixel() > 1:
        return "a screen capture"
    if "LOCALIZER" in (tags["image_type"] or "").upper().split("\\"):
        return "a scout"
    if image.GetDimension() == 3 and image.GetSize()[2] > 1:
        return "several frames in one file (enhanced CT); convert it to one file a slice"
    return None


def _slice(path: Path, image: Any, tags: dict[str, str | None]) -> Slice:
    """One slice in Hounsfield units; GDCM applies each file's own slope and intercept."""
    view = simpleitk().GetArrayViewFromImage(image)
    view = view.reshape(view.shape[-2:])
    if view.dtype.kind == "f":
        pixels = view.astype(np.float32)
    else:
        pixels = np.empty(view.shape, np.int16)
        np.clip(view, -32768, 32767, out=pixels, casting="unsafe")
    note = _fill_padding(pixels, tags)
    return Slice(path.name, pixels, tags, note)


def _fill_padding(pixels: np.ndarray, tags: Mapping[str, str | None]) -> str:
    """Set what the header calls padding to air, in place; returns a sentence where the header is not obeyed.

    Source: DICOM PS3.3 section C.7.5.1.1.2, Pixel Padding Value and Pixel Padding Range Limit.
    """
    if tags["padding"] is None:
        return ""
    slope, intercept = float(tags["slope"] or 1), float(tags["intercept"] or 0)
    ends = []
    for raw in (tags["padding"], tags["padding_limit"] or tags["padding"]):
        value = int(float(raw)) % 65536  # stored as signed or unsigned, whatever the pixels are
        if tags["signed"] == "1" and value > 32767:
            value -= 65536
        ends.append(value * slope + intercept)
    low, high = min(ends), max(ends)
    if high > _TISSUE_HU[0] and low < _TISSUE_HU[1]:
        return f"its padding value, {low:g} HU, is one that tissue has, and is left as it is"
    pixels[(pixels >= low - 0.5 * slope) & (pixels <= high + 0.5 * slope)] = AIR_HU
    return ""


def _choose(slices: list[Slice], series: str | None, folder: str) -> list[Slice]:
    """The slices of one series.

    Raises:
        ValueError: there are several and none was chosen, or the chosen one is not there; describes each.
    """
    by_series = defaultdict(list)
    for found in slices:
        by_series[found.tags["series"] or ""].append(found)
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


def _described(uid: str, slices: list[Slice]) -> str:
    tags = slices[0].tags
    kernel, thickness = tags["kernel"] or "not given", tags["thickness"] or "?"
    return f"{uid or 'without a UID'} ({len(slices)} slices of {thickness} mm, kernel {kernel})"


def _reasons(found: Mapping[str, str], named: int = _LEFT_OUT_NAMED) -> str:
    """File names by reason, the first few of each: " (a scout: 'a', 'b'; no image: 'c' and 7 more)"."""
    if not found:
        return ""
    by_reason = Counter(found.values())
    parts = []
    for why, count in by_reason.items():
        names = [name for name, its in found.items() if its == why]
        more = f" and {count - named} more" if count > named else ""
        parts.append(f"{why}: {listing(names[:named])}{more}")
    return f" ({'; '.join(parts)})"
