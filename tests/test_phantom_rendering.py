from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from cspine_helpers.ct.volume import bounding_box
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.phantom import rendering
from cspine_helpers.phantom.anatomy import DIMENSIONS, vertebra_distance
from cspine_helpers.phantom.rendering import Study, render_study, study_uid

INTACT = dict.fromkeys(VERTEBRAE, 0)


@pytest.fixture(scope="module")
def intact() -> Study:
    return render_study(5, 0, INTACT)


@pytest.fixture(scope="module")
def broken() -> Study:
    return render_study(5, 1, dict.fromkeys(VERTEBRAE, 1))


def boxes_mm(study: Study) -> dict[str, np.ndarray]:
    spacing = np.array(study.spacing_mm)[:, None]
    return {v: np.array(bounding_box(study.label_map, i + 1)) * spacing for i, v in enumerate(VERTEBRAE)}


def test_vertebrae_follow_each_other_from_head_to_feet(intact):
    middles = [box[0].mean() for box in boxes_mm(intact).values()]
    assert middles == sorted(middles)
    assert 8 < np.diff(middles).mean() < 25


def test_sizes_keep_the_proportions_of_real_vertebrae(intact):
    """Real proportions: medians of the masks' boxes in 2,018 RSNA studies, in voxels."""
    sizes = np.array([np.ptp(box, axis=1) for box in boxes_mm(intact).values()])
    wide = np.array([125, 89, 87, 89, 92, 95, 111])
    deep = np.array([72, 82, 71, 71, 78, 90, 101])
    for mine, real in ((sizes[:, 2], wide), (sizes[:, 1], deep)):
        ratio = mine / real
        assert ratio.max() / ratio.min() < 1.35


def test_the_canal_lies_behind_the_body_and_holds_water_and_cord(intact):
    z, _, x = (int(np.mean(box)) for box in bounding_box(intact.label_map, 5))
    row = intact.label_map[z, :, x - 3 : x + 4]
    front, behind = np.flatnonzero((row == 5).any(axis=1))[[0, -1]]
    inside = np.flatnonzero((row == 0).all(axis=1))
    canal = inside[(inside > front) & (inside < behind)]
    assert canal.size * intact.spacing_mm[1] > 8
    assert abs(intact.volume_hu[z, canal, x].mean() - 30) < 60


def test_bone_tissue_and_air_have_their_hounsfield_values(intact):
    bone = intact.volume_hu[intact.label_map > 0]
    assert 250 < np.median(bone) < 700
    assert np.quantile(bone, 0.95) > 600
    middle = intact.volume_hu.shape[1] // 2
    around = intact.volume_hu[:, middle : middle + 20, 5:15]
    assert -150 < np.median(around) < 160
    assert intact.volume_hu.min() < -900
    assert intact.volume_hu.dtype == np.float32
    assert intact.volume_hu.min() >= -1024


def test_only_vertebrae_with_the_label_are_broken(intact, broken):
    assert not intact.fracture_map.any()
    assert np.unique(broken.fracture_map).tolist() == list(range(8))
    assert (broken.label_map[broken.fracture_map > 0] == broken.fracture_map[broken.fracture_map > 0]).all()


def test_vertebrae_are_parted_by_a_joint_space_even_where_they_are_fractured(intact, broken):
    for study in (intact, broken):
        for number in range(1, 7):
            window = ndimage.find_objects(np.isin(study.label_map, (number, number + 1)).astype(int))[0]
            bone = study.label_map[window]
            away = ndimage.distance_transform_edt(bone != number, sampling=study.spacing_mm)
            # from voxel to voxel; a facet joint is 2 to 3 mm wide at most
            assert 1.3 < away[bone == number + 1].min() < 3.5, VERTEBRAE[number]


def test_there_is_a_skull_above_the_atlas_that_has_no_label(intact):
    top = np.flatnonzero((intact.label_map == 1).any(axis=(1, 2)))[0]
    above = (intact.volume_hu[: top - 4] > 300) & (intact.label_map[: top - 4] == 0)
    assert above.sum() * np.prod(intact.spacing_mm) > 3000
    middle = round(ndimage.center_of_mass(intact.label_map == 1)[2])
    left, right = above[:, :, middle:].sum(), above[:, :, :middle].sum()
    assert 0.4 < left / (left + right) < 0.6


def test_spinous_processes_of_turned_necks_stay_behind_their_bodies():
    """So that a mid-sagittal plane shows them at full length; the head turns on C1 and C2."""
    aside, turns = [], []
    for index in range(60):
        rng = rendering.generator(3, index, 1)
        patient = rendering._draw_patient(rng)
        poses = rendering._poses(patient, rng)
        for level in ("C4", "C5", "C6", "C7"):
            d, (_, rotation) = DIMENSIONS[level], poses[level]
            tip = rotation.T @ np.array([0.0, d.arch_y + d.spinous[0], 0.0])
            aside.append(abs(tip[0]) / d.spinous[2])
        turns.append(np.arctan2(*poses["C1"][1][0, [1, 0]]) - np.arctan2(*poses["C2"][1][0, [1, 0]]))
        turns[-1] /= patient.yaw
    assert np.quantile(aside, 0.9) < 1  # within the process's radius
    assert np.median(turns) == pytest.approx(0.6, abs=0.1)


def test_necks_that_bend_to_the_side_do_so_as_a_column():
    rng = rendering.generator(3, 0, 1)
    patient = replace(rendering._draw_patient(rng), roll=0.1, yaw=0.0)
    poses = rendering._poses(patient, rng)
    (top, _), (bottom, _) = poses["C2"], poses["C7"]
    assert (bottom[2] - top[2]) / (bottom[0] - top[0]) == pytest.approx(np.tan(0.1), abs=0.03)


@pytest.mark.slow
def test_no_vertebra_is_cut_by_the_block_it_is_drawn_in_or_by_the_volume():
    for index in range(12):
        patient = rendering._draw_patient(rendering.generator(8, index, 1))
        study = render_study(8, index, INTACT)
        assert study.spacing_mm == patient.spacing_mm
        for axis in range(3):
            for edge in (0, -1):
                assert not study.label_map.take(edge, axis).any()
    rng = rendering.generator(8, 0, 1)
    patient = rendering._draw_patient(rng)
    for level, (_, rotation) in rendering._poses(patient, rng).items():
        _, grid = rendering._local(level, np.zeros(3), rotation, (400, 400, 400), patient)
        bone = vertebra_distance(level, grid) < 0
        assert bone.any()
        assert not any(bone.take(edge, axis).any() for axis in range(3) for edge in (0, -1)), level


def test_where_vertebrae_touch_truth_and_picture_agree(broken):
    both = broken.fracture_map > 0
    assert (broken.fracture_map[both] == broken.label_map[both]).all()


def test_a_study_is_the_same_each_time_and_differs_from_its_neighbours(intact, broken):
    again = render_study(5, 0, INTACT)
    np.testing.assert_array_equal(intact.volume_hu, again.volume_hu)
    np.testing.assert_array_equal(intact.label_map, again.label_map)
    elsewhere = rendering._draw_patient(rendering.generator(6, 0, 1))
    assert broken.spacing_mm != intact.spacing_mm != elsewhere.spacing_mm
    assert broken.window_hu != intact.window_hu


def test_uids_are_the_roots_of_rsna_and_unique():
    uids = {study_uid(seed, index) for seed in range(20) for index in range(50)}
    assert len(uids) == 1000
    assert all(uid.startswith("1.2.826.0.1.3680043.") and len(uid) <= 64 for uid in uids)
