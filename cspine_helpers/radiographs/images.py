"""One radiograph from its file to the 8 bits that a viewer shows, and from there into the network's frame.

What a file is, its bytes say, not its name. The displayed frame is the package's one frame of a radiograph:
EXIF orientation is applied first, and sizes, polygons and masks are all in it. Coordinates count from the top
left corner, so that pixel i lies between i and i + 1. Nothing is repaired: a file that does not decode whole
is refused.
"""

import io
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageOps

from cspine_helpers.ct.dicom import is_dicom, read_header, shown
from cspine_helpers.ct.volume import complaints, optional, reason, simpleitk
from cspine_helpers.files.paths import printable

MAX_PIXELS = 80_000_000  # a stitched whole leg has 45 million; PIL calls 89 million a bomb
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM")
_END_OF_JPEG = b"\xff\xd9"
_WHITE_IS_ZERO, _BITS = 262, 258  # TIFF's PhotometricInterpretation and BitsPerSample
_TAIL = 0.1  # per cent of the pixels that are clipped at either end of the scale
# Modalities of projections; of copies and photographs of them; not given.
_PROJECTIONS = ("CR", "DX", "RG", "RF", "XA", "MG", "IO", "PX", "OT", "XC", "")
_COLOURS = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]
_STORED = (  # elements that say how pixels are stored, and nothing else
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData"),
    *(f"{name}{part}" for name in _COLOURS for part in ("Data", "Descriptor")),
)


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
        inverted: whether it shows bone dark on bright though nothing in it says so.

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
    name = printable(str(path))
    if path.is_dir():
        raise ValueError(f"{name} is a folder. Give the file of one radiograph.")
    if not path.is_file():
        raise FileNotFoundError(f"No radiograph at {name}. Check its name.")
    try:
        if not path.stat().st_size:
            raise ValueError("it is empty (0 bytes)")
        image = _of_dicom(path) if is_dicom(path) else _of_picture(path)
        if image.min() == image.max():
            raise ValueError("it shows nothing: all its pixels have one value")
    except ValueError as error:
        raise ValueError(f"{name} is no usable radiograph: {error}. Take the original file.") from None
    return 255 - image if inverted else image


# 1. Pictures.


def _of_picture(path: Path) -> NDArray[np.uint8]:
    """What PIL decodes, turned, in grey."""
    # 1. What it is, before anything is decoded.
    content = path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", Image.DecompressionBombWarning
            )  # of the size, the next lines judge
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
        pages = (
            1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        )  # others than a photo's first: previews
    except Image.UnidentifiedImageError:
        raise ValueError("its bytes are those of no image that is read here") from None
    except Image.DecompressionBombError:
        raise ValueError(f"it has more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # of many kinds: PIL lets through what its parts raise at garbled bytes
        raise ValueError(f"it is cut off or damaged ({_words(error)})") from None
    if pages > 1:
        raise ValueError(f"it is animated or has pages: {pages} images in one file")
    _check_size(image.height, image.width)
    if _deep_colour(image, content):
        raise ValueError("it has 16 bits a colour, of which 8 would be lost; save it as 16-bit grey")
    if image.format in ("JPEG", "MPO") and _END_OF_JPEG not in content[-1024:]:
        raise ValueError("it is cut off: its JPEG data have no end")
    # 2. Decoded and turned.
    is_negative = image.format == "TIFF" and image.tag_v2.get(_WHITE_IS_ZERO) == 0  # type: ignore[attr-defined]
    try:
        if image.format == "PNG":  # decoding does not compare the checksums of its parts
            Image.open(io.BytesIO(content), formats=_FORMATS).verify()
        image.draft("L", image.size)  # a JPEG's luminance alone
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # as above
        raise ValueError(f"it is cut off or damaged ({_words(error)})") from None
    # 3. In grey.
    if image.mode.startswith("I") or image.mode == "F":
        grey = to_uint8(np.asarray(image))
        return 255 - grey if is_negative else grey  # of 8 bits and fewer, PIL has done so
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        alpha = np.asarray(seen.getchannel("A"), np.uint16)
        over_black = (np.asarray(seen.convert("RGB").convert("L")) * alpha + 127) // 255
        return over_black.astype(np.uint8)
    return np.asarray(image if image.mode == "L" else image.convert("RGB").convert("L"))


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(f"it has {width} × {height} pixels, more than {MAX_PIXELS:,}")


def _deep_colour(image: Any, content: bytes) -> bool:
    """Whether PIL would drop half of each sample's bits."""
    if image.format == "PNG":
        bits, colours = content[24:26]  # of the first chunk
        return bits == 16 and colours != 0
    return image.format == "TIFF" and max(image.tag_v2.get(_BITS, (1,))) > 8 and image.mode[0] not in "IF"


def _words(error: Exception) -> str:
    """What a decoder says, without addresses in memory."""
    return printable(str(error).partition(" <")[0].partition(" at 0x")[0])[:100] or type(error).__name__


def to_uint8(values: NDArray[Any], is_shown: NDArray[np.bool_] | None = None) -> NDArray[np.uint8]:
    """Values from the 0.1st to the 99.9th percentile as 0 … 255, the rest clipped; all where those are one.

    Args:
        values: (H, W) of any number type.
        is_shown: (H, W), the pixels whose percentiles are meant; all where it is not given.

    Raises:
        ValueError: they hold NaN or infinity.
    """
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("its pixels are not all numbers (NaN or infinity)")
    judged = values if is_shown is None or not is_shown.any() else values[is_shown]
    low, high = (float(end) for end in np.percentile(judged, (_TAIL, 100 - _TAIL), method="nearest"))
    if low == high:
        low, high = float(judged.min()), float(judged.max())
    return _to_bytes(values, low, high)


def _to_bytes(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    scale = 255 / (high - low) if high > low else 0.0
    return np.rint(np.clip((values - low) * scale, 0, 255)).astype(np.uint8)


# 2. DICOM.


def _of_dicom(path: Path) -> NDArray[np.uint8]:
    """What its header says is shown."""
    pydicom = optional("pydicom")
    # 1. Whether it is one radiograph, and whole.
    header = read_header(path)
    if header is None or header.damage:
        raise ValueError(f"it is damaged: {header.damage if header else 'nothing can be read'}")
    with pydicom.config.disable_value_validation():  # its warnings would show values
        found = pydicom.dcmread(path, force=True)
    modality = str(found.get("Modality") or "").upper()
    if modality not in _PROJECTIONS:
        raise ValueError(
            f"its modality is {shown({'modality': modality}, 'modality')}, not CR, DX or another X-ray"
        )
    if found.get("PresentationIntentType") == "FOR PROCESSING":
        raise ValueError("it holds the detector's raw data (FOR PROCESSING), not the image for presentation")
    if (frames := int(found.get("NumberOfFrames") or 1)) > 1:
        raise ValueError(f"it has {frames} frames")
    _check_size(*header.shape)
    # 2. Stored values.
    stored = _stored(found)
    if stored.shape[:2] != header.shape:
        raise ValueError("its image is of another size than its header describes")
    if stored.ndim == 3:
        luminance = stored[..., :3] @ np.array([0.299, 0.587, 0.114])
        return np.rint(luminance).astype(np.uint8) if stored.dtype == np.uint8 else to_uint8(luminance)
    # 3. Rescaled, windowed, inverted.
    is_padding = _padding(stored, found)
    if tables := found.get("ModalityLUTSequence"):
        values = _looked_up(stored, tables[0])
    else:
        slope, intercept = _number(found, "RescaleSlope", 1), _number(found, "RescaleIntercept", 0)
        values = stored * slope + intercept if (slope, intercept) != (1, 0) else stored
    grey = _windowed(values, found, ~is_padding)
    if found.get("PhotometricInterpretation") == "MONOCHROME1":
        grey = 255 - grey
    grey[is_padding] = 0
    return grey


def _stored(found: Any) -> NDArray[Any]:
    """Values as they are stored, (H, W); of colour, RGB (H, W, 3).

    GDCM decodes what pydicom cannot (lossless JPEG, JPEG-LS), but rescales and inverts on its own: it gets a
    copy of nothing but the pixels.
    """
    pydicom, sitk = optional("pydicom"), simpleitk()
    bare = pydicom.Dataset()
    for name in _STORED:
        if name in found:
            bare[name] = found[name]
    if bare.get("PhotometricInterpretation") == "MONOCHROME1":
        bare.PhotometricInterpretation = "MONOCHROME2"
    bare.SOPClassUID, bare.SOPInstanceUID = (
        pydicom.uid.SecondaryCaptureImageStorage,
        pydicom.uid.generate_uid(),
    )
    unstated = pydicom.uid.ImplicitVRLittleEndian  # what a file without a meta header is
    if not found.original_encoding[0]:
        unstated = pydicom.uid.ExplicitVRLittleEndian
    bare.file_meta = pydicom.dataset.FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = found.file_meta.get("TransferSyntaxUID") or unstated
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "pixels.dcm"
        bare.save_as(copy, enforce_file_format=True)
        reader.SetFileName(str(copy))
        try:
            with complaints() as said:
                image = reader.Execute()
        except RuntimeError as error:
            raise ValueError(f"its pixels cannot be decoded ({reason(error)})") from None
    if said:
        raise ValueError(said[0])
    return sitk.GetArrayFromImage(image)[0]


def _padding(stored: NDArray[Any], found: Any) -> NDArray[np.bool_]:
    """Where pixels were put in to fill the image up, as DICOM PS3.3 section C.7.5.1.1.2 says."""
    if found.get("PixelPaddingValue") is None:
        return np.zeros(stored.shape, bool)
    ends = [int(found.PixelPaddingValue), int(found.get("PixelPaddingRangeLimit", found.PixelPaddingValue))]
    return (stored >= min(ends)) & (stored <= max(ends))


def _looked_up(values: NDArray[Any], table: Any) -> NDArray[Any]:
    """What a table of DICOM says of each value; beyond its ends, what it says there."""
    entries, first = int(table.LUTDescriptor[0]) or 1 << 16, int(table.LUTDescriptor[1])
    data = table.LUTData
    said = np.frombuffer(data, "<u2") if isinstance(data, bytes) else np.asarray(data)
    return said[np.clip(np.rint(values).astype(np.int64) - first, 0, min(entries, len(said)) - 1)]


def _windowed(values: NDArray[Any], found: Any, is_shown: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """By the first VOI table, else by the first window, else by percentiles of the pixels that are shown."""
    if tables := found.get("VOILUTSequence"):
        said = _looked_up(values, tables[0])
        return _to_bytes(said, float(said.min()), float(said.max()))
    centre, width = _number(found, "WindowCenter", None), _number(found, "WindowWidth", None)
    if centre is None or width is None:
        return to_uint8(values, is_shown)
    function = str(found.get("VOILUTFunction") or "LINEAR").upper()
    if function == "SIGMOID" and width > 0:
        return np.rint(255 / (1 + np.exp(-4 * (values - centre) / width))).astype(np.uint8)
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    if width < 0 or function not in ("LINEAR", "LINEAR_EXACT"):
        raise ValueError("its window is of no kind that DICOM knows")
    return _to_bytes(values, centre - width / 2, centre + max(width, 1e-6) / 2)


def _number(found: Any, name: str, default: float | None) -> Any:
    """The first number of an element; the default where it has none."""
    value = found.get(name)
    first = value[0] if isinstance(value, list | tuple) or hasattr(value, "append") else value
    try:
        return default if first is None or first == "" else float(first)
    except (TypeError, ValueError):
        raise ValueError(f"its {name} is no number") from None


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
        stride = self.shape[0] / rows
        (scale_x, scale_y), (top, left, _, _) = self.scale, self.box
        # Middle of a radiograph's pixel x + 0.5 → cell (… + left) / stride − 0.5.
        to_cells = np.array(
            [
                [scale_x / stride, 0, (0.5 * scale_x + left) / stride - 0.5],
                [0, scale_y / stride, (0.5 * scale_y + top) / stride - 0.5],
            ]
        )
        is_real = mask.dtype.kind == "f"
        cells = mask if is_real else mask.astype(np.uint8 if mask.dtype == bool else mask.dtype)
        how = (cv2.INTER_LINEAR if is_real else cv2.INTER_NEAREST) | cv2.WARP_INVERSE_MAP
        size = (self.image[1], self.image[0])
        warped = cv2.warpAffine(cells, to_cells, size, flags=how, borderMode=cv2.BORDER_REPLICATE)
        return warped.astype(mask.dtype, copy=False)
