import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna

from cspine_helpers import labels, packed
from cspine_helpers.files import paths
from cspine_helpers.labels import PATIENT, UID, VERTEBRAE
from cspine_helpers.packed import read_manifest
from cspine_helpers.packing import crop as packing
from cspine_helpers.packing.slice_truth import PACKED_BOX_COLUMNS, write_packed_boxes
from cspine_helpers.packing.study import PACKING_VERSION
from cspine_helpers.phantom import cohort as phantom
from cspine_helpers.phantom.cohort import CohortConfig
from cspine_helpers.phantom.rendering import Study

SMALL = CohortConfig(studies=4, seed=11, pack=packing.PackConfig(slices=9, size=32))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "small"
    phantom.make_cohort(folder, SMALL, workers=1)
    return folder


@pytest.fixture(scope="module")
def study(cohort) -> Study:
    """One of its studies with fractures, rendered again."""
    table = labels.read_labels(cohort / "train.csv")
    return phantom.study_of(cohort, table[UID][table[PATIENT] == 1].iloc[0])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_label_draws_have_rsnas_prevalence_and_cooccurrence_within_sampling_error():
    studies = 3000
    table = labels.validate_labels(phantom.draw_labels(CohortConfig(studies=studies, seed=1)))
    patterns = phantom.fracture_patterns()
    count = patterns["studies"].to_numpy()
    assert count.sum() == 2019
    broken = patterns[list(VERTEBRAE)].to_numpy()
    expected = (broken.T * count) @ broken / count.sum()
    found = table[list(VERTEBRAE)].to_numpy().T @ table[list(VERTEBRAE)].to_numpy() / studies
    error = np.sqrt(expected * (1 - expected) / studies)
    assert (np.abs(found - expected) <= 4 * error + 1e-9).all()
    assert table[PATIENT].mean() == pytest.approx(0.476, abs=0.04)


@pytest.mark.slow
def test_a_cohort_has_valid_artefacts_that_agree_with_each_other(cohort):
    table = labels.read_labels(cohort / "train.csv")
    samples = labels.expand(table, table[UID])
    packed.check_sequences(cohort / "packed", samples, slices=9, size=32)
    manifest = read_manifest(cohort / "packed")
    assert len(manifest) == len(samples) == 7 * SMALL.studies
    shown = manifest["slice_truth"].str.contains("x").to_numpy()
    np.testing.assert_array_equal(shown, samples["label"].to_numpy() == 1)
    boxes = labels.read_boxes(cohort / "train_bounding_boxes.csv")
    assert set(boxes[UID]) == set(table[UID][table[PATIENT] == 1])


# (PHANTOM_VERSION, PACKING_VERSION) → what `fingerprint` makes of the small cohort
FINGERPRINTS: dict[tuple[int, int], list[float]] = {
    (1, 1): [82.2788047, -0.0038144, 19.6432059, -0.0250903],
    (2, 1): [81.0078141, 0.0039612, 19.3003046, 0.0420014],
}


def fingerprint(folder: Path) -> list[float]:
    """Means of intensities and masks, and each projected on a wave along all voxels.

    No digest: another processor may round the last bit of a sine differently, and with it one voxel in
    millions by a grey level. That moves these numbers by 1e-6, a change of all arrays by 1e-4 and more.
    """
    arrays = np.stack([np.load(path) for path in sorted(folder.glob("*.npy"))])
    wave = np.sin(np.arange(arrays.size)).reshape(arrays.shape)
    parts = (arrays[..., :5], wave[..., :5]), (arrays[..., 5], wave[..., 5])
    return [value for part, its in parts for value in (float(part.mean()), float((part * its).mean()))]


def test_packed_arrays_change_only_with_the_number_of_a_version(cohort):
    """Where this fails and the change is meant: raise the version, and add its numbers above."""
    known = FINGERPRINTS[phantom.PHANTOM_VERSION, PACKING_VERSION]
    assert fingerprint(cohort / "packed") == pytest.approx(known, rel=0, abs=2e-5)


@pytest.mark.slow
def test_the_number_of_workers_changes_no_byte(cohort, tmp_path):
    phantom.make_cohort(tmp_path / "small", SMALL, workers=2)
    assert contents(tmp_path / "small") == contents(cohort)


@pytest.mark.slow
def test_a_complete_cohort_is_left_alone_and_one_of_another_version_made_again(tmp_path, capsys):
    config = CohortConfig(studies=1, seed=11, pack=SMALL.pack)
    phantom.make_cohort(tmp_path / "one", config, workers=1)
    first = contents(tmp_path / "one")
    victim = next((tmp_path / "one" / "packed").glob("*.npy"))
    victim.unlink()
    phantom.make_cohort(tmp_path / "one", config, workers=1)
    assert "already" in capsys.readouterr().out
    assert not victim.exists()
    record = json.loads((tmp_path / "one" / "cohort.json").read_text())
    (tmp_path / "one" / "cohort.json").write_text(json.dumps(record | {"version": 0}))
    phantom.make_cohort(tmp_path / "one", config, workers=1)
    assert contents(tmp_path / "one") == first


def test_a_folder_that_is_no_phantom_cohort_is_never_touched(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.csv").write_text("precious")
    with pytest.raises(FileExistsError, match="no phantom cohort"):
        phantom.make_cohort(tmp_path / "mine", SMALL, workers=1)
    assert contents(tmp_path / "mine") == {"train.csv": b"precious"}
    (tmp_path / "mine" / "cohort.json").write_text('{"made_by": "somebody else"}')
    with pytest.raises(FileExistsError, match="no phantom cohort"):
        phantom.make_cohort(tmp_path / "mine", SMALL, workers=1)
    (tmp_path / "mine" / "cohort.json").write_text(f'{{"made_by": "{phantom.MADE_BY}"}}')
    (tmp_path / "mine" / "my_reads.csv").write_text("precious")
    with pytest.raises(FileExistsError, match=r"holds more than its cohort: 'my_reads\.csv'"):
        phantom.make_cohort(tmp_path / "mine", SMALL, workers=1)
    assert (tmp_path / "mine" / "train.csv").read_text() == "precious"


@pytest.mark.slow
def test_a_remade_cohort_of_the_same_patients_keeps_its_split(tmp_path):
    config = CohortConfig(studies=1, seed=11, pack=SMALL.pack)
    phantom.make_cohort(tmp_path / "one", config, workers=1)
    (tmp_path / "one" / "split.csv").write_text("a split")
    record = json.loads((tmp_path / "one" / "cohort.json").read_text())
    (tmp_path / "one" / "cohort.json").write_text(json.dumps(record | {"version": 0}))
    phantom.make_cohort(tmp_path / "one", config, workers=1)
    assert (tmp_path / "one" / "split.csv").read_text() == "a split"
    phantom.make_cohort(tmp_path / "one", CohortConfig(studies=1, seed=12, pack=SMALL.pack), workers=1)
    assert not (tmp_path / "one" / "split.csv").exists()


def test_an_impossible_cohort_is_refused():
    for studies, seed in ((0, 1), (3, -1)):
        with pytest.raises(ValueError, match="1 study or more"):
            CohortConfig(studies=studies, seed=seed)


def test_boxes_hold_the_broken_voxels_of_their_slice(study):
    boxes = pd.DataFrame(phantom.fracture_boxes(study))
    for row in boxes.itertuples():
        x, y = int(row.x), int(row.y)
        patch = study.fracture_map[row.slice_number, y : y + int(row.height), x : x + int(row.width)]
        assert np.count_nonzero(patch) >= phantom.MIN_FRACTURE_VOXELS
        for edge in (patch[0], patch[-1], patch[:, 0], patch[:, -1]):
            assert edge.any()
    missed = set(np.flatnonzero((study.fracture_map > 0).sum((1, 2)) >= 7 * phantom.MIN_FRACTURE_VOXELS))
    assert missed <= set(boxes["slice_number"])


def test_a_study_of_a_cohort_can_be_rendered_again(cohort, study, tmp_path):
    table = labels.read_labels(cohort / "train.csv")
    assert study.labels == table.set_index(UID).loc[study.uid, list(VERTEBRAE)].to_dict()
    phantom.pack_study(study, tmp_path / "packed", SMALL.pack)
    for again in (tmp_path / "packed").iterdir():
        assert again.read_bytes() == (cohort / "packed" / again.name).read_bytes()
    shorter = tmp_path / "shorter"
    labels.write_labels(table[table[UID] == study.uid], shorter / "train.csv")
    (shorter / "cohort.json").write_bytes((cohort / "cohort.json").read_bytes())
    np.testing.assert_array_equal(phantom.study_of(shorter, study.uid).volume_hu, study.volume_hu)
    with pytest.raises(ValueError, match=r"no phantom '1\.2'"):
        phantom.study_of(cohort, "1.2")
    with pytest.raises(FileNotFoundError, match="no phantom cohort"):
        phantom.study_of(tmp_path, "1.2")


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", "[" * 10_000, '{"config": 3}', '{"config": {}}', "\x00"]
)
def test_a_damaged_record_of_a_cohort_is_refused_by_name(cohort, tmp_path, text):
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "train.csv").write_bytes((cohort / "train.csv").read_bytes())
    (folder / "cohort.json").write_text(text)
    with pytest.raises(ValueError, match=r"cohort\.json .*make it again"):
        phantom.study_of(folder, "1.2.3")


def test_a_cohort_is_sealed_file_by_file(cohort):
    sums = paths.read_checksums(cohort / "packed")
    assert len(sums) == len(list((cohort / "packed").glob("[!.]*"))) - 1
    name = next(iter(sums))
    assert sums[name] == paths.sha256_of(cohort / "packed" / name)


@pytest.mark.slow
def test_phantoms_stand_in_for_the_patients_of_another_cohorts_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    real = tmp_path / "data" / "real"
    names = [UID, PATIENT, *VERTEBRAE]
    rows = [("9.1", 1, 0, 1, 0, 0, 0, 0, 0), ("9.2", 1, 0, 0, 0, 0, 0, 0, 1), ("9.3", 0, *[0] * 7)]
    table = pd.DataFrame(rows, columns=names)
    labels.write_labels(table, real / "train.csv")
    drawn = pd.DataFrame([("9.2", 1, 1, 2, 2, 7)], columns=labels.BOX_COLUMNS)
    labels.write_boxes(drawn, real / "train_bounding_boxes.csv")
    config = CohortConfig(studies=2, seed=5, pack=SMALL.pack, truth="rsna", like="real")
    phantom.make_cohort(tmp_path / "data" / "like", config, workers=1)
    found = labels.read_labels(tmp_path / "data" / "like" / "train.csv")
    pd.testing.assert_frame_equal(found[names[1:]], table.loc[:1, names[1:]])
    assert not set(found[UID]) & set(table[UID])  # no phantom has a patient's name
    boxes = labels.read_boxes(tmp_path / "data" / "like" / "train_bounding_boxes.csv")
    assert set(boxes[UID]) == {found[UID][1]}
    known = read_manifest(tmp_path / "data" / "like" / "packed").set_index([UID, "vertebra"])["slice_truth"]
    assert pd.isna(known[found[UID][0], "C2"])
    assert "x" in known[found[UID][1], "C7"]
    assert phantom.study_of(tmp_path / "data" / "like", found[UID][1]).labels["C7"] == 1
    with pytest.raises(ValueError, match=r"real has 3 studies; found 4\. Ask for fewer\."):
        phantom.draw_labels(CohortConfig(studies=4, seed=5, like="real"))


@needs_rsna
def test_rsnas_own_rows_give_the_labels_of_phantoms_and_say_who_has_boxes(tmp_path, monkeypatch):
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rsna2022").symlink_to(RSNA)
    patients = phantom._patients(CohortConfig(studies=2019, seed=1, truth="rsna", like="rsna2022"))
    assert sum(patient.is_boxed for patient in patients) == 235
    assert sum(map(sum, (patient.fractured.values() for patient in patients))) == 1444


def test_of_patients_the_readers_boxes_are_known_where_they_were_packed(tmp_path):
    assert phantom.fracture_marks(tmp_path, "1.2", "C2") == {}
    rows = [("1.2", "C2", 4, 1.0, 2.0, 3.0, 4.0), ("1.2", "C3", 0, 1.0, 2.0, 3.0, 4.0)]
    table = pd.DataFrame(rows, columns=PACKED_BOX_COLUMNS)
    write_packed_boxes(table, tmp_path / "packed" / "boxes.csv")
    assert phantom.fracture_marks(tmp_path, "1.2", "C2")["boxes"]["slice"].tolist() == [4]
    assert phantom.fracture_marks(tmp_path, "1.3", "C2")["boxes"].empty


def test_broken_bone_is_marked_where_the_sequence_shows_it(cohort, study):
    config = phantom.read_config(cohort).pack
    table = pd.DataFrame([(study.uid, level) for level in VERTEBRAE], columns=[UID, "vertebra"]).iloc[::-1]
    own = phantom.fracture_truth(cohort, table, workers=1)
    others = phantom.fracture_truth(cohort, table, workers=1, neighbour=True)
    masks = phantom.neighbour_masks(cohort, table, workers=1)
    assert own.shape == others.shape == masks.shape == (7, 9, 32, 32)
    assert masks[table["vertebra"] == "C4"].any()
    assert set(np.unique(own)) == {0, 1}
    for level, mine, rest, mask in zip(table["vertebra"], own, others, masks, strict=True):
        piece = packing.pack_vertebra(study.volume_hu, study.label_map, study.spacing_mm, level, config)
        assert mine.any() == bool(study.labels[level])
        # every marked pixel lies on a broken voxel or beside one, by its middle
        pixel = (piece.rows[1] - piece.rows[0]) / config.size  # in voxels
        assert not (mask & (piece.array[..., 5] > 127)).any()
        broken, bone = study.fracture_map, study.label_map
        for truth, voxels, is_number in ((mine, broken, True), (rest, broken, False), (mask, bone, False)):
            for t, row, column in np.argwhere(truth):
                y, x = (
                    int(at * pixel + first)
                    for at, first in ((row, piece.rows[0]), (column, piece.columns[0]))
                )
                near = voxels[piece.slice_indices[t], max(y - 1, 0) : y + 4, max(x - 1, 0) : x + 4]
                number = VERTEBRAE.index(level) + 1
                assert ((near == number) if is_number else (near > 0) & (near != number)).any()
    shown = phantom.fracture_marks(cohort, study.uid, table["vertebra"].iloc[-1])
    assert shown.keys() == {"fracture", "neighbours", "note"}
    assert "phantom" in shown["note"]
    np.testing.assert_array_equal(shown["fracture"], own[-1])
    np.testing.assert_array_equal(shown["neighbours"], others[-1])
    with pytest.raises(ValueError, match="no sample whose voxels"):
        phantom.fracture_truth(cohort, table[:0])
    with pytest.raises(ValueError, match=r"no phantom '1\.2'"):
        phantom.fracture_truth(cohort, table.assign(**{UID: "1.2"}), workers=1)
