import numpy as np
import pytest
from scipy import ndimage

from cspine_helpers.phantom.anatomy import DIMENSIONS, SKULL, LocalGrid, vertebra_distance

LEVELS = ("C1", *DIMENSIONS)


def grid(spacing: float = 1.0, rotation: np.ndarray | None = None) -> LocalGrid:
    shape = tuple(round(n / spacing) for n in (61, 101, 91))
    rotation = np.eye(3) if rotation is None else rotation
    return LocalGrid(np.array([-30.0, -35.0, -45.0]), shape, np.full(3, spacing), rotation)


def at(distance: np.ndarray, x: float, y: float, z: float) -> float:
    return float(distance[round(z + 30), round(y + 35), round(x + 45)])


@pytest.fixture(scope="module")
def bones() -> dict[str, np.ndarray]:
    return {level: vertebra_distance(level, grid()) for level in LEVELS}


@pytest.mark.parametrize("level", DIMENSIONS)
def test_body_is_bone_and_the_canal_behind_it_is_not(bones, level):
    assert at(bones[level], 0, 0, 0) < -3
    assert at(bones[level], 0, DIMENSIONS[level].canal_y, 0) > 3
    assert at(bones[level], 0, DIMENSIONS[level].arch_y + 2, 3) < 0


def test_atlas_is_a_ring_without_body_or_spinous_process(bones):
    assert at(bones["C1"], 0, 0, 0) > 4  # where the dens will stand
    assert at(bones["C1"], 0, -11, 0) < 0
    assert at(bones["C1"], 0, 28, 0) < 0
    back = np.flatnonzero((bones["C1"][:, :, 45] < 0).any(axis=0)).max() - 35
    assert back < DIMENSIONS["C4"].arch_y + DIMENSIONS["C4"].spinous[0]


def test_only_the_axis_has_a_dens(bones):
    for level in DIMENSIONS:
        assert (at(bones[level], 0, 0, -18) < 0) == (level == "C2")


@pytest.mark.parametrize("level", LEVELS)
def test_the_arch_is_closed_at_the_height_of_the_body(bones, level):
    middle = 14 if level == "C1" else round(DIMENSIONS[level].canal_y)
    for z in (-2, 0, 2):
        plane = bones[level][z + 30] < 0
        assert not plane[middle + 35, 45]
        assert ndimage.binary_fill_holes(plane)[middle + 35, 45], z


@pytest.mark.parametrize("level", [level for level in DIMENSIONS if level != "C2"])
def test_facets_slope_down_to_the_back_at_45_degrees(bones, level):
    d = DIMENSIONS[level]
    column = bones[level][:, :, round(d.pillar_x) + 45] < 0
    rows = [round(d.canal_y) - 1 + offset for offset in (-2, 2)]
    tops, bottoms = zip(*(np.flatnonzero(column[:, row + 35])[[0, -1]] for row in rows), strict=True)
    assert tops[1] - tops[0] == pytest.approx(4, abs=1)  # as far down as back
    assert bottoms[1] - bottoms[0] == pytest.approx(4, abs=1)


def test_the_skull_base_has_condyles_above_the_atlas_and_a_hole_for_the_cord(bones):
    skull = vertebra_distance(SKULL, grid())
    lowest = np.flatnonzero((skull[:, 30:45, 40:70] < 0).any(axis=(1, 2))).max() - 30
    assert -9 < lowest < -6  # of a condyle, in the cup of the lateral mass
    for x in (-16, 16):
        assert at(skull, x, -1, -12) < 0
    for z in range(-30, 0):
        assert at(skull, 0, 14, z) > 3  # foramen magnum
    assert at(skull, 0, -12, -19) < 0  # clivus
    squama = skull[:, 35 + 40, 45] < 0
    assert squama.any()
    assert not (skull[:, 35 + 14, 45] < 0).any()


def test_transverse_processes_of_c3_to_c6_end_in_two_tubercles_with_a_groove_between(bones):
    for level, d in DIMENSIONS.items():
        row = bones[level][31, :, round(d.transverse_x) - 1 + 45] < 0
        pieces = ndimage.label(row)[1]
        assert pieces == (2 if level in ("C3", "C4", "C5", "C6") else 1), level


def test_foramina_transversaria_are_open_in_c1_to_c7_only(bones):
    assert at(bones["C1"], 26.5, 3, 0) > 0
    for level, d in DIMENSIONS.items():
        assert (at(bones[level], round(d.body[0] + 5.2), 2, 0) > 0) == (d.foramen > 0)


def test_c7_reaches_farthest_back_of_all_cervical_vertebrae_and_is_not_bifid(bones):
    reach = {level: np.flatnonzero((bone < 0).any(axis=(0, 2))).max() for level, bone in bones.items()}
    assert max((level for level in LEVELS if level != "T1"), key=reach.get) == "C7"
    assert [level for level, d in DIMENSIONS.items() if not d.bifid] == ["C7", "T1"]


@pytest.mark.parametrize("level", LEVELS)
def test_left_and_right_mirror_each_other(bones, level):
    near = bones[level] < 3
    np.testing.assert_allclose(bones[level][near], bones[level][:, :, ::-1][near], atol=0.1)


@pytest.mark.parametrize("level", LEVELS)
def test_distance_changes_at_most_as_fast_as_position(bones, level):
    near = np.abs(bones[level]) < 2
    for axis in range(3):
        step = np.abs(np.diff(bones[level], axis=axis))
        both = near.take(range(1, near.shape[axis]), axis) & near.take(range(near.shape[axis] - 1), axis)
        assert np.quantile(step[both], 0.99) < 1.35  # drilled and blended edges bend a little


def test_a_turned_grid_shows_the_same_bone_turned():
    turn = np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    size = LocalGrid(np.full(3, -50.0), (101, 101, 101), np.ones(3), np.eye(3))
    turned = LocalGrid(np.full(3, -50.0), (101, 101, 101), np.ones(3), turn)
    upright, lying = vertebra_distance("C5", size), vertebra_distance("C5", turned)
    back = np.rot90(lying, 1, axes=(1, 2))
    np.testing.assert_allclose(back[upright < 3], upright[upright < 3], atol=0.05)


def test_windows_hold_all_of_a_part():
    whole = grid()
    window = whole.window((-5.0, -5.0, -5.0), (5.0, 5.0, 5.0), pad=0.0)
    inside = (np.abs(whole.x) < 5) & (np.abs(whole.y) < 5) & (np.abs(whole.z) < 5)
    assert inside.sum() == inside[window].sum() > 0
