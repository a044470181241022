import json
import locale
import re
import shutil
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pydicom
import pytest
import scans

from cspine_helpers import labels
from cspine_helpers.ct.reading import read_ct
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.packing import crop as packing
from cspine_helpers.phantom import cohort as phantom
from cspine_helpers.phantom import rendering as phantom_rendering
from cspine_helpers.phantom import scanner as export
from cspine_helpers.phantom.cohort import CohortConfig
from cspine_helpers.phantom.rendering import Study

SEED = 24
BROKEN, INTACT = 1, 4  # two of its smallest phantoms, with and without a fracture
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SPACING = (2.5, 0.4, 0.7)  # three of a kind would hide a swap


@cache
def rendered(index: int) -> Study:
    """A phantom, every other voxel of it: an eighth of the files' bytes."""
    table = phantom.draw_labels(CohortConfig(studies=INTACT + 1, seed=SEED))
    study = phantom_rendering.render_study(SEED, index, table.loc[index, list(VERTEBRAE)].to_dict())
    few = {name: getattr(study, name)[::2, ::2, ::2] for name in ("volume_hu", "label_map", "fracture_map")}
    return replace(study, spacing_mm=tuple(2 * step for step in study.spacing_mm), **few)


def study_of(_: Path, uid: str) -> Study:
    return rendered(int(uid.rpartition(".")[2]) - 1)


@pytest.fixture(scope="module")
def study() -> Study:
    return rendered(BROKEN)


@pytest.fixture(scope="module")
def written(study, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    export.write_series(folder / "series", study.volume_hu, study.spacing_mm, study_uid=study.uid)
    export.write_label_map(folder / "labels.nii.gz", study.label_map, study.spacing_mm)
    return folder


@pytest.fixture(scope="module")
def slices(written) -> list[pydicom.Dataset]:
    return read_slices(written / "series")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """A phantom cohort as `phantom` leaves it, without its packed sequences."""
    folder = tmp_path_factory.mktemp("data") / "small"
    config = CohortConfig(studies=INTACT + 1, seed=SEED)
    labels.write_labels(phantom.draw_labels(config), folder / "train.csv")
    boxes = [box for index in (BROKEN, INTACT) for box in phantom.fracture_boxes(rendered(index))]
    labels.write_boxes(pd.DataFrame(boxes), folder / "train_bounding_boxes.csv")
    (folder / "cohort.json").write_text(json.dumps({"made_by": phantom.MADE_BY, "config": {"seed": SEED}}))
    return folder


@pytest.fixture(scope="module")
def exported(cohort, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "ct"
    export.export_cohort(cohort, folder, uids(BROKEN, INTACT))
    return folder


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Studies are rendered once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "study_of", study_of)
        yield


def read_slices(folder: Path) -> list[pydicom.Dataset]:
    """By InstanceNumber; pydicom refuses values that break the standard."""
    with pydicom.config.strict_reading():
        return sorted((pydicom.dcmread(path) for path in folder.iterdir()), key=lambda ds: ds.InstanceNumber)


def hu_of(slices: list[pydicom.Dataset]) -> np.ndarray:
    return np.stack([ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in slices])


def places_of(slices: list[pydicom.Dataset], indices: np.ndarray) -> np.ndarray:
    """LPS of voxels (N, 3) as (z, y, x). Source: DICOM PS3.3 section C.7.6.2.1.1."""
    z, y, x = indices.T[:, :, None]
    first = np.array([ds.ImagePositionPatient for ds in slices], dtype=float)[indices[:, 0]]
    turn = np.array([ds.ImageOrientationPatient for ds in slices], dtype=float)[indices[:, 0]]
    between_rows, between_columns = (float(length) for length in slices[0].PixelSpacing)
    assert z.max() < len(slices)
    return first + turn[:, :3] * between_columns * x + turn[:, 3:] * between_rows * y


def nifti_voxels(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """LPS (N, 3) and value (N,) of a label map's voxels that are not 0."""
    image = nibabel.load(path)
    values = np.asarray(image.dataobj)
    indices = np.argwhere(values)
    return nibabel.affines.apply_affine(RAS_TO_LPS @ image.affine, indices), values[tuple(indices.T)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def uids(*indices: int) -> list[str]:
    return [rendered(index).uid for index in indices]


def test_hounsfield_units_survive_to_the_last_one(study, slices):
    np.testing.assert_array_equal(hu_of(slices), np.rint(study.volume_hu))


def test_the_whole_range_of_16_bits_survives_in_any_layout_of_the_memory(tmp_path):
    hu = np.linspace(-32768, 32767, 24).reshape(4, 3, 2).T  # (2, 3, 4), not contiguous
    export.write_series(tmp_path / "series", hu, SPACING, study_uid="1.2")
    np.testing.assert_array_equal(hu_of(read_slices(tmp_path / "series")), np.rint(hu))


def test_slices_lie_where_the_frame_says(study, slices):
    positions = np.array([ds.ImagePositionPatient for ds in slices], dtype=float)
    steps = np.diff(positions, axis=0)
    np.testing.assert_allclose(steps, np.tile([0, 0, -study.spacing_mm[0]], (len(steps), 1)), atol=1e-6)
    for ds in slices:
        assert list(ds.ImageOrientationPatient) == [1, 0, 0, 0, 1, 0]
        assert [float(v) for v in ds.PixelSpacing] == pytest.approx(study.spacing_mm[1:], abs=1e-12)
        assert float(ds.SliceThickness) == study.spacing_mm[0]
    corners = np.array([(0, 0, 0), np.array(study.volume_hu.shape) - 1])
    np.testing.assert_allclose(
        places_of(slices, corners).sum(axis=0), 0, atol=1e-5
    )  # the middle is at 0, 0, 0


@pytest.mark.parametrize("name", ["marks.nii", "marks.nii.gz"])
def test_the_first_voxel_is_the_most_cranial_foremost_and_rightmost_in_both_files(tmp_path, name):
    marks = np.zeros((4, 5, 6), np.uint8)
    marks[0, 0, 0], marks[1, 0, 0], marks[0, 1, 0], marks[0, 0, 1] = 1, 2, 3, 4
    export.write_series(tmp_path / "series", marks, SPACING, study_uid="1.2.3")
    export.write_label_map(tmp_path / name, marks, SPACING)
    slices = read_slices(tmp_path / "series")
    first = (-2.5 * 0.7, -2.0 * 0.4, 1.5 * 2.5)  # right, front, head
    steps = {1: (0, 0, 0), 2: (0, 0, -2.5), 3: (0, 0.4, 0), 4: (0.7, 0, 0)}
    points, values = nifti_voxels(tmp_path / name)
    for value, step in steps.items():
        expected = np.add(first, step)
        np.testing.assert_allclose(points[values == value], [expected], atol=1e-6)
        index = np.argwhere(hu_of(slices) == value)
        np.testing.assert_allclose(places_of(slices, index), [expected], atol=1e-9)


def test_a_phantom_is_located_where_its_exported_series_is_read(study, written, tmp_path):
    config = CohortConfig(studies=INTACT + 1, seed=SEED, pack=packing.PackConfig(slices=3, size=16))
    (tmp_path / "cohort.json").write_text(json.dumps(phantom._record(config)))
    volume, pieces = export.locate_phantom(tmp_path, study.uid)
    theirs = read_ct(written / "series")
    for name in ("spacing_mm", "origin_mm", "direction"):
        np.testing.assert_allclose(getattr(volume, name), getattr(theirs, name), atol=1e-6)
    np.testing.assert_array_equal(np.rint(volume.hu), theirs.hu)
    assert (*pieces,) == VERTEBRAE
    assert pieces["C7"].array.shape == (3, 16, 16, 6)
    middle = np.argwhere(study.label_map == 7).mean(axis=0)
    for place, (low, high) in zip(middle[1:], (pieces["C7"].rows, pieces["C7"].columns), strict=True):
        assert low < place < high


def test_labels_lie_on_the_voxels_of_the_series(study, written, slices):
    points, values = nifti_voxels(written / "labels.nii.gz")
    positions = np.array([ds.ImagePositionPatient for ds in slices], dtype=float)
    z = np.interp(-points[:, 2], -positions[:, 2], np.arange(len(positions))).round().astype(int)
    row, column = (float(length) for length in slices[0].PixelSpacing)
    x, y = (points[:, 0] - positions[0, 0]) / column, (points[:, 1] - positions[0, 1]) / row
    indices = np.stack([z, np.rint(y).astype(int), np.rint(x).astype(int)], axis=1)
    np.testing.assert_allclose(places_of(slices, indices), points, atol=1e-4)
    found = np.zeros_like(study.label_map)
    found[tuple(indices.T)] = values
    np.testing.assert_array_equal(found, study.label_map)


def test_the_label_map_is_stored_as_bytes_with_both_orientations_of_the_header(study, written):
    image = nibabel.load(written / "labels.nii.gz")
    assert image.shape == study.label_map.shape[::-1]
    assert image.get_data_dtype() == np.uint8
    assert nibabel.aff2axcodes(image.affine) == ("L", "A", "S")  # not the order of the DICOM slices
    qform, code = image.get_qform(coded=True)
    assert code == image.header["sform_code"] == 1  # of the scanner
    np.testing.assert_allclose(qform, image.affine, atol=1e-5)
    assert image.header.get_xyzt_units()[0] == "mm"


def test_c1_lies_above_c7_and_the_airway_in_front_of_the_spine(study, written, slices):
    points, values = nifti_voxels(written / "labels.nii.gz")
    heights = [points[values == number, 2].mean() for number in range(1, 8)]
    assert heights == sorted(heights, reverse=True)
    assert heights[0] - heights[-1] > 80  # mm
    hu = hu_of(slices)
    middle = slice(*(np.array(hu.shape[2]) * (0.45, 0.55)).astype(int))
    indices = np.argwhere(hu[:, 4:-4, middle] < -700) + np.array([0, 4, middle.start])
    air = places_of(slices, indices)
    bone = points[np.isin(values, (3, 4, 5, 6))]
    within = (air[:, 2] > bone[:, 2].min()) & (air[:, 2] < bone[:, 2].max())
    airway = air[within & (air[:, 1] < bone[:, 1].max())]
    assert len(airway) > 100
    assert airway[:, 1].mean() < bone[:, 1].mean() - 20  # mm


def test_the_header_is_that_of_a_ct_series(study, slices):
    assert [int(ds.InstanceNumber) for ds in slices] == list(range(1, len(study.volume_hu) + 1))
    for ds in slices:
        assert Path(ds.filename).name == f"{ds.InstanceNumber}.dcm"
        assert ds.SOPClassUID == ds.file_meta.MediaStorageSOPClassUID == pydicom.uid.CTImageStorage
        assert ds.SOPInstanceUID == ds.file_meta.MediaStorageSOPInstanceUID
        assert ds.Modality == "CT"
        assert ds.StudyInstanceUID == study.uid
        assert list(ds.ImageType) == ["DERIVED", "PRIMARY", "AXIAL"]  # no scanner measured it
        assert ds.PatientPosition == "HFS"
    assert len({ds.SOPInstanceUID for ds in slices}) == len(slices)
    for shared in ("SeriesInstanceUID", "FrameOfReferenceUID"):
        assert len({ds[shared].value for ds in slices}) == 1
    found = {e.value for ds in slices for e in ds if e.VR == "UI"}
    assert all(uid.is_valid for uid in found)  # also at most 64 characters
    assert len(found) == len(slices) + 4  # slices, their class, study, series, frame of reference


def test_the_header_of_rsna_2022_has_the_elements_of_an_original_slice_and_no_other(study, tmp_path):
    few = study.volume_hu[:5]
    export.write_series(tmp_path, few, study.spacing_mm, study_uid=study.uid, header="rsna")
    slices = read_slices(tmp_path)
    np.testing.assert_array_equal(hu_of(slices), np.rint(few))
    for ds in slices:
        assert {element.keyword for element in ds} == {*scans.RSNA_ELEMENTS}
        assert ds.file_meta.MediaStorageSOPClassUID == pydicom.uid.CTImageStorage
        assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
        assert ds.SOPInstanceUID == f"{study.uid}.1.{ds.InstanceNumber}"
        assert ds.PatientName == ds.PatientID == study.uid.rpartition(".")[2]
        assert not ds.ContentDate
        assert not ds.ContentTime
        assert re.fullmatch(r"-?\d+\.\d\d", ds["ImagePositionPatient"].value[2].original_string)
        assert (ds.BitsStored, ds.PixelRepresentation, ds.RescaleIntercept, ds.RescaleSlope) == (16, 1, 0, 1)
        assert (ds.WindowCenter, ds.WindowWidth) == (500, 2500)
    exact = (np.array(few.shape)[0] - 1) / 2 * study.spacing_mm[0] - np.arange(5) * study.spacing_mm[0]
    found = [float(ds.ImagePositionPatient[2]) for ds in slices]
    np.testing.assert_allclose(found, exact, atol=0.005001)


def test_an_unknown_header_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"header is one of full, rsna; found 'RSNA'\. Choose one"):
        export.write_series(tmp_path / "ct", np.zeros((2, 3, 3)), SPACING, study_uid="1.2", header="RSNA")
    assert not list(tmp_path.iterdir())


def test_nothing_in_the_header_says_who_or_when(slices, written):
    for ds in slices:
        for element in ds.iterall():
            if element.VR in ("DA", "TM", "DT") or "Date" in element.keyword:
                assert not element.value
            if element.VR == "PN":
                assert str(element.value) in ("", "PHANTOM")
        assert ds.PatientName == "PHANTOM"
        assert not ds.PatientID
        assert not ds.PatientBirthDate
    header = nibabel.load(written / "labels.nii.gz").header
    assert not header["descrip"].item()
    assert not header["aux_file"].item()


def test_the_same_study_gives_the_same_bytes(study, written, tmp_path):
    few = study.volume_hu[:5]
    for name in ("a", "b"):
        export.write_series(tmp_path / name, few, study.spacing_mm, study_uid=study.uid)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    export.write_series(tmp_path / "a", few, study.spacing_mm, study_uid=study.uid)  # over itself
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    export.write_label_map(tmp_path / "labels.nii.gz", study.label_map, study.spacing_mm)
    again = (tmp_path / "labels.nii.gz").read_bytes()
    assert again == (written / "labels.nii.gz").read_bytes()
    assert again[4:8] == bytes(4)  # gzip would keep the time here


def test_files_take_the_names_they_are_given(tmp_path):
    names = ["IM0001", "b.2", "a.dcm", "z"]
    hu = np.arange(4)[:, None, None] * np.ones((4, 3, 2))
    export.write_series(tmp_path, hu, SPACING, study_uid="1.2", names=names)
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    for number, name in enumerate(names, start=1):
        ds = pydicom.dcmread(tmp_path / name)
        assert (ds.InstanceNumber, ds.pixel_array[0, 0]) == (number, number - 1)


@pytest.mark.parametrize(
    ("hu", "spacing", "uid", "names", "message"),
    [
        (np.zeros((2, 3)), SPACING, "1.2", None, r"\(Z, Y, X\) .* found the shape \(2, 3\)"),
        (np.zeros((0, 3, 3)), SPACING, "1.2", None, r"a voxel or more; found the shape \(0, 3, 3\)"),
        (np.zeros((2, 3, 3)), (1, 1), "1.2", None, r"three positive lengths .* found \(1, 1\)"),
        (np.zeros((2, 3, 3)), (1, 0, 1), "1.2", None, "three positive lengths"),
        (np.zeros((2, 3, 3)), (1, np.nan, 1), "1.2", None, "three positive lengths"),
        (np.zeros((2, 3, 3)), (1, np.inf, 1), "1.2", None, "three positive lengths"),
        (np.full((2, 3, 3), 32768), SPACING, "1.2", None, r"from -32768 to 32767; found 32768 to 32768"),
        (np.full((2, 3, 3), np.nan), SPACING, "1.2", None, "found nan to nan. Clip the volume"),
        (np.zeros((2, 3, 3)), SPACING, "../up", None, r"UID of DICOM .* found '\.\./up'"),
        (np.zeros((2, 3, 3)), SPACING, "PAT001", None, "UID of DICOM .* found 'PAT001'"),
        (np.zeros((2, 3, 3)), SPACING, "1..2", None, r"UID of DICOM .* found '1\.\.2'"),
        (np.zeros((2, 3, 3)), SPACING, "1" * 61, None, "would have 65. Give a shorter one"),
        (np.zeros((2, 3, 3)), SPACING, "1.2", ["a"], r"2 different file names; found 1,"),
        (np.zeros((2, 3, 3)), SPACING, "1.2", ["a", "a"], "found 2, 1 of them different"),
        (np.zeros((2, 3, 3)), SPACING, "1.2", ["../a", "b/"], r"no file names: '\.\./a', 'b/'\. Correct"),
    ],
)
def test_what_cannot_be_a_series_is_refused_before_anything_is_written(
    tmp_path, hu, spacing, uid, names, message
):
    with pytest.raises(ValueError, match=message):
        export.write_series(tmp_path / "series", hu, spacing, study_uid=uid, names=names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [-1, 256, 1.5, np.nan])
def test_values_that_are_no_labels_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match="whole numbers from 0 to 255"):
        export.write_label_map(tmp_path / "labels.nii", np.full((2, 2, 2), value), SPACING)
    assert not list(tmp_path.iterdir())


def test_a_label_map_needs_a_grid_and_the_name_of_a_nifti_file(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.nii or \.nii\.gz; found 'labels\.mha'"):
        export.write_label_map(tmp_path / "labels.mha", np.zeros((2, 2, 2), np.uint8), SPACING)
    with pytest.raises(ValueError, match="found the shape"):
        export.write_label_map(tmp_path / "labels.nii", np.zeros((2, 2), np.uint8), SPACING)
    with pytest.raises(ValueError, match="three positive lengths"):
        export.write_label_map(tmp_path / "labels.nii", np.zeros((2, 2, 2), np.uint8), (1, -1, 1))


def test_a_file_that_cannot_be_written_is_named_with_what_to_do(tmp_path):
    for name in ("2.dcm", "labels.nii"):
        (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=r"2\.dcm was not written .* Check the right to write") as caught:
        export.write_series(tmp_path, np.zeros((2, 3, 3)), SPACING, study_uid="1.2")
    assert "0x" not in str(caught.value)
    with pytest.raises(OSError, match=r"labels\.nii was not written"):
        export.write_label_map(tmp_path / "labels.nii", np.zeros((2, 3, 3)), SPACING)


@pytest.mark.parametrize("library", ["SimpleITK", "pydicom"])
def test_without_a_library_one_sentence_says_what_to_install(tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    grid = (np.zeros((2, 3, 3)), SPACING)
    write = {
        "SimpleITK": lambda: export.write_label_map(tmp_path / "labels.nii", *grid),
        "pydicom": lambda: export.write_series(tmp_path / "ct", *grid, study_uid="1.2"),
    }
    with pytest.raises(ImportError, match=library):
        write[library]()
    assert not list(tmp_path.iterdir())


def test_an_exported_cohort_has_the_layout_of_rsna_2022_and_no_more(exported):
    expected = {"train.csv", "train_bounding_boxes.csv"}
    for index in (BROKEN, INTACT):
        expected.add(f"segmentations/{rendered(index).uid}.nii.gz")
        count = len(rendered(index).volume_hu)
        expected |= {f"train_images/{rendered(index).uid}/{n}.dcm" for n in range(1, count + 1)}
    assert set(contents(exported)) == expected
    assert [path.name for path in exported.parent.iterdir()] == ["ct"]
    table = labels.read_labels(exported / "train.csv")
    assert table[UID].tolist() == uids(BROKEN, INTACT)
    for index, row in zip((BROKEN, INTACT), table[list(VERTEBRAE)].to_dict("records"), strict=True):
        assert row == rendered(index).labels
        series = read_slices(exported / "train_images" / rendered(index).uid)
        np.testing.assert_array_equal(hu_of(series), np.rint(rendered(index).volume_hu))


def test_boxes_are_on_the_slice_that_shows_the_fracture(exported):
    boxes = labels.read_boxes(exported / "train_bounding_boxes.csv")
    assert set(boxes[UID]) == set(uids(BROKEN))
    slices = read_slices(exported / "train_images" / rendered(BROKEN).uid)
    by_number = {int(ds.InstanceNumber): ds for ds in slices}
    truth = rendered(BROKEN).fracture_map
    found = np.zeros(truth.shape, bool)
    for box in boxes.itertuples():
        # which slice of the volume that file shows, by its pixels
        pixels = by_number[box.slice_number].pixel_array
        same = [
            z for z, plane in enumerate(rendered(BROKEN).volume_hu) if np.array_equal(np.rint(plane), pixels)
        ]
        assert len(same) == 1
        x, y = int(box.x), int(box.y)
        patch = (same[0], slice(y, y + int(box.height)), slice(x, x + int(box.width)))
        assert np.count_nonzero(truth[patch]) >= phantom.MIN_FRACTURE_VOXELS
        found[patch] = True
    large = [
        np.count_nonzero(plane == number) >= phantom.MIN_FRACTURE_VOXELS
        for plane in truth
        for number in np.unique(plane[plane > 0])
    ]
    assert len(boxes) == sum(large)


def test_what_is_packed_from_the_files_is_what_is_packed_from_the_study(study, written, slices):
    image = nibabel.as_closest_canonical(nibabel.load(written / "labels.nii.gz"))
    label_map = np.asarray(image.dataobj)[::-1, ::-1, ::-1].transpose(2, 1, 0)  # RAS to the frame
    spacing = (float(slices[0].SliceThickness), *(float(v) for v in slices[0].PixelSpacing))
    config = packing.PackConfig(slices=5, size=32)
    for vertebra in ("C1", "C4", "C7"):
        ours = packing.pack_vertebra(hu_of(slices), label_map, spacing, vertebra, config)
        theirs = packing.pack_vertebra(study.volume_hu, study.label_map, study.spacing_mm, vertebra, config)
        difference = np.abs(ours.array.astype(int) - theirs.array)
        assert difference.max() <= 1  # HU are rounded
        assert not difference[..., -1].any()
        assert ours.slice_indices.tolist() == theirs.slice_indices.tolist()


def test_studies_exported_before_are_replaced_and_others_join_them(cohort, exported, tmp_path):
    folder = tmp_path / "ct"
    export.export_cohort(cohort, folder, uids(INTACT))
    assert labels.read_labels(folder / "train.csv")[UID].tolist() == uids(INTACT)
    assert labels.read_boxes(folder / "train_bounding_boxes.csv").empty
    slice_1 = folder / "train_images" / rendered(INTACT).uid / "1.dcm"
    slice_1.write_bytes(b"damaged")
    slice_1.with_name("9999.dcm").write_bytes(b"of a longer volume")
    (folder / ".export-killed").mkdir()
    (folder / ".export-killed" / "1.dcm").write_bytes(b"unfinished")
    export.export_cohort(cohort, folder, uids(BROKEN, INTACT))
    assert contents(folder) == contents(exported)


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("packed/1.2.3_1.npy", "'packed'"),
        ("notes.txt", "'notes.txt'"),
        ("train_images/1.2.3/1.dcm", "'train_images/1.2.3'"),
        ("segmentations/1.2.3.nii", "'segmentations/1.2.3.nii'"),
    ],
)
def test_a_folder_that_holds_something_else_is_never_touched(cohort, tmp_path, name, listed):
    precious = tmp_path / "ct" / name
    precious.parent.mkdir(parents=True)
    precious.write_text("precious")
    with pytest.raises(FileExistsError, match=rf"holds more than these 1 studies: {listed}\. Choose"):
        export.export_cohort(cohort, tmp_path / "ct", uids(BROKEN))
    assert contents(tmp_path) == {f"ct/{name}": b"precious"}


def test_tables_of_other_studies_and_files_among_the_slices_are_never_replaced(cohort, exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "ct"))
    before = contents(folder)
    with pytest.raises(FileExistsError) as caught:  # fewer studies than stand there
        export.export_cohort(cohort, folder, uids(BROKEN))
    other = uids(INTACT)[0]
    for stranger in (f"train_images/{other}", f"segmentations/{other}.nii.gz", f"{other} in train.csv"):
        assert repr(stranger) in str(caught.value)
    assert contents(folder) == before
    (folder / "train_images" / other / "reads.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=rf"'{other}/reads\.txt'"):
        export.export_cohort(cohort, folder, uids(BROKEN, INTACT))
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError, match=r"is a file\. Choose another folder"):
        export.export_cohort(cohort, tmp_path / "file", uids(BROKEN))


def test_a_cohort_is_not_exported_into_its_own_folder(cohort):
    before = contents(cohort)
    with pytest.raises(FileExistsError, match=r"cohort\.json"):
        export.export_cohort(cohort, cohort, uids(BROKEN, INTACT))
    assert contents(cohort) == before


def test_a_study_that_is_not_complete_takes_no_place(cohort, exported, tmp_path, monkeypatch):
    def fails(*_: object) -> None:
        raise OSError("disk full")

    folder = Path(shutil.copytree(exported, tmp_path / "ct"))
    monkeypatch.setattr(export, "write_label_map", fails)
    for place, before in ((folder, contents(exported)), (tmp_path / "new", {})):
        with pytest.raises(OSError, match="disk full"):
            export.export_cohort(cohort, place, uids(BROKEN, INTACT))
        assert contents(place) == before
        assert not list(place.glob(".export-*"))


def test_studies_that_the_cohort_does_not_have_are_all_named(cohort, tmp_path):
    known = uids(BROKEN)[0]
    with pytest.raises(ValueError, match=r"not in the table \(2\): '1\.2', '1\.3'"):
        export.export_cohort(cohort, tmp_path / "ct", ["1.2", known, "1.3"])
    with pytest.raises(ValueError, match=f"more than once.*{known}"):
        export.export_cohort(cohort, tmp_path / "ct", [known, known])
    with pytest.raises(ValueError, match="The list of studies has no rows"):
        export.export_cohort(cohort, tmp_path / "ct", [])
    assert not list(tmp_path.iterdir())


def test_only_a_phantom_cohort_can_be_exported(cohort, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "study_of", phantom.study_of)
    with pytest.raises(FileNotFoundError, match=r"train\.csv"):
        export.export_cohort(tmp_path / "none", tmp_path / "ct", ["1.2"])
    real = tmp_path / "real"
    real.mkdir()
    for name in ("train.csv", "train_bounding_boxes.csv"):
        (real / name).write_bytes((cohort / name).read_bytes())
    with pytest.raises(FileNotFoundError, match="no phantom cohort"):
        export.export_cohort(real, tmp_path / "ct", uids(BROKEN))
    assert not (tmp_path / "ct").exists()


def test_writing_leaves_the_locale_as_it_was(tmp_path):
    before = locale.setlocale(locale.LC_ALL), locale.getencoding()
    export.write_series(tmp_path / "ct", np.zeros((2, 3, 3)), (1, 1, 1), study_uid="1.2")
    export.write_label_map(tmp_path / "labels.nii", np.zeros((2, 3, 3), np.uint8), (1, 1, 1))
    assert (locale.setlocale(locale.LC_ALL), locale.getencoding()) == before
