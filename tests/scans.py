"""Scans on disk, written by pydicom and nibabel: oracles for what is read through SimpleITK."""

import itertools
import locale
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel
import numpy as np
import pytest
from conftest import REAL_DATA
from nibabel import orientations
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    RLELossless,
)
from pydicom.valuerep import DSfloat
from scipy import ndimage

from cspine_helpers.ct.dicom import read_series
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.phantom.rendering import render_study

REAL_CT = REAL_DATA / "ct"
needs_ct = pytest.mark.skipif(not REAL_CT.is_dir(), reason=f"the real CT volumes are not at {REAL_CT}")

FRAME = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])  # columns: LPS steps of Z, Y, X
ORIGIN = (-55.5, -40.25, 812.75)  # LPS mm
ORIENTATIONS = tuple(
    "".join(signs)
    for axes in itertools.permutations(("LR", "AP", "IS"))
    for signs in itertools.product(*axes)
)  # what the three array axes run towards, 48 ways; "IPL" is the frame
STUDY_UID, SERIES_UID = "1.2.826.0.1.3680043.7.2", "1.2.826.0.1.3680043.7.2.1"
PATIENT = {
    "PatientName": "Doe^Jane",
    "PatientID": "MRN-4711",
    "PatientBirthDate": "19610203",
    "StudyDate": "20190807",
    "AcquisitionDateTime": "20190807101112",
    "ReferringPhysicianName": "Roe^Richard",
    "InstitutionName": "General Hospital",
}
SECRETS = ("doe", "jane", "4711", "1961", "2019", "roe", "richard", "hospital")  # as words begin


RSNA_ELEMENTS = (  # of an original slice of RSNA 2022; no other
    *("SOPInstanceUID", "ContentDate", "ContentTime", "PatientName", "PatientID", "SliceThickness"),
    *("StudyInstanceUID", "SeriesInstanceUID", "InstanceNumber", "ImagePositionPatient"),
    *("ImageOrientationPatient", "SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns"),
    *("PixelSpacing", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "WindowCenter"),
    *("WindowWidth", "RescaleIntercept", "RescaleSlope", "PixelData"),
)

SPACING = (1.25, 0.75, 0.5)  # exact in binary, so that positions compare without tolerance


@dataclass(frozen=True)
class Scan:
    """A phantom as scanners store it: whole Hounsfield units, in the frame (Z, Y, X).

    Attributes:
        hu: int16.
        labels: uint8, same shape; 1–7 mark C1–C7.
        spacing_mm: (z, y, x).
    """

    hu: np.ndarray
    labels: np.ndarray
    spacing_mm: tuple[float, float, float]


@cache
def phantom() -> Scan:
    """Seven vertebrae."""
    study = render_study(7, 1, {"C2": 1, "C5": 1})
    scan = Scan(np.rint(study.volume_hu).astype(np.int16), study.label_map, study.spacing_mm)
    scan.hu.flags.writeable = scan.labels.flags.writeable = False
    return scan


@cache
def real_series() -> np.ndarray:
    """20 slices of 512 × 512, 2 mm apart, as whole HU; only where the real CT are (`needs_ct`)."""
    hu = read_series(REAL_CT / "totalsegmentator_example" / "dicom").hu.astype(np.int16)
    hu.flags.writeable = False
    return hu


@cache
def excerpt() -> Scan:
    """C4, C5 and C6 alone, of the whole phantom: three axes of different lengths."""
    whole = phantom()
    found = np.argwhere((whole.labels >= 4) & (whole.labels <= 6))
    low, high = found.min(0) - np.array([2, 4, 5]), found.max(0) + np.array([3, 5, 4])
    crop = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    labels = np.where((whole.labels >= 4) & (whole.labels <= 6), whole.labels, 0).astype(np.uint8)
    assert len({*whole.hu[crop].shape}) == 3
    return Scan(whole.hu[crop], labels[crop], whole.spacing_mm)


def affine_of(
    spacing_mm: Iterable[float], *, direction: np.ndarray = FRAME, origin_mm: Iterable[float] = ORIGIN
) -> np.ndarray:
    """(4, 4): voxel indices (z, y, x) to LPS mm."""
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array([*spacing_mm])
    affine[:3, 3] = [*origin_mm]
    return affine


def positions(affine: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """(..., 3) indices to (..., 3) mm; with an inverted affine the way back."""
    return np.asarray(indices) @ affine[:3, :3].T + affine[:3, 3]


def turned(array: np.ndarray, affine: np.ndarray, orientation: str) -> tuple[np.ndarray, np.ndarray]:
    """The same voxels at the same places, stored with the axes in another order and sign."""
    change = orientations.ornt_transform(
        orientations.axcodes2ornt("IPL"), orientations.axcodes2ornt(orientation)
    )
    back = orientations.inv_ornt_aff(change, array.shape)
    return np.ascontiguousarray(orientations.apply_orientation(array, change)), affine @ back


def resampled(
    array: np.ndarray, affine: np.ndarray, other: np.ndarray, shape: Sequence[int], *, order: int = 0
) -> np.ndarray:
    """`array` as another grid sees it: nearest neighbour (order 0) or linear (1); 0 outside for labels."""
    there = positions(other, np.moveaxis(np.indices(shape), 0, -1))
    inside = np.moveaxis(positions(np.linalg.inv(affine), there), -1, 0)
    mode = "grid-constant" if order == 0 else "nearest"  # a voxel reaches half its size past its middle
    return ndimage.map_coordinates(array, inside, order=order, mode=mode, prefilter=False)


def landmarks(scan: Scan) -> dict[str, np.ndarray]:
    """By vertebra: middle of its label in voxel indices (z, y, x)."""
    found = {v: np.argwhere(scan.labels == i) for i, v in enumerate(VERTEBRAE, start=1)}
    return {vertebra: points.mean(axis=0) for vertebra, points in found.items() if len(points)}


def rotation(*degrees: float) -> np.ndarray:
    """(3, 3): turns about the patient's x, y and z, one after the other."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        step = np.eye(3)
        step[i, i] = step[j, j] = np.cos(angle)
        step[i, j], step[j, i] = -np.sin(angle), np.sin(angle)
        turn = step @ turn
    return turn


def write_dicom(
    folder: Path,
    hu: np.ndarray,
    spacing_mm: Iterable[float],
    *,
    direction: np.ndarray = FRAME,
    origin_mm: Iterable[float] = ORIGIN,
    orientation: str = "IPL",
    places: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    numbers: Sequence[int] | None = None,
    slope: float = 1,
    intercept: float = -1024,
    signed: bool = False,
    padded: np.ndarray | None = None,
    padding: int | None = None,
    padding_limit: int | None = None,
    transfer_syntax: str = ExplicitVRLittleEndian,
    modality: str = "CT",
    series_uid: str = SERIES_UID,
    study_uid: str = STUDY_UID,
    patient: Mapping[str, str] = PATIENT,
    extra: Callable[[Dataset, int], object] | None = None,
) -> list[Path]:
    """One file a slice, along the first axis of `orientation`; rows lie along the second, columns the third.

    Args:
        folder: made where it is missing.
        hu: (Z, Y, X) in the frame; what the scanner measured.
        spacing_mm: (z, y, x).
        direction: LPS unit vectors of the steps along Z, Y, X; a Z askew to Y and X is a tilted gantry.
        origin_mm: LPS of voxel (0, 0, 0).
        orientation: what slices, rows and columns run towards.
        places: a slice's place in slices from the first, where they are not 0, 1, 2 …
        names: file names by slice; without them they are shuffled numbers.
        numbers: InstanceNumber by slice; 1, 2, 3 … without.
        slope: from stored values to HU.
        intercept: from stored values to HU.
        signed: how values are stored.
        padded: (Z, Y, X) bool; voxels outside the scanner's field of view hold `padding` as stored.
        padding: PixelPaddingValue; None leaves the element out.
        padding_limit: PixelPaddingRangeLimit.
        transfer_syntax: how pixels are written.
        modality: as in the header.
        series_uid: as in the header.
        study_uid: as in the header.
        patient: elements that nothing made from the scan may repeat.
        extra: called with the data set and the slice's index just before it is saved.

    Returns:
        The files, in the order of the slices.
    """
    affine = affine_of(spacing_mm, direction=direction, origin_mm=origin_mm)
    stored = np.rint((hu - intercept) / slope)
    kind = np.int16 if signed else np.uint16
    assert np.iinfo(kind).min <= stored.min() <= stored.max() <= np.iinfo(kind).max
    if padded is not None:
        stored = np.where(padded, padding, stored)
    pixels, affine = turned(stored.astype(kind), affine, orientation)
    if names is None:
        names = [f"{k:04d}.dcm" for k in np.random.default_rng(0).permutation(len(pixels))]
    folder.mkdir(parents=True, exist_ok=True)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    steps = affine[:3, :3] / spacing
    files = []
    for z, values in enumerate(pixels):
        place = z if places is None else places[z]
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
        uid = f"{series_uid}.{z + 1}"
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = uid
        ds.StudyInstanceUID, ds.SeriesInstanceUID = study_uid, series_uid
        ds.FrameOfReferenceUID = f"{study_uid}.9"
        ds.Modality, ds.ImageType = modality, ["ORIGINAL", "PRIMARY", "AXIAL"]
        for element, value in patient.items():
            setattr(ds, element, value)
        ds.InstanceNumber = z + 1 if numbers is None else int(numbers[z])
        ds.ImagePositionPatient = [_decimal(v) for v in positions(affine, np.array([place, 0, 0]))]
        ds.ImageOrientationPatient = [_decimal(v) for v in (*steps[:, 2], *steps[:, 1])]
        ds.PixelSpacing = [_decimal(spacing[1]), _decimal(spacing[2])]  # between rows, between columns
        ds.SliceThickness = _decimal(spacing[0])
        ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = _decimal(intercept), _decimal(slope), "HU"
        if padding is not None:
            ds.add_new("PixelPaddingValue", "SS" if signed else "US", padding)
        if padding_limit is not None:
            ds.add_new("PixelPaddingRangeLimit", "SS" if signed else "US", padding_limit)
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.Rows, ds.Columns = values.shape
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
        ds.PixelRepresentation = int(signed)
        ds.PixelData = values.tobytes()
        if extra is not None:
            extra(ds, z)
        files.append(folder / names[z])
        _save(ds, values, transfer_syntax, files[-1])
    return files


def as_rsna(ds: Dataset, _: int) -> None:
    """Make a header that of an original slice of RSNA 2022; for `write_dicom`'s `extra`, with intercept 0."""
    ds.ContentDate, ds.ContentTime, ds.WindowCenter, ds.WindowWidth = "20220713", "175959.25", 500, 2500
    ds.PatientName = ds.PatientID = ds.StudyInstanceUID.rpartition(".")[2]
    ds.ImagePositionPatient[2] = f"{ds.ImagePositionPatient[2]:.2f}"
    ds.ImageOrientationPatient = [f"{float(v):.5f}" for v in ds.ImageOrientationPatient]
    for element in list(ds):
        if element.keyword not in RSNA_ELEMENTS:
            del ds[element.tag]
    assert {element.keyword for element in ds} == {*RSNA_ELEMENTS}


def edit(path: Path, change: Callable[[Dataset], object]) -> None:
    """Change a file's elements in place."""
    ds = dcmread(path)
    change(ds)
    ds.save_as(path)


def write_nifti(
    path: Path,
    array: np.ndarray,
    spacing_mm: Iterable[float],
    *,
    direction: np.ndarray = FRAME,
    origin_mm: Iterable[float] = ORIGIN,
    orientation: str = "RAS",
    codes: tuple[int, int] = (2, 0),
) -> Path:
    """A volume or a label map, given in the frame, stored with any axis order.

    Args:
        path: .nii or .nii.gz.
        array: (Z, Y, X) in the frame.
        spacing_mm: (z, y, x).
        direction: LPS unit vectors of the steps along Z, Y, X.
        origin_mm: LPS of voxel (0, 0, 0).
        orientation: what the three stored axes run towards.
        codes: sform_code and qform_code.
    """
    affine = affine_of(spacing_mm, direction=direction, origin_mm=origin_mm)
    stored, affine = turned(array, affine, orientation)
    return save_nifti(path, stored, affine, codes=codes)


def save_nifti(
    path: Path, stored: np.ndarray, affine: np.ndarray, *, codes: tuple[int, int] = (2, 0)
) -> Path:
    """An array as it is, with an affine in LPS; NIfTI's own is RAS."""
    ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    image = nibabel.Nifti1Image(stored, ras)
    image.set_sform(ras if codes[0] else None, code=codes[0])
    image.set_qform(ras if codes[1] else None, code=codes[1], strip_shears=True)
    image.header["descrip"] = b"Doe^Jane 1961"
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


def refusal(call: Callable[[], object], *parts: str, error: type[Exception] = ValueError) -> str:
    """The message that `call` is refused with: it holds every part, and nothing of the patient."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    for part in parts:
        assert part.lower() in message.lower(), message
    assert_private(message)
    return message


def assert_private(*texts: object) -> None:
    """Nothing of the patient's or the date's stands in them."""
    for text in texts:
        words = re.sub(r"[^a-z0-9]+", " ", str(text).lower())
        assert not [secret for secret in SECRETS if re.search(rf"\b{secret}(\d|\b)", words)], text


def _decimal(value: float) -> DSfloat:
    return DSfloat(float(value), auto_format=True)


def _save(ds: Dataset, values: np.ndarray, syntax: str, path: Path) -> None:
    """pydicom's writer; the pixels of JPEG files come from GDCM's, through SimpleITK."""
    if syntax in (JPEGLosslessSV1, JPEG2000Lossless):
        ds.PixelData = encapsulate([_jpeg(values, syntax)])
        ds["PixelData"].VR = "OB"
        ds.file_meta.TransferSyntaxUID = syntax
    elif syntax == RLELossless:
        ds.compress(RLELossless, generate_instance_uid=False)
    elif syntax == ExplicitVRBigEndian:
        ds.PixelData = values.astype(values.dtype.newbyteorder(">")).tobytes()
        ds["PixelData"].VR = "OW"
        ds.file_meta.TransferSyntaxUID = syntax
    else:
        ds.file_meta.TransferSyntaxUID = syntax
        ds["PixelData"].VR = "OW"
    little, implicit = syntax != ExplicitVRBigEndian, syntax == ImplicitVRLittleEndian
    ds.save_as(path, enforce_file_format=True, little_endian=little, implicit_vr=implicit)


def _jpeg(values: np.ndarray, syntax: str) -> bytes:
    import SimpleITK as sitk

    writer = sitk.ImageFileWriter()
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG" if syntax == JPEGLosslessSV1 else "JPEG2000")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "slice.dcm"
        writer.SetFileName(str(path))
        before = locale.setlocale(locale.LC_ALL)
        writer.Execute(sitk.GetImageFromArray(values[None]))
        locale.setlocale(locale.LC_ALL, before)  # GDCM's writer leaves it at "C"
        written = dcmread(path)
        assert written.file_meta.TransferSyntaxUID == syntax
        assert written.BitsStored == 16
        assert written.PixelRepresentation == int(values.dtype.kind == "i")
        return next(generate_frames(written.PixelData, number_of_frames=1))


def body(shape=(10, 24, 20), seed=0) -> np.ndarray:
    """Noise around soft tissue with bone in it: whole HU from -1024 to 1500, no two slices alike."""
    rng = np.random.default_rng(seed)
    hu = rng.integers(-150, 150, shape)
    hu[:, :3] = rng.integers(-1024, -900, (shape[0], 3, shape[2]))
    hu[:, 10:14, 8:12] = rng.integers(300, 1500, (shape[0], 4, 4))
    return hu.astype(np.int16)


def same_place(volume, spacing, *, direction=FRAME, origin=ORIGIN) -> None:
    np.testing.assert_allclose(volume.spacing_mm, spacing, rtol=1e-9)
    np.testing.assert_allclose(volume.direction, direction, atol=1e-9)
    np.testing.assert_allclose(volume.origin_mm, origin, atol=1e-6)


def tilted(degrees: float) -> np.ndarray:
    """Steps of a gantry leaning by `degrees`: slices lean, the table still moves along the patient."""
    angle = np.deg2rad(degrees)
    return np.array([[0.0, 0.0, 1.0], [0.0, np.cos(angle), 0.0], [-1.0, np.sin(angle), 0.0]])
