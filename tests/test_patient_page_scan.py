"""What is cut from a CT for a page; tubes and blocks whose places are known."""

from types import SimpleNamespace

import ct_cohort
import numpy as np
import pandas as pd
import pytest

from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.packing.cohort import pack_cohort
from cspine_helpers.patient_page.packed_view import PackedView
from cspine_helpers.patient_page.scan import LESION_COLUMNS, Scan, lesions_of, read_scan

SHAPE, SPACING = (70, 30, 60), (2.0, 1.0, 0.5)
MIDDLES = {name: (5 + 10 * n, 20 + 3 * n) for n, name in enumerate(VERTEBRAE)}  # z and x


def curved(lesions=None):
    """A bright tube that leans to the patient's left by 3 voxels every 10 slices, vertebrae around it."""
    volume, labels = np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.uint8)
    z = np.arange(SHAPE[0])
    x = np.interp(z, *np.transpose([*MIDDLES.values()]))
    across = np.arange(SHAPE[2])
    volume[:, 15, :] = 1000 * np.clip(
        1 - np.abs(across - x[:, None]), 0, 1
    )  # a line, as interpolation has it
    for number, (middle, at) in enumerate(MIDDLES.values(), start=1):
        labels[middle - 3 : middle + 4, 8:22, at - 4 : at + 5] = number
    return Scan(volume, labels, SPACING, lesions)


@pytest.fixture(scope="module")
def scan():
    return curved()


def test_the_sheet_follows_a_curve_that_is_known(scan):
    z = np.arange(SHAPE[0])
    np.testing.assert_allclose(scan.canal(), np.interp(z, *np.transpose([*MIDDLES.values()])))
    plane = scan.side_view().plane
    whole = 1000 * (
        np.clip(1 - (scan.canal() % 1), 0, 1) ** 2 + (scan.canal() % 1) ** 2
    )  # of a line, resampled
    np.testing.assert_allclose(plane[:, 15], whole, atol=0.1)
    assert plane[:, 15].min() > 499  # straightened: never lost
    assert (scan.volume_hu[:, 15, 29] > 0).mean() < 0.2  # a straight cut loses it
    assert plane[:, :15].max() == plane[:, 16:].max() == 0


def test_heights_are_those_of_the_front_parts(scan):
    side = scan.side_view()
    assert side.height_mm == {name: 2.0 * z for name, (z, _) in MIDDLES.items()}
    assert set(side.name_mm.values()) == {(8 - 2) * 1.0}
    assert side.spacing_mm == (2.0, 1.0)


def test_an_axial_slice_has_the_cts_own_voxels_square_in_mm(scan):
    z, x = MIDDLES["C3"]
    cut = scan.axial("C3", z, "C3", truth=False)
    rows, columns = cut.plane.shape
    assert (rows, columns) == (26, 52)  # 14 mm and 6 mm on either side, in voxels of 1 and 0.5 mm
    assert (cut.aspect, cut.pixel_mm) == (2.0, 0.5)
    first_row, first_column = 15 - 26 // 2, round((2 * x + 1 - 52) / 2)
    inside = scan.volume_hu[z, first_row : first_row + rows, max(first_column, 0) : first_column + columns]
    np.testing.assert_array_equal(cut.plane[:, max(-first_column, 0) :], inside)
    assert (cut.plane[:, : max(-first_column, 0)] == -1024).all()
    assert cut.mask.sum() == 14 * 9


def test_lesions_lie_where_the_bone_is_fractured():
    broken = np.zeros(SHAPE, np.uint8)
    z, x = MIDDLES["C5"]
    broken[z, 10:13, x - 1 : x + 2] = 5
    broken[z + 1, 10:12, x] = 5
    lesions = lesions_of(broken)
    assert lesions.to_numpy().tolist() == [["C5", z, x - 1, 10, 3, 3], ["C5", z + 1, x, 10, 1, 2]]
    scan = curved(lesions)
    (box,) = scan.axial("C5", z, "", truth=True).boxes
    cut = scan.axial("C5", z, "", truth=True)
    start = round((2 * x + 1 - cut.plane.shape[1]) / 2)
    assert box == (x - 1 - start, 10 - round((30 - cut.plane.shape[0]) / 2), 3, 3)
    assert scan.axial("C5", z, "", truth=False).boxes == ()
    assert scan.axial("C5", z - 1, "", truth=True).boxes == ()
    (left, top, width, height) = scan.side_view().lesions_mm[0]
    assert (left, top, width, height) == (9.5 * 1.0, (z - 0.5) * 2.0, 3.0, 4.0)


def test_a_scan_may_end_above_a_vertebra(scan):
    short = scan.above("C7")
    assert short.there == list(VERTEBRAE[:6])
    assert len(short.volume_hu) == MIDDLES["C6"][0] + 4
    with pytest.raises(ValueError, match="Nothing is left above C1"):
        scan.above("C1")


def test_what_is_no_scan_is_refused():
    labels = np.zeros((3, 4, 5), int)
    with pytest.raises(ValueError, match="must have one shape"):
        Scan(np.zeros((3, 4, 4)), labels, SPACING)
    with pytest.raises(ValueError, match="marks none of C1"):
        Scan(np.zeros(labels.shape), labels, SPACING)


def test_a_phantoms_ct_is_rendered_again_and_without_any_ct_it_is_said(tmp_path, scan):
    broken = np.zeros(SHAPE, np.uint8)
    study = SimpleNamespace(
        volume_hu=scan.volume_hu, label_map=scan.label_map, fracture_map=broken, spacing_mm=SPACING
    )
    asked = []
    (tmp_path / "cohort.json").write_text("{}")
    found = read_scan(tmp_path, "1.2.3", render=lambda *which: asked.append(which) or study)
    assert asked == [(tmp_path, "1.2.3")]
    assert found.lesions.columns.tolist() == list(LESION_COLUMNS)
    assert found.volume_hu is scan.volume_hu
    with pytest.raises(FileNotFoundError, match=r"No CT of 1\.2\.3 in .*a page shows the packed slices"):
        read_scan(tmp_path, "1.2.3")


@pytest.mark.slow
def test_a_ct_and_its_boxes_are_read_from_disk_as_they_were_packed(tmp_path):
    study = ct_cohort.scanned(0)
    ct_cohort.write_cohort(tmp_path)
    pack_cohort(tmp_path, config=ct_cohort.CONFIG, workers=1, only=[study.uid])
    scan = read_scan(tmp_path, study.uid)
    np.testing.assert_array_equal(scan.volume_hu, study.volume_hu)
    np.testing.assert_array_equal(scan.label_map, study.label_map)
    assert scan.spacing_mm == pytest.approx(study.spacing_mm, abs=1e-4)
    known = lesions_of(study.fracture_map).set_index(["vertebra", "z"])
    assert set(scan.lesions["vertebra"]) == set(ct_cohort.BROKEN[0])
    for box in scan.lesions.itertuples():  # readers' boxes lie on other vertebrae's bone, too, within a pixel
        wanted = known.loc[(box.vertebra, box.z)]
        assert [box.x, box.y, box.width, box.height] == pytest.approx(
            wanted[["x", "y", "width", "height"]].to_list(), abs=1e-6
        )


def test_packed_vertebrae_are_set_at_their_heights():
    array = np.zeros((5, 20, 20, 6), np.uint8)
    array[:, 6:14, 6:14, 5] = 255
    array[..., :5] = 128
    row = {"z_first_mm": 30.0, "z_last_mm": 50.0, "pixel_mm": 2.0}
    manifest = pd.DataFrame(row | {"window_low_hu": -500.0, "window_high_hu": 1300.0}, index=["C3"])
    view = PackedView({"C3": array}, manifest)
    np.testing.assert_allclose(view.heights_mm("C3"), [30, 35, 40, 45, 50])
    side = view.side_view()
    rows, columns = np.nonzero(side.labels == 3)
    assert (rows.min() * side.spacing_mm[0], rows.max() * side.spacing_mm[0]) == (30, 50)
    assert np.ptp(columns) * side.spacing_mm[1] == pytest.approx(8 * 2.0, abs=0.6)
    assert side.plane[side.labels == 3] == pytest.approx(-500 + 128 * 1800 / 255)
    assert side.height_mm == {"C3": 40.0}
    unknown = PackedView({"C1": array, "C3": array}, None)
    assert np.diff([unknown.heights_mm(name).mean() for name in ("C1", "C3")])[0] == 2 * 17.0
    assert unknown.side_view().labels.max() == 3
