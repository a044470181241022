"""Which files are slices of one CT, read whole: headers, pixels, values, and what lies beside them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pydicom.data
import pytest
import scans
from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    BasicTextSRStorage,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    MediaStorageDirectoryStorage,
    MRImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
)
from scans import (
    FRAME,
    SPACING,
    affine_of,
    assert_private,
    body,
    edit,
    excerpt,
    positions,
    refusal,
    same_place,
    tilted,
    write_dicom,
)

from cspine_helpers.ct import dicom
from cspine_helpers.ct.dicom import read_header, read_series, shown
from cspine_helpers.packed import read_manifest
from cspine_helpers.packing.crop import PackConfig, pack_vertebra

BONE = PackConfig(slices=5, size=48)


def block_at(hu: np.ndarray) -> np.ndarray:
    """A mask with one vertebra, C3, that nearly fills the volume."""
    labels = np.zeros(hu.shape, np.uint8)
    labels[2:-2, 4:-4, 4:-4] = 3
    return labels


@pytest.mark.slow
@pytest.mark.parametrize("orientation", ["IPL", "SPL", "IAR", "SAR", "LPI", "RSP", "AIL", "PSR"])
def test_order_and_place_come_from_headers_whatever_runs_along_the_slices(tmp_path, orientation):
    """Names shuffled; slices from either end; rows and columns either way; sagittal and coronal series."""
    scan = excerpt()
    write_dicom(tmp_path, scan.hu, scan.spacing_mm, orientation=orientation)
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, scan.hu)
    assert volume.hu.dtype == np.int16
    same_place(volume, scan.spacing_mm)
    assert volume.warnings == ()


@pytest.mark.parametrize("upside_down", [False, True])
def test_neither_names_nor_instance_numbers_set_the_order(tmp_path, upside_down):
    """Half the RSNA studies that run the other way have names and numbers that agree with each other."""
    hu = body()
    order = np.arange(len(hu))[:: -1 if upside_down else 1] + 1
    write_dicom(tmp_path, hu, SPACING, names=[f"{n}.dcm" for n in order], numbers=order)
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    same_place(volume, SPACING)
    assert sorted(volume.frames) == sorted(order)


def test_names_without_an_ending_and_what_the_system_leaves_in_folders_are_no_matter(tmp_path):
    hu = body()
    write_dicom(tmp_path, hu, SPACING, names=[f"CT.1.3.12.{9 - z}" for z in range(len(hu))])
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (tmp_path / "._CT.1.3.12.4").write_bytes(b"\0\5\26\7")
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.warnings == ()


@pytest.mark.parametrize("turn", [np.eye(3), scans.rotation(12, -7, 20)], ids=["straight", "oblique"])
def test_frames_lead_from_an_instance_number_to_the_patient(tmp_path, turn):
    hu, direction = body(), turn @ FRAME
    numbers = list(range(40, 40 - len(hu), -1))
    write_dicom(tmp_path, hu, SPACING, direction=direction, orientation="SPL", numbers=numbers)
    volume = read_series(tmp_path)
    affine = affine_of(SPACING, direction=direction)
    assert sorted(volume.frames) == sorted(numbers)
    for z in range(len(hu)):
        first, column, row = volume.frames[numbers[len(hu) - 1 - z]]
        there = first + 7 * column + 11 * row  # column 7, row 11 of the file's picture
        np.testing.assert_allclose(there, positions(affine, np.array([z, 11, 7])), atol=1e-6)
        np.testing.assert_allclose(volume.indices(there[None]), [[z, 11, 7]], atol=1e-6)


def test_no_frames_where_instance_numbers_are_shared_or_missing(tmp_path):
    write_dicom(tmp_path / "shared", body(), SPACING, numbers=[1] * 10)
    assert read_series(tmp_path / "shared").frames is None
    write_dicom(tmp_path / "none", body(), SPACING, extra=lambda ds, _: ds.__delattr__("InstanceNumber"))
    assert read_series(tmp_path / "none").frames is None


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("intercept", [-1024, -1200, 0, -1024.5])
@pytest.mark.parametrize("slope", [1, 2, 0.5, 0.1])
def test_hounsfield_units_survive_slope_intercept_and_storage(tmp_path, slope, intercept, signed):
    hu = body()[:4] // 2 * 2 + (intercept % 2)  # whole steps of every slope
    if intercept == 0 and not signed:
        hu = np.abs(hu)
    write_dicom(tmp_path, hu, SPACING, slope=slope, intercept=intercept, signed=signed)
    volume = read_series(tmp_path)
    np.testing.assert_allclose(volume.hu, hu, atol=1e-3)
    if float(slope).is_integer() and float(intercept).is_integer():
        np.testing.assert_array_equal(volume.hu, hu)
        assert volume.hu.dtype == np.int16
    else:
        assert volume.hu.dtype == np.float32


def test_every_slice_has_its_own_slope_and_intercept(tmp_path):
    """As PET/CT and some reconstructions write them."""
    hu = body()

    def own(ds, z):
        stored = np.frombuffer(ds.PixelData, np.uint16)
        ds.RescaleIntercept = -1024 - 10 * z
        ds.PixelData = (stored + 10 * z).astype(np.uint16).tobytes()

    write_dicom(tmp_path, hu, SPACING, extra=own)
    np.testing.assert_array_equal(read_series(tmp_path).hu, hu)


def test_two_intercepts_in_one_series_are_read_each_with_its_own(tmp_path):
    """As a public report has it: -2047 in most slices, -1024 in some (itk-wasm issue 1248)."""
    hu = excerpt().hu

    def own(ds, z):
        if z % 7 == 3:
            stored = np.frombuffer(ds.PixelData, np.uint16) - np.uint16(1023)
            ds.RescaleIntercept, ds.PixelData = -1024, stored.tobytes()

    write_dicom(tmp_path, hu, SPACING, intercept=-2047, extra=own)
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.warnings == ()


@pytest.mark.parametrize(
    ("element", "value"),
    [
        ("RescaleSlope", None),
        ("RescaleSlope", ""),
        ("RescaleSlope", 0),
        ("RescaleIntercept", None),
        ("RescaleIntercept", ""),
    ],
)
def test_some_slices_without_a_rescale_are_refused_by_name(tmp_path, element, value):
    """GDCM takes 1 and 0 in silence."""
    files = write_dicom(tmp_path, body(), SPACING, slope=2, intercept=0, signed=True)
    for file in (files[2], files[9]):
        edit(file, lambda ds: delattr(ds, element) if value is None else setattr(ds, element, value))
    tag = element.removeprefix("Rescale").lower()
    message = refusal(
        lambda: read_series(tmp_path), "2 of 10", f"rescale {tag}", files[2].name, files[9].name, "original"
    )
    assert files[3].name not in message


def test_a_slope_that_no_slice_has_is_said(tmp_path):
    hu = body()
    write_dicom(tmp_path, hu, SPACING, extra=lambda ds, _: ds.__delattr__("RescaleSlope"))
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.warnings == ("it has no rescale slope; 1 is taken",)


def test_twelve_bits_stored_are_read_without_what_stands_above_them(tmp_path):
    hu = body()

    def twelve(ds, _):
        ds.BitsStored, ds.HighBit = 12, 11

    write_dicom(tmp_path, hu, SPACING, extra=twelve)
    np.testing.assert_array_equal(read_series(tmp_path).hu, hu)


def test_a_lost_intercept_is_said(tmp_path):
    def lose(ds, _):
        del ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType

    hu = body()
    write_dicom(tmp_path, hu, SPACING, signed=True, intercept=0, extra=lose)
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    assert any("no rescale intercept" in warning for warning in volume.warnings)


PADDING = {
    "signed": {"signed": True, "padding": -2000},
    "signed, intercept 0": {"signed": True, "padding": -2000, "intercept": 0},
    "signed, lowest": {"signed": True, "padding": -32768},
    "unsigned": {"padding": 63536},
    "unsigned, slope 2": {"padding": 63536, "slope": 2},
    "unsigned, intercept 0 of a shifted scanner": {"padding": 63536, "intercept": -2048},
    "unsigned, highest": {"padding": 65535},
    "unsigned, zero": {"padding": 0},
    "fractional slope": {"padding": 63536, "slope": 0.5},
    "fractional slope, signed": {"padding": -30000, "slope": 0.5, "signed": True},
}


@pytest.mark.parametrize("options", PADDING.values(), ids=PADDING)
def test_padding_outside_the_field_of_view_is_air_in_the_picture(tmp_path, options):
    hu = body((10, 40, 36)) // 2 * 2
    _, y, x = np.indices(hu.shape)
    padded = (y - 20) ** 2 + (x - 18) ** 2 > 16**2
    write_dicom(tmp_path, hu, SPACING, padded=padded, **options)
    volume = read_series(tmp_path)
    np.testing.assert_allclose(volume.hu[~padded], hu[~padded], atol=1e-3)
    assert volume.hu[padded].max() <= -1000
    packed = [
        pack_vertebra(values, block_at(hu), SPACING, "C3", BONE).array
        for values in (volume.hu, np.where(padded, -1024, hu).astype(volume.hu.dtype))
    ]
    np.testing.assert_array_equal(*packed)


@pytest.mark.parametrize(
    ("padding", "limit", "signed"),
    [(-2000, -1500, True), (63536, 65535, False), (65535, 63536, False), (-1500, -2000, True)],
)
def test_a_range_of_padding_values_is_air_too(tmp_path, padding, limit, signed):
    """From the padding value to PixelPaddingRangeLimit, whichever is larger."""
    hu = body()
    padded = np.zeros(hu.shape, bool)
    padded[:, -6:] = True
    options = {"padding": padding, "padding_limit": limit, "signed": signed, "intercept": -1024}
    low, high = sorted((padding, limit))
    values = np.random.default_rng(1).integers(low, high + 1, hu.shape[1:])

    def vary(ds, _):
        kind = np.int16 if signed else np.uint16
        pixels = np.frombuffer(ds.PixelData, kind).reshape(hu.shape[1:])
        ds.PixelData = np.where(padded[0], values, pixels).astype(kind).tobytes()

    write_dicom(tmp_path, hu, SPACING, padded=padded, extra=vary, **options)
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu[~padded], hu[~padded])
    assert set(np.unique(volume.hu[padded])) == {-1024}


def test_a_padding_value_that_tissue_has_is_left_and_said(tmp_path):
    hu = body()
    write_dicom(tmp_path, hu, SPACING, padding=1024)  # 0 HU
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    assert ["padding" in warning and "0 HU" in warning for warning in volume.warnings] == [True]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    "syntax",
    [
        ImplicitVRLittleEndian,
        ExplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
        RLELossless,
        JPEGLosslessSV1,
        JPEG2000Lossless,
    ],
    ids=lambda uid: uid.name[:24],
)
def test_lossless_transfer_syntaxes_give_the_same_hounsfield_units(tmp_path, syntax, signed):
    """JPEG Lossless and JPEG 2000 are those of RSNA 2022."""
    hu = body((5, 33, 41))
    write_dicom(tmp_path, hu, SPACING, signed=signed, transfer_syntax=syntax)
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    same_place(volume, SPACING)


def test_an_empty_folder_says_what_to_give(tmp_path):
    (tmp_path / "study" / "series").mkdir(parents=True)
    folder = tmp_path / "study"
    refusal(lambda: read_series(folder), "study", "folder of a DICOM series", error=FileNotFoundError)


@pytest.mark.parametrize("beside", [(), ("DICOMDIR", "readme.txt")], ids=["alone", "as on a disc"])
def test_slices_in_folders_below_are_found_where_there_are_none_above(tmp_path, beside):
    hu = body()
    write_dicom(tmp_path / "DICOM" / "series_1", hu[:4], SPACING, names=[f"IM{z}" for z in range(4)])
    lower = [*scans.ORIGIN[:2], scans.ORIGIN[2] - 4 * SPACING[0]]
    write_dicom(
        tmp_path / "DICOM" / "series_2", hu[4:], SPACING, origin_mm=lower, names=[f"IM{z}" for z in range(6)]
    )
    (tmp_path / "DICOM" / ".hidden").mkdir()
    (tmp_path / "DICOM" / ".hidden" / "IM0").write_bytes(b"")
    for name in beside:
        save_without_pixels(tmp_path / name, MediaStorageDirectoryStorage, "")
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    assert ["files skipped" in warning for warning in volume.warnings if "numbers" not in warning] == [
        True
    ] * bool(beside)


def test_files_in_folders_below_are_named_with_their_folders(tmp_path):
    for name in ("a", "b"):
        files = write_dicom(tmp_path / name, body(), SPACING, names=[f"IM{z}" for z in range(10)])
        files[4].write_bytes(files[4].read_bytes()[:-100])
    refusal(lambda: read_series(tmp_path), tmp_path.name, "2 of 20 files", "'a/IM4', 'b/IM4'")


def test_a_series_is_chosen_before_anything_is_decoded(tmp_path):
    """What is damaged in another series is no matter."""
    hu = body()
    for series in ("1.2.77", "1.2.88"):
        files = write_dicom(tmp_path / series, hu, SPACING, series_uid=series)
    files[4].write_bytes(files[4].read_bytes()[:-100])
    assert dicom.series_in(tmp_path) == {"1.2.77", "1.2.88"}
    volume = read_series(tmp_path, series="1.2.77")
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.warnings == ("files skipped that are not slices of the CT: 10 × of another series",)
    refusal(lambda: read_series(tmp_path, series="1.2.88"), "1 of 20", "1.2.88/")


def test_several_series_are_described_and_one_is_chosen(tmp_path):
    soft, bone = body(seed=1), body((12, 24, 20), seed=2)

    def kernel(name):
        return lambda ds, _: setattr(ds, "ConvolutionKernel", name)

    write_dicom(tmp_path, soft, SPACING, series_uid="1.2.77", extra=kernel("Br38f"))
    names = [f"bone{z}" for z in range(12)]
    write_dicom(tmp_path, bone, SPACING, series_uid="1.2.88", names=names, extra=kernel("Br64h"))
    parts = ("2 CT series", "series=", "1.2.77", "10 slices", "Br38f", "1.2.88", "12 slices", "Br64h")
    refusal(lambda: read_series(tmp_path), tmp_path.name, *parts)
    np.testing.assert_array_equal(read_series(tmp_path, series="1.2.88").hu, bone)
    np.testing.assert_array_equal(read_series(tmp_path, series="1.2.77").hu, soft)
    refusal(lambda: read_series(tmp_path, series="1.2.99"), "1.2.99", "1.2.77", "1.2.88")


def test_the_wrong_series_of_a_folder_with_one_is_refused(tmp_path):
    write_dicom(tmp_path, body(), SPACING, series_uid="1.2.77")
    refusal(lambda: read_series(tmp_path, series="1.2.99"), "1.2.99", "1.2.77")


# Files that are no slices, between the slices.


def save_scout(path: Path) -> None:
    def scout(ds, _):
        ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        ds.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]

    shape = (1, 60, 50)
    hu = np.zeros(shape, np.int16)
    write_dicom(path.parent, hu, SPACING, names=[path.name], series_uid="1.2.5", extra=scout)


def save_capture(path: Path) -> None:
    def colour(ds, _):
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
        ds.BitsAllocated = ds.BitsStored = 8
        ds.HighBit = 7
        ds.PixelData = bytes(ds.Rows * ds.Columns * 3)
        del ds.RescaleSlope, ds.RescaleIntercept, ds.ImagePositionPatient, ds.ImageOrientationPatient

    hu = np.zeros((1, 40, 40), np.int16)
    write_dicom(path.parent, hu, SPACING, names=[path.name], extra=colour)


def save_without_pixels(path: Path, sop_class: str, modality: str) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, "1.2.6.1"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(str(path), Dataset(), file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = sop_class, "1.2.6.1", modality
    ds.PatientName, ds.StudyDate, ds.StudyInstanceUID = "Doe^Jane", "20190807", scans.STUDY_UID
    ds.SeriesInstanceUID = "1.2.6"
    ds.save_as(path, enforce_file_format=True)


def test_scouts_captures_reports_and_other_files_are_left_out_and_counted(tmp_path):
    """Their names may be a patient's, and warnings are kept in tables."""
    hu = body()
    write_dicom(tmp_path, hu, SPACING)
    save_scout(tmp_path / "0004a.dcm")
    save_capture(tmp_path / "0005a.dcm")
    save_without_pixels(tmp_path / "report.dcm", BasicTextSRStorage, "SR")
    save_without_pixels(tmp_path / "DICOMDIR", MediaStorageDirectoryStorage, "")
    (tmp_path / "readme.txt").write_text("Doe, Jane")
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    (warning,) = volume.warnings
    for part in ("files skipped", "1 × a scout", "1 × a screen capture", "2 × no image", "1 × no DICOM file"):
        assert part in warning
    assert_private(warning)


def test_a_folder_of_scouts_alone_is_no_ct(tmp_path):
    save_scout(tmp_path / "a.dcm")
    refusal(lambda: read_series(tmp_path), tmp_path.name, "no CT image", "scout", "a.dcm", "give the folder")


def test_magnetic_resonance_is_refused(tmp_path):
    files = write_dicom(tmp_path, body(), SPACING, modality="MR")
    refusal(lambda: read_series(tmp_path), tmp_path.name, "no CT", "MR", sorted(f.name for f in files)[0])


# Damage.


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, JPEGLosslessSV1, JPEG2000Lossless, RLELossless])
@pytest.mark.parametrize("kept", [0, 0.02, 0.05, 0.3, 0.6, 0.9, 0.99])
def test_cut_off_files_are_refused_by_name(tmp_path, syntax, kept):
    files = write_dicom(tmp_path, body((5, 32, 32)), SPACING, transfer_syntax=syntax)
    for file in (files[2], files[4]):
        whole = file.read_bytes()
        file.write_bytes(whole[: int(len(whole) * kept)])
    refusal(lambda: read_series(tmp_path), "2 of 5", files[2].name, files[4].name, "copy")


@pytest.mark.parametrize("kept", range(100, 620, 40))
def test_files_cut_off_within_their_header_are_refused_by_name(tmp_path, kept):
    """The last slice: no gap would tell."""
    files = write_dicom(tmp_path, body(), SPACING)
    files[9].write_bytes(files[9].read_bytes()[:kept])
    refusal(lambda: read_series(tmp_path), "1 of 10", files[9].name, "copy")


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"\0" * 3000], ids=["empty", "text", "zeros"])
def test_files_called_dcm_that_are_none_are_refused_by_name(tmp_path, content):
    files = write_dicom(tmp_path, body(), SPACING)
    files[9].write_bytes(content)
    refusal(lambda: read_series(tmp_path), "1 of 10", files[9].name, "copy")


def test_damage_to_a_file_without_an_ending_does_not_pass_in_silence(tmp_path):
    """At the end of the series no gap would tell."""
    files = write_dicom(tmp_path, body(), SPACING, names=[f"IM{z}" for z in range(10)])
    files[9].write_bytes(files[9].read_bytes()[:100])
    try:
        said = " ".join(read_series(tmp_path).warnings)
    except ValueError as error:
        said = str(error)
    assert "1 × no DICOM file" in said or "IM9" in said


def test_patients_stay_out_of_what_is_said(tmp_path, capfd):
    """Every repair and every omission at once; standard output and error, too."""
    places = np.arange(10) * 1.0
    places[4] += 0.2
    write_dicom(tmp_path, body(), SPACING, places=places, direction=tilted(12), padding=1024)
    save_scout(tmp_path / "scout.dcm")
    save_without_pixels(tmp_path / "report.dcm", BasicTextSRStorage, "SR")
    volume = read_series(tmp_path)
    assert len(volume.warnings) >= 4
    written = capfd.readouterr()
    assert_private(*volume.warnings, repr(volume), volume, written.out, written.err)


@scans.needs_ct
def test_the_real_jpeg_2000_series_is_the_picture_pydicom_places(tmp_path):
    """Its own mask is the oracle of its place: bone where the mask says vertebra, in 20 slices of 2 mm."""

    folder = scans.REAL_CT / "totalsegmentator_example"
    volume = read_series(folder / "dicom")
    assert volume.hu.shape == (20, 512, 512)
    np.testing.assert_allclose(volume.spacing_mm, (2.0, 0.9765625, 0.9765625))
    assert volume.warnings == ()
    assert len(volume.frames) == 20
    image = nibabel.load(folder / "dicom_segmentation.nii.gz")
    mask = np.asanyarray(image.dataobj)
    inside = np.argwhere((mask == 32) | (mask == 33))
    ras = positions(image.affine, inside)
    index = volume.indices(ras * (-1, -1, 1))
    np.testing.assert_allclose(index, np.rint(index), atol=0.01)
    values = volume.hu[tuple(np.rint(index).astype(int).T)]
    assert np.median(values) > 120
    assert np.median(volume.hu[10, 200:300, 200:300]) < 100


# Pixels that are no Hounsfield units.


def invert(ds, _=0):
    ds.PhotometricInterpretation = "MONOCHROME1"


def test_an_inverted_series_is_no_ct(tmp_path):
    write_dicom(tmp_path, body(), SPACING, extra=invert)
    refusal(lambda: read_series(tmp_path), tmp_path.name, "no CT image", "MONOCHROME1, not MONOCHROME2")


def test_one_inverted_slice_leaves_a_gap(tmp_path):
    files = write_dicom(tmp_path, body(), SPACING)
    edit(files[4], invert)
    refusal(lambda: read_series(tmp_path), "slices are missing", files[3].name, files[5].name)


TWELVE_BITS = {  # stored values are 2096 or -2000, as the bits above the 12 are dropped
    "signed, written unsigned": ({"signed": True, "intercept": 0}, "US", 63536),
    "signed, written signed": ({"signed": True, "intercept": 0}, "SS", -2000),
    "unsigned": ({"intercept": -3200}, "US", 63536),
}


@pytest.mark.parametrize(("options", "vr", "value"), TWELVE_BITS.values(), ids=TWELVE_BITS)
def test_padding_beyond_the_twelve_bits_stored_is_air(tmp_path, options, vr, value):
    def twelve(ds, _):
        ds.BitsStored, ds.HighBit = 12, 11
        ds.add_new("PixelPaddingValue", vr, value)

    hu = np.minimum(body(), 800)
    padded = np.zeros(hu.shape, bool)
    padded[:, -6:] = True
    stored = -2000 if options.get("signed") else 63536
    write_dicom(tmp_path, hu, SPACING, padded=padded, padding=stored, extra=twelve, **options)
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, np.where(padded, -1024, hu))
    assert volume.warnings == ()


def test_a_lost_intercept_of_some_slices_is_refused_by_name(tmp_path):
    files = write_dicom(tmp_path, body(), SPACING, signed=True, intercept=-1000)
    for file in (files[2], files[9]):
        edit(file, lambda ds: delattr(ds, "RescaleIntercept"))
    parts = (tmp_path.name, "2 of 10", "rescale intercept", files[2].name, files[9].name, "original")
    message = refusal(lambda: read_series(tmp_path), *parts)
    assert files[3].name not in message


# What else lies in the folder.


def test_links_that_lead_nowhere_are_refused_by_name(tmp_path):
    """As git-annex and moved archives leave them; one at the series' end makes no gap."""
    files = write_dicom(tmp_path, body(), SPACING)
    for file in (files[9], files[8]):
        file.unlink()
        file.symlink_to(tmp_path / "gone" / file.name)
    names = files[8].name, files[9].name
    refusal(lambda: read_series(tmp_path), tmp_path.name, "broken links (2)", *names, "get")


def test_links_that_lead_to_slices_are_read(tmp_path):
    hu = body()
    for file in write_dicom(tmp_path / "store", hu, SPACING):
        (tmp_path / file.name).symlink_to(file)
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.warnings == ("folders beside the slices were not looked into (1)",)


def test_a_file_as_large_as_a_slice_that_cannot_be_read_was_one(tmp_path):
    """Names without an ending say nothing, and at the series' end no gap does."""
    files = write_dicom(tmp_path, body(), SPACING, names=[f"IM{z}" for z in range(10)])
    files[9].write_bytes(b"\0" * files[9].stat().st_size)
    refusal(lambda: read_series(tmp_path), "1 of 10", "nothing can be read", "IM9", "copy")


def test_a_small_file_that_cannot_be_read_is_counted(tmp_path):
    hu = body()
    files = write_dicom(tmp_path, hu, SPACING)
    (tmp_path / "Doe_1961").write_bytes(b"\0" * (files[0].stat().st_size // 4))
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    (warning,) = volume.warnings
    assert "1 × no DICOM file" in warning
    assert_private(warning)


# Both ways of reading.

STORAGES = {
    "signed": {"signed": True},
    "unsigned, intercept -2048": {"intercept": -2048},
    "slope 0.5": {"slope": 0.5},
    "padding": {"padding": 63536},
    "padding that tissue has": {"padding": 1024},
    "RLE": {"transfer_syntax": RLELossless},
    "JPEG lossless": {"transfer_syntax": JPEGLosslessSV1, "signed": True},
    "12 bits": {"extra": lambda ds, _: ds.update({"BitsStored": 12, "HighBit": 11})},
}


@pytest.mark.parametrize("options", STORAGES.values(), ids=STORAGES)
def test_files_read_at_once_are_those_read_one_by_one(tmp_path, options):
    hu = body((6, 33, 20))
    padded = np.zeros(hu.shape, bool)
    padded[:, -6:] = "padding" in options
    write_dicom(tmp_path, hu, SPACING, padded=padded, **options)
    ways = [dicom._sort_out(tmp_path), dicom._sort_out(tmp_path)]
    assert dicom._read_at_once(ways[0])
    dicom._read_one_by_one(ways[1])
    ours, theirs = (
        {its.tags["number"]: (its, pixels) for its, pixels in zip(way.slices, way.pixels, strict=True)}
        for way in ways
    )
    assert ours.keys() == theirs.keys() == {str(z + 1) for z in range(len(hu))}
    for number, (its, pixels) in ours.items():
        assert (its, pixels.dtype) == (theirs[number][0], theirs[number][1].dtype)
        np.testing.assert_array_equal(pixels, theirs[number][1])
        np.testing.assert_array_equal(pixels[:-6], hu[int(number) - 1, :-6])
    assert set(ways[0].notes) == set(ways[1].notes)


MIXED = {
    "slope": lambda ds: setattr(ds, "RescaleSlope", 2),
    "intercept": lambda ds: setattr(ds, "RescaleIntercept", -1000),
    "bits": lambda ds: ds.update({"BitsStored": 12, "HighBit": 11}),
    "photometric": invert,
    "padding": lambda ds: ds.add_new("PixelPaddingValue", "US", 63536),
    "series": lambda ds: setattr(ds, "SeriesInstanceUID", "1.2.99"),
    "scout": lambda ds: setattr(ds, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]),
}


@pytest.mark.parametrize("change", MIXED.values(), ids=MIXED)
def test_a_file_with_another_header_keeps_them_from_being_read_at_once(tmp_path, change):
    """Each of these is read with its own header."""
    files = write_dicom(tmp_path, body(), SPACING)
    assert dicom._read_at_once(dicom._sort_out(tmp_path))
    edit(files[6], change)
    assert not dicom._read_at_once(dicom._sort_out(tmp_path))


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, RLELossless])
def test_private_data_after_compressed_pixels_are_no_damage(tmp_path, syntax):
    """More of it than what is looked at first for the end of the pixels."""

    def append(ds, _):
        block = ds.private_block(0x7FE1, "CSPINE", create=True)
        block.add_new(0x10, "OB", b"\1" * 80_000)

    hu = body((4, 24, 20))
    files = write_dicom(tmp_path, hu, SPACING, transfer_syntax=syntax, extra=append)
    assert files[0].read_bytes()[-80_000:] == b"\1" * 80_000
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.warnings == ()


UNCOMPRESSED = (
    *(ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian),
    DeflatedExplicitVRLittleEndian,
)
COMPRESSED = (RLELossless, JPEGLosslessSV1, JPEG2000Lossless)
RSNA = {"signed": True, "intercept": 0, "extra": scans.as_rsna}


def short(uid) -> str:
    return uid.name[:24]


def unset(*keywords):
    return lambda ds, _=0: [delattr(ds, keyword) for keyword in keywords if keyword in ds]


# What a file is.


@pytest.mark.parametrize("syntax", [*UNCOMPRESSED, *COMPRESSED], ids=short)
def test_a_series_with_the_header_of_rsna_2022_is_read(tmp_path, syntax):
    """It states no modality, no class outside the file's meta header, no frame of reference, no kernel."""
    hu = body((5, 33, 41))
    hu[:, :2] = -2048  # noise below air
    write_dicom(tmp_path, hu, SPACING, transfer_syntax=syntax, **RSNA)
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.spacing_mm == SPACING
    assert volume.warnings == ()


@pytest.mark.slow
def test_a_study_of_147_slices_with_the_header_of_rsna_2022_goes_all_the_way_to_a_prediction(tmp_path):
    """Slices, mask, labels and boxes as RSNA lays them out; sequences are those of the volume in memory."""
    from cspine_helpers import checkpoints, labels, packed
    from cspine_helpers.inference.study import predict_study
    from cspine_helpers.packing import cohort as studies
    from cspine_helpers.packing.crop import PackConfig, pack_vertebra
    from cspine_helpers.phantom import cohort as phantom
    from cspine_helpers.phantom import scanner as export
    from cspine_helpers.phantom.rendering import render_study

    folder, fractured, config = tmp_path / "neck", {"C2": 1, "C5": 1}, PackConfig(size=64, margin_mm=2.5)
    study = render_study(7, 1, fractured)
    hu = np.rint(study.volume_hu).astype(np.int16)
    images = folder / export.IMAGES / study.uid
    export.write_series(images, hu, study.spacing_mm, study_uid=study.uid, header="rsna")
    assert len(list(images.iterdir())) == 147
    mask = folder / export.SEGMENTATIONS / f"{study.uid}.nii.gz"
    export.write_label_map(mask, study.label_map, study.spacing_mm)
    row = {labels.UID: study.uid, labels.PATIENT: 1, **dict.fromkeys(labels.VERTEBRAE, 0), **fractured}
    labels.write_labels(pd.DataFrame([row]), folder / export.LABELS)
    boxes = pd.DataFrame(phantom.fracture_boxes(study))
    boxes["slice_number"] += 1
    labels.write_boxes(boxes, folder / export.BOXES)

    report = studies.pack_cohort(folder, config=config, sheets=tmp_path / "sheets", workers=1)
    assert report[["status", "sequences", "message"]].to_numpy().tolist() == [["packed", 7, ""]]
    assert (tmp_path / "sheets" / f"{study.uid}.png").stat().st_size > 10_000
    truth = read_manifest(folder / "packed").set_index("vertebra")["slice_truth"]
    assert {vertebra for vertebra in labels.VERTEBRAE if "x" in truth[vertebra]} == {*fractured}
    for vertebra in labels.VERTEBRAE:
        file = packed.sequence_path(folder / "packed", study.uid, vertebra)
        known = pack_vertebra(hu, study.label_map, study.spacing_mm, vertebra, config).array
        np.testing.assert_array_equal(packed.open_sequence(file), known)
    run = checkpoints.load_run(Path(__file__).parents[1] / "checkpoints" / "builtin")
    said = predict_study(run, folder / "packed", study.uid, threshold=0.5)
    assert said.complete
    assert all(0 < probability < 1 for probability in said.probability.values())


STATED = {
    "only the data set's class": lambda ds, _: (unset("Modality")(ds), unset_meta(ds)),
    "only the file's class": lambda ds, _: unset("Modality", "SOPClassUID")(ds),
    "an empty modality": lambda ds, _: setattr(ds, "Modality", ""),
    "lower case": lambda ds, _: setattr(ds, "Modality", "ct"),
    "lower case alone": lambda ds, _: (setattr(ds, "Modality", "ct"), unset("SOPClassUID")(ds)),
}


def unset_meta(ds):
    ds.file_meta.MediaStorageSOPClassUID = ""


@pytest.mark.parametrize("change", STATED.values(), ids=STATED)
@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_modality_or_class_make_it_ct(tmp_path, change):
    hu = body()
    files = write_dicom(tmp_path, hu, SPACING)
    for file in files:
        ds = dcmread(file)
        change(ds, 0)
        ds.save_as(file, enforce_file_format=False)
    np.testing.assert_array_equal(read_series(tmp_path).hu, hu)


@pytest.mark.parametrize("modality", ["MR", "mr", "PT"])
@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_another_stated_modality_is_refused_whatever_the_class(tmp_path, modality):
    write_dicom(tmp_path, body(), SPACING, modality=modality)
    refusal(lambda: read_series(tmp_path), "no CT image", f"modality {modality.upper()}, not CT")


def test_without_modality_and_class_of_ct_it_is_refused(tmp_path):
    def lose(ds, _):
        unset("Modality", "SOPClassUID")(ds)
        ds.file_meta.MediaStorageSOPClassUID = MRImageStorage

    write_dicom(tmp_path, body(), SPACING, extra=lose)
    refusal(lambda: read_series(tmp_path), "no CT image", "modality not given")


# Pixels that are not all there.


def shorten(ds, by=0.4):
    ds.PixelData = ds.PixelData[: int(len(ds.PixelData) * (1 - by)) // 2 * 2]


WRONG_LENGTH = {
    "too few": shorten,
    "two bytes too few": lambda ds: setattr(ds, "PixelData", ds.PixelData[:-2]),
    "none": lambda ds: setattr(ds, "PixelData", b""),
    "two bytes too many": lambda ds: setattr(ds, "PixelData", ds.PixelData + b"\0\0"),
    "twice the rows": lambda ds: setattr(ds, "Rows", ds.Rows * 2),
    "half the rows": lambda ds: setattr(ds, "Rows", ds.Rows // 2),
    "32 bits": lambda ds: ds.update({"BitsAllocated": 32}),  # as they are stored
    "two frames": lambda ds: setattr(ds, "NumberOfFrames", 2),
    "three samples": lambda ds: setattr(ds, "SamplesPerPixel", 3),
    "no rows": unset("Rows"),
}


@pytest.mark.parametrize("change", WRONG_LENGTH.values(), ids=WRONG_LENGTH)
@pytest.mark.parametrize("syntax", UNCOMPRESSED, ids=short)
@pytest.mark.parametrize("damaged", [(2, 4), range(5)], ids=["some", "all"])
def test_pixels_of_another_length_than_the_header_describes_are_damage(tmp_path, syntax, change, damaged):
    files = write_dicom(tmp_path, body((5, 24, 20)), SPACING, transfer_syntax=syntax)
    for z in damaged:
        edit(files[z], change)
    names = [files[z].name for z in damaged]
    refusal(lambda: read_series(tmp_path), tmp_path.name, f"{len(damaged)} of 5", "copy", *names)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("syntax", UNCOMPRESSED, ids=short)
def test_pixels_of_8_and_32_bits_are_read_or_refused(tmp_path, syntax, bits):
    """GDCM swaps the bytes of 32 bits in big endian otherwise than pydicom, without a word."""
    hu = np.clip(body((5, 24, 20)), -100, 100)

    def store(ds):
        order = ">" if syntax == ExplicitVRBigEndian else "<"
        ds.PixelData = hu[ds.InstanceNumber - 1].astype(f"{order}i{bits // 8}").tobytes()
        ds["PixelData"].VR = "OB" if bits == 8 else "OW"
        ds.BitsAllocated = ds.BitsStored = bits
        ds.HighBit, ds.PixelRepresentation, ds.RescaleIntercept = bits - 1, 1, 0

    for file in write_dicom(tmp_path, hu, SPACING, transfer_syntax=syntax):
        edit(file, store)
    if (syntax, bits) == (ExplicitVRBigEndian, 32):
        refusal(lambda: read_series(tmp_path), "5 of 5", "32 bits a pixel", "not read")
    else:
        np.testing.assert_array_equal(read_series(tmp_path).hu, hu)


@pytest.mark.parametrize("syntax", UNCOMPRESSED, ids=short)
def test_a_byte_that_makes_the_length_even_is_no_damage(tmp_path, syntax):
    hu = np.clip(body((5, 15, 21)) // 8, -100, 100)

    def narrow(ds):
        ds.PixelData = (hu[ds.InstanceNumber - 1] + 128).astype(np.uint8).tobytes() + b"\0"
        ds["PixelData"].VR = "OB"
        ds.BitsAllocated = ds.BitsStored = 8
        ds.HighBit, ds.RescaleIntercept = 7, -128

    for file in write_dicom(tmp_path, hu, SPACING, transfer_syntax=syntax):
        edit(file, narrow)
    np.testing.assert_array_equal(read_series(tmp_path).hu, hu)


def text_mode(whole: bytes) -> bytes:
    """The pixels as a transfer that turns line ends of one system into those of another leaves them."""
    start = whole.rindex(b"\xe0\x7f\x10\x00") + 12
    return whole[:start] + whole[start:].replace(b"\n", b"\r\n")


BEHIND = {
    "line ends": text_mode,
    "a byte put in": lambda whole: whole[:-300] + b"\0" + whole[-300:],
    "eight bytes put in": lambda whole: whole[:-300] + b"\1" * 8 + whole[-300:],
    "zeros behind": lambda whole: whole + b"\0" * 6,
    "text behind": lambda whole: whole + b"Doe, Jane 1961",
}


@pytest.mark.parametrize("change", BEHIND.values(), ids=BEHIND)
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian], ids=short)
@pytest.mark.parametrize("size", [16, 64], ids=["small", "large"])
def test_bytes_put_in_before_the_end_of_the_pixels_are_damage(tmp_path, syntax, change, size):
    """The length is right, but all behind them is shifted."""
    hu = body((5, size, size))
    hu[:, -1, -9:] = [10, -1014, 10, -500, 522, 10, 2570, 10, -1024]  # b"\n" in some, zeros at the end
    files = write_dicom(tmp_path, hu, SPACING, transfer_syntax=syntax)
    for z in (2, 4):
        files[z].write_bytes(change(files[z].read_bytes()))
    refusal(lambda: read_series(tmp_path), "2 of 5", "behind its pixels", files[2].name, files[4].name)


@pytest.mark.parametrize("syntax", UNCOMPRESSED[:3], ids=short)
def test_elements_behind_the_pixels_are_no_damage(tmp_path, syntax):
    def append(ds, _):
        ds.add_new(0xFFFCFFFC, "OB", b"\0" * 10)  # DataSetTrailingPadding

    hu = body((5, 24, 20))
    write_dicom(tmp_path, hu, SPACING, transfer_syntax=syntax, extra=append)
    np.testing.assert_array_equal(read_series(tmp_path).hu, hu)


@pytest.mark.parametrize("syntax", UNCOMPRESSED[:3], ids=short)
@pytest.mark.parametrize("items", [0, 1], ids=["empty", "one item"])
def test_a_sequence_of_undefined_length_behind_the_pixels_is_no_damage(tmp_path, syntax, items):
    def sign(ds, _):
        ds.DigitalSignaturesSequence = [item(MACIDNumber=1) for _ in range(items)]
        ds["DigitalSignaturesSequence"].is_undefined_length = True

    hu = body((5, 24, 20))
    write_dicom(tmp_path, hu, SPACING, transfer_syntax=syntax, extra=sign)
    np.testing.assert_array_equal(read_series(tmp_path).hu, hu)


READ_TWO = """
import sys
from pathlib import Path
from cspine_helpers.ct.dicom import read_series
read_series(Path(sys.argv[1]))  # another patient's pixels lie in memory
try:
    volume = read_series(Path(sys.argv[2]))
except ValueError as error:
    print(error)
else:
    print("read", volume.hu.min(), volume.hu.max())
"""


@pytest.mark.parametrize(
    ("poison", "damaged"),
    [("0", (3,)), pytest.param("85", range(6), marks=pytest.mark.slow)],
    ids=["one", "all"],
)
def test_what_lies_in_memory_never_gets_into_a_volume(tmp_path, poison, damaged):
    """glibc fills fresh memory with a byte of our choice, or with 0 leaves in it what was there."""
    write_dicom(tmp_path / "before", body((6, 256, 256)), SPACING)
    files = write_dicom(tmp_path / "short", np.full((6, 256, 256), 40, np.int16), SPACING)
    for z in damaged:
        edit(files[z], shorten)
    code = [sys.executable, "-c", READ_TWO, str(tmp_path / "before"), str(tmp_path / "short")]
    environment = os.environ | {"MALLOC_PERTURB_": poison}
    done = subprocess.run(code, capture_output=True, text=True, env=environment, check=True)
    assert f"{len(damaged)} of 6 files cannot be read" in done.stdout


def rewrap(path: Path, change) -> None:
    """Other compressed pixels in the same wrapping, end marks and all."""
    ds = dcmread(path)
    frame = next(generate_frames(ds.PixelData, number_of_frames=1)).rstrip(b"\0")
    ds.PixelData = encapsulate([change(frame)])
    ds["PixelData"].VR = "OB"
    ds.save_as(path)


END = b"\xff\xd9"
CUT = {
    "half": lambda frame: frame[: len(frame) // 4 * 2],
    "half, with an end": lambda frame: frame[: len(frame) // 4 * 2] + END,
    "the middle lost": lambda frame: frame[: len(frame) // 6 * 2] + frame[len(frame) // 4 * 2 :],
    "ten bytes lost": lambda frame: frame[:-10],
    "ten bytes lost before the end": lambda frame: frame[:-12] + frame[-2:],
    "next to nothing": lambda frame: b"\0\0",
}


@pytest.mark.parametrize("change", CUT.values(), ids=CUT)
@pytest.mark.parametrize("syntax", COMPRESSED, ids=short)
def test_compressed_pixels_that_are_not_all_there_are_damage(tmp_path, syntax, change, capfd):
    """In a whole file. GDCM decodes what is there, and some decoders only complain on standard error."""
    files = write_dicom(tmp_path, body((5, 32, 32)), SPACING, transfer_syntax=syntax)
    for z in (2, 4):
        rewrap(files[z], change)
    refusal(lambda: read_series(tmp_path), "2 of 5", files[2].name, files[4].name, "copy")
    assert "Corrupt JPEG" not in capfd.readouterr().err


@pytest.mark.parametrize("syntax", COMPRESSED, ids=short)
@pytest.mark.parametrize("damaged", [(2, 4), range(5)], ids=["some", "all"])
def test_compressed_pixels_of_another_size_than_the_header_describes_are_damage(tmp_path, syntax, damaged):
    files = write_dicom(tmp_path, body((5, 32, 32)), SPACING, transfer_syntax=syntax)
    for z in damaged:
        edit(files[z], lambda ds: setattr(ds, "Rows", 64))
    refusal(lambda: read_series(tmp_path), f"{len(damaged)} of 5", *(files[z].name for z in damaged), "copy")


@pytest.mark.parametrize("syntax", COMPRESSED, ids=short)
def test_compressed_pixels_in_several_fragments_are_read(tmp_path, syntax):
    def split(frame):
        return [frame[i : i + 400] for i in range(0, len(frame), 400)]

    hu = body((5, 32, 32))
    for file in write_dicom(tmp_path, hu, SPACING, transfer_syntax=syntax):
        ds = dcmread(file)
        frame = next(generate_frames(ds.PixelData, number_of_frames=1))
        ds.PixelData = encapsulate([frame], fragments_per_frame=len(split(frame)))
        ds["PixelData"].VR = "OB"
        ds.save_as(file)
    np.testing.assert_array_equal(read_series(tmp_path).hu, hu)


def zeroed(frame: bytes, *, end: bool) -> bytes:
    """A copy with holes: the second half is zeros, to the end or to the mark of it."""
    half = len(frame) // 2
    return frame[:half] + bytes(len(frame) - half - 2) + (END if end else b"\0\0")


@pytest.mark.slow
@scans.needs_ct
@pytest.mark.parametrize("syntax", COMPRESSED, ids=short)
@pytest.mark.parametrize("end", [False, True], ids=["to the end", "to the mark"])
def test_compressed_pixels_that_are_half_zeros_are_damage(tmp_path, syntax, end):
    """What GDCM makes of them is as large as it should be, and it says nothing."""
    files = write_dicom(tmp_path, real_hu(), SPACING, transfer_syntax=syntax, **RSNA)
    rewrap(files[2], lambda frame: zeroed(frame, end=end))
    refusal(lambda: read_series(tmp_path), "1 of 6", files[2].name, "copy")


def real_hu() -> np.ndarray:
    """Six slices with air, bone above 1023 HU, and noise."""
    return scans.real_series()[4:10, 150:390, 130:370]


# Words and values.

OTHER_WORDS = {
    "sign": lambda ds: setattr(ds, "PixelRepresentation", 1 - ds.PixelRepresentation),
    "12 bits": lambda ds: ds.update({"BitsStored": 12, "HighBit": 11}),
    "15 bits": lambda ds: ds.update({"BitsStored": 15, "HighBit": 14}),
    "high bit": lambda ds: setattr(ds, "HighBit", 14),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", OTHER_WORDS.values(), ids=OTHER_WORDS)
@pytest.mark.parametrize("syntax", [*UNCOMPRESSED, *COMPRESSED], ids=short)
@pytest.mark.parametrize("odd", [(2,), (0, 4)], ids=["one", "two"])
def test_slices_with_other_words_than_the_rest_are_refused_by_name(tmp_path, syntax, change, odd):
    """A lost sign turns air and fat into metal."""
    files = write_dicom(tmp_path, body((5, 32, 32)), SPACING, transfer_syntax=syntax, **RSNA)
    for z in odd:
        edit(files[z], change)
    names = [files[z].name for z in odd]
    refusal(lambda: read_series(tmp_path), tmp_path.name, f"{len(odd)} of 5", *names)


def test_values_beyond_those_of_int16_are_refused(tmp_path):
    hu = body()
    for file in write_dicom(tmp_path, hu, SPACING, **RSNA):
        edit(file, OTHER_WORDS["sign"])
    refusal(lambda: read_series(tmp_path), "10 of 10", "above 32767 HU")


@pytest.mark.parametrize("values", [1, 3])
def test_values_below_those_of_int16_are_said(tmp_path, values):
    """Padding that the header does not declare."""
    hu = body()
    padded = np.zeros(hu.shape, bool)
    padded[:, -values:] = True
    write_dicom(
        tmp_path, hu, SPACING, signed=True, padded=padded, padding=-32768, extra=unset("PixelPaddingValue")
    )
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, np.where(padded, -32768, hu))
    assert [("below -32768 HU" in warning) for warning in volume.warnings] == [True]


def few_bits(bits: int, *, signed: bool = False):
    def change(ds, _):
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits, bits - 1, int(signed)

    return change


OVERFLOWS = {
    "12 bits with a sign they need": ({}, few_bits(12, signed=True)),
    "8 bits": ({}, few_bits(8)),
    "8 bits with a sign": (RSNA, few_bits(8, signed=True)),
    "10 bits with a sign": (RSNA, few_bits(10, signed=True)),
    "12 bits and the sign lost": (RSNA, few_bits(12)),
}


@pytest.mark.slow
@scans.needs_ct
@pytest.mark.parametrize(("options", "change"), OVERFLOWS.values(), ids=OVERFLOWS)
@pytest.mark.parametrize("syntax", [*UNCOMPRESSED, RLELossless], ids=short)
def test_values_of_more_bits_than_the_header_describes_are_damage(tmp_path, syntax, options, change):
    """They wrap: what is above 1023 HU gets below air."""
    for file in write_dicom(tmp_path, real_hu(), SPACING, transfer_syntax=syntax, **options):
        edit(file, lambda ds: change(ds, 0))
    refusal(
        lambda: read_series(tmp_path), "6 of 6", "more than the", "bits that its header describes", "copy"
    )


def sign_left_out(ds, z):
    scans.as_rsna(ds, z)
    few_bits(12, signed=True)(ds, z)
    ds.PixelData = (np.frombuffer(ds.PixelData, np.uint16) & 0xFFF).tobytes()


def overlay(ds, z):
    """Drawn into a bit above those of the pixels, as in DICOM before 2004."""
    few_bits(12)(ds, z)
    words = np.frombuffer(ds.PixelData, np.uint16).copy()
    words[:: 3 + z] |= 0x4000
    ds.PixelData = words.tobytes()
    ds.add_new(0x60000100, "US", 16)
    ds.add_new(0x60000102, "US", 14)


FITTING = {
    "12 bits": ({}, few_bits(12)),
    "12 bits with a sign": (RSNA, lambda ds, z: (scans.as_rsna(ds, z), few_bits(12, signed=True)(ds, z))),
    "12 bits with a sign that is left out above": (RSNA, sign_left_out),
    "12 bits and an overlay": ({}, overlay),
}


@scans.needs_ct
@pytest.mark.parametrize(("options", "change"), FITTING.values(), ids=FITTING)
def test_signs_and_overlays_above_the_bits_stored_are_no_damage(tmp_path, options, change):
    hu = np.minimum(real_hu(), 2047)
    write_dicom(tmp_path, hu, SPACING, **(options | {"extra": change}))
    np.testing.assert_array_equal(read_series(tmp_path).hu, hu)


@pytest.mark.parametrize("allocated", [8, 16])
@pytest.mark.parametrize("syntax", COMPRESSED[1:], ids=short)
def test_compressed_pixels_of_more_bits_than_the_header_describes_are_damage(tmp_path, syntax, allocated):
    """GDCM drops them, and its decoder only writes that it does."""

    def narrow(ds):
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = allocated, 8, 7

    for file in write_dicom(tmp_path, body((5, 32, 32)), SPACING, transfer_syntax=syntax, **RSNA):
        edit(file, narrow)
    refusal(lambda: read_series(tmp_path), "5 of 5", "16 bits a pixel where its header describes 8", "copy")


# Files beside the slices.

FOREIGN = {
    "report.pdf": b"%PDF-1.7\n" + b"0 0 0 rg " * 5000,
    "all.zip": b"PK\x03\x04" + bytes(range(256)) * 100,
    "1.2.826.0.1.3680043.7.nii.gz": b"\x1f\x8b\x08\0" + bytes(range(256)) * 100,
    "mask.nii": b"\x5c\x01\0\0" + bytes(40_000),
    "notes.txt": b"Doe, Jane\n" * 20_000,
    "no ending": b"Doe, Jane\n" * 20_000,
    "Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(30_000),
    "figure.png": b"\x89PNG\r\n\x1a\n" + bytes(30_000),
    "done": b"",
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("names", [None, [f"IM{z}" for z in range(10)]], ids=["1.dcm", "IM1"])
def test_foreign_files_of_any_size_are_left_out_and_counted(tmp_path, name, names):
    hu = body()
    write_dicom(tmp_path, hu, SPACING, names=names)
    (tmp_path / name).write_bytes(FOREIGN[name])
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.warnings == ("files skipped that are not slices of the CT: 1 × no DICOM file",)


BROKEN = {
    "cut off behind the preamble": lambda whole: whole[:140],
    "cut off in the header": lambda whole: whole[:400],
    "without a preamble, cut off": lambda whole: whole[132:-40],
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("syntax", UNCOMPRESSED[:3], ids=short)
def test_what_begins_as_dicom_is_damage_whatever_it_is_called(tmp_path, change, syntax):
    files = write_dicom(tmp_path, body(), SPACING, transfer_syntax=syntax)
    (tmp_path / "other.pdf").write_bytes(change(files[9].read_bytes()))
    files[9].unlink()
    refusal(lambda: read_series(tmp_path), "1 of 10", "other.pdf", "copy")


@pytest.mark.parametrize("syntax", UNCOMPRESSED[:3], ids=short)
@pytest.mark.parametrize("kept", [1, 0.8], ids=["whole", "cut off"])
def test_a_data_set_without_preamble_and_meta_header_is_read_or_damage(tmp_path, syntax, kept):
    hu = body()
    files = write_dicom(tmp_path, hu, SPACING, names=[f"IM{z}" for z in range(10)], transfer_syntax=syntax)
    whole = files[9].read_bytes()
    files[9].unlink()
    first = b"\0\x08\0\x08" if syntax == ExplicitVRBigEndian else b"\x08\0\x08\0"  # ImageType
    whole = whole[whole.index(first) :]
    (tmp_path / "other").write_bytes(whole[: int(len(whole) * kept)])
    if kept == 1:
        np.testing.assert_array_equal(read_series(tmp_path).hu, hu)
    else:
        refusal(lambda: read_series(tmp_path), "1 of 10", "other", "copy")


@pytest.mark.parametrize("content", [b"", b"\0" * 3000, b"%PDF-1.7\n" * 30], ids=["empty", "zeros", "PDF"])
def test_a_file_named_as_slices_are_that_is_none_is_damage(tmp_path, content):
    """At the series' end, no gap would tell."""
    files = write_dicom(tmp_path, body(), SPACING, names=[f"IM{z}" for z in range(10)])
    files[9].write_bytes(content)
    refusal(lambda: read_series(tmp_path), "1 of 10", "nothing can be read", "IM9", "copy")


def test_copies_to_the_byte_are_left_out_and_counted(tmp_path):
    hu = body()
    files = write_dicom(tmp_path, hu, SPACING)
    shutil.copy(files[3], tmp_path / "a copy.dcm")
    shutil.copy(files[3], tmp_path / "0003 (1).dcm")
    shutil.copy(files[8], tmp_path / "IM8")
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.warnings == ("files skipped that are not slices of the CT: 3 × a copy of another file",)


@pytest.mark.parametrize("uid", [True, False], ids=["same UID", "without a UID"])
def test_slices_that_share_their_uid_are_no_copies(tmp_path, uid):
    """As some anonymisers leave them: the bytes decide."""

    def same(ds, _):
        ds.SOPInstanceUID = "1.2.3" if uid else ""

    hu = body()
    write_dicom(tmp_path, hu, SPACING, extra=same)
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.warnings == ()


# Enhanced CT: all slices are frames of one file.


def item(**elements) -> Dataset:
    ds = Dataset()
    ds.update(elements)
    return ds


def write_enhanced(
    folder: Path, hu: np.ndarray, *, order=None, intercepts=None, syntax=ExplicitVRLittleEndian, change=None
) -> Path:
    """By pydicom; positions stand with each frame, the rescale with all unless `intercepts` are given.

    Source: DICOM PS3.3 sections A.38 (enhanced CT) and C.7.6.16 (functional groups).
    """
    write_dicom(folder, hu[:1], SPACING, names=["all.dcm"], slope=1, intercept=-1024)
    ds = dcmread(folder / "all.dcm")
    unset("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness")(ds)
    unset("RescaleIntercept", "RescaleSlope", "RescaleType")(ds)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    order = range(len(hu)) if order is None else order
    affine = affine_of(SPACING)
    shared = item(
        PixelMeasuresSequence=[item(PixelSpacing=list(SPACING[1:]), SliceThickness=SPACING[0])],
        PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
    )
    if intercepts is None:
        shared.PixelValueTransformationSequence = [item(RescaleIntercept=-1024, RescaleSlope=1)]
    frames = []
    for k, z in enumerate(order):
        place = list(positions(affine, np.array([z, 0, 0])))
        frames.append(item(PlanePositionSequence=[item(ImagePositionPatient=place)]))
        frames[-1].FrameContentSequence = [item(FrameAcquisitionNumber=1, DimensionIndexValues=[1, k + 1])]
        if intercepts is not None:
            rescale = item(RescaleIntercept=intercepts[k], RescaleSlope=1)
            frames[-1].PixelValueTransformationSequence = [rescale]
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [shared], frames
    ds.NumberOfFrames = len(hu)
    low = np.reshape(-1024 if intercepts is None else intercepts, (-1, 1, 1))
    pixels = (hu[list(order)] - low).astype(np.uint16)
    ds.PixelData = pixels.astype(">u2" if syntax == ExplicitVRBigEndian else "<u2").tobytes()
    ds["PixelData"].VR = "OW"
    if change:
        change(ds)
    ds.file_meta.TransferSyntaxUID = syntax
    if syntax == RLELossless:
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.compress(RLELossless, generate_instance_uid=False)
    little, implicit = syntax != ExplicitVRBigEndian, syntax == ImplicitVRLittleEndian
    fresh = Dataset(ds)
    fresh.file_meta = ds.file_meta
    fresh.save_as(folder / "all.dcm", enforce_file_format=True, little_endian=little, implicit_vr=implicit)
    return folder


def open_ended(ds) -> None:
    for element in (ds["SharedFunctionalGroupsSequence"], ds["PerFrameFunctionalGroupsSequence"]):
        element.is_undefined_length = True
        for each in element.value:
            each.is_undefined_length_sequence_item = True


ORDERS = {"down": None, "up": range(9, -1, -1), "mixed": np.random.default_rng(0).permutation(10)}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("syntax", [*UNCOMPRESSED, RLELossless], ids=short)
@pytest.mark.parametrize("change", [None, open_ended], ids=["lengths", "delimiters"])
def test_enhanced_ct_is_put_in_order_by_its_frames_positions(tmp_path, syntax, order, change):
    hu = body()
    write_enhanced(tmp_path, hu, order=order, syntax=syntax, change=change)
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    np.testing.assert_allclose(volume.spacing_mm, SPACING)
    np.testing.assert_allclose(volume.origin_mm, scans.ORIGIN)
    assert sorted(volume.frames) == list(range(1, 11))
    for number, z in enumerate(range(10) if order is None else order, start=1):
        np.testing.assert_allclose(volume.indices(volume.frames[number][:1]), [[z, 0, 0]], atol=1e-6)


def test_enhanced_ct_may_state_the_same_rescale_with_each_frame(tmp_path):
    hu = body()
    write_enhanced(tmp_path, hu, intercepts=[-1100] * 10)
    np.testing.assert_array_equal(read_series(tmp_path).hu, hu)


def test_enhanced_ct_with_a_rescale_of_its_own_for_each_frame_is_refused(tmp_path):
    write_enhanced(tmp_path, body(), intercepts=[-1024 - 10 * z for z in range(10)])
    refusal(lambda: read_series(tmp_path), "no CT image", "several frames", "rescale", "convert")


BAD_FRAMES = {
    "two at one place": (
        lambda ds: setattr(
            ds.PerFrameFunctionalGroupsSequence[4],
            "PlanePositionSequence",
            ds.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence,
        ),
        ("same position", "frame 4", "frame 5"),
    ),
    "one without a place": (
        lambda ds: delattr(ds.PerFrameFunctionalGroupsSequence[4], "PlanePositionSequence"),
        ("1 of 10", "position", "frame 5"),
    ),
    "fewer places than frames": (lambda ds: ds.PerFrameFunctionalGroupsSequence.pop(), ("several frames",)),
    "fewer pixels than frames": (shorten, ("1 of 1", "bytes of pixels")),
    "no groups": (unset("PerFrameFunctionalGroupsSequence"), ("several frames",)),
}


@pytest.mark.parametrize(("change", "parts"), BAD_FRAMES.values(), ids=BAD_FRAMES)
def test_enhanced_ct_whose_frames_make_no_volume_is_refused(tmp_path, change, parts):
    write_enhanced(tmp_path, body(), change=change)
    refusal(lambda: read_series(tmp_path), tmp_path.name, *parts)


# Free text.

KERNELS = ("Br38f", "B30f", "Hr64h\\3", "I26f/2", "H31s", "FC08", "BONEPLUS", "STANDARD", "C", "YB", "FC51")
NAMES = ("Doe^Jane", "DOE JANE", "Jane", "ROE", "19610203", "4711", "<script>", "Br38f Doe", "=1+1")


def test_kernels_of_manufacturers_are_shown_and_other_text_is_not():
    assert [shown({"kernel": kernel}, "kernel") for kernel in KERNELS] == list(KERNELS)
    hidden = [shown({"kernel": name}, "kernel") for name in NAMES]
    assert all(re.fullmatch(r"unknown-[0-9a-f]{4}", text) for text in hidden)
    assert len(set(hidden)) == len(NAMES)  # series stay apart
    assert shown({"kernel": None}, "kernel") == "not given"


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_a_series_whose_uid_is_none_is_not_named_by_it_and_can_be_chosen(tmp_path):
    for series, hu in (("Doe^Jane", body()), ("Roe^Richard", body(seed=1))):
        write_dicom(tmp_path, hu, SPACING, series_uid=series, names=[f"{series[:3]}{z}" for z in range(10)])
    message = refusal(lambda: read_series(tmp_path), "2 CT series", "unknown-")
    read = [read_series(tmp_path, series=name).hu for name in re.findall(r"unknown-\w{4}", message)]
    np.testing.assert_array_equal(sorted(read, key=np.sum), sorted((body(), body(seed=1)), key=np.sum))


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_no_free_text_of_headers_is_ever_said(tmp_path):
    """Whatever stands in a header, it may be a name."""

    def say(ds, _):
        ds.ConvolutionKernel, ds["SliceThickness"]._value = "Doe^Jane", "Jane Doe 1961"
        ds.ImageType, ds.RescaleType = ["DOE", "JANE"], "Doe"

    for series in ("1.2.77", "1.2.88"):
        names = [f"{series}.{z}" for z in range(10)]
        write_dicom(tmp_path / "two", body(), SPACING, series_uid=series, names=names, extra=say)
    refusal(lambda: read_series(tmp_path / "two"), "2 CT series", "kernel unknown-")


@pytest.mark.parametrize(
    ("element", "text", "said"),
    [
        ("Modality", "DOE_JANE", "no CT image"),
        ("PhotometricInterpretation", "JANE DOE", "no CT image"),
        ("RescaleSlope", "Doe^Jane", "slope is no number"),
        ("RescaleIntercept", "Doe^Jane", "intercept is no number"),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_codes_and_numbers_that_are_none_are_not_said(tmp_path, element, text, said):
    def garble(ds, _):
        ds.add_new("PixelPaddingValue", "US", 63536)
        ds.add_new(element, "LO", text)

    write_dicom(tmp_path, body(), SPACING, extra=garble, transfer_syntax=ImplicitVRLittleEndian)
    refusal(lambda: read_series(tmp_path), said)


# Files that other writers made: all that pydicom ships.

SHIPPED = Path(pydicom.data.__file__).parent
MORE_OF_A_KIND = re.compile(r"/IM0000(0[1-9A-Z]|1.)$")
OTHERS = sorted(
    path
    for path in SHIPPED.rglob("*")
    if path.is_file() and path.suffix != ".py" and not MORE_OF_A_KIND.search(str(path))
)
NOT_WRITTEN = "SC_rgb_jpeg.dcm"  # in colour; pydicom reads it, but cannot write it again
IMAGES = [
    path for path in OTHERS if (header := read_header(path)) and header.shape[0] and path.name != NOT_WRITTEN
]
SERIES = SHIPPED / "test_files" / "dicomdirtests" / "98892001" / "CT5N"


def named(path: Path) -> str:
    return path.relative_to(SHIPPED).as_posix()


def assert_sentence(message: str) -> None:
    assert message.endswith(".")
    assert not re.search(r"0x[0-9a-f]{4}|\n|Traceback|/tmp|::|itk", message), message


def test_there_are_files_to_try():
    assert len(OTHERS) > 120
    assert len(IMAGES) > 90


@pytest.mark.slow
@pytest.mark.parametrize("path", OTHERS, ids=named)
def test_no_single_file_is_a_volume_and_one_sentence_says_why(tmp_path, path):
    shutil.copy(path, tmp_path)
    assert_sentence(refusal(lambda: read_series(tmp_path), tmp_path.name))


def test_a_shipped_series_is_read_as_pydicom_reads_it():
    slices = sorted((dcmread(file) for file in SERIES.iterdir()), key=lambda ds: -ds.ImagePositionPatient[2])
    expected = [ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in slices]
    np.testing.assert_array_equal(read_series(SERIES).hu, np.stack(expected))


TWINS = sorted(path.name for path in OTHERS if re.match(r"MR_small_(?!padded)", path.name))


@pytest.mark.parametrize("name", TWINS)
def test_one_picture_in_eight_transfer_syntaxes_is_read_alike(tmp_path, name):
    """JPEG-LS, too, which pydicom alone does not decode."""
    as_ct(SHIPPED / "test_files" / name, tmp_path / "ct")
    known = dcmread(SHIPPED / "test_files" / "MR_small.dcm").pixel_array
    np.testing.assert_array_equal(read_series(tmp_path / "ct").hu, [known, known])


@pytest.mark.parametrize("change", CUT.values(), ids=CUT)
def test_jpeg_ls_that_is_not_all_there_is_damage(tmp_path, change):
    as_ct(SHIPPED / "test_files" / "MR_small_jpeg_ls_lossless.dcm", tmp_path / "ct")
    rewrap(tmp_path / "ct" / "1.dcm", change)
    refusal(lambda: read_series(tmp_path / "ct"), "1 of 2", "1.dcm", "copy")


def as_ct(path: Path, folder: Path) -> None:
    """Two slices of a CT with an image's pixels as they are written."""
    folder.mkdir()
    for z in range(2):
        ds = dcmread(path, force=True)
        ds.Modality, ds.SOPClassUID, ds.SOPInstanceUID = "CT", CTImageStorage, f"1.2.3.{z}"
        ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, -z], [1, 0, 0, 0, 1, 0]
        ds.SeriesInstanceUID, ds.PixelSpacing, ds.ImageType = "1.2.3", [1, 1], ["ORIGINAL"]
        ds.AcquisitionNumber = ds.InstanceNumber = 1
        ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
        ds.save_as(folder / f"{z}.dcm", enforce_file_format=False)


@pytest.mark.slow
@pytest.mark.parametrize("path", IMAGES, ids=named)
@pytest.mark.filterwarnings("ignore")
def test_pixels_of_any_writer_are_read_as_pydicom_reads_them_or_refused(tmp_path, path):
    as_ct(path, tmp_path / "ct")
    try:
        hu = read_series(tmp_path / "ct").hu
    except ValueError as error:
        assert_sentence(str(error))
        return
    ds = dcmread(path)
    try:
        stored = ds.pixel_array
    except RuntimeError:  # it cannot decode these without packages that are not installed
        assert hu.shape == (2, ds.Rows, ds.Columns)
        return
    expected = stored * float(ds.get("RescaleSlope") or 1) + float(ds.get("RescaleIntercept") or 0)
    assert stored.shape == (ds.Rows, ds.Columns)
    is_padding = stored == ds.get("PixelPaddingValue", np.nan)
    for plane in hu:
        np.testing.assert_array_equal(plane[is_padding], -1024)
        np.testing.assert_allclose(
            plane[~is_padding], np.clip(expected[~is_padding], -32768, 32767), atol=1e-3
        )
