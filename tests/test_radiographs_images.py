"""A radiograph's file to the pixels that a viewer shows, and from there into the network's frame and back."""

import re
import struct
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pydicom.data
import pytest
from conftest import REAL_DATA
from PIL import Image, ImageOps
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    generate_uid,
)

from cspine_helpers.radiographs.images import MAX_PIXELS, Frame, displayed_size, read_radiograph

FRACATLAS = REAL_DATA / "fracatlas"
needs_fracatlas = pytest.mark.skipif(not FRACATLAS.is_dir(), reason=f"FracAtlas is not at {FRACATLAS}")
# What the eye sees of an image with this EXIF orientation, by EXIF's own words on row 0 and column 0.
SEEN = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.T,
    6: lambda stored: stored.T[:, ::-1],
    7: lambda stored: stored.T[::-1, ::-1],
    8: lambda stored: stored.T[::-1],
}


def limb(height: int = 40, width: int = 30) -> np.ndarray:
    """Grey of 8 bits, without a symmetry."""
    rows, columns = np.mgrid[:height, :width]
    return (20 + 3 * rows + 2 * columns).astype(np.uint8)


def deep(height: int = 40, width: int = 50) -> np.ndarray:
    """12 bits in 16, each of 2,000 values once: two are clipped at either end."""
    return (
        np.random.default_rng(0).permutation(height * width).reshape(height, width).astype(np.uint16) + 1000
    )


def scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.rint(np.clip((values.astype(float) - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def refusal(path: Path, read=read_radiograph) -> str:
    with pytest.raises(ValueError, match="is no usable radiograph: ") as error:
        read(path)
    assert str(error.value).startswith(f"{path} is no usable radiograph: ")
    assert str(error.value).endswith(". Replace it, or leave it out.")
    return str(error.value).partition("radiograph: ")[2].removesuffix(". Replace it, or leave it out.")


# Pictures.


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
def test_exif_orientation_comes_first(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    path = saved(Image.fromarray(limb()), tmp_path / f"a.{suffix}", exif=exif, **options)
    found = read_radiograph(path)
    assert found.shape == SEEN[orientation](limb()).shape == displayed_size(path)
    if suffix != "jpg":  # which loses a little
        np.testing.assert_array_equal(found, SEEN[orientation](limb()))
    if suffix != "tif":  # which PIL turns by itself, and then again
        with Image.open(path) as image:
            np.testing.assert_array_equal(found, np.asarray(ImageOps.exif_transpose(image).convert("L")))


@needs_fracatlas
def test_real_rotated_images_are_seen_as_pil_shows_them():
    rotated = 0
    for name in ("IMG0002588.jpg", "IMG0002628.jpg"):
        path = FRACATLAS / "images" / "Fractured" / name
        with Image.open(path) as image:
            rotated += image.getexif().get(0x0112) in (3, 6, 8)
            shown = np.asarray(ImageOps.exif_transpose(image).convert("L"))
        np.testing.assert_array_equal(read_radiograph(path), shown)
    assert rotated == 2


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_more_than_8_bits_are_scaled_between_percentiles(tmp_path, suffix):
    """By hand: of 2,000 values one apart, the 0.1st and 99.9th percentile are the third from either end."""
    path = saved(Image.fromarray(deep()), tmp_path / f"a.{suffix}")
    found = read_radiograph(path)
    np.testing.assert_array_equal(found, scaled(deep(), 1002, 2997))
    order = deep().ravel().argsort()
    assert (np.diff(found.ravel()[order].astype(int)) >= 0).all()  # monotone
    np.testing.assert_array_equal(read_radiograph(path), found)  # and the same again


def test_a_hot_pixel_does_not_set_the_scale_and_two_values_are_black_and_white(tmp_path):
    hot = deep()
    hot[0, 0] = 65535
    found = read_radiograph(saved(Image.fromarray(hot), tmp_path / "a.png"))
    assert np.abs(found.astype(int) - scaled(deep(), 1002, 2997))[hot < 65535].max() <= 1
    dot = np.full((50, 50), 300, np.uint16)
    dot[7, 9] = 301  # rarer than what percentiles see
    found = read_radiograph(saved(Image.fromarray(dot), tmp_path / "b.png"))
    np.testing.assert_array_equal(found, np.where(dot == 301, 255, 0))


def test_floating_point_is_scaled_and_signs_are_kept(tmp_path):
    real = (deep().astype(np.float32) - 2000) / 7
    found = read_radiograph(saved(Image.fromarray(real), tmp_path / "a.tif"))
    np.testing.assert_array_equal(found, scaled(deep(), 1002, 2997))
    signed = deep().astype(np.int32) - 2000
    np.testing.assert_array_equal(read_radiograph(saved(Image.fromarray(signed), tmp_path / "b.tif")), found)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_whose_white_is_zero_is_inverted(tmp_path, bits):
    pixels = limb() if bits == 8 else deep()
    path = saved(Image.fromarray(pixels), tmp_path / "a.tif")
    content, black_is_zero = path.read_bytes(), struct.pack("<HHIH", 262, 3, 1, 1)
    assert content.count(black_is_zero) == 1
    path.write_bytes(content.replace(black_is_zero, struct.pack("<HHIH", 262, 3, 1, 0)))
    np.testing.assert_array_equal(
        read_radiograph(path), 255 - (pixels if bits == 8 else scaled(pixels, 1002, 2997))
    )


def test_a_picture_known_to_be_inverted_is_turned_bright(tmp_path):
    path = saved(Image.fromarray(255 - limb()), tmp_path / "a.png")
    np.testing.assert_array_equal(read_radiograph(path, inverted=True), limb())


def test_a_tiff_says_itself_whether_it_is_inverted(tmp_path):
    path = saved(Image.fromarray(limb()), tmp_path / "a.tif")
    np.testing.assert_array_equal(read_radiograph(path, inverted=True), limb())


def test_colour_becomes_luminance(tmp_path):
    """ITU-R 601, as JPEG and PIL have it; a grey written in colours stays as it is."""
    colours = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    luminance = np.rint(colours @ [0.299, 0.587, 0.114])
    found = read_radiograph(saved(Image.fromarray(colours), tmp_path / "a.png"))
    assert np.abs(found - luminance).max() <= 1
    grey = Image.fromarray(limb())
    for mode in ("RGB", "P", "RGBA", "LA"):
        path = saved(grey.convert(mode), tmp_path / f"{mode}.png")
        np.testing.assert_array_equal(read_radiograph(path), limb())
    for name, mode in (("l.jpg", "L"), ("rgb.jpg", "RGB")):
        found = read_radiograph(saved(grey.convert(mode), tmp_path / name, quality=95))
        assert np.abs(found.astype(int) - limb()).max() <= 4


def test_cmyk_is_bright_where_it_shows_bright(tmp_path):
    cmyk = Image.fromarray(limb()).convert("RGB").convert("CMYK")
    for name in ("a.jpg", "a.tif"):
        found = read_radiograph(saved(cmyk, tmp_path / name, **({"quality": 95} if name == "a.jpg" else {})))
        assert np.abs(found.astype(int) - limb()).max() <= 5
    by_opencv = cv2.imread(str(tmp_path / "a.jpg"), cv2.IMREAD_GRAYSCALE)
    assert np.abs(read_radiograph(tmp_path / "a.jpg").astype(int) - by_opencv).max() <= 5


def test_what_is_transparent_is_black(tmp_path):
    alpha = np.zeros((40, 30), np.uint8)
    alpha[:, 10:20], alpha[:, 20:] = 51, 255
    expected = np.where(alpha == 255, limb(), np.rint(limb() * (alpha / 255)))
    grey = Image.fromarray(limb())
    for mode in ("LA", "RGBA"):
        image = grey.convert(mode)
        image.putalpha(Image.fromarray(alpha))
        np.testing.assert_array_equal(read_radiograph(saved(image, tmp_path / f"{mode}.png")), expected)
    palette = grey.quantize(8)
    found = read_radiograph(saved(palette, tmp_path / "p.png", transparency=0))
    see_through = np.asarray(palette) == 0
    assert see_through.any()
    np.testing.assert_array_equal(found[see_through], 0)
    np.testing.assert_array_equal(found[~see_through], np.asarray(palette.convert("L"))[~see_through])


@pytest.mark.parametrize("kind", ["grey with alpha", "colour", "colour with alpha"])
def test_a_png_of_16_bits_a_colour_keeps_them(tmp_path, kind):
    pixels, half = deep(), np.full((40, 50), 65535, np.uint16)
    half[:, :10] = 0
    path, expected = tmp_path / "a.png", scaled(deep(), 1002, 2997)
    if kind == "colour":
        cv2.imwrite(str(path), np.dstack([pixels] * 3))
    else:
        if kind == "colour with alpha":
            cv2.imwrite(str(path), np.dstack([*[pixels] * 3, half]))
        else:
            path.write_bytes(png(40, 50, np.dstack([pixels, half]), colour_type=4))
        shown = np.where(half > 0, pixels, 0)
        expected = scaled(shown, 0, np.sort(shown.ravel())[-3])
    np.testing.assert_array_equal(read_radiograph(path), expected)


def png(height: int, width: int, samples: np.ndarray, *, colour_type: int) -> bytes:
    """By hand, after the PNG specification: 16 bits a sample, no filter."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("name", ["a.jpg", "a.dcm", "a", "Röntgen größe 1 (Kopie).PNG", "a.csv"])
def test_the_bytes_decide_what_it_is_and_no_name_is_wrong(tmp_path, name):
    path = saved(Image.fromarray(limb()), tmp_path / name, format="PNG")
    np.testing.assert_array_equal(read_radiograph(str(path)), limb())


def several(path: Path) -> None:
    frames = [Image.fromarray(limb() + 20 * n) for n in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("suffix", ["gif", "png", "tif", "webp"])
def test_several_images_in_one_file_are_refused(tmp_path, suffix):
    several(tmp_path / f"a.{suffix}")
    assert refusal(tmp_path / f"a.{suffix}") == "it is animated or has pages, 3 images in one file"
    one = saved(Image.fromarray(limb()), tmp_path / "one.gif")
    np.testing.assert_array_equal(read_radiograph(one), limb())


def test_a_photograph_with_previews_is_its_first_image(tmp_path):
    frames = [Image.fromarray(limb()), Image.fromarray(limb() // 2)]
    frames[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=frames[1:], quality=95)
    assert np.abs(read_radiograph(tmp_path / "a.jpg").astype(int) - limb()).max() <= 4


def test_what_is_no_file_of_an_image_is_refused(tmp_path):
    (tmp_path / "empty.jpg").touch()
    assert refusal(tmp_path / "empty.jpg") == "it is empty (0 bytes)"
    (tmp_path / "text.png").write_text("image_id,fractured\n")
    for read in (read_radiograph, displayed_size):
        assert refusal(tmp_path / "text.png", read) == "its bytes are those of no image that is read here"
    saved(Image.new("L", (9, 9), 7), tmp_path / "black.png")
    assert refusal(tmp_path / "black.png") == "it shows nothing: all its pixels have one value"
    with pytest.raises(ValueError, match=r"is a folder\. Give the file of one radiograph\."):
        read_radiograph(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"No radiograph at .*gone\.png\. Check its name\."):
        read_radiograph(tmp_path / "gone.png")


def test_values_that_are_no_numbers_and_deep_coloured_tiff_are_refused(tmp_path):
    real = deep().astype(np.float32)
    real[3, 4] = np.nan
    saved(Image.fromarray(real), tmp_path / "a.tif")
    assert refusal(tmp_path / "a.tif") == "its pixels are not all numbers (NaN or infinity)"
    cv2.imwrite(str(tmp_path / "b.tif"), np.dstack([deep()] * 3))
    assert refusal(tmp_path / "b.tif") == "it is a TIFF of 16 bits a colour; save it as 16-bit grey"


@pytest.mark.parametrize("side", [9_000, 60_000])  # from the second on, PIL itself refuses
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, side):
    content = bytearray(png(1, 1, np.ones((1, 1)), colour_type=0))
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "bomb.png").write_bytes(content)
    for read in (read_radiograph, displayed_size):
        assert "more than 80,000,000" in refusal(tmp_path / "bomb.png", read)


@pytest.mark.slow
def test_a_file_of_50_megapixels_is_read(tmp_path):
    rows = np.linspace(0, 255, 8_000).astype(np.uint8)[:, None]
    big = np.repeat(rows, 6_250, axis=1)
    assert 50_000_000 <= big.size < MAX_PIXELS
    np.testing.assert_array_equal(
        read_radiograph(saved(Image.fromarray(big), tmp_path / "big.png", compress_level=1)), big
    )
    assert Frame.of(*big.shape, long=384, short=320).pixels(big).shape == (384, 320)


WRITTEN = {
    "jpg": {"quality": 90},
    "progressive.jpg": {"quality": 90, "progressive": True},
    "png": {},
    "tif": {},
    "deflated.tif": {"compression": "tiff_adobe_deflate"},
    "lzw.tif": {"compression": "tiff_lzw"},
    "webp": {"lossless": True},
    "jp2": {"irreversible": False},
    "bmp": {},
    "gif": {},
    "pgm": {},
}


@pytest.mark.parametrize("suffix", WRITTEN)
def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path, suffix):
    """Or holds all its pixels yet: what is behind them may be missing."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 50), dtype=np.uint8)
    path = saved(Image.fromarray(pixels), tmp_path / f"a.{suffix}", **WRITTEN[suffix])
    whole, content = read_radiograph(path), path.read_bytes()
    reasons = []
    for share in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        path.write_bytes(content[: int(share * len(content))])
        try:
            found = read_radiograph(path)
        except ValueError as error:
            reasons.append(str(error))
        else:
            np.testing.assert_array_equal(found, whole)
    assert len(reasons) >= 6
    assert all("cut off" in reason or "bytes are those of no image" in reason for reason in reasons)


def test_fill_bytes_before_a_marker_are_no_damage(tmp_path):
    path = saved(Image.fromarray(limb()), tmp_path / "a.jpg", quality=95)
    whole, content = read_radiograph(path), path.read_bytes()
    tables = content.index(b"\xff\xdb")
    path.write_bytes(content[:tables] + b"\xff\xff" + content[tables:])
    np.testing.assert_array_equal(read_radiograph(path), whole)


def test_damage_that_pil_does_not_see_is_refused(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 50), dtype=np.uint8)
    path = saved(Image.fromarray(pixels), tmp_path / "a.jpg", quality=90)
    content = bytearray(path.read_bytes())
    middle = len(content) * 2 // 3
    content[middle : middle + 200] = bytes(200)
    path.write_bytes(content)
    Image.open(path).load()
    assert refusal(path) == "it is damaged: its JPEG data are corrupt"


# DICOM.


def dicom(path: Path, pixels: np.ndarray, **elements: object) -> Path:
    """A digital radiograph, uncompressed, for presentation; `elements` are added or take others' place."""
    found = Dataset()
    found.SOPClassUID, found.SOPInstanceUID = DigitalXRayImageStorageForPresentation, generate_uid()
    found.Modality, found.PatientName = "DX", "Geheim^Greta"
    found.Rows, found.Columns = pixels.shape[:2]
    found.SamplesPerPixel, found.PhotometricInterpretation = 1, "MONOCHROME2"
    found.BitsAllocated = found.BitsStored = 8 * pixels.itemsize
    found.PixelRepresentation = int(pixels.dtype.kind == "i")
    found.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(found, name, value)
    found.HighBit = found.BitsStored - 1
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found.save_as(path, enforce_file_format=True)
    return path


def as_radiograph(source: str, path: Path, modality: str = "CR") -> Path:
    """One of pydicom's own files, as scanners and converters wrote it, of another modality."""
    found = dcmread(pydicom.data.get_testdata_file(source))
    found.Modality = modality
    found.save_as(path)
    return path


def windowed_by_pydicom(path: Path) -> np.ndarray:
    """Rescaled and windowed by pydicom, from 0 to 1 of what its window gives."""
    found = dcmread(path)
    windowed = apply_voi_lut(apply_modality_lut(found.pixel_array, found), found).astype(float)
    lowest = -(2 ** (found.BitsStored - 1)) if found.PixelRepresentation else 0
    ends = [lowest, lowest + 2**found.BitsStored - 1]
    low, high = (
        end * float(found.get("RescaleSlope", 1)) + float(found.get("RescaleIntercept", 0)) for end in ends
    )
    return (windowed - low) / (high - low)


@pytest.mark.parametrize("name", ["6154", "6247", "6278"])
def test_a_real_radiograph_is_inverted_rescaled_and_windowed(tmp_path, name):
    """A scanner's own CR of 12 bits, MONOCHROME1, with rescale and window."""
    folder = Path(pydicom.data.get_testdata_file("dicomdirtests/DICOMDIR")).parent / "77654033"
    (path,) = folder.rglob(name)
    found = dcmread(path)
    assert (found.Modality, found.PhotometricInterpretation) == ("CR", "MONOCHROME1")
    np.testing.assert_allclose(read_radiograph(path), 255 * (1 - windowed_by_pydicom(path)), atol=0.51)
    assert displayed_size(path) == (16, 16)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
@pytest.mark.parametrize("kind", ["u2", "i2", "u1"])
def test_windows_are_those_of_the_standard(tmp_path, function, kind):
    pixels = np.linspace(*((0, 255) if kind == "u1" else (-1500, 2600) if kind == "i2" else (0, 4095)), 600)
    more = {} if function is None else {"VOILUTFunction": function}
    path = dicom(
        tmp_path / "a.dcm",
        pixels.reshape(20, 30).astype(kind),
        **{"WindowCenter": [90.5, 3], "WindowWidth": [120, 4], "RescaleSlope": 0.5, "RescaleIntercept": -7}
        | more,
    )
    np.testing.assert_allclose(read_radiograph(path), 255 * windowed_by_pydicom(path), atol=0.51)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_without_a_window_percentiles_of_what_is_no_padding_set_the_scale(tmp_path, photometric):
    pixels = deep()
    pixels[:, :5] = 4095
    pixels[:, 5:10] = 4090
    more = {"PixelPaddingValue": 4095, "PixelPaddingRangeLimit": 4090, "BitsStored": 12}
    found = read_radiograph(dicom(tmp_path / "a.dcm", pixels, PhotometricInterpretation=photometric, **more))
    assert (found[:, :10] == 0).all()
    inside = np.sort(pixels[:, 10:], axis=None)
    expected = scaled(pixels[:, 10:], inside[2], inside[-3])
    np.testing.assert_array_equal(found[:, 10:], expected if photometric == "MONOCHROME2" else 255 - expected)


def test_a_padding_value_of_the_other_sign_is_the_same_bits(tmp_path):
    pixels = deep().astype("i2") - 2000
    pixels[:, :5] = -2000
    path = dicom(tmp_path / "a.dcm", pixels)
    found = dcmread(path)
    found.add_new("PixelPaddingValue", "US", 65536 - 2000)
    found.save_as(path)
    assert (
        read_radiograph(path)[:, 5:].tolist()
        == read_radiograph(dicom(tmp_path / "b.dcm", pixels[:, 5:].copy())).tolist()
    )


@pytest.mark.parametrize("table", ["VOILUTSequence", "ModalityLUTSequence"])
@pytest.mark.parametrize("signed", [False, True])
def test_tables_take_the_place_of_windows_and_rescale(tmp_path, table, signed):
    """Beyond its ends, a table says what it says there; it is scaled from its lowest to its highest entry."""
    item = Dataset()
    first = -20 if signed else 40
    entries = (np.arange(100) ** 1.7).astype(int) + 5
    item.add_new("LUTDescriptor", "SS" if signed else "US", [100, first, 16])
    item.add_new(
        "LUTData", "OW" if signed else "US", entries.astype("<u2").tobytes() if signed else entries.tolist()
    )
    if table == "ModalityLUTSequence":
        item.ModalityLUTType = "US"
    pixels = (np.arange(600).reshape(20, 30) // 4 + first - 20).astype("i2" if signed else "u2")
    rescale = {"RescaleSlope": 1, "RescaleIntercept": 0} if table == "VOILUTSequence" else {}
    path = dicom(tmp_path / "a.dcm", pixels, **{table: [item]} | rescale)
    of_each = entries[np.clip(pixels.astype(int) - first, 0, 99)]
    np.testing.assert_array_equal(read_radiograph(path), scaled(of_each, entries[0], entries[-1]))
    found = dcmread(path)
    look_up = apply_voi_lut if table == "VOILUTSequence" else apply_modality_lut
    np.testing.assert_array_equal(look_up(found.pixel_array, found), of_each)


COPIES = ("RLE", "bigendian", "expb", "implicit", "jp2klossless", "jpeg_ls_lossless")


@pytest.mark.parametrize("copy", COPIES)
def test_one_image_is_the_same_in_every_transfer_syntax(tmp_path, copy):
    """pydicom's copies of one image; JPEG-LS, as lossless JPEG, is what pydicom alone does not decode."""
    whole = read_radiograph(as_radiograph("MR_small.dcm", tmp_path / "a.dcm"))
    path = as_radiograph(f"MR_small_{copy}.dcm", tmp_path / "b.dcm")
    np.testing.assert_array_equal(read_radiograph(path), whole)
    np.testing.assert_allclose(whole, 255 * windowed_by_pydicom(tmp_path / "a.dcm"), atol=0.51)


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("SC_rgb_jpeg_gdcm.dcm", "SC_rgb_rle.dcm"),  # lossless
        ("SC_rgb_dcmtk_+eb+cr.dcm", "SC_rgb_rle.dcm"),
        ("SC_rgb_jpeg_lossy_gdcm.dcm", "SC_rgb_rle.dcm"),
        ("SC_ybr_full_422_uncompressed.dcm", "SC_rgb_rle.dcm"),
    ],
)
def test_colour_of_a_screen_capture_becomes_luminance(tmp_path, name, like):
    colours = dcmread(pydicom.data.get_testdata_file(like)).pixel_array
    found = read_radiograph(as_radiograph(name, tmp_path / "a.dcm", modality="OT"))
    assert np.abs(found - colours @ [0.299, 0.587, 0.114]).mean() < 2


def test_12_bit_jpeg_and_palettes_are_read(tmp_path):
    """Two encoders' files of one image; a palette, as pydicom looks it up."""
    found, other = (
        read_radiograph(as_radiograph(name, tmp_path / name))
        for name in ("JPGExtended.dcm", "JPEG-lossy.dcm")
    )
    assert found.max() == 255
    np.testing.assert_array_equal(found, other)
    path = as_radiograph("examples_palette.dcm", tmp_path / "c.dcm", modality="OT")
    image = dcmread(path)
    colours = apply_color_lut(image.pixel_array, image) / 257
    assert np.abs(read_radiograph(path) - colours @ [0.299, 0.587, 0.114]).max() <= 1.5


@pytest.mark.parametrize(
    ("elements", "why"),
    [
        ({"Modality": "CT"}, "its modality is CT, not CR, DX or another X-ray"),
        ({"Modality": "GEHEIM"}, "its modality is unknown-"),
        ({"NumberOfFrames": 2, "Rows": 20}, "it has 2 frames"),
        ({"PresentationIntentType": "FOR PROCESSING"}, "it holds the detector's raw data (FOR PROCESSING)"),
        ({"PixelData": bytes(100)}, "it is damaged: 100 bytes of pixels where its header describes 4000"),
        ({"WindowCenter": 9, "WindowWidth": -4}, "its window is of no kind that DICOM knows"),
        (
            {"WindowCenter": 9, "WindowWidth": 4, "VOILUTFunction": "LOG"},
            "its window is of no kind that DICOM knows",
        ),
        ({"WindowCenter": 30000, "WindowWidth": 4}, "it shows nothing: all its pixels have one value"),
    ],
)
def test_dicom_of_no_radiograph_is_refused_without_a_word_of_the_patient(tmp_path, elements, why):
    said = refusal(dicom(tmp_path / "Größe 1.dcm", deep(), **elements))
    assert said.startswith(why)
    assert "GEHEIM" not in said.upper()


def test_without_the_libraries_of_dicom_a_sentence_says_how_to_install_them(tmp_path, monkeypatch):
    path = dicom(tmp_path / "a.dcm", deep())
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImportError, match=r"needs pydicom, which is not installed\. .*group ct"):
        read_radiograph(path)
    (tmp_path / "text.dcm").write_text("no DICOM")
    assert refusal(tmp_path / "text.dcm") == "its bytes are those of no image that is read here"


def test_a_ct_that_does_not_say_its_modality_is_no_radiograph(tmp_path):
    path = dicom(tmp_path / "a.dcm", deep(), Modality="", SOPClassUID=CTImageStorage)
    assert refusal(path) == "its modality is CT, not CR, DX or another X-ray"


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5, 0.95])
def test_dicom_that_is_cut_off_is_refused(tmp_path, share):
    path = dicom(tmp_path / "a.dcm", deep())
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert refusal(path).startswith(
        ("it is damaged", "it is cut off or damaged", "its bytes are those of no image")
    )


# The network's frame.


def test_a_frame_keeps_the_aspect_and_lies_as_the_radiograph_does():
    portrait = Frame.of(500, 400, long=384, short=320)
    assert (portrait.shape, portrait.box) == ((384, 320), (0, 6, 384, 307))
    landscape = Frame.of(300, 600, long=384, short=320)
    assert (landscape.shape, landscape.box) == ((320, 384), (64, 0, 192, 384))
    assert Frame.of(7, 7, long=384, short=320).shape == (384, 320)
    assert Frame.of(1, 3000, long=384, short=320).box == (159, 0, 1, 384)


@pytest.mark.parametrize("sizes", [(0, 5, 4, 3), (5, 5, 3, 4), (5, 5, 4, 0)])
def test_a_frame_of_no_size_is_refused(sizes):
    height, width, long, short = sizes
    with pytest.raises(ValueError, match=r"has no frame of .* Give sizes of 1 or more"):
        Frame.of(height, width, long=long, short=short)


@pytest.mark.parametrize(("height", "width"), [(500, 400), (300, 600), (96, 200), (1200, 37)])
def test_points_follow_pixels(height, width):
    """The centre of a blob, found in the picture before and after."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    at = np.array([width * 0.62, height * 0.37])
    spread = min(height, width) / 8
    blob = np.exp(-((columns - at[0]) ** 2 + (rows - at[1]) ** 2) / (2 * spread**2)) * 255
    frame = Frame.of(height, width, long=384, short=320)
    framed = frame.pixels(np.rint(blob).astype(np.uint8)).astype(float)
    rows, columns = np.mgrid[: frame.shape[0], : frame.shape[1]] + 0.5
    centre = [(columns * framed).sum() / framed.sum(), (rows * framed).sum() / framed.sum()]
    np.testing.assert_allclose(frame.points([at])[0], centre, atol=0.15)
    ends = frame.points([(0, 0), (width, height)])
    top, left, inner_height, inner_width = frame.box
    np.testing.assert_allclose(ends, [(left, top), (left + inner_width, top + inner_height)])


def test_around_a_radiograph_a_frame_is_black():
    frame = Frame.of(100, 50, long=384, short=320)
    framed = frame.pixels(np.full((100, 50), 200, np.uint8))
    top, left, height, width = frame.box
    assert (framed[top : top + height, left : left + width] == 200).all()
    assert framed.sum() == 200 * height * width


@pytest.mark.parametrize("stride", [1, 4, 32])
@pytest.mark.parametrize(("height", "width"), [(500, 400), (300, 600), (90, 70)])
def test_a_map_of_the_frame_comes_back_to_where_it_was(height, width, stride):
    """Each cell holds its own middle in the radiograph's pixels: a pixel gets its own, but at the rim."""
    frame = Frame.of(height, width, long=384, short=320)
    rows, columns = (np.mgrid[: frame.shape[0] // stride, : frame.shape[1] // stride] + 0.5) * stride
    top, left, inner_height, inner_width = frame.box
    for axis, (cells, start, inner) in enumerate([(rows, top, inner_height), (columns, left, inner_width)]):
        size = (height, width)[axis]
        place = (cells - start) * size / inner
        back = frame.back(place.astype(np.float32))
        truth = np.arange(size) + 0.5
        truth = np.broadcast_to(truth[:, None] if axis == 0 else truth, (height, width))
        rim = stride * size / inner  # there, no cell lies on the other side
        inside = (truth > rim) & (truth < size - rim)
        np.testing.assert_allclose(back[inside], truth[inside], atol=1e-3 * size)
        nearest = frame.back(place.astype(np.int32))
        assert nearest.dtype == np.int32
        assert np.abs(nearest - truth)[inside].max() <= rim / 2 + 1.01


def test_a_mask_comes_back_as_a_mask():
    frame = Frame.of(40, 80, long=96, short=64)
    mask = np.zeros((16, 24), bool)
    mask[4:12, :12] = True  # of the frame's 64 × 96; the radiograph is rows 8 to 56
    found = frame.back(mask)
    expected = np.zeros((40, 80), bool)
    expected[7:33, :40] = True  # middles from (16 - 8) / 1.2 = 6.7 to (48 - 8) / 1.2 = 33.3
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == bool


def test_pixels_and_maps_of_another_size_are_refused():
    frame = Frame.of(40, 80, long=96, short=64)
    with pytest.raises(ValueError, match=re.escape("radiograph of (40, 80) pixels; found (80, 40)")):
        frame.pixels(np.zeros((80, 40), np.uint8))
    with pytest.raises(
        ValueError, match=re.escape("24 × 16 cells does not cover a frame of (64, 96) evenly")
    ):
        frame.back(np.zeros((24, 16)))
