"""What keeps a file from being a slice: its class, pixels that are missing, foreign files, copies."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom.data
import pytest
import scans
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    MRImageStorage,
    RLELossless,
)
from scans import affine_of, edit, positions, refusal, write_dicom
from test_ct_dicom import SPACING, body

from cspine_helpers.ct.dicom import read_header, read_series, shown
from cspine_helpers.packed import read_manifest

UNCOMPRESSED = (
    *(ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian),
    DeflatedExplicitVRLittleEndian,
)
COMPRESSED = (RLELossless, JPEGLosslessSV1, JPEG2000Lossless)
RSNA = {"signed": True, "intercept": 0, "extra": scans.as_rsna}


def short(uid) -> str:
    return uid.name[:24]


def unset(*keywords):
    return lambda ds, _=0: [delattr(ds, keyword) for keyword in keywords if keyword in ds]


# What a file is.


@pytest.mark.parametrize("syntax", [*UNCOMPRESSED, *COMPRESSED], ids=short)
def test_a_series_with_the_header_of_rsna_2022_is_read(tmp_path, syntax):
    """It states no modality, no class outside the file's meta header, no frame of reference, no kernel."""
    hu = body((5, 33, 41))
    hu[:, :2] = -2048  # noise below air
    write_dicom(tmp_path, hu, SPACING, transfer_syntax=syntax, **RSNA)
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.spacing_mm == SPACING
    assert volume.warnings == ()


@pytest.mark.slow
def test_a_study_of_147_slices_with_the_header_of_rsna_2022_goes_all_the_way_to_a_prediction(tmp_path):
    """Slices, mask, labels and boxes as RSNA lays them out; sequences are those of the volume in memory."""
    from cspine_helpers import checkpoints, labels, packed
    from cspine_helpers.inference.prediction import predict_study
    from cspine_helpers.packing import cohort as studies
    from cspine_helpers.packing.crop import PackConfig, pack_vertebra
    from cspine_helpers.phantom import cohort as phantom
    from cspine_helpers.phantom import scanner as export
    from cspine_helpers.phantom.rendering import render_study

    folder, fractured, config = tmp_path / "neck", {"C2": 1, "C5": 1}, PackConfig(size=64, margin_mm=2.5)
    study = render_study(7, 1, fractured)
    hu = np.rint(study.volume_hu).astype(np.int16)
    images = folder / export.IMAGES / study.uid
    export.write_series(images, hu, study.spacing_mm, study_uid=study.uid, header="rsna")
    assert len(list(images.iterdir())) == 147
    mask = folder / export.SEGMENTATIONS / f"{study.uid}.nii.gz"
    export.write_label_map(mask, study.label_map, study.spacing_mm)
    row = {labels.UID: study.uid, labels.PATIENT: 1, **dict.fromkeys(labels.VERTEBRAE, 0), **fractured}
    labels.write_labels(pd.DataFrame([row]), folder / export.LABELS)
    boxes = pd.DataFrame(phantom.fracture_boxes(study))
    boxes["slice_number"] += 1
    labels.write_boxes(boxes, folder / export.BOXES)

    report = studies.pack_cohort(folder, config=config, sheets=tmp_path / "sheets", workers=1)
    assert report[["status", "sequences", "message"]].to_numpy().tolist() == [["packed", 7, ""]]
    assert (tmp_path / "sheets" / f"{study.uid}.png").stat().st_size > 10_000
    truth = read_manifest(folder / "packed").set_index("vertebra")["slice_truth"]
    assert {vertebra for vertebra in labels.VERTEBRAE if "x" in truth[vertebra]} == {*fractured}
    for vertebra in labels.VERTEBRAE:
        file = packed.sequence_path(folder / "packed", study.uid, vertebra)
        known = pack_vertebra(hu, study.label_map, study.spacing_mm, vertebra, config).array
        np.testing.assert_array_equal(packed.open_sequence(file), known)
    run = checkpoints.load_run(Path(__file__).parents[1] / "checkpoints" / "builtin")
    said = predict_study(run, folder / "packed", study.uid, threshold=0.5)
    assert said.complete
    assert all(0 < probability < 1 for probability in said.probability.values())


STATED = {
    "only the data set's class": lambda ds, _: (unset("Modality")(ds), unset_meta(ds)),
    "only the file's class": lambda ds, _: unset("Modality", "SOPClassUID")(ds),
    "an empty modality": lambda ds, _: setattr(ds, "Modality", ""),
    "lower case": lambda ds, _: setattr(ds, "Modality", "ct"),
    "lower case alone": lambda ds, _: (setattr(ds, "Modality", "ct"), unset("SOPClassUID")(ds)),
}


def unset_meta(ds):
    ds.file_meta.MediaStorageSOPClassUID = ""


@pytest.mark.parametrize("change", STATED.values(), ids=STATED)
@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_modality_or_class_make_it_ct(tmp_path, change):
    hu = body()
    files = write_dicom(tmp_path, hu, SPACING)
    for file in files:
        ds = dcmread(file)
        change(ds, 0)
        ds.save_as(file, enforce_file_format=False)
    np.testing.assert_array_equal(read_series(tmp_path).hu, hu)


@pytest.mark.parametrize("modality", ["MR", "mr", "PT"])
@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_another_stated_modality_is_refused_whatever_the_class(tmp_path, modality):
    write_dicom(tmp_path, body(), SPACING, modality=modality)
    refusal(lambda: read_series(tmp_path), "no CT image", f"modality {modality.upper()}, not CT")


def test_without_modality_and_class_of_ct_it_is_refused(tmp_path):
    def lose(ds, _):
        unset("Modality", "SOPClassUID")(ds)
        ds.file_meta.MediaStorageSOPClassUID = MRImageStorage

    write_dicom(tmp_path, body(), SPACING, extra=lose)
    refusal(lambda: read_series(tmp_path), "no CT image", "modality not given")


# Pixels that are not all there.


def shorten(ds, by=0.4):
    ds.PixelData = ds.PixelData[: int(len(ds.PixelData) * (1 - by)) // 2 * 2]


WRONG_LENGTH = {
    "too few": shorten,
    "two bytes too few": lambda ds: setattr(ds, "PixelData", ds.PixelData[:-2]),
    "none": lambda ds: setattr(ds, "PixelData", b""),
    "two bytes too many": lambda ds: setattr(ds, "PixelData", ds.PixelData + b"\0\0"),
    "twice the rows": lambda ds: setattr(ds, "Rows", ds.Rows * 2),
    "half the rows": lambda ds: setattr(ds, "Rows", ds.Rows // 2),
    "32 bits": lambda ds: ds.update({"BitsAllocated": 32}),  # as they are stored
    "two frames": lambda ds: setattr(ds, "NumberOfFrames", 2),
    "three samples": lambda ds: setattr(ds, "SamplesPerPixel", 3),
    "no rows": unset("Rows"),
}


@pytest.mark.parametrize("change", WRONG_LENGTH.values(), ids=WRONG_LENGTH)
@pytest.mark.parametrize("syntax", UNCOMPRESSED, ids=short)
@pytest.mark.parametrize("damaged", [(2, 4), range(5)], ids=["some", "all"])
def test_pixels_of_another_length_than_the_header_describes_are_damage(tmp_path, syntax, change, damaged):
    files = write_dicom(tmp_path, body((5, 24, 20)), SPACING, transfer_syntax=syntax)
    for z in damaged:
        edit(files[z], change)
    names = [files[z].name for z in damaged]
    refusal(lambda: read_series(tmp_path), tmp_path.name, f"{len(damaged)} of 5", "copy", *names)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("syntax", UNCOMPRESSED, ids=short)
def test_pixels_of_8_and_32_bits_are_read_or_refused(tmp_path, syntax, bits):
    """GDCM swaps the bytes of 32 bits in big endian otherwise than pydicom, without a word."""
    hu = np.clip(body((5, 24, 20)), -100, 100)

    def store(ds):
        order = ">" if syntax == ExplicitVRBigEndian else "<"
        ds.PixelData = hu[ds.InstanceNumber - 1].astype(f"{order}i{bits // 8}").tobytes()
        ds["PixelData"].VR = "OB" if bits == 8 else "OW"
        ds.BitsAllocated = ds.BitsStored = bits
        ds.HighBit, ds.PixelRepresentation, ds.RescaleIntercept = bits - 1, 1, 0

    for file in write_dicom(tmp_path, hu, SPACING, transfer_syntax=syntax):
        edit(file, store)
    if (syntax, bits) == (ExplicitVRBigEndian, 32):
        refusal(lambda: read_series(tmp_path), "5 of 5", "32 bits a pixel", "not read")
    else:
        np.testing.assert_array_equal(read_series(tmp_path).hu, hu)


@pytest.mark.parametrize("syntax", UNCOMPRESSED, ids=short)
def test_a_byte_that_makes_the_length_even_is_no_damage(tmp_path, syntax):
    hu = np.clip(body((5, 15, 21)) // 8, -100, 100)

    def narrow(ds):
        ds.PixelData = (hu[ds.InstanceNumber - 1] + 128).astype(np.uint8).tobytes() + b"\0"
        ds["PixelData"].VR = "OB"
        ds.BitsAllocated = ds.BitsStored = 8
        ds.HighBit, ds.RescaleIntercept = 7, -128

    for file in write_dicom(tmp_path, hu, SPACING, transfer_syntax=syntax):
        edit(file, narrow)
    np.testing.assert_array_equal(read_series(tmp_path).hu, hu)


def text_mode(whole: bytes) -> bytes:
    """The pixels as a transfer that turns line ends of one system into those of another leaves them."""
    start = whole.rindex(b"\xe0\x7f\x10\x00") + 12
    return whole[:start] + whole[start:].replace(b"\n", b"\r\n")


BEHIND = {
    "line ends": text_mode,
    "a byte put in": lambda whole: whole[:-300] + b"\0" + whole[-300:],
    "eight bytes put in": lambda whole: whole[:-300] + b"\1" * 8 + whole[-300:],
    "zeros behind": lambda whole: whole + b"\0" * 6,
    "text behind": lambda whole: whole + b"Doe, Jane 1961",
}


@pytest.mark.parametrize("change", BEHIND.values(), ids=BEHIND)
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian], ids=short)
@pytest.mark.parametrize("size", [16, 64], ids=["small", "large"])
def test_bytes_put_in_before_the_end_of_the_pixels_are_damage(tmp_path, syntax, change, size):
    """The length is right, but all behind them is shifted."""
    hu = body((5, size, size))
    hu[:, -1, -9:] = [10, -1014, 10, -500, 522, 10, 2570, 10, -1024]  # b"\n" in some, zeros at the end
    files = write_dicom(tmp_path, hu, SPACING, transfer_syntax=syntax)
    for z in (2, 4):
        files[z].write_bytes(change(files[z].read_bytes()))
    refusal(lambda: read_series(tmp_path), "2 of 5", "behind its pixels", files[2].name, files[4].name)


@pytest.mark.parametrize("syntax", UNCOMPRESSED[:3], ids=short)
def test_elements_behind_the_pixels_are_no_damage(tmp_path, syntax):
    def append(ds, _):
        ds.add_new(0xFFFCFFFC, "OB", b"\0" * 10)  # DataSetTrailingPadding

    hu = body((5, 24, 20))
    write_dicom(tmp_path, hu, SPACING, transfer_syntax=syntax, extra=append)
    np.testing.assert_array_equal(read_series(tmp_path).hu, hu)


@pytest.mark.parametrize("syntax", UNCOMPRESSED[:3], ids=short)
@pytest.mark.parametrize("items", [0, 1], ids=["empty", "one item"])
def test_a_sequence_of_undefined_length_behind_the_pixels_is_no_damage(tmp_path, syntax, items):
    def sign(ds, _):
        ds.DigitalSignaturesSequence = [item(MACIDNumber=1) for _ in range(items)]
        ds["DigitalSignaturesSequence"].is_undefined_length = True

    hu = body((5, 24, 20))
    write_dicom(tmp_path, hu, SPACING, transfer_syntax=syntax, extra=sign)
    np.testing.assert_array_equal(read_series(tmp_path).hu, hu)


READ_TWO = """
import sys
from pathlib import Path
from cspine_helpers.ct.dicom import read_series
read_series(Path(sys.argv[1]))  # another patient's pixels lie in memory
try:
    volume = read_series(Path(sys.argv[2]))
except ValueError as error:
    print(error)
else:
    print("read", volume.hu.min(), volume.hu.max())
"""


@pytest.mark.parametrize(
    ("poison", "damaged"),
    [("0", (3,)), pytest.param("85", range(6), marks=pytest.mark.slow)],
    ids=["one", "all"],
)
def test_what_lies_in_memory_never_gets_into_a_volume(tmp_path, poison, damaged):
    """glibc fills fresh memory with a byte of our choice, or with 0 leaves in it what was there."""
    write_dicom(tmp_path / "before", body((6, 256, 256)), SPACING)
    files = write_dicom(tmp_path / "short", np.full((6, 256, 256), 40, np.int16), SPACING)
    for z in damaged:
        edit(files[z], shorten)
    code = [sys.executable, "-c", READ_TWO, str(tmp_path / "before"), str(tmp_path / "short")]
    environment = os.environ | {"MALLOC_PERTURB_": poison}
    done = subprocess.run(code, capture_output=True, text=True, env=environment, check=True)
    assert f"{len(damaged)} of 6 files cannot be read" in done.stdout


def rewrap(path: Path, change) -> None:
    """Other compressed pixels in the same wrapping, end marks and all."""
    ds = dcmread(path)
    frame = next(generate_frames(ds.PixelData, number_of_frames=1)).rstrip(b"\0")
    ds.PixelData = encapsulate([change(frame)])
    ds["PixelData"].VR = "OB"
    ds.save_as(path)


END = b"\xff\xd9"
CUT = {
    "half": lambda frame: frame[: len(frame) // 4 * 2],
    "half, with an end": lambda frame: frame[: len(frame) // 4 * 2] + END,
    "the middle lost": lambda frame: frame[: len(frame) // 6 * 2] + frame[len(frame) // 4 * 2 :],
    "ten bytes lost": lambda frame: frame[:-10],
    "ten bytes lost before the end": lambda frame: frame[:-12] + frame[-2:],
    "next to nothing": lambda frame: b"\0\0",
}


@pytest.mark.parametrize("change", CUT.values(), ids=CUT)
@pytest.mark.parametrize("syntax", COMPRESSED, ids=short)
def test_compressed_pixels_that_are_not_all_there_are_damage(tmp_path, syntax, change, capfd):
    """In a whole file. GDCM decodes what is there, and some decoders only complain on standard error."""
    files = write_dicom(tmp_path, body((5, 32, 32)), SPACING, transfer_syntax=syntax)
    for z in (2, 4):
        rewrap(files[z], change)
    refusal(lambda: read_series(tmp_path), "2 of 5", files[2].name, files[4].name, "copy")
    assert "Corrupt JPEG" not in capfd.readouterr().err


@pytest.mark.parametrize("syntax", COMPRESSED, ids=short)
@pytest.mark.parametrize("damaged", [(2, 4), range(5)], ids=["some", "all"])
def test_compressed_pixels_of_another_size_than_the_header_describes_are_damage(tmp_path, syntax, damaged):
    files = write_dicom(tmp_path, body((5, 32, 32)), SPACING, transfer_syntax=syntax)
    for z in damaged:
        edit(files[z], lambda ds: setattr(ds, "Rows", 64))
    refusal(lambda: read_series(tmp_path), f"{len(damaged)} of 5", *(files[z].name for z in damaged), "copy")


@pytest.mark.parametrize("syntax", COMPRESSED, ids=short)
def test_compressed_pixels_in_several_fragments_are_read(tmp_path, syntax):
    def split(frame):
        return [frame[i : i + 400] for i in range(0, len(frame), 400)]

    hu = body((5, 32, 32))
    for file in write_dicom(tmp_path, hu, SPACING, transfer_syntax=syntax):
        ds = dcmread(file)
        frame = next(generate_frames(ds.PixelData, number_of_frames=1))
        ds.PixelData = encapsulate([frame], fragments_per_frame=len(split(frame)))
        ds["PixelData"].VR = "OB"
        ds.save_as(file)
    np.testing.assert_array_equal(read_series(tmp_path).hu, hu)


def zeroed(frame: bytes, *, end: bool) -> bytes:
    """A copy with holes: the second half is zeros, to the end or to the mark of it."""
    half = len(frame) // 2
    return frame[:half] + bytes(len(frame) - half - 2) + (END if end else b"\0\0")


@scans.needs_ct
@pytest.mark.parametrize("syntax", COMPRESSED, ids=short)
@pytest.mark.parametrize("end", [False, True], ids=["to the end", "to the mark"])
def test_compressed_pixels_that_are_half_zeros_are_damage(tmp_path, syntax, end):
    """What GDCM makes of them is as large as it should be, and it says nothing."""
    files = write_dicom(tmp_path, real_hu(), SPACING, transfer_syntax=syntax, **RSNA)
    rewrap(files[2], lambda frame: zeroed(frame, end=end))
    refusal(lambda: read_series(tmp_path), "1 of 6", files[2].name, "copy")


def real_hu() -> np.ndarray:
    """Six slices with air, bone above 1023 HU, and noise."""
    return scans.real_series()[4:10, 150:390, 130:370]


# Words and values.

OTHER_WORDS = {
    "sign": lambda ds: setattr(ds, "PixelRepresentation", 1 - ds.PixelRepresentation),
    "12 bits": lambda ds: ds.update({"BitsStored": 12, "HighBit": 11}),
    "15 bits": lambda ds: ds.update({"BitsStored": 15, "HighBit": 14}),
    "high bit": lambda ds: setattr(ds, "HighBit", 14),
}


@pytest.mark.parametrize("change", OTHER_WORDS.values(), ids=OTHER_WORDS)
@pytest.mark.parametrize("syntax", [*UNCOMPRESSED, *COMPRESSED], ids=short)
@pytest.mark.parametrize("odd", [(2,), (0, 4)], ids=["one", "two"])
def test_slices_with_other_words_than_the_rest_are_refused_by_name(tmp_path, syntax, change, odd):
    """A lost sign turns air and fat into metal."""
    files = write_dicom(tmp_path, body((5, 32, 32)), SPACING, transfer_syntax=syntax, **RSNA)
    for z in odd:
        edit(files[z], change)
    names = [files[z].name for z in odd]
    refusal(lambda: read_series(tmp_path), tmp_path.name, f"{len(odd)} of 5", *names)


def test_values_beyond_those_of_int16_are_refused(tmp_path):
    hu = body()
    for file in write_dicom(tmp_path, hu, SPACING, **RSNA):
        edit(file, OTHER_WORDS["sign"])
    refusal(lambda: read_series(tmp_path), "10 of 10", "above 32767 HU")


@pytest.mark.parametrize("values", [1, 3])
def test_values_below_those_of_int16_are_said(tmp_path, values):
    """Padding that the header does not declare."""
    hu = body()
    padded = np.zeros(hu.shape, bool)
    padded[:, -values:] = True
    write_dicom(
        tmp_path, hu, SPACING, signed=True, padded=padded, padding=-32768, extra=unset("PixelPaddingValue")
    )
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, np.where(padded, -32768, hu))
    assert [("below -32768 HU" in warning) for warning in volume.warnings] == [True]


def few_bits(bits: int, *, signed: bool = False):
    def change(ds, _):
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits, bits - 1, int(signed)

    return change


OVERFLOWS = {
    "12 bits with a sign they need": ({}, few_bits(12, signed=True)),
    "8 bits": ({}, few_bits(8)),
    "8 bits with a sign": (RSNA, few_bits(8, signed=True)),
    "10 bits with a sign": (RSNA, few_bits(10, signed=True)),
    "12 bits and the sign lost": (RSNA, few_bits(12)),
}


@scans.needs_ct
@pytest.mark.parametrize(("options", "change"), OVERFLOWS.values(), ids=OVERFLOWS)
@pytest.mark.parametrize("syntax", [*UNCOMPRESSED, RLELossless], ids=short)
def test_values_of_more_bits_than_the_header_describes_are_damage(tmp_path, syntax, options, change):
    """They wrap: what is above 1023 HU gets below air."""
    for file in write_dicom(tmp_path, real_hu(), SPACING, transfer_syntax=syntax, **options):
        edit(file, lambda ds: change(ds, 0))
    refusal(
        lambda: read_series(tmp_path), "6 of 6", "more than the", "bits that its header describes", "copy"
    )


def sign_left_out(ds, z):
    scans.as_rsna(ds, z)
    few_bits(12, signed=True)(ds, z)
    ds.PixelData = (np.frombuffer(ds.PixelData, np.uint16) & 0xFFF).tobytes()


def overlay(ds, z):
    """Drawn into a bit above those of the pixels, as in DICOM before 2004."""
    few_bits(12)(ds, z)
    words = np.frombuffer(ds.PixelData, np.uint16).copy()
    words[:: 3 + z] |= 0x4000
    ds.PixelData = words.tobytes()
    ds.add_new(0x60000100, "US", 16)
    ds.add_new(0x60000102, "US", 14)


FITTING = {
    "12 bits": ({}, few_bits(12)),
    "12 bits with a sign": (RSNA, lambda ds, z: (scans.as_rsna(ds, z), few_bits(12, signed=True)(ds, z))),
    "12 bits with a sign that is left out above": (RSNA, sign_left_out),
    "12 bits and an overlay": ({}, overlay),
}


@scans.needs_ct
@pytest.mark.parametrize(("options", "change"), FITTING.values(), ids=FITTING)
def test_signs_and_overlays_above_the_bits_stored_are_no_damage(tmp_path, options, change):
    hu = np.minimum(real_hu(), 2047)
    write_dicom(tmp_path, hu, SPACING, **(options | {"extra": change}))
    np.testing.assert_array_equal(read_series(tmp_path).hu, hu)


@pytest.mark.parametrize("allocated", [8, 16])
@pytest.mark.parametrize("syntax", COMPRESSED[1:], ids=short)
def test_compressed_pixels_of_more_bits_than_the_header_describes_are_damage(tmp_path, syntax, allocated):
    """GDCM drops them, and its decoder only writes that it does."""

    def narrow(ds):
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = allocated, 8, 7

    for file in write_dicom(tmp_path, body((5, 32, 32)), SPACING, transfer_syntax=syntax, **RSNA):
        edit(file, narrow)
    refusal(lambda: read_series(tmp_path), "5 of 5", "16 bits a pixel where its header describes 8", "copy")


# Files beside the slices.

FOREIGN = {
    "report.pdf": b"%PDF-1.7\n" + b"0 0 0 rg " * 5000,
    "all.zip": b"PK\x03\x04" + bytes(range(256)) * 100,
    "1.2.826.0.1.3680043.7.nii.gz": b"\x1f\x8b\x08\0" + bytes(range(256)) * 100,
    "mask.nii": b"\x5c\x01\0\0" + bytes(40_000),
    "notes.txt": b"Doe, Jane\n" * 20_000,
    "no ending": b"Doe, Jane\n" * 20_000,
    "Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(30_000),
    "figure.png": b"\x89PNG\r\n\x1a\n" + bytes(30_000),
    "done": b"",
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("names", [None, [f"IM{z}" for z in range(10)]], ids=["1.dcm", "IM1"])
def test_foreign_files_of_any_size_are_left_out_and_counted(tmp_path, name, names):
    hu = body()
    write_dicom(tmp_path, hu, SPACING, names=names)
    (tmp_path / name).write_bytes(FOREIGN[name])
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.warnings == ("files left out, as they are no slices of the CT: 1 × no DICOM file",)


BROKEN = {
    "cut off behind the preamble": lambda whole: whole[:140],
    "cut off in the header": lambda whole: whole[:400],
    "without a preamble, cut off": lambda whole: whole[132:-40],
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("syntax", UNCOMPRESSED[:3], ids=short)
def test_what_begins_as_dicom_is_damage_whatever_it_is_called(tmp_path, change, syntax):
    files = write_dicom(tmp_path, body(), SPACING, transfer_syntax=syntax)
    (tmp_path / "other.pdf").write_bytes(change(files[9].read_bytes()))
    files[9].unlink()
    refusal(lambda: read_series(tmp_path), "1 of 10", "other.pdf", "copy")


@pytest.mark.parametrize("syntax", UNCOMPRESSED[:3], ids=short)
@pytest.mark.parametrize("kept", [1, 0.8], ids=["whole", "cut off"])
def test_a_data_set_without_preamble_and_meta_header_is_read_or_damage(tmp_path, syntax, kept):
    hu = body()
    files = write_dicom(tmp_path, hu, SPACING, names=[f"IM{z}" for z in range(10)], transfer_syntax=syntax)
    whole = files[9].read_bytes()
    files[9].unlink()
    first = b"\0\x08\0\x08" if syntax == ExplicitVRBigEndian else b"\x08\0\x08\0"  # ImageType
    whole = whole[whole.index(first) :]
    (tmp_path / "other").write_bytes(whole[: int(len(whole) * kept)])
    if kept == 1:
        np.testing.assert_array_equal(read_series(tmp_path).hu, hu)
    else:
        refusal(lambda: read_series(tmp_path), "1 of 10", "other", "copy")


@pytest.mark.parametrize("content", [b"", b"\0" * 3000, b"%PDF-1.7\n" * 30], ids=["empty", "zeros", "PDF"])
def test_a_file_named_as_slices_are_that_is_none_is_damage(tmp_path, content):
    """At the series' end, no gap would tell."""
    files = write_dicom(tmp_path, body(), SPACING, names=[f"IM{z}" for z in range(10)])
    files[9].write_bytes(content)
    refusal(lambda: read_series(tmp_path), "1 of 10", "nothing can be read", "IM9", "copy")


def test_copies_to_the_byte_are_left_out_and_counted(tmp_path):
    hu = body()
    files = write_dicom(tmp_path, hu, SPACING)
    shutil.copy(files[3], tmp_path / "a copy.dcm")
    shutil.copy(files[3], tmp_path / "0003 (1).dcm")
    shutil.copy(files[8], tmp_path / "IM8")
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.warnings == ("files left out, as they are no slices of the CT: 3 × a copy of another file",)


@pytest.mark.parametrize("uid", [True, False], ids=["same UID", "without a UID"])
def test_slices_that_share_their_uid_are_no_copies(tmp_path, uid):
    """As some anonymisers leave them: the bytes decide."""

    def same(ds, _):
        ds.SOPInstanceUID = "1.2.3" if uid else ""

    hu = body()
    write_dicom(tmp_path, hu, SPACING, extra=same)
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.warnings == ()


# Enhanced CT: all slices are frames of one file.


def item(**elements) -> Dataset:
    ds = Dataset()
    ds.update(elements)
    return ds


def write_enhanced(
    folder: Path, hu: np.ndarray, *, order=None, intercepts=None, syntax=ExplicitVRLittleEndian, change=None
) -> Path:
    """By pydicom; positions stand with each frame, the rescale with all unless `intercepts` are given.

    Source: DICOM PS3.3 sections A.38 (enhanced CT) and C.7.6.16 (functional groups).
    """
    write_dicom(folder, hu[:1], SPACING, names=["all.dcm"], slope=1, intercept=-1024)
    ds = dcmread(folder / "all.dcm")
    unset("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness")(ds)
    unset("RescaleIntercept", "RescaleSlope", "RescaleType")(ds)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    order = range(len(hu)) if order is None else order
    affine = affine_of(SPACING)
    shared = item(
        PixelMeasuresSequence=[item(PixelSpacing=list(SPACING[1:]), SliceThickness=SPACING[0])],
        PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
    )
    if intercepts is None:
        shared.PixelValueTransformationSequence = [item(RescaleIntercept=-1024, RescaleSlope=1)]
    frames = []
    for k, z in enumerate(order):
        place = list(positions(affine, np.array([z, 0, 0])))
        frames.append(item(PlanePositionSequence=[item(ImagePositionPatient=place)]))
        frames[-1].FrameContentSequence = [item(FrameAcquisitionNumber=1, DimensionIndexValues=[1, k + 1])]
        if intercepts is not None:
            rescale = item(RescaleIntercept=intercepts[k], RescaleSlope=1)
            frames[-1].PixelValueTransformationSequence = [rescale]
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [shared], frames
    ds.NumberOfFrames = len(hu)
    low = np.reshape(-1024 if intercepts is None else intercepts, (-1, 1, 1))
    pixels = (hu[list(order)] - low).astype(np.uint16)
    ds.PixelData = pixels.astype(">u2" if syntax == ExplicitVRBigEndian else "<u2").tobytes()
    ds["PixelData"].VR = "OW"
    if change:
        change(ds)
    ds.file_meta.TransferSyntaxUID = syntax
    if syntax == RLELossless:
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.compress(RLELossless, generate_instance_uid=False)
    little, implicit = syntax != ExplicitVRBigEndian, syntax == ImplicitVRLittleEndian
    fresh = Dataset(ds)
    fresh.file_meta = ds.file_meta
    fresh.save_as(folder / "all.dcm", enforce_file_format=True, little_endian=little, implicit_vr=implicit)
    return folder


def open_ended(ds) -> None:
    for element in (ds["SharedFunctionalGroupsSequence"], ds["PerFrameFunctionalGroupsSequence"]):
        element.is_undefined_length = True
        for each in element.value:
            each.is_undefined_length_sequence_item = True


ORDERS = {"down": None, "up": range(9, -1, -1), "mixed": np.random.default_rng(0).permutation(10)}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("syntax", [*UNCOMPRESSED, RLELossless], ids=short)
@pytest.mark.parametrize("change", [None, open_ended], ids=["lengths", "delimiters"])
def test_enhanced_ct_is_put_in_order_by_its_frames_positions(tmp_path, syntax, order, change):
    hu = body()
    write_enhanced(tmp_path, hu, order=order, syntax=syntax, change=change)
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    np.testing.assert_allclose(volume.spacing_mm, SPACING)
    np.testing.assert_allclose(volume.origin_mm, scans.ORIGIN)
    assert sorted(volume.frames) == list(range(1, 11))
    for number, z in enumerate(range(10) if order is None else order, start=1):
        np.testing.assert_allclose(volume.indices(volume.frames[number][:1]), [[z, 0, 0]], atol=1e-6)


def test_enhanced_ct_may_state_the_same_rescale_with_each_frame(tmp_path):
    hu = body()
    write_enhanced(tmp_path, hu, intercepts=[-1100] * 10)
    np.testing.assert_array_equal(read_series(tmp_path).hu, hu)


def test_enhanced_ct_with_a_rescale_of_its_own_for_each_frame_is_refused(tmp_path):
    write_enhanced(tmp_path, body(), intercepts=[-1024 - 10 * z for z in range(10)])
    refusal(lambda: read_series(tmp_path), "no CT image", "several frames", "rescale", "convert")


BAD_FRAMES = {
    "two at one place": (
        lambda ds: setattr(
            ds.PerFrameFunctionalGroupsSequence[4],
            "PlanePositionSequence",
            ds.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence,
        ),
        ("same position", "frame 4", "frame 5"),
    ),
    "one without a place": (
        lambda ds: delattr(ds.PerFrameFunctionalGroupsSequence[4], "PlanePositionSequence"),
        ("1 of 10", "position", "frame 5"),
    ),
    "fewer places than frames": (lambda ds: ds.PerFrameFunctionalGroupsSequence.pop(), ("several frames",)),
    "fewer pixels than frames": (shorten, ("1 of 1", "bytes of pixels")),
    "no groups": (unset("PerFrameFunctionalGroupsSequence"), ("several frames",)),
}


@pytest.mark.parametrize(("change", "parts"), BAD_FRAMES.values(), ids=BAD_FRAMES)
def test_enhanced_ct_whose_frames_make_no_volume_is_refused(tmp_path, change, parts):
    write_enhanced(tmp_path, body(), change=change)
    refusal(lambda: read_series(tmp_path), tmp_path.name, *parts)


# Free text.

KERNELS = ("Br38f", "B30f", "Hr64h\\3", "I26f/2", "H31s", "FC08", "BONEPLUS", "STANDARD", "C", "YB", "FC51")
NAMES = ("Doe^Jane", "DOE JANE", "Jane", "ROE", "19610203", "4711", "<script>", "Br38f Doe", "=1+1")


def test_kernels_of_manufacturers_are_shown_and_other_text_is_not():
    assert [shown({"kernel": kernel}, "kernel") for kernel in KERNELS] == list(KERNELS)
    hidden = [shown({"kernel": name}, "kernel") for name in NAMES]
    assert all(re.fullmatch(r"unknown-[0-9a-f]{4}", text) for text in hidden)
    assert len(set(hidden)) == len(NAMES)  # series stay apart
    assert shown({"kernel": None}, "kernel") == "not given"


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_a_series_whose_uid_is_none_is_not_named_by_it_and_can_be_chosen(tmp_path):
    for series, hu in (("Doe^Jane", body()), ("Roe^Richard", body(seed=1))):
        write_dicom(tmp_path, hu, SPACING, series_uid=series, names=[f"{series[:3]}{z}" for z in range(10)])
    message = refusal(lambda: read_series(tmp_path), "2 CT series", "unknown-")
    read = [read_series(tmp_path, series=name).hu for name in re.findall(r"unknown-\w{4}", message)]
    np.testing.assert_array_equal(sorted(read, key=np.sum), sorted((body(), body(seed=1)), key=np.sum))


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_no_free_text_of_headers_is_ever_said(tmp_path):
    """Whatever stands in a header, it may be a name."""

    def say(ds, _):
        ds.ConvolutionKernel, ds["SliceThickness"]._value = "Doe^Jane", "Jane Doe 1961"
        ds.ImageType, ds.RescaleType = ["DOE", "JANE"], "Doe"

    for series in ("1.2.77", "1.2.88"):
        names = [f"{series}.{z}" for z in range(10)]
        write_dicom(tmp_path / "two", body(), SPACING, series_uid=series, names=names, extra=say)
    refusal(lambda: read_series(tmp_path / "two"), "2 CT series", "kernel unknown-")


@pytest.mark.parametrize(
    ("element", "text", "said"),
    [
        ("Modality", "DOE_JANE", "no CT image"),
        ("PhotometricInterpretation", "JANE DOE", "no CT image"),
        ("RescaleSlope", "Doe^Jane", "slope is no number"),
        ("RescaleIntercept", "Doe^Jane", "intercept is no number"),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_codes_and_numbers_that_are_none_are_not_said(tmp_path, element, text, said):
    def garble(ds, _):
        ds.add_new("PixelPaddingValue", "US", 63536)
        ds.add_new(element, "LO", text)

    write_dicom(tmp_path, body(), SPACING, extra=garble, transfer_syntax=ImplicitVRLittleEndian)
    refusal(lambda: read_series(tmp_path), said)


# Files that other writers made: all that pydicom ships.

SHIPPED = Path(pydicom.data.__file__).parent
MORE_OF_A_KIND = re.compile(r"/IM0000(0[1-9A-Z]|1.)$")
OTHERS = sorted(
    path
    for path in SHIPPED.rglob("*")
    if path.is_file() and path.suffix != ".py" and not MORE_OF_A_KIND.search(str(path))
)
NOT_WRITTEN = "SC_rgb_jpeg.dcm"  # in colour; pydicom reads it, but cannot write it again
IMAGES = [
    path for path in OTHERS if (header := read_header(path)) and header.shape[0] and path.name != NOT_WRITTEN
]
SERIES = SHIPPED / "test_files" / "dicomdirtests" / "98892001" / "CT5N"


def named(path: Path) -> str:
    return path.relative_to(SHIPPED).as_posix()


def assert_sentence(message: str) -> None:
    assert message.endswith(".")
    assert not re.search(r"0x[0-9a-f]{4}|\n|Traceback|/tmp|::|itk", message), message


def test_there_are_files_to_try():
    assert len(OTHERS) > 120
    assert len(IMAGES) > 90


@pytest.mark.slow
@pytest.mark.parametrize("path", OTHERS, ids=named)
def test_no_single_file_is_a_volume_and_one_sentence_says_why(tmp_path, path):
    shutil.copy(path, tmp_path)
    assert_sentence(refusal(lambda: read_series(tmp_path), tmp_path.name))


def test_a_shipped_series_is_read_as_pydicom_reads_it():
    slices = sorted((dcmread(file) for file in SERIES.iterdir()), key=lambda ds: -ds.ImagePositionPatient[2])
    expected = [ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in slices]
    np.testing.assert_array_equal(read_series(SERIES).hu, np.stack(expected))


TWINS = sorted(path.name for path in OTHERS if re.match(r"MR_small_(?!padded)", path.name))


@pytest.mark.parametrize("name", TWINS)
def test_one_picture_in_eight_transfer_syntaxes_is_read_alike(tmp_path, name):
    """JPEG-LS, too, which pydicom alone does not decode."""
    as_ct(SHIPPED / "test_files" / name, tmp_path / "ct")
    known = dcmread(SHIPPED / "test_files" / "MR_small.dcm").pixel_array
    np.testing.assert_array_equal(read_series(tmp_path / "ct").hu, [known, known])


@pytest.mark.parametrize("change", CUT.values(), ids=CUT)
def test_jpeg_ls_that_is_not_all_there_is_damage(tmp_path, change):
    as_ct(SHIPPED / "test_files" / "MR_small_jpeg_ls_lossless.dcm", tmp_path / "ct")
    rewrap(tmp_path / "ct" / "1.dcm", change)
    refusal(lambda: read_series(tmp_path / "ct"), "1 of 2", "1.dcm", "copy")


def as_ct(path: Path, folder: Path) -> None:
    """Two slices of a CT with an image's pixels as they are written."""
    folder.mkdir()
    for z in range(2):
        ds = dcmread(path, force=True)
        ds.Modality, ds.SOPClassUID, ds.SOPInstanceUID = "CT", CTImageStorage, f"1.2.3.{z}"
        ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, -z], [1, 0, 0, 0, 1, 0]
        ds.SeriesInstanceUID, ds.PixelSpacing, ds.ImageType = "1.2.3", [1, 1], ["ORIGINAL"]
        ds.AcquisitionNumber = ds.InstanceNumber = 1
        ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
        ds.save_as(folder / f"{z}.dcm", enforce_file_format=False)


@pytest.mark.slow
@pytest.mark.parametrize("path", IMAGES, ids=named)
@pytest.mark.filterwarnings("ignore")
def test_pixels_of_any_writer_are_read_as_pydicom_reads_them_or_refused(tmp_path, path):
    as_ct(path, tmp_path / "ct")
    try:
        hu = read_series(tmp_path / "ct").hu
    except ValueError as error:
        assert_sentence(str(error))
        return
    ds = dcmread(path)
    try:
        stored = ds.pixel_array
    except RuntimeError:  # it cannot decode these without packages that are not installed
        assert hu.shape == (2, ds.Rows, ds.Columns)
        return
    expected = stored * float(ds.get("RescaleSlope") or 1) + float(ds.get("RescaleIntercept") or 0)
    assert stored.shape == (ds.Rows, ds.Columns)
    is_padding = stored == ds.get("PixelPaddingValue", np.nan)
    for plane in hu:
        np.testing.assert_array_equal(plane[is_padding], -1024)
        np.testing.assert_allclose(
            plane[~is_padding], np.clip(expected[~is_padding], -32768, 32767), atol=1e-3
        )
