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

from cspine_helpers.ct.masks import (
    SCHEMES,
    LabelMap,
    Vertebra,
    find_mask,
    find_vertebrae,
    read_label_map,
    read_scheme,
)
from cspine_helpers.ct.reading import read_ct
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


@pytest.mark.slow
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
    labels, other = mask_on((2.0, 1.5, 1.1), shift_mm=(14.0, -9.0, 12.3), margin_mm=-8.0)
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


@pytest.mark.slow
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


SPACING = (2.0, 1.0, 0.5)
SHAPE = (84, 60, 80)
FIELD = tuple((0, length) for length in SHAPE)
BLOCK = (slice(20, 30), slice(20, 40), slice(20, 60))  # 10 × 20 × 40 voxels of 1 mm³
C4 = 4


def bony_volume(label_map: np.ndarray, *, spacing=SPACING, bone_hu: int = 400) -> Volume:
    """Vertebrae where the label map has them, in soft tissue."""
    hu = np.where(label_map > 0, bone_hu, 40).astype(np.int16)
    return Volume(hu, spacing, np.zeros(3), FRAME)


def blocks(*places: tuple[slice, slice, slice], number: int = C4, shape=SHAPE) -> np.ndarray:
    label_map = np.zeros(shape, np.uint8)
    for place in places:
        label_map[place] = number
    return label_map


def neck(order=range(1, 8)) -> np.ndarray:
    """Seven blocks from the head down."""
    label_map = np.zeros(SHAPE, np.uint8)
    for place, number in enumerate(order):
        label_map[3 + 11 * place : 11 + 11 * place, 20:40, 20:60] = number
    return label_map


def placed(label_map: np.ndarray, field=FIELD) -> LabelMap:
    """With the box around all labels, as `read_label_map` finds it."""
    found = np.argwhere(label_map)
    return LabelMap(
        label_map,
        field,
        tuple(zip(found.min(axis=0).tolist(), (found.max(axis=0) + 1).tolist(), strict=True)),
    )


def found_in(label_map: np.ndarray, *, field=FIELD, **options) -> dict[str, Vertebra]:
    return find_vertebrae(placed(label_map, field), bony_volume(label_map, **options))


def ball() -> np.ndarray:
    """A ball of 12 mm radius in a cube that it nowhere touches, in voxels of 1 mm."""
    z, y, x = np.ogrid[-14:15, -14:15, -14:15]
    return (z**2 + y**2 + x**2 <= 144).astype(np.uint8) * np.uint8(C4)


def test_vertebrae_are_found_from_the_head_down_each_in_its_box():
    label_map = neck()
    label_map[label_map == 2] = 0
    found = found_in(label_map)
    assert list(found) == [level for level in VERTEBRAE if level != "C2"]
    for level, vertebra in found.items():
        assert vertebra.box == bounding_box(label_map, VERTEBRAE.index(level) + 1)
        assert vertebra.middle == sum(vertebra.box[0]) / 2
        assert (vertebra.completeness, vertebra.warnings, vertebra.problem) == (1, (), "")


@pytest.mark.parametrize(
    ("scheme", "label"), [("rsna", 1), ("totalsegmentator", 47), ({9: "C7"}, 9)], ids=str
)
@pytest.mark.parametrize("levels", [range(1, 8), range(2, 7)], ids=["whole", "cropped"])
def test_a_binary_mask_of_the_spine_is_refused_whatever_its_label(tmp_path, scheme, label, levels):
    scan = scans.phantom()
    binary = np.where(np.isin(scan.labels, levels), label, 0).astype(np.uint8)
    path = scans.write_nifti(tmp_path / "mask.nii.gz", binary, scan.spacing_mm)
    volume = Volume(scan.hu, scan.spacing_mm, np.array(scans.ORIGIN), FRAME)
    label_map = read_label_map(path, volume, scheme=scheme)
    scans.refusal(lambda: find_vertebrae(label_map, volume), "mm high", "binary mask", "a label each")


def test_a_label_larger_than_a_vertebra_is_refused_though_low():
    wide = blocks((slice(20, 50), slice(5, 55), slice(10, 70)))
    scans.refusal(lambda: found_in(wide, spacing=(1.0, 1.0, 1.0)), "C4 is 30 mm high and 90 cm³", "binary")


# Completeness.

FACES = [
    (axis, end, face)
    for axis, pair in enumerate((("cranial", "caudal"), ("anterior", "posterior"), ("right", "left")))
    for end, face in enumerate(pair)
]


@pytest.mark.parametrize(("axis", "end", "face"), FACES)
@pytest.mark.parametrize("left", [5, 8, 13])
def test_completeness_is_what_the_cut_leaves_of_the_largest_cross_section(axis, end, face, left):
    """A ball of which `left` layers of 25 are missing at one end."""
    whole = ball()
    area = (whole > 0).sum(axis=tuple(i for i in range(3) if i != axis))
    kept = slice(2 + left, None) if end == 0 else slice(None, -2 - left)
    label_map = np.moveaxis(np.moveaxis(whole, axis, 0)[kept], 0, axis)
    field = tuple((0, length) for length in label_map.shape)
    vertebra = found_in(label_map, field=field, spacing=(1.0, 1.0, 1.0))["C4"]
    rest = area[kept]
    assert vertebra.completeness == 1 - rest[-end] / rest.max()
    assert (vertebra.completeness == 0) == (left >= 12)
    assert vertebra.warnings == (f"truncated by the field of view ({face})",)
    assert vertebra.problem == ""


def test_a_vertebra_cut_at_half_its_area_is_half_complete():
    tall = (slice(0, 10), slice(20, 40), slice(20, 60))
    wide = (slice(4, 8), slice(20, 60), slice(20, 60))
    vertebra = found_in(blocks(tall, wide))["C4"]
    assert vertebra.completeness == 0.5
    assert vertebra.box == ((0, 10), (20, 60), (20, 60))


def test_a_vertebra_that_ends_just_within_the_picture_is_whole_and_the_worst_of_several_cuts_counts():
    whole = ball()[2:-2, 2:-2, 2:-2]  # touches every face with a single voxel
    field = tuple((0, length) for length in whole.shape)
    vertebra = found_in(whole, field=field, spacing=(1.0, 1.0, 1.0))["C4"]
    largest = (whole[12] > 0).sum()
    assert vertebra.completeness == 1 - 1 / largest
    assert vertebra.warnings == (
        "truncated by the field of view (cranial and caudal and anterior and posterior and right and left)",
    )
    around = np.pad(whole, 1)
    field = tuple((0, length) for length in around.shape)
    vertebra = found_in(around, field=field, spacing=(1.0, 1.0, 1.0))["C4"]
    assert (vertebra.completeness, vertebra.warnings) == (1, ())
    corner = whole[8:, :, 3:]
    field = tuple((0, length) for length in corner.shape)
    vertebra = found_in(corner, field=field, spacing=(1.0, 1.0, 1.0))["C4"]
    assert vertebra.completeness == 1 - (corner[0] > 0).sum() / (corner[4] > 0).sum()  # less than at x = 3


def test_a_mask_whose_own_grid_ends_inside_the_ct_cuts_like_the_ct(tmp_path):
    """C5 cut by a mask file that was written of a part of the CT; C4 above it is whole."""
    scan = scans.excerpt()
    low, high = bounding_box(scan.labels, 5)[0]
    cut = (low + high) // 2
    part = np.where(scan.labels < 6, scan.labels, 0)[:cut]
    path = scans.write_nifti(tmp_path / "mask.nii", part, scan.spacing_mm)
    volume = Volume(scan.hu, scan.spacing_mm, np.array(scans.ORIGIN), scans.FRAME)
    found = find_vertebrae(read_label_map(path, volume), volume)
    area = (part == 5).sum(axis=(1, 2))
    assert found["C5"].completeness == pytest.approx(1 - area[-1] / area.max())
    assert found["C5"].warnings == ("truncated by the field of view (caudal)",)
    assert found["C4"].completeness == 1
    whole = scans.write_nifti(tmp_path / "whole.nii", scan.labels, scan.spacing_mm)
    assert find_vertebrae(read_label_map(whole, volume), volume)["C5"].completeness == 1


# Pieces.

NEAR = (slice(20, 30), slice(44, 48), slice(20, 60))  # 1,600 voxels, 5 mm behind the block
FAR_SPECK = (slice(76, 77), slice(20, 21), slice(20, 29))  # 9 voxels, 47 slices of 2 mm below it


def test_specks_far_away_go_from_the_map_and_the_box_shrinks_to_what_is_left():
    label_map = blocks(BLOCK, FAR_SPECK, (slice(2, 3), slice(20, 21), slice(20, 21)))
    label_map[75, 50, 70] = 5  # others are none of its business
    vertebra = found_in(label_map)["C4"]
    assert vertebra.box == ((20, 30), (20, 40), (20, 60))
    assert vertebra.middle == 25
    assert vertebra.warnings == ("specks removed, up to 94 mm away (10 voxels)",)
    assert vertebra.problem == ""
    expected = blocks(BLOCK)
    expected[75, 50, 70] = 5
    np.testing.assert_array_equal(label_map, expected)


@pytest.mark.parametrize(("slices_away", "stays"), [(5, True), (6, False)])
def test_a_speck_up_to_10_mm_away_stays_as_a_chip_of_bone_may_lie(slices_away, stays):
    chip = (slice(29 + slices_away, 30 + slices_away), slice(20, 25), slice(20, 25))
    label_map = blocks(BLOCK, chip)
    vertebra = found_in(label_map)["C4"]
    assert vertebra.problem == ""
    assert vertebra.middle == 25
    assert vertebra.box[0] == (20, 35 if stays else 30)
    assert label_map[chip].all() == stays
    assert vertebra.warnings == (() if stays else ("specks removed, up to 12 mm away (25 voxels)",))


def test_what_touches_by_a_corner_is_one_piece():
    label_map = blocks(BLOCK, (slice(30, 40), slice(40, 60), slice(60, 80)))
    vertebra = found_in(label_map)["C4"]
    assert vertebra.warnings == ("truncated by the field of view (posterior and left)",)
    assert vertebra.box == ((20, 40), (20, 60), (20, 80))
    assert vertebra.middle == 30


@pytest.mark.parametrize(
    ("fragment", "apart_mm"),
    [
        (NEAR, 5),  # voxel middles 39 and 44, 1 mm each
        ((slice(34, 37), slice(20, 40), slice(20, 60)), 10),  # 29 and 34, 2 mm each
        ((slice(20, 30), slice(20, 40), slice(4, 12)), 4.5),  # 11 and 20, 0.5 mm each
    ],
)
def test_a_fragment_up_to_10_mm_away_stays_and_is_said(fragment, apart_mm):
    label_map = blocks(BLOCK, fragment)
    before = label_map.copy()
    vertebra = found_in(label_map)["C4"]
    assert vertebra.warnings == (f"in 2 pieces, up to {apart_mm:.0f} mm apart",)
    assert vertebra.problem == ""
    assert vertebra.box == bounding_box(before, C4)
    assert vertebra.middle == 25
    np.testing.assert_array_equal(label_map, before)


def test_a_piece_further_away_is_a_problem_of_that_vertebra_alone():
    """Below C7: the vertebrae still follow each other, as each one's largest piece says where it lies."""
    label_map = neck()
    label_map[82:84, 22:38, 22:58] = 3
    found = found_in(label_map)
    assert found["C3"].problem == "its mask is in 2 pieces, up to 100 mm apart; correct the mask"
    assert found["C3"].middle == 29
    assert [vertebra.problem for level, vertebra in found.items() if level != "C3"] == [""] * 6


@pytest.mark.parametrize(("rows", "columns", "problem"), [(20, 21, False), (9, 47, True)])
def test_a_far_piece_is_a_speck_below_5_percent_of_the_voxels(rows, columns, problem):
    """The block has 8,000 of them; 420 are less than 5 % of both, 423 more."""
    far = (slice(60, 61), slice(20, 20 + rows), slice(20, 20 + columns))
    vertebra = found_in(blocks(BLOCK, far))["C4"]
    assert bool(vertebra.problem) == problem
    assert (vertebra.warnings == ("specks removed, up to 62 mm away (420 voxels)",)) != problem


def test_specks_beside_a_fragment_are_removed_and_do_not_count_as_pieces():
    label_map = blocks(BLOCK, NEAR, FAR_SPECK)
    vertebra = found_in(label_map)["C4"]
    assert vertebra.warnings == (
        "in 2 pieces, up to 5 mm apart",
        "specks removed, up to 94 mm away (9 voxels)",
    )
    assert vertebra.problem == ""
    assert vertebra.box == ((20, 30), (20, 48), (20, 60))
    np.testing.assert_array_equal(label_map, blocks(BLOCK, NEAR))


def test_crumbs_without_a_main_piece_are_refused():
    """Thirty of 20 mm³ each: none is 5 % of the whole, and what is left of them is no vertebra."""
    label_map = np.zeros(SHAPE, np.uint8)
    label_map[10:70:10, 5:60:11, 20:40] = C4
    vertebra = found_in(label_map)["C4"]
    assert vertebra.warnings == ("specks removed, up to 109 mm away (580 voxels)",)
    assert vertebra.problem == "its mask holds 20 mm³, a tenth of a vertebra at most"


# Masks that cannot be right.


def test_a_mask_beside_the_bone_is_a_problem():
    label_map = neck()
    volume = bony_volume(label_map)
    moved = np.roll(label_map, -20, axis=1)
    found = find_vertebrae(placed(moved), volume)
    for vertebra in found.values():
        assert "does not lie on bone (0% of its voxels reach 150 HU)" in vertebra.problem
        assert "another series" in vertebra.problem


@pytest.mark.parametrize(("share", "problem"), [(0.09, True), (0.11, False)])
def test_a_tenth_of_bone_is_enough(share, problem):
    label_map = blocks(BLOCK)
    volume = bony_volume(label_map, bone_hu=149)
    inside = volume.hu[BLOCK].reshape(-1)
    inside[: round(share * inside.size)] = 150
    volume.hu[BLOCK] = inside.reshape(volume.hu[BLOCK].shape)
    assert bool(find_vertebrae(placed(label_map), volume)["C4"].problem) == problem


@pytest.mark.parametrize(
    ("rows", "problem"), [(9, "its mask holds 900 mm³, a tenth of a vertebra at most"), (10, "")]
)
def test_a_tiny_mask_is_a_problem_by_its_volume_in_mm(rows, problem):
    label_map = blocks((slice(20, 30), slice(20, 20 + rows), slice(20, 30)))
    assert found_in(label_map)["C4"].problem == problem
    assert found_in(label_map, spacing=(4.0, 2.0, 1.0))["C4"].problem == ""


@pytest.mark.parametrize(
    ("order", "pairs"),
    [
        (range(7, 0, -1), "C2 above C1, C3 above C2, C4 above C3, C5 above C4, C6 above C5, C7 above C6"),
        ((1, 2, 4, 3, 5, 6, 7), "C4 above C3"),
    ],
)
def test_vertebrae_that_do_not_follow_each_other_are_refused_pair_by_pair(order, pairs):
    with pytest.raises(ValueError, match=f"the mask has {pairs}: it is upside down .* viewer"):
        found_in(neck(order))


def test_two_vertebrae_at_one_height_are_refused():
    label_map = blocks((slice(20, 30), slice(5, 25), slice(20, 60)))
    label_map[20:30, 30:50, 20:60] = 5
    with pytest.raises(ValueError, match="C5 above C4"):
        found_in(label_map)


def test_stray_voxels_of_a_vertebra_that_is_not_there_do_not_turn_the_study_upside_down():
    """A few voxels of C7 above C4 are a problem of C7; as large as a vertebra, they are one of the study."""
    label_map = neck((1, 2, 3, 4, 5, 6))
    label_map[4:6, 50:54, 70:78] = 7
    found = found_in(label_map)
    assert list(found) == list(VERTEBRAE)
    assert found["C7"].middle < found["C4"].middle
    assert found["C7"].problem == "its mask holds 64 mm³, a tenth of a vertebra at most"
    assert [found[level].problem for level in VERTEBRAE[:6]] == [""] * 6
    label_map[3:11, 42:58, 20:60] = 7
    with pytest.raises(ValueError, match="C7 above C6: it is upside down"):
        found_in(label_map)


@pytest.mark.parametrize(("share", "warned"), [(0.34, True), (0.36, False)])
def test_little_bone_is_warned_of(share, warned):
    label_map = neck()
    volume = bony_volume(label_map, bone_hu=149)
    bone = np.flatnonzero(label_map == C4)
    volume.hu.ravel()[bone[: round(share * bone.size)]] = 150
    warnings = find_vertebrae(placed(label_map), volume)["C4"].warnings
    sentence = f"{share:.0%} of its voxels reach 150 HU, which is little; is the mask this CT's?"
    assert warnings == ((sentence,) if warned else ())


# Real trunks: T11 … L5 are taken as C1 … C7 here, L2 … L4 as C1 … C3.

TRUNK = dict.fromkeys(range(1, 118), "other") | dict(zip(range(33, 26, -1), VERTEBRAE, strict=True))
TRUNKS = {
    "totalsegmentator_example": ("ct.nii.gz", "vertebrae.nii.gz", TRUNK),
    "totalsegmentator_example/dicom": ("", "../dicom_segmentation.nii.gz", TRUNK),
    "tptbox_lumbar": ("ct.nii.gz", "vertebrae.nii.gz", {21: "C1", 22: "C2", 23: "C3"}),
}


def real(folder: str) -> tuple[LabelMap, Volume]:
    ct, mask, scheme = TRUNKS[folder]
    volume = read_ct(scans.REAL_CT / folder / ct)
    return read_label_map(scans.REAL_CT / folder / mask, volume, scheme=scheme), volume


@scans.needs_ct
@pytest.mark.parametrize(
    ("folder", "cut", "whole"),
    [
        ("totalsegmentator_example", {"C1": "cranial", "C2": "cranial"}, VERTEBRAE[2:]),
        ("totalsegmentator_example/dicom", {"C1": "cranial", "C2": "caudal"}, ()),
        ("tptbox_lumbar", {"C1": "cranial", "C3": "caudal"}, ("C2",)),
    ],
)
def test_real_vertebrae_lie_on_bone_in_order_whole_or_cut_where_the_ct_ends(folder, cut, whole):
    found = find_vertebrae(*real(folder))
    assert list(found) == sorted([*cut, *whole])
    for level, vertebra in found.items():
        assert vertebra.problem == ""
        said = [warning for warning in vertebra.warnings if "in 2 pieces, up to 7 mm" not in warning]  # T11's
        assert said == ([f"truncated by the field of view ({cut[level]})"] if level in cut else [])
        assert (vertebra.completeness == 1) == (level in whole)


@scans.needs_ct
@pytest.mark.parametrize("folder", ["totalsegmentator_example", "tptbox_lumbar"])
def test_real_masks_moved_by_a_centimetre_are_warned_of(folder):
    label_map, volume = real(folder)
    moved = np.roll(label_map.array, -round(10 / volume.spacing_mm[1]), axis=1)
    found = find_vertebrae(placed(moved, label_map.field), volume)
    little = [level for level, its in found.items() if its.problem or "which is little" in str(its.warnings)]
    assert len(little) >= len(found) - 1
    before = find_vertebrae(label_map, volume)
    assert "which is little" not in str([its.warnings for its in before.values()])
