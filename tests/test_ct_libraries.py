import ast
import os
import sys
from pathlib import Path

import pytest

import cspine_helpers
from cspine_helpers.ct import libraries as itk


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
