"""DICOM files: what is read of their headers, and what keeps a file from being a slice of the CT.

GDCM fills pixels that are not there with what lies in memory: a file's bytes are looked at before. What
identifies a patient (names, dates, descriptions) is never read, and no free text is shown as it is written.

DICOM series: which files of a folder are the slices of one CT, read whole, and everything else said aloud.

Nothing is taken from file names.
"""

import filecmp
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cspine_helpers.ct.libraries import complaints, optional, reason, simpleitk
from cspine_helpers.ct.stack import Slice, reconstructions, stack
from cspine_helpers.ct.volume import AIR_HU, Volume
from cspine_helpers.files.paths import listing

Tags = Mapping[str, str | None]
TAGS = {
    "series": "0020|000e",
    "modality": "0008|0060",
    "image_type": "0008|0008",
    "sop_class": "0008|0016",
    "number": "0020|0013",
    "acquisition": "0020|0012",
    "series_number": "0020|0011",
    "series_time": "0008|0031",
    "position": "0020|0032",
    "orientation": "0020|0037",
    "pixel_spacing": "0028|0030",
    "samples": "0028|0002",
    "photometric": "0028|0004",
    "allocated": "0028|0100",
    "bits": "0028|0101",
    "high_bit": "0028|0102",
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
_INT16 = (-32768, 32767)
_TISSUE_HU = (-900, 3000)  # a padding value in here would be taken for the patient
_OVERLAY_BIT = [0x60000102 + (group << 16) for group in range(0, 32, 2)]  # OverlayBitPosition, of up to 16
_READ = [  # elements; pydicom skips the values of the others
    *("TransferSyntaxUID", "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "PhotometricInterpretation"),
    *("SamplesPerPixel", "NumberOfFrames", "Rows", "Columns", "PixelData"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("PixelPaddingValue", "RescaleIntercept", "RescaleSlope"),
    *_OVERLAY_BIT,
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]
_GROUPS = {  # of enhanced CT, DICOM PS3.3 section C.7.6.16: functional group → element → name in `TAGS`
    "PlanePositionSequence": {"ImagePositionPatient": "position"},
    "PlaneOrientationSequence": {"ImageOrientationPatient": "orientation"},
    "PixelMeasuresSequence": {"PixelSpacing": "pixel_spacing", "SliceThickness": "thickness"},
    "PixelValueTransformationSequence": {"RescaleIntercept": "intercept", "RescaleSlope": "slope"},
    "FrameContentSequence": {"FrameAcquisitionNumber": "acquisition"},
    "CTReconstructionSequence": {"ConvolutionKernel": "kernel"},
}
_PIXELS, _UNDEFINED = 0x7FE00010, 0xFFFFFFFF  # tag; length of what a delimiter ends
_ITEM = b"\xfe\xff"  # group of what is first in a sequence of undefined length: an item, or the delimiter
_DEFERRED = 1 << 12  # bytes from which a value is skipped
_META = 144  # bytes up to where the length that the meta header declares is counted from
_FIRST = re.compile(rb"[\x02\x08]\0.\0|\0\x08\0", re.DOTALL)  # tag that a file without a preamble begins with
_BIG_ENDIAN, _DEFLATED = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
_JPEG, _RLE = "1.2.840.10008.1.2.4.", "1.2.840.10008.1.2.5"
_HOLE = bytes(4096)  # a block of a disk; JPEG 2000 does not write as many zeros
_NO_TISSUE = -2048  # HU that only padding, one value, is below


@dataclass(frozen=True)
class Header:
    """What a DICOM file's own bytes say.

    Attributes:
        path: the file.
        sop_class: what the file is, by its data set, else by its meta header; "" where neither says.
        instance: SOPInstanceUID, "" where there is none.
        series: SeriesInstanceUID, as it is `shown`; "" where there is none.
        shape: rows and columns, 0 where it does not say.
        frames: of enhanced CT, what is said of each frame, as in `TAGS`.
        damage: why its pixels cannot be those that it describes; "" where they can.
    """

    path: Path
    sop_class: str
    instance: str
    series: str
    shape: tuple[int, int]
    frames: tuple[dict[str, str | None], ...]
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
    pydicom = optional("pydicom")
    with open(path, "rb") as file:
        start = file.read(132)
    if start[128:] != b"DICM" and not _FIRST.match(start):
        return None
    garbled = Header(path, "", "", "", (0, 0), (), "cut off, or garbled")
    try:
        with pydicom.config.disable_value_validation():  # its warnings would show values
            found = pydicom.dcmread(path, force=True, defer_size=_DEFERRED, specific_tags=_READ)
            if found.file_meta.get("TransferSyntaxUID") == _DEFLATED:  # nothing can be skipped there
                found = pydicom.dcmread(path, force=True, specific_tags=_READ)
            if _ends_early(found, path):
                return garbled
            damage = _damage(found, path)
            sop_class = found.get("SOPClassUID") or found.file_meta.get("MediaStorageSOPClassUID") or ""
            shape = int(found.get("Rows") or 0), int(found.get("Columns") or 0)
            instance, series = (str(found.get(f"{its}InstanceUID") or "") for its in ("SOP", "Series"))
            series = shown({"series": series}, "series") if series else ""
            return Header(path, str(sop_class), instance, series, shape, _frame_tags(found), damage)
    except Exception:  # of many kinds: pydicom lets through what its parts raise at garbled bytes
        return garbled


def _frame_tags(found: Any) -> tuple[dict[str, str | None], ...]:
    """Each frame's tags; none where frames are rescaled differently: GDCM takes the first one's rescale."""
    shared, frames = (
        [_groups(item) for item in found.get(f"{whose}FunctionalGroupsSequence") or ()]
        for whose in ("Shared", "PerFrame")
    )
    unknown = dict.fromkeys(name for elements in _GROUPS.values() for name in elements.values())
    frames = [{**unknown, **(shared or [{}])[0], **own} for own in frames]
    alike = len({(its["slope"], its["intercept"]) for its in frames}) == 1
    return tuple(its | {"number": str(k)} for k, its in enumerate(frames, start=1)) if alike else ()


def _groups(item: Any) -> dict[str, str | None]:
    """What one item of functional groups says."""
    said = {}
    for sequence, elements in _GROUPS.items():
        for group in (item.get(sequence) or ())[:1]:
            for element, name in elements.items():
                value = group.get(element)
                parts = [value] if isinstance(value, str) or not hasattr(value, "__iter__") else value
                said[name] = "\\".join(str(part) for part in parts if part is not None) or None
    return said


def _ends_early(found: Any, path: Path) -> bool:
    """Whether the file ends within its meta header or within a value that its element declares."""
    size = path.stat().st_size
    if size <= _META + found.file_meta.get("FileMetaInformationGroupLength", 0):
        return True
    return any(
        isinstance(its, optional("pydicom").dataelem.RawDataElement)
        and its.tag != _PIXELS  # of these `_damage` says more
        and its.length != _UNDEFINED
        and (its.value_tell + its.length > size if its.value is None else len(its.value) < its.length)
        for its in found.values()
    )


def _damage(found: Any, path: Path) -> str:
    """Why a data set's pixels are not those that it describes, "" where they are."""
    syntax = str(found.file_meta.get("TransferSyntaxUID", ""))
    pixels = found.get_item(_PIXELS, keep_deferred=True)
    if pixels is None:
        return "without pixels"
    bits = int(found.get("BitsAllocated") or 0)
    if bits not in (0, 8, 16, 16 if syntax == _BIG_ENDIAN else 32):  # readers differ on the others
        return f"{bits} bits a pixel, which are not read as it stores them"
    if pixels.length == _UNDEFINED:
        if syntax == _RLE:  # raises where it is cut off
            words = optional("pydicom").pixel_array(path, raw=True, bits_stored=bits)  # drops none
            return _overflow(found, bits, words.tobytes(), "<")
        is_known = syntax.startswith(_JPEG)
        return _jpeg(found, path, bits) if is_known else "compressed pixels, and not a word on how"
    size, length = _size(found, bits), len(pixels.value or b"")
    if pixels.value is None and pixels.length:  # skipped
        length = min(pixels.length, path.stat().st_size - pixels.value_tell)
    if not size:
        return "its header does not say how large the image is"
    if not size <= length <= size + 1:  # a byte more makes it even
        return f"{length} bytes of pixels where its header describes {size}"
    is_shifted = syntax != _DEFLATED and not _ends_well(path, pixels, found.original_encoding)
    if is_shifted:
        return "bytes behind its pixels that are none of its elements"
    return _overflow(found, bits, found.PixelData, ">" if syntax == _BIG_ENDIAN else "<")


def _jpeg(found: Any, path: Path, bits: int) -> str:
    """Why JPEG data are not all there or of more bits than the header describes, "" where they are right.

    Decoders take an image without an end for a whole one, and drop bits.
    """
    encaps, utils = optional("pydicom.encaps"), optional("pydicom.pixels.utils")
    stored = min(bits, -(-int(found.get("BitsStored") or bits) // 8) * 8)  # whole bytes: encoders write them
    with open(path, "rb") as file:
        file.seek(found.get_item(_PIXELS, keep_deferred=True).value_tell)
        for frame in encaps.generate_frames(file, number_of_frames=int(found.get("NumberOfFrames") or 1)):
            wavelets = utils.get_j2k_parameters(frame)
            said = wavelets or utils._get_jpg_parameters(frame)
            if bits and said.get("precision", 0) > stored:
                return f"{said['precision']} bits a pixel where its header describes {stored}"
            if _HOLE in frame if wavelets else not frame.rstrip(b"\0\xff").endswith(b"\xff\xd9"):
                return "its JPEG data are not all there"
    return ""


def _overflow(found: Any, bits: int, pixels: bytes, order: str) -> str:
    """Why 16-bit words are not values of as few bits as the header describes, "" where they are.

    GDCM drops the bits above, so that larger values wrap. Above may stand the sign, padding, which is one
    value, and in old files overlays.
    """
    stored = int(found.get("BitsStored") or bits)
    if bits != 16 or not 0 < stored < bits or int(found.get("HighBit") or 0) != stored - 1:
        return ""
    if any(int(found[tag].value or 0) >= stored for tag in _OVERLAY_BIT if tag in found):
        return ""
    words = np.flatnonzero(np.bincount(np.frombuffer(pixels[: len(pixels) // 2 * 2], f"{order}u2")))
    above, negative = words >> stored, words >> (stored - 1) & 1 == 1
    is_signed, extended = found.get("PixelRepresentation") == 1, 2 ** (bits - stored) - 1
    is_over = above > 0
    if is_signed:
        is_over &= ~(negative & (above == extended))
        low = (words - 2**stored) * float(found.get("RescaleSlope") or 1)
        low += float(found.get("RescaleIntercept") or 0)
        extends = (negative & (above == extended)).any()  # then a writer does so with all that are negative
        is_over |= negative & (above == 0) & (extends | (low < _NO_TISSUE))
    padding = found.get("PixelPaddingValue")
    is_over &= words != (-1 if padding is None else int(padding) % 2**bits)
    return f"values of more than the {stored} bits that its header describes" if is_over.sum() > 1 else ""


def _ends_well(path: Path, pixels: Any, encoding: tuple[bool, bool]) -> bool:
    """Whether an element or nothing comes after pixels of a stated length.

    Bytes that were put in before (line ends, by a transfer as text) push as many of the last pixels out.
    """
    with open(path, "rb") as file:
        file.seek(pixels.value_tell + pixels.length)
        rest = file.read(10)
    is_implicit, is_little = encoding
    parts = (rest[:2], rest[2:4], rest[4:8])
    group, number, length = (int.from_bytes(part, "little" if is_little else "big") for part in parts)
    left = path.stat().st_size - pixels.value_tell - pixels.length
    if is_implicit:
        is_whole = rest[8:] == _ITEM if length == _UNDEFINED else length <= left - 8
    else:
        is_whole = rest[4:6].isalpha() and rest[4:6].isupper()
    return not rest or (group << 16 | number > _PIXELS and is_whole)


def _size(found: Any, bits: int) -> int:
    """Bytes that the pixels take as they are stored uncompressed, 0 where the header does not say."""
    names = ("Rows", "Columns", "SamplesPerPixel", "NumberOfFrames")
    rows, columns, samples, frames = (int(found.get(name) or 0) for name in names)
    if found.get("PhotometricInterpretation") == "YBR_FULL_422":
        samples = 2  # colour of every other pixel
    return -(-rows * columns * bits * max(samples, 1) * max(frames, 1) // 8)


def read_tags(has: Callable[[str], bool], get: Callable[[str], str], header: Header) -> dict[str, str | None]:
    """`TAGS` as text, None where one is missing or empty; of a file whose own bytes say `header`."""
    tags = {name: (get(tag).strip(" \0") or None) if has(tag) else None for name, tag in TAGS.items()}
    tags["sop_class"], tags["series"] = header.sop_class, header.series or None
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
        return (
            "several frames in one file, without places or unequally rescaled; convert it to one file a slice"
        )
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
    return f"unknown-{hashlib.sha256(text.encode()).hexdigest()[:4]}"


def hounsfield(view: np.ndarray, tags: Tags) -> tuple[np.ndarray, str]:
    """A copy of what GDCM made Hounsfield units of, (N, Y, X), as int16 or float32, with padding set to air.

    Returns:
        The copy, and a clause where the header's padding value is not obeyed or values are below those of
        int16, else "".

    Raises:
        ValueError: slope, intercept or padding value are text that is no number; values above
            those of int16, as of a slice whose sign was lost.

    Source: DICOM PS3.3 section C.7.5.1.1.2, Pixel Padding Value and Pixel Padding Range Limit.
    """
    slope, intercept = _real(tags, "slope", 1), _real(tags, "intercept", 0)
    pixels = np.empty(view.shape, np.float32 if view.dtype.kind == "f" else np.int16)
    for stored, plane in zip(view, pixels, strict=True):  # plane by plane, while it is in the cache
        plane[...] = np.clip(stored, *_INT16) if pixels.dtype == np.int16 != view.dtype else stored
    notes = []
    if tags["padding"] is not None:
        low, high = _padding(tags, slope, intercept)
        if high > _TISSUE_HU[0] and low < _TISSUE_HU[1]:
            notes.append(f"its padding value, {low:g} HU, is one that tissue has, and is left as it is")
        else:
            pixels[(view >= low - 0.5 * slope) & (view <= high + 0.5 * slope)] = AIR_HU
    if pixels.dtype == np.int16 != view.dtype:
        low, high = _INT16
        if pixels.max() == high and (view[pixels == high] > high).any():
            raise ValueError(f"values above {high} HU, which no tissue and no metal has")
        if pixels.min() == low and (view[pixels == low] < low).any():
            notes.append(f"values below {low} HU, as padding has, are set to {low} HU")
    return pixels, "; ".join(notes)


def _padding(tags: Tags, slope: float, intercept: float) -> tuple[float, float]:
    """The lowest and the highest padding value, HU."""
    bits, ends = int(_real(tags, "bits", 16)), []
    for name in ("padding", "padding_limit" if tags["padding_limit"] else "padding"):
        value = int(_real(tags, name, 0)) % 2**bits  # as signed or unsigned, and GDCM drops the bits above
        if tags["signed"] == "1" and value >= 2 ** (bits - 1):
            value -= 2**bits
        ends.append(value * slope + intercept)
    return min(ends), max(ends)


def _real(tags: Tags, name: str, default: float) -> float:
    """The first number of an element; the default where it has none."""
    text = (tags[name] or "").split("\\")[0].strip() or str(default)
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text):
        raise ValueError(f"its {name.replace('_', ' ')} is no number")
    return float(text)


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
