"""Phantoms as a scanner and a segmentation tool would write them: with them, all from CT on runs offline.

The layout is that of RSNA 2022:

    train_images/<StudyInstanceUID>/<InstanceNumber>.dcm    one axial slice a file
    segmentations/<StudyInstanceUID>.nii.gz                 1 to 7 for C1 to C7
    train.csv, train_bounding_boxes.csv
"""

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from cspine_helpers import labels
from cspine_helpers.ct.nifti import NIFTI
from cspine_helpers.ct.volume import FRAME, Volume, optional, reason, simpleitk
from cspine_helpers.files import paths
from cspine_helpers.labels import UID
from cspine_helpers.packed import PackedVertebra
from cspine_helpers.phantom.cohort import pieces_of, study_of
from cspine_helpers.phantom.rendering import Study

IMAGES, SEGMENTATIONS = "train_images", "segmentations"
LABELS, BOXES = "train.csv", "train_bounding_boxes.csv"
_UNFINISHED = ".export-"
HEADERS = ("full", "rsna")
_CT_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.2"  # Source: DICOM PS3.4 section B.5
_WRITER = "2.25.148907733915624091355264171226590342173"  # Source: DICOM PS3.5 section B.2, from a UUID
_UID_LENGTH = 64  # Source: DICOM PS3.5 section 9.1


def write_series(
    folder: Path,
    hu: np.ndarray,
    spacing_mm: Sequence[float],
    *,
    study_uid: str,
    names: Sequence[str] | None = None,
    header: str = "full",
) -> None:
    """Write a volume as a series of DICOM CT slices; the same volume gives the same bytes.

    InstanceNumber is the index along Z plus 1, the volume's middle lies at (0, 0, 0), no tag holds a date.
    Files of the same names are replaced.

    Args:
        folder: where the slices go; made where it is missing.
        hu: (Z, Y, X) Hounsfield units, cranial to caudal, front to back, right to left; stored as whole HU.
        spacing_mm: (z, y, x).
        study_uid: StudyInstanceUID; those of series and slices are made from it.
        names: file names, one a slice in the order of Z; default `<InstanceNumber>.dcm`.
        header: "full", what the standard asks for; "rsna", the elements that slices of RSNA 2022 have, and no
            other: no modality, class or frame of reference, positions to a hundredth of a mm.

    Raises:
        ImportError: pydicom is not installed.
        OSError: a file cannot be written.
        ValueError: shape, values, spacing, UID, names or header cannot be those of a series.
    """
    _check_grid(hu, spacing_mm)
    stored = _whole_hu(hu)
    _check_uid(study_uid, len(stored))
    names = _checked_names(names, len(stored))
    if header not in HEADERS:
        raise ValueError(f"header is one of {', '.join(HEADERS)}; found {header!r}. Choose one.")
    x, y, z = _origin_mm(hu.shape, spacing_mm)
    series = _series(study_uid, hu.shape, spacing_mm, header)
    folder.mkdir(parents=True, exist_ok=True)
    for index, (plane, name) in enumerate(zip(stored, names, strict=True)):
        height = z - index * spacing_mm[0]
        uid, shown = (
            f"{study_uid}.1.{index + 1}",
            _decimal(height) if header == "full" else f"{height + 0.0:.2f}",
        )
        series.SOPInstanceUID = series.file_meta.MediaStorageSOPInstanceUID = uid
        series.InstanceNumber = str(index + 1)
        series.ImagePositionPatient = [_decimal(x), _decimal(y), shown]
        series.PixelData = plane.astype("<i2").tobytes()
        path = folder / name
        paths.check_own(path)
        try:
            series.save_as(path, enforce_file_format=True)
        except OSError as error:
            raise _not_written(path, error.strerror or str(error)) from error


def write_label_map(path: Path, label_map: np.ndarray, spacing_mm: Sequence[float]) -> None:
    """Write a label map as NIfTI (uint8), on the grid of the series that `write_series` makes of its volume.

    Rows run from back to front and slices from caudal to cranial, as converters of DICOM leave them: whoever
    reads the values has to read the header's orientation, too.

    Args:
        path: ends in .nii or .nii.gz; its folder is made where it is missing.
        label_map: (Z, Y, X) whole numbers from 0 to 255; cranial to caudal, front to back, right to left.
        spacing_mm: (z, y, x).

    Raises:
        ImportError: SimpleITK is not installed.
        OSError: the file cannot be written.
        ValueError: shape, values, spacing or the file's name do not fit.
    """
    _check_grid(label_map, spacing_mm)
    if not path.name.endswith(NIFTI):
        raise ValueError(f"A label map's file ends in {' or '.join(NIFTI)}; found {path.name!r}. Rename it.")
    if not ((label_map >= 0) & (label_map <= 255) & (np.rint(label_map) == label_map)).all():
        raise ValueError(
            f"A label map holds whole numbers from 0 to 255; found {label_map.dtype} from {label_map.min()} "
            f"to {label_map.max()}. Convert it."
        )
    values = label_map[::-1, ::-1].astype(np.uint8, order="C")
    sitk = simpleitk()
    x, y, z = _origin_mm(label_map.shape, spacing_mm)
    image = sitk.GetImageFromArray(values)
    image.SetSpacing([float(length) for length in reversed(spacing_mm)])
    image.SetOrigin((x, -y, -z))  # the last row and slice come first, and the middle lies at 0
    image.SetDirection((1, 0, 0, 0, -1, 0, 0, 0, 1))
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("NiftiImageIO")
    writer.SetFileName(str(path))
    paths.check_own(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        writer.Execute(image)
    except RuntimeError as error:
        raise _not_written(path, reason(error)) from error


def locate_phantom(folder: Path, uid: str) -> tuple[Volume, dict[str, PackedVertebra]]:
    """A phantom's CT, where `write_series` puts it (its middle at 0), and where its sequences were cut.

    Args:
        folder: the cohort, `data/<cohort>`.
        uid: StudyInstanceUID.

    Raises:
        FileNotFoundError, ValueError: as `study_of`.

    Example:
        >>> locate_phantom(Path("mine"), "1.2.3")
        Traceback (most recent call last):
        ...
        FileNotFoundError: mine is no phantom cohort: it has no cohort.json. Its CT is not made here.
    """
    study = study_of(folder, uid)
    hu, spacing = study.volume_hu, study.spacing_mm
    volume = Volume(hu, spacing, np.array(_origin_mm(hu.shape, spacing)), FRAME)
    return volume, pieces_of(folder, study)


def export_cohort(cohort: Path, folder: Path, studies: Sequence[str], *, header: str = "full") -> None:
    """Write studies of a phantom cohort as DICOM and NIfTI, with their tables, in the layout of RSNA 2022.

    Each study is written beside its place and moved there when complete; the tables come last. What an
    earlier export of these studies left is replaced. In the boxes, `slice_number` becomes InstanceNumber.

    Args:
        cohort: folder of a phantom cohort, `data/<cohort>`.
        folder: where they go; not the cohort's own.
        studies: StudyInstanceUIDs.
        header: of the slices, see `write_series`.

    Raises:
        BlockingIOError: another process exports to the folder.
        FileExistsError: the folder holds something else.
        FileNotFoundError: there is no phantom cohort.
        ImportError: pydicom or SimpleITK is not installed.
        OSError: a file cannot be written.
        ValueError: a study is unknown or asked for twice, or there is none.

    Example:
        >>> export_cohort(cohort_dir("builtin"), cohort_dir("builtin_ct"), uids)  # doctest: +SKIP
    """
    studies = list(studies)
    table = labels.read_labels(cohort / LABELS)
    labels.expand(table, studies)  # refuses what is unknown or asked for twice
    table = table.set_index(UID).loc[studies].reset_index()
    table = labels.validate_labels(table, what="The list of studies")
    boxes = labels.read_boxes(cohort / BOXES)
    boxes = boxes[boxes[UID].isin(studies)]
    boxes = boxes.assign(slice_number=boxes["slice_number"] + 1)  # RSNA 2022 counts by InstanceNumber
    with paths.exclusive(folder.with_name(f".{folder.name}.lock"), f"exporting to {folder}"):
        _check_ours(folder, studies)
        for unfinished in folder.glob(f"{_UNFINISHED}*"):  # by a process that was killed
            shutil.rmtree(unfinished)
        for uid in tqdm(studies, desc=f"CT of {cohort.name}", unit="study", mininterval=1):
            _export_study(study_of(cohort, uid), folder, header)
        labels.write_labels(table, folder / LABELS)
        labels.write_boxes(boxes, folder / BOXES)


def _export_study(study: Study, folder: Path, header: str) -> None:
    """One study, beside its place and then there: whoever finds its slices finds its label map."""
    images, label_map = folder / IMAGES / study.uid, folder / SEGMENTATIONS / f"{study.uid}.nii.gz"
    for place in (images, label_map):
        place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=_UNFINISHED) as temporary:
        new = Path(temporary)
        write_series(new / study.uid, study.volume_hu, study.spacing_mm, study_uid=study.uid, header=header)
        write_label_map(new / label_map.name, study.label_map, study.spacing_mm)
        if images.exists():
            images.rename(new / "old")
        (new / label_map.name).replace(label_map)
        (new / study.uid).rename(images)


def _check_ours(folder: Path, studies: list[str]) -> None:
    """Refuse to write to a folder that holds more than an export of these studies replaces."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file. Choose another folder.")
    ours = {IMAGES, SEGMENTATIONS, LABELS, BOXES}
    ours |= {name for uid in studies for name in (f"{IMAGES}/{uid}", f"{SEGMENTATIONS}/{uid}.nii.gz")}
    found = [path for place in ("*", f"{IMAGES}/*", f"{SEGMENTATIONS}/*") for path in folder.glob(place)]
    names = [path.relative_to(folder).as_posix() for path in found]
    strangers = [name for name in names if name not in ours and not name.startswith(_UNFINISHED)]
    slices = [path for uid in studies for path in folder.glob(f"{IMAGES}/{uid}/*")]
    strangers += [f"{p.parent.name}/{p.name}" for p in slices if not re.fullmatch(r"\d+\.dcm", p.name)]
    for name, read in ((LABELS, labels.read_labels), (BOXES, labels.read_boxes)):
        if (folder / name).exists():
            uids = read(folder / name)[UID].drop_duplicates()
            strangers += [f"{uid} in {name}" for uid in uids[~uids.isin(studies)]]
    if strangers:
        raise FileExistsError(
            f"{folder} holds more than these {len(studies)} studies: {paths.listing(sorted(strangers))}. "
            "Choose another folder, or move it."
        )


def _series(study_uid: str, shape: Sequence[int], spacing_mm: Sequence[float], header: str) -> Any:
    """A pydicom dataset of what all slices of a series say alike; no date and no time.

    Source: `full` is of DICOM PS3.3 section A.3 (CT image); `rsna` was read off an original slice.
    """
    pydicom = optional("pydicom")
    between_slices, *within = map(_decimal, spacing_mm)
    last = study_uid.rpartition(".")[2]
    elements = {
        "SliceThickness": between_slices,
        "StudyInstanceUID": study_uid,
        "SeriesInstanceUID": f"{study_uid}.1",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": shape[1],
        "Columns": shape[2],
        "PixelSpacing": within,
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,  # HU are stored as they are, in signed integers
        "RescaleIntercept": "0",
        "RescaleSlope": "1",
    }
    if header == "rsna":
        elements |= {
            **{"ContentDate": "", "ContentTime": "", "PatientName": last, "PatientID": last},
            **{"WindowCenter": "500", "WindowWidth": "2500"},
            "ImageOrientationPatient": [f"{value:.5f}" for value in (1, 0, 0, 0, 1, 0)],
        }
    else:
        empty = "StudyDate StudyTime AccessionNumber ReferringPhysicianName StudyID"
        empty += " PatientID PatientBirthDate PatientSex"
        elements |= dict.fromkeys(empty.split(), "") | {
            "ImageType": ["DERIVED", "PRIMARY", "AXIAL"],
            "SOPClassUID": _CT_IMAGE_STORAGE,
            "Modality": "CT",
            "PatientName": "PHANTOM",
            "PatientPosition": "HFS",  # head first, supine
            "SeriesNumber": "1",
            "ImageOrientationPatient": ["1", "0", "0", "0", "1", "0"],
            "FrameOfReferenceUID": f"{study_uid}.2",
            "RescaleType": "HU",
        }
    meta = {
        "MediaStorageSOPClassUID": _CT_IMAGE_STORAGE,
        "TransferSyntaxUID": pydicom.uid.ExplicitVRLittleEndian,
        "ImplementationClassUID": _WRITER,
        "ImplementationVersionName": "CSPINE_HELPERS",
    }
    series, series_meta = pydicom.Dataset(), pydicom.dataset.FileMetaDataset()
    for dataset, values in ((series, elements), (series_meta, meta)):
        for keyword, value in values.items():
            setattr(dataset, keyword, value)
    series.file_meta = series_meta
    return series


def _not_written(path: Path, why: str) -> OSError:
    return OSError(
        f"{path} was not written ({why}). Check the right to write to {path.parent} and the free space there."
    )


def _origin_mm(shape: tuple[int, ...], spacing_mm: Sequence[float]) -> tuple[float, float, float]:
    """Patient coordinates (x, y, z) of voxel (0, 0, 0): the most cranial, foremost and rightmost one."""
    z, y, x = ((count - 1) / 2 * float(step) for count, step in zip(shape, spacing_mm, strict=True))
    return -x, -y, z


def _decimal(value: float) -> str:
    """A DICOM decimal string, as exact as its 16 characters let it be (DICOM PS3.5 section 6.2)."""
    texts = (f"{value + 0.0:.{digits}g}" for digits in range(14, 0, -1))  # + 0.0: no minus before a zero
    return next(text for text in texts if len(text) <= 16)


def _check_grid(array: np.ndarray, spacing_mm: Sequence[float]) -> None:
    if array.ndim != 3 or not array.size:
        raise ValueError(f"A volume is (Z, Y, X) with a voxel or more; found the shape {array.shape}.")
    if len(spacing_mm) != 3 or not all(0 < length < np.inf for length in spacing_mm):
        raise ValueError(f"spacing_mm must hold three positive lengths (z, y, x); found {spacing_mm}.")


def _whole_hu(hu: np.ndarray) -> np.ndarray:
    """Hounsfield units as int16."""
    limits = np.iinfo(np.int16)
    whole = np.rint(hu)
    if not ((whole >= limits.min) & (whole <= limits.max)).all():  # also NaN
        raise ValueError(
            f"A slice stores whole Hounsfield units from {limits.min} to {limits.max}; found {hu.min()} to "
            f"{hu.max()}. Clip the volume."
        )
    return whole.astype(np.int16)


def _check_uid(study_uid: str, slices: int) -> None:
    """Refuse a StudyInstanceUID that is none, or that leaves no room for its slices' UIDs.

    Source: DICOM PS3.5 section 9.1 (UID alphabet and length).
    """
    if not re.fullmatch(r"[0-9]+(?:\.[0-9]+)*", study_uid):
        raise ValueError(f"A UID of DICOM has digits, with dots between them; found {study_uid!r}.")
    longest = len(f"{study_uid}.1.{slices}")
    if longest > _UID_LENGTH:
        raise ValueError(
            f"A UID has up to {_UID_LENGTH} characters; those of the slices of study {study_uid!r} would "
            f"have {longest}. Give a shorter one."
        )


def _checked_names(names: Sequence[str] | None, slices: int) -> list[str]:
    """File names of the slices, where each is one and no two are alike."""
    if names is None:
        return [f"{number}.dcm" for number in range(1, slices + 1)]
    bad = [name for name in names if Path(name).name != name]
    if bad or len(names) != slices or len(set(names)) != slices:
        raise ValueError(
            f"names must hold {slices} different file names; found {len(names)}, {len(set(names))} of them "
            f"different, and these that are no file names: {paths.listing(bad) or 'none'}. Correct them."
        )
    return list(names)
