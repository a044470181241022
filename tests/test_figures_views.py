import matplotlib
import numpy as np
import pytest

from cspine_helpers.figures.scans import study_views
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.phantom.rendering import Study, render_study

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def study() -> Study:
    return render_study(1, 3, {**dict.fromkeys(VERTEBRAE, 0), "C5": 1})


def test_every_vertebra_has_its_slice_and_broken_ones_say_so(study):
    maps = (study.volume_hu, study.label_map, study.spacing_mm)
    figure = study_views(*maps, fracture_map=study.fracture_map, title=study.uid)
    sagittal, _, *axial = figure.axes
    titles = [axes.get_title(loc="left") or axes.get_title() for axes in axial]
    assert titles == [name + " fractured" * (name == "C5") for name in VERTEBRAE]
    assert [text.get_text() for text in sagittal.texts] == list(VERTEBRAE)
    heights = [text.get_position()[1] for text in sagittal.texts]
    assert heights == sorted(heights)
    assert figure._repr_png_()


def test_vertebrae_that_are_not_there_are_left_out(study):
    label_map = np.where(np.isin(study.label_map, (4, 5)), study.label_map, 0)
    figure = study_views(study.volume_hu, label_map, study.spacing_mm)
    assert len(figure.axes) == 2 + 2


@pytest.fixture(scope="module")
def by_hand() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Volume of which no two voxels are alike, label map of C3 and C5, and fracture map."""
    volume_hu = np.arange(20 * 30 * 24).reshape(20, 30, 24) % 20011 - 1000
    label_map, fracture_map = np.zeros(volume_hu.shape, np.uint8), np.zeros(volume_hu.shape, np.uint8)
    label_map[2:6, 10:16, 8:14] = 3
    label_map[4, 10:16, 6:14] = 3  # the largest cross-section
    label_map[10:15, 14:20, 9:17] = 5
    fracture_map[13, 15:17, 12:14] = 5
    fracture_map[11, 1:12, 1:20] = 5  # larger, but outside the vertebra
    return volume_hu, label_map, fracture_map


def shown(axes) -> np.ndarray:
    (image,) = axes.images
    assert image.get_clim() == (-300, 1200)
    return image.get_array()


def test_each_picture_is_the_plane_it_claims_to_be(by_hand):
    volume_hu, label_map, fracture_map = by_hand
    figure = study_views(volume_hu, label_map, (2.0, 1.0, 0.5), fracture_map=fracture_map, title="1.2.3")
    side, front, c3, c5 = figure.axes
    np.testing.assert_array_equal(shown(side), volume_hu[:, :, 12])  # between 10 and 13, the boxes' middles
    slopes = (
        np.interp(np.arange(20), [3.5, 12], [10.5, 14.5]).round().astype(int)
    )  # front thirds of the blocks
    np.testing.assert_array_equal(shown(front), volume_hu[np.arange(20), slopes])
    np.testing.assert_array_equal(shown(c3), volume_hu[4, 5:21, 1:19])  # five voxels around the box
    np.testing.assert_array_equal(shown(c5), volume_hu[13, 9:25, 4:22])  # where its bone is broken
    assert [axes.get_aspect() for axes in figure.axes] == [2, 4, 2, 2]
    assert [len(axes.collections) for axes in figure.axes] == [1, 0, 0, 1]  # contours, where it is broken
    (path,) = c5.collections[0].get_paths()
    assert path.get_extents().bounds == pytest.approx((7.5, 5.5, 2, 2))  # of the vertebra's voxels alone
    assert [(text.get_text(), *text.get_position()) for text in side.texts] == [
        ("C3", 7, 3.5),
        ("C5", 11, 12),
    ]
    assert [text.get_position()[0] for text in front.texts] == [3, 6]
    assert figure._suptitle.get_text() == "1.2.3"


def test_without_a_fracture_map_nothing_is_said_to_be_broken(by_hand):
    volume_hu, label_map, _ = by_hand
    figure = study_views(volume_hu, label_map, (2.0, 1.0, 0.5))
    assert not any(axes.collections for axes in figure.axes)
    c3, c5 = figure.axes[2:]
    assert [axes.get_title(loc="left") for axes in (c3, c5)] == ["C3", "C5"]
    np.testing.assert_array_equal(shown(c5), volume_hu[10, 9:25, 4:22])  # the first of equal slices


def test_at_the_edge_of_the_ct_the_crop_ends_there(by_hand):
    volume_hu, label_map, _ = by_hand
    moved = np.roll(label_map, (-12, -6), axis=(1, 2)) * (np.arange(20) > 8)[:, None, None]  # C5 at y 2, x 3
    figure = study_views(volume_hu, moved, (2.0, 1.0, 0.5))
    np.testing.assert_array_equal(shown(figure.axes[2]), volume_hu[10, :13, :16])
