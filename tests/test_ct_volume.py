import ast
import itertools
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scans import FRAME, rotation

import cspine_helpers
from cspine_helpers.ct import volume as itk
from cspine_helpers.ct.volume import Volume, in_frame


def test_simpleitk_is_the_module():
    import SimpleITK

    assert itk.simpleitk() is SimpleITK


def test_without_simpleitk_a_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(
        ImportError, match=r"needs SimpleITK, which is not installed\..*pip install 'SimpleITK>=2\.4'"
    ):
        itk.simpleitk()


def test_no_module_imports_an_optional_library_by_itself():
    """Who trains on packed sequences needs none of them."""
    for path in Path(cspine_helpers.__path__[0]).rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        found = {its.name for node in nodes if isinstance(node, ast.Import) for its in node.names}
        found |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not {name.partition(".")[0] for name in found} & {*itk.LIBRARIES}, path


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "Exception thrown in SimpleITK ImageFileReader_Execute: /tmp/SimpleITK/Code/IO/src/sitk.cxx:99:\n"
            "sitk::ERROR: Unable to determine ImageIO reader",
            "sitk::ERROR: Unable to determine ImageIO reader",
        ),
        (
            "Exception thrown\n/build/ITK/Modules/IO/GDCM/src/itkGDCMImageIO.cxx:302:\n"
            "ITK ERROR: GDCMImageIO(0x55d0c0ffee): Cannot read requested file\n",
            "Cannot read requested file",
        ),
        ("/build/ITK/itkImage.cxx:12: the cause", "the cause"),
        ("", "RuntimeError"),
    ],
)
def test_reasons_hold_neither_addresses_nor_places_in_the_source(message, expected):
    assert itk.reason(RuntimeError(message)) == expected


def test_the_reason_of_a_real_error_is_one_line_without_an_address(tmp_path):
    (tmp_path / "no.nii").write_bytes(b"no picture")
    sitk = itk.simpleitk()
    with pytest.raises(RuntimeError) as caught:
        sitk.ReadImage(str(tmp_path / "no.nii"), imageIO="NiftiImageIO")
    assert "0x" in str(caught.value)
    said = itk.reason(caught.value)
    assert said
    assert "\n" not in said
    assert "0x" not in said
    assert ".cxx" not in said


@pytest.mark.parametrize(
    ("line", "harmless"),
    [
        ("Corrupt JPEG data: 1 extraneous bytes before marker 0xd9", True),
        ("Corrupt JPEG data: 61938 extraneous bytes before marker 0xd9", False),
        ("Unsupported JPEG data precision 12", True),
        ("Must downscale data from 16 bits to 8", False),
        ("a decoder of tomorrow minds", False),
    ],
)
def test_what_a_decoder_writes_is_a_complaint_unless_it_is_known_to_be_harmless(line, harmless, capfd):
    with itk.complaints() as said:
        os.write(2, f"{line}\n".encode())
    assert bool(said) is not harmless
    assert (line in capfd.readouterr().err) is harmless


def test_beside_other_threads_only_what_decoders_are_known_to_write_counts(capfd):
    with itk.complaints(re.compile(rb"Corrupt")) as said:
        os.write(2, b"\rreading:  30%|###   | 3/10")
    assert said == []
    assert "30%" in capfd.readouterr().err
    with itk.complaints(re.compile(rb"Corrupt")) as said:
        os.write(2, b"\rreading:  40%|####  | 4/10Corrupt JPEG data: bad Huffman code\n")
    assert said == ["its decoder finds its pixels corrupt"]


SHAPE, SPACING = (3, 4, 5), np.array([2.5, 0.4, 0.7])
ORIGIN = np.array([-20.0, 35.0, 640.0])
ORDERS = tuple(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))


def whole() -> np.ndarray:
    """In the frame; every value is another one."""
    return np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)


def stored(order, signs, *, turn=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The volume with its axes in another order and sign: array, steps, origin."""
    direction = (np.eye(3) if turn is None else turn) @ FRAME
    steps = direction * SPACING
    flips = tuple(slice(None, None, sign) for sign in signs)
    first = np.array([0 if sign > 0 else n - 1 for sign, n in zip(signs, SHAPE, strict=True)])
    array = whole()[flips].transpose(order)
    return np.ascontiguousarray(array), (steps * np.array(signs))[:, order], ORIGIN + steps @ first


@pytest.mark.parametrize(("order", "signs"), ORDERS)
def test_any_order_and_sign_of_axes_comes_into_the_frame(order, signs):
    array, steps, origin = stored(order, signs)
    before = steps.copy(), origin.copy()
    volume = in_frame(array, steps, origin)
    np.testing.assert_array_equal(volume.hu, whole())
    np.testing.assert_allclose(volume.spacing_mm, SPACING)
    np.testing.assert_allclose(volume.origin_mm, ORIGIN)
    np.testing.assert_allclose(volume.direction, FRAME, atol=1e-12)
    assert (volume.warnings, volume.frames) == ((), None)
    for now, then in zip((steps, origin), before, strict=True):  # the caller's are left alone
        np.testing.assert_array_equal(now, then)


@pytest.mark.parametrize(("order", "signs"), ORDERS)
def test_flips_share_memory_and_swapped_axes_are_copied_together(order, signs):
    array, steps, origin = stored(order, signs)
    found = in_frame(array, steps, origin).hu
    assert np.shares_memory(found, array) == (order == (0, 1, 2))
    lengths = np.abs(found.strides)
    assert lengths.tolist() == sorted(lengths, reverse=True)
    assert lengths[2] == found.itemsize


@given(
    angles=st.tuples(*[st.floats(-20, 20)] * 3),
    which=st.sampled_from(ORDERS),
    indices=st.lists(st.tuples(*[st.floats(-1000, 1000)] * 3), min_size=1, max_size=5),
)
def test_oblique_volumes_keep_every_voxel_at_its_place_and_lead_there_and_back(angles, which, indices):
    turn = rotation(*angles)
    volume = in_frame(*stored(*which, turn=turn))
    np.testing.assert_array_equal(volume.hu, whole())
    expected = ORIGIN + np.array(indices) @ (turn @ FRAME * SPACING).T
    np.testing.assert_allclose(volume.points(indices), expected, atol=1e-9)
    np.testing.assert_allclose(volume.indices(volume.points(indices)), indices, atol=1e-8)
    np.testing.assert_allclose(volume.points(volume.indices(expected)), expected, atol=1e-8)


def test_a_step_along_an_axis_is_its_spacing_along_its_direction():
    direction = rotation(12, -7, 20) @ FRAME
    volume = Volume(whole(), (2.5, 0.4, 0.7), ORIGIN, direction)
    np.testing.assert_allclose(volume.points(np.zeros((1, 3)))[0], ORIGIN)
    steps = volume.points(np.eye(3)) - ORIGIN
    np.testing.assert_allclose(steps, (direction * SPACING).T)
    assert volume.points(np.empty((0, 3))).shape == volume.indices(np.empty((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("degrees", "what"), [(14, ""), (16, "warned"), (39, "warned"), (41, "refused")])
def test_a_grid_turned_beyond_15_degrees_is_said_and_beyond_40_refused(axis, sign, degrees, what):
    turn = rotation(*(sign * degrees * np.eye(3)[axis]))
    for order, signs in ORDERS[::7]:
        arguments = stored(order, signs, turn=turn)
        if what == "refused":
            with pytest.raises(ValueError, match=r"turned by 41° .* up to 40° .* axial reconstruction$"):
                in_frame(*arguments)
            continue
        volume = in_frame(*arguments)
        np.testing.assert_array_equal(volume.hu, whole())
        assert [f"turned by {degrees}°" in warning for warning in volume.warnings] == [True] * (
            what == "warned"
        )


def test_a_volume_shows_its_size_and_no_values():
    volume = Volume(whole(), (2.5, 0.4, 0.7), ORIGIN, FRAME)
    assert repr(volume) == "Volume(3, 4, 5), 2.50 × 0.40 × 0.70 mm (z, y, x)"
