import numpy as np
import pytest

from cspine_helpers.anatomy import DIMENSIONS, LocalGrid, vertebra_distance
from cspine_helpers.fractures import (
    BLOOD_HU,
    Compression,
    Crack,
    Mimic,
    add_mimics,
    break_bone,
    displace,
    draw_fractures,
    draw_mimics,
    sites,
)
from cspine_helpers.labels import VERTEBRAE

BODY_LINE = Crack(point=(0.0, 0.0, 0.0), normal=(1.0, 0.0, 0.0), reach_mm=12.0, gap_mm=2.0)


def grid() -> LocalGrid:
    return LocalGrid(np.array([-25.0, -20.0, -40.0]), (51, 81, 81), np.ones(3), np.eye(3))


def broken(level, fractures):
    straight = grid()
    distance = vertebra_distance(level, displace(fractures, level, straight))
    hu = np.full(distance.shape, 400.0, np.float32)
    return distance, hu, break_bone(fractures, level, straight, distance, hu)


@pytest.mark.parametrize("level", VERTEBRAE)
def test_every_site_lies_in_the_bone_of_its_level(level):
    distance = vertebra_distance(level, grid())
    for name, (point, normal, _) in sites(level).items():
        x, y, z = (round(p) for p in point)
        assert distance[z + 22 : z + 29, y + 17 : y + 24, x + 37 : x + 44].min() < 0, name
        assert np.linalg.norm(normal) == pytest.approx(1, abs=0.15), name


def test_a_crack_is_dark_within_its_reach_and_true_only_in_bone():
    distance, hu, truth = broken("C5", [BODY_LINE])
    assert hu[25, 20, 40] == pytest.approx(BLOOD_HU, abs=1)
    assert hu[25, 20, 46] == 400
    assert truth.any()
    assert (distance[truth] < 0).all()
    assert not truth[:, 40:, :].any()  # beyond its reach


def test_a_displaced_fragment_leaves_its_place_and_the_rest_stays():
    intact = vertebra_distance("C5", grid())
    moved, _, _ = broken("C5", [Crack((0.0, 0.0, 0.0), (1.0, 0.0, 0.0), 14.0, 1.0, (0.0, -5.0, 0.0))])
    front = -round(DIMENSIONS["C5"].body[1]) - 1
    assert intact[25, front + 20, 44] > 0 > moved[25, front + 20, 44]
    np.testing.assert_array_equal(intact[:, :, :38], moved[:, :, :38])


def test_compression_takes_height_in_front_and_none_behind():
    intact = vertebra_distance("C5", grid()) < 0
    pressed, hu, truth = broken("C5", [Compression(4.0)])
    pressed = pressed < 0
    front, back = 20 - 5, 20 + 5
    assert intact[:, front, 40].sum() - pressed[:, front, 40].sum() in (2, 3, 4)
    assert abs(int(intact[:, back, 40].sum()) - int(pressed[:, back, 40].sum())) <= 1
    assert truth.any()
    assert hu[truth].mean() > 500


@pytest.mark.parametrize("level", VERTEBRAE)
def test_drawn_fractures_break_bone_and_nothing_is_broken_without_them(level):
    for seed in range(12):
        fractures = draw_fractures(level, np.random.default_rng(seed))
        assert broken(level, fractures)[2].sum() >= 20
    _, hu, truth = broken(level, [])
    assert not truth.any()
    assert (hu == 400).all()


def test_look_alikes_are_of_four_kinds_and_never_truth():
    kinds = set()
    for seed in range(60):
        mimics = draw_mimics("C5", np.random.default_rng(seed))
        kinds |= {mimic.kind for mimic in mimics}
        distance = vertebra_distance("C5", grid())
        hu = np.full(distance.shape, 400.0, np.float32)
        add_mimics(mimics, grid(), distance, hu)
        assert not break_bone([], "C5", grid(), distance, hu).any()
    assert kinds == {"channel", "osteophyte", "sclerosis", "ossicle"}


def test_a_channel_darkens_marrow_and_an_osteophyte_adds_bone():
    distance = vertebra_distance("C5", grid())
    hu = np.full(distance.shape, 400.0, np.float32)
    add_mimics([Mimic("channel", (0.0, 6.0, 0.0), (0.0, -4.0, 0.0), 1.2)], grid(), distance, hu)
    assert hu[25, 21, 40] < 100
    assert hu[25, 21, 36] == 400
    before = distance.copy()
    add_mimics([Mimic("osteophyte", (0.0, -8.0, 5.5), (0.0, -11.0, 5.5), 2.0)], grid(), distance, hu)
    assert before[30, 9, 40] > 0 > distance[30, 9, 40]
    add_mimics([Mimic("sclerosis", (-3.0, 0.0, 5.0), (3.0, 0.0, 5.0), 3.0)], grid(), distance, hu)
    assert hu[30, 20, 40] > 600
