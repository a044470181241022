import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from toy_cohort import toy_sequence

from cspine_helpers.files.paths import write_checksums
from cspine_helpers.labels import UID
from cspine_helpers.packed import (
    MANIFEST_COLUMNS,
    PROVENANCE_COLUMNS,
    check_sequences,
    open_sequence,
    read_manifest,
    sequence_path,
    slice_truth_array,
    unusable_sequences,
    write_manifest,
    write_sequence,
)

UID_1 = "1.2.3"


@pytest.fixture
def array() -> np.ndarray:
    return toy_sequence(np.random.default_rng(0), fractured=True)[0]


def npy(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


def header(text: str, body: bytes = b"") -> bytes:
    line = text.encode("latin1")
    return b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line + body


def test_a_written_sequence_opens_memory_mapped_and_read_only(tmp_path, array):
    path = write_sequence(tmp_path, UID_1, "C3", array)
    assert path == sequence_path(tmp_path, UID_1, "C3") == tmp_path / "1.2.3_3.npy"
    opened = open_sequence(path, slices=5, size=32)
    assert isinstance(opened, np.memmap)
    assert not opened.flags.writeable
    np.testing.assert_array_equal(opened, array)
    np.testing.assert_array_equal(np.load(path, allow_pickle=False), array)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_in_0_1_become_uint8_when_written_and_when_opened(tmp_path, array, dtype):
    floats = (array / 255).astype(dtype)
    np.testing.assert_array_equal(open_sequence(write_sequence(tmp_path, UID_1, "C1", floats)), array)
    np.save(tmp_path / "1.2.3_2.npy", floats)
    opened = open_sequence(tmp_path / "1.2.3_2.npy")
    assert opened.dtype == np.uint8
    np.testing.assert_array_equal(opened, array)


def test_a_fortran_ordered_array_is_written_in_c_order(tmp_path, array):
    path = write_sequence(tmp_path, UID_1, "C1", np.asfortranarray(array))
    np.testing.assert_array_equal(open_sequence(path), array)


@pytest.mark.parametrize("uid", ["../1.2", "/etc/1", ".", "..", "1.2/3", "", "1.2\0", "1.2\n", "１.2", "٣.٤"])
def test_a_uid_that_could_leave_the_folder_is_refused(tmp_path, uid):
    with pytest.raises(ValueError, match="cannot be file names"):
        sequence_path(tmp_path, uid, "C1")


def test_an_unknown_vertebra_is_refused(tmp_path):
    with pytest.raises(ValueError, match="found 'C8'"):
        sequence_path(tmp_path, UID_1, "C8")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: a[..., :5], r"shape \(5, 32, 32, 5\)"),
        (lambda a: a[0], r"shape \(32, 32, 6\)"),
        (lambda a: a[:0], r"shape \(0, 32, 32, 6\)"),
        (lambda a: a.astype(np.int16), "dtype int16"),
        (lambda a: a.astype(np.float32), "float values from 0 to 255"),
        (lambda a: np.where(a > 200, np.nan, a / 255), "no NaN"),
        (lambda a: np.where(a > 200, np.inf, a / 255), "from 0 to inf"),
        (lambda a: a * np.array([1, 1, 1, 1, 1, 0], np.uint8), "empty mask"),
    ],
)
def test_what_a_reader_would_refuse_is_not_written(tmp_path, array, change, reason):
    with pytest.raises(ValueError, match=f"1.2.3_1.npy was not written: .*{reason}"):
        write_sequence(tmp_path, UID_1, "C1", change(array))
    assert list(tmp_path.iterdir()) == []


HUGE = "{'descr': '|u1', 'fortran_order': False, 'shape': (999999999999, 999999999, 999999999, 6), }\n"
CORRUPTIONS = {
    "no npy": (lambda a: b"hello", "not a .npy file of version 1.0"),
    "empty file": (lambda a: b"", "not a .npy file of version 1.0"),
    "version 2": (lambda a: npy(a, version=(2, 0)), "not a .npy file of version 1.0"),
    "pickle": (lambda a: npy(np.array([{"a": 1}], dtype=object)), r"dtype '\|O'"),
    "integers": (lambda a: npy(a.astype(np.int16)), "dtype '<i2'"),
    "big-endian": (lambda a: npy((a / 255).astype(">f4")), "dtype '>f4'"),
    "structured": (lambda a: npy(np.zeros(3, dtype=[("a", "u1")])), "expected uint8"),
    "Fortran order": (lambda a: npy(np.asfortranarray(a)), "Fortran order"),
    "truncated": (lambda a: npy(a)[:-1], "truncated: "),
    "cut inside the header": (lambda a: npy(a)[:40], "header cannot be read"),
    "trailing bytes": (lambda a: npy(a) + b"\0", "trailing bytes: "),
    "negative lengths": (lambda a: header(HUGE.replace("9, 6)", "9, -6)")), "shape"),
    "lengths that are no numbers": (lambda a: header(HUGE.replace("6)", "True)")), "shape"),
    "shape that is no tuple": (lambda a: header(HUGE.split("(")[0] + "6}"), "shape is not valid"),
    "header that calls a function": (lambda a: header("__import__('os').getcwd()"), "cannot be read"),
    "header nested deeply": (lambda a: header("(" * 60000), "cannot be read"),
    "header without shape": (lambda a: header("{'descr': '|u1'}"), "cannot be read"),
    "five channels": (lambda a: npy(a[..., :5]), r"shape \(5, 32, 32, 5\), expected \(5, 32, 32, 6\)"),
    "other T": (lambda a: npy(a[:4]), r"shape \(4, 32, 32, 6\)"),
    "not square": (lambda a: npy(a[:, :30].copy()), r"shape \(5, 30, 32, 6\)"),
    "Hounsfield floats": (lambda a: npy(a.astype(np.float32) - 1000), "float values from -1000"),
    "NaN": (lambda a: npy(np.full(a.shape, np.nan, np.float32)), "no NaN"),
}  # fmt: skip


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_damaged_file_is_refused_by_name_with_its_reason(tmp_path, array, name):
    damage, reason = CORRUPTIONS[name]
    path = tmp_path / "1.2.3_1.npy"
    path.write_bytes(damage(array))
    with pytest.raises(ValueError, match=f"1.2.3_1.npy is not a usable packed sequence: .*{reason}"):
        open_sequence(path, slices=5, size=32)


def test_a_header_that_declares_a_huge_array_costs_no_memory(tmp_path):
    path = tmp_path / "1.2.3_1.npy"
    path.write_bytes(header(HUGE))
    with pytest.raises(ValueError, match=r"truncated: 1\d\d bytes, where its header declares 5\d{30,}"):
        open_sequence(path)


def test_a_missing_file_names_the_next_step(tmp_path):
    with pytest.raises(FileNotFoundError, match="make cohort"):
        open_sequence(tmp_path / "1.2.3_1.npy")


def test_the_check_lists_all_bad_files_at_once(tmp_path, array):
    samples = pd.DataFrame({UID: UID_1, "vertebra": ["C1", "C2", "C3", "C4", "C5", "C6"]})
    good = write_sequence(tmp_path, UID_1, "C1", array)
    (tmp_path / "1.2.3_2.npy").write_bytes(good.read_bytes()[:-7])
    np.save(tmp_path / "1.2.3_3.npy", np.zeros_like(array))
    (tmp_path / "1.2.3_5.npy").mkdir()
    np.save(tmp_path / "1.2.3_6.npy", array[:3])
    with pytest.raises(ValueError, match="5 of 6 packed sequences") as caught:
        check_sequences(tmp_path, samples, slices=5, size=32)
    text = str(caught.value)
    assert "1.2.3_1.npy" not in text
    for part in (
        "_2.npy (truncated",
        "_3.npy (empty mask",
        "_4.npy (missing",
        "_5.npy (missing",
        "_6.npy (shape",
    ):
        assert part in text
    check_sequences(tmp_path, samples.iloc[:1], slices=5, size=32)

    bad = unusable_sequences(tmp_path, samples, slices=5, size=32)
    assert list(bad) == [(UID_1, vertebra) for vertebra in ("C2", "C3", "C4", "C5", "C6")]
    assert bad[UID_1, "C4"] == "missing"
    assert unusable_sequences(tmp_path, samples.iloc[:1], slices=5, size=32) == {}


@pytest.mark.parametrize(("value", "is_usable"), [(2, False), (127, False), (128, True), (255, True)])
@pytest.mark.parametrize("position", [0, 2, 4])
def test_a_pixel_above_127_makes_a_mask_wherever_it_lies(tmp_path, array, value, is_usable, position):
    array[..., 5] = 0
    array[position, 31, 0, 5] = value
    np.save(tmp_path / "1.2.3_1.npy", array)
    bad = unusable_sequences(tmp_path, pd.DataFrame({UID: [UID_1], "vertebra": "C1"}))
    expected = {} if is_usable else {(UID_1, "C1"): "empty mask: no pixel of channel 5 above 127"}
    assert bad == expected


def test_a_mask_of_0_and_1_is_read_and_written_as_one_of_0_and_255(tmp_path, array):
    """As who binarised it would store it; intensities stay as they are."""
    binary = array.copy()
    binary[..., 5] = array[..., 5] > 127
    binary[0, 0, :6, 0] = 1
    expected = np.concatenate([binary[..., :5], binary[..., 5:] * np.uint8(255)], axis=-1)
    np.save(tmp_path / "1.2.3_1.npy", binary)
    check_sequences(tmp_path, pd.DataFrame({UID: [UID_1], "vertebra": "C1"}), slices=5, size=32)
    np.testing.assert_array_equal(open_sequence(tmp_path / "1.2.3_1.npy"), expected)
    written = write_sequence(tmp_path, UID_1, "C2", binary)
    np.testing.assert_array_equal(np.load(written), expected)
    np.testing.assert_array_equal(np.load(tmp_path / "1.2.3_1.npy"), binary)  # the file is as it was


def test_one_pixel_above_1_makes_a_mask_of_0_to_255(tmp_path, array):
    array[..., 5] = 1
    array[4, 31, 31, 5] = 200
    np.save(tmp_path / "1.2.3_1.npy", array)
    np.testing.assert_array_equal(open_sequence(tmp_path / "1.2.3_1.npy"), array)


def test_a_long_list_of_bad_files_is_counted_and_its_first_ten_named(tmp_path):
    samples = pd.DataFrame({UID: [f"1.{i}" for i in range(140)], "vertebra": "C1"})
    with pytest.raises(ValueError, match="140 of 140") as error:
        check_sequences(tmp_path, samples)
    assert [uid for uid in samples[UID] if f"{uid}_1.npy (missing)" in str(error.value)] == [
        f"1.{i}" for i in range(10)
    ]
    assert "(missing) and 130 more." in str(error.value)


def test_lists_are_written_like_arrays_or_refused_with_a_reason(tmp_path, array):
    path = write_sequence(tmp_path, UID_1, "C1", (array / 255).tolist())
    assert np.array_equal(open_sequence(path), array)
    for value in (array.tolist(), [[1.0], [1.0, 2.0]], [], None, "text"):
        with pytest.raises(ValueError, match=r"1\.2\.3_2\.npy was not written: "):
            write_sequence(tmp_path, UID_1, "C2", value)


def manifest() -> pd.DataFrame:
    rows = [[UID_1, "C1", *[1.5] * 9, "..x.."], ["1.20", "C2", *[2.5] * 9, np.nan]]
    return pd.DataFrame(rows, columns=list(MANIFEST_COLUMNS))


def test_the_manifest_comes_back_as_it_was_written(tmp_path):
    write_manifest(manifest(), tmp_path)
    back = read_manifest(tmp_path)
    pd.testing.assert_frame_equal(back, manifest(), check_dtype=False)
    assert back[UID].tolist() == [UID_1, "1.20"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vertebra": "C9"}, "none of C1, C2"),
        ({UID: "../x"}, "cannot be file names"),
        ({UID: "1.1", "vertebra": "C1"}, r"repeat StudyInstanceUID and vertebra \(1\): '1\.1 C1'"),
        ({"pixel_mm": "wide"}, r"not finite numbers above 0 \(2\): '1\.2\.3 C1 pixel_mm: wide'"),
        ({"z_first_mm": np.nan}, r"not finite numbers \(2\): '1\.2\.3 C1 z_first_mm: nan', '1\.20 C2 "),
        ({"window_low_hu": -np.inf}, r"not finite numbers \(2\)"),
        ({"pixel_mm": 0.0}, r"not finite numbers above 0 \(2\)"),
        ({"slice_truth": "..o.."}, r"slice truths .*: '1\.2\.3 C1: \.\.o\.\.', '1\.20 C2"),
    ],
)
def test_a_manifest_that_breaks_the_schema_is_refused(tmp_path, change, reason):
    with pytest.raises(ValueError, match=reason):
        write_manifest(manifest().assign(**change), tmp_path)
    assert not (tmp_path / "manifest.csv").exists()
    manifest().assign(**change).to_csv(tmp_path / "manifest.csv", index=False)
    with pytest.raises(ValueError, match=reason):
        read_manifest(tmp_path)


def test_a_manifest_without_a_column_or_a_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="make cohort"):
        read_manifest(tmp_path)
    with pytest.raises(ValueError, match=r"lacks the column\(s\) 'pixel_mm'"):
        write_manifest(manifest().drop(columns="pixel_mm"), tmp_path)


def test_slice_truth_becomes_numbers_and_unknown_becomes_nan():
    truth = slice_truth_array(".x.", 3)
    assert truth.dtype == np.float32
    assert truth.tolist() == [0, 1, 0]
    for unknown in (np.nan, None, "", pd.NA):
        assert np.isnan(slice_truth_array(unknown, 3)).all()


@pytest.mark.parametrize("text", [".x", "..o", 3, "x" * 4])
def test_a_slice_truth_that_does_not_fit_is_refused(text):
    with pytest.raises(ValueError, match=f"3 characters .* found {re.escape(repr(text))}"):
        slice_truth_array(text, 3)


def test_no_temporary_file_stays_behind(tmp_path, array):
    write_sequence(tmp_path, UID_1, "C1", array)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["1.2.3_1.npy"]


def test_a_sequence_that_is_a_link_out_of_the_folder_is_refused_and_the_folder_may_be_one(tmp_path, array):
    disk, elsewhere = tmp_path / "disk", tmp_path / "elsewhere"
    write_sequence(disk, UID_1, "C1", array)
    outside = write_sequence(elsewhere, UID_1, "C1", array)
    (tmp_path / "packed").symlink_to(disk)
    sequence_path(disk, UID_1, "C2").symlink_to(outside)
    sequence_path(disk, UID_1, "C3").symlink_to("1.2.3_1.npy")
    sequence_path(disk, UID_1, "C4").symlink_to("nowhere")
    for vertebra in ("C1", "C3"):
        np.testing.assert_array_equal(
            open_sequence(sequence_path(tmp_path / "packed", UID_1, vertebra)), array
        )
    with pytest.raises(ValueError, match=r"1\.2\.3_2\.npy is a link out of its folder, to .*elsewhere"):
        open_sequence(sequence_path(tmp_path / "packed", UID_1, "C2"))
    samples = pd.DataFrame({UID: UID_1, "vertebra": ["C1", "C2", "C3", "C4"]})
    assert list(unusable_sequences(tmp_path / "packed", samples)) == [(UID_1, "C2"), (UID_1, "C4")]


def test_verifying_finds_a_changed_pixel_and_what_the_checksums_do_not_list(tmp_path, array):
    samples = pd.DataFrame({UID: UID_1, "vertebra": ["C1", "C2"]})
    for vertebra in samples["vertebra"]:
        path = write_sequence(tmp_path, UID_1, vertebra, array)
    with pytest.raises(FileNotFoundError, match=r"No SHA256SUMS in .*write_checksums"):
        check_sequences(tmp_path, samples, verify=True)
    write_checksums(tmp_path)
    check_sequences(tmp_path, samples, verify=True)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    check_sequences(tmp_path, samples)
    with pytest.raises(
        ValueError, match=r"1 of 2 .*1\.2\.3_2\.npy \(its SHA-256 is not that of SHA256SUMS\)"
    ):
        check_sequences(tmp_path, samples, verify=True)
    write_sequence(tmp_path, UID_1, "C3", array)
    with pytest.raises(ValueError, match="1 of 1"):
        check_sequences(tmp_path, samples.assign(vertebra="C3")[:1], verify=True)


def test_a_manifest_changed_by_hand_is_refused_and_one_without_a_seal_is_read(tmp_path):
    path = write_manifest(manifest(), tmp_path)
    path.write_text(path.read_text().replace("2.5", "2.6"))
    with pytest.raises(ValueError, match=r"manifest\.csv is not the file that was written"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.csv.sha256").unlink()
    assert read_manifest(tmp_path)["pixel_mm"].tolist() == [1.5, 2.6]


@pytest.mark.parametrize("text", ["NA", "nan", "null", "None", " "])
def test_only_an_empty_slice_truth_means_unknown(tmp_path, text):
    write_manifest(manifest(), tmp_path)
    (tmp_path / "manifest.csv.sha256").unlink()
    path = tmp_path / "manifest.csv"
    path.write_text(path.read_text().replace("..x..", text))
    with pytest.raises(ValueError, match=r"slice truths .*'1\.2\.3 C1"):
        read_manifest(tmp_path)


ORIGIN = {
    "completeness": [1.0, 0.25],
    "source_sha256": ["0123456789abcdef" * 4, "f" * 64],
    "mask": ["1.2.3.nii.gz", "1.20"],
    "mask_sha256": ["0" * 64, "1" * 64],
    "packer": ["0.1.0+01234567", "0.1.0"],
    "warnings": ["", "truncated by the field of view (cranial); specks removed: 1, of its mask"],
}


def manifest_of_slices() -> pd.DataFrame:
    unknown = [*MANIFEST_COLUMNS[2:], "completeness", "mask", "mask_sha256"]
    return manifest_of_ct().assign(**dict.fromkeys(unknown))


def test_a_manifest_of_slices_says_that_lengths_and_masks_are_not_known(tmp_path):
    whole, unknown = manifest_of_ct().iloc[:1], manifest_of_slices().iloc[1:]
    write_manifest(pd.concat([whole, unknown]), tmp_path)
    back = read_manifest(tmp_path)
    assert back["pixel_mm"].isna().tolist() == [False, True]
    assert back["mask_sha256"].isna().tolist() == [False, True]
    assert back["source_sha256"].notna().all()


@pytest.mark.parametrize(
    "change", [{"pixel_mm": [1.0, None]}, {"completeness": [1.0, None]}, {"mask_sha256": ["a" * 64, None]}]
)
def test_what_is_not_known_of_slices_is_not_known_as_a_whole(tmp_path, change):
    with pytest.raises(
        ValueError, match=r"rows with some of spacing_z_mm, .* and not the others \(1\): '1.2.3"
    ):
        write_manifest(manifest_of_slices().assign(**change), tmp_path)


@pytest.mark.parametrize("column", ["source_sha256", "packer"])
def test_slices_say_what_they_were_packed_from_and_by(tmp_path, column):
    with pytest.raises(ValueError, match=r"1\.2\.3 C1"):
        write_manifest(manifest_of_slices().assign(**{column: None}), tmp_path)


def manifest_of_ct() -> pd.DataFrame:
    return manifest().assign(**ORIGIN)


def test_where_sequences_come_from_is_read_as_it_was_written_and_no_warning_is_an_empty_text(tmp_path):
    write_manifest(manifest_of_ct(), tmp_path)
    back = read_manifest(tmp_path)
    assert tuple(back.columns) == (*MANIFEST_COLUMNS, *PROVENANCE_COLUMNS)
    assert {name: back[name].tolist() for name in PROVENANCE_COLUMNS} == ORIGIN
    write_manifest(manifest_of_ct().assign(warnings=[None, None]), tmp_path)
    assert read_manifest(tmp_path)["warnings"].tolist() == ["", ""]
    digits = manifest_of_ct().assign(mask="12", mask_sha256="1" * 64, packer="1", warnings="7")
    write_manifest(digits, tmp_path)
    for name in ("mask", "mask_sha256", "packer", "warnings"):
        assert read_manifest(tmp_path)[name].tolist() == digits[name].tolist()


def test_columns_of_no_schema_are_left_out(tmp_path):
    write_manifest(manifest_of_ct().assign(note="mine"), tmp_path)
    assert tuple(read_manifest(tmp_path).columns) == (*MANIFEST_COLUMNS, *PROVENANCE_COLUMNS)
    write_manifest(manifest().assign(note="mine"), tmp_path)
    assert tuple(read_manifest(tmp_path).columns) == MANIFEST_COLUMNS


@pytest.mark.parametrize("column", PROVENANCE_COLUMNS)
def test_a_manifest_says_all_about_where_sequences_come_from_or_nothing(tmp_path, column):
    for table in (manifest_of_ct().drop(columns=column), manifest().assign(**{column: ORIGIN[column]})):
        with pytest.raises(ValueError, match=r"lacks the column\(s\)"):
            write_manifest(table, tmp_path)
        table.to_csv(tmp_path / "manifest.csv", index=False)
        with pytest.raises(ValueError, match=r"lacks the column\(s\)"):
            read_manifest(tmp_path)
        (tmp_path / "manifest.csv").unlink()


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("completeness", 1.01, r"not finite numbers from 0 to 1 \(1\): '1\.20 C2"),
        ("completeness", -0.01, r"not finite numbers from 0 to 1 \(1\): '1\.20 C2"),
        ("completeness", "whole", r"not finite numbers from 0 to 1 \(1\): '1\.20 C2: whole'"),
        ("completeness", np.nan, r"not finite numbers from 0 to 1 \(1\): '1\.20 C2"),
        ("source_sha256", "f" * 63, r"no SHA-256 \(1\): '1\.20 C2"),
        ("source_sha256", "f" * 65, r"no SHA-256 \(1\): '1\.20 C2"),
        ("mask_sha256", "F" * 64, r"no SHA-256 \(1\): '1\.20 C2"),
        ("mask_sha256", "g" * 64, r"no SHA-256 \(1\): '1\.20 C2"),
        ("mask_sha256", None, r"no SHA-256 \(1\): '1\.20 C2"),
    ],
)
def test_what_cannot_be_said_of_an_origin_is_refused(tmp_path, column, value, reason):
    table = manifest_of_ct()
    table[column] = [table[column][0], value]
    with pytest.raises(ValueError, match=reason):
        write_manifest(table, tmp_path)
    table.to_csv(tmp_path / "manifest.csv", index=False)
    with pytest.raises(ValueError, match=reason):
        read_manifest(tmp_path)


@pytest.mark.parametrize("completeness", [[0, 1], [0.0, 0.5]])
def test_the_ends_of_a_completeness_are_taken(tmp_path, completeness):
    write_manifest(manifest_of_ct().assign(completeness=completeness), tmp_path)
    assert read_manifest(tmp_path)["completeness"].tolist() == completeness


def test_a_manifest_without_a_row_is_read_as_one(tmp_path):
    """Of a cohort whose studies all failed."""
    write_manifest(manifest_of_ct()[:0], tmp_path)
    back = read_manifest(tmp_path)
    assert back.empty
    assert tuple(back.columns) == (*MANIFEST_COLUMNS, *PROVENANCE_COLUMNS)
    write_manifest(pd.DataFrame(columns=list(MANIFEST_COLUMNS)), tmp_path)
    assert tuple(read_manifest(tmp_path).columns) == MANIFEST_COLUMNS
