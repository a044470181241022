"""Headers of NIfTI files, and what may follow them; SimpleITK and nibabel's own reader are the oracles."""

import gzip
import itertools
import tracemalloc
from pathlib import Path

import nibabel
import numpy as np
import pytest
import scans
import SimpleITK
from nibabel.testing import data_path
from scans import ORIENTATIONS, affine_of, excerpt, refusal, rotation, save_nifti, turned, write_nifti

from cspine_helpers.ct.nifti import Grid, read_nifti
from cspine_helpers.ct.nifti import write_nifti as ours

SPACING = (1.25, 0.75, 0.5)
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS to LPS and back
SHAPE = (40, 50, 60)


def header_of(path: Path, **values: object) -> Path:
    """The file with fields of its header changed, all else as it was; packed where its name says so."""
    is_packed = path.suffix == ".gz"
    content = gzip.decompress(path.read_bytes()) if is_packed else path.read_bytes()
    header = nibabel.Nifti1Header(content[:348], check=False)
    for name, value in values.items():
        header[name] = value
    content = header.binaryblock + content[348:]
    path.write_bytes(gzip.compress(content, 1) if is_packed else content)
    return path


def longer(path: Path, more: bytes) -> Path:
    is_packed = path.suffix == ".gz"
    content = gzip.decompress(path.read_bytes()) if is_packed else path.read_bytes()
    path.write_bytes(gzip.compress(content + more, 1) if is_packed else content + more)
    return path


def with_forms(path: Path, sform: np.ndarray, qform: np.ndarray, codes: tuple[int, int]) -> Path:
    """A volume whose two orientations, in RAS, are as given."""
    image = nibabel.Nifti1Image(np.zeros(SHAPE, np.int16), sform)
    image.set_qform(qform, code=codes[1])
    image.set_sform(sform, code=codes[0], update_affine=False)
    nibabel.save(image, path)
    return path


def affine_in_lps(grid: Grid) -> np.ndarray:
    """(4, 4): the file's own indices to LPS mm."""
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = grid.steps_mm[:, ::-1], grid.origin_mm
    return affine


# The same as other readers.


@pytest.mark.parametrize("kind", ["u1", "i2", "u2", "i4", "f4", "f8", ">i2", ">f4"])
def test_values_and_places_are_those_of_simpleitk(tmp_path, kind):
    rng = np.random.default_rng(0)
    for orientation in rng.choice(ORIENTATIONS, 4, replace=False):
        stored, affine = turned(
            rng.integers(0, 200, (5, 6, 7)), affine_of(SPACING, direction=rotation(9, -12, 5) @ scans.FRAME),
            orientation,
        )  # fmt: skip
        header = nibabel.Nifti1Header(endianness=">" if kind.startswith(">") else "<")
        image = nibabel.Nifti1Image(stored.astype(kind), FLIP @ affine, header)
        image.set_qform(image.affine, code=1)
        nibabel.save(image, tmp_path / "scan.nii.gz")
        array, grid = read_nifti(tmp_path / "scan.nii.gz")
        theirs = SimpleITK.ReadImage(str(tmp_path / "scan.nii.gz"))
        np.testing.assert_array_equal(array, SimpleITK.GetArrayFromImage(theirs))
        assert array.dtype.isnative
        for place in itertools.product(*((0, n - 1) for n in array.shape)):
            expected = theirs.TransformIndexToPhysicalPoint(place[::-1])
            np.testing.assert_allclose(grid.origin_mm + grid.steps_mm @ place, expected, atol=1e-4)


FOREIGN = ["anatomical.nii", "standard.nii.gz", "reoriented_anat_moved.nii", "resampled_anat_moved.nii"]


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_other_tools_are_read_as_nibabel_reads_them(name):
    """SPM's and others', inside nibabel's package."""
    path = Path(data_path) / name
    image = nibabel.load(path)
    array, grid = read_nifti(path)
    np.testing.assert_allclose(array, np.nan_to_num(np.asanyarray(image.dataobj)).T, rtol=1e-6)
    np.testing.assert_allclose(FLIP @ affine_in_lps(grid), image.affine, atol=1e-3)


def test_four_dimensions_of_other_tools_are_refused():
    for name in ("functional.nii", "example4d.nii.gz", "example_nifti2.nii.gz"):
        refusal(lambda name=name: read_nifti(Path(data_path) / name), name, "3-D")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_nifti_2_is_read(tmp_path, name, order):
    stored, affine = turned(excerpt().hu, affine_of(SPACING), "PIR")
    header = nibabel.Nifti2Header(endianness=order)
    image = nibabel.Nifti2Image(stored.astype(order + "i2"), FLIP @ affine, header)
    nibabel.save(image, tmp_path / name)
    array, grid = read_nifti(tmp_path / name)
    np.testing.assert_array_equal(array, stored.T)
    np.testing.assert_allclose(affine_in_lps(grid), affine, atol=1e-4)


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_whether_a_file_is_packed_is_seen_from_its_content(tmp_path, name):
    other = "scan.nii" if name.endswith("gz") else "scan.nii.gz"
    path = write_nifti(tmp_path / "first" / other, excerpt().hu, SPACING).rename(tmp_path / name)
    np.testing.assert_array_equal(
        read_nifti(path)[0].shape, turned(excerpt().hu, np.eye(4), "RAS")[0].T.shape
    )


# Two orientations in one header.


def about_z(degrees: float) -> np.ndarray:
    turn = np.eye(4)
    turn[:3, :3] = rotation(0, 0, degrees)
    return turn


STRAIGHT = np.array([[-0.5, 0, 0, 30.0], [0, -0.6, 0, 20.0], [0, 0, 1.5, -900.0], [0, 0, 0, 1]])
MOVED = {
    "4 mm": STRAIGHT + np.array([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 4.0], [0, 0, 0, 0]]),
    "half a slice and more": STRAIGHT + np.array([[0] * 4, [0] * 4, [0, 0, 0, 0.6 * 1.5], [0] * 4]),
    "mirrored": STRAIGHT @ np.diag([-1, 1, 1, 1]),
    "turned by 3°": about_z(3) @ STRAIGHT,
}
CODES = list(itertools.product((1, 2, 3, 4), (1, 2, 3, 4)))


@pytest.mark.parametrize("name", MOVED)
def test_two_orientations_that_differ_are_refused_whatever_their_codes(tmp_path, name):
    """SimpleITK compares none where the sform's code is 1."""
    for codes in CODES:
        for forms in ((STRAIGHT, MOVED[name]), (MOVED[name], STRAIGHT)):
            path = with_forms(tmp_path / "two.nii", *forms, codes)
            refusal(lambda path=path: read_nifti(path), "two.nii", "qform", "sform", "mm apart")


@pytest.mark.parametrize("share", [0.05, 0.45])
def test_two_orientations_within_half_a_voxel_are_one_the_sform(tmp_path, share):
    other = STRAIGHT.copy()
    other[:3, 3] += np.array([-0.5, -0.6, 1.5]) * share
    for codes in CODES:
        _, grid = read_nifti(with_forms(tmp_path / "near.nii", STRAIGHT, other, codes))
        np.testing.assert_allclose(FLIP @ affine_in_lps(grid), STRAIGHT, atol=1e-4)


def test_of_one_slice_alone_a_mirrored_orientation_is_still_another(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((9, 8, 1), np.int16), STRAIGHT)
    image.set_qform(STRAIGHT @ np.diag([1, 1, -1, 1]), code=1)
    image.set_sform(STRAIGHT, code=1, update_affine=False)
    nibabel.save(image, tmp_path / "one.nii")
    refusal(lambda: read_nifti(tmp_path / "one.nii"), "qform", "sform")


def test_a_sform_whose_voxel_size_is_not_that_of_the_header_is_refused(tmp_path):
    path = write_nifti(tmp_path / "scan.nii", excerpt().hu, SPACING)
    for axis, factor in itertools.product((1, 2, 3), (0.5, 0.98, 2.0)):
        pixdim = nibabel.load(path).header["pixdim"].copy()
        pixdim[axis] *= factor
        bad = header_of(write_nifti(tmp_path / "bad.nii", excerpt().hu, SPACING), pixdim=pixdim)
        refusal(lambda bad=bad: read_nifti(bad), "bad.nii", "two voxel sizes", "sform")


# Axes that are not quite at right angles.


def sheared(path: Path, shear: float, shape=(220, 200, 180)) -> tuple[Path, np.ndarray]:
    affine = affine_of((0.6, 0.4, 0.4))[:, [2, 1, 0, 3]]
    affine[:3, 1] += shear * affine[:3, 0]
    return save_nifti(path, np.zeros(shape, np.int8), affine), affine


@pytest.mark.parametrize("shear", [2e-4, 1e-3, 4e-3])
def test_a_shear_that_moves_no_voxel_by_half_is_read(tmp_path, shear):
    """As by tools that write affines of few digits; nobody can see it."""
    path, affine = sheared(tmp_path / "scan.nii", shear)
    with pytest.raises(RuntimeError, match="orthonormal"):
        SimpleITK.ReadImage(str(path))
    array, grid = read_nifti(path)
    steps = grid.steps_mm / np.linalg.norm(grid.steps_mm, axis=0)
    np.testing.assert_allclose(steps.T @ steps, np.eye(3), atol=1e-9)
    corners = np.array(list(itertools.product(*((0, n - 1) for n in array.shape[::-1]))))
    apart = scans.positions(affine_in_lps(grid), corners) - scans.positions(affine, corners)
    assert np.abs(apart).max() < 0.5 * 0.4


def test_a_shear_of_more_is_a_tilted_gantry(tmp_path):
    path, _ = sheared(tmp_path / "scan.nii", 0.01)
    refusal(lambda: read_nifti(path), "scan.nii", "not at right angles", "DICOM")
    sheared(path, 0.01, shape=(20, 20, 20))  # the same angle; over this volume it is no tenth of a voxel
    read_nifti(path)


# As long as declared.


@pytest.fixture(params=["scan.nii", "scan.nii.gz"])
def path(request, tmp_path) -> Path:
    return write_nifti(tmp_path / request.param, excerpt().hu, SPACING)


@pytest.mark.parametrize(
    "offset", [0, 16, 348, 351, -352, 352.5, 353, 368, 1e9, 3e38, np.nan, np.inf, -np.inf], ids=str
)
def test_values_that_begin_elsewhere_are_refused(path, offset):
    header_of(path, vox_offset=offset)
    refusal(lambda: read_nifti(path), path.name)


def test_an_extension_between_header_and_values_is_passed_over(tmp_path):
    image = nibabel.Nifti1Image(excerpt().hu, np.diag([1, 1, 1, 1.0]))
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"made by hand" * 20))
    nibabel.save(image, tmp_path / "scan.nii")
    array, _ = read_nifti(tmp_path / "scan.nii")
    np.testing.assert_array_equal(array, excerpt().hu.T)


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_dimension_that_is_not_that_of_the_values_is_refused(path, axis, change):
    dim = nibabel.load(path).header["dim"].copy()
    dim[axis] += change
    header_of(path, dim=dim)
    refusal(lambda: read_nifti(path), path.name, "declares")


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_in_a_small_empty_volume_a_lost_row_is_no_padding(tmp_path, axis):
    path = save_nifti(tmp_path / "scan.nii", np.zeros((5, 6, 7), np.uint8), np.eye(4))
    dim = nibabel.load(path).header["dim"].copy()
    dim[axis] -= 1
    refusal(lambda: read_nifti(header_of(path, dim=dim)), "scan.nii", "declares")


@pytest.mark.parametrize("count", [1, 13, 512])
def test_zeros_to_a_block_are_padding(path, count):
    expected = read_nifti(path)[0]
    np.testing.assert_array_equal(read_nifti(longer(path, bytes(count)))[0], expected)


@pytest.mark.parametrize("more", [b"\1", bytes(12) + b"\1", bytes(513), bytes(100_000)], ids=len)
def test_more_than_padding_is_refused(path, more):
    refusal(lambda: read_nifti(longer(path, more)), path.name, "declares")


def test_nothing_is_inflated_beyond_what_the_header_declares(tmp_path):
    """Two GiB of zeros behind a small volume: 2 MB on disk."""
    path = write_nifti(tmp_path / "scan.nii.gz", excerpt().hu, SPACING)
    with open(path, "ab") as file:
        file.write(gzip.compress(bytes(1 << 24)) * 128)
    tracemalloc.start()
    refusal(lambda: read_nifti(path), "scan.nii.gz", "declares")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_a_header_that_declares_terabytes_costs_no_memory(tmp_path, name):
    path = write_nifti(tmp_path / name, excerpt().hu, SPACING)
    header_of(path, dim=[3, 32767, 32767, 32767, 1, 1, 1, 1])
    tracemalloc.start()
    refusal(lambda: read_nifti(path), name, "declares")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


# Other fields that would change values in silence.


@pytest.mark.parametrize(
    ("slope", "inter"),
    [(np.inf, 0), (-np.inf, 0), (1, np.nan), (1, np.inf), (np.nan, -1024), (0, -1024), (np.nan, np.inf)],
    ids=str,
)
def test_a_scaling_that_is_none_is_refused(path, slope, inter):
    header_of(path, scl_slope=slope, scl_inter=inter)
    refusal(lambda: read_nifti(path), path.name, "scl_slope", "scl_inter")


@pytest.mark.parametrize(("slope", "inter"), [(0, 0), (np.nan, np.nan), (np.nan, 0), (0, np.nan), (1, 0)])
def test_no_scaling_leaves_whole_numbers(path, slope, inter):
    """0 by the standard; NaN as nibabel writes it."""
    expected = read_nifti(path)[0]
    array, _ = read_nifti(header_of(path, scl_slope=slope, scl_inter=inter))
    assert array.dtype == np.int16
    np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(("slope", "inter"), [(1, -1024), (-1, 0), (0.25, 3.5)])
def test_a_scaling_is_applied(path, slope, inter):
    expected = read_nifti(path)[0] * slope + inter
    np.testing.assert_allclose(read_nifti(header_of(path, scl_slope=slope, scl_inter=inter))[0], expected)


@pytest.mark.parametrize(
    ("datatype", "bitpix"), [(4, 8), (4, 32), (4, 0), (2, 16), (16, 16), (0, 16), (1, 1), (7, 16), (32, 64)]
)
def test_a_type_and_its_bits_that_do_not_fit_are_refused(path, datatype, bitpix):
    header_of(path, datatype=datatype, bitpix=bitpix)
    refusal(lambda: read_nifti(path), path.name, "datatype", "bitpix")


@pytest.mark.parametrize("dims", [0, 2, 4, 8, -3])
def test_a_number_of_dimensions_that_is_not_three_is_refused(path, dims):
    dim = nibabel.load(path).header["dim"].copy()
    dim[0], dim[4] = dims, 2
    refusal(lambda: read_nifti(header_of(path, dim=dim)), path.name, "3-D")


def test_dimensions_of_one_behind_the_third_are_left_out(path):
    dim = nibabel.load(path).header["dim"].copy()
    dim[0], expected = 5, read_nifti(path)[0]
    np.testing.assert_array_equal(read_nifti(header_of(path, dim=dim))[0], expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38])
@pytest.mark.parametrize(
    ("field", "codes"), [("srow_y", (1, 0)), ("quatern_c", (0, 1)), ("qoffset_x", (0, 1)), ("pixdim", (0, 1))]
)
def test_places_that_are_no_numbers_are_refused(tmp_path, field, codes, value):
    path = write_nifti(tmp_path / "scan.nii", excerpt().hu, SPACING, codes=codes)
    old = nibabel.load(path).header[field]
    if field == "qoffset_x" and value == 1e38:
        value = np.nan
    refusal(lambda: read_nifti(header_of(path, **{field: np.full(old.shape, value)})), "scan.nii")


@pytest.mark.parametrize("qfac", [0, 1, -1])
def test_the_handedness_of_a_qform_is_its_qfac_and_0_means_1(tmp_path, qfac):
    path = write_nifti(tmp_path / "scan.nii", excerpt().hu, SPACING, codes=(0, 1))
    pixdim = nibabel.load(path).header["pixdim"].copy()
    pixdim[0] = qfac
    header_of(path, pixdim=pixdim)
    theirs = SimpleITK.ReadImage(str(path))
    expected = np.array(theirs.GetDirection()).reshape(3, 3) * theirs.GetSpacing()
    np.testing.assert_allclose(read_nifti(path)[1].steps_mm[:, ::-1], expected, atol=1e-5)


@pytest.mark.parametrize("qfac", [np.nan, 7.0, -0.5])
def test_another_qfac_is_refused(tmp_path, qfac):
    path = write_nifti(tmp_path / "scan.nii", excerpt().hu, SPACING, codes=(0, 1))
    pixdim = nibabel.load(path).header["pixdim"].copy()
    pixdim[0] = qfac
    refusal(lambda: read_nifti(header_of(path, pixdim=pixdim)), "scan.nii", "qfac")


@pytest.mark.parametrize("unit", [1, 3])
def test_lengths_in_another_unit_are_refused(path, unit):
    refusal(lambda: read_nifti(header_of(path, xyzt_units=unit)), path.name, "mm")


def test_the_header_of_a_pair_of_files_is_refused(path):
    refusal(lambda: read_nifti(header_of(path, magic=b"ni1")), path.name, ".img")


# What we write.


def oblique() -> tuple[np.ndarray, np.ndarray]:
    """Values that differ everywhere, and steps (3, 3) turned about all axes, in LPS."""
    array = np.random.default_rng(3).normal(size=(5, 6, 7)).astype(np.float32)
    return array, rotation(9, -12, 5) @ scans.FRAME * SPACING


@pytest.mark.parametrize("orientation", ["IPL", "RAS", "PSL", "ALI"])
@pytest.mark.parametrize("name", ["map.nii", "map.nii.gz"])
def test_each_value_is_written_where_it_was_whatever_the_order_and_sign_of_the_axes(
    tmp_path, name, orientation
):
    array, steps = oblique()
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = steps, scans.ORIGIN
    turned_array, turned_affine = turned(array, affine, orientation)
    path = ours(tmp_path / name, turned_array, Grid(turned_affine[:3, :3], turned_affine[:3, 3]))
    image, theirs = nibabel.load(path), SimpleITK.ReadImage(str(path))
    assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)
    assert image.header.get_xyzt_units()[0] == "mm"
    for place in np.ndindex(array.shape):
        expected = scans.positions(affine, np.array(place))
        index = theirs.TransformPhysicalPointToIndex(expected.tolist())
        assert theirs[index] == array[place]
        np.testing.assert_allclose(theirs.TransformIndexToPhysicalPoint(index), expected, atol=1e-4)
        assert np.asanyarray(image.dataobj)[index] == array[place]
    back, grid = read_nifti(path)
    first = np.rint(np.linalg.solve(grid.steps_mm, scans.ORIGIN - grid.origin_mm)).astype(int)
    assert back[tuple(first)] == array[0, 0, 0]


@pytest.mark.parametrize("kind", ["u1", "i2", "u2", "i4", "f4", "f8"])
def test_types_are_kept_and_the_same_values_give_the_same_bytes(tmp_path, kind):
    array, steps = oblique()
    array = np.abs(array * 50).astype(kind)
    paths = [
        ours(tmp_path / name, array, Grid(steps, np.zeros(3)), description="a map")
        for name in ("a.nii.gz", "b.nii.gz")
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    image = nibabel.load(paths[0])
    assert (image.get_data_dtype(), image.header["descrip"].item()) == (np.dtype(kind), b"a map")
    np.testing.assert_array_equal(np.sort(read_nifti(paths[0])[0], axis=None), np.sort(array, axis=None))


def test_what_nifti_cannot_hold_is_refused_and_nothing_written(tmp_path):
    array, steps = oblique()
    grid, path = Grid(steps, np.zeros(3)), tmp_path / "map.nii.gz"
    refusal(lambda: ours(tmp_path / "map.npy", array, grid), "map.npy", ".nii")
    refusal(lambda: ours(path, array[0], grid), "3-D", "(6, 7)")
    refusal(lambda: ours(path, array > 0, grid), "bool", "uint8")
    refusal(lambda: ours(path, array, grid, description="x" * 80), "79 bytes", "80")
    refusal(lambda: ours(path, array, Grid(steps * [1, 0, 1], np.zeros(3))), "steps that are 0")
    refusal(lambda: ours(path, array, Grid(steps, np.array([0, np.nan, 0]))), "no numbers")
    sheared = steps + np.outer(steps[:, 1], [0.5, 0, 0])
    refusal(lambda: ours(path, array, Grid(sheared, np.zeros(3))), "right angles")
    assert not list(tmp_path.iterdir())
