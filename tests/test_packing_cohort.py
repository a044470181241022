import csv
import hashlib
import json
import os
import shutil
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import joblib
import numpy as np
import pandas as pd
import pytest
import scans
from ct_cohort import BROKEN, CONFIG, Scanned, contents, in_memory, uids, write_cohort, write_study

from cspine_helpers import labels, packed
from cspine_helpers.__main__ import main
from cspine_helpers.cohort import read_cohort
from cspine_helpers.figures import scans as figures_scans
from cspine_helpers.files import paths
from cspine_helpers.files.paths import sha256_of
from cspine_helpers.files.records import content_sha256
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.packed import check_sequences, open_sequence, read_manifest, sequence_path
from cspine_helpers.packing import cohort as sources
from cspine_helpers.packing import cohort as studies
from cspine_helpers.packing import study as packer
from cspine_helpers.packing.cohort import PackSource, pack_cohort, read_report, summary, write_report
from cspine_helpers.packing.slice_truth import read_packed_boxes
from cspine_helpers.packing.study import packer_version
from cspine_helpers.phantom import scanner as export
from cspine_helpers.phantom.cohort import MIN_FRACTURE_VOXELS
from cspine_helpers.splits import write_split

FIRST, SECOND, THIRD = uids()
TINY = ("--cohort", "neck", "--slices", "5", "--size", "32", "--workers", "1")
STUDIES = Scanned()
CASES = [(uid, vertebra) for uid in STUDIES for vertebra in VERTEBRAE]


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """Three studies with masks, labels and boxes."""
    return write_cohort(tmp_path_factory.mktemp("raw") / "neck")


@pytest.fixture(scope="module")
def whole(raw, tmp_path_factory) -> Path:
    """The same, packed."""
    folder = shutil.copytree(raw, tmp_path_factory.mktemp("whole") / "neck")
    pack_cohort(folder, config=CONFIG, sheets=folder / "sheets", workers=1)
    return folder


@pytest.fixture
def cohort(raw, tmp_path) -> Path:
    """A test's own copy of the studies."""
    return shutil.copytree(raw, tmp_path / "data" / "neck")


@pytest.fixture
def done(whole, tmp_path) -> Path:
    """A test's own copy of the packed cohort."""
    return shutil.copytree(whole, tmp_path / "data" / "neck")


@pytest.fixture
def packs(monkeypatch) -> list[str]:
    """Studies that are packed from now on."""
    found: list[str] = []
    pack = packer._pack

    def noted(study, *rest):
        found.append(study.uid)
        return pack(study, *rest)

    monkeypatch.setattr(packer, "_pack", noted)
    return found


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """The command line over cohorts in a temporary folder: exit status, output, errors."""
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main(["pack", *TINY, *arguments])
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


def pack(folder: Path, **options) -> pd.DataFrame:
    return pack_cohort(folder, **({"config": CONFIG, "workers": 1} | options))


def ct_of(folder: Path, uid: str) -> Path:
    return folder / "train_images" / uid


def mask_of(folder: Path, uid: str) -> Path:
    return folder / "segmentations" / f"{uid}.nii.gz"


def write_mask(folder: Path, uid: str, label_map: np.ndarray) -> None:
    export.write_label_map(mask_of(folder, uid), label_map, STUDIES[uid].spacing_mm)


def messages(report: pd.DataFrame) -> dict[str, str]:
    return dict(zip(report[UID], report["message"], strict=True))


def statuses(report: pd.DataFrame) -> dict[str, str]:
    return dict(zip(report[UID], report["status"], strict=True))


def check_sums(packed: Path) -> None:
    """`SHA256SUMS` lists each file beside it, as it is."""
    sums = paths.read_checksums(packed)
    assert set(sums) == {path.name for path in packed.iterdir() if path.is_file()} - {paths.CHECKSUMS}
    assert [name for name, sha256 in sums.items() if sha256_of(packed / name) != sha256] == []


# Several series in a study.


@pytest.fixture
def two_series(cohort) -> tuple[str, str]:
    """The first study's slices in a folder below, and the second's in another; their SeriesInstanceUIDs."""
    second = STUDIES[SECOND]
    for path in sorted(ct_of(cohort, FIRST).iterdir()):
        (ct_of(cohort, FIRST) / "first").mkdir(exist_ok=True)
        path.rename(ct_of(cohort, FIRST) / "first" / path.name)
    other = ct_of(cohort, FIRST) / "second"
    export.write_series(other, second.volume_hu, second.spacing_mm, study_uid="1.2.9")
    return f"{FIRST}.1", "1.2.9.1"


@pytest.mark.slow
def test_of_several_series_in_folders_below_one_is_chosen_on_the_command_line(
    cohort, whole, two_series, command
):
    status, out, _ = command("--no-sheets")
    assert status == 3
    for part in (f"{FIRST} holds 2 CT series", *two_series, "--series"):
        assert part in out
    status, out, _ = command("--no-sheets", "--series", two_series[0])
    assert (status, out.splitlines()[0][:18]) == (0, "3 studies: 3 packe")
    for name in (f"{FIRST}_1.npy", f"{SECOND}_7.npy"):
        np.testing.assert_array_equal(np.load(cohort / "packed" / name), np.load(whole / "packed" / name))
    (report,) = pd.read_csv(cohort / "packed" / "report.csv").query(f"{UID} == '{FIRST}'").to_dict("records")
    assert "of another series" in report["message"]


@pytest.mark.parametrize(
    ("chosen", "options"),
    [((SECOND, THIRD), ("--study", SECOND, "--study", THIRD)), ((FIRST, SECOND), ("--only", "2"))],
    ids=["study", "only"],
)
def test_a_series_is_looked_for_in_the_chosen_studies_alone(cohort, command, chosen, options):
    """The other study holds copies of both."""
    (other,) = {*STUDIES} - {*chosen}
    shutil.rmtree(ct_of(cohort, other))
    for uid in chosen:
        shutil.copytree(ct_of(cohort, uid), ct_of(cohort, other) / uid)
    series = [f"{uid}.1" for uid in chosen]
    status, out, err = command("--no-sheets", *options, "--series", *series)
    assert (status, err.count("of these series")) == (0, 0)
    assert "2 studies: 2 packed" in out


def test_a_study_that_is_not_there_is_named_before_its_series(cohort, command):
    status, _, err = command("--study", "1.2", "--series", "1.2.99")
    assert (status, err.count("No CT in"), err.count("no study holds")) == (100, 1, 0)


def test_one_of_several_reconstructions_under_one_uid_is_handed_on(cohort, two_series):
    uid = f"{two_series[0]}#2"
    assert sources.choose_series(PackSource.of(cohort).studies(), [uid]) == {FIRST: uid}


def test_a_series_that_is_nowhere_or_two_in_one_study_are_refused(cohort, two_series, command):
    status, _, err = command("--series", "1.2.99", two_series[0])
    assert (status, err) == (100, "Series that no study holds (1): '1.2.99'. Check their UIDs.\n")
    status, _, err = command("--series", *two_series)
    assert status == 100
    assert f"Study {FIRST} holds 2 of these series" in err
    assert not (cohort / "packed").exists()


def test_a_change_in_a_folder_below_packs_the_study_again(cohort, two_series, packs):
    source = PackSource.of(cohort, series={FIRST: two_series[0]})
    pack(cohort, source=source)
    assert packs == [FIRST, SECOND, THIRD]
    packs.clear()
    pack(cohort, source=source)
    assert packs == []
    (ct_of(cohort, FIRST) / "first" / "note.txt").write_text("new")
    pack(cohort, source=source)
    assert packs == [FIRST]


# What is written.


def test_every_sequence_is_that_of_the_volume_in_memory(whole):
    packed = whole / "packed"
    for uid, study in STUDIES.items():
        for vertebra, piece in in_memory(study).items():
            found = open_sequence(sequence_path(packed, uid, vertebra), slices=5, size=32)
            np.testing.assert_array_equal(found, piece.array)
    samples = pd.DataFrame(CASES, columns=[UID, "vertebra"])
    check_sequences(packed, samples, slices=5, size=32, verify=True)
    check_sums(packed)
    assert len(list(packed.glob("*.npy"))) == len(CASES)


def test_the_manifest_says_what_each_sequence_is(whole):
    manifest = read_manifest(whole / "packed")
    assert list(zip(manifest[UID], manifest["vertebra"], strict=True)) == CASES
    rows = iter(manifest.itertuples(index=False))
    for uid, study in STUDIES.items():
        for piece in in_memory(study).values():
            row = next(rows)
            z, y, _ = study.spacing_mm
            side_mm = (piece.rows[1] - piece.rows[0]) * y
            np.testing.assert_allclose(
                [row.spacing_z_mm, row.spacing_y_mm, row.spacing_x_mm], study.spacing_mm, rtol=1e-9
            )
            np.testing.assert_allclose(
                [row.z_first_mm, row.z_last_mm], piece.slice_indices[[0, -1]] * z, rtol=1e-9
            )
            assert row.pixel_mm == pytest.approx(side_mm / 32)
            assert row.mask_volume_mm3 == pytest.approx(piece.mask_volume_mm3)
            assert (row.window_low_hu, row.window_high_hu) == CONFIG.window_hu
            assert row.completeness == 1
            assert row.mask == f"{uid}.nii.gz"
            assert row.mask_sha256 == sha256_of(mask_of(whole, uid))
            files = sorted(
                hashlib.sha256(path.read_bytes()).hexdigest() for path in ct_of(whole, uid).iterdir()
            )
            assert row.source_sha256 == hashlib.sha256("".join(files).encode()).hexdigest()
            assert (row.packer, row.warnings) == (packer_version(), "")


def test_slice_truth_is_that_of_the_fractures_and_intact_vertebrae_are_known(whole):
    manifest = read_manifest(whole / "packed").set_index([UID, "vertebra"])["slice_truth"]
    for uid, study in STUDIES.items():
        for number, (vertebra, piece) in enumerate(in_memory(study).items(), start=1):
            voxels = (study.fracture_map[piece.slice_indices] == number).sum(axis=(1, 2))
            assert manifest[uid, vertebra] == "".join(".x"[int(n >= MIN_FRACTURE_VOXELS)] for n in voxels)
            assert ("x" in manifest[uid, vertebra]) == bool(study.labels[vertebra])


def test_packed_boxes_lie_around_the_fractures_as_packed(whole):
    boxes = read_packed_boxes(whole / "packed" / "boxes.csv")
    manifest = read_manifest(whole / "packed").set_index([UID, "vertebra"])["slice_truth"]
    broken = [(uid, v) for uid, names in zip(STUDIES, BROKEN, strict=True) for v in names]
    assert list(dict.fromkeys(zip(boxes[UID], boxes["vertebra"], strict=True))) == broken
    for (uid, vertebra), its in boxes.groupby([UID, "vertebra"]):
        assert its["slice"].tolist() == [t for t, mark in enumerate(manifest[uid, vertebra]) if mark == "x"]
        piece = in_memory(STUDIES[uid])[vertebra]
        for box in its.itertuples():
            plane = STUDIES[uid].fracture_map[piece.slice_indices[box.slice]]
            for axis, (low, size), crop in (
                (0, (box.y, box.height), piece.rows),
                (1, (box.x, box.width), piece.columns),
            ):
                voxels = np.nonzero(plane == VERTEBRAE.index(vertebra) + 1)[axis]
                edges = np.array([voxels.min(), voxels.max() + 1])
                packed = (edges - crop[0]) * 32 / (crop[1] - crop[0])
                np.testing.assert_allclose([low, low + size], packed, atol=1e-4)


def test_settings_and_report_are_files(whole):
    settings = json.loads((whole / "packed" / "packing.json").read_text(encoding="utf-8"))
    assert settings["config"] == json.loads(json.dumps(asdict(CONFIG)))
    assert (settings["scheme"], settings["packer"]) == ("rsna", packer_version())
    assert settings["record_sha256"] == content_sha256(settings)
    report = pd.read_csv(whole / "packed" / "report.csv", dtype={UID: str}, keep_default_na=False)
    assert report.to_numpy().tolist() == [[uid, "packed", 7, ""] for uid in STUDIES]
    assert summary(report) == (
        "3 studies: 3 packed, 0 without some of their vertebrae, 0 failed; 21 sequences."
    )


def test_every_study_has_a_sheet(whole):
    sheets = sorted((whole / "sheets").iterdir())
    assert [path.name for path in sheets] == [f"{uid}.png" for uid in STUDIES]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in sheets)


def test_a_packed_cohort_is_read_as_the_built_in_one_is(done):
    from cspine_helpers.dataset.sequence import SequenceDataset

    split = pd.DataFrame({UID: [*STUDIES], "split": ["train", "validation", "test"]})
    write_split(split, done / "split.csv")
    cohort = read_cohort(done)
    cohort.usable(slices=5, size=32)
    for uid, split in zip(STUDIES, ("train", "validation", "test"), strict=True):
        dataset = SequenceDataset(
            cohort.samples[split], cohort.packed, slices=5, size=32, manifest=cohort.manifest
        )
        assert len(dataset) == 7
        for item, (vertebra, piece) in zip(dataset, in_memory(STUDIES[uid]).items(), strict=True):
            np.testing.assert_array_equal(item["sequence"].numpy(), piece.array.transpose(0, 3, 1, 2))
            assert item["label"].item() == STUDIES[uid].labels[vertebra]
            assert item["slice_truth"].max().item() == STUDIES[uid].labels[vertebra]


# Where the studies lie.


def test_ct_and_masks_may_lie_anywhere_as_nifti_and_in_a_folder_a_study(raw, tmp_path):
    images, masks = tmp_path / "scans", tmp_path / "masks"
    first, second, third = STUDIES.values()
    shutil.copytree(ct_of(raw, FIRST), images / FIRST)
    names = [f"other{z}.dcm" for z in range(len(second.volume_hu))]
    export.write_series(images / FIRST, second.volume_hu, second.spacing_mm, study_uid="1.2.9", names=names)
    label_map = np.where(first.label_map, 51 - first.label_map.astype(int), 0)
    export.write_label_map(masks / f"{FIRST}.nii", label_map, first.spacing_mm)
    scans.write_nifti(images / f"{SECOND}.nii", second.volume_hu, second.spacing_mm)
    scans.write_nifti(
        masks / SECOND / "vertebrae_C2.nii.gz", np.uint8(second.label_map == 2), second.spacing_mm
    )
    scans.write_nifti(images / f"{THIRD}.nii.gz", third.volume_hu, third.spacing_mm, orientation="LAS")
    label_map = np.where(third.label_map == 7, 44, 0).astype(np.uint8)
    scans.write_nifti(masks / f"{THIRD}.nii.gz", label_map, third.spacing_mm)
    (images / "readme.txt").write_text("no study")
    (images / ".DS_Store").mkdir()
    source = PackSource(images, masks, "totalsegmentator", {FIRST: f"{FIRST}.1"})
    report = pack(tmp_path / "new", source=source)
    assert report["sequences"].tolist() == [7, 1, 1]
    packed = tmp_path / "new" / "packed"
    for uid, vertebra in ((FIRST, "C1"), (FIRST, "C7"), (SECOND, "C2"), (THIRD, "C7")):
        expected = in_memory(STUDIES[uid])[vertebra].array
        np.testing.assert_array_equal(open_sequence(sequence_path(packed, uid, vertebra)), expected)
    manifest = read_manifest(packed)
    assert manifest["slice_truth"].isna().all()
    assert list(dict.fromkeys(manifest["mask"])) == [f"{FIRST}.nii", SECOND, f"{THIRD}.nii.gz"]


def test_a_folder_without_studies_says_what_it_needs(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No study in .*train_images.*data/README\.md"):
        pack(tmp_path / "neck")
    (tmp_path / "neck" / "train_images").mkdir(parents=True)
    (tmp_path / "neck" / "train_images" / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match="No study"):
        pack(tmp_path / "neck")
    assert not (tmp_path / "neck" / "packed").exists()


def test_a_study_that_is_there_twice_is_refused(cohort):
    (cohort / "train_images" / f"{SECOND}.nii").touch()
    with pytest.raises(ValueError, match=f"{SECOND}.nii and {SECOND} are one study"):
        pack(cohort)


def test_broken_tables_are_refused_before_anything_is_packed(cohort, packs):
    (cohort / "train.csv").write_text("StudyInstanceUID,C1\n1.2,0\n")
    with pytest.raises(ValueError, match="lacks the column"):
        pack(cohort)
    assert packs == []
    assert not (cohort / "packed").exists()


def test_another_labels_and_boxes_no_slice_is_known(cohort):
    for name in ("train.csv", "train_bounding_boxes.csv"):
        (cohort / name).unlink()
    pack(cohort)
    assert read_manifest(cohort / "packed")["slice_truth"].isna().all()
    assert read_packed_boxes(cohort / "packed" / "boxes.csv").empty


# What is done stays done.


def test_a_second_call_packs_nothing_and_changes_no_byte(done, monkeypatch):
    before = contents(done)
    monkeypatch.setattr(packer, "read_ct", lambda *_, **__: pytest.fail("read again"))
    report = pack(done, sheets=done / "sheets")
    assert statuses(report) == dict.fromkeys(STUDIES, "packed")
    assert contents(done) == before


def another_label(folder: Path) -> None:
    table = pd.read_csv(folder / "train.csv", dtype={UID: str})
    table.loc[table[UID] == SECOND, ["C7", labels.PATIENT]] = 1
    table.to_csv(folder / "train.csv", index=False)


def another_box(folder: Path) -> None:
    boxes = labels.read_boxes(folder / "train_bounding_boxes.csv")
    boxes.loc[len(boxes)] = [SECOND, 20.0, 20.0, 5.0, 5.0, 20]
    labels.write_boxes(boxes, folder / "train_bounding_boxes.csv")


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def record_of(folder: Path, uid: str) -> Path:
    return folder / "packed" / "studies" / f"{uid}.json"


CHANGES = {
    "mask": lambda folder: write_mask(
        folder, SECOND, np.where(STUDIES[SECOND].label_map == 3, 0, STUDIES[SECOND].label_map)
    ),
    "slice": lambda folder: scans.edit(
        ct_of(folder, SECOND) / "9.dcm", lambda ds: setattr(ds, "PixelData", ds.PixelData[::-1])
    ),
    "label": another_label,
    "box": another_box,
    "sequence": lambda folder: damage(sequence_path(folder / "packed", SECOND, "C5")),
    "lost sequence": lambda folder: sequence_path(folder / "packed", SECOND, "C5").unlink(),
    "lost record": lambda folder: record_of(folder, SECOND).unlink(),
    "record": lambda folder: damage(record_of(folder, SECOND)),
    "lost sheet": lambda folder: (folder / "sheets" / f"{SECOND}.png").unlink(),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_packs_that_study_again_and_no_other(what, done, packs):
    CHANGES[what](done)
    sheets = done / "sheets" if "sheet" in what else None
    pack(done, sheets=sheets)
    assert packs == [SECOND]
    check_sums(done / "packed")
    again = contents(done / "packed")
    shutil.rmtree(done / "packed")
    pack(done)
    assert contents(done / "packed") == again


def test_another_option_packs_all_again(done, packs):
    pack(done, config=replace(CONFIG, window_hu=(-400.0, 1300.0)))
    assert packs == [*STUDIES]
    assert set(read_manifest(done / "packed")["window_low_hu"]) == {-400.0}
    pack(done, config=replace(CONFIG, window_hu=(-400.0, 1300.0)))
    assert packs == [*STUDIES]


def test_renamed_slices_are_the_same_study(done, packs):
    for number, path in enumerate(sorted(ct_of(done, SECOND).iterdir())):
        path.rename(path.with_name(f"IM{number}"))
    before = contents(done / "packed")
    pack(done)
    assert packs == []
    assert contents(done / "packed") == before


def test_a_study_that_fails_now_loses_what_was_packed_of_it(done):
    before = contents(done / "packed")
    mask_of(done, SECOND).unlink()
    report = pack(done, sheets=done / "sheets")
    assert statuses(report) == {FIRST: "packed", SECOND: "failed", THIRD: "packed"}
    kept = [name for name in contents(done / "packed") if SECOND in name]
    assert sorted({name.split("/")[0] for name in kept}) == ["aside", "studies"]
    assert sorted(path.stem for path in (done / "sheets").iterdir()) == [FIRST, THIRD]
    manifest = read_manifest(done / "packed")
    assert manifest[UID].drop_duplicates().tolist() == [FIRST, THIRD]
    assert set(read_packed_boxes(done / "packed" / "boxes.csv")[UID]) == {FIRST, THIRD}
    check_sums(done / "packed")
    write_mask(done, SECOND, STUDIES[SECOND].label_map)
    pack(done, sheets=done / "sheets")
    assert contents(done / "packed") == before


# Failures.


def add_study(folder: Path, name: str) -> Path:
    """Another copy of the first study; returns its folder."""
    shutil.copy(mask_of(folder, FIRST), mask_of(folder, name))
    return shutil.copytree(ct_of(folder, FIRST), ct_of(folder, name))


def with_everything_wrong(folder: Path) -> dict[str, str]:
    """Studies that cannot be packed beside two that can: name → part of what is to be said."""
    mask_of(folder, SECOND).unlink()
    add_study(folder, "patient 7")
    mask_of(folder, "patient 7").unlink()  # it could have none, as its name is no UID
    shutil.rmtree(add_study(folder, "1.2.4"))
    ct_of(folder, "1.2.4").mkdir()
    (cut,) = (path for path in add_study(folder, "1.2.5").iterdir() if path.name == "7.dcm")
    cut.write_bytes(cut.read_bytes()[:900])
    add_study(folder, "1.2.6")
    first = STUDIES[FIRST]
    far = {"origin_mm": (400.0, 100.0, 900.0)}
    scans.write_nifti(mask_of(folder, "1.2.6"), first.label_map, first.spacing_mm, **far)
    shutil.copy(mask_of(folder, FIRST), mask_of(folder, "1.2.7"))
    (folder / "train_images" / "1.2.7.nii").write_bytes(b"no picture")
    names = [f"b{z}.dcm" for z in range(len(first.volume_hu))]
    two = add_study(folder, "1.2.8")
    export.write_series(two, first.volume_hu, first.spacing_mm, study_uid="1.9", names=names)
    for path in sorted(add_study(folder, "1.2.9").iterdir())[30:33]:
        path.unlink()
    add_study(folder, "1.2.10")
    boxes = labels.read_boxes(folder / "train_bounding_boxes.csv")
    boxes.loc[len(boxes)] = ["1.2.10", 20.0, 20.0, 5.0, 5.0, 4000]
    labels.write_boxes(boxes, folder / "train_bounding_boxes.csv")
    add_study(folder, "1.2.11")
    mask_of(folder, "1.2.11").write_bytes(mask_of(folder, "1.2.11").read_bytes()[:500])
    return {
        SECOND: f"No mask at segmentations/{SECOND}.nii, .nii.gz, nor in a folder",
        "patient 7": "cannot be file names: 'patient 7'",
        "1.2.4": "No file in 1.2.4",
        "1.2.5": "7.dcm",
        "1.2.6": "1.2.6.nii.gz: no voxel of C1 … C7 lies inside the CT. It is the mask of another study",
        "1.2.7": "1.2.7.nii",
        "1.2.8": "1.2.8 holds 2 CT series",
        "1.2.9": "slices are missing",
        "1.2.10": "slices that the series does not have (1): 4000",
        "1.2.11": "1.2.11.nii.gz",
    }


@pytest.mark.slow
def test_what_fails_is_reported_study_by_study_while_the_rest_goes_on(cohort, whole, packs, command):
    expected = with_everything_wrong(cohort)
    report = pack(cohort)
    assert {uid for uid, status in statuses(report).items() if status == "failed"} == set(expected)
    assert {uid for uid, status in statuses(report).items() if status == "packed"} == {FIRST, THIRD}
    found = messages(report)
    for uid, part in expected.items():
        assert part in found[uid], found[uid]
    assert report[UID].tolist() == sorted(report[UID])
    text = summary(report)
    assert text.startswith(
        "12 studies: 2 packed, 0 without some of their vertebrae, 10 failed; 14 sequences.\n"
    )
    assert all(f"- {uid}: {found[uid]}" in text for uid in expected)
    again = pd.read_csv(cohort / "packed" / "report.csv", dtype={UID: str}, keep_default_na=False)
    assert again.to_numpy().tolist() == report.to_numpy().tolist()
    packed = {
        path.name: path.read_bytes() for uid in (FIRST, THIRD) for path in (whole / "packed").glob(f"{uid}_*")
    }
    assert {path.name: path.read_bytes() for path in (cohort / "packed").glob("*.npy")} == packed
    assert read_manifest(cohort / "packed")[UID].drop_duplicates().tolist() == [FIRST, THIRD]
    check_sums(cohort / "packed")
    packs.clear()
    status, out, _ = command("--no-sheets")
    assert status == 3
    assert out == f"{text}\n"
    assert not {FIRST, THIRD} & {*packs}  # those that failed are tried again, the others are done


def test_names_that_can_be_no_file_fail_and_the_rest_goes_on(cohort, whole, command):
    """Of 250 characters, not UTF-8, with controls, a device; one begins as a formula does."""
    names = [
        "x" * 250,
        "caf\udce9",
        "a\tb\x1b[31m",
        "two\nlines",
        "NUL",
        "patient 7",
        "=1+1",
        "@SUM(A1)",
        "-2",
        "+3",
    ]
    for name in names:
        shutil.copytree(ct_of(cohort, FIRST), ct_of(cohort, name))
    report = pack(cohort)
    assert (cohort / "packed" / "manifest.csv").read_bytes() == (whole / "packed/manifest.csv").read_bytes()
    shown = ["x" * 250, "caf\\udce9", "a\\tb\\x1b[31m", "two\\nlines", *names[4:]]
    assert statuses(report) == dict.fromkeys(STUDIES, "packed") | dict.fromkeys(shown, "failed")
    assert all("cannot be file names" in messages(report)[name] for name in shown)
    pd.testing.assert_frame_equal(read_report(cohort / "packed"), report)
    text = (cohort / "packed" / "report.csv").read_text(encoding="utf-8")
    cells = [cell for row in csv.reader(text.splitlines(keepends=True)) for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert {"'=1+1", "'-2"} <= {*cells}
    check_sums(cohort / "packed")
    status, out, _ = command("--no-sheets")
    assert status == 3
    assert len(out.splitlines()) == 1 + len(names)


def test_file_names_that_are_no_text_stand_in_report_and_manifest_as_escapes(cohort):
    (ct_of(cohort, FIRST) / "caf\udce9.pdf").write_bytes(b"%PDF-1.7")
    broken = min(ct_of(cohort, SECOND).iterdir())
    broken.with_name("=caf\udce9.dcm").write_bytes(broken.read_bytes()[:900])
    broken.unlink()
    mask_of(cohort, THIRD).unlink()
    (cohort / "segmentations" / THIRD).mkdir()
    export.write_label_map(
        cohort / "segmentations" / THIRD / "C2.nii.gz",
        STUDIES[THIRD].label_map == 2,
        STUDIES[THIRD].spacing_mm,
    )
    (cohort / "segmentations" / THIRD / "caf\udce9.txt").touch()
    report = pack(cohort, sheets=cohort / "sheets")
    assert statuses(report) == {FIRST: "packed", SECOND: "failed", THIRD: "partial"}
    assert "caf\\udce9.dcm" in messages(report)[SECOND]
    pd.testing.assert_frame_equal(read_report(cohort / "packed"), report)
    assert len(read_manifest(cohort / "packed")) == 8


def test_a_report_comes_back_as_it_was_written_whatever_its_cells_begin_with(tmp_path):
    begins = ["=", "+", "-", "@", "\t", "'", "''", "'=", "", "a"]
    rows = [(f"{begin}1", "failed", 0, f'{begin}SUM(A1:A9), "x"') for begin in begins]
    report = pd.DataFrame([*rows, ("", "packed", 7, "")], columns=list(studies.REPORT_COLUMNS))
    write_report(report, tmp_path)
    pd.testing.assert_frame_equal(read_report(tmp_path), report)
    with open(tmp_path / "report.csv", encoding="utf-8", newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]


@pytest.mark.parametrize("name", ["sub-verse004", "PAT001_2"])
def test_studies_may_have_names_of_other_data_sets(cohort, name):
    """With `_` and a number at the end, as packed files have it, too."""
    table = labels.read_labels(cohort / "train.csv").replace({UID: {SECOND: name}})
    labels.write_labels(table, cohort / "train.csv")
    ct_of(cohort, SECOND).rename(ct_of(cohort, name))
    mask_of(cohort, SECOND).rename(mask_of(cohort, name))
    for uid in (FIRST, THIRD):
        shutil.rmtree(ct_of(cohort, uid))
    assert statuses(pack(cohort)) == {name: "packed"}
    check_sequences(cohort / "packed", pd.DataFrame({UID: name, "vertebra": VERTEBRAE}), slices=5, size=32)
    assert read_manifest(cohort / "packed")[UID].unique().tolist() == [name]
    ct_of(cohort, name).rename(ct_of(cohort, SECOND))  # gone: its sequences are set aside, by their name
    mask_of(cohort, name).rename(mask_of(cohort, SECOND))
    assert statuses(pack(cohort)) == {SECOND: "packed"}
    aside = sorted(path.name for path in (cohort / "packed" / "aside").iterdir())
    assert aside == [f"{name}_{number}.npy" for number in range(1, 8)]


ERRORS = {
    RuntimeError("Exception thrown in SimpleITK"): "RuntimeError: Exception thrown in SimpleITK",
    MemoryError(): "MemoryError",
    IndexError("out of range"): "IndexError: out of range",
    ValueError("said well"): "said well",
    ValueError(): "ValueError",
}


def test_an_error_that_nobody_foresaw_stops_no_other_study(done, monkeypatch):
    for error, message in ERRORS.items():
        record_of(done, SECOND).unlink(missing_ok=True)
        monkeypatch.setattr(packer, "_pack", Mock(side_effect=error))
        report = pack(done)
        assert [*statuses(report).values()] == ["packed", "failed", "packed"]
        assert messages(report)[SECOND] == message


def test_vertebrae_that_cannot_be_packed_are_named_and_the_others_packed(cohort, command):
    """One without C7 in its mask; one whose C7 lies in the air, and whose C1 is cut and has a speck."""
    write_mask(cohort, FIRST, np.where(STUDIES[FIRST].label_map == 7, 0, STUDIES[FIRST].label_map))
    label_map = STUDIES[SECOND].label_map.copy()
    label_map[label_map == 7] = 0
    label_map[-6:-1, 1:9, 1:9] = 7
    top = int(np.argwhere(label_map == 1)[:, 0].min())
    label_map[: top + 2] = 0
    label_map[top + 3, 0, 0] = 1
    image = replace(STUDIES[SECOND], label_map=label_map[top + 2 :])
    shutil.rmtree(ct_of(cohort, SECOND))
    write_study(cohort, replace(image, volume_hu=image.volume_hu[top + 2 :]))
    status, out, _ = command("--no-sheets")
    assert status == 0
    packed = cohort / "packed"
    report = pd.read_csv(packed / "report.csv", dtype={UID: str}, keep_default_na=False)
    assert [*statuses(report).values()] == ["partial", "partial", "packed"]
    assert report["sequences"].tolist() == [6, 6, 7]
    found = messages(report)
    assert found[FIRST].startswith("C7: not in the mask")
    assert found[SECOND].startswith("C7: its mask does not lie on bone")
    assert "1 packed, 2 without some of their vertebrae, 0 failed; 19 sequences." in out
    assert all(f"- {uid}: {found[uid]}" in out for uid in (FIRST, SECOND))
    manifest = read_manifest(packed).set_index([UID, "vertebra"])
    assert len(manifest) == 19
    assert (FIRST, "C7") not in manifest.index
    assert not sequence_path(packed, SECOND, "C7").exists()
    cut = manifest.loc[(SECOND, "C1")]
    assert cut["warnings"].startswith("specks removed, up to")
    assert cut["warnings"].endswith("; truncated by the field of view (cranial)")
    area = (STUDIES[SECOND].label_map == 1).sum(axis=(1, 2))[top + 2 :]
    assert cut["completeness"] == pytest.approx(1 - area[0] / area.max())
    others = manifest.drop([(SECOND, "C1"), (SECOND, "C2")])  # whose dens was cut with it
    assert set(others["completeness"]) == {1.0}


def test_what_a_repair_says_stands_in_report_and_manifest(cohort, command):
    """Slices of a gantry tilted by 2 degrees, as the mask's are not."""
    study = STUDIES[THIRD]
    direction = scans.FRAME.copy()
    direction[:, 0] = (0, np.sin(np.deg2rad(2)), -np.cos(np.deg2rad(2)))
    shutil.rmtree(ct_of(cohort, THIRD))
    scans.write_dicom(ct_of(cohort, THIRD), study.volume_hu, study.spacing_mm, direction=direction)
    scans.write_nifti(mask_of(cohort, THIRD), study.label_map, study.spacing_mm)
    status, out, _ = command("--no-sheets")
    assert (status, len(out.splitlines())) == (0, 1)
    report = pd.read_csv(cohort / "packed" / "report.csv", dtype={UID: str}, keep_default_na=False)
    assert report["status"].tolist() == ["packed"] * 3
    assert "2.0° (gantry tilt); moved back" in messages(report)[THIRD]
    manifest = read_manifest(cohort / "packed")
    assert manifest["warnings"].str.contains("gantry tilt").tolist() == [uid == THIRD for uid, _ in CASES]


def test_a_cohort_of_which_every_study_fails_has_an_empty_manifest(done):
    for path in (done / "segmentations").iterdir():
        path.unlink()
    report = pack(done, sheets=done / "sheets")
    assert [*statuses(report).values()] == ["failed"] * 3
    assert "0 packed, 0 without some of their vertebrae, 3 failed; 0 sequences." in summary(report)
    manifest = read_manifest(done / "packed")
    assert manifest.empty
    assert {UID, "slice_truth", "completeness", "warnings"} < {*manifest.columns}
    assert read_packed_boxes(done / "packed" / "boxes.csv").empty
    assert not [*(done / "packed").glob("*.npy")]
    assert [*(done / "sheets").iterdir()] == []
    check_sums(done / "packed")


# Stops, and several processes.


def test_a_run_that_is_stopped_goes_on_where_it_was_to_the_same_bytes(cohort, whole, packs, monkeypatch):
    packed, noted = cohort / "packed", packer._pack

    def stop(study, *rest):
        if study.uid == SECOND:
            raise KeyboardInterrupt
        return noted(study, *rest)

    monkeypatch.setattr(packer, "_pack", stop)
    with pytest.raises(KeyboardInterrupt):
        pack(cohort)
    assert packs == [FIRST]
    assert sorted(contents(packed)) == [*(f"{FIRST}_{n}.npy" for n in range(1, 8)), f"studies/{FIRST}.json"]
    monkeypatch.setattr(packer, "_pack", noted)
    pack(cohort)
    assert packs == [FIRST, SECOND, THIRD]
    assert contents(packed) == contents(whole / "packed")
    assert not (cohort / ".packing.lock").exists()


def test_sequences_without_their_record_are_packed_again(cohort, whole, packs):
    """As after a stop between the two."""
    shutil.copytree(whole / "packed", cohort / "packed")
    record_of(cohort, SECOND).unlink()
    sequence_path(cohort / "packed", SECOND, "C7").unlink()
    damage(sequence_path(cohort / "packed", SECOND, "C6"))
    pack(cohort)
    assert packs == [SECOND]
    assert contents(cohort / "packed") == contents(whole / "packed")


def test_what_a_killed_process_was_writing_is_removed_and_nothing_else(done):
    packed = done / "packed"
    left = [packed / f".{FIRST}_3.npy.ab_d3f6h.npy", packed / ".manifest.csv.abcdefgh.csv"]
    left += [
        packed / "studies" / f".{FIRST}.json.abcdefgh.json",
        done / "sheets" / f".{FIRST}.png.abcdefgh.png",
    ]
    kept = [packed / ".DS_Store", packed / ".gitignore", packed / f".{FIRST}.npy"]
    for path in (*left, *kept):
        path.write_bytes(b"")
    pack(done, sheets=done / "sheets")
    assert [path for path in left if path.exists()] == []
    assert [path for path in kept if not path.exists()] == []


def test_a_second_process_is_told_that_one_is_packing(cohort, monkeypatch, command):
    monkeypatch.setattr(paths, "_PATIENCE_S", 0)
    with paths.exclusive(cohort / ".packing.lock", "packing neck"):
        with pytest.raises(
            BlockingIOError, match=r"another process is packing neck\. Wait for it, or stop it\."
        ):
            pack(cohort)
        status, out, err = command()
    assert (status, out) == (100, "")
    assert "another process is packing neck" in err
    assert not (cohort / "packed").exists()


@pytest.fixture
def elsewhere(monkeypatch):
    """Nothing is packed in this process."""
    monkeypatch.setattr(packer, "_pack", lambda *_: pytest.fail("packed here"))


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_two_processes_write_the_same_bytes(cohort, whole):
    expected = with_everything_wrong(cohort)
    report = pack(cohort, workers=2)
    assert set(report[UID][report["status"] == "failed"]) == set(expected)
    for uid in expected:
        shutil.rmtree(ct_of(cohort, uid), ignore_errors=True)
    (cohort / "train_images" / "1.2.7.nii").unlink()
    shutil.copy(mask_of(whole, SECOND), mask_of(cohort, SECOND))
    shutil.copytree(ct_of(whole, SECOND), ct_of(cohort, SECOND))
    pack(cohort, workers=2, sheets=cohort / "sheets")
    assert contents(cohort / "packed") == contents(whole / "packed")
    assert contents(cohort / "sheets") == contents(whole / "sheets")


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_a_dask_cluster_of_two_workers_writes_the_same_bytes(cohort, whole):
    import distributed

    with (
        distributed.LocalCluster(
            n_workers=2, processes=True, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        report = pack_cohort(cohort, config=CONFIG, sheets=cohort / "sheets")
    assert [*statuses(report).values()] == ["packed"] * 3
    assert contents(cohort / "packed") == contents(whole / "packed")
    assert contents(cohort / "sheets") == contents(whole / "sheets")


# The command line.


def test_the_command_packs_a_cohort_below_the_root(cohort, whole, tmp_path, command):
    status, out, err = command()
    assert status == 0
    assert out == "3 studies: 3 packed, 0 without some of their vertebrae, 0 failed; 21 sequences.\n"
    assert "packing neck" in err  # the progress bar
    assert contents(cohort / "packed") == contents(whole / "packed")
    assert contents(tmp_path / "figures" / "neck" / "packing") == contents(whole / "sheets")


def test_options_of_the_command_reach_the_packing(cohort, tmp_path, command):
    (cohort / "train_images").rename(tmp_path / "ct")
    (cohort / "segmentations").rename(tmp_path / "masks")
    lengths = ["--margin-mm", "2", "--neighbour-mm", "3", "--window-hu", "-100", "900"]
    places = ["--images", str(tmp_path / "ct"), "--masks", str(tmp_path / "masks")]
    status, _, err = command(*places, *lengths, "--soft-mask", "--no-sheets")
    assert status == 0, err
    config = replace(CONFIG, margin_mm=2, neighbour_mm=3, window_hu=(-100, 900), soft_mask=True)
    for uid, study in STUDIES.items():
        for vertebra, piece in in_memory(study, config).items():
            found = open_sequence(sequence_path(cohort / "packed", uid, vertebra))
            np.testing.assert_array_equal(found, piece.array)
    assert not (tmp_path / "figures").exists()
    settings = json.loads((cohort / "packed" / "packing.json").read_text(encoding="utf-8"))
    assert settings["config"] == json.loads(json.dumps(asdict(config)))
    assert command("--scheme", "totalsegmentator", "--no-sheets", *places)[0] == 3


# Some of the studies.


def test_one_study_is_packed_first_and_its_sheet_is_named(cohort, whole, packs, tmp_path, command):
    status, out, _ = command("--only", "1")
    assert (status, packs) == (0, [FIRST])
    sheet = tmp_path / "figures" / "neck" / "packing" / f"{FIRST}.png"
    assert out.startswith("1 studies: 1 packed")
    assert out.splitlines()[1:] == [f"Contact sheet: {sheet}"]
    assert sheet.is_file()
    assert read_manifest(cohort / "packed")[UID].unique().tolist() == [FIRST]
    check_sums(cohort / "packed")
    assert command()[0] == 0
    assert packs == [FIRST, SECOND, THIRD]  # the first is not packed again
    assert contents(cohort / "packed") == contents(whole / "packed")


def test_of_the_studies_that_are_not_asked_for_everything_stays(done, packs, command):
    mask_of(done, THIRD).unlink()
    pack(done)
    packs.clear()
    before = contents(done / "packed")
    assert before["aside/" + f"{THIRD}_1.npy"]
    status, out, _ = command("--no-sheets", "--study", SECOND)
    assert (status, packs, len(out.splitlines())) == (0, [], 1)
    assert contents(done / "packed") == before
    CHANGES["mask"](done)
    report = pack(done, only=[SECOND])
    assert statuses(report) == {SECOND: "partial"}
    assert statuses(read_report(done / "packed")) == {FIRST: "packed", SECOND: "partial", THIRD: "failed"}
    assert len(read_manifest(done / "packed")) == 7 + 6
    check_sums(done / "packed")
    again = contents(done / "packed")
    pack(done)
    assert contents(done / "packed") == again


def test_studies_of_other_options_are_set_aside_when_some_are_packed(done, packs):
    other = replace(CONFIG, margin_mm=1.0)
    pack(done, only=[SECOND], config=other)
    assert packs == [SECOND]
    assert read_manifest(done / "packed")[UID].unique().tolist() == [SECOND]
    assert statuses(read_report(done / "packed")) == {SECOND: "packed"}
    assert not list((done / "packed").glob(f"{FIRST}_*.npy"))
    check_sums(done / "packed")


def test_after_a_stop_with_other_options_no_study_of_them_joins_a_manifest(done, monkeypatch):
    """The record of one study is of the new options, the tables were of the old ones."""
    pack_one = packer._pack

    def stopped(study, *rest):
        if study.uid == SECOND:
            raise KeyboardInterrupt
        return pack_one(study, *rest)

    monkeypatch.setattr(packer, "_pack", stopped)
    with pytest.raises(KeyboardInterrupt):
        pack(done, config=replace(CONFIG, margin_mm=1.0))
    monkeypatch.setattr(packer, "_pack", pack_one)
    pack(done, only=[THIRD])
    assert read_manifest(done / "packed")[UID].unique().tolist() == [THIRD]


def test_studies_of_a_list_are_left_out_by_every_reader_of_the_cohort(done, packs, command, tmp_path):
    split = pd.DataFrame({UID: [*STUDIES, "9.9"], "split": ["train", "validation", "test", "test"]})
    more = labels.read_labels(done / "train.csv")
    more.loc[len(more)] = ["9.9", *[0] * 8]
    labels.write_labels(more, done / "train.csv")
    write_split(split, done / "split.csv")
    (done / "exclude.txt").write_text(f"# bad scans\n\n{THIRD}  # the last\n", encoding="utf-8")
    status, out, _ = command("--no-sheets")
    assert (status, packs) == (0, [])
    assert out.splitlines()[2:] == [f"Excluded, as asked: '{THIRD}'."]
    assert read_manifest(done / "packed")[UID].unique().tolist() == [FIRST, SECOND]
    cohort = read_cohort(done)
    assert THIRD not in {*cohort.labels[UID], *cohort.split[UID]}
    assert cohort.samples["test"][UID].unique().tolist() == ["9.9"]
    (tmp_path / "none.txt").write_text("# nobody\n")
    assert command("--no-sheets", "--exclude", str(tmp_path / "none.txt"))[0] == 0
    assert len(read_manifest(done / "packed")) == 21
    assert packs == []  # its sequences came back


def test_a_list_that_leaves_out_every_study_says_so(cohort, command):
    (cohort / "exclude.txt").write_text("\n".join(STUDIES), encoding="utf-8")
    status, _, err = command()
    assert status == 100
    for part in ("All 3 studies in", "are excluded", *STUDIES, "exclude.txt", "--exclude"):
        assert part in err
    assert "No study in" not in err


def test_a_study_of_the_list_that_is_nowhere_is_not_said_to_be_left_out(done, command):
    """One of the label table alone, without CT, is left out of that."""
    more = labels.read_labels(done / "train.csv")
    more.loc[len(more)] = ["9.9", *[0] * 8]
    labels.write_labels(more, done / "train.csv")
    (done / "exclude.txt").write_text(f"{THIRD}\n9.9\n{THIRD}7\n", encoding="utf-8")
    status, out, _ = command("--no-sheets")
    assert status == 0
    assert f"Excluded, as asked: '{THIRD}', '9.9'." in out
    assert f"To be excluded, but not there: '{THIRD}7'. Check the list." in out


def test_of_phantoms_without_ct_the_command_says_what_exports_them(tmp_path, command):
    folder = tmp_path / "data" / "builtin"
    folder.mkdir(parents=True)
    (folder / "cohort.json").write_text("{}")
    status, _, err = command("--cohort", "builtin")
    assert status == 100
    for part in ("has no CT on disk", "Notebook 00", "data/builtin_ct", "make pack COHORT=builtin_ct"):
        assert part in err
    assert "make cohort" not in err


def test_masks_of_other_numbers_are_read_by_a_table_of_labels(cohort, whole, tmp_path, command):
    for uid, study in STUDIES.items():
        write_mask(cohort, uid, np.where(study.label_map > 0, 42 - study.label_map.astype(int), 0))
    table = {str(42 - number): vertebra for number, vertebra in enumerate(VERTEBRAE, start=1)}
    (tmp_path / "labels.json").write_text(json.dumps(table), encoding="utf-8")
    status, _, err = command("--no-sheets", "--labels", str(tmp_path / "labels.json"))
    assert status == 0, err
    for path in (whole / "packed").glob("*.npy"):
        assert (cohort / "packed" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("failing", "expected"), [(0, 0), (1, 3), (2, 3), (300, 3)])
def test_where_studies_failed_the_exit_status_is_one_of_its_own(
    cohort, monkeypatch, command, failing, expected
):
    """Not 1, as of an exception, nor 2, as of wrong arguments, however many failed."""
    row = {UID: "1.2", "status": "failed", "sequences": 0, "message": "why"}
    rows = [row | {"status": "packed"}, *[row] * failing]
    monkeypatch.setattr(studies, "pack_cohort", lambda *_, **__: pd.DataFrame(rows))
    status, out, _ = command()
    assert (status, f"1 packed, 0 without some of their vertebrae, {failing} failed" in out) == (
        expected,
        True,
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--cohort", "none"], "No study in"),
        (["--cohort", "../neck"], "A cohort name is up to 64 letters"),
        (["--slices", "0"], "slices and size must be positive"),
        (["--window-hu", "300", "300"], "window_hu must run from low to high"),
        (["--neighbour-mm", "0"], "neighbour_mm is a length above 0"),
        (["--workers", "0"], "workers is a number of processes"),
        (["--images", "nowhere"], "No study in nowhere"),
        (["--scheme", "mine"], "invalid choice: 'mine'"),
        (["--labels", "no.json"], "No table of labels at no.json"),
        (["--scheme", "totalsegmentator", "--labels", "no.json"], "not allowed with argument --scheme"),
        (["--only", "0"], "--only is a number of studies from 1; found 0"),
        (["--only", "1", "--study", "1.2"], "not allowed with argument --only"),
        (["--study", "1.2", "--study", "7"], "'1.2', '7'. Check the names"),
        (["--exclude", "no.txt"], "No list of studies at no.txt"),
        (["--size", "large"], "invalid int value: 'large'"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_bad_arguments_are_told_in_a_sentence(cohort, command, arguments, sentence):
    status, out, err = command(*arguments)
    assert (status, out) == (2 if "usage" in err else 100, "")
    assert sentence in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (cohort / "packed").exists()


def test_without_simpleitk_the_command_says_how_to_install_it(cohort, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    status, out, err = command()
    assert (status, out) == (100, "")
    assert len(err.splitlines()) == 1
    assert "pip install" in err


# Patients.

PATIENT = {
    "PatientName": "Doe^Jane",
    "PatientID": "MRN4711",
    "PatientBirthDate": "19700102",
    "StudyDate": "20210304",
    "SeriesDate": "20210304",
    "AcquisitionDateTime": "20210304101112",
    "InstitutionName": "Mercy Hospital",
    "ReferringPhysicianName": "Roe^Richard",
    "StudyDescription": "Neck of Jane",
}
SECRETS = (
    "doe^",
    "jane",
    "mrn4711",
    "19700102",
    "1970-01-02",
    "20210304",
    "2021-03-04",
    "mercy",
    "roe^",
    "richard",
)


def test_nothing_of_the_patient_leaves_the_headers(cohort, tmp_path, monkeypatch, capfd):
    """One study packed with warnings, one in parts, one that fails; all that is written, drawn or printed."""
    for uid, study in STUDIES.items():
        shutil.rmtree(ct_of(cohort, uid))
        uids = {"study_uid": uid, "series_uid": f"{uid}.1", "patient": PATIENT}
        files = scans.write_dicom(ct_of(cohort, uid), study.volume_hu, study.spacing_mm, **uids)
        label_map = np.where(study.label_map == 7, 0, study.label_map) if uid == SECOND else study.label_map
        path = scans.write_nifti(mask_of(cohort, uid).with_suffix(""), label_map, study.spacing_mm)
        assert b"Doe^Jane" in path.read_bytes()
        mask_of(cohort, uid).unlink()
    scans.edit(files[3], lambda ds: setattr(ds, "RescaleIntercept", "-1000"))
    files[7].write_bytes(files[7].read_bytes()[:2000])
    assert b"MRN4711" in files[7].read_bytes()
    drawn = []
    draw = figures_scans.contact_sheet

    def noted(*arguments, **options):
        drawn.append(str(options))
        return draw(*arguments, **options)

    monkeypatch.setattr(packer, "contact_sheet", noted)
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    status = main(["pack", *TINY])
    out, err = capfd.readouterr()
    assert status == 3
    assert "1 packed, 1 without some of their vertebrae, 1 failed" in out
    assert len(drawn) == 2
    written = contents(cohort / "packed") | contents(tmp_path / "figures")
    assert len(written) == 13 + 7 + 2 + 2  # sequences, tables, records, sheets
    found = {name: content.lower() for name, content in written.items()}
    found |= {"output": f"{out}{err}".lower().encode(), "sheets": "".join(drawn).lower().encode()}
    assert [(name, s) for name, content in found.items() for s in SECRETS if s.encode() in content] == []
    assert not [name for name in written if any(secret in name.lower() for secret in SECRETS)]


# What is no longer there, and what was never ours.


def test_a_study_that_vanished_is_set_aside_and_comes_back_with_its_files(done, packs):
    before = contents(done / "packed")
    shutil.move(ct_of(done, SECOND), done / "elsewhere")
    report = pack(done)
    assert report[UID].tolist() == [FIRST, THIRD]
    assert f"Studies of train.csv without CT here: 1, the first of them {SECOND}." in summary(report)
    assert not [*(done / "packed").glob(f"{SECOND}_*.npy")]
    assert SECOND not in set(read_manifest(done / "packed")[UID])
    check_sums(done / "packed")
    shutil.move(done / "elsewhere", ct_of(done, SECOND))
    pack(done)
    assert packs == []
    assert contents(done / "packed") == before


def test_a_link_that_leads_nowhere_is_a_study_that_failed(done):
    shutil.rmtree(ct_of(done, SECOND))
    ct_of(done, SECOND).symlink_to(done / "unmounted")
    report = pack(done)
    assert statuses(report) == {FIRST: "packed", SECOND: "failed", THIRD: "packed"}


def test_masks_that_are_nowhere_change_nothing(done):
    before = contents(done / "packed")
    (done / "segmentations").rename(done / "masks")
    with pytest.raises(FileNotFoundError, match="No folder of masks at"):
        pack(done)
    assert contents(done / "packed") == before


def test_sequences_that_were_packed_elsewhere_are_not_replaced(cohort):
    shutil.copytree(cohort / "train_images" / FIRST, cohort / "packed")  # any files
    before = contents(cohort / "packed")
    with pytest.raises(FileExistsError, match=r"that were not packed here\. Move it aside"):
        pack(cohort)
    assert contents(cohort / "packed") == before


def test_a_run_that_is_stopped_in_its_first_study_goes_on(cohort, whole, monkeypatch):
    written = []
    write = packed.write_sequence

    def stopped(*arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(write(*arguments))
        return written[-1]

    monkeypatch.setattr(packer, "write_sequence", stopped)
    with pytest.raises(KeyboardInterrupt):
        pack(cohort)
    monkeypatch.setattr(packer, "write_sequence", write)
    pack(cohort)
    assert contents(cohort / "packed") == contents(whole / "packed")


def dies_with_the_second(study, *rest):
    if study.uid == SECOND:
        os.kill(os.getpid(), signal.SIGKILL)
    return PACKED_OR_FAILED(study, *rest)


PACKED_OR_FAILED = studies._packed_or_failed


@pytest.mark.slow
def test_a_study_that_kills_its_process_is_found_and_the_others_are_packed(cohort, whole, monkeypatch):
    monkeypatch.setattr(studies, "_packed_or_failed", dies_with_the_second)
    report = pack(cohort, workers=2)
    assert statuses(report) == {FIRST: "packed", SECOND: "failed", THIRD: "packed"}
    assert "its process was killed" in messages(report)[SECOND]
    for uid in (FIRST, THIRD):
        for path in (whole / "packed").glob(f"{uid}_*.npy"):
            assert (cohort / "packed" / path.name).read_bytes() == path.read_bytes()


def test_a_stop_after_other_options_leaves_no_tables_of_the_old_ones(done, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(packer, "_pack", stop)
    with pytest.raises(KeyboardInterrupt):
        pack(done, config=replace(CONFIG, margin_mm=9))
    left = {path.name for path in (done / "packed").iterdir()}
    assert not left & {
        "manifest.csv",
        "manifest.csv.sha256",
        "boxes.csv",
        "boxes.csv.sha256",
        paths.CHECKSUMS,
    }


def test_a_stop_with_the_same_options_leaves_the_tables(done, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    mask_of(done, SECOND).write_bytes(mask_of(done, THIRD).read_bytes())
    monkeypatch.setattr(packer, "_pack", stop)
    with pytest.raises(KeyboardInterrupt):
        pack(done)
    assert (done / "packed" / "manifest.csv").is_file()


@pytest.mark.slow
def test_ct_that_are_linked_are_packed_beside_the_links_to_the_same_bytes(raw, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    before = contents(raw)
    folder = paths.link_cohort("neck", raw)
    pack_cohort(folder, config=CONFIG, workers=1)
    assert contents(folder / "packed") == contents(whole / "packed")
    assert not (folder / "packed").is_symlink()
    assert contents(raw) == before
