"""One radiograph from its file to the 8 bits that a viewer shows, and from there into the network's frame.

What a file is, its bytes say, not its name. The displayed frame is the package's one frame of a radiograph:
EXIF orientation is applied first, and sizes, polygons and masks are all in it. Coordinates count from the top
left corner, so that pixel i lies between i and i + 1. Nothing is repaired: a file that does not decode whole
is refused.
"""

import io
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy.special import expit

from cspine_helpers.ct.dicom import Header, is_dicom, read_header, shown
from cspine_helpers.ct.volume import complaints, optional, simpleitk
from cspine_helpers.files.paths import printable

MAX_PIXELS = 80_000_000  # a stitched whole leg has 45 million; PIL calls 89 million a bomb
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM")
_ORIENTATION, _WHITE_IS_ZERO, _BITS = 0x0112, 0x0106, 0x0102  # tags of EXIF and TIFF
# EXIF orientation → whether rows and columns change places, then whether rows, then columns run backwards.
_TURNS = {
    **{2: (False, False, True), 3: (False, True, True), 4: (False, True, False), 5: (True, False, False)},
    **{6: (True, False, True), 7: (True, True, True), 8: (True, True, False)},
}
_PNG_BITS = 24  # where a PNG says how many bits a sample has
_START_OF_SCAN, _END = 0xDA, b"\xff\xd9"  # markers of JPEG; JPEG 2000 ends alike
_CORRUPT = re.compile(  # what libjpeg and OpenJPEG write when they make pixels up
    rb"Corrupt JPEG data: (?!bad ICC|[12] extraneous bytes before marker 0xd9)|Premature end of JPEG"
    rb"|segment too long"
)
_TAIL = 0.1  # per cent of the pixels that are clipped at either end of the scale
# Modalities of projections; of copies and photographs of them; not given.
_PROJECTIONS = ("CR", "DX", "RG", "RF", "XA", "MG", "IO", "PX", "OT", "XC", "")
_COLOURS = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]
_STORED = (  # elements that say how pixels are stored, and nothing else
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData"),
    *(f"{name}{part}" for name in _COLOURS for part in ("Data", "Descriptor")),
)


class UnusableRadiograph(ValueError):
    """A file that is no usable radiograph.

    Attributes:
        reason: why, without the file's path, for a table that names the file already.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} is no usable radiograph: {reason}. Replace it, or leave it out.")
        self.reason = reason


class _Unusable(ValueError):
    """Why a file is no radiograph, as the end of a sentence about it."""


def read_radiograph(path: str | Path, *, inverted: bool = False) -> NDArray[np.uint8]:
    """One radiograph as a viewer shows it: bone bright on dark, in the displayed frame.

    - PNG, JPEG, TIFF, BMP, GIF, WebP, JPEG 2000, PNM or DICOM, whatever the name says.
    - EXIF orientation is applied. Colour becomes luminance; what is transparent becomes black.
    - 8 bits stay as they are. Of more, and of floating point, the values from the 0.1st to the 99.9th
      percentile are scaled linearly to 0 … 255 and the rest is clipped, as viewers do where no window is
      stated: 12 bits in 16 are not dark, and a few hot pixels do not set the scale.
    - Of DICOM, rescale or modality table, the first VOI table or window, and MONOCHROME1 are obeyed, and
      padding is black; without a window, percentiles as above.
    - A TIFF whose white is zero is inverted. No other picture says so: pass `inverted` where you know it.

    Args:
        path: the file.
        inverted: whether it shows bone dark on bright though nothing in it says so; of DICOM and TIFF, which
            say it themselves, what they say holds.

    Returns:
        (H, W).

    Raises:
        FileNotFoundError: there is no file.
        ImportError: it is DICOM, and the libraries of the group ct are not installed.
        ValueError: it is a folder, empty, cut off, damaged, no image, several images in one file, larger than
            80 megapixels, of 16 bits a colour, of one value only, or DICOM of no radiograph. Says which.

    Source: DICOM PS3.3 sections C.7.6.3.1.2 (photometric interpretation), C.11.1 (modality LUT) and C.11.2
    (VOI LUT).

    Example:
        >>> from PIL import Image
        >>> Image.fromarray(np.array([[0, 4095], [1024, 2048]], np.uint16)).save("a.png")
        >>> read_radiograph("a.png").tolist()
        [[0, 255], [64, 128]]
    """
    path = Path(path)
    with _about(path):
        if is_dicom(path):
            with _quiet():
                image = _of_dicom(path)
        else:
            image = _of_picture(path.read_bytes(), inverted=inverted)
        if image.min() == image.max():
            raise _Unusable("it shows nothing: all its pixels have one value")
    return image


def displayed_size(path: str | Path) -> tuple[int, int]:
    """Height and width in the displayed frame, pixels, of what `read_radiograph` reads; nothing is decoded.

    Raises:
        FileNotFoundError: there is no file.
        ImportError: it is DICOM, and the libraries of the group ct are not installed.
        ValueError: it is no radiograph, as far as its header says.

    Example:
        >>> from PIL import Image
        >>> Image.new("L", (400, 300)).save("a.jpg")
        >>> displayed_size("a.jpg")
        (300, 400)
    """
    path = Path(path)
    with _about(path):
        if is_dicom(path):
            with _quiet():
                return _header(path)[0].shape
        with open(path, "rb") as file:
            image = _opened(file)
            orientation = image.getexif().get(_ORIENTATION, 1)
            is_transposed = image.format != "TIFF" and orientation in _TURNS and _TURNS[orientation][0]
            width, height = image.size  # of a TIFF, turned
            return (width, height) if is_transposed else (height, width)


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Why the file is no radiograph, in one sentence, whatever its decoder raises in the block."""
    name = printable(str(path))
    if path.is_dir():
        raise ValueError(f"{name} is a folder. Give the file of one radiograph.")
    if not path.is_file():
        raise FileNotFoundError(f"No radiograph at {name}. Check its name.")
    try:
        if not path.stat().st_size:
            raise _Unusable("it is empty (0 bytes)")
        yield
        return
    except _Unusable as error:
        why = str(error)
    except Image.UnidentifiedImageError:
        why = "its bytes are those of no image that is read here"
    except Image.DecompressionBombError:
        why = f"it has more than {MAX_PIXELS:,} pixels"
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # of many kinds: PIL and pydicom let through what their parts raise
        if getattr(error, "errno", None):  # the disk's, not the file's
            raise
        why = f"it is cut off or damaged ({type(error).__name__})"
    raise UnusableRadiograph(name, why)


def why_unusable(error: Exception) -> str:
    """What `read_radiograph` has raised, in one line, and without the file's path where it can be.

    Example:
        >>> why_unusable(UnusableRadiograph("/home/me/a.png", "it is empty (0 bytes)"))
        'it is empty (0 bytes)'
    """
    disk = getattr(error, "strerror", None)
    return " ".join((error.reason if isinstance(error, UnusableRadiograph) else disk or str(error)).split())


def holds_no_image(path: Path) -> bool:
    """Whether a file is DICOM without an image, by its SOP class: a directory, a report, how to show images.

    Raises:
        ImportError: it is DICOM, and the libraries of the group ct are not installed.
        OSError: it cannot be opened.
    """
    header = read_header(path)
    if header is None or not header.sop_class:
        return False
    with _quiet():
        name = optional("pydicom").uid.UID(header.sop_class).name
    return name != header.sop_class and "Image" not in name  # of the standard's, not of a manufacturer's own


# 1. Pictures.


def _of_picture(content: bytes, *, inverted: bool) -> NDArray[np.uint8]:
    """What a file's bytes show, turned, in grey; `inverted` where they cannot say that they are."""
    # 1. What it is, before anything is decoded.
    image = _opened(io.BytesIO(content))
    _check_whole(image, content)
    is_colour, is_tiff = image.mode[0] not in "IF", image.format == "TIFF"
    is_negative = inverted
    if is_tiff:
        is_negative = not is_colour and image.tag_v2.get(_WHITE_IS_ZERO) == 0  # of 8 bits, PIL inverts
    # 2. Decoded. Of 16 bits a colour, PIL would take 8.
    values: NDArray[Any]
    if image.format in ("JPEG", "MPO"):
        values = _of_jpeg(image, content)
    elif image.format == "PNG" and is_colour and content[_PNG_BITS] == 16:
        values = _of_deep_png(content)
    elif is_tiff and is_colour and max(image.tag_v2.get(_BITS, (1,))) > 8:
        raise _Unusable("it is a TIFF of 16 bits a colour; save it as 16-bit grey")
    else:
        values = _in_grey(image)
    # 3. Bright where it shows bright, and upright.
    grey = _to_uint8(values)
    orientation = image.getexif().get(_ORIENTATION, 1)  # of a TIFF, none by now: PIL has turned it
    return _turned(255 - grey if is_negative else grey, orientation)


def _opened(file: IO[bytes]) -> Any:
    """PIL's image, not decoded yet; one image, not several, and not too large."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of the size, we judge
        image = Image.open(file, formats=_FORMATS)
    pages = getattr(image, "n_frames", 1)
    if pages > 1 and image.format != "MPO":  # of a photograph, the others are previews
        raise _Unusable(f"it is animated or has pages, {pages} images in one file")
    _check_size(image.height, image.width)
    return image


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise _Unusable(f"it has {width} × {height} pixels, more than {MAX_PIXELS:,}")


def _check_whole(image: Any, content: bytes) -> None:
    """What decoders do not look at: whether JPEG data end."""
    if image.format in ("JPEG", "MPO"):
        at = 2
        while content[at : at + 1] == b"\xff" and content[at + 1] != _START_OF_SCAN:
            is_fill = content[at + 1] == 0xFF
            at += 1 if is_fill else 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        if content.find(_END, at) < 0:
            raise _Unusable("it is cut off: its JPEG data have no end")
    elif image.format == "JPEG2000" and not content.rstrip(b"\0").endswith(_END):
        raise _Unusable("it is cut off: its JPEG data have no end")


def _of_jpeg(image: Any, content: bytes) -> NDArray[np.uint8]:
    """Luminance. libjpeg goes on where data are corrupt, with pixels made up, and PIL does not say so."""
    how = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION
    with complaints(_CORRUPT) as said:
        grey = cv2.imdecode(np.frombuffer(content, np.uint8), how)
    if said or grey is None:
        raise _Unusable("it is damaged: its JPEG data are corrupt")
    return _in_grey(image) if image.mode == "CMYK" else grey.astype(np.uint8, copy=False)


def _of_deep_png(content: bytes) -> NDArray[np.uint16]:
    """Luminance of 16 bits a colour, on black where it is transparent."""
    colours: Any = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    grey = cv2.cvtColor(colours[..., :3], cv2.COLOR_BGR2GRAY)
    if colours.shape[2] == 3:
        return grey
    return (grey.astype(np.uint32) * colours[..., 3] // 65535).astype(np.uint16)


def _in_grey(image: Any) -> NDArray[Any]:
    """(H, W) as PIL decodes it: 8 bits, or its own values where they are of more."""
    if image.mode[0] in "IF":
        return np.asarray(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"), np.uint16)
        over_black = (np.asarray(image.convert("RGB").convert("L")) * alpha + 127) // 255
        return over_black.astype(np.uint8)
    return np.asarray(image if image.mode == "L" else image.convert("RGB").convert("L"))


def _turned(grey: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """By an EXIF orientation; any but 2 to 8 turns nothing."""
    is_transposed, rows_back, columns_back = _TURNS.get(orientation, (False, False, False))
    grey = grey.T if is_transposed else grey
    grey = grey[::-1] if rows_back else grey
    return np.ascontiguousarray(grey[:, ::-1] if columns_back else grey)


def _to_uint8(values: NDArray[Any], is_shown: NDArray[np.bool_] | None = None) -> NDArray[np.uint8]:
    """Values from the 0.1st to the 99.9th percentile as 0 … 255, the rest clipped; all where those are one.

    Args:
        values: (H, W) of any number type; of 8 bits, they stay as they are.
        is_shown: (H, W), the pixels whose percentiles are meant; all where it is not given.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise _Unusable("its pixels are not all numbers (NaN or infinity)")
    judged = values if is_shown is None or not is_shown.any() else values[is_shown]
    low, high = (float(end) for end in np.percentile(judged, (_TAIL, 100 - _TAIL), method="nearest"))
    if low == high:
        low, high = float(judged.min()), float(judged.max())
    return _to_bytes(values, low, high)


def _to_bytes(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Values from low to high as 0 … 255, the rest clipped."""
    share = values.astype(np.result_type(values.dtype, np.float32))
    share -= low
    share *= 255 / (high - low) if high > low else 0
    return np.rint(np.clip(share, 0, 255, out=share), out=share).astype(np.uint8)


# 2. DICOM.


def _quiet() -> Any:
    """A block in which pydicom does not warn of values, which would show them."""
    return optional("pydicom").config.disable_value_validation()


def _of_dicom(path: Path) -> NDArray[np.uint8]:
    """What its header says is shown."""
    # 1. Stored values.
    header, found = _header(path)
    stored = _stored(found)
    if stored.shape[:2] != header.shape:
        raise _Unusable("its image is of another size than its header describes")
    if stored.ndim == 3:
        luminance = stored[..., :3] @ np.array([0.299, 0.587, 0.114])
        return _to_uint8(np.rint(luminance).astype(stored.dtype))
    # 2. Rescaled, windowed, inverted.
    is_padding = _padding(stored, found)
    if tables := found.get("ModalityLUTSequence"):
        values = _looked_up(stored, tables[0], is_little=found.original_encoding[1])
    else:
        slope, intercept = _number(found, "RescaleSlope", 1), _number(found, "RescaleIntercept", 0)
        values = stored * slope + intercept if (slope, intercept) != (1, 0) else stored
    grey = _windowed(values, found, ~is_padding)
    if found.get("PhotometricInterpretation") == "MONOCHROME1":
        grey = 255 - grey
    grey[is_padding] = 0
    return grey


def _header(path: Path) -> tuple[Header, Any]:
    """What the bytes of one whole radiograph say, and its elements."""
    header, found = read_header(path), optional("pydicom").dcmread(path, force=True)
    if header is None or header.damage:
        raise _Unusable(f"it is damaged: {header.damage if header else 'nothing can be read'}")
    unstated = "CT" if header.sop_class and not header.is_other else ""
    modality = str(found.get("Modality") or unstated).upper()
    if modality not in _PROJECTIONS:
        known = shown({"modality": modality}, "modality")
        raise _Unusable(f"its modality is {known}, not CR, DX or another X-ray")
    if found.get("PresentationIntentType") == "FOR PROCESSING":
        raise _Unusable("it holds the detector's raw data (FOR PROCESSING), not the image for presentation")
    if (frames := int(found.get("NumberOfFrames") or 1)) > 1:
        raise _Unusable(f"it has {frames} frames")
    _check_size(*header.shape)
    return header, found


def _stored(found: Any) -> NDArray[Any]:
    """Values as they are stored, (H, W); of colour, RGB (H, W, 3).

    GDCM decodes what pydicom cannot (lossless JPEG, JPEG-LS), but rescales and inverts on its own: it gets a
    copy of nothing but the pixels.
    """
    pydicom, sitk = optional("pydicom"), simpleitk()
    # 1. The copy.
    bare = pydicom.Dataset()
    for name in _STORED:
        if name in found:
            bare[name] = found[name]
    if bare.get("PhotometricInterpretation") == "MONOCHROME1":
        bare.add_new("PhotometricInterpretation", "CS", "MONOCHROME2")  # anew: elements are shared
    bare.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    bare.SOPInstanceUID = pydicom.uid.generate_uid()
    is_implicit = found.original_encoding[0]
    unstated = pydicom.uid.ImplicitVRLittleEndian if is_implicit else pydicom.uid.ExplicitVRLittleEndian
    bare.file_meta = pydicom.dataset.FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = found.file_meta.get("TransferSyntaxUID") or unstated
    # 2. Its pixels.
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "pixels.dcm"
        bare.save_as(copy, enforce_file_format=True)
        reader.SetFileName(str(copy))
        with complaints(_CORRUPT) as said:
            image = reader.Execute()
    if said:
        raise _Unusable(f"it is damaged: {said[0]}")
    pixels = sitk.GetArrayFromImage(image)
    return pixels[0] if image.GetDimension() == 3 else pixels


def _padding(stored: NDArray[Any], found: Any) -> NDArray[np.bool_]:
    """Where pixels were put in to fill the image up, as DICOM PS3.3 section C.7.5.1.1.2 says."""
    if found.get("PixelPaddingValue") is None:
        return np.zeros(stored.shape, bool)
    limits = (found.PixelPaddingValue, found.get("PixelPaddingRangeLimit", found.PixelPaddingValue))
    ends = np.array([int(limit) for limit in limits]).astype(stored.dtype)  # some writers mistake the sign
    return (stored >= ends.min()) & (stored <= ends.max())


def _looked_up(values: NDArray[Any], table: Any, *, is_little: bool) -> NDArray[Any]:
    """What a table of DICOM says of each value; beyond its ends, what it says there."""
    entries, first, data = int(table.LUTDescriptor[0]) or 1 << 16, int(table.LUTDescriptor[1]), table.LUTData
    if isinstance(data, bytes):  # in the file's byte order; a writer may pack entries of 8 bits
        data = np.frombuffer(data, "u1" if len(data) == entries else "<u2" if is_little else ">u2")
    said = np.asarray(data)[:entries]
    return said[np.clip(np.rint(values).astype(np.int64) - first, 0, len(said) - 1)]


def _windowed(values: NDArray[Any], found: Any, is_shown: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """By the first VOI table, else by the first window, else by percentiles of the pixels that are shown."""
    if tables := found.get("VOILUTSequence"):
        said = _looked_up(values, tables[0], is_little=found.original_encoding[1])
        return _to_bytes(said, float(said.min()), float(said.max()))
    centre, width = _number(found, "WindowCenter", None), _number(found, "WindowWidth", None)
    if centre is None or width is None:
        return _to_uint8(values, is_shown)
    function = str(found.get("VOILUTFunction") or "LINEAR").upper()
    if function == "SIGMOID" and width > 0:
        return np.rint(255 * expit(4 * (values - centre) / width)).astype(np.uint8)
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    if width < 0 or function not in ("LINEAR", "LINEAR_EXACT"):
        raise _Unusable("its window is of no kind that DICOM knows")
    return _to_bytes(values, centre - width / 2, centre + max(width, 1e-6) / 2)


def _number(found: Any, name: str, default: float | None) -> Any:
    """The first number of an element; the default where it has none."""
    value = found.get(name)
    first = value[0] if isinstance(value, list | tuple) or hasattr(value, "append") else value
    try:
        return default if first is None or first == "" else float(first)
    except (TypeError, ValueError):
        raise _Unusable(f"its {name} is no number") from None


# 3. The network's frame.


@dataclass(frozen=True)
class Frame:
    """Where a radiograph lies in the network's frame: as large as fits, aspect kept, black around it.

    Attributes:
        image: (H, W) of the radiograph, pixels.
        shape: (h, w) of the frame, pixels.
        box: the radiograph in the frame: top, left, height, width, pixels.
    """

    image: tuple[int, int]
    shape: tuple[int, int]
    box: tuple[int, int, int, int]

    @classmethod
    def of(cls, height: int, width: int, *, long: int, short: int) -> Self:
        """The frame of a radiograph: portrait, `long` × `short`, unless it is wider than high.

        Raises:
            ValueError: a size is below 1, or `long` below `short`.

        Example:
            >>> Frame.of(500, 400, long=384, short=320).box
            (0, 6, 384, 307)
            >>> Frame.of(300, 600, long=384, short=320).shape
            (320, 384)
        """
        if min(height, width, short) < 1 or long < short:
            raise ValueError(
                f"A radiograph of {height} × {width} pixels has no frame of {long} × {short}. Give sizes of "
                "1 or more, and long at least short."
            )
        h, w = (long, short) if height >= width else (short, long)
        scale = min(h / height, w / width)
        inner_h, inner_w = min(h, max(1, round(height * scale))), min(w, max(1, round(width * scale)))
        return cls((height, width), (h, w), ((h - inner_h) // 2, (w - inner_w) // 2, inner_h, inner_w))

    @property
    def scale(self) -> tuple[float, float]:
        """Frame pixels a radiograph's pixel, along x and y; they differ by rounding only."""
        return self.box[3] / self.image[1], self.box[2] / self.image[0]

    def pixels(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A radiograph (H, W) in the frame, (h, w).

        Raises:
            ValueError: it is of another size than this frame's radiograph.
        """
        if image.shape != self.image:
            raise ValueError(
                f"This is the frame of a radiograph of {self.image} pixels; found {image.shape}. Make one "
                "with Frame.of(*image.shape, ...)."
            )
        top, left, height, width = self.box
        how = cv2.INTER_AREA if height < self.image[0] else cv2.INTER_LINEAR
        framed = np.zeros(self.shape, image.dtype)
        framed[top : top + height, left : left + width] = cv2.resize(
            image, (width, height), interpolation=how
        )
        return framed

    def points(self, xy: ArrayLike) -> NDArray[np.float64]:
        """Coordinates (N, 2) of the radiograph as x, y, in the frame."""
        return np.asarray(xy, float) * self.scale + (self.box[1], self.box[0])

    def back(self, mask: NDArray[Any]) -> NDArray[Any]:
        """A map of the frame, in the radiograph's pixels.

        Args:
            mask: (h', w') at any stride: the whole frame, in fewer or more cells. bool and integers take the
                nearest cell's value, floating point is interpolated linearly.

        Returns:
            (H, W) of the same type.

        Raises:
            ValueError: its cells are no squares of this frame.
        """
        rows, columns = mask.shape
        if rows * self.shape[1] != columns * self.shape[0]:
            raise ValueError(
                f"A map of {rows} × {columns} cells does not cover a frame of {self.shape} evenly. Give the "
                "whole frame's, in square cells."
            )
        at_rows = self._cells(0, rows)
        at_columns = self._cells(1, columns)
        if mask.dtype.kind != "f":
            return mask[np.ix_(*(np.floor(at + 0.5).astype(int) for at in (at_rows, at_columns)))]
        return (_shares(at_rows, rows) @ mask @ _shares(at_columns, columns).T).astype(mask.dtype, copy=False)

    def _cells(self, axis: int, cells: int) -> NDArray[np.float64]:
        """Where the radiograph's pixels lie among as many cells of the frame, by the middles of both."""
        start, size = self.box[axis], self.box[axis + 2]
        middles = (np.arange(self.image[axis]) + 0.5) * size / self.image[axis] + start
        return np.clip(middles * cells / self.shape[axis] - 0.5, 0, cells - 1)


def _shares(at: NDArray[np.float64], cells: int) -> NDArray[np.float32]:
    """(N, cells) of how much each cell counts, linearly, for each place among them."""
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(cells))).astype(np.float32)
