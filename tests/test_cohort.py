import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from toy_cohort import SIZE, SLICES, make_toy_cohort

from cspine_helpers.cohort import read_cohort
from cspine_helpers.dataset.sequence import SequenceDataset
from cspine_helpers.files.paths import sha256_of
from cspine_helpers.labels import (
    SPLITS,
    UID,
    VERTEBRAE,
    read_boxes,
    read_labels,
    without,
    write_boxes,
    write_labels,
)
from cspine_helpers.packed import read_manifest, write_manifest
from cspine_helpers.packing.slice_truth import PACKED_BOX_COLUMNS, read_packed_boxes, write_packed_boxes
from cspine_helpers.predictions import read_predictions, write_predictions
from cspine_helpers.splits import OUT_OF_FOLD, k_folds, split_hash, split_patients, write_split


@pytest.fixture
def folder(tmp_path):
    return make_toy_cohort(tmp_path / "toy")


def test_every_study_is_expanded_once_in_its_own_split(folder):
    cohort = read_cohort(folder)
    assert tuple(cohort.samples) == SPLITS
    for name, samples in cohort.samples.items():
        own = cohort.split.loc[cohort.split["split"] == name, UID]
        assert samples[UID].drop_duplicates().tolist() == own.tolist()
        assert len(samples) == len(own) * len(VERTEBRAE)
    assert sum(len(samples) for samples in cohort.samples.values()) == len(cohort.labels) * len(VERTEBRAE)
    assert cohort.packed == folder / "packed"


def test_the_fingerprint_changes_with_each_input(folder):
    before = read_cohort(folder).fingerprint()
    assert before["cohort"] == "toy"
    assert before["labels_sha256"] == sha256_of(folder / "train.csv")
    assert before["split_sha256"] == sha256_of(folder / "split.csv")
    packed = folder / "packed"
    write_manifest(read_manifest(packed).assign(pixel_mm=2.0), packed)
    after = read_cohort(folder).fingerprint()
    assert {key for key in before if before[key] != after[key]} == {"manifest_sha256"}


def test_a_cohort_may_lack_a_manifest(folder):
    (folder / "packed" / "manifest.csv").unlink()
    cohort = read_cohort(folder)
    assert cohort.manifest is None
    assert cohort.fingerprint()["manifest_sha256"] is None


def test_a_split_of_other_studies_than_the_labels_is_refused(folder):
    table = read_labels(folder / "train.csv")
    write_labels(without(table, [table[UID].iloc[0]]), folder / "train.csv")
    with pytest.raises(ValueError, match=f"not in the label table .*'{table[UID].iloc[0]}'"):
        read_cohort(folder)


def test_missing_labels_or_split_are_named(folder):
    (folder / "split.csv").unlink()
    with pytest.raises(FileNotFoundError, match="Notebook 02"):
        read_cohort(folder)
    pd.DataFrame().to_csv(folder / "split.csv")
    (folder / "train.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.csv"):
        read_cohort(folder)


def test_a_run_of_another_split_or_other_labels_is_refused(folder):
    cohort = read_cohort(folder)
    record = {"data": cohort.fingerprint()}
    cohort.check_run(record)
    write_split(split_patients(cohort.labels, seed=5), folder / "split.csv", replace=True)
    with pytest.raises(ValueError, match="split_sha256 differ"):
        read_cohort(folder).check_run(record)


def test_its_facts_are_counts_of_each_split_and_the_settings_that_are_noted(folder):
    cohort = read_cohort(folder)
    facts = cohort.facts()
    assert facts["split"] is facts["packing"] is facts["phantom"] is None
    for name, samples in cohort.samples.items():
        of_patients = cohort.labels[cohort.labels[UID].isin(samples[UID])]
        counted = facts["counts"][name]
        assert counted["studies"] == counted["patients"] == len(of_patients)
        assert counted["sequences"] == 7 * len(of_patients)
        fractured = of_patients[list(VERTEBRAE)].sum()
        levels = {"patient": of_patients["patient_overall"].sum(), "vertebra": fractured.sum()}
        assert counted["fractured"] == levels | fractured.to_dict()
    noted = {"packing": {"config": {"size": 32}}, "phantom": {"made_by": "somebody"}}
    (folder / "packed" / "packing.json").write_text(json.dumps(noted["packing"]))
    (folder / "cohort.json").write_text(json.dumps(noted["phantom"]))
    settings = {"fractions": (0.6, 0.2, 0.2), "seed": 0}
    split = split_patients(cohort.labels, **settings)
    write_split(split, folder / "split.csv", replace=True, made_with=settings)
    facts = read_cohort(folder).facts()
    assert facts["split"] == {"fractions": [0.6, 0.2, 0.2], "seed": 0}
    assert {name: facts[name] for name in noted} == noted
    write_split(split_patients(cohort.labels, seed=5), folder / "split.csv", replace=True)
    assert read_cohort(folder).facts()["split"] is None  # the settings are another split's


def test_two_studies_of_a_patient_count_as_one_patient(folder):
    cohort = read_cohort(folder)
    uids = cohort.samples["train"][UID].unique()
    owners = cohort.split[UID].where(cohort.split[UID] != uids[0], uids[1])
    counted = replace(cohort, split=cohort.split.assign(patient=owners)).facts()["counts"]["train"]
    assert (counted["studies"], counted["patients"]) == (len(uids), len(uids) - 1)
    ill = set(cohort.samples["train"].query("label == 1")[UID].replace(uids[0], uids[1]))
    assert counted["fractured"]["patient"] == len(ill)


def test_studies_to_leave_out_that_the_labels_do_not_have_are_named(tmp_path):
    folder = make_toy_cohort(tmp_path)
    (folder / "exclude.txt").write_text("1.2.826.3\n1.2.826.33\n")
    with pytest.raises(ValueError, match=r"not in the table \(1\): '1\.2\.826\.33'"):
        read_cohort(folder)
    (folder / "exclude.txt").write_text("1.2.826.3\n")
    cohort = read_cohort(folder)
    left = pd.concat(cohort.samples.values())[UID]
    assert set(left) == {f"1.2.826.{study}" for study in range(10)} - {"1.2.826.3"}


def test_ids_of_other_data_sets_come_back_from_every_table_as_they_were(tmp_path):
    """Among them what pandas takes for numbers or for missing, and what looks like a packed file's name."""
    uids = ["0001", "1.10", "1e5", "NaN1", "NAN.2", "inf", "sub-verse004", "PAT_1", "PAT_1_7", "a-b_C1"]
    folder = make_toy_cohort(tmp_path, uids=uids)
    cohort = read_cohort(folder)
    assert cohort.labels[UID].tolist() == uids
    assert cohort.manifest is not None
    assert cohort.manifest[UID].unique().tolist() == uids
    assert sorted(cohort.split[UID]) == sorted(uids)
    cohort.usable(slices=SLICES, size=SIZE)
    for samples in cohort.samples.values():
        dataset = SequenceDataset(samples, cohort.packed, slices=SLICES, size=SIZE, manifest=cohort.manifest)
        for index, (uid, vertebra) in enumerate(zip(samples[UID], samples["vertebra"], strict=True)):
            expected = np.load(cohort.packed / f"{uid}_{vertebra[1]}.npy")
            np.testing.assert_array_equal(dataset[index]["sequence"].numpy(), expected.transpose(0, 3, 1, 2))
    boxes = pd.DataFrame({UID: uids, "x": 1.0, "y": 1.0, "width": 2.0, "height": 2.0, "slice_number": 3})
    write_boxes(boxes, tmp_path / "boxes.csv")
    assert read_boxes(tmp_path / "boxes.csv")[UID].tolist() == uids
    packed = pd.DataFrame(boxes.drop(columns="slice_number").assign(vertebra="C1", slice=0))
    write_packed_boxes(packed[list(PACKED_BOX_COLUMNS)], tmp_path / "packed.csv")
    assert read_packed_boxes(tmp_path / "packed.csv")[UID].tolist() == uids
    rows = pd.concat([samples.assign(split=name) for name, samples in cohort.samples.items()])
    write_predictions(rows.assign(probability=0.5), tmp_path / "predictions.csv")
    assert sorted(read_predictions(tmp_path / "predictions.csv")[UID].unique()) == sorted(uids)


def test_the_cohort_of_a_fold_knows_what_is_out_of_it_and_says_so_in_its_fingerprint(tmp_path):
    whole = read_cohort(make_toy_cohort(tmp_path / "toy"))
    folds = k_folds(whole.labels, split=whole.split, folds=3)
    first, last = (whole.of_fold(folds, fold) for fold in (0, 2))
    assert list(first.samples) == [*SPLITS, OUT_OF_FOLD]
    pd.testing.assert_frame_equal(first.samples["test"], whole.samples["test"])
    for name, fold in ((OUT_OF_FOLD, 0), ("validation", 1), ("train", 2)):
        assert set(first.samples[name][UID]) == set(folds[UID][folds["fold"] == fold])
    assert set(last.samples["validation"][UID]) == set(first.samples[OUT_OF_FOLD][UID])
    assert first.fingerprint()["fold"] == {"number": 0, "folds": 3, "folds_sha256": split_hash(folds)}
    assert first.facts()["counts"][OUT_OF_FOLD]["sequences"] == len(first.samples[OUT_OF_FOLD])
    for cohort in (last, whole):  # the fold's model may know its patients
        with pytest.raises(ValueError, match=r"trained on other data .*split_sha256 differ"):
            cohort.check_run({"data": first.fingerprint()})
