"""DICOM headers: what is read of them, and what they and the file's bytes say about a file that is no slice.

What identifies a patient (names, dates, descriptions) is never read.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cspine_helpers.volume import AIR_HU

Tags = Mapping[str, str | None]

TAGS = {
    "series": "0020|000e",
    "modality": "0008|0060",
    "image_type": "0008|0008",
    "sop_class": "0008|0016",
    "number": "0020|0013",
    "acquisition": "0020|0012",
    "position": "0020|0032",
    "orientation": "0020|0037",
    "pixel_spacing": "0028|0030",
    "samples": "0028|0002",
    "photometric": "0028|0004",
    "bits": "0028|0101",
    "signed": "0028|0103",
    "padding": "0028|0120",
    "padding_limit": "0028|0121",
    "intercept": "0028|1052",
    "slope": "0028|1053",
    "kernel": "0018|1210",
    "thickness": "0018|0050",
}
NO_DICOM = "no DICOM file"
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # also .7.1 to .7.4, with several frames
_CT = ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
_COMPRESSED = ("1.2.840.10008.1.2.4.", "1.2.840.10008.1.2.5")  # JPEG's family, RLE
_END_OF_PIXELS = b"\xfe\xff\xdd\xe0"  # sequence delimitation item, little endian
_START, _TAIL = 1024, 65536  # bytes at a file's ends that are looked at
_TISSUE_HU = (-900, 3000)  # a padding value in here would be taken for the patient


def read_tags(has: Callable[[str], bool], get: Callable[[str], str]) -> dict[str, str | None]:
    """`TAGS` as text, None where one is missing or empty."""
    return {name: (get(tag).strip(" \0") or None) if has(tag) else None for name, tag in TAGS.items()}


def no_slice(image: Any, tags: Tags, *, frames: int = 1) -> str | None:
    """Why an image of so many frames is no slice of a CT, None where it is one."""
    if tags["modality"] != "CT":
        return f"modality {tags['modality'] or 'not given'}, not CT"
    if (tags["sop_class"] or "").startswith(_SECONDARY_CAPTURE) or image.GetNumberOfComponentsPerPixel() > 1:
        return "a screen capture"
    if "LOCALIZER" in (tags["image_type"] or "").upper().split("\\"):
        return "a scout"
    if tags["photometric"] not in (None, "MONOCHROME2"):
        return f"photometric interpretation {tags['photometric']}, not MONOCHROME2"
    if image.GetDimension() == 3 and image.GetSize()[2] > frames:
        return "several frames in one file (enhanced CT); convert it to one file a slice"
    return None


def cut_off(path: Path) -> bool:
    """Whether compressed pixels have no end. GDCM would decode what is there, or try for minutes."""
    with open(path, "rb") as file:
        start = file.read(_START)
        if not (_meta(start, b"\x02\x00\x10\x00") or "").startswith(_COMPRESSED):
            return False
        file.seek(max(path.stat().st_size - _TAIL, 0))
        if _END_OF_PIXELS in file.read():
            return False
        file.seek(0)  # much may follow the pixels
        return _END_OF_PIXELS not in file.read()


def unreadable(path: Path, error: str) -> tuple[str, bool]:
    """Why a file has no pixels, and whether that is damage: to an image, or to what calls itself DICOM."""
    with open(path, "rb") as file:
        start = file.read(_START)
    if not start:
        return "empty", True
    if start[128:132] != b"DICM":
        is_damage = path.suffix.lower() in (".dcm", ".dicom")
        return "no DICOM content" if is_damage else NO_DICOM, is_damage
    sop_class = _meta(start, b"\x02\x00\x02\x00")
    if sop_class and sop_class not in _CT:
        return "no image", False  # a report, a directory, a presentation state
    return error, True


def _meta(start: bytes, tag: bytes) -> str | None:
    """A UID of the file's meta header; None where it is missing or cut off."""
    at = start.find(tag + b"UI")
    if at < 0:
        return None
    length = int.from_bytes(start[at + 6 : at + 8], "little")
    value = start[at + 8 : at + 8 + length]
    whole = len(value) == length > 0 and re.fullmatch(rb"[0-9.]+\0?", value)
    return value.decode().rstrip("\0") if whole else None


def hounsfield(view: np.ndarray, tags: Tags) -> tuple[np.ndarray, str]:
    """A copy of what GDCM made Hounsfield units of, (N, Y, X), as int16 or float32, with padding set to air.

    Returns:
        The copy, and a clause where the header's padding value is not obeyed, else "".

    Source: DICOM PS3.3 section C.7.5.1.1.2, Pixel Padding Value and Pixel Padding Range Limit.
    """
    pixels = np.empty(view.shape, np.float32 if view.dtype.kind == "f" else np.int16)
    for stored, plane in zip(view, pixels, strict=True):  # plane by plane, while it is in the cache
        if pixels.dtype == np.int16 != view.dtype:
            stored = np.clip(stored, -32768, 32767)
        plane[...] = stored
    if tags["padding"] is None:
        return pixels, ""
    slope, intercept = float(tags["slope"] or 1), float(tags["intercept"] or 0)
    bits, ends = int(tags["bits"] or 16), []
    for raw in (tags["padding"], tags["padding_limit"] or tags["padding"]):
        value = int(float(raw)) % 2**bits  # written as signed or unsigned, and GDCM drops the bits above
        if tags["signed"] == "1" and value >= 2 ** (bits - 1):
            value -= 2**bits
        ends.append(value * slope + intercept)
    low, high = min(ends), max(ends)
    if high > _TISSUE_HU[0] and low < _TISSUE_HU[1]:
        return pixels, f"its padding value, {low:g} HU, is one that tissue has, and is left as it is"
    pixels[(view >= low - 0.5 * slope) & (view <= high + 0.5 * slope)] = AIR_HU
    return pixels, ""
