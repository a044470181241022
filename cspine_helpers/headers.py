"""DICOM files: what is read of their headers, and what keeps a file from being a slice of the CT.

GDCM fills pixels that are not there with what lies in memory: a file's bytes are looked at before. What
identifies a patient (names, dates, descriptions) is never read, and no free text is shown as it is written.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cspine_helpers.itk import optional
from cspine_helpers.volume import AIR_HU

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
