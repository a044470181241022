import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event

import numpy as np
import pandas as pd
import pydicom
import pytest
import scans
from ct_cohort import CONFIG, contents, in_memory, scanned, uids, write_study

from cspine_helpers.ct import reading as ct_reading
from cspine_helpers.figures.style import Picture
from cspine_helpers.files.paths import sha256_of
from cspine_helpers.labels import BOX_COLUMNS, VERTEBRAE
from cspine_helpers.packed import open_sequence, sequence_path, write_sequence
from cspine_helpers.packing import study as packer
from cspine_helpers.packing.study import (
    StudyFiles,
    crops_in,
    forget,
    hash_of,
    locate,
    pack_study,
    read_study,
    sentence,
)
from cspine_helpers.phantom import scanner as export

NO_BOXES = pd.DataFrame(columns=list(BOX_COLUMNS))
STUDY = uids()[0]


def boxes(*rows: tuple[float, ...]) -> pd.DataFrame:
    """x, y, width, height, slice number."""
    return pd.DataFrame([(STUDY, *row) for row in rows], columns=list(BOX_COLUMNS))


def files_of(folder: Path, **others) -> StudyFiles:
    ct, mask = folder / "train_images" / STUDY, folder / "segmentations" / f"{STUDY}.nii.gz"
    given = {"scheme": "rsna", "series": None, "fractured": None, "boxes": NO_BOXES}
    return StudyFiles(**{"uid": STUDY, "ct": ct, "mask": mask} | given | others)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The study's files, and what was packed from them, with its sheet."""
    folder = tmp_path_factory.mktemp("written")
    write_study(folder, scanned(0))
    pack_study(files_of(folder), folder / "packed", CONFIG, sheet=folder / "sheet.png")
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A test's own copy."""
    return shutil.copytree(written, tmp_path / "study")


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """What is read as CT from now on."""
    found: list[Path] = []
    read_ct = ct_reading.read_ct

    def noted(path, **options):
        found.append(path)
        return read_ct(path, **options)

    monkeypatch.setattr(packer, "read_ct", noted)
    return found


@pytest.fixture
def drawn(monkeypatch) -> list[dict]:
    """What contact sheets are asked to show from now on; none is drawn."""
    found: list[dict] = []

    def noted(volume, label_map, pieces, **options):
        found.append({"volume": volume, "label_map": label_map, "pieces": pieces} | options)
        return Picture(figsize=(1, 1))

    monkeypatch.setattr(packer, "contact_sheet", noted)
    return found


def record_of(folder: Path) -> Path:
    return folder / "packed" / "studies" / f"{STUDY}.json"


def write_mask(folder: Path, label_map: np.ndarray) -> None:
    export.write_label_map(files_of(folder).mask, label_map, scanned(0).spacing_mm)


def pack(folder: Path, *, config=CONFIG, sheet: str | None = None, **others) -> dict:
    study = files_of(folder, **others)
    return pack_study(study, folder / "packed", config, sheet=folder / sheet if sheet else None)


# What is packed.


def test_sequences_are_those_of_the_volume_in_memory(written):
    record = read_study(written / "packed", STUDY)
    assert (record["uid"], record["problems"], record["notes"]) == (STUDY, {}, [])
    names = [f"{STUDY}_{number}.npy" for number in range(1, 8)]
    assert list(record["files"]) == names
    for number, (vertebra, piece) in enumerate(in_memory(scanned(0)).items(), start=1):
        path = sequence_path(written / "packed", STUDY, vertebra)
        np.testing.assert_array_equal(open_sequence(path, slices=5, size=32), piece.array)
        assert record["files"][names[number - 1]] == sha256_of(path)
        crop = record["crops"][vertebra]
        assert crop["slices"] == piece.slice_indices.tolist()
        assert (crop["rows"], crop["columns"]) == ([*piece.rows], [*piece.columns])


def test_the_grid_of_the_record_leads_from_a_voxel_to_the_patient(written):
    """By the headers of the slices themselves."""
    grid = read_study(written / "packed", STUDY)["grid"]
    steps = np.array(grid["direction"]) * grid["spacing_mm"]
    for ds in map(pydicom.dcmread, sorted(files_of(written).ct.iterdir())):
        voxel = [ds.InstanceNumber - 1, 0, 0]
        np.testing.assert_allclose(grid["origin_mm"] + steps @ voxel, ds.ImagePositionPatient, atol=1e-6)


def test_the_ct_is_read_again_with_the_place_of_each_sequence_in_it(written):
    volume, crops = locate(written, STUDY)
    pieces = in_memory(scanned(0))
    assert crops.keys() == pieces.keys()
    for name, piece in pieces.items():
        np.testing.assert_array_equal(crops[name].slice_indices, piece.slice_indices)
        assert (crops[name].rows, crops[name].columns) == (piece.rows, piece.columns)
    np.testing.assert_array_equal(volume.hu, scanned(0).volume_hu)


def test_no_place_is_told_in_a_ct_that_is_not_there_or_not_the_packed_one(folder):
    record = read_study(folder / "packed", STUDY)
    volume = ct_reading.read_ct(folder / "train_images" / STUDY)
    other = replace(volume, origin_mm=volume.origin_mm + 1, spacing_mm=(3.0, 1.0, 1.0))
    scans.refusal(lambda: crops_in(other, record), "another grid", "spacing_mm, origin_mm")
    record_of(folder).unlink()
    scans.refusal(lambda: locate(folder, STUDY), "Nothing says where", "Pack it again")
    shutil.rmtree(folder / "train_images")
    scans.refusal(lambda: locate(folder, STUDY), "No CT of", error=FileNotFoundError)
    scans.refusal(lambda: locate(folder, "../2"), "file names")


def test_rows_say_where_sequences_come_from(written):
    record = read_study(written / "packed", STUDY)
    study = files_of(written)
    rows = pd.DataFrame(record["rows"])
    assert rows["vertebra"].tolist() == list(VERTEBRAE)
    assert set(rows["source_sha256"]) == {hash_of(study.ct)}
    assert set(rows["mask_sha256"]) == {sha256_of(study.mask)}
    assert set(rows["mask"]) == {study.mask.name}
    assert set(rows["packer"]) == {packer.packer_version()}
    assert set(rows["warnings"]) == {""}
    assert set(rows["completeness"]) == {1.0}
    assert rows["slice_truth"].isna().all()


def test_warnings_of_the_ct_stand_in_every_row_and_those_of_a_vertebra_in_its_own(folder, drawn):
    """A gantry tilted by 2 degrees; a speck beside C3, a piece of C6 in the air far away, no C7."""
    label_map = np.where(scanned(0).label_map == 7, 0, scanned(0).label_map).astype(np.uint8)
    label_map[20, 0, 0] = 3
    label_map[25, -13:-1, -13:-1] = 6
    direction = scans.FRAME.copy()
    direction[:, 0] = (0, np.sin(np.deg2rad(2)), -np.cos(np.deg2rad(2)))
    study = files_of(folder)
    shutil.rmtree(study.ct)
    scans.write_dicom(study.ct, scanned(0).volume_hu, scanned(0).spacing_mm, direction=direction)
    scans.write_nifti(study.mask, label_map, scanned(0).spacing_mm)
    record = pack(folder, sheet="sheet.png")
    rows = {row["vertebra"]: row["warnings"] for row in record["rows"]}
    (tilted,) = record["notes"]
    assert "2.0° (gantry tilt)" in tilted
    own, *others = rows.pop("C3").split("; ")[::-1]
    assert own.startswith("specks removed, up to")
    assert "; ".join(others[::-1]) == tilted
    assert rows == dict.fromkeys(("C1", "C2", "C4", "C5"), tilted)
    assert record["problems"].keys() == {"C6", "C7"}
    assert record["problems"]["C7"] == "not in the mask"
    assert "in 2 pieces" in record["problems"]["C6"]
    (sheet,) = drawn
    assert sheet["title"] == STUDY
    assert sheet["notes"][0] == tilted
    assert [note.split(":")[0] for note in sheet["notes"][1:]] == ["C3", "C7", "C6"]
    assert list(sheet["pieces"]) == ["C1", "C2", "C3", "C4", "C5"]


def test_a_ct_as_nifti_packs_to_the_same_arrays_and_says_that_boxes_cannot_be_placed(folder):
    study = files_of(folder)
    ct = scans.write_nifti(
        folder / "ct.nii.gz", scanned(0).volume_hu, scanned(0).spacing_mm, orientation="LAS"
    )
    scans.write_nifti(study.mask, scanned(0).label_map, scanned(0).spacing_mm)
    record = pack(folder, ct=ct, boxes=boxes((10, 10, 5, 5, 20)))
    for vertebra, piece in in_memory(scanned(0)).items():
        found = open_sequence(sequence_path(folder / "packed", STUDY, vertebra))
        np.testing.assert_array_equal(found, piece.array)
    assert {row["source_sha256"] for row in record["rows"]} == {sha256_of(ct)}
    assert "boxes (1) cannot be mapped" in record["notes"][0]
    assert record["boxes"] == []


def test_one_series_of_a_folder_is_chosen(folder):
    study = files_of(folder)
    other = np.rint(scanned(0).volume_hu * 0.95).astype(np.int16)
    names = [f"other{z}.dcm" for z in range(len(other))]
    export.write_series(study.ct, other, scanned(0).spacing_mm, study_uid="1.2.9", names=names)
    with pytest.raises(ValueError, match=r"holds 2 CT series.*1\.2\.9\.1"):
        pack(folder)
    pack(folder, series="1.2.9.1")
    expected = in_memory(replace(scanned(0), volume_hu=other))
    for series in ("1.2.9.1", f"{STUDY}.1"):  # another one of the same files is packed again
        pack(folder, series=series)
        found = open_sequence(sequence_path(folder / "packed", STUDY, "C3"))
        np.testing.assert_array_equal(found, expected["C3"].array)
        expected = in_memory(scanned(0))


# What is done stays done.


def test_a_study_that_is_packed_is_not_read_again(folder, monkeypatch):
    before = contents(folder)
    for name in ("read_ct", "read_mask", "write_sequence", "write_figure"):
        monkeypatch.setattr(packer, name, lambda *_, **__: pytest.fail("packed again"))
    assert pack(folder) == pack(folder, sheet="sheet.png") == json.loads(record_of(folder).read_text())
    assert contents(folder) == before


def test_names_of_slices_do_not_matter(folder, reads):
    ct = files_of(folder).ct
    for number, path in enumerate(sorted(ct.iterdir())):
        path.rename(ct / f"renamed{97 * number % 101:03d}")
    (ct / ".DS_Store").write_text("what a system leaves")
    pack(folder)
    assert reads == []


def edit_slice(folder):
    def last_bit(ds):  # of one pixel, by 1 HU
        ds.PixelData = ds.PixelData[:-2] + bytes([ds.PixelData[-2] ^ 1, ds.PixelData[-1]])

    scans.edit(files_of(folder).ct / "9.dcm", last_bit)


def edit_mask(folder):
    label_map = scanned(0).label_map.copy()
    label_map[label_map == 4] = 0
    write_mask(folder, label_map)


def rename_mask(folder):
    return {"mask": files_of(folder).mask.rename(folder / "other.nii.gz")}


def damage(folder, name=f"{STUDY}_3.npy"):
    path = folder / "packed" / name
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(content)


def edit_record(folder):
    path = record_of(folder)
    path.write_text(path.read_text().replace('"completeness": 1', '"completeness": 0'))


RSNA = dict(enumerate(VERTEBRAE, start=1))
CHANGES = {
    "a slice's pixels": edit_slice,
    "a slice less": lambda folder: (files_of(folder).ct / "1.dcm").unlink(),
    "a file more": lambda folder: (files_of(folder).ct / "notes.txt").write_text("see also"),
    "the mask": edit_mask,
    "the mask's name": rename_mask,
    "the scheme": lambda folder: {"scheme": RSNA},
    "the series": lambda folder: {"series": f"{STUDY}.1"},
    "the labels": lambda folder: {"fractured": scanned(0).labels},
    "the boxes": lambda folder: {"boxes": boxes((20, 20, 5, 5, 15))},
    "the window": lambda folder: {"config": replace(CONFIG, window_hu=(-500.0, 1200.0))},
    "the size": lambda folder: {"config": replace(CONFIG, size=31)},
    "a sheet that is not there": lambda folder: {"sheet": "another.png"},
    "a damaged sequence": damage,
    "a missing sequence": lambda folder: (folder / "packed" / f"{STUDY}_7.npy").unlink(),
    "a missing record": lambda folder: record_of(folder).unlink(),
    "a record that is no JSON": lambda folder: record_of(folder).write_text("{"),
    "a record that was edited": edit_record,
}


@pytest.mark.slow
@pytest.mark.parametrize("what", CHANGES)
def test_a_study_is_packed_again_after_a_change_of(what, folder, reads, tmp_path):
    options = CHANGES[what](folder)
    options = options if isinstance(options, dict) else {}
    record = pack(folder, **options)
    assert len(reads) == 1
    assert pack(folder, **options) == record
    assert len(reads) == 1
    shutil.rmtree(folder / "packed")
    assert pack(folder, **options) == record


def test_a_study_is_packed_again_by_another_version(folder, reads, monkeypatch):
    monkeypatch.setattr(packer, "PACKING_VERSION", 9)
    assert {row["packer"] for row in pack(folder)["rows"]} == {"packing 9"}
    assert len(reads) == 1


def test_masks_of_a_folder_are_known_by_their_names(folder, reads):
    """A mask that is renamed has the same bytes and is another vertebra."""
    masks = folder / "masks"
    for vertebra in ("C3", "C4"):
        mask = (scanned(0).label_map == int(vertebra[1])).astype(np.uint8)
        export.write_label_map(masks / f"{vertebra}.nii.gz", mask, scanned(0).spacing_mm)
    assert [row["vertebra"] for row in pack(folder, mask=masks)["rows"]] == ["C3", "C4"]
    assert len(pack(folder, mask=masks)["problems"]) == 5
    assert len(reads) == 1
    (masks / "C4.nii.gz").rename(masks / "C5.nii.gz")
    record = pack(folder, mask=masks)
    assert [row["vertebra"] for row in record["rows"]] == ["C3", "C5"]
    assert {row["mask_sha256"] for row in record["rows"]} == {hash_of(masks, named=True)}
    assert not sequence_path(folder / "packed", STUDY, "C4").exists()


# Beside one another.


def patch(monkeypatch, **others) -> None:
    for name, value in others.items():
        monkeypatch.setattr(packer, name, value)


def test_the_mask_is_read_beside_the_ct_while_hashes_are_not_done(folder, monkeypatch):
    """Hashes, and then the CT, wait until the mask is read."""
    shutil.rmtree(folder / "packed")
    read, waited = Event(), []
    hashes, read_mask, read_ct = packer._hashes, packer.read_mask, packer.read_ct

    def wait_and(work):
        def after(*arguments, **options):
            waited.append(read.wait(5))
            return work(*arguments, **options)

        return after

    def noted(*arguments):
        mask = read_mask(*arguments)
        read.set()
        return mask

    patch(monkeypatch, _hashes=wait_and(hashes), read_ct=wait_and(read_ct), read_mask=noted)
    record = pack(folder)
    assert waited == [True, True]
    monkeypatch.undo()
    assert pack(folder) == record


def no_hashes(_):
    raise PermissionError("the CT cannot be hashed")


def test_nothing_is_written_of_a_study_that_cannot_be_hashed(folder, monkeypatch):
    shutil.rmtree(folder / "packed")
    patch(monkeypatch, _hashes=no_hashes)
    for name in ("write_sequence", "write_figure", "write_sealed"):
        monkeypatch.setattr(packer, name, lambda *_, **__: pytest.fail("written"))
    with pytest.raises(PermissionError, match="the CT cannot be hashed"):
        pack(folder, sheet="another.png")
    assert not (folder / "packed").exists()


def test_a_study_that_was_packed_and_cannot_be_hashed_now_stays_as_it_was(folder, monkeypatch):
    before = contents(folder)
    patch(monkeypatch, _hashes=no_hashes)
    with pytest.raises(PermissionError, match="the CT cannot be hashed"):
        pack(folder)
    assert contents(folder) == before


def test_what_is_wrong_with_the_mask_is_told_before_that_it_cannot_be_hashed(folder, monkeypatch):
    shutil.rmtree(folder / "packed")
    files_of(folder).mask.write_bytes(b"mask")
    patch(monkeypatch, _hashes=no_hashes)
    with pytest.raises(ValueError, match=r"nii\.gz: it cannot be read"):
        pack(folder)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_after_an_error_or_ctrl_c_what_is_queued_is_not_begun(folder, monkeypatch, stop):
    """On one worker, which hashes until the rest is called off: the mask is queued."""
    shutil.rmtree(folder / "packed")
    called_off, read = Event(), []

    class OneWorker(ThreadPoolExecutor):
        def __init__(self, _):
            super().__init__(1)

        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            called_off.set()
            super().shutdown(wait=wait)

    def stopped(*_, **__):
        raise stop("stopped")

    def hashes(_):
        assert called_off.wait(5)
        return {}

    patch(monkeypatch, ThreadPoolExecutor=OneWorker, read_ct=stopped, _hashes=hashes)
    patch(monkeypatch, read_mask=lambda *_: read.append("the mask"))
    with pytest.raises(stop, match="stopped"):
        pack(folder)
    assert called_off.is_set()
    assert read == []
    assert not (folder / "packed").exists()


# What cannot be packed.


def spoil_ct(folder):
    for path in files_of(folder).ct.iterdir():
        path.write_bytes(path.read_bytes()[:300])


BAD = {
    "a CT that cannot be read": (spoil_ct, "files cannot be read"),
    "a CT without files": (
        lambda folder: [path.unlink() for path in files_of(folder).ct.iterdir()],
        f"No file in {STUDY}",
    ),
    "a mask that is no NIfTI": (
        lambda folder: files_of(folder).mask.write_bytes(b"mask"),
        rf"{STUDY}\.nii\.gz: it cannot be read",
    ),
    "a mask upside down": (
        lambda folder: write_mask(folder, scanned(0).label_map[::-1]),
        rf"^{STUDY}\.nii\.gz: the mask has C2 above C1, .* the scheme\.$",
    ),
    "a mask beside the bone": (
        lambda folder: write_mask(
            folder,
            np.where(
                np.arange(len(scanned(0).volume_hu))[:, None, None] < 20, 3 * (scanned(0).volume_hu < -900), 0
            ),
        ),
        r"no vertebra can be packed \(C1, C2, C4, C5, C6, C7: not in the mask; C3: its mask",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_study_that_cannot_be_packed_any_more_leaves_nothing_behind(what, folder):
    spoil, message = BAD[what]
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pack(folder)
    assert contents(folder / "packed") == {}


def test_boxes_on_slices_that_the_series_does_not_have_are_refused(folder):
    with pytest.raises(ValueError, match=r"slices that the series does not have \(1\): 999"):
        pack(folder, boxes=boxes((20, 20, 5, 5, 999)))
    assert contents(folder / "packed") == {}


def test_vertebrae_that_cannot_be_packed_any_more_go_and_the_others_stay(folder):
    label_map = scanned(0).label_map.copy()
    label_map[label_map == 7] = 0
    label_map[-2:, :2, :2] = 7
    write_mask(folder, label_map)
    record = pack(folder)
    assert "its mask holds" in record["problems"]["C7"]
    assert len(record["problems"]) == 1
    assert [row["vertebra"] for row in record["rows"]] == [*VERTEBRAE[:6]]
    assert sorted(contents(folder / "packed")) == [f"{STUDY}_{n}.npy" for n in range(1, 7)] + [
        f"studies/{STUDY}.json"
    ]


@pytest.mark.parametrize("uid", ["", "..", "1.2/3", "Doe Jane", "1" * 65])
def test_a_study_whose_name_is_no_uid_is_refused_before_anything_is_read(folder, reads, uid):
    before = contents(folder)
    with pytest.raises(ValueError, match="cannot be file names"):
        pack(folder, uid=uid)
    assert reads == []
    assert contents(folder) == before


# Small things.


def test_forgetting_a_study_touches_no_other(tmp_path):
    array = in_memory(scanned(0))["C1"].array
    for uid in ("1.2.3", "1.2.30"):
        for vertebra in VERTEBRAE:
            write_sequence(tmp_path, uid, vertebra, array)
        (tmp_path / "studies").mkdir(exist_ok=True)
        (tmp_path / "studies" / f"{uid}.json").touch()
    forget(tmp_path, "1.2.3")
    forget(tmp_path, "1.2.4")
    assert sorted(contents(tmp_path)) == [f"1.2.30_{n}.npy" for n in range(1, 8)] + ["studies/1.2.30.json"]


def test_a_folder_is_known_by_what_its_files_hold(tmp_path):
    def folder(name, **files):
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_text(content)
        return tmp_path / name

    first = folder("first", a="1", b="2")
    assert hash_of(first) == hash_of(folder("swapped", a="2", b="1"))
    assert hash_of(first, named=True) != hash_of(tmp_path / "swapped", named=True)
    assert hash_of(first, named=True) == hash_of(folder("same", a="1", b="2"), named=True)
    others = (
        folder("more", a="1", b="2", c="2"),
        folder("less", a="1"),
        folder("joined", a="12"),
        folder("none"),
    )
    assert len({hash_of(path) for path in (first, *others)}) == 5
    assert hash_of(first / "a") == hash_of(first / "a", named=True) == sha256_of(first / "a")


def test_problems_are_told_by_reason():
    assert sentence({}) == ""
    assert sentence({"C1": "not there", "C2": "in pieces", "C7": "not there"}) == (
        "C1, C7: not there; C2: in pieces"
    )
