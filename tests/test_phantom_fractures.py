import numpy as np
import pytest

from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.phantom.anatomy import DIMENSIONS, LocalGrid, vertebra_distance
from cspine_helpers.phantom.fractures import (
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


DRAWS = 1500


def drawn(level: str) -> tuple[list[Compression], list[list[Crack]], list[list[str]]]:
    """Compressions, cracks and the sites of these, of as many draws."""
    places = sites(level)
    points = np.array([point for point, _, _ in places.values()])
    compressions, cracks, where = [], [], []
    for seed in range(DRAWS):
        found = draw_fractures(level, np.random.default_rng(seed))
        if isinstance(found[0], Compression):
            compressions += found
            continue
        cracks.append(found)
        away = [
            np.linalg.norm(points * [side, 1, 1] - [crack.point], axis=1)
            for crack in found
            for side in (-1, 1)
        ]
        nearest = np.minimum(away[::2], away[1::2]).argmin(axis=1)
        where.append([list(places)[site] for site in nearest])
    return compressions, cracks, where


def spans(values, low: float, high: float) -> bool:
    """All within the range, and some near both of its ends."""
    room = 0.05 * (high - low)
    return low <= min(values) < low + room and high - room < max(values) <= high


@pytest.mark.parametrize(("level", "most"), [("C1", ""), ("C2", "dens"), ("C7", "spinous process")])
def test_fractures_are_drawn_as_often_and_as_large_as_meant(level, most):
    compressions, cracks, where = drawn(level)
    assert len(compressions) / DRAWS == pytest.approx(0 if level in ("C1", "C2") else 0.3, abs=0.04)
    numbers = np.bincount([len(one) for one in cracks], minlength=4) / len(cracks)
    assert numbers == pytest.approx([0, 0.4, 0.4, 0.2], abs=0.05)
    assert all(len(set(names)) == len(names) for names in where)  # two of one vertebra are at two sites
    first = [names[0] for names in where]  # drawn by weight alone
    weights = {name: {"dens": 4, "spinous process": 2}[name] if name == most else 1 for name in sites(level)}
    for name, weight in weights.items():
        assert first.count(name) / len(first) == pytest.approx(weight / sum(weights.values()), abs=0.04)
    if compressions:
        assert spans([one.loss_mm for one in compressions], 1.6, 5.0)
    assert all(len({crack.gap_mm for crack in one}) == 1 for one in cracks)  # one grade a vertebra
    every = [crack for one in cracks for crack in one]
    names = [name for one in where for name in one]
    assert spans([crack.gap_mm for crack in every], 0.7, 2.3)
    assert np.mean([crack.gap_mm for crack in every]) == pytest.approx(
        0.7 + 1.6 * 1.8 / 3.2, abs=0.05
    )  # of the beta
    assert spans([crack.phase for crack in every], 0, 6.28)
    meant = [sites(level)[name] for name in names]
    clear = [name in ("posterior arch", "transverse process", "spinous process") for name in names]
    reach = [crack.reach_mm / its[2] for crack, its, known in zip(every, meant, clear, strict=True) if known]
    assert spans(reach, 1.0, 1.3)
    np.testing.assert_allclose([np.linalg.norm(crack.normal) for crack in every], 1)
    sides = [
        crack.point[0] * its[0][0] > 0 for crack, its in zip(every, meant, strict=True) if abs(its[0][0]) > 4
    ]
    assert np.mean(sides) == pytest.approx(0.5, abs=0.05)
    for crack, its in zip(every, meant, strict=True):
        if abs(its[0][0]) > 4:  # a plane on the other side is the mirror image
            mirror = np.array([np.sign(crack.point[0]), 1, 1])
            assert np.dot(crack.normal, its[1] * mirror) > 0.4
    moved = [np.linalg.norm(crack.shift_mm) / (3 * (crack.gap_mm - 0.7) / 1.6) for crack in every]
    assert np.mean(np.equal(moved, 0)) == pytest.approx(0.25, abs=0.04)
    assert spans([share for share in moved if share], 0.4, 1.0)
    along = [
        np.dot(crack.shift_mm, crack.normal) / np.linalg.norm(crack.shift_mm)
        for crack in every
        if any(crack.shift_mm)
    ]
    assert 0.3 < np.mean(along) < 0.5  # rather outwards


def test_look_alikes_are_drawn_as_often_and_as_large_as_meant():
    a, b, h = DIMENSIONS["C5"].body
    found: dict[str, list[Mimic]] = {}
    for seed in range(DRAWS):
        for mimic in draw_mimics("C5", np.random.default_rng(seed)):
            vein = mimic.kind == "channel" and mimic.start == (0.0, b, 0.0)
            found.setdefault("vein" if vein else mimic.kind, []).append(mimic)
        for mimic in draw_mimics("C1", np.random.default_rng(seed)):
            found.setdefault("C1", []).append(mimic)
    meant = {
        "vein": (0.5, 0.6, 1.1),
        "channel": (0.35, 0.5, 0.9),
        "osteophyte": (0.4, 1.2, 2.2),
        "sclerosis": (0.3, 2.0, 3.5),
        "ossicle": (0.2, 1.3, 2.3),
        "C1": (0.35, 0.5, 0.9),
    }
    assert set(found) == set(meant)
    for kind, (share, low, high) in meant.items():
        assert len(found[kind]) / DRAWS == pytest.approx(share, abs=0.04)
        assert spans([mimic.radius_mm for mimic in found[kind]], low, high)
    start = {kind: np.array([mimic.start for mimic in its]) for kind, its in found.items()}
    end = {kind: np.array([mimic.end for mimic in its]) for kind, its in found.items()}
    assert spans(end["vein"][:, 1], -3, 2)
    for axis, half in enumerate((a, b, h)):
        assert spans(start["channel"][:, axis], -0.6 * half, 0.6 * half)
        assert np.abs(end["channel"][:, axis]).max() == pytest.approx(0.65 * half)  # never through the cortex
    for kind, inside in (("osteophyte", 0.5), ("sclerosis", 1.0)):  # at either endplate
        assert {*start[kind][:, 2]} == {*end[kind][:, 2]} == {h - inside, inside - h}
        assert np.mean(start[kind][:, 2] > 0) == pytest.approx(0.5, abs=0.07)
    assert spans(start["osteophyte"][:, 0], -0.6 * a, 0.6 * a)
    assert (start["osteophyte"][:, 1] == -b).all()
    assert spans(end["osteophyte"][:, 1], -b - 3, -b - 1)
    assert spans(end["sclerosis"][:, 0], 0.3 * a, 0.7 * a)
    np.testing.assert_array_equal(start["sclerosis"][:, 0], -end["sclerosis"][:, 0])
    np.testing.assert_allclose(end["ossicle"] - start["ossicle"], [[1, 0.5, 1]] * len(end["ossicle"]))
    assert {*start["C1"][:, 0]} == {-15, 15}
    assert (np.sign(start["C1"][:, 0]) == np.sign(end["C1"][:, 0])).all()


def line(*, z=(0.0,), y=(0.0,), x=(0.0,)) -> LocalGrid:
    """A grid of evenly spaced positions along each axis, its origin the vertebra's."""
    steps = np.array([axis[1] - axis[0] if len(axis) > 1 else 1.0 for axis in (z, y, x)])
    return LocalGrid(np.array([axis[0] for axis in (z, y, x)]), (len(z), len(y), len(x)), steps, np.eye(3))


def test_the_dark_line_of_a_crack_is_as_wide_as_its_gap_and_ends_at_its_reach():
    cube = np.linspace(-4, 4, 41)
    here = line(z=cube, y=cube, x=cube)
    plane = np.sqrt(0.5)  # the plane stands along z, in the cube's diagonal; its waves run along it
    inner = np.abs(here.x + here.y) < 4.1  # 8.2 mm high and 8.2 √0.5 mm wide, away from the edges
    for gap in (1.0, 2.0):
        hu = np.full(here.x.shape, 400.0, np.float32)
        crack = Crack((0.0, 0.0, 0.0), (plane, -plane, 0.0), 50.0, gap, phase=1.0)
        truth = break_bone([crack], "C5", here, np.full(here.x.shape, -1.0), hu)
        dark_mm3 = ((400 - hu) / (400 - BLOOD_HU))[inner].sum() * 0.2**3
        assert dark_mm3 == pytest.approx(gap * 8.2 * 8.2 * plane, rel=0.03)
        assert hu.min() == pytest.approx(BLOOD_HU, abs=0.1)
        np.testing.assert_array_equal(truth, (400 - hu) > 0.4 * (400 - BLOOD_HU))
        assert not break_bone([crack], "C5", here, np.full(here.x.shape, 0.1), hu).any()  # outside bone
    outwards = line(y=np.linspace(0, 12, 25))
    hu = np.full(outwards.x.shape, 400.0, np.float32)
    break_bone([Crack((0.0, 0.0, 0.0), (1.0, 0.0, 0.0), 10.0, 4.0)], "C5", outwards, hu.copy(), hu)
    along = hu[0, :, 0]
    assert along[:19] == pytest.approx(BLOOD_HU)  # up to 9 mm
    assert (along[20:] == 400).all()  # from 10 mm
    assert along[19] == pytest.approx(400 - 340 * 6 * (1 - 0.95**2), abs=0.1)  # between them it fades


def test_waves_of_a_crack_are_half_a_millimetre_high_and_begin_at_its_phase():
    crack = Crack((1.0, 2.0, 3.0), (0.0, 0.0, 1.0), 10.0, 1.0, phase=np.pi / 2)
    side, far = crack.side(*(np.array([p], np.float32) for p in crack.point))
    assert (side[0], far[0]) == (pytest.approx(0.5), 0)
    half_wave = np.float32(np.pi / 0.7)
    side, far = crack.side(np.float32([1]) + half_wave, np.float32([2]), np.float32([3]))
    assert (side[0], far[0]) == (pytest.approx(-0.5), pytest.approx(half_wave**2 / 100))
    assert crack.bounds() == ((-9, -8, -7), (11, 12, 13))


def test_a_fragment_moves_by_its_shift_near_the_crack_and_less_further_away():
    here = line(y=np.linspace(0, 10, 21), x=(-3.0, 3.0))
    crack = Crack((0.0, 0.0, 0.0), (1.0, 0.0, 0.0), np.sqrt(48.0), 1.0, (1.0, -2.0, 0.5))
    bent = displace([crack], "C5", here)
    for axis, shift in (("x", 1.0), ("y", -2.0), ("z", 0.5)):
        moved = getattr(here, axis) - getattr(bent, axis)
        assert (moved[:, :, 0] == 0).all()  # the other side stays
        assert moved[0, 0, 1] / shift == pytest.approx(1)  # 9 of 48
        assert moved[0, 6, 1] / shift == pytest.approx(1.5 * (1 - 18 / 48))  # at y = 3
        assert (moved[0, 13:, 1] == 0).all()  # beyond its reach
    still = displace([Crack((0.0, 0.0, 0.0), (1.0, 0.0, 0.0), 7.0, 1.0)], "C5", here)
    np.testing.assert_array_equal(still.y, here.y)


def test_a_pressed_body_loses_all_its_loss_in_front_half_in_the_middle_and_none_behind_or_beside():
    a, b, h = DIMENSIONS["C5"].body
    z = np.linspace(-h, h, 123)  # steps of 0.1 mm
    for y, x, loss in (
        (-b, 0, 4),
        (0, 0, 2),
        (b, 0, 0),
        (0, a, 2),
        (0, a + 1.5, 1),
        (0, a + 3, 0),
        (-b - 5, 0, 0),
    ):
        bent = displace([Compression(4.0)], "C5", line(z=z, y=(y,), x=(x,))).z[:, 0, 0]
        assert bent[round(10 * loss)] == pytest.approx(-h, abs=1e-4)  # the endplate comes to lie here
        assert bent[-1] == pytest.approx(h, abs=1e-4)
        middle = (h + (loss - h)) / 2  # of what is left of the body
        assert np.interp(middle, z, bent) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("loss", "at_the_middle", "is_true"), [(4.0, 120 + 360, True), (1.5, 127.5, False), (1.7, 154.7, True)]
)
def test_pressed_bone_is_dense_two_millimetres_below_its_endplate(loss, at_the_middle, is_true):
    _, _, h = DIMENSIONS["C5"].body
    z = np.array([-1.0, -0.5, 0.75, 2.0, 3.25, 4.5, 5.0]) + loss / 2 - h  # at y = 0 half of the loss
    for depth, share in zip(z, (0, 0, 0.5, 1, 0.5, 0, 0), strict=True):
        hu = np.full((1, 1, 1), 400.0, np.float32)
        truth = break_bone([Compression(loss)], "C5", line(z=(depth,)), np.full((1, 1, 1), -1.0), hu)
        assert hu.item() - 400 == pytest.approx(share * at_the_middle, abs=0.1)
        assert truth.item() == (is_true and share * min(loss / 3, 1) > 0.3)


def test_look_alikes_have_their_density_along_and_across():
    y = np.arange(-6.0, 7.0)
    for kind, radius, expected in (
        (
            "channel",
            1.4,
            {0: 30, 1: 30 + 370 * 0.1, 2: 580, 3: 400},
        ),  # 0.4 mm inside, 0.6 mm outside the wall
        ("sclerosis", 2.0, {0: 780, 1: 590, 2: 400, 3: 400}),
        ("osteophyte", 2.0, dict.fromkeys(range(4), 400)),
        ("ossicle", 2.0, dict.fromkeys(range(4), 400)),
    ):
        here = line(z=np.arange(-8.0, 9.0), y=y)
        hu, distance = np.full(here.x.shape, 400.0, np.float32), np.full(here.x.shape, 0.5, np.float32)
        add_mimics([Mimic(kind, (0.0, 0.0, -4.0), (0.0, 0.0, 2.0), radius)], here, distance, hu)
        for away, value in expected.items():
            for axis, place in ((4, 6 + away), (4, 6 - away), (7, 6 + away)):  # z = -4 and -1
                assert hu[axis, place, 0] == pytest.approx(value, abs=1.0)
        assert (hu[[0, 16]] == 400).all()  # beyond both ends
        assert hu[4 - 1, 6, 0] == hu[10 + 1, 6, 0] == hu[4, 7, 0]  # which are round
        bone = kind in ("osteophyte", "ossicle")
        assert distance[4, 6, 0] == (pytest.approx(-2) if bone else 0.5)
        assert distance[4, 7, 0] == (pytest.approx(-1) if bone else 0.5)
        assert distance[4, 10, 0] == 0.5  # bone that is there stays


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
