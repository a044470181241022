import gzip
import itertools
import sys
import zlib
from dataclasses import replace
from functools import cache
from pathlib import Path

import nibabel
import numpy as np
import pytest
import scans
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.data import get_testdata_file
from scans import (
    FRAME,
    ORIENTATIONS,
    SPACING,
    affine_of,
    assert_private,
    excerpt,
    landmarks,
    phantom,
    positions,
    refusal,
    resampled,
    save_nifti,
    turned,
    write_dicom,
    write_nifti,
)
from scipy import ndimage

from cspine_helpers.ct.masks import read_label_map
from cspine_helpers.ct.reading import read_ct
from cspine_helpers.ct.volume import Volume, bounding_box
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.packed import PackedVertebra
from cspine_helpers.packing.crop import PackConfig, pack_vertebra
from cspine_helpers.phantom import scanner as export

CONFIG = PackConfig(slices=7, size=56)
TRUNK_LEVELS = dict(zip(range(33, 26, -1), VERTEBRAE, strict=True)) | {26: "S1"}  # T11 … L5 as C1 … C7
TPTBOX_LEVELS = {21: "C1", 22: "C2", 23: "C3"}
BODY, ARCH, SPINOUS = (49, 50), (41,), (42,)  # of tptbox_lumbar's subregions


def packed(hu: np.ndarray, labels: np.ndarray, spacing_mm) -> dict[str, PackedVertebra]:
    present = [v for i, v in enumerate(VERTEBRAE, start=1) if (labels == i).any()]
    return {v: pack_vertebra(hu, labels, spacing_mm, v, CONFIG) for v in present}


def same(ours: dict[str, PackedVertebra], theirs: dict[str, PackedVertebra]) -> None:
    assert ours.keys() == theirs.keys()
    for vertebra, piece in ours.items():
        other = theirs[vertebra]
        np.testing.assert_array_equal(piece.array, other.array)
        np.testing.assert_array_equal(piece.slice_indices, other.slice_indices)
        assert (piece.rows, piece.columns) == (other.rows, other.columns)
        assert abs(piece.mask_volume_mm3 / other.mask_volume_mm3 - 1) < 1e-5


# The same arrays, however they were stored.


def test_all_48_axis_orders_of_a_nifti_pack_to_the_arrays_in_memory(tmp_path):
    """The mask is stored in yet another order than its CT."""
    scan = excerpt()
    expected = packed(scan.hu, scan.labels, scan.spacing_mm)
    assert len(set(ORIENTATIONS)) == 48
    assert len(expected) == 3
    for ours, theirs in zip(ORIENTATIONS, np.roll(ORIENTATIONS, 17), strict=True):
        ct = write_nifti(tmp_path / "ct.nii", scan.hu, scan.spacing_mm, orientation=ours)
        mask = write_nifti(tmp_path / "mask.nii", scan.labels, scan.spacing_mm, orientation=theirs)
        volume = read_ct(ct)
        np.testing.assert_array_equal(volume.hu, scan.hu, err_msg=ours)
        assert volume.hu.dtype == np.int16
        np.testing.assert_allclose(volume.direction, FRAME, atol=1e-5)
        np.testing.assert_allclose(volume.origin_mm, scans.ORIGIN, atol=1e-3)
        found = read_label_map(mask, volume).array
        np.testing.assert_array_equal(found, scan.labels, err_msg=theirs)
    same(packed(volume.hu, found, volume.spacing_mm), expected)


def test_dicom_with_shuffled_names_from_the_feet_up_packs_to_the_arrays_in_memory(tmp_path):
    """And as the labels mark the frame: C1 above C7, the front of the neck before its back."""
    scan = phantom()
    write_dicom(tmp_path / "ct", scan.hu, scan.spacing_mm, orientation="SPL")
    mask = write_nifti(tmp_path / "mask.nii.gz", scan.labels, scan.spacing_mm, orientation="LAS")
    volume = read_ct(tmp_path / "ct")
    found = read_label_map(mask, volume).array
    same(packed(volume.hu, found, volume.spacing_mm), packed(scan.hu, scan.labels, scan.spacing_mm))
    tops = [bounding_box(found, label)[0][0] for label in range(1, 8)]
    assert tops[1:] == sorted(tops[1:])
    assert tops[0] <= tops[1]


@pytest.mark.parametrize("codes", [(2, 0), (1, 0), (0, 1), (1, 1), (4, 2)])
def test_either_form_of_a_nifti_header_says_where_the_patient_lies(tmp_path, codes):
    scan = excerpt()
    path = write_nifti(tmp_path / "ct.nii.gz", scan.hu, scan.spacing_mm, orientation="PIR", codes=codes)
    volume = read_ct(path)
    np.testing.assert_array_equal(volume.hu, scan.hu)
    np.testing.assert_allclose(volume.origin_mm, scans.ORIGIN, atol=1e-3)
    np.testing.assert_allclose(volume.spacing_mm, scan.spacing_mm, rtol=1e-5)


def test_dicom_and_nifti_of_one_scan_are_one_volume(tmp_path):
    scan, direction = excerpt(), scans.rotation(9, -12, 5) @ FRAME
    write_dicom(tmp_path / "dicom", scan.hu, scan.spacing_mm, direction=direction)
    path = write_nifti(tmp_path / "ct.nii", scan.hu, scan.spacing_mm, direction=direction, orientation="ASR")
    ours, theirs = read_ct(tmp_path / "dicom"), read_ct(path)
    np.testing.assert_array_equal(ours.hu, theirs.hu)
    np.testing.assert_allclose(ours.origin_mm, theirs.origin_mm, atol=1e-3)
    np.testing.assert_allclose(ours.direction, theirs.direction, atol=1e-5)


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.float32, np.float64])
def test_hounsfield_units_are_the_same_in_every_type_of_a_nifti(tmp_path, kind):
    scan = excerpt()
    path = write_nifti(tmp_path / "ct.nii", scan.hu.astype(kind), scan.spacing_mm)
    volume = read_ct(path)
    np.testing.assert_array_equal(volume.hu, scan.hu)
    assert volume.hu.dtype == (np.int16 if np.dtype(kind).kind == "i" else np.float32)


def test_voxels_without_a_value_are_air(tmp_path):
    """Tools that cut a field of view out write NaN around it."""
    hu = excerpt().hu.astype(np.float32)
    hu[:2], hu[2, 5], hu[3, 5] = np.nan, np.inf, -np.inf
    volume = read_ct(write_nifti(tmp_path / "ct.nii", hu, SPACING))
    assert np.isfinite(volume.hu).all()
    np.testing.assert_array_equal(volume.hu[4:], hu[4:])
    assert (volume.hu[:2] <= -1000).all()


def test_a_scaled_nifti_is_read_in_hounsfield_units(tmp_path):
    path = write_nifti(tmp_path / "ct.nii", excerpt().hu * 2 + 200, SPACING)
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([0.5, -100], np.float32).tobytes()  # scl_slope, scl_inter
    path.write_bytes(content)
    np.testing.assert_array_equal(read_ct(path).hu, excerpt().hu)


# Places.


def check_landmarks(volume: Volume, scan: scans.Scan, affine: np.ndarray) -> None:
    """The middle of each vertebra in patient coordinates lands on the voxel that was there."""
    for vertebra, middle in landmarks(scan).items():
        voxel = np.rint(middle).astype(int)
        found = volume.indices(positions(affine, voxel)[None])[0]
        assert np.abs(found - voxel).max() < 0.05, vertebra
        np.testing.assert_allclose(volume.points(found[None])[0], positions(affine, voxel), atol=1e-6)


@settings(max_examples=12)
@given(
    angles=st.tuples(*[st.floats(-18, 18)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 5.0)] * 3),
    origin=st.tuples(*[st.floats(-900, 900)] * 3),
    orientation=st.sampled_from(ORIENTATIONS),
    as_dicom=st.booleans(),
)
def test_landmarks_land_within_a_voxel_whatever_the_grid(
    tmp_path_factory, angles, spacing, origin, orientation, as_dicom
):
    """The picture is not resampled, so that the landmark's own voxel is found by its value."""
    folder, scan = tmp_path_factory.mktemp("scan"), excerpt()
    scan = scans.Scan(scan.hu[::4, ::4, ::4], scan.labels[::4, ::4, ::4], spacing)
    where = {"direction": scans.rotation(*angles) @ FRAME, "origin_mm": origin, "orientation": orientation}
    if as_dicom:
        write_dicom(folder / "ct", scan.hu, spacing, **where)
        volume = read_ct(folder / "ct")
    else:
        volume = read_ct(write_nifti(folder / "ct.nii", scan.hu, spacing, **where))
    np.testing.assert_array_equal(volume.hu, scan.hu)
    np.testing.assert_allclose(volume.spacing_mm, spacing, rtol=1e-4)
    affine = affine_of(spacing, direction=where["direction"], origin_mm=origin)
    check_landmarks(volume, scan, affine)


@pytest.mark.parametrize(
    ("angles", "spacing"),
    [
        ((28, 0, 0), (0.9, 0.7, 0.5)),
        ((0, -25, 0), (3.0, 0.5, 0.9)),
        ((-14, 11, 17), (0.7, 1.1, 0.8)),
    ],
)
def test_packed_pixels_show_what_lies_at_their_place_in_the_patient(tmp_path, angles, spacing):
    """The phantom scanned on an oblique grid, its mask on its own: moved by a voxel, less of both agrees."""
    scan = excerpt()
    straight, direction = affine_of(scan.spacing_mm), scans.rotation(*angles) @ FRAME
    middle = positions(straight, (np.array(scan.hu.shape) - 1) / 2)
    shape = tuple(np.ceil(np.array([58, 62, 70]) / spacing).astype(int))
    origin = middle - direction @ ((np.array(shape) - 1) / 2 * spacing)
    oblique = affine_of(spacing, direction=direction, origin_mm=origin)
    hu = np.rint(resampled(scan.hu.astype(np.float32), straight, oblique, shape, order=1)).astype(np.int16)
    write_dicom(tmp_path / "ct", hu, spacing, direction=direction, origin_mm=origin, orientation="SPL")
    mask = write_nifti(tmp_path / "mask.nii", scan.labels, scan.spacing_mm, orientation="LAS")
    volume = read_ct(tmp_path / "ct")
    labels = read_label_map(mask, volume).array
    back = np.linalg.inv(straight)
    for value, vertebra in ((4, "C4"), (5, "C5"), (6, "C6")):
        piece = pack_vertebra(volume.hu, labels, volume.spacing_mm, vertebra, CONFIG)
        ours = piece.array[..., 5] > 127
        agreement = {}
        for shift in itertools.product((-1, 0, 1), repeat=3):
            centres = [
                first + (np.arange(CONFIG.size) + 0.5) * (stop - first) / CONFIG.size - 0.5
                for first, stop in (piece.rows, piece.columns)
            ]
            there = np.stack(np.meshgrid(piece.slice_indices, *centres, indexing="ij"), axis=-1)
            index = positions(back, positions(oblique, there + np.array(shift)))
            theirs = ndimage.map_coordinates(scan.labels, np.moveaxis(index, -1, 0), order=0) == value
            agreement[shift] = 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())
        assert max(agreement, key=agreement.get) == (0, 0, 0), (vertebra, agreement)
        assert agreement[0, 0, 0] > 0.85


def test_indices_and_points_are_each_other_undone():
    rng = np.random.default_rng(0)
    volume = Volume(
        np.zeros((2, 3, 4), np.int16), (3.0, 0.4, 0.7), rng.normal(size=3), scans.rotation(20, 5, -9) @ FRAME
    )
    indices = rng.normal(size=(50, 3)) * 100
    np.testing.assert_allclose(volume.indices(volume.points(indices)), indices, atol=1e-9)
    np.testing.assert_allclose(volume.points([[0, 0, 0]])[0], volume.origin_mm)
    step = volume.points([[1, 0, 0]])[0] - volume.origin_mm
    np.testing.assert_allclose(step, volume.direction[:, 0] * 3.0)


def test_a_grid_turned_far_is_said_and_one_turned_further_refused(tmp_path):
    scan = excerpt()
    for degrees in (25.0, 44.0):
        where = {"direction": scans.rotation(degrees) @ FRAME}
        write_dicom(tmp_path / f"{degrees:g}", scan.hu[:5], SPACING, **where)
        write_nifti(tmp_path / f"{degrees:g}.nii", scan.hu, SPACING, **where)
    for name in ("25", "25.nii"):
        assert sum("25°" in warning for warning in read_ct(tmp_path / name).warnings) == 1
    for name in ("44", "44.nii"):
        refusal(lambda name=name: read_ct(tmp_path / name), name, "44°", "axial")


# Real scans.


def rows_of_body_canal_and_spinous_process(piece: PackedVertebra) -> tuple[int, int, int]:
    """Rows in the packed frame, from the mask alone, on its midline.

    The body is where the mask is thickest; behind it, the canal is where there is least of it before the
    spinous process, where there is most again. Back to front, only the body's own edge would follow.
    """
    mask = piece.array[..., 5] > 0
    depth = np.stack([ndimage.distance_transform_edt(picture) for picture in mask])
    _, body, column = np.unravel_index(depth.argmax(), depth.shape)
    profile = mask[:, :, column - 2 : column + 3].mean(axis=(0, 2))
    last = int(np.flatnonzero(profile)[-1])
    canal = int(body + profile[body : last + 1].argmin())
    spinous = int(canal + profile[canal : last + 1].argmax())
    assert profile[canal] < 0.1
    assert profile[spinous] > 0.2
    return int(body), canal, spinous


def check_anatomy(volume: Volume, labels: np.ndarray, levels: int) -> dict[str, PackedVertebra]:
    pieces = packed(volume.hu, labels, volume.spacing_mm)
    assert len(pieces) == levels
    tops = [bounding_box(labels, VERTEBRAE.index(v) + 1)[0][0] for v in pieces]
    assert tops == sorted(tops)
    for vertebra, piece in pieces.items():
        inside = piece.array[..., 5] > 0
        assert piece.array[..., 2][inside].mean() > piece.array[..., 2][~inside].mean(), vertebra
    return pieces


def test_in_the_phantom_the_canal_lies_behind_the_body(tmp_path):
    scan = excerpt()
    ct = write_nifti(tmp_path / "ct.nii", scan.hu, scan.spacing_mm, orientation="PIR")
    mask = write_nifti(tmp_path / "mask.nii", scan.labels, scan.spacing_mm, orientation="SRA")
    volume = read_ct(ct)
    for piece in check_anatomy(volume, read_label_map(mask, volume).array, 3).values():
        body, canal, spinous = rows_of_body_canal_and_spinous_process(piece)
        assert body < canal < spinous
        with pytest.raises(AssertionError):  # the measure can fail
            rows_of_body_canal_and_spinous_process(replace(piece, array=piece.array[:, ::-1]))


@scans.needs_ct
@pytest.mark.parametrize(
    ("ct", "mask", "levels", "whole"),
    [
        ("ct.nii.gz", "vertebrae.nii.gz", 7, VERTEBRAE[1:]),
        ("dicom", "dicom_segmentation.nii.gz", 2, ("C1", "C2")),
    ],
)
def test_in_a_real_trunk_body_canal_and_spinous_process_follow_each_other(ct, mask, levels, whole):
    folder = scans.REAL_CT / "totalsegmentator_example"
    volume = read_ct(folder / ct)
    scheme = dict.fromkeys(range(1, 118), "other") | TRUNK_LEVELS
    labels = read_label_map(folder / mask, volume, scheme=scheme).array
    pieces = check_anatomy(volume, labels, levels)
    for vertebra in whole:
        body, canal, spinous = rows_of_body_canal_and_spinous_process(pieces[vertebra])
        assert body < canal < spinous, vertebra


@scans.needs_ct
def test_subregions_of_a_real_spine_in_pir_lie_in_their_order_in_the_packed_frame(tmp_path):
    """The subregion mask, packed as if it were the picture, is the oracle: body, arch, spinous process."""
    folder = scans.REAL_CT / "tptbox_lumbar"
    volume = read_ct(folder / "ct.nii.gz")
    labels = read_label_map(folder / "vertebrae.nii.gz", volume, scheme=TPTBOX_LEVELS).array
    check_anatomy(volume, labels, 3)
    image = nibabel.load(folder / "subregions.nii.gz")
    parts = np.asanyarray(image.dataobj)
    assert nibabel.aff2axcodes(image.affine) == ("P", "I", "R")
    parts = parts.transpose(1, 0, 2)[:, :, ::-1]  # by hand: to inferior, posterior, left
    for vertebra in ("C1", "C2", "C3"):
        value = VERTEBRAE.index(vertebra) + 1
        rows = []
        for names in (BODY, ARCH, SPINOUS):
            picture = np.where(np.isin(parts, names) & (labels == value), 1300, -500).astype(np.int16)
            piece = pack_vertebra(picture, labels, volume.spacing_mm, vertebra, CONFIG)
            _, found, _ = np.nonzero(piece.array[..., 2] > 127)
            rows.append(found.mean())
        assert rows == sorted(rows), (vertebra, rows)
        assert np.diff(rows).min() > 3


# What is no CT is refused.


def test_nothing_at_a_path_says_what_to_give(tmp_path):
    for name in ("none", "none.nii.gz"):
        refusal(lambda name=name: read_ct(tmp_path / name), name, "give", error=FileNotFoundError)


def test_other_files_are_refused_by_name(tmp_path):
    (file,) = write_dicom(tmp_path, excerpt().hu[:1], SPACING, names=["one.dcm"])
    refusal(lambda: read_ct(file), "one.dcm", "folder", ".nii.gz")
    (tmp_path / "ct.mha").write_bytes(b"ObjectType = Image")
    refusal(lambda: read_ct(tmp_path / "ct.mha"), "ct.mha", "NIfTI")


def test_the_series_of_a_folder_is_chosen_through_read_ct(tmp_path):
    hu = excerpt().hu
    write_dicom(tmp_path, hu[:6], SPACING, series_uid="1.2.77")
    write_dicom(tmp_path, hu[6:14], SPACING, series_uid="1.2.88", names=[f"b{z}" for z in range(8)])
    refusal(lambda: read_ct(tmp_path), "series=", "1.2.77", "1.2.88")
    np.testing.assert_array_equal(read_ct(tmp_path, series="1.2.88").hu, hu[6:14])


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(lambda hu: (hu + 1024) / 2200.0, id="normalised"),
        pytest.param(lambda hu: hu + 1024, id="intercept lost"),
        pytest.param(lambda hu: np.where(hu > 150, 1, 0).astype(np.uint8), id="a mask"),
        pytest.param(lambda hu: np.clip((hu + 500) / 7, 0, 255).astype(np.uint8), id="windowed"),
        pytest.param(lambda hu: np.zeros_like(hu), id="empty"),
    ],
)
def test_values_that_are_no_hounsfield_units_are_refused(tmp_path, values):
    path = write_nifti(tmp_path / "scan.nii.gz", values(excerpt().hu), SPACING)
    refusal(lambda: read_ct(path), "scan.nii.gz", "Hounsfield", "original")


@cache
def real_or_phantom(name: str) -> np.ndarray:
    """Small enough to try many things with."""
    if name == "phantom":
        return phantom().hu[::2, ::2, ::2]
    path = scans.REAL_CT / {"lumbar": "tptbox_lumbar/ct.nii.gz"}.get(name, f"totalsegmentator_example/{name}")
    hu = read_ct(path).hu
    return hu[:, ::3, ::3] if name == "dicom" else hu


BODIES = [
    "phantom",
    *(pytest.param(name, marks=scans.needs_ct) for name in ("ct.nii.gz", "dicom", "lumbar")),
]


def rounded(values: np.ndarray) -> np.ndarray:
    return np.rint(values).astype(np.int16)


NO_HOUNSFIELD = {
    "+1000": lambda hu: hu + 1000,
    "+1024": lambda hu: hu + 1024,
    "-1000": lambda hu: hu - 1000,
    "-1024": lambda hu: hu - 1024,
    "+2048": lambda hu: hu + 2048,
    "cone beam +200": lambda hu: hu + 200,
    "cone beam +300": lambda hu: hu + 300,
    "cone beam +400": lambda hu: hu + 400,
    "stored values, clipped": lambda hu: np.maximum(hu + 1024, 0),
    "z-scored": lambda hu: ((hu - hu.mean()) / hu.std()).astype(np.float32),
    "from 0 to 1": lambda hu: ((hu - hu.min()) / float(np.ptp(hu))).astype(np.float32),
    "from -1 to 1": lambda hu: (2 * (hu - hu.min()) / float(np.ptp(hu)) - 1).astype(np.float32),
    "8 bits": lambda hu: np.clip((hu + 500.0) / 1800 * 255, 0, 255).astype(np.uint8),
    "8 bits, soft tissue": lambda hu: np.clip((hu + 160.0) / 400 * 255, 0, 255).astype(np.uint8),
    "twice the slope": lambda hu: 2 * (hu + 1024) - 1024,
    "nine times": lambda hu: hu * 9.0,
    "8 bits with a sign": lambda hu: (np.clip((hu + 160.0) / 400 * 255, 0, 255) - 128).astype(np.int8),
    "8 bits, wrapped": lambda hu: hu.astype(np.int8),
    "8 bits, scaled back": lambda hu: rounded(np.clip((hu + 1000.0) / 2000 * 255, 0, 255)) * 8 - 1000,
    "clipped to a window": lambda hu: np.clip(hu, -160, 240),
    "clipped below bone": lambda hu: np.minimum(hu, 240),
    "clipped within bone": lambda hu: np.minimum(hu, 600),
    "clipped within fat": lambda hu: np.clip(hu, -160, 1900),
    "inverted": lambda hu: 20 - hu,
    "inverted, air at 0": lambda hu: -1000 - hu,
    "inverted, padded": lambda hu: -1000 - within_a_circle(hu, -3024),
    "negative slope": lambda hu: -(hu + 1024) - 1024,
    "MR": lambda hu: rounded(np.abs(np.where(hu < -300, 0, np.where(hu > 150, 90, 400 + 2 * hu)) + 9.4)),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", NO_HOUNSFIELD.values(), ids=NO_HOUNSFIELD)
@pytest.mark.parametrize("name", BODIES)
def test_the_distribution_of_values_says_that_they_are_no_hounsfield_units(tmp_path, name, change):
    """A single voxel where fat or air would be is none: noise and padding make those on any scale."""
    hu = real_or_phantom(name).astype(np.int32)
    hu[0, 0, :6] = range(-3024, 0, 504)
    values = change(hu)
    path = write_nifti(tmp_path / "scan.nii", values, (3.0, 3.0, 3.0))
    refusal(lambda: read_ct(path), "scan.nii", "no Hounsfield units", "original")


CROPS = {
    "whole": lambda hu: hu,
    "padding of -1024": lambda hu: within_a_circle(hu, -1024),
    "padding of -2000": lambda hu: within_a_circle(hu, -2000),
    "padding of -3024": lambda hu: within_a_circle(hu, -3024),
    "noise": lambda hu: hu + noise(hu.shape, 100),
    "noisy air, clipped": lambda hu: np.maximum(np.where(hu < -900, hu + noise(hu.shape, 200), hu), -1024),
    "air of one value": lambda hu: np.where(hu < -600, -1000, hu),
    "metal": lambda hu: np.where(np.indices(hu.shape)[2] % 12 == 0, 3071, hu),
    "fat": lambda hu: np.where(
        (hu > -150) & (hu < 200) & (noise(hu.shape, 1) < 1), -100 + noise(hu.shape, 20), hu
    ),
    "mostly air": lambda hu: np.pad(hu, ((0, 0), (90, 90), (60, 60)), constant_values=-1000),
    "upper half": lambda hu: hu[:, : hu.shape[1] // 2],
    "around the densest bone": lambda hu: around(hu, np.argwhere(hu > 250)),
    "thick slices": lambda hu: hu[::4],
}


def noise(shape: tuple[int, ...], sd: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, sd, shape)


def within_a_circle(hu: np.ndarray, padding: int) -> np.ndarray:
    _, y, x = np.indices(hu.shape)
    middle = np.array(hu.shape[1:]) / 2
    return np.where(np.hypot(y - middle[0], x - middle[1]) < middle.min(), hu, padding)


def around(hu: np.ndarray, points: np.ndarray) -> np.ndarray:
    low = np.maximum(np.median(points, axis=0).astype(int) - 7, 0)
    return hu[tuple(slice(a, a + 14) for a in low)]


@pytest.mark.slow
@pytest.mark.parametrize("change", CROPS.values(), ids=CROPS)
@pytest.mark.parametrize("name", BODIES)
def test_hounsfield_units_are_known_whatever_the_field_of_view_holds(tmp_path, name, change):
    hu = rounded(change(real_or_phantom(name)))
    volume = read_ct(write_nifti(tmp_path / "scan.nii", hu, (3.0, 3.0, 3.0)))
    np.testing.assert_array_equal(volume.hu, hu)
    assert len(volume.warnings) == ((hu < -940).mean() < 0.001)


OTHER_SCALES = {  # the body that shows it, and what is done to it
    "half the scale": ("ct.nii.gz", lambda hu: hu / 2),
    "twice the scale": ("ct.nii.gz", lambda hu: hu * 2.0),
    "mostly air, +1000": ("dicom", lambda hu: CROPS["mostly air"](hu + noise(hu.shape, 12)) + 1000),
    "air of one value, +200": ("dicom", lambda hu: CROPS["air of one value"](hu) + 200),
}


@scans.needs_ct
@pytest.mark.parametrize(("name", "change"), OTHER_SCALES.values(), ids=OTHER_SCALES)
def test_air_and_soft_tissue_together_show_another_scale(tmp_path, name, change):
    """Each passes one of the questions that are asked of the values, and fails another."""
    path = write_nifti(tmp_path / "scan.nii", rounded(change(real_or_phantom(name))), (3.0, 3.0, 3.0))
    refusal(lambda: read_ct(path), "no Hounsfield units", "original")


@pytest.mark.parametrize("name", BODIES)
def test_values_clipped_above_air_are_read_and_said(tmp_path, name):
    hu = np.maximum(real_or_phantom(name), -500)
    (warning,) = read_ct(write_nifti(tmp_path / "scan.nii", hu, (3.0, 3.0, 3.0))).warnings
    assert "no air" in warning


@scans.needs_ct
@pytest.mark.parametrize("change", [1000, 1024, -1000, -1024, 200, 300, 400])
def test_a_real_series_with_another_intercept_is_refused(tmp_path, change):
    def move(ds, _):
        ds.RescaleIntercept += change

    write_dicom(tmp_path / "ct", scans.real_series()[:, ::4, ::4], SPACING, extra=move)
    refusal(lambda: read_ct(tmp_path / "ct"), "no Hounsfield units", "intercept")


def foreign(folder: Path, name: str, change: int) -> Path:
    """A slice of another vendor three times, one above the other, with something added to its intercept."""
    folder.mkdir()
    for z in range(3):
        ds = dcmread(get_testdata_file(name, download=False))
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.{z + 1}"
        ds.ImagePositionPatient[2] += 1.25 * z
        ds.RescaleIntercept += change
        ds.save_as(folder / f"{z}.dcm")
    return folder


@pytest.mark.parametrize("name", ["CT_small.dcm", "693_J2KI.dcm"])
def test_slices_of_other_vendors_are_hounsfield_units_and_nothing_is_that_lies_off_them(tmp_path, name):
    """pydicom's own; the second has noise down to -3995 around the body."""
    assert len(read_ct(foreign(tmp_path / "ct", name, 0)).hu) == 3
    for change in (1000, 1024, -1000, -1024, 300, 400):
        folder = foreign(tmp_path / str(change), name, change)
        refusal(lambda its=folder: read_ct(its), folder.name, "no Hounsfield units")


def test_a_series_of_another_vendor_in_two_acquisitions_is_read(tmp_path):
    """pydicom's own: five slices of 16 by 16 pixels, without air."""
    folder = Path(get_testdata_file("dicomdirtests/98892001/CT5N/2062", download=False)).parent
    volume = read_ct(folder)
    assert volume.hu.shape == (5, 16, 16)
    assert ["no air" in warning for warning in volume.warnings] == [True]


def test_exported_phantoms_are_hounsfield_units_without_a_word(tmp_path):
    scan = phantom()
    export.write_series(tmp_path / "ct", scan.hu, scan.spacing_mm, study_uid="1.2.3")
    assert read_ct(tmp_path / "ct").warnings == ()


def test_a_crop_without_air_is_read_and_said(tmp_path):
    hu = np.maximum(excerpt().hu, -300)
    volume = read_ct(write_nifti(tmp_path / "scan.nii.gz", hu, SPACING))
    np.testing.assert_array_equal(volume.hu, hu)
    (warning,) = volume.warnings
    assert "no air in its field of view" in warning


def test_dicom_that_holds_no_hounsfield_units_is_refused(tmp_path):
    def lose(ds, _):
        del ds.RescaleIntercept, ds.RescaleSlope

    write_dicom(tmp_path / "ct", excerpt().hu, SPACING, extra=lose)
    refusal(lambda: read_ct(tmp_path / "ct"), "ct", "Hounsfield", "intercept")


@pytest.mark.parametrize("intercept", [1024, 24, -1024])
def test_a_negative_slope_in_every_slice_is_refused(tmp_path, intercept):
    def invert(ds, _):
        ds.RescaleSlope, ds.RescaleIntercept = -1, intercept

    write_dicom(tmp_path / "ct", phantom().hu[::4], (5.0, *phantom().spacing_mm[1:]), extra=invert)
    refusal(lambda: read_ct(tmp_path / "ct"), "ct", "no Hounsfield units", "slope")


def test_a_nifti_that_does_not_say_how_the_patient_lies_is_refused(tmp_path):
    path = write_nifti(tmp_path / "scan.nii", excerpt().hu, SPACING, codes=(0, 0))
    refusal(lambda: read_ct(path), "scan.nii", "sform", "both 0", "again")


@pytest.mark.parametrize("codes", [(2, 0), (2, 1)])
def test_a_sheared_nifti_is_refused(tmp_path, codes):
    """With a qform beside it, too, which cannot hold the shear."""
    hu = excerpt().hu
    stored, affine = turned(hu, affine_of(SPACING), "RAS")
    affine[:3, 2] += (0, 0.3 * SPACING[0], 0)
    path = save_nifti(tmp_path / "scan.nii", stored, affine, codes=codes)
    refusal(lambda: read_ct(path), "scan.nii", "shear")


def test_a_nifti_whose_two_forms_disagree_is_refused(tmp_path):
    """Some readers obey the one, others the other: masks would lie elsewhere than their CT."""
    path = write_nifti(tmp_path / "scan.nii", excerpt().hu, SPACING, codes=(2, 1))
    image = nibabel.load(path)
    moved = image.affine.copy()
    moved[:3, 3] += 30.0
    image.set_qform(moved, code=1)
    nibabel.save(image, tmp_path / "two.nii")
    refusal(lambda: read_ct(tmp_path / "two.nii"), "two.nii", "qform", "sform")


@pytest.mark.parametrize("shape", [(9, 8, 7, 3), (9, 8)])
def test_a_nifti_of_other_dimensions_is_refused(tmp_path, shape):
    path = save_nifti(tmp_path / "scan.nii.gz", np.zeros(shape, np.int16), np.eye(4))
    refusal(lambda: read_ct(path), "scan.nii.gz", "3-D")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kept", [0, 0.001, 0.3, 0.7, 0.99])
def test_a_cut_off_nifti_is_refused(tmp_path, ending, kept):
    path = write_nifti(tmp_path / f"scan{ending}", excerpt().hu, SPACING)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    refusal(lambda: read_ct(path), path.name, "again")


def test_a_nifti_damaged_in_the_middle_is_refused(tmp_path):
    path = write_nifti(tmp_path / "scan.nii.gz", excerpt().hu, SPACING)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes(whole)
    with pytest.raises((OSError, EOFError, ValueError, zlib.error)):
        gzip.decompress(bytes(whole))
    refusal(lambda: read_ct(path), "scan.nii.gz", "again")


def test_text_called_nifti_is_refused(tmp_path):
    for name in ("scan.nii", "scan.nii.gz"):
        (tmp_path / name).write_text("no picture at all " * 40)
        refusal(lambda name=name: read_ct(tmp_path / name), name, "again")


@pytest.mark.parametrize("size", [0.0, float("nan")])
def test_a_voxel_size_that_is_none_is_refused(tmp_path, size):
    path = write_nifti(tmp_path / "scan.nii", excerpt().hu, SPACING, codes=(0, 1))
    content = bytearray(path.read_bytes())
    content[84:88] = np.float32(size).tobytes()  # pixdim[2]
    path.write_bytes(content)
    refusal(lambda: read_ct(path), "scan.nii")


def test_patients_stay_out_of_what_a_nifti_is_called(tmp_path, capfd):
    path = write_nifti(tmp_path / "scan.nii", excerpt().hu, SPACING, direction=scans.rotation(20) @ FRAME)
    volume = read_ct(path)
    written = capfd.readouterr()
    assert_private(repr(volume), volume.warnings, written.out, written.err)
    assert "53, 93, 99" in repr(volume) or str(volume.hu.shape) in repr(volume)


@pytest.mark.parametrize(("library", "name"), [("SimpleITK", "ct"), ("nibabel", "ct.nii")])
def test_without_the_library_that_reads_it_one_sentence_says_how_to_install_it(
    tmp_path, monkeypatch, library, name
):
    write_dicom(tmp_path / "ct", excerpt().hu[:3], SPACING)
    write_nifti(tmp_path / "ct.nii", excerpt().hu, SPACING)
    monkeypatch.setitem(sys.modules, library, None)
    refusal(lambda: read_ct(tmp_path / name), library, "pip install", error=ImportError)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_what_cannot_be_read_is_named_without_its_folder(tmp_path, ending):
    path = tmp_path / f"scan{ending}"
    path.write_bytes(b"no picture at all " * 40)
    message = refusal(lambda: read_ct(path), f"scan{ending}: it cannot be read as NIfTI")
    assert str(tmp_path) not in message


@pytest.mark.parametrize(
    ("size", "shown"), [(0, "0"), (-0.75, "-0.75"), (np.nan, "nan"), (np.inf, "inf")], ids=str
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_voxel_size_that_is_none_is_shown(tmp_path, size, shown, packed):
    """SimpleITK would take 1 mm, or the size without its sign."""
    path = write_nifti(tmp_path / "scan.nii", excerpt().hu, SPACING, orientation="IPL", codes=(0, 1))
    content = bytearray(path.read_bytes())
    content[84:88] = np.float32(size).tobytes()  # pixdim[2]
    if packed:
        path = tmp_path / "scan.nii.gz"
        content = gzip.compress(content)
    path.write_bytes(content)
    refusal(lambda: read_ct(path), path.name, f"voxel size is 1.25 × {shown} × 0.5 mm", "mend its header")
