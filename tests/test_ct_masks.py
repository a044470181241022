import nibabel
import numpy as np
import pytest
import scans
from scans import (
    FRAME,
    affine_of,
    assert_private,
    excerpt,
    landmarks,
    phantom,
    positions,
    refusal,
    resampled,
    rotation,
    save_nifti,
    turned,
    write_nifti,
)

from cspine_helpers.ct.masks import SCHEMES, find_mask, read_label_map, read_scheme
from cspine_helpers.ct.vertebrae import find_vertebrae
from cspine_helpers.ct.volume import Volume, bounding_box
from cspine_helpers.labels import VERTEBRAE

PRESENT = (4, 5, 6)


def volume_of(scan: scans.Scan, *, direction: np.ndarray = FRAME) -> Volume:
    """The scan as `read_ct` returns it, without reading."""
    return Volume(scan.hu, scan.spacing_mm, np.array(scans.ORIGIN), direction)


def mask_on(spacing_mm, *, direction=FRAME, shift_mm=(0.0, 0.0, 0.0), margin_mm=6.0):
    """The excerpt's labels as another grid sees them, and that grid's affine."""
    scan = excerpt()
    straight = affine_of(scan.spacing_mm)
    middle = positions(straight, (np.array(scan.labels.shape) - 1) / 2) + shift_mm
    extent = np.array(scan.labels.shape) * scan.spacing_mm + 2 * margin_mm
    shape = tuple(np.ceil(extent / spacing_mm).astype(int))
    origin = middle - direction @ ((np.array(shape) - 1) / 2 * np.array(spacing_mm))
    other = affine_of(spacing_mm, direction=direction, origin_mm=origin)
    return resampled(scan.labels, straight, other, shape), other


def boxes_mm(labels: np.ndarray, spacing_mm) -> dict[int, np.ndarray]:
    return {value: np.array(bounding_box(labels, value)) * np.array(spacing_mm)[:, None] for value in PRESENT}


# Grids.


@pytest.mark.parametrize("orientation", ["IPL", "RAS", "LPS", "PIR", "SLA"])
def test_a_mask_on_the_grid_of_its_ct_is_copied_in_any_order_of_axes(tmp_path, orientation):
    scan = excerpt()
    path = write_nifti(tmp_path / "mask.nii.gz", scan.labels, scan.spacing_mm, orientation=orientation)
    found = read_label_map(path, volume_of(scan))
    np.testing.assert_array_equal(found.array, scan.labels)
    assert found.array.dtype == np.uint8
    assert found.field == tuple((0, n) for n in scan.labels.shape)


@pytest.mark.parametrize("orientation", ["IPL", "LAS"])
def test_a_mask_of_a_part_of_the_ct_lies_where_its_header_says(tmp_path, orientation):
    scan = excerpt()
    part = (slice(5, 48), slice(11, 80), slice(0, 70))
    origin = positions(affine_of(scan.spacing_mm), np.array([s.start for s in part]))
    path = write_nifti(
        tmp_path / "mask.nii", scan.labels[part], scan.spacing_mm, origin_mm=origin, orientation=orientation
    )
    found = read_label_map(path, volume_of(scan))
    expected = np.zeros_like(scan.labels)
    expected[part] = scan.labels[part]
    np.testing.assert_array_equal(found.array, expected)
    assert found.field == ((5, 48), (11, 80), (0, 70))


def test_a_mask_that_reaches_past_the_ct_is_cut_at_its_edges(tmp_path):
    """The CT is the middle of what the mask covers."""
    scan = excerpt()
    part = (slice(4, 50), slice(20, 93), slice(9, 81))
    origin = positions(affine_of(scan.spacing_mm), np.array([s.start for s in part]))
    volume = Volume(scan.hu[part], scan.spacing_mm, origin, FRAME)
    path = write_nifti(tmp_path / "mask.nii", scan.labels, scan.spacing_mm)
    found = read_label_map(path, volume)
    np.testing.assert_array_equal(found.array, scan.labels[part])
    assert found.field == tuple((0, s.stop - s.start) for s in part)


@pytest.mark.parametrize("orientation", ["RAS", "PIR"])
@pytest.mark.parametrize(
    ("spacing", "shift", "angles"),
    [
        ((1.5, 1.5, 1.5), (0.21, -0.37, 0.13), (0, 0, 0)),
        ((3.0, 2.0, 1.0), (0.4, 0.3, -0.7), (0, 0, 0)),
        ((0.5, 0.4, 0.9), (0.11, 0.05, 0.02), (0, 0, 0)),
        ((2.0, 1.5, 1.1), (-0.3, 0.2, 0.1), (8, -15, 22)),
        ((1.3, 1.4, 1.2), (20.13, -9.07, 11.31), (0, 0, 0)),
    ],
    ids=["coarser", "anisotropic", "finer", "oblique", "shifted"],
)
def test_a_mask_on_another_grid_agrees_within_one_of_its_voxels(
    tmp_path, spacing, shift, angles, orientation
):
    scan, direction = excerpt(), rotation(*angles) @ FRAME
    labels, other = mask_on(spacing, direction=direction, shift_mm=shift)
    stored, affine = turned(labels, other, orientation)
    found = read_label_map(save_nifti(tmp_path / "mask.nii.gz", stored, affine), volume_of(scan)).array
    expected = resampled(labels, other, affine_of(scan.spacing_mm), scan.labels.shape)
    assert (found != expected).sum() < 1e-4 * np.count_nonzero(expected)  # but for ties and float32 headers
    reach = np.abs(direction) @ np.array(spacing)
    reach = np.abs(FRAME.T) @ reach + 0.5 * np.array(scan.spacing_mm)
    if np.abs(shift).max() < 1:
        ours, theirs = boxes_mm(found, scan.spacing_mm), boxes_mm(scan.labels, scan.spacing_mm)
        for value in PRESENT:
            assert (np.abs(ours[value] - theirs[value]) <= reach[:, None]).all(), value


def test_the_field_is_the_part_of_the_ct_that_the_mask_covers(tmp_path):
    """Voxels of the CT whose middles lie inside the mask's grid, edge to edge."""
    scan = excerpt()
    affine = affine_of(scan.spacing_mm)
    labels, other = mask_on((2.0, 1.5, 1.1), shift_mm=(14.0, -9.0, 12.0), margin_mm=-8.0)
    found = read_label_map(save_nifti(tmp_path / "mask.nii", labels, other), volume_of(scan))
    back = np.linalg.inv(other)
    for axis in range(3):
        line = np.zeros((scan.labels.shape[axis], 3))
        line[:, axis] = np.arange(len(line))
        along = positions(back, positions(affine, line))[:, axis]
        covered = np.flatnonzero((along > -0.5) & (along < labels.shape[axis] - 0.5))
        assert found.field[axis] == (covered[0], covered[-1] + 1)


def test_a_mask_half_a_voxel_from_the_grid_is_not_called_the_same(tmp_path):
    scan = excerpt()
    origin = positions(affine_of(scan.spacing_mm), np.array([0.3, 0, 0]))
    path = write_nifti(tmp_path / "mask.nii", scan.labels, scan.spacing_mm, origin_mm=origin)
    found = read_label_map(path, volume_of(scan)).array
    np.testing.assert_array_equal(found, scan.labels)  # still the nearest voxel
    origin = positions(affine_of(scan.spacing_mm), np.array([0.7, 0, 0]))
    path = write_nifti(tmp_path / "mask.nii", scan.labels, scan.spacing_mm, origin_mm=origin)
    found = read_label_map(path, volume_of(scan)).array
    np.testing.assert_array_equal(found[1:], scan.labels[:-1])


def test_a_mask_on_a_far_turned_grid_is_placed(tmp_path):
    """Such a mask comes of a volume reformatted along another axis."""
    direction = rotation(0, 0, 43) @ FRAME
    labels, other = mask_on((1.2, 0.9, 0.9), direction=direction, margin_mm=14.0)
    path = save_nifti(tmp_path / "mask.nii", labels, other)
    found = read_label_map(path, volume_of(excerpt())).array
    np.testing.assert_array_equal(
        found > 0, resampled(labels, other, affine_of(excerpt().spacing_mm), found.shape) > 0
    )


# One file a vertebra.


@pytest.mark.parametrize("name", ["vertebrae_{}.nii.gz", "{}.nii"])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_a_folder_of_one_mask_a_vertebra_is_one_label_map(tmp_path, name, kind):
    scan = excerpt()
    for value in PRESENT:
        path = tmp_path / name.format(VERTEBRAE[value - 1])
        write_nifti(path, (scan.labels == value).astype(kind), scan.spacing_mm, orientation="LAS")
    write_nifti(tmp_path / "vertebrae_T1.nii.gz", np.ones_like(scan.labels), scan.spacing_mm)
    write_nifti(tmp_path / "liver.nii.gz", np.ones_like(scan.labels), scan.spacing_mm)
    found = read_label_map(tmp_path, volume_of(scan))
    np.testing.assert_array_equal(found.array, scan.labels)


def test_where_masks_of_a_folder_overlap_the_upper_vertebra_keeps_the_voxel(tmp_path):
    scan = excerpt()
    grown = (scan.labels == 5) | (scan.labels == 4)
    write_nifti(tmp_path / "C4.nii", (scan.labels == 4).astype(np.uint8), scan.spacing_mm)
    write_nifti(tmp_path / "C5.nii", grown.astype(np.uint8), scan.spacing_mm)
    found = read_label_map(tmp_path, volume_of(scan)).array
    np.testing.assert_array_equal(found, np.where(scan.labels == 6, 0, scan.labels))


def test_empty_masks_of_a_folder_are_vertebrae_that_are_not_there(tmp_path):
    """TotalSegmentator writes a file for every structure, found or not."""
    scan = excerpt()
    for value in range(1, 8):
        path = tmp_path / f"vertebrae_{VERTEBRAE[value - 1]}.nii.gz"
        write_nifti(path, (scan.labels == value).astype(np.uint8), scan.spacing_mm)
    found = read_label_map(tmp_path, volume_of(scan)).array
    np.testing.assert_array_equal(found, scan.labels)


def test_in_a_mask_of_shares_more_than_half_is_the_vertebra(tmp_path):
    """As segmenters write probabilities, or a resampler its interpolation."""
    scan = excerpt()
    shares = np.zeros(scan.labels.shape, np.float32)
    shares[10, 10], shares[11, 10], shares[12, 10], shares[13, 10] = 0.49, 0.5, 0.51, 1
    write_nifti(tmp_path / "C4.nii.gz", shares, scan.spacing_mm)
    found = read_label_map(tmp_path, volume_of(scan)).array
    np.testing.assert_array_equal(found, np.where(shares > 0.505, 4, 0))


def test_a_folder_without_masks_says_what_they_are_called(tmp_path):
    write_nifti(tmp_path / "liver.nii.gz", excerpt().labels, excerpt().spacing_mm)
    parts = (tmp_path.name, "vertebrae_C1.nii.gz")
    refusal(lambda: read_label_map(tmp_path, volume_of(excerpt())), *parts, error=FileNotFoundError)


# Labels.


def test_schemes_say_what_labels_mean(tmp_path):
    """TotalSegmentator counts from the sacrum upwards; its other organs and the thorax are left out."""
    scan = excerpt()
    expected = np.where(np.isin(scan.labels, PRESENT), scan.labels, 0)
    theirs = np.where(expected > 0, 51 - expected.astype(int), 0)
    theirs[0, 0], theirs[-1, 0], theirs[0, 1] = 5, 43, 117
    path = write_nifti(tmp_path / "total.nii.gz", theirs.astype(np.uint8), scan.spacing_mm)
    found = read_label_map(path, volume_of(scan), scheme="totalsegmentator")
    np.testing.assert_array_equal(found.array, expected)
    rsna = scan.labels.copy()
    rsna[-1, :5] = 8  # T1
    path = write_nifti(tmp_path / "rsna.nii", rsna, scan.spacing_mm)
    np.testing.assert_array_equal(read_label_map(path, volume_of(scan), scheme="rsna").array, expected)
    own = write_nifti(
        tmp_path / "own.nii", np.where(expected > 0, expected.astype(np.int16) + 1000, 0), scan.spacing_mm
    )
    scheme = {1000 + value: VERTEBRAE[value - 1] for value in range(1, 8)}
    np.testing.assert_array_equal(read_label_map(own, volume_of(scan), scheme=scheme).array, expected)


def test_named_schemes_hold_the_seven_vertebrae_from_c1_downwards():
    assert [SCHEMES["rsna"][n] for n in range(1, 8)] == list(VERTEBRAE)
    assert [SCHEMES["totalsegmentator"][n] for n in range(50, 43, -1)] == list(VERTEBRAE)
    assert SCHEMES["totalsegmentator"][43] == SCHEMES["rsna"][8] == "T1"


def of_version_1(labels: np.ndarray, *others: int) -> np.ndarray:
    """TotalSegmentator 1's numbers of C1 … C7; beside them 42 oesophagus, 43 trachea, 44 heart, 50 brain."""
    theirs = np.where(labels > 0, 42 - labels.astype(int), 0)
    height = len(labels)
    column = (slice(None), slice(2, 30), slice(2, 30))
    for number in others:
        part = slice(0, 12) if number == 50 else slice(height - 30, height)
        theirs[part][column][theirs[part][column] == 0] = number
    return theirs.astype(np.uint8)


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "PIR"])
@pytest.mark.parametrize("organs", [(50,), (43,), (42, 50), (44,), (44, 50)])
def test_masks_of_totalsegmentator_1_are_refused_by_their_content(tmp_path, organs, orientation):
    """Its brain would be C1, its heart C7."""
    scan = phantom()
    labels = of_version_1(scan.labels, *organs)
    path = write_nifti(tmp_path / "total.nii.gz", labels, scan.spacing_mm, orientation=orientation)
    parts = ("total.nii.gz", "TotalSegmentator 1", "35 to 41", "--labels")
    if {44, 50} & {*organs}:
        refusal(lambda: read_label_map(path, volume_of(scan), scheme="totalsegmentator"), *parts)
    else:
        refusal(
            lambda: read_label_map(path, volume_of(scan), scheme="totalsegmentator"), "none of C1", *parts
        )
    meaning = dict.fromkeys(range(1, 105), "other") | dict(zip(range(41, 34, -1), VERTEBRAE, strict=True))
    found = read_label_map(path, volume_of(scan), scheme=meaning).array
    np.testing.assert_array_equal(found, scan.labels)


@pytest.mark.parametrize("levels", [range(1, 8), range(3, 7)], ids=["whole", "cropped"])
@pytest.mark.parametrize("speck", [None, 44, 50])
def test_of_a_neck_without_heart_and_brain_version_1_is_refused_with_the_remedy(tmp_path, levels, speck):
    scan = phantom()
    organs = () if speck else (42, 43)  # oesophagus and trachea, below the neck here, would betray it
    labels = of_version_1(np.where(np.isin(scan.labels, levels), scan.labels, 0), *organs)
    if speck:
        labels[0 if speck == 50 else -1, :6, :6] = speck
    path = write_nifti(tmp_path / "total.nii.gz", labels, scan.spacing_mm)
    parts = ("total.nii.gz", "TotalSegmentator 1", "35 to 41", "version 2", "--labels, with 41 = C1")
    refusal(lambda: read_label_map(path, volume_of(scan), scheme="totalsegmentator"), *parts)


def test_a_brain_alone_is_no_c1(tmp_path):
    """Of a head, with nothing of the spine below it."""
    labels = np.full(phantom().labels.shape, 50, np.uint8)
    path = write_nifti(tmp_path / "total.nii.gz", labels, (1.5, 1.0, 1.0))
    volume = Volume(phantom().hu, (1.5, 1.0, 1.0), np.array(scans.ORIGIN), FRAME)
    refusal(lambda: read_label_map(path, volume, scheme="totalsegmentator"), "TotalSegmentator 1")


@pytest.mark.parametrize("gone", [(), (2,), (1,), (7,), (1, 2, 3), (2, 3, 4, 5, 6)])
def test_masks_of_totalsegmentator_2_are_read_with_thorax_specks_and_missing_levels(tmp_path, gone):
    scan = phantom()
    expected = np.where(np.isin(scan.labels, gone), 0, scan.labels)
    labels = np.where(expected > 0, 51 - expected.astype(int), 0).astype(np.uint8)
    low = np.flatnonzero((labels > 0).any((1, 2)))[-1]
    labels[low - 3 :, :20, :20], labels[low + 1 :, 20:40, :20] = 43, 41  # T1, T3
    labels[2, :3, :3] = 40  # a speck of T4 above the neck
    path = write_nifti(tmp_path / "total.nii.gz", labels, scan.spacing_mm, orientation="LAS")
    found = read_label_map(path, volume_of(scan), scheme="totalsegmentator").array
    np.testing.assert_array_equal(found, expected)


def test_a_table_of_labels_is_json_from_numbers_to_names(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text('{"41": "C1", "40": "vertebrae_C2", "44": "heart"}', encoding="utf-8")
    assert read_scheme(path) == {41: "C1", 40: "C2", 44: "heart"}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "is not JSON"),
        ("{'41': 'C1'}", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "does not map whole numbers to names"),
        ("[41]", "does not map whole numbers to names"),
        ('{"C1": 41}', "does not map whole numbers to names"),
        ('{"41": 1}', "does not map whole numbers to names"),
        ('{"-1": "C1"}', "does not map whole numbers to names"),
        ('{"41": "T1"}', "C1 … C7 among them"),
        ('{"0": "C1"}', "labels above 0"),
    ],
    ids=range(10),
)
def test_a_table_of_labels_that_is_none_is_refused(tmp_path, text, part):
    path = tmp_path / "labels.json"
    path.write_text(text, encoding="utf-8")
    refusal(lambda: read_scheme(path), "labels.json", part)


def test_a_missing_table_of_labels_is_said(tmp_path):
    refusal(lambda: read_scheme(tmp_path / "no.json"), "no.json", error=FileNotFoundError)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.uint16, np.float32, np.float64])
def test_labels_of_every_type_are_read(tmp_path, kind):
    scan = excerpt()
    path = write_nifti(tmp_path / "mask.nii", scan.labels.astype(kind), scan.spacing_mm)
    np.testing.assert_array_equal(read_label_map(path, volume_of(scan)).array, scan.labels)


def test_unknown_labels_are_refused_and_named(tmp_path):
    scan = excerpt()
    labels = scan.labels.copy()
    labels[:3, :5], labels[3:5, :5] = 77, 99
    path = write_nifti(tmp_path / "mask.nii.gz", labels, scan.spacing_mm)
    refusal(lambda: read_label_map(path, volume_of(scan)), "mask.nii.gz", "unknown", "77", "99", "scheme")


def test_a_mask_read_with_the_wrong_scheme_is_refused(tmp_path):
    """TotalSegmentator's labels as RSNA's are unknown ones; its organs 1–7 alone would pass for a neck."""
    scan = excerpt()
    theirs = np.where(scan.labels > 0, 51 - scan.labels.astype(int), 0).astype(np.uint8)
    path = write_nifti(tmp_path / "total.nii.gz", theirs, scan.spacing_mm)
    refusal(
        lambda: read_label_map(path, volume_of(scan)), "total.nii.gz", "unknown", "45", "totalsegmentator"
    )
    path = write_nifti(tmp_path / "rsna.nii.gz", scan.labels, scan.spacing_mm)
    parts = ("rsna.nii.gz", "none of C1", "scheme")
    refusal(lambda: read_label_map(path, volume_of(scan), scheme="totalsegmentator"), *parts)


@pytest.mark.parametrize(
    ("scheme", "parts"),
    [
        ("verse", ("verse", "rsna", "totalsegmentator", "mapping")),
        ({1: "T1"}, ("C1", "T1")),
        ({}, ("C1",)),
        ({0: "C1", 2: "C2"}, ("above 0",)),
    ],
)
def test_schemes_that_cannot_be_meant_are_refused(tmp_path, scheme, parts):
    path = write_nifti(tmp_path / "mask.nii", excerpt().labels, excerpt().spacing_mm)
    refusal(lambda: read_label_map(path, volume_of(excerpt()), scheme=scheme), *parts)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        pytest.param(lambda s: np.zeros_like(s.labels), ("empty", "exclude"), id="empty"),
        pytest.param(lambda s: s.hu, ("no labels", "the CT"), id="the CT itself"),
        pytest.param(lambda s: s.labels * np.float32(0.3), ("fractions", "whole"), id="fractions"),
        pytest.param(lambda s: -s.labels.astype(np.int16), ("no labels",), id="negative"),
        pytest.param(lambda s: np.where(s.labels > 0, 9, 0).astype(np.uint8), ("none of C1", "9"), id="T2"),
    ],
)
def test_values_that_are_no_labels_are_refused_by_file(tmp_path, values, parts):
    scan = excerpt()
    path = write_nifti(tmp_path / "mask.nii.gz", values(scan), scan.spacing_mm)
    refusal(lambda: read_label_map(path, volume_of(scan)), "mask.nii.gz", *parts)


@pytest.mark.parametrize("spacing", [None, (1.3, 1.4, 1.2)], ids=["same grid", "another"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_mask_that_does_not_overlap_its_ct_is_refused(tmp_path, axis, spacing):
    scan = excerpt()
    shift = np.zeros(3)
    shift[axis] = 400 * scan.spacing_mm[2 - axis] if spacing is None else 300.0
    if spacing is None:
        origin = np.array(scans.ORIGIN) + shift
        path = write_nifti(tmp_path / "mask.nii", scan.labels, scan.spacing_mm, origin_mm=origin)
    else:
        labels, other = mask_on(spacing)
        other[:3, 3] += shift
        path = save_nifti(tmp_path / "mask.nii", labels, other)
    refusal(lambda: read_label_map(path, volume_of(scan)), "mask.nii", "another study", "viewer")


def test_a_mask_whose_vertebrae_alone_lie_outside_the_ct_is_refused(tmp_path):
    scan = excerpt()
    labels = scan.labels.copy()
    labels[:, :60] = 0
    volume = Volume(scan.hu[:, :50], scan.spacing_mm, np.array(scans.ORIGIN), FRAME)
    path = write_nifti(tmp_path / "mask.nii", labels, scan.spacing_mm)
    refusal(lambda: read_label_map(path, volume), "mask.nii", "inside the CT")


# Files.


def test_a_missing_mask_is_said(tmp_path):
    path = tmp_path / "1.2.3.nii"
    refusal(lambda: read_label_map(path, volume_of(excerpt())), "1.2.3.nii", error=FileNotFoundError)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kept", [0, 0.3, 0.9])
def test_a_cut_off_mask_is_refused(tmp_path, ending, kept):
    """Of what is missing, half a mask would be a whole one that is small."""
    scan = excerpt()
    path = write_nifti(tmp_path / f"mask{ending}", scan.labels, scan.spacing_mm)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    refusal(lambda: read_label_map(path, volume_of(scan)), path.name, "again")


def test_masks_whose_header_cannot_be_used_are_refused_by_name(tmp_path):
    scan = excerpt()
    stored, affine = turned(scan.labels, affine_of(scan.spacing_mm), "RAS")
    nowhere = save_nifti(tmp_path / "nowhere.nii", stored, affine, codes=(0, 0))
    refusal(lambda: read_label_map(nowhere, volume_of(scan)), "nowhere.nii", "sform")
    four = save_nifti(tmp_path / "four.nii", np.stack([stored] * 2, axis=-1), affine)
    refusal(lambda: read_label_map(four, volume_of(scan)), "four.nii", "3-D")
    affine[:3, 2] += (0, 0.3, 0)
    sheared = save_nifti(tmp_path / "sheared.nii", stored, affine)
    refusal(lambda: read_label_map(sheared, volume_of(scan)), "sheared.nii", "right angles")


def test_the_mask_of_a_study_is_found_under_each_of_its_names(tmp_path):
    write_nifti(tmp_path / "1.2.30.nii", excerpt().labels, excerpt().spacing_mm)
    refusal(lambda: find_mask(tmp_path, "1.2.3"), "1.2.3.nii", "make masks", error=FileNotFoundError)
    (tmp_path / "1.2.3").mkdir()
    assert find_mask(tmp_path, "1.2.3") == tmp_path / "1.2.3"
    (tmp_path / "1.2.3").rmdir()
    for name in ("1.2.3.nii.gz", "1.2.3.nii"):
        (tmp_path / name).touch()
        assert find_mask(tmp_path, "1.2.3") == tmp_path / name
        (tmp_path / name).unlink()


def test_two_masks_of_a_study_are_refused(tmp_path):
    for name in ("1.2.3.nii.gz", "1.2.3.nii"):
        (tmp_path / name).touch()
    refusal(lambda: find_mask(tmp_path, "1.2.3"), "1.2.3.nii.gz", "1.2.3.nii'", "keep one")


# What lies in the mask.


@pytest.mark.parametrize("wrong", ["upside down", "counted from below"])
def test_vertebrae_that_do_not_follow_each_other_downwards_are_refused(tmp_path, wrong):
    """A mask flipped by hand along Z, and one whose labels run the other way."""
    scan = phantom()
    labels = scan.labels[::-1] if wrong == "upside down" else np.where(scan.labels, 8 - scan.labels, 0)
    path = write_nifti(tmp_path / "mask.nii", labels.astype(np.uint8), scan.spacing_mm)
    volume = volume_of(scan)
    found = read_label_map(path, volume)
    refusal(lambda: find_vertebrae(found, volume), "C2 above C1", "C7 above C6", "upside down", "viewer")


def test_vertebrae_are_found_from_the_head_down_where_the_phantom_has_them(tmp_path):
    scan = phantom()
    volume = volume_of(scan)
    path = write_nifti(tmp_path / "mask.nii.gz", scan.labels, scan.spacing_mm, orientation="LAS")
    found = find_vertebrae(read_label_map(path, volume), volume)
    assert list(found) == list(VERTEBRAE)
    for vertebra, middle in landmarks(scan).items():
        assert found[vertebra].completeness == 1
        assert not found[vertebra].problem
        assert all(low <= m < high for m, (low, high) in zip(middle, found[vertebra].box, strict=True))


def test_patients_stay_out_of_what_is_said_about_masks(tmp_path, capfd):
    """The header's description names one; `refusal` looks at every message above."""
    scan = excerpt()
    path = write_nifti(tmp_path / "mask.nii", scan.labels, scan.spacing_mm)
    assert b"Doe^Jane" in nibabel.load(path).header["descrip"].item()
    found = read_label_map(path, volume_of(scan))
    written = capfd.readouterr()
    assert_private(found, written.out, written.err)


# Values and parts.


@pytest.mark.parametrize("slope", [1.00001, 0.99999])
def test_labels_that_a_slope_in_the_header_leaves_not_quite_whole_are_read(tmp_path, slope):
    """5 becomes 5.00005 or 4.99995."""
    scan = excerpt()
    labels = scan.labels * np.float32(slope)
    assert not np.isin(labels, range(8)).all()
    path = write_nifti(tmp_path / "mask.nii.gz", labels, scan.spacing_mm)
    np.testing.assert_array_equal(read_label_map(path, volume_of(scan)).array, scan.labels)


@pytest.mark.parametrize("value", [5.4, 4.6, 5.01])
def test_one_label_that_is_not_whole_is_refused(tmp_path, value):
    scan = excerpt()
    labels = scan.labels.astype(np.float32)
    labels[tuple(np.argwhere(labels == 5)[0])] = value
    path = write_nifti(tmp_path / "mask.nii", labels, scan.spacing_mm)
    refusal(lambda: read_label_map(path, volume_of(scan)), "mask.nii", "fractions", "whole numbers")


def write_cropped(folder, scan: scans.Scan, *, margin: int) -> None:
    """One file a vertebra, on the CT's grid, cut out around it as far as the CT reaches."""
    for value in PRESENT:
        box = bounding_box(scan.labels, value)
        part = tuple(slice(max(low - margin, 0), high + margin) for low, high in box)
        origin = positions(affine_of(scan.spacing_mm), np.array([s.start for s in part]))
        cropped = (scan.labels[part] == value).astype(np.uint8)
        write_nifti(folder / f"{VERTEBRAE[value - 1]}.nii", cropped, scan.spacing_mm, origin_mm=origin)


def test_masks_that_are_each_cropped_to_their_vertebra_do_not_cut_it(tmp_path):
    scan = excerpt()
    volume = volume_of(scan)
    write_cropped(tmp_path, scan, margin=1)
    label_map = read_label_map(tmp_path, volume)
    np.testing.assert_array_equal(label_map.array, scan.labels)
    found = find_vertebrae(label_map, volume)
    assert {level: its.completeness for level, its in found.items()} == {"C4": 1, "C5": 1, "C6": 1}
    assert [its.warnings for its in found.values()] == [(), (), ()]


def test_of_cropped_masks_the_edge_of_the_ct_still_cuts(tmp_path):
    whole = excerpt()
    low, high = bounding_box(whole.labels, 6)[0]
    cut = (low + high) // 2
    scan = scans.Scan(whole.hu[:cut], whole.labels[:cut], whole.spacing_mm)
    volume = volume_of(scan)
    write_cropped(tmp_path, scan, margin=1)
    found = find_vertebrae(read_label_map(tmp_path, volume), volume)
    area = (scan.labels == 6).sum(axis=(1, 2))
    assert found["C6"].completeness == pytest.approx(1 - area[-1] / area.max())
    assert found["C6"].completeness < 0.6
    assert found["C6"].warnings == ("truncated by the field of view (caudal)",)
    assert found["C4"].completeness == found["C5"].completeness == 1
