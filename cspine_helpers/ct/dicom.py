"""A folder of DICOM becomes one CT: which files are its slices, read whole, and why each other file is none.

Nothing is taken from file names. GDCM fills missing pixels with what lies in memory, so a file's own bytes
are checked before it decodes them. What identifies a patient (names, dates, descriptions) is never read, and
free text is never shown as it is written. A repair of one file's values belongs in `hounsfield`, a check of
its bytes in `_damage`, and all that concerns slices beside each other in `stack`.
"""

import filecmp
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from cspine_helpers.ct.stack import Slice, reconstructions, stack
from cspine_helpers.ct.volume import AIR_HU, Volume, complaints, optional, reason, simpleitk
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
_WORDS = ("allocated", "bits", "high_bit", "signed")
# Where these differ from file to file, they are read one by one: GDCM converts each as its own header says.
_STORED_ALIKE = (
    *("series", "modality", "image_type", "sop_class", "samples", "photometric"),
    *(*_WORDS, "intercept", "slope", "padding", "padding_limit"),
)
_CT = "1.2.840.10008.5.1.4.1.1.2"
_CT_CLASSES = (_CT, f"{_CT}.1", f"{_CT}.2")  # a slice; enhanced; enhanced, converted from slices
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # also .7.1 to .7.4, with several frames
_BIG_ENDIAN, _DEFLATED = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
_JPEG, _RLE = "1.2.840.10008.1.2.4.", "1.2.840.10008.1.2.5"
_INT16 = (-32768, 32767)
_TISSUE_HU = (-900, 3000)  # a padding value in here would be taken for the patient
_NO_TISSUE = -2048  # HU that only padding, one value, is below
_OVERLAY_BIT = [0x60000102 + (group << 16) for group in range(0, 32, 2)]  # OverlayBitPosition, of up to 16
_READ = (  # elements; pydicom skips the values of the others
    *("TransferSyntaxUID", "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "PhotometricInterpretation"),
    *("SamplesPerPixel", "NumberOfFrames", "Rows", "Columns", "PixelData"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("PixelPaddingValue", "RescaleIntercept", "RescaleSlope"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)
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
_HOLE = bytes(4096)  # a block of a disk; JPEG 2000 does not write as many zeros


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
    sop_class: str = ""
    instance: str = ""
    series: str = ""
    shape: tuple[int, int] = (0, 0)
    frames: tuple[dict[str, str | None], ...] = ()
    damage: str = "cut off, or garbled"

    @property
    def is_capture(self) -> bool:
        """Whether it calls itself a secondary capture: an image of a screen, or of paper."""
        return self.sop_class.startswith(_SECONDARY_CAPTURE)

    @property
    def is_other(self) -> bool:
        """Whether it calls itself no CT: a report, a directory, a capture."""
        return self.sop_class not in ("", *_CT_CLASSES)


@dataclass
class _Folder:
    """What a folder holds.

    Attributes:
        images: file name → header, of those that may hold slices.
        left_out: file name → why it holds no slice of the CT.
        damaged: file name → what is wrong with it.
        total: number of files.
        unseen: number of folders that were not looked into.
        slices: those of the CT that were read.
        pixels: Hounsfield units of each slice.
        notes: what was odd about their values.
    """

    images: dict[str, Header] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    total: int = 0
    unseen: int = 0
    slices: list[Slice] = field(default_factory=list)
    pixels: Sequence[np.ndarray] | np.ndarray = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_series(folder: Path, *, series: str | None = None) -> Volume:
    """The CT of a folder, from its slices' headers.

    A file holds one slice, or many as frames (enhanced CT). Scouts, screen captures and files that are no
    images are skipped with a warning. Slices are ordered by their positions; see `stack` for what is
    repaired and what is refused.

    Args:
        folder: holds the slices, or folders that do where it has none itself.
        series: SeriesInstanceUID, where there are several; with #1, #2 … behind it, where it holds several
            reconstructions.

    Raises:
        FileNotFoundError: the folder holds no file.
        ValueError: no CT, several series, damaged files, or slices that make no volume; names them.
    """
    # 1. The files, and their pixels.
    found = _sort_out(folder, (series or "").partition("#")[0] or None)
    if found.damaged or not _read_at_once(found):
        _read_one_by_one(found)
    if found.damaged:
        raise ValueError(
            f"{folder.name}: {len(found.damaged)} of {found.total} files cannot be read "
            f"({_reasons(found.damaged)}). They may be cut off or damaged: copy them again; a CT with slices "
            "missing is not packed."
        )
    if not found.slices:
        raise ValueError(
            f"{folder.name} holds no CT image among its {found.total} files ({_reasons(found.left_out)}). "
            "Give the folder of an axial CT series."
        )
    # 2. The slices of one series.
    chosen, pixels = _choose(found.slices, series, folder.name), found.pixels
    if len(chosen) < len(found.slices):
        kept = {id(its) for its in chosen}
        pixels = [plane for its, plane in zip(found.slices, pixels, strict=True) if id(its) in kept]
    # 3. Their volume.
    try:
        _check_words(chosen)
        notes = sorted({*found.notes, *_without_rescale(chosen)})
        volume = stack(chosen, pixels)
    except ValueError as error:
        raise ValueError(f"{folder.name}: {error}.") from None
    if found.left_out:  # counted: warnings are kept in tables, and a file's name may be a patient's
        kinds = (f"{count} × {why}" for why, count in Counter(found.left_out.values()).items())
        notes.insert(0, f"files skipped that are not slices of the CT: {', '.join(kinds)}")
    if found.unseen:
        notes.append(f"folders beside the slices were not looked into ({found.unseen})")
    return replace(volume, warnings=(*notes, *volume.warnings))


def series_in(folder: Path) -> set[str]:
    """SeriesInstanceUIDs of a folder's images, which are not decoded; see `read_series` for which files."""
    return {header.series for header in _sort_out(folder).images.values()}


# 1. Which files may hold slices.


def _sort_out(folder: Path, series: str | None = None) -> _Folder:
    """The files of a folder; where none of them may hold a slice of the series, also those in folders below.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: links are broken; names them.
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


def _sorted_out(folder: Path, files: list[Path], series: str | None) -> _Folder:
    if gone := [path.name for path in files if not path.is_file()]:
        raise ValueError(
            f"{folder.name}: broken links ({len(gone)}): {listing(gone)}. Get the files that they link to."
        )
    found = _Folder(total=len(files))
    headers = {path: read_header(path) for path in files}
    alike = {_pattern(path) for path, header in headers.items() if header}
    chosen = series in {header.series for header in headers.values() if header}
    seen: dict[tuple[int, str], list[Path]] = defaultdict(list)
    for path, header in headers.items():
        name = path.relative_to(folder).as_posix()
        if header is None and (path.suffix.lower() in (".dcm", ".dicom") or _pattern(path) in alike):
            found.damaged[name] = "nothing can be read"
        elif header is None:
            found.left_out[name] = "no DICOM file"
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


def _pattern(path: Path) -> str:
    """A file's name without its numbers, decimal or hexadecimal: slices have one in common."""
    return re.sub(r"[0-9A-Fa-f.]*[0-9][0-9A-Fa-f.]*", "#", path.name)


# 2. What a file's own bytes say.


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM does: with its preamble, or as a data set."""
    with open(path, "rb") as file:
        start = file.read(132)
    return start[128:] == b"DICM" or _FIRST.match(start) is not None


def read_header(path: Path) -> Header | None:
    """What a file's bytes say, before GDCM decodes them.

    Returns:
        None for what is no DICOM file: it has no preamble, and does not begin as a data set.
    """
    if not is_dicom(path):
        return None
    pydicom = optional("pydicom")
    try:
        with pydicom.config.disable_value_validation():  # its warnings would show values
            found = pydicom.dcmread(path, force=True, defer_size=_DEFERRED, specific_tags=_elements())
            if found.file_meta.get("TransferSyntaxUID") == _DEFLATED:  # nothing can be skipped there
                found = pydicom.dcmread(path, force=True, specific_tags=_elements())
            size = path.stat().st_size
            if _ends_early(found, size):
                return Header(path)
            damage = _damage(found, path, size)
            sop_class = found.get("SOPClassUID") or found.file_meta.get("MediaStorageSOPClassUID") or ""
            shape = int(found.get("Rows") or 0), int(found.get("Columns") or 0)
            instance, series = (str(found.get(f"{its}InstanceUID") or "") for its in ("SOP", "Series"))
            series = shown({"series": series}, "series") if series else ""
            return Header(path, str(sop_class), instance, series, shape, _frame_tags(found), damage)
    except Exception:  # of many kinds: pydicom lets through what its parts raise at garbled bytes
        return Header(path)


@cache
def _elements() -> list[int]:
    """Tags of `_READ`, looked up once and not in every file."""
    return list(map(optional("pydicom").tag.Tag, _READ))


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


def _ends_early(found: Any, size: int) -> bool:
    """Whether the file ends within its meta header or within a value that its element declares."""
    if size <= _META + found.file_meta.get("FileMetaInformationGroupLength", 0):
        return True
    raw = optional("pydicom").dataelem.RawDataElement
    return any(
        isinstance(its, raw)
        and its.tag != _PIXELS  # of these `_damage` says more
        and its.length != _UNDEFINED
        and (its.value_tell + its.length > size if its.value is None else len(its.value) < its.length)
        for its in found.values()
    )


def _damage(found: Any, path: Path, size: int) -> str:
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
            return _overflow(found, path, bits, words.tobytes, "<")
        if syntax.startswith(_JPEG):
            return _jpeg(found, path, bits)
        return "compressed pixels, and not a word on how"
    described, length = _described_size(found, bits), len(pixels.value or b"")
    if pixels.value is None and pixels.length:  # skipped
        length = min(pixels.length, size - pixels.value_tell)
    if not described:
        return "its header does not say how large the image is"
    if not described <= length <= described + 1:  # a byte more makes it even
        return f"{length} bytes of pixels where its header describes {described}"
    if syntax != _DEFLATED and not _ends_well(path, pixels, size, found.original_encoding):
        return "bytes behind its pixels that are none of its elements"
    return _overflow(found, path, bits, lambda: found.PixelData, ">" if syntax == _BIG_ENDIAN else "<")


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


def _overflow(found: Any, path: Path, bits: int, read: Callable[[], bytes], order: str) -> str:
    """Why 16-bit words are not values of as few bits as the header describes, "" where they are.

    GDCM drops the bits above, so that larger values wrap. These may hold the sign, padding, which is one
    value, and in old files overlays.
    """
    stored = int(found.get("BitsStored") or bits)
    if bits != 16 or not 0 < stored < bits or int(found.get("HighBit") or 0) != stored - 1:
        return ""
    pixels, is_signed = read(), found.get("PixelRepresentation") == 1
    values = np.frombuffer(pixels, f"{order}{'i' if is_signed else 'u'}2", len(pixels) // 2)
    low, high = (-(2 ** (stored - 1)), 2 ** (stored - 1) - 1) if is_signed else (0, 2**stored - 1)
    if low <= values.min(initial=0) and values.max(initial=0) <= high:
        return ""  # nearly all files; the rest is slower
    overlays = optional("pydicom").dcmread(path, force=True, specific_tags=_OVERLAY_BIT)
    if any(int(overlays[tag].value or 0) >= stored for tag in _OVERLAY_BIT if tag in overlays):
        return ""
    words = np.flatnonzero(np.bincount(values.view(f"{order}u2")))
    above, negative = words >> stored, words >> (stored - 1) & 1 == 1
    extended = 2 ** (bits - stored) - 1
    is_over = above > 0
    if is_signed:
        is_over &= ~(negative & (above == extended))
        low_hu = (words - 2**stored) * float(found.get("RescaleSlope") or 1)
        low_hu += float(found.get("RescaleIntercept") or 0)
        extends = (negative & (above == extended)).any()  # then a writer does so with all that are negative
        is_over |= negative & (above == 0) & (extends | (low_hu < _NO_TISSUE))
    padding = found.get("PixelPaddingValue")
    is_over &= words != (-1 if padding is None else int(padding) % 2**bits)
    return f"values of more than the {stored} bits that its header describes" if is_over.sum() > 1 else ""


def _ends_well(path: Path, pixels: Any, size: int, encoding: tuple[bool, bool]) -> bool:
    """Whether an element or nothing comes after pixels of a stated length.

    Bytes that were put in before (line ends, by a transfer as text) push as many of the last pixels out.
    """
    end = pixels.value_tell + pixels.length
    if end >= size:
        return True
    with open(path, "rb") as file:
        file.seek(end)
        rest = file.read(10)
    is_implicit, is_little = encoding
    parts = (rest[:2], rest[2:4], rest[4:8])
    group, number, length = (int.from_bytes(part, "little" if is_little else "big") for part in parts)
    if is_implicit:
        is_whole = rest[8:] == _ITEM if length == _UNDEFINED else length <= size - end - 8
    else:
        is_whole = rest[4:6].isalpha() and rest[4:6].isupper()
    return group << 16 | number > _PIXELS and is_whole


def _described_size(found: Any, bits: int) -> int:
    """Bytes that the pixels take as they are stored uncompressed, 0 where the header does not say."""
    names = ("Rows", "Columns", "SamplesPerPixel", "NumberOfFrames")
    rows, columns, samples, frames = (int(found.get(name) or 0) for name in names)
    if found.get("PhotometricInterpretation") == "YBR_FULL_422":
        samples = 2  # colour of every other pixel
    return -(-rows * columns * bits * max(samples, 1) * max(frames, 1) // 8)


# 3. Their pixels.


def _read_at_once(found: _Folder) -> bool:
    """Read all files in one call, at twice the speed; False unless all are slices of one CT, stored alike."""
    headers = found.images
    names = sorted(headers, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
    if not names or any(header.frames for header in headers.values()):
        return False
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
        return False  # whatever it is, reading one by one finds it and says so
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(warns)
    tags = [
        _tags(partial(reader.HasMetaDataKey, i), partial(reader.GetMetaData, i), headers[name])
        for i, name in enumerate(names)
    ]
    alike = all(its[name] == tags[0][name] for its in tags for name in _STORED_ALIKE)
    whole = image.GetDimension() == 3 and image.GetSize()[2] == len(names)
    whole &= all(header.shape == image.GetSize()[1::-1] for header in headers.values())
    if said or not (alike and whole) or _no_slice(image, tags[0], frames=len(names)):
        return False
    del reader  # it shares the image, which would be copied to be looked at
    try:
        pixels, note = hounsfield(np.asarray(_Kept(image)), tags[0])
    except ValueError:
        return False
    found.slices = [Slice(name, pixels.shape[1:], its) for name, its in zip(names, tags, strict=True)]
    found.pixels, found.notes = pixels, [note] if note else []
    return True


def _read_one_by_one(found: _Folder) -> None:
    """Read each file by its own header, and note which are damaged or hold no slice."""
    sitk = simpleitk()
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.LoadPrivateTagsOff()
    planes: list[np.ndarray] = []
    for name, header in found.images.items():
        reader.SetFileName(str(header.path))
        try:
            with complaints() as said:
                image = reader.Execute()
        except RuntimeError as error:
            kind = found.left_out if header.is_other else found.damaged
            kind[name] = "no image" if header.is_other else reason(error)
            continue
        tags = _tags(reader.HasMetaDataKey, reader.GetMetaData, header)
        frames = [tags | its for its in header.frames] or [tags]
        if other := _no_slice(image, tags, frames=len(frames)):
            found.left_out[name] = other
            continue
        view = np.asarray(_Kept(image))
        view = view.reshape(-1, *view.shape[-2:])
        try:
            if said or view.shape[1:] != header.shape or len(view) != len(frames):
                raise ValueError(*said or ["its image is of another size than its header describes"])
            pixels, note = hounsfield(view, frames[0])
        except ValueError as error:
            found.damaged[name] = str(error)
            continue
        planes.extend(pixels)
        found.slices += [
            Slice(f"{name}, frame {its['number']}" if header.frames else name, pixels.shape[1:], its)
            for its in frames
        ]
        found.notes += [note] if note else []
    found.pixels = planes


def _tags(has: Callable[[str], bool], get: Callable[[str], str], header: Header) -> dict[str, str | None]:
    """`TAGS` as text, None where one is missing or empty; of a file whose own bytes say `header`."""
    tags = {name: (get(tag).strip(" \0") or None) if has(tag) else None for name, tag in TAGS.items()}
    tags["sop_class"], tags["series"] = header.sop_class, header.series or None
    unstated = "CT" if header.sop_class in _CT_CLASSES else ""  # RSNA 2022's files do not state it
    tags["modality"] = (tags["modality"] or unstated).upper()
    return tags


def _no_slice(image: Any, tags: Tags, *, frames: int) -> str | None:
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


class _Kept:
    """An image's pixels without a copy: their array keeps this object, and with it the image."""

    def __init__(self, image: Any) -> None:
        self.image = image
        self.__array_interface__ = simpleitk().GetArrayViewFromImage(image).__array_interface__


def hounsfield(view: np.ndarray, tags: Tags) -> tuple[np.ndarray, str]:
    """What GDCM made Hounsfield units of, (N, Y, X), as int16 or float32, with padding set to air.

    Returns:
        `view` itself where no value changes, else a copy; and a clause where the header's padding value is
        not obeyed or values are below those of int16, else "".

    Raises:
        ValueError: slope, intercept or padding value are text that is no number; values above
            those of int16, as of a slice whose sign was lost.

    Source: DICOM PS3.3 section C.7.5.1.1.2, Pixel Padding Value and Pixel Padding Range Limit.
    """
    slope, intercept = _real(tags, "slope", 1), _real(tags, "intercept", 0)
    pixels, notes, is_whole = view, list[str](), view.dtype.kind != "f"
    if view.dtype != (np.int16 if is_whole else np.float32):
        pixels = np.empty(view.shape, np.int16 if is_whole else np.float32)
        for stored, plane in zip(view, pixels, strict=True):  # plane by plane, while it is in the cache
            plane[...] = np.clip(stored, *_INT16) if is_whole else stored
    if tags["padding"] is not None:
        low, high = _padding(tags, slope, intercept)
        if high > _TISSUE_HU[0] and low < _TISSUE_HU[1]:
            notes.append(f"its padding value, {low:g} HU, is one that tissue has, and is left as it is")
        else:
            pixels = pixels.copy() if pixels is view else pixels
            pixels[(view >= low - 0.5 * slope) & (view <= high + 0.5 * slope)] = AIR_HU
    if is_whole and view.dtype != np.int16:
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


# 4. The slices of one series.


def _choose(slices: list[Slice], series: str | None, folder: str) -> list[Slice]:
    """The slices of one series.

    Raises:
        ValueError: there are several and none was chosen, or the chosen one is not there; describes each.
    """
    how = "series=... (in packing, --series), or keep one a folder"
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
            f"{folder} holds {len(by_series)} CT series{asked}. Choose one by its SeriesInstanceUID with "
            f"{how}: {described}."
        )
    parts, apart = reconstructions(by_series[uid])
    by_number = {str(i): part for i, part in enumerate(parts, start=1)} | ({} if apart else {"": parts[0]})
    if number not in by_number:
        cause = f"slices of {apart} lie between each other: {len(parts)} series in one"
        described = "; ".join(
            f"'{uid}#{i}' ({len(part)} slices, as {part[0].name!r})" for i, part in enumerate(parts, start=1)
        )
        raise ValueError(
            f"{folder}: {cause if apart else 'it is one series'}. Choose with {how}: {described}."
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


def _without_rescale(slices: list[Slice]) -> Iterator[str]:
    """What is taken for a rescale intercept or slope that no slice has.

    Raises:
        ValueError: some slices have one, and others none, or none that is a number above or below 0.
    """
    for tag, taken in (("intercept", "its values are taken as Hounsfield units"), ("slope", "1 is taken")):
        given = [its.numbers(tag, 1) for its in slices]
        lost = [
            its.name
            for its, number in zip(slices, given, strict=True)
            if number is None or (tag == "slope" and number == 0)
        ]
        if lost and len(lost) < len(slices):
            raise ValueError(
                f"{len(lost)} of {len(slices)} slices have lost their rescale {tag}: {listing(lost)}. Take "
                "the original files"
            )
        if lost:
            yield f"it has no rescale {tag}; {taken}"


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
    """What a header says, where it is a known kind of code; else a short hash, as any text may be a name."""
    text = tags[name]
    if not text:
        return "not given"
    if re.fullmatch(_SHOWN[name], text):
        return text
    return f"unknown-{hashlib.sha256(text.encode()).hexdigest()[:4]}"


def _described(uid: str, slices: list[Slice]) -> str:
    kernel, thickness = (shown(slices[0].tags, name) for name in ("kernel", "thickness"))
    return f"{uid or 'without a UID'} ({len(slices)} slices, {thickness} mm, kernel {kernel})"


def _reasons(found: Mapping[str, str]) -> str:
    """File names by reason: "a scout: 'a', 'b'; no image: 'c', 'd' and 7 more"."""
    by_reason: dict[str, list[str]] = {}
    for name, why in found.items():
        by_reason.setdefault(why, []).append(name)
    return "; ".join(f"{why}: {listing(names)}" for why, names in by_reason.items())
