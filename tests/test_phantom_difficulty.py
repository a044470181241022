"""What makes a phantom hard to read: `CohortConfig.difficulty = "hard"`."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.phantom import cohort as phantom
from cspine_helpers.phantom.anatomy import LocalGrid, vertebra_distance
from cspine_helpers.phantom.cohort import CohortConfig
from cspine_helpers.phantom.difficulty import (
    METAL_HU,
    Findings,
    Hard,
    add_metal,
    blurred,
    draw_findings,
    hairline,
    move,
    thicken,
)
from cspine_helpers.phantom.fractures import Compression, Crack, break_bone, displace, draw_fractures
from cspine_helpers.phantom.rendering import render_study

INTACT = dict.fromkeys(VERTEBRAE, 0)
NONE = Hard(hairline=0, osteopenia=0, thick=0, metal=0, motion=0)
STRAIGHT = {
    level: (np.array([z, 0.0, 0.0]), np.eye(3))
    for level, z in zip(VERTEBRAE, range(-45, 60, 15), strict=True)
}


@pytest.fixture(scope="module")
def standard():
    return render_study(77, 3, INTACT)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_each_finding_is_drawn_as_often_and_as_strong_as_meant():
    hard, many = Hard(), 3000
    drawn = [draw_findings(hard, 1.0, rng(i)) for i in range(many)]
    shares = {
        "hairline": [one.is_hairline for one in drawn],
        "osteopenia": [one.density < 1 for one in drawn],
        "thick": [one.thick > 1 for one in drawn],
        "metal": [bool(one.metal) for one in drawn],
        "motion": [one.is_moving for one in drawn],
    }
    for name, its in shares.items():
        assert np.mean(its) == pytest.approx(getattr(hard, name), abs=0.03), name
    assert {one.thick for one in drawn} == {1, 2, 3}
    assert {draw_findings(hard, 1.25, rng(i)).thick for i in range(50)} == {
        1,
        2,
    }  # 3.75 mm would be too thick
    assert {one.metal for one in drawn} == {"", "fillings", "screws"}
    thin = [(one.density, one.cortex) for one in drawn if one.density < 1]
    for values, ends in zip(zip(*thin, strict=True), (hard.density, hard.cortex), strict=True):
        assert ends[0] <= min(values) < max(values) <= ends[1]
    assert {draw_findings(NONE, 1.0, rng(i)) for i in range(20)} == {Findings()}


@pytest.mark.parametrize("level", VERTEBRAE)
def test_hairline_fractures_are_fewer_narrower_and_still_break_bone(level):
    hard, grid = Hard(), LocalGrid(np.array([-25.0, -20.0, -40.0]), (51, 81, 81), np.ones(3), np.eye(3))
    for seed in range(8):
        usual = draw_fractures(level, rng(seed))
        fine = hairline(usual, hard, rng(seed))
        assert 1 <= len(fine) <= min(len(usual), 2)
        for before, after in zip(usual, fine, strict=False):
            if isinstance(after, Compression):
                assert 1.2 <= after.loss_mm <= before.loss_mm
                continue
            assert isinstance(after, Crack)
            assert (after.point, after.normal, after.reach_mm) == (
                before.point,
                before.normal,
                before.reach_mm,
            )
            assert after.gap_mm <= min(hard.gap_mm[1], before.gap_mm)
            moved = np.linalg.norm(after.shift_mm)
            assert moved <= min(hard.shift_mm[1], np.linalg.norm(before.shift_mm)) + 1e-9
        distance = vertebra_distance(level, displace(fine, level, grid))
        hu = np.full(distance.shape, 400.0, np.float32)
        assert break_bone(fine, level, grid, distance, hu).sum() >= phantom.MIN_FRACTURE_VOXELS


def test_a_hairline_crack_is_true_where_the_scan_spreads_it_in_its_slice_and_in_bone():
    truth, inside = np.zeros((2, 3, 3), bool), np.ones((2, 3, 3), bool)
    truth[0, 1, 1], inside[0, 1, 2] = True, False
    assert blurred(truth, inside).astype(int).tolist() == [[[0, 1, 0], [1, 1, 0], [0, 1, 0]], [[0] * 3] * 3]


def test_a_thick_slice_is_the_mean_of_its_thin_ones_and_keeps_their_fractures():
    tissue = np.arange(7, dtype=np.float32)[:, None, None] * np.ones((1, 2, 2), np.float32)
    label_map, fracture_map = np.full((7, 2, 2), 4, np.uint8), np.zeros((7, 2, 2), np.uint8)
    label_map[4:] = 5
    fracture_map[0, 0, 0] = fracture_map[3, 1, 1] = 4
    hu, label_map, fracture_map = thicken((tissue, label_map, fracture_map), 3)
    assert hu[:, 0, 0].tolist() == [1, 4]
    assert label_map[:, 0, 0].tolist() == [4, 5]
    assert fracture_map.tolist() == [[[4, 0], [0, 0]], [[0, 0], [0, 0]]]  # of slices 3 to 5 the middle is C5


def test_who_moves_is_elsewhere_from_some_height_on_and_the_maps_move_along():
    block = np.zeros((60, 50, 50), np.uint8)
    block[:, 20:30, 20:30] = 3
    volumes = (1000 * (block > 0).astype(np.float32), block, block)
    spacing = (1.0, 0.5, 0.5)
    for seed in range(4):
        hu, label_map, fracture_map = move(volumes, spacing, NONE, rng(seed))
        np.testing.assert_array_equal(label_map, fracture_map)
        middle = np.array([np.argwhere(plane).mean(axis=0) for plane in label_map]) * spacing[1:]
        weight = np.array([np.argwhere(plane > 500).mean(axis=0) for plane in hu]) * spacing[1:]
        away = np.linalg.norm(middle[-1] - middle[0])
        assert away < 2 * NONE.moved_mm[1]
        steps = np.linalg.norm(np.diff(middle, axis=0), axis=1)
        assert steps.sum() > 0.8 * NONE.moved_mm[0]
        assert np.count_nonzero(steps) <= 2 * NONE.moving_mm[1] + 2  # still, but for where it moved
        assert np.abs(weight - middle).max() < 1.6  # the ghost is at most half a way further
    ghosts = ((hu > 50) & (hu < 950)).sum(axis=(1, 2))
    assert ghosts[steps.argmax()] > ghosts.min()


@pytest.mark.parametrize("kind", ["fillings", "screws"])
def test_metal_streaks_the_slices_that_hold_it_and_no_other(kind):
    axes = [np.arange(-60.0, 60, 1), np.arange(-45.0, 45, 0.9), np.arange(-45.0, 45, 0.9)]
    tissue = np.full((120, 100, 100), 50, np.float32)
    poses = {level: (middle, np.eye(3)) for level, (middle, _) in STRAIGHT.items()}
    add_metal(tissue, axes, poses, 1.0, Findings(metal=kind), NONE, rng(4))
    change = np.abs(tissue - 50)
    touched = np.flatnonzero(change.max(axis=(1, 2)) > 0)
    height = axes[0][touched]
    if kind == "screws":
        assert tissue.max() == METAL_HU
        assert height.min() > STRAIGHT["C2"][0][0]
        assert height.max() < STRAIGHT["C7"][0][0]
    else:  # the teeth are in front of the field of view
        assert tissue.max() < 1500
        assert height.min() > STRAIGHT["C1"][0][0] - 5
        assert height.max() < STRAIGHT["C3"][0][0] + 5
        front, behind = change[touched, :20].mean(), change[touched, -20:].mean()
        assert front > behind
    low, high = NONE.streak_hu
    assert low / 8 < np.quantile(change[touched], 0.9) < high
    signs = np.sign(np.round(tissue[touched] - 50))
    assert min((signs > 0).mean(), (signs < 0).mean()) > 0.2  # bright and dark ones


@pytest.mark.slow
def test_thin_bone_is_less_dense_and_the_rest_of_the_patient_the_same(standard):
    thin = render_study(77, 3, INTACT, hard=replace(NONE, osteopenia=1))
    np.testing.assert_array_equal(thin.label_map, standard.label_map)
    bone, other = standard.label_map > 0, standard.label_map == 0
    for quantile in (0.25, 0.5, 0.9):
        ratio = np.quantile(thin.volume_hu[bone], quantile) / np.quantile(standard.volume_hu[bone], quantile)
        assert 0.4 < ratio < 0.95
    assert np.median(np.abs(thin.volume_hu - standard.volume_hu)[other]) == 0


@pytest.mark.slow
def test_thick_slices_have_their_spacing_and_less_of_the_anatomy_between_them(standard):
    thick = render_study(77, 3, INTACT, hard=replace(NONE, thick=1))
    times = round(thick.spacing_mm[0] / standard.spacing_mm[0])
    assert times in (2, 3)
    assert thick.spacing_mm[0] <= NONE.thick_mm
    assert len(thick.volume_hu) == len(thick.label_map) == len(standard.volume_hu) // times
    assert thick.volume_hu.dtype == np.float32
    voxels = [np.count_nonzero(study.label_map == 4) * study.spacing_mm[0] for study in (thick, standard)]
    assert voxels[0] == pytest.approx(voxels[1], rel=0.1)


@pytest.mark.slow
def test_a_hard_study_is_the_same_each_time_and_with_nothing_found_the_standard_one(standard):
    every = Hard(hairline=1, osteopenia=1, thick=1, metal=1, motion=1)
    broken = INTACT | {"C5": 1}
    once, again = (render_study(77, 3, broken, hard=every) for _ in range(2))
    np.testing.assert_array_equal(once.volume_hu, again.volume_hu)
    np.testing.assert_array_equal(once.fracture_map, again.fracture_map)
    assert np.unique(once.label_map).tolist() == list(range(8))
    assert (once.fracture_map > 0).sum() >= phantom.MIN_FRACTURE_VOXELS
    np.testing.assert_array_equal(render_study(77, 3, INTACT, hard=NONE).volume_hu, standard.volume_hu)


@pytest.mark.slow
def test_a_cohort_says_that_it_is_hard_and_what_that_means(tmp_path):
    pack = replace(CohortConfig(1, 1).pack, slices=5, size=16)
    phantom.make_cohort(tmp_path / "hard", CohortConfig(1, 8, pack, difficulty="hard"), workers=1)
    record = json.loads((tmp_path / "hard" / "cohort.json").read_text())
    assert record["config"]["difficulty"] == "hard"
    assert record["hard"] == json.loads(json.dumps(asdict(Hard())))
    with pytest.raises(ValueError, match="difficulty is one of standard, hard; found 'easy'"):
        CohortConfig(1, 1, difficulty="easy")
