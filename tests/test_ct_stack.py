"""Slices in order become a volume: places, steps, tilt, values beside each other, series in one."""

import itertools
import shutil
from functools import cache

import nibabel
import numpy as np
import pytest
import scans
from scans import (
    FRAME,
    SPACING,
    affine_of,
    body,
    edit,
    excerpt,
    phantom,
    positions,
    refusal,
    tilted,
    write_dicom,
)

from cspine_helpers.ct import dicom
from cspine_helpers.ct.dicom import read_series
from cspine_helpers.ct.stack import Slice, _check_values, stack
from cspine_helpers.packing.cohort import choose_series

STRAIGHT = np.eye(3)


def real_series() -> np.ndarray:
    return scans.real_series()[:, ::4, ::4]


@cache
def real_volume(name: str) -> tuple[np.ndarray, tuple[float, ...]]:
    """Values and voxel size of a NIfTI file, as nibabel reads them."""
    image = nibabel.load(scans.REAL_CT / name / "ct.nii.gz")
    return np.asanyarray(image.dataobj), image.header.get_zooms()


def headers(places_mm, *, turn=STRAIGHT, spacing=SPACING[1:], decimals=6, names=None) -> list[Slice]:
    """Slices of a series in memory, from `ORIGIN` downwards, with positions rounded as headers round them."""
    known = {"pixel_spacing": "{}\\{}".format(*spacing), "slope": "1", "intercept": "0"}
    known["orientation"] = "\\".join(f"{v:.9f}" for v in turn[:, :2].T.ravel())
    found = []
    for z, place in enumerate(places_mm):
        position = "\\".join(f"{v:.{decimals}f}" for v in scans.ORIGIN - place * turn[:, 2])
        tags = dict.fromkeys(dicom.TAGS) | known | {"position": position, "number": str(z + 1)}
        found.append(Slice(names[z] if names else f"{z:03d}.dcm", (14, 12), tags))
    return found


def rescaled(*, slope=None, intercept=None):
    def change(ds):
        if slope is not None:
            ds.RescaleSlope = slope
        if intercept is not None:
            ds.RescaleIntercept = intercept

    return change


WRONG_RESCALES = {
    "intercept twice": rescaled(intercept=-2048),
    "intercept 0": rescaled(intercept=0),
    "slope -1": rescaled(slope=-1),
    "slope 2": rescaled(slope=2),
    "slope 0.5": rescaled(slope=0.5),
}
WRONG_SLICES = {"first": [0], "last": [11], "several": [1, 4, 5, 9], "half": [6, 7, 8, 9, 10]}


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG_SLICES.values(), ids=WRONG_SLICES)
@pytest.mark.parametrize("change", WRONG_RESCALES.values(), ids=WRONG_RESCALES)
def test_slices_with_a_wrong_rescale_are_refused_by_name(tmp_path, change, wrong):
    """Named are those next to a right one."""
    files = write_dicom(tmp_path, excerpt().hu[:12], SPACING)
    for z in wrong:
        edit(files[z], change)
    edges = [z for z in wrong if {z - 1, z + 1} & set(range(12)) - set(wrong)]
    names = [files[z].name for z in edges]
    message = refusal(lambda: read_series(tmp_path), tmp_path.name, "jump", "rescale", "original", *names)
    assert not [file.name for z, file in enumerate(files) if z not in wrong and file.name in message]


@scans.needs_ct
@pytest.mark.parametrize("change", WRONG_RESCALES.values(), ids=WRONG_RESCALES)
def test_a_real_slice_with_a_wrong_rescale_is_refused_by_name(tmp_path, change):
    """Two millimetres apart, a fifth of it padding."""
    file = write_dicom(tmp_path, real_series(), SPACING)[7]
    edit(file, change)
    refusal(lambda: read_series(tmp_path), "values of 1 slices jump", file.name, "slope 1 and")


def test_a_slice_with_other_values_under_the_same_rescale_is_refused_by_name(tmp_path):
    """As where a tool wrote Hounsfield units into some of the files and left their intercept."""
    hu = excerpt().hu[:12].copy()
    hu[4] -= 1024
    files = write_dicom(tmp_path, hu, SPACING, signed=True)
    refusal(lambda: read_series(tmp_path), tmp_path.name, "values of 1 slices jump", files[4].name)


def _end(share):
    def fill(hu, k, value=0):
        hu[k, round(hu.shape[1] * (1 - share)) :] = value

    return fill


def _noise(hu, k):
    hu[k] = np.random.default_rng(k).integers(-1024, 3000, hu.shape[1:])


def _swapped(hu):
    """As a reader clips them that takes the bytes for the other byte order's, and subtracts 1024."""
    return (np.clip(hu + 1024, 0, 4095).astype(np.uint16).byteswap().astype(int) - 1024).clip(-32768, 32767)


WRONG_VALUES = {  # of a slice whose header is like the others'
    "zeros": _end(1),
    "constant": lambda hu, k: _end(1)(hu, k, 700),
    "half zeros": _end(0.5),
    "an eighth zeros": _end(0.125),
    "noise": _noise,
    "bytes swapped": lambda hu, k: hu.__setitem__(k, (hu[k] + 1024).astype(np.int16).byteswap()),
    "bytes swapped, unsigned": lambda hu, k: hu.__setitem__(k, _swapped(hu[k])),
    "negated": lambda hu, k: hu.__setitem__(k, -hu[k]),
    "shifted": lambda hu, k: hu.__setitem__(k, hu[k] - 1024),
}


@pytest.mark.parametrize("wrong", [[10], [0], [19], [9, 10], range(5, 12)], ids=str)
@pytest.mark.parametrize("change", WRONG_VALUES.values(), ids=WRONG_VALUES)
@pytest.mark.parametrize("which", ["drawn", pytest.param("real", marks=scans.needs_ct)])
def test_a_slice_that_cannot_belong_is_refused_by_name(which, change, wrong):
    """At either end, within, several: named are those next to a right one, and no right one."""
    hu = excerpt().hu[:20].copy() if which == "drawn" else real_series().copy()
    for k in wrong:
        change(hu, k)
    names = [f"{z:02d}.dcm" for z in range(20)]
    edges = [names[z] for z in wrong if {z - 1, z + 1} & set(range(20)) - set(wrong)]
    ordered = headers(range(20), names=names)
    message = refusal(lambda: _check_values(ordered, hu), "slices", "original files", *edges)
    assert not [name for z, name in enumerate(names) if z not in wrong and name in message]
    assert "slope" not in message


def test_air_between_slices_that_show_the_patient_is_refused_and_at_the_ends_it_is_not(tmp_path):
    """Zeros as stored are air: the tail of a file that was never filled, or padding beyond the head."""
    hu = excerpt().hu[:20].copy()
    half = hu.copy()
    half[12, 46:] = -1024
    files = write_dicom(tmp_path / "half", half, SPACING)
    refusal(lambda: read_series(tmp_path / "half"), "1 slices", "constant", files[12].name)
    hu[:2], hu[18:] = -1024, -1024
    write_dicom(tmp_path / "ends", hu, SPACING)
    np.testing.assert_array_equal(read_series(tmp_path / "ends").hu, hu)
    hu[7:9] = -1024
    files = write_dicom(tmp_path / "within", hu, SPACING)
    refusal(lambda: read_series(tmp_path / "within"), "2 slices", "constant", files[7].name, files[8].name)


@scans.needs_ct
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("step_mm", [1, 2, 3, 5, 7, 10, 15])
def test_real_anatomy_cut_along_any_axis_is_no_wrong_slice(step_mm, axis):
    """Skin, table, air before the body, metal, thick steps: a trunk at 3 mm, a lumbar spine at 1.5 mm."""
    for name in ("totalsegmentator_example", "tptbox_lumbar"):
        values, voxel_mm = real_volume(name)
        hu = np.moveaxis(values, axis, 0)[:: max(1, round(step_mm / voxel_mm[axis]))]
        slices = [Slice(str(k), hu.shape[1:], {"slope": "1", "intercept": "0"}) for k in range(len(hu))]
        _check_values(slices, hu)
        _check_values(slices, np.moveaxis(hu, 1, 2))
        _check_values(slices, hu[:, ::-1])


@pytest.mark.parametrize("step", [1, 3, 6])
def test_anatomy_may_change_from_slice_to_slice(tmp_path, step):
    """Thick slices, the head's end, metal, contrast, blank slices: each with its own, right rescale."""
    hu = phantom().hu[::step, ::2, ::2].copy()
    hu[:2], hu[3, 20:40, 20:40], hu[4:6, 30:60, 30:60] = -1024, 3071, 350
    hu[-1] = np.random.default_rng(0).normal(-1000, 15, hu.shape[1:])

    def own(ds, z):
        stored = np.frombuffer(ds.PixelData, np.uint16) + np.uint16(100 * (z % 3))
        ds.RescaleIntercept, ds.PixelData = -1124 - 100 * (z % 3), stored.tobytes()

    write_dicom(tmp_path, hu, SPACING, intercept=-1124, extra=own)
    np.testing.assert_array_equal(read_series(tmp_path).hu, hu)


# Geometry that is repaired by a stated rule.


def blobs(affine: np.ndarray, shape: tuple[int, ...], points: np.ndarray) -> np.ndarray:
    """HU of a scene that exists outside any grid: soft tissue, and a round bright spot at each LPS point."""
    there = positions(affine, np.moveaxis(np.indices(shape), 0, -1))
    hu = np.full(shape, 40.0)
    for point in points:
        hu += 2000 * np.exp(-((there - point) ** 2).sum(axis=-1) / (2 * 3.0**2))
    hu[:, :2] = -100
    return np.rint(hu).astype(np.int16)


def spot(hu: np.ndarray, near: np.ndarray, *, reach=6) -> np.ndarray:
    """(3,) voxel index of the middle of the brightness around `near`, found from the values alone."""
    low = np.maximum(np.rint(near).astype(int) - reach, 0)
    region = hu[tuple(slice(a, a + 2 * reach + 1) for a in low)].astype(float)
    weight = np.clip(region - 400, 0, None)
    assert weight.max() > 1000
    return low + np.array([(weight * axis).sum() / weight.sum() for axis in np.indices(region.shape)])


@pytest.mark.parametrize("orientation", ["IPL", "SPL"])
@pytest.mark.parametrize("degrees", [-22.0, 8.0, 20.0])
def test_a_tilted_gantry_is_straightened_and_said(tmp_path, degrees, orientation):
    spacing, direction, shape = (1.5, 0.9, 0.7), tilted(degrees), (36, 60, 50)
    affine = affine_of(spacing, direction=direction)
    points = positions(affine, np.array([[8, 30, 12], [17, 44, 25], [27, 18, 38.0]]))
    hu = blobs(affine, shape, points)

    def say(ds, _):
        ds.GantryDetectorTilt = degrees

    write_dicom(tmp_path, hu, spacing, direction=direction, orientation=orientation, extra=say)
    volume = read_series(tmp_path)
    for point in points:
        expected = volume.indices(point[None])[0]
        assert np.abs(spot(volume.hu, expected) - expected).max() < 0.5
        np.testing.assert_allclose(volume.points(expected[None])[0], point, atol=1e-6)
    np.testing.assert_allclose(volume.direction.T @ volume.direction, np.eye(3), atol=1e-9)
    assert abs(volume.spacing_mm[0] - 1.5 * np.cos(np.deg2rad(degrees))) < 1e-6
    assert ["tilt" in warning for warning in volume.warnings if "slices" in warning] == [True]
    assert f"{abs(degrees):.1f}°" in " ".join(volume.warnings)
    for number, (first, column, row) in volume.frames.items():  # of the files, not of what was made of them
        z = number - 1 if orientation == "IPL" else shape[0] - number
        there = first + 9 * column + 21 * row
        np.testing.assert_allclose(there, positions(affine, np.array([z, 21, 9])), atol=1e-6)


def test_a_straightened_volume_keeps_all_that_was_seen_and_fills_the_rest_with_air(tmp_path):
    hu = np.full((30, 40, 30), 50, np.int16)
    write_dicom(tmp_path, hu, (2.0, 1.0, 1.0), direction=tilted(15))
    volume = read_series(tmp_path)
    assert volume.hu.min() >= -1024
    seen = (volume.hu > 45).sum(axis=(1, 2))
    assert seen.min() >= 39 * 30 - 30
    assert volume.hu.shape[1] > 40
    assert (volume.hu[0] == -1024).any()
    assert (volume.hu[-1] == -1024).any()


def test_a_header_that_says_tilt_alone_changes_nothing(tmp_path):
    """Spiral scans are made straight by the scanner; the header may keep the tilt."""
    hu = body()

    def say(ds, _):
        ds.GantryDetectorTilt = 15

    write_dicom(tmp_path, hu, SPACING, extra=say)
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.warnings == ()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("drift_mm", "moved"), [(0.11, False), (0.14, True), (-0.11, False), (-0.14, True)])
def test_slices_are_moved_where_they_drift_by_more_than_rounding_makes(tmp_path, axis, drift_mm, moved):
    """Over the whole series; less would blur every slice for nothing."""

    def drift(ds, z):
        ds.ImagePositionPatient[axis] += drift_mm * z / 9

    hu = body()
    write_dicom(tmp_path, hu, SPACING, extra=drift)
    volume = read_series(tmp_path)
    assert ["gantry tilt" in warning for warning in volume.warnings] == [True] * moved
    assert (volume.hu.shape == hu.shape) != moved


def test_more_shift_than_a_gantry_tilts_is_refused(tmp_path):
    write_dicom(tmp_path, body(), SPACING, direction=tilted(50))
    refusal(lambda: read_series(tmp_path), tmp_path.name, "50°", "resample")


@pytest.mark.parametrize("orientation", ["IPL", "SPL"])
def test_mildly_uneven_steps_are_resampled_linearly_and_said(tmp_path, orientation):
    """A ramp along Z is the oracle: linear interpolation keeps it."""
    rng = np.random.default_rng(3)
    places = np.arange(20) + rng.uniform(-0.1, 0.1, 20)
    places[0] = 0
    ramp = np.rint(1000 * places / 20 - 500)[:, None, None]
    hu = np.broadcast_to(ramp, (20, 12, 14)).astype(np.int16)
    turned_places = places if orientation == "IPL" else (places[-1] - places)[::-1] - (places[-1] - 19)
    write_dicom(tmp_path, hu, (2.0, 1.0, 1.0), places=turned_places, orientation=orientation)
    volume = read_series(tmp_path)
    assert volume.hu.shape == hu.shape
    np.testing.assert_allclose(volume.spacing_mm[0], 2.0 * places[-1] / 19, rtol=1e-6)
    middle = volume.points(np.stack([np.arange(20), np.full(20, 6), np.full(20, 7)], axis=1))
    expected = (scans.ORIGIN[2] - middle[:, 2]) / 2.0  # in places, from the first
    assert np.abs(volume.hu[:, 6, 7] - (1000 * expected / 20 - 500)).max() <= 1.5
    assert [warning for warning in volume.warnings if "even steps" in warning]
    assert len(volume.frames) == 20


@pytest.mark.parametrize("decimals", [1, 2])
@pytest.mark.parametrize("step", [0.33, 0.45, 0.625, 0.67, 0.75, 1.25])
def test_positions_rounded_as_headers_are_count_as_even(step, decimals):
    """147 slices of 0.625 mm to one decimal have become 153, resampled."""
    hu = body((147, 14, 12))
    volume = stack(headers(np.arange(147) * step, decimals=decimals), hu)
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.warnings == ()
    np.testing.assert_allclose(volume.spacing_mm[0], step, atol=0.1 / 146)
    np.testing.assert_allclose(volume.origin_mm, scans.ORIGIN, atol=0.06)


@pytest.mark.parametrize("step", [0.33, 0.625, 1.25])
def test_oblique_positions_of_one_decimal_count_as_even_and_straight(step):
    hu, turn = body((147, 14, 12)), scans.rotation(24, -9, 5)
    volume = stack(headers(np.arange(147) * step, turn=turn, spacing=(0.4, 0.4), decimals=1), hu)
    np.testing.assert_array_equal(volume.hu, hu)
    assert ["turned" in warning for warning in volume.warnings] == [True]


@pytest.mark.parametrize("decimals", [1, 2])
@pytest.mark.parametrize("step", [0.33, 0.45, 0.625, 0.67, 0.75, 1.25])
def test_a_slice_that_is_missing_among_rounded_positions_is_refused(step, decimals):
    slices, hu = headers(np.arange(20) * step, decimals=decimals), body((20, 14, 12))
    for lost in (1, 10, 18):
        rest = [its for z, its in enumerate(slices) if z != lost]
        beside = slices[lost - 1].name, slices[lost + 1].name
        refusal(lambda rest=rest, lost=lost: stack(rest, np.delete(hu, lost, 0)), "are missing", *beside)


UNEVEN = {
    "one slice aside": [0, 1, 2, 3, 4.16, 5, 6, 7, 8, 9],
    "drift": (np.arange(100) * 1.0 + 8e-5 * np.arange(100) ** 2).tolist(),
    "one odd step": [0, 1, 2, 3, 4, 4.25, 5.25, 6.25, 7.25, 8.25],
    "one odd step at the end": [0, 1, 2, 3, 4, 5, 6, 6.25],
    "one odd step of four": [0, 1, 1.25, 2.25, 3.25],
    "fine, then coarse": [0, 1, 2, 3, 4, 5, 7, 9, 11, 13],
    "coarse, then fine": [0, 2, 4, 6, 8, 10, 12, 13, 14, 15],
    "with a step between": [0, 1, 2, 3, 4.5, 6.5, 8.5, 10.5, 12.5],
}


@pytest.mark.parametrize(("slope", "kind"), [(1, np.int16), (0.5, np.float32)])
def test_resampled_values_are_rounded_where_they_are_whole(tmp_path, slope, kind):
    """Truncation would move all of them towards zero."""
    hu, places = body()[:8], np.array([0, 1, 2, 3, 4, 4.3, 5.3, 6.3])
    write_dicom(tmp_path, hu, (1.0, 0.75, 0.5), places=places, slope=slope)
    volume = read_series(tmp_path)
    there = np.linspace(0, 6.3, 7)
    linear = np.apply_along_axis(lambda values: np.interp(there, places, values), 0, hu.astype(float))
    assert volume.hu.dtype == kind
    assert np.abs(linear - np.rint(linear)).max() > 0.4
    allowed = 0.5001 if kind == np.int16 else 1e-3
    assert np.abs(volume.hu - linear).max() <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("places", UNEVEN.values(), ids=UNEVEN)
@pytest.mark.parametrize("orientation", ["IPL", "SPL"])
def test_uneven_spacing_beyond_rounding_is_resampled_to_its_usual_step(tmp_path, places, orientation):
    """A ramp along Z is the oracle: linear interpolation keeps it. Of two steps, the finer stays."""
    places, step = np.array(places), 1.25
    ramp = np.rint(1000 * places / places[-1] - 500)[:, None, None]
    hu = np.broadcast_to(ramp, (len(places), 12, 14)).astype(np.int16)
    turned_places = places if orientation == "IPL" else len(places) - 1 - places[::-1]
    write_dicom(tmp_path, hu, (step, 1.0, 1.0), places=turned_places, orientation=orientation)
    volume = read_series(tmp_path)
    assert len(volume.hu) == round(places[-1] / (np.median(np.diff(places)) if len(places) > 20 else 1)) + 1
    assert ["even steps" in warning for warning in volume.warnings] == [True]
    middle = volume.points(np.stack([np.arange(len(volume.hu)), *[np.full(len(volume.hu), 6)] * 2], axis=1))
    expected = (scans.ORIGIN[2] - middle[:, 2]) / step  # in places, from the first
    assert np.abs(volume.hu[:, 6, 7] - (1000 * expected / places[-1] - 500)).max() <= 1.5


TOO_UNEVEN = {
    "every other slice of the middle": [0, 1, 2, 3, 5, 7, 9, 10, 11, 12],
    "two at the end": [0, 1, 2, 3, 4, 5, 7, 9],
    "more steps are long than short": [0, 1, 2.6, 4.2],
    "one of three steps is half of the others": [0, 1, 3, 5],
    "far coarser": [0, 1, 2, 3, 4, 7, 10, 13, 16],
    "a gap at the change": [0, 1, 2, 3, 4, 7, 9, 11, 13],
    "a gap and an odd step": [0, 1, 2, 3, 3.25, 4.25, 5.25, 7.25, 8.25, 9.25, 10.25],
}


@pytest.mark.parametrize("places", TOO_UNEVEN.values(), ids=TOO_UNEVEN)
def test_steps_that_a_scanner_does_not_make_are_refused(tmp_path, places):
    write_dicom(tmp_path, body((len(places), 24, 20)), SPACING, places=places)
    refusal(lambda: read_series(tmp_path), tmp_path.name, "slices")


def test_direction_cosines_that_differ_in_their_last_digits_are_alike(tmp_path):
    """Cosines near half of a hundredth, as a rounding comparison would tear apart."""
    angle = np.arcsin(0.125)
    jitter = np.random.default_rng(0).uniform(-1e-5, 1e-5, 10)

    def shake(ds, z):
        turn = angle + jitter[z]
        ds.ImageOrientationPatient = [1, 0, 0, 0, round(np.cos(turn), 9), round(np.sin(turn), 9)]

    hu = body()
    write_dicom(tmp_path, hu, SPACING, direction=scans.rotation(np.rad2deg(angle)) @ FRAME, extra=shake)
    np.testing.assert_array_equal(read_series(tmp_path).hu, hu)


# Slices that make no volume are refused by name.


@pytest.mark.parametrize("lost", [[4], [3, 4], [2, 6], [2, 4, 6]])
def test_missing_slices_are_refused_with_the_neighbours_of_the_gap(tmp_path, lost):
    files = write_dicom(tmp_path, body(), SPACING)
    for z in lost:
        files[z].unlink()
    names = [files[z].name for k in lost for z in (k - 1, k + 1) if z not in lost]
    refusal(
        lambda: read_series(tmp_path), tmp_path.name, "slices are missing", "mm between", *names, "complete"
    )


def test_slices_twice_are_refused_by_name(tmp_path):
    """Copies that another program wrote; those to the byte are left out."""
    files = write_dicom(tmp_path, body(), SPACING)
    for z, name in {3: "copy.dcm", 7: "another.dcm"}.items():
        shutil.copy(files[z], tmp_path / name)
        edit(tmp_path / name, lambda ds: setattr(ds, "Manufacturer", "Other"))
    parts = ("same position", "copy.dcm", files[3].name, "another.dcm", files[7].name, "keep one")
    refusal(lambda: read_series(tmp_path), tmp_path.name, *parts)


@pytest.mark.parametrize("count", [2, 5])
def test_slices_all_at_one_place_are_refused(tmp_path, count):
    files = write_dicom(tmp_path, body()[:count], SPACING, places=[0] * count)
    refusal(lambda: read_series(tmp_path), "same position", files[0].name, files[1].name)


def test_two_acquisitions_at_the_same_places_are_refused(tmp_path):
    """Before and after contrast under one series UID."""
    write_dicom(tmp_path, body(), SPACING)
    write_dicom(tmp_path, body(seed=1), SPACING, names=[f"late_{z}.dcm" for z in range(10)])
    refusal(lambda: read_series(tmp_path), "same position", *(f"late_{z}.dcm" for z in range(10)))


def test_slices_of_another_size_spacing_or_orientation_are_refused_by_name(tmp_path):
    def smaller(ds):
        ds.Rows, ds.PixelData = 20, ds.PixelData[: 20 * 20 * 2]

    def wider(ds):
        ds.PixelSpacing = [0.8, 0.5]

    def turned(ds):
        ds.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]

    wrong = {"size": smaller, "pixel spacing": wider, "orientation": turned}
    seen = {"size": ("20 × 20", "20 × 24"), "pixel spacing": ("0.800",), "orientation": ()}
    for what, change in wrong.items():
        files = write_dicom(tmp_path / what, body(), SPACING)
        edit(files[2], change)
        edit(files[5], change)
        parts = (what, "2 of 10", files[2].name, files[5].name, *seen[what], "move them out")
        refusal(lambda what=what: read_series(tmp_path / what), *parts)


@pytest.mark.parametrize("element", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_slices_without_a_place_are_refused_by_name(tmp_path, element):
    files = write_dicom(tmp_path, body(), SPACING)
    edit(files[1], lambda ds: delattr(ds, element))
    edit(files[8], lambda ds: setattr(ds, element, None))
    refusal(lambda: read_series(tmp_path), "2 of 10", files[1].name, files[8].name, "headers", "original")


AXES = {
    "not at right angles": ([1, 0, 0, 0.05, 0.99875, 0], False),
    "nor the other way": ([1, 0, 0, -0.05, 0.99875, 0], False),
    "long rows": ([1.02, 0, 0, 0, 1, 0], False),
    "short columns": ([1, 0, 0, 0, 0.98, 0], False),
    "rounded to two digits": ([1, 0, 0, 0, 0.87, 0.5], True),
    "turned within the plane": ([0.985, 0.174, 0, -0.174, 0.985, 0], True),
    "almost at right angles": ([1, 0, 0, 0.009, 1, 0], True),
}


@pytest.mark.parametrize(("axes", "usable"), AXES.values(), ids=AXES)
def test_rows_and_columns_are_unit_vectors_at_right_angles_or_refused(tmp_path, axes, usable):
    normal = np.cross(axes[:3], axes[3:])

    def place(ds, z):
        ds.ImageOrientationPatient = axes
        ds.ImagePositionPatient = [f"{v:.6f}" for v in -normal * z]

    hu = body()
    write_dicom(tmp_path, hu, SPACING, extra=place)
    if usable:
        assert read_series(tmp_path).hu.size == hu.size
    else:
        refusal(lambda: read_series(tmp_path), "10 of 10", "no usable position, orientation")


def test_a_single_slice_is_no_volume(tmp_path):
    files = write_dicom(tmp_path, body()[:1], SPACING)
    refusal(lambda: read_series(tmp_path), files[0].name, "one slice", "whole series")


# Two acquisitions in one series.


def acquired(numbers):
    return lambda ds, z: setattr(ds, "AcquisitionNumber", numbers[z])


def test_acquisition_numbers_that_alternate_in_an_even_stack_are_warned_of(tmp_path):
    """Nothing but the number tells, and some scanners count so."""
    hu = body((20, 24, 20))
    write_dicom(tmp_path, hu, SPACING, extra=acquired([1, 2] * 10))
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    (warning,) = volume.warnings
    assert "acquisition numbers alternate along the slices" in warning


APART = {  # a second sign beside the acquisition's number
    "steps": {"places": [z + 0.3 * (z % 2) for z in range(20)]},
    "instance numbers": {"numbers": [*itertools.chain(*zip(range(1, 11), range(11, 21), strict=True))]},
}


@pytest.mark.parametrize("options", APART.values(), ids=APART)
def test_acquisitions_that_interleave_are_refused_and_one_is_chosen(tmp_path, options):
    hu = body((20, 24, 20))
    names = [f"{z:02d}.dcm" for z in range(20)]
    files = write_dicom(tmp_path, hu, SPACING, names=names, extra=acquired([1, 2] * 10), **options)
    parts = ("2 acquisition numbers", "between each other", "#1", "#2", "10 slices", files[0].name, "series=")
    refusal(lambda: read_series(tmp_path), tmp_path.name, *parts)
    np.testing.assert_array_equal(read_series(tmp_path, series="#2").hu, hu[1::2])


RECONSTRUCTIONS = {
    "convolution kernels": lambda ds, k: setattr(ds, "ConvolutionKernel", ("Br38f", "Br64h Doe^Jane")[k]),
    "image types": lambda ds, k: setattr(ds, "ImageType", ["DERIVED", "PRIMARY", ("AXIAL", "OTHER")[k]]),
    "series times": lambda ds, k: setattr(ds, "SeriesTime", ("101112", "101345.25")[k]),
    "series numbers": lambda ds, k: setattr(ds, "SeriesNumber", 2 + k),
    "slice thicknesses": lambda ds, k: setattr(ds, "SliceThickness", (0.5, 3.0)[k]),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", [0.5, 0.25, 0.0], ids=["half a step apart", "a quarter", "at the same places"]
)
@pytest.mark.parametrize("what", RECONSTRUCTIONS)
def test_two_reconstructions_in_one_series_are_refused_and_one_is_chosen(tmp_path, what, place):
    """Numbered along the slices, as archives do that merge series."""
    hu = body((20, 24, 20))
    where = {
        "places": [z // 2 + place * (z % 2) for z in range(20)],
        "names": [f"{z:02d}" for z in range(20)],
    }
    files = write_dicom(tmp_path, hu, SPACING, extra=lambda ds, z: RECONSTRUCTIONS[what](ds, z % 2), **where)
    parts = (f"2 {what}", "between each other", "2 series in one", "10 slices", files[0].name, files[1].name)
    message = refusal(
        lambda: read_series(tmp_path), tmp_path.name, "series=", f"{scans.SERIES_UID}#1", *parts
    )
    assert "Br" not in message
    for k in (0, 1):
        chosen = read_series(tmp_path, series=f"{scans.SERIES_UID}#{k + 1}")
        np.testing.assert_array_equal(chosen.hu, hu[k::2])
        assert sorted(chosen.frames) == list(range(1 + k, 21, 2))
        assert chosen.warnings == ()
    refusal(lambda: read_series(tmp_path, series=f"{scans.SERIES_UID}#3"), "#1", "#2", "choose")
    asked = f"{scans.SERIES_UID}#2"
    assert choose_series({"1.2.3": tmp_path}, [asked]) == {"1.2.3": asked}


def test_times_that_belong_to_pictures_are_no_sign_of_several_series(tmp_path):
    """Some scanners write the second that a picture was made in, three at a time, in whatever order."""
    hu = body((30, 24, 20))
    times = [f"1011{z * 7 % 10:02d}" for z in range(30)]
    write_dicom(tmp_path, hu, SPACING, extra=lambda ds, z: setattr(ds, "SeriesTime", times[z]))
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.warnings == ()


@pytest.mark.parametrize("odd", [[4], [0, 9], [3, 4, 5]], ids=str)
@pytest.mark.parametrize("what", RECONSTRUCTIONS)
def test_an_odd_tag_in_one_even_series_is_warned_of(tmp_path, what, odd):
    write_dicom(tmp_path, body(), SPACING, extra=lambda ds, z: RECONSTRUCTIONS[what](ds, z in odd))
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, body())
    assert [f"{what} alternate" in warning for warning in volume.warnings] == [True]


def test_a_kernel_that_every_second_slice_lacks_tells_two_series(tmp_path):
    write_dicom(
        tmp_path, body(), SPACING, extra=lambda ds, z: z % 2 and setattr(ds, "ConvolutionKernel", "B30f")
    )
    refusal(lambda: read_series(tmp_path), "2 convolution kernels", "#1", "#2", "5 slices")


@pytest.mark.parametrize("what", RECONSTRUCTIONS)
def test_tags_that_change_once_or_are_missing_here_and_there_are_one_series(tmp_path, what):
    """A scan in two parts; an anonymiser that dropped what it did not know."""
    hu = body()
    write_dicom(tmp_path / "parts", hu, SPACING, extra=lambda ds, z: RECONSTRUCTIONS[what](ds, z // 5))
    write_dicom(tmp_path / "gaps", hu, SPACING, extra=lambda ds, z: z % 3 and RECONSTRUCTIONS[what](ds, 0))
    if what not in ("image types", "slice thicknesses"):  # the writer's own stands in the others
        np.testing.assert_array_equal(read_series(tmp_path / "gaps").hu, hu)
    volume = read_series(tmp_path / "parts")
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.warnings == ()
    np.testing.assert_array_equal(read_series(tmp_path / "parts", series="#1").hu, hu)
    refusal(lambda: read_series(tmp_path / "parts", series="#2"), "one series", "#1")


@pytest.mark.parametrize("numbers", [[2] * 4 + [1] * 6, range(10), [7] * 10], ids=["parts", "each", "one"])
def test_acquisitions_one_after_the_other_are_one_volume(tmp_path, numbers):
    hu = body()
    write_dicom(tmp_path, hu, SPACING, extra=acquired(list(numbers)))
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.warnings == ()


def test_slices_closer_together_than_the_rest_are_refused_by_name(tmp_path):
    """A second acquisition without a number overlaps the end of the first, 0.4 steps below it."""
    places = [0, 1, 2, 3, 4, 5, 6, 7, 7.4, 8, 8.4, 9]
    files = write_dicom(tmp_path, body((12, 24, 20)), SPACING, places=places)
    names = [files[z].name for z in (7, 8, 9, 10)]
    parts = (tmp_path.name, "closer together", "0.50 mm for 1.25 mm", "2 times", "two acquisitions", *names)
    refusal(lambda: read_series(tmp_path), *parts)


@pytest.mark.parametrize(("off_mm", "refused"), [(2.0, True), (0.2, False)], ids=["two", "jitter"])
def test_slices_shifted_to_and_fro_within_their_plane_are_two_acquisitions_and_a_tilt_is_not(
    tmp_path, off_mm, refused
):
    """Every second slice lies aside, on top of a gantry's tilt; pixels are 0.5 mm wide."""

    def aside(ds, z):
        ds.ImagePositionPatient[0] += off_mm * (z % 2)

    write_dicom(tmp_path, body(), SPACING, direction=tilted(12), extra=aside)
    if refused:
        parts = (tmp_path.name, "3.6 pixels", "not evenly", "two acquisitions", "keep one a folder")
        refusal(lambda: read_series(tmp_path), *parts)
    else:
        assert ["gantry tilt" in warning for warning in read_series(tmp_path).warnings] == [True]


def test_numbers_that_jump_to_and_fro_along_the_slices_are_warned_of(tmp_path):
    """Two acquisitions at half a step from each other look like one of half the step."""
    write_dicom(tmp_path / "two", body(), SPACING, numbers=[1, 6, 2, 7, 3, 8, 4, 9, 5, 10])
    (warning,) = read_series(tmp_path / "two").warnings
    assert "instance numbers do not run along the slices" in warning
    for name, numbers in {"down": range(1, 11), "up": range(10, 0, -1), "gaps": range(5, 55, 5)}.items():
        write_dicom(tmp_path / name, body(), SPACING, numbers=list(numbers))
        assert read_series(tmp_path / name).warnings == ()
