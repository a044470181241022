import numpy as np
import pytest
from scipy import ndimage

from cspine_helpers.phantom import rendering
from cspine_helpers.phantom.anatomy import DIMENSIONS
from cspine_helpers.phantom.soft_tissue import soft_tissue

Neck = tuple[np.ndarray, list[np.ndarray], dict[str, tuple[np.ndarray, np.ndarray]], float]


@pytest.fixture(scope="module")
def necks() -> list[Neck]:
    """Soft tissue of six patients, without noise, with the axes, the poses of the vertebrae and the scale."""
    found = []
    for index in range(9, 15):  # two of them have heads far in front
        rng = rendering.generator(4, index, 1)
        patient = rendering._draw_patient(rng)
        poses = rendering._poses(patient, rng)
        shape = rendering._shape(poses, patient)
        axes = rendering._axes(shape, patient)
        tissue = soft_tissue(np.zeros(shape, np.float32), axes, poses, patient.scale, rng)
        found.append((tissue, axes, poses, patient.scale))
    return found


def voxel(axes: list[np.ndarray], point: np.ndarray) -> tuple[int, ...]:
    return tuple(int(np.searchsorted(axis, p)) for axis, p in zip(axes, point, strict=True))


def test_one_airway_runs_through_all_slices_and_never_opens_to_the_outside(necks):
    for tissue, axes, poses, _ in necks:
        air, _ = ndimage.label(tissue < -500)
        z, y, x = voxel(axes, poses["C3"][0])
        row = air[z, :y, x]
        airway = air == row[np.flatnonzero(row)[-1]]  # what is next in front of C3
        area_mm2 = airway.sum(axis=(1, 2)) * np.ptp(axes[1]) * np.ptp(axes[2]) / airway[0].size
        assert 40 < area_mm2.min() < area_mm2.max() < 600
        for edge in (airway[:, 0], airway[:, -1], airway[:, :, 0], airway[:, :, -1]):
            assert not edge.any()


def test_the_wall_in_front_of_the_spine_is_thin_at_c3_and_thick_at_c6(necks):
    """Rules of radiography: up to 7 mm of soft tissue in front of C3, up to 21 mm in front of C6."""
    wall_mm: dict[str, list[float]] = {"C3": [], "C6": []}
    for tissue, axes, poses, scale in necks:
        for level, its in wall_mm.items():
            z, y, x = voxel(axes, poses[level][0])
            front = axes[1][np.flatnonzero(tissue[z, :y, x] < -500).max()]
            its.append(poses[level][0][1] - front - scale * DIMENSIONS[level].body[1])
    assert 2 < min(wall_mm["C3"]) < max(wall_mm["C3"]) < 7
    assert 7 < min(wall_mm["C6"]) < max(wall_mm["C6"]) < 21


def test_muscle_fat_cartilage_bone_and_air_have_their_hounsfield_values(necks):
    tissue = necks[0][0]
    inside = tissue[tissue > -1000]
    assert np.median(inside) == pytest.approx(55)
    assert 0.05 < np.mean((inside < -80) & (inside > -100)) < 0.4
    assert np.unique(inside[inside > 60]).tolist() == [np.float32(102), 170, 500]  # rings, keel, hyoid
    assert tissue.dtype == np.float32


def test_the_neck_is_narrower_than_the_shoulders(necks):
    for tissue, axes, poses, _ in necks:
        behind = [voxel(axes, poses[level][0])[0] for level in ("C4", "T1")]
        share = [np.mean(tissue[z, -1] > -1000) for z in behind]
        assert share[1] > share[0]
