import numpy as np
import pytest
import scans

from cspine_helpers.ct.masks import LabelMap, read_label_map
from cspine_helpers.ct.reading import read_ct
from cspine_helpers.ct.vertebrae import Vertebra, find_vertebrae
from cspine_helpers.ct.volume import FRAME, Volume, bounding_box
from cspine_helpers.labels import VERTEBRAE

SPACING = (2.0, 1.0, 0.5)
SHAPE = (84, 60, 80)
FIELD = tuple((0, length) for length in SHAPE)
BLOCK = (slice(20, 30), slice(20, 40), slice(20, 60))  # 10 × 20 × 40 voxels of 1 mm³
C4 = 4


def volume_of(label_map: np.ndarray, *, spacing=SPACING, bone_hu: int = 400) -> Volume:
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
    return find_vertebrae(placed(label_map, field), volume_of(label_map, **options))


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
    assert found["C3"].problem == "its mask is in 2 pieces, up to 100 mm apart; mend the mask"
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
    volume = volume_of(label_map)
    moved = np.roll(label_map, -20, axis=1)
    found = find_vertebrae(placed(moved), volume)
    for vertebra in found.values():
        assert "does not lie on bone (0% of its voxels reach 150 HU)" in vertebra.problem
        assert "another series" in vertebra.problem


@pytest.mark.parametrize(("share", "problem"), [(0.09, True), (0.11, False)])
def test_a_tenth_of_bone_is_enough(share, problem):
    label_map = blocks(BLOCK)
    volume = volume_of(label_map, bone_hu=149)
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
    volume = volume_of(label_map, bone_hu=149)
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
