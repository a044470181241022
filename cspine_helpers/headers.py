"""DICOM files: what is read of their headers, and what keeps a file from being a slice of the CT.

GDCM fills pixels that are not there with what lies in memory: a file's bytes are looked at before. What
identifies a patient (names, dates, descriptions) is never read, and no free text is shown as it is written.
"""

import hashlib
import mmap
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
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
_CT = "1.2.840.10008.5.1.4.1.1.2"
_CT_CLASSES = (_CT, f"{_CT}.1", f"{_CT}.2")  # a slice; enhanced; enhanced, converted from slices
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # also .7.1 to .7.4, with several frames
_TISSUE_HU = (-900, 3000)  # a padding value in here would be taken for the patient

# Elements, as 0xGGGGEEEE, that are read from a file's own bytes.
_META_CLASS, _SYNTAX, _CLASS, _INSTANCE, _SERIES = 0x00020002, 0x00020010, 0x00080016, 0x00080018, 0x0020000E
_SAMPLES, _PHOTOMETRIC, _FRAMES, _ROWS, _COLUMNS = 0x00280002, 0x00280004, 0x00280008, 0x00280010, 0x00280011
_ALLOCATED, _PIXELS = 0x00280100, 0x7FE00010
_READ, _NUMBERS = {_CLASS, _INSTANCE, _SERIES, _PHOTOMETRIC, _FRAMES}, {_SAMPLES, _ROWS, _COLUMNS, _ALLOCATED}
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF  # length of what a delimiter ends
_LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # types with a length of four bytes
_FIRST = re.compile(rb"[\x02\x08]\0.\0|\0\x08\0", re.DOTALL)  # tag that a file without a preamble begins with
_DEFLATED, _JPEG, _RLE = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.", "1.2.840.10008.1.2.5"


@dataclass(frozen=True)
class Header:
    """What a DICOM file's own bytes say.

    Attributes:
        path: the file.
        sop_class: what the file is, by its data set, else by its meta header; "" where neither says.
        instance: SOPInstanceUID, "" where there is none.
        series: SeriesInstanceUID, "" where there is none.
        shape: rows and columns, 0 where it does not say.
        damage: why its pixels cannot be those that it describes; "" where they can.
    """

    path: Path
    sop_class: str
    instance: str
    series: str
    shape: tuple[int, int]
    damage: str

    @property
    def is_capture(self) -> bool:
        """Whether it calls itself a secondary capture: a picture of a screen, or a paper."""
        return self.sop_class.startswith(_SECONDARY_CAPTURE)

    @property
    def is_other(self) -> bool:
        """Whether it calls itself no CT: a report, a directory, a capture."""
        return self.sop_class not in ("", *_CT_CLASSES)


def read_header(path: Path) -> Header | None:
    """What a file's bytes say, before GDCM decodes them.

    Returns:
        None for what is no DICOM file: it has no preamble, and does not begin as a data set.
    """
    if not path.stat().st_size:
        return None
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        has_preamble = data[128:132] == b"DICM"
        if not has_preamble and not _FIRST.match(data[:4]):
            return None
        values: dict[int, bytes] = {}
        try:
            damage = _damage(data, 132 if has_preamble else 0, values)
        except (struct.error, ValueError, zlib.error):
            damage = "cut off, or garbled"
    sop_class = _uid(values, _CLASS) or _uid(values, _META_CLASS)
    shape = _number(values, _ROWS), _number(values, _COLUMNS)
    return Header(path, sop_class, _uid(values, _INSTANCE), _uid(values, _SERIES), shape, damage)


def _damage(data: bytes | mmap.mmap, at: int, values: dict[int, bytes]) -> str:
    """Read what comes before the pixels into `values`, by tag; returns what is wrong with these, or "".

    Raises:
        struct.error, ValueError, zlib.error: the file ends too early, or cannot be followed.
    """
    # 1. The meta header, explicit and little endian whatever comes after it.
    meta = _Coded(data)
    while data[at : at + 2] == b"\2\0":
        tag, _, start, length = meta.head(at)
        at = start + length
        if at > len(data):
            raise ValueError("beyond the end")
        values[tag] = data[start:at]
    if _uid(values, _SYNTAX) == _DEFLATED:
        inflated = zlib.decompressobj(-zlib.MAX_WBITS)
        data, at = inflated.decompress(data[at:]), 0
        if not inflated.eof:
            raise ValueError("the deflated data set has no end")
    # 2. The data set, coded as its first element is: some files differ from the syntax that they name.
    coded = _Coded(data, ">" if data[at : at + 1] == b"\0" else "<", _is_type(data[at + 4 : at + 6]))
    for tag, start, end, is_nested in coded.elements(at):
        if tag == _PIXELS:
            bits = _number(values, _ALLOCATED)
            if bits not in (0, 8, 16, 32 if coded.order == "<" else 16):  # readers differ on the others
                return f"{bits} bits a pixel, which are not read as it stores them"
            if is_nested:  # in fragments, of which the first lists offsets
                return _compressed_damage(coded, list(coded.items(start))[1:], values)
            return _length_damage(end - start, _size(values))
        if tag in _READ:
            values[tag] = data[start:end]
        elif tag in _NUMBERS:
            values[tag] = data[start:end][:: -1 if coded.order == ">" else 1]
    return "without pixels"


def _length_damage(length: int, size: int) -> str:
    if not size:
        return "its header does not say how large the image is"
    even = size <= length <= size + 1  # with a byte that makes it so
    return "" if even else f"{length} bytes of pixels where its header describes {size}"


def _compressed_damage(coded: "_Coded", fragments: list[tuple[int, int]], values: Mapping[int, bytes]) -> str:
    syntax, size = _uid(values, _SYNTAX), _size(values)
    length = sum(end - start for start, end in fragments)
    if length and syntax.startswith(_JPEG):
        return ""  # its decoder knows where it ends
    if length and syntax == _RLE:
        frame = b"".join(coded.data[start:end] for start, end in fragments)
        is_whole = _frames(values) > 1 or _unpacks_to(frame, size)
        return "" if is_whole else "its compressed pixels are cut off"
    return _length_damage(length, size)


def _uid(values: Mapping[int, bytes], tag: int) -> str:
    return values.get(tag, b"").rstrip(b"\0 ").decode("ascii", "replace")


def _is_type(vr: bytes) -> bool:
    return vr.isalpha() and vr.isupper()


def _frames(values: Mapping[int, bytes]) -> int:
    found = re.fullmatch(rb"\s*\+?(\d{1,9})[\s\0]*", values.get(_FRAMES, b""))
    return int(found[1]) if found else 1


def _number(values: Mapping[int, bytes], tag: int) -> int:
    return int.from_bytes(values.get(tag, b"")[:2], "little")


def _size(values: Mapping[int, bytes]) -> int:
    """Bytes that the pixels take as they are stored uncompressed, 0 where the header does not say."""
    rows, columns, bits, samples = (_number(values, tag) for tag in (_ROWS, _COLUMNS, _ALLOCATED, _SAMPLES))
    if values.get(_PHOTOMETRIC, b"").startswith(b"YBR_FULL_422"):
        samples = 2  # colour of every other pixel
    return -(-rows * columns * bits * max(samples, 1) * _frames(values) // 8)


def _unpacks_to(frame: bytes, size: int) -> bool:
    """Whether the run lengths of a frame make so many bytes, as many in each of its segments.

    Source: DICOM PS3.5 annex G.
    """
    count, *begins = struct.unpack_from("<16I", frame)
    left = [size // max(count, 1)] * count
    for i, (at, end) in enumerate(zip(begins[:count], [*begins[1:count], len(frame)], strict=True)):
        while at + 1 < end and left[i] > 0:
            code = frame[at]
            if code < 128:  # so many bytes as they are, and one more
                at += code + 2
                left[i] -= code + 1 if at <= end else 0
            else:  # a byte 257 - code times; 128 stands for nothing
                at += 2 if code > 128 else 1
                left[i] -= 257 - code if code > 128 else 0
    return bool(left) and max(left) <= 0


@dataclass(frozen=True)
class _Coded:
    """Data elements, and how they are coded. Source: DICOM PS3.5 section 7."""

    data: bytes | mmap.mmap
    order: str = "<"  # of bytes, as `struct` has it
    explicit: bool = True  # whether elements name their type

    def head(self, at: int) -> tuple[int, bytes, int, int]:
        """Tag and type of the element at `at`, where its value begins, and its length."""
        group, number = struct.unpack_from(f"{self.order}HH", self.data, at)
        vr = self.data[at + 4 : at + 6]
        if not self.explicit or group == _ITEM >> 16 or not _is_type(vr):
            start, kind = at + 8, "I"
        elif vr in _LONG:
            start, kind = at + 12, "I"
        else:
            start, kind = at + 8, "H"
        (length,) = struct.unpack_from(self.order + kind, self.data, start - struct.calcsize(kind))
        return group << 16 | number, vr, start, length

    def elements(self, at: int) -> Iterator[tuple[int, int, int, bool]]:
        """(tag, begin and end of its value, whether that is made of items) up to a delimiter or the end.

        Raises:
            ValueError: one reaches beyond the end.
        """
        while at < len(self.data):
            tag, vr, start, length = self.head(at)
            if tag in (_ITEM_END, _SEQUENCE_END):
                return
            is_nested = length == _UNDEFINED
            if is_nested:
                coded = replace(self, explicit=False) if vr == b"UN" else self
                at = 8 + max((end for _, end in coded.items(start)), default=start)
            else:
                at = start + length
            if at > len(self.data):
                raise ValueError("beyond the end")
            yield tag, start, at, is_nested

    def items(self, at: int) -> Iterator[tuple[int, int]]:
        """(begin, end) of each item of a sequence that a delimiter ends.

        Raises:
            ValueError: there is something else between them, or one reaches beyond the end.
        """
        while (found := self.head(at))[0] == _ITEM:
            _, _, start, length = found
            at = start + length
            if length == _UNDEFINED:
                at = 8 + max((end for _, _, end, _ in self.elements(start)), default=start)
            if at > len(self.data):
                raise ValueError("beyond the end")
            yield start, at
        if found[0] != _SEQUENCE_END:
            raise ValueError("no item")


def read_tags(has: Callable[[str], bool], get: Callable[[str], str], header: Header) -> dict[str, str | None]:
    """`TAGS` as text, None where one is missing or empty; of a file whose own bytes say `header`."""
    tags = {name: (get(tag).strip(" \0") or None) if has(tag) else None for name, tag in TAGS.items()}
    tags["sop_class"] = header.sop_class
    unstated = "CT" if header.sop_class in _CT_CLASSES else ""  # RSNA 2022's files do not state it
    tags["modality"] = (tags["modality"] or unstated).upper()
    return tags


def no_slice(image: Any, tags: Tags, *, frames: int = 1) -> str | None:
    """Why an image of so many frames is no slice of a CT, None where it is one."""
    if tags["modality"] != "CT":
        return f"modality {shown(tags, 'modality')}, not CT"
    if image.GetNumberOfComponentsPerPixel() > 1:
        return "a screen capture"
    if "LOCALIZER" in (tags["image_type"] or "").upper().split("\\"):
        return "a scout"
    if tags["photometric"] not in (None, "MONOCHROME2"):
        return f"photometric interpretation {shown(tags, 'photometric')}, not MONOCHROME2"
    if image.GetDimension() == 3 and image.GetSize()[2] > frames:
        return "several frames in one file (enhanced CT); convert it to one file a slice"
    return None


# What may be shown: UIDs, numbers, and codes of the standard and of manufacturers. All else may be a name.
_SHOWN = {
    "series": r"[0-9.]{1,64}",
    "thickness": r"\d{1,3}(\.\d{1,6})?",
    "modality": r"[A-Z]{2}|SEG|REG|RT(DOSE|IMAGE|PLAN|STRUCT)",
    "photometric": r"MONOCHROME1|RGB|PALETTE COLOR|YBR_(FULL|FULL_422|PARTIAL_420|ICT|RCT)",
    "kernel": r"[A-Z][a-z]?\d\d[a-z]?([\\/]\d)?|[A-Z]{1,2}\d{0,2}"  # Siemens; Philips, Canon
    r"|STANDARD|STND|SOFT|DETAIL|BONE|BONEPLUS|LUNG|EDGE|CHEST|ULTRA",  # GE
}


def shown(tags: Tags, name: str) -> str:
    """What a header says, where it is a known kind of code; else that it has another, told from others."""
    text = tags[name]
    if not text:
        return "not given"
    if re.fullmatch(_SHOWN[name], text):
        return text
    return f"unknown (#{hashlib.sha256(text.encode()).hexdigest()[:4]})"


def hounsfield(view: np.ndarray, tags: Tags) -> tuple[np.ndarray, str]:
    """A copy of what GDCM made Hounsfield units of, (N, Y, X), as int16 or float32, with padding set to air.

    Returns:
        The copy, and a clause where the header's padding value is not obeyed, else "".

    Raises:
        ValueError: slope, intercept or padding value are text that is no number.

    Source: DICOM PS3.3 section C.7.5.1.1.2, Pixel Padding Value and Pixel Padding Range Limit.
    """
    slope, intercept = _real(tags, "slope", 1), _real(tags, "intercept", 0)
    pixels = np.empty(view.shape, np.float32 if view.dtype.kind == "f" else np.int16)
    for stored, plane in zip(view, pixels, strict=True):  # plane by plane, while it is in the cache
        if pixels.dtype == np.int16 != view.dtype:
            stored = np.clip(stored, -32768, 32767)
        plane[...] = stored
    if tags["padding"] is None:
        return pixels, ""
    bits, ends = int(_real(tags, "bits", 16)), []
    for name in ("padding", "padding_limit" if tags["padding_limit"] else "padding"):
        value = int(_real(tags, name, 0)) % 2**bits  # as signed or unsigned, and GDCM drops the bits above
        if tags["signed"] == "1" and value >= 2 ** (bits - 1):
            value -= 2**bits
        ends.append(value * slope + intercept)
    low, high = min(ends), max(ends)
    if high > _TISSUE_HU[0] and low < _TISSUE_HU[1]:
        return pixels, f"its padding value, {low:g} HU, is one that tissue has, and is left as it is"
    pixels[(view >= low - 0.5 * slope) & (view <= high + 0.5 * slope)] = AIR_HU
    return pixels, ""


def _real(tags: Tags, name: str, default: float) -> float:
    """The first number of an element; the default where it has none."""
    text = (tags[name] or "").split("\\")[0].strip() or str(default)
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text):
        raise ValueError(f"its {name.replace('_', ' ')} is no number")
    return float(text)
