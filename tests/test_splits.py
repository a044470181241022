import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cspine_helpers import labels, splits
from cspine_helpers.labels import PATIENT, SPLITS, TARGETS, UID, VERTEBRAE
from cspine_helpers.phantom import cohort as phantom


def make_table(patterns) -> pd.DataFrame:
    """A label table with one study for each row of seven 0/1 labels."""
    table = pd.DataFrame(np.asarray(patterns), columns=list(VERTEBRAE))
    table.insert(0, PATIENT, table.max(axis=1))
    table.insert(0, UID, [f"1.2.840.{number + 1}" for number in range(len(table))])
    return table


def random_table(studies: int, seed: int = 0) -> pd.DataFrame:
    shares = [0.07, 0.14, 0.04, 0.05, 0.08, 0.14, 0.20]
    return make_table((np.random.default_rng(seed).random((studies, 7)) < shares).astype(int))


@pytest.fixture
def split():
    return splits.split_patients(random_table(50))


def test_every_study_gets_one_split_of_the_asked_size():
    table = random_table(500)
    split = splits.split_patients(table)
    assert split.columns.tolist() == [UID, "split"]
    assert sorted(split[UID]) == sorted(table[UID])
    sizes = split["split"].value_counts()
    assert sizes[list(SPLITS)].to_numpy() == pytest.approx([300, 100, 100], abs=3)


def test_the_same_seed_gives_the_same_bytes_whatever_the_order_of_rows(tmp_path):
    table = random_table(200)
    for name, rows in (("a", table), ("b", table.sample(frac=1, random_state=1))):
        splits.write_split(splits.split_patients(rows, seed=3), tmp_path / name / "split.csv")
    for file in ("split.csv", "split.csv.sha256"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_split_that_the_cached_run_was_trained_on_is_made_again():
    run = json.loads((Path(__file__).parents[1] / "checkpoints" / "builtin" / "run.json").read_text())
    table = phantom.draw_labels(phantom.COHORTS["builtin"])
    assert splits.split_hash(splits.split_patients(table)) == run["data"]["split_sha256"]


def test_another_seed_gives_another_split():
    table = random_table(200)
    first, second = (splits.split_patients(table, seed=seed) for seed in (0, 1))
    assert 0.3 < (first["split"] != second["split"]).mean() < 0.8


def test_fractions_are_followed():
    split = splits.split_patients(random_table(1000), fractions=(0.8, 0.1, 0.1))
    assert (split["split"] == "train").mean() == pytest.approx(0.8, abs=0.003)


@pytest.mark.parametrize("fractions", [(0.6, 0.4), (0.6, 0.2, 0.3), (1.0, 0.0, 0.0), (1.2, -0.1, -0.1), ()])
def test_fractions_that_are_no_shares_are_refused(fractions):
    with pytest.raises(ValueError, match="three shares above 0 with the sum 1"):
        splits.split_patients(random_table(20), fractions=fractions)


@pytest.mark.parametrize("seed", [-1, 0.5, "a", None])
def test_a_seed_that_is_no_whole_number_from_zero_is_refused(seed):
    for deal in (splits.split_patients, splits.k_folds):
        with pytest.raises(ValueError, match=f"seed is a whole number from 0; found {seed!r}"):
            deal(random_table(20), seed=seed)


def test_too_few_studies_for_the_parts_are_refused_naming_the_empty_ones():
    with pytest.raises(ValueError, match="2 studies are too few: nothing is left for split '"):
        splits.split_patients(random_table(2))
    with pytest.raises(ValueError, match="nothing is left for fold"):
        splits.k_folds(random_table(3), folds=5)
    with pytest.raises(ValueError, match="2 or more; found 1"):
        splits.k_folds(random_table(3), folds=1)


@pytest.mark.slow
@given(
    hnp.arrays(int, st.tuples(st.integers(40, 200), st.just(7)), elements=st.integers(0, 1)),
    st.integers(0, 2**32 - 1),
)
def test_no_target_strays_far_from_its_share_in_any_part(patterns, seed):
    table = make_table(patterns)
    folds = splits.k_folds(table, folds=4, seed=seed).merge(table, on=UID)
    counts = folds.groupby("fold")[list(TARGETS)].sum().to_numpy()
    assert np.abs(counts - table[list(TARGETS)].sum().to_numpy() / 4).max() <= 4
    assert np.abs(folds["fold"].value_counts() - len(table) / 4).max() <= 3


def test_folds_are_alike_and_named_by_number():
    table = random_table(1000)
    folds = splits.k_folds(table, folds=5)
    assert sorted(folds["fold"].unique()) == [0, 1, 2, 3, 4]
    prevalence = folds.merge(table, on=UID).groupby("fold")[list(TARGETS)].mean()
    assert (prevalence.max() - prevalence.min()).max() < 0.02


def test_prevalence_by_split_is_that_of_its_studies(split):
    table = random_table(50)
    by_split = splits.split_prevalence(table, split)
    assert by_split["split"].tolist() == [name for name in SPLITS for _ in TARGETS]
    chosen = table[table[UID].isin(splits.studies_of(split, "test"))]
    found = by_split[by_split["split"] == "test"].drop(columns="split").reset_index(drop=True)
    pd.testing.assert_frame_equal(found, labels.prevalence(chosen))
    gaps = by_split.pivot_table("prevalence", "target", "split")
    assert splits.largest_gap(table, split) == pytest.approx(np.ptp(gaps.to_numpy(), axis=1).max())


def test_a_study_in_two_splits_or_twice_in_one_is_named_with_its_places():
    split = pd.DataFrame(
        [("1.1", "train"), ("1.2", "train"), ("1.1", "test"), ("1.3", "test"), ("1.3", "test")],
        columns=[UID, "split"],
    )
    with pytest.raises(ValueError, match=r"\(2\): '1.1 \(train, test\)', '1.3 \(test, test\)'"):
        splits.check_leakage(split)
    splits.check_leakage(split[:2])


def test_studies_of_a_split_come_in_order_and_an_unknown_name_is_refused(split):
    assert splits.studies_of(split, "train") == split[UID][split["split"] == "train"].tolist()
    with pytest.raises(ValueError, match="no studies of 'holdout'; found 'test', 'train', 'validation'"):
        splits.studies_of(split, "holdout")


def test_a_split_comes_back_from_its_file_and_opens_with_plain_pandas(split, tmp_path):
    splits.write_split(split, tmp_path / "split.csv")
    table = random_table(50)
    pd.testing.assert_frame_equal(splits.read_split(tmp_path / "split.csv", table), split)
    assert pd.read_csv(tmp_path / "split.csv").columns.tolist() == ["StudyInstanceUID", "split"]


@pytest.fixture
def folds():
    return splits.k_folds(random_table(50), folds=4)


def test_folds_come_back_from_their_file_with_the_hash_of_their_content(folds, tmp_path):
    path = tmp_path / "folds.csv"
    splits.write_split(folds.sample(frac=1, random_state=0), path)
    table = random_table(50)
    pd.testing.assert_frame_equal(splits.read_split(path, table, column="fold"), folds)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (tmp_path / "folds.csv.sha256").read_text() == f"{digest}  folds.csv\n"
    assert splits.split_hash(folds) == digest
    assert splits.split_hash(folds.assign(fold=folds["fold"].iloc[::-1].to_numpy())) != digest
    assert splits.studies_of(folds, 3) == folds[UID][folds["fold"] == 3].tolist()
    with pytest.raises(ValueError, match="no studies of 4; found 0, 1, 2, 3"):
        splits.studies_of(folds, 4)


def test_edited_folds_are_noticed_and_a_split_is_not_read_as_folds(folds, split, tmp_path):
    path = tmp_path / "folds.csv"
    with pytest.raises(FileNotFoundError, match=r"No table of folds at .*Notebook 02"):
        splits.read_split(path, column="fold")
    splits.write_split(folds, path)
    with pytest.raises(ValueError, match=r"lacks the column\(s\) 'split'"):
        splits.read_split(path)
    with pytest.raises(ValueError, match=r"not in the label table \(1\): '1.2.840.50'"):
        splits.read_split(path, random_table(49), column="fold")
    path.write_text(path.read_text().replace(",3\n", ",2\n", 1))
    with pytest.raises(ValueError, match="not the file that was written"):
        splits.read_split(path, column="fold")
    splits.write_split(split, path, replace=True)
    with pytest.raises(ValueError, match=r"lacks the column\(s\) 'fold'"):
        splits.read_split(path, column="fold")


def test_a_study_in_two_folds_is_named_with_both(folds, tmp_path):
    torn = pd.concat([folds, pd.DataFrame({UID: ["1.2.840.7"], "fold": [9]})])
    fold = folds.set_index(UID).loc["1.2.840.7", "fold"]
    with pytest.raises(ValueError, match=rf"one fold, once; .*\(1\): '1.2.840.7 \({fold}, 9\)'"):
        splits.check_leakage(torn)
    with pytest.raises(ValueError, match="one fold, once"):
        splits.write_split(torn, tmp_path / "folds.csv")
    splits.check_leakage(folds)
    with pytest.raises(ValueError, match=f"column 'split' or 'fold'; found '{UID}'"):
        splits.check_leakage(folds[[UID]])


@pytest.mark.parametrize(
    ("numbers", "named"),
    [
        ([0, 1, 3], "without a gap; found 0, 1, 3"),
        ([1, 2, 2], "without a gap; found 1, 2"),
        ([0, 0, 0], "two or more, without a gap; found 0"),
        ([True, False, True], "without a gap; found True, False"),
        ([-1, 0, 1], r"not whole numbers from 0 \(1\): '1.1: -1'"),
        ([0, 1, 0.5], r"not whole numbers from 0 \(1\): '1.3: 0.5'"),
        ([0, 1, None], r"not whole numbers from 0 \(1\): '1.3: nan'"),
        (["0", "1", "a"], r"not whole numbers from 0 \(1\): '1.3: a'"),
    ],
)
def test_folds_that_are_not_numbered_from_zero_cannot_be_written(numbers, named, tmp_path):
    folds = pd.DataFrame({UID: ["1.1", "1.2", "1.3"], "fold": numbers})
    with pytest.raises(ValueError, match=named):
        splits.write_split(folds, tmp_path / "folds.csv")
    assert list(tmp_path.iterdir()) == []


def test_the_hash_is_that_of_the_file_in_the_form_of_sha256sum(split, tmp_path):
    splits.write_split(split.sample(frac=1, random_state=0), tmp_path / "split.csv")
    digest = hashlib.sha256((tmp_path / "split.csv").read_bytes()).hexdigest()
    assert (tmp_path / "split.csv.sha256").read_text() == f"{digest}  split.csv\n"
    assert splits.split_hash(split) == digest


def test_an_edited_file_is_noticed(split, tmp_path):
    path = tmp_path / "split.csv"
    splits.write_split(split, path)
    path.write_text(path.read_text().replace(",test", ",train", 1))
    with pytest.raises(ValueError, match="not the file that was written"):
        splits.read_split(path)


@pytest.mark.parametrize("content", ["", "garbage"])
def test_a_spoilt_hash_is_noticed(split, tmp_path, content):
    splits.write_split(split, tmp_path / "split.csv")
    (tmp_path / "split.csv.sha256").write_text(content)
    with pytest.raises(ValueError, match=content or "nothing"):
        splits.read_split(tmp_path / "split.csv")


def test_without_split_or_hash_the_error_names_the_notebook(split, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No split at .*Notebook 02"):
        splits.read_split(tmp_path / "split.csv")
    splits.write_split(split, tmp_path / "split.csv")
    (tmp_path / "split.csv.sha256").unlink()
    with pytest.raises(FileNotFoundError, match=r"split\.csv\.sha256.*notebook 02"):
        splits.read_split(tmp_path / "split.csv")


def test_a_split_of_other_studies_than_the_label_table_is_refused_by_name(split, tmp_path):
    splits.write_split(split, tmp_path / "split.csv")
    table = random_table(50)
    table.loc[0, UID] = "9.9"
    with pytest.raises(ValueError, match=r"not in the label table \(1\): '1.2.840.1'\n.*split \(1\): '9.9'"):
        splits.read_split(tmp_path / "split.csv", table)


def test_leaks_bad_uids_and_unknown_names_cannot_be_written(split, tmp_path):
    split.loc[0, UID], split.loc[1, "split"] = "../x", "holdout"
    with pytest.raises(ValueError, match=r"(?s)'\.\./x'.*\(1\): '1.*: holdout'"):
        splits.write_split(split, tmp_path / "split.csv")
    with pytest.raises(ValueError, match="belongs to one split"):
        splits.write_split(pd.concat([split, split[5:6]]), tmp_path / "split.csv")
    assert list(tmp_path.iterdir()) == []


@needs_rsna
@pytest.mark.parametrize("seed", range(3))
def test_on_the_real_table_no_prevalence_differs_by_half_a_percentage_point(seed):
    table = labels.read_labels(RSNA / "train.csv")
    split = splits.split_patients(table, seed=seed)
    assert splits.largest_gap(table, split) < 0.005  # measured: 0.0029
    folds = splits.k_folds(table, seed=seed).merge(table, on=UID)
    prevalence = folds.groupby("fold")[list(TARGETS)].mean()
    assert (prevalence.max() - prevalence.min()).max() < 0.005  # measured: 0.0030


def test_a_split_that_is_there_is_not_written_over_unasked(split, tmp_path):
    path, other = tmp_path / "split.csv", splits.split_patients(random_table(50), seed=9)
    splits.write_split(split, path)
    splits.write_split(split.sample(frac=1, random_state=0), path)  # the same one
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"kept as it is: another split is there.*replace=True"):
        splits.write_split(other, path)
    assert path.read_bytes() == before
    splits.write_split(other, path, replace=True)
    assert splits.split_hash(splits.read_split(path)) == splits.split_hash(other)


def test_an_own_split_is_kept_and_taken_in_one_call_as_it_is_to_the_byte(split, tmp_path):
    path, table = tmp_path / "split.csv", random_table(50)
    split.sample(frac=1, random_state=1).assign(note="x").to_csv(path, index=False, lineterminator="\r\n")
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"somebody's own .*take it with splits\.adopt\(path, table\)"):
        splits.write_split(splits.split_patients(table, seed=9), path)
    with pytest.raises(FileNotFoundError, match=r"take it with splits\.adopt\(path, table\), or make"):
        splits.read_split(path, table)
    found = splits.adopt(path, table)
    assert splits.split_hash(found) == splits.split_hash(split)
    pd.testing.assert_frame_equal(splits.read_split(path, table), found)
    assert path.read_bytes() == before
    path.write_bytes(before.replace(b",test", b",train", 1))
    with pytest.raises(ValueError, match="not the file that was written"):
        splits.adopt(path, table)


OWN = {
    "a study short": (lambda split: split[1:], "not in the split"),
    "val": (lambda split: split.replace("validation", "val"), r"not called train, validation, test .*: val'"),
    "numbers": (lambda split: split.assign(split=range(1, 51)), "numbered folds belong in a column 'fold'"),
    "folds from 1": (lambda split: split.assign(fold=[1, 2] * 25)[[UID, "fold"]], "folds are 0 … k - 1"),
    "patients": (lambda split: split.assign(patient=["a", *"b" * 49]), r"are in several \(1\): 'b"),
}


@pytest.mark.parametrize(("change", "sentence"), OWN.values(), ids=list(OWN))
def test_an_own_split_that_breaks_a_rule_is_not_sealed(change, sentence, split, tmp_path):
    change(split).to_csv(tmp_path / "split.csv", index=False)
    with pytest.raises(ValueError, match=sentence):
        splits.adopt(tmp_path / "split.csv", random_table(50))
    assert [path.name for path in tmp_path.iterdir()] == ["split.csv"]


def test_folds_and_patients_of_ones_own_are_taken_too(split, folds, tmp_path):
    folds.to_csv(tmp_path / "folds.csv", index=False)
    assert splits.split_hash(splits.adopt(tmp_path / "folds.csv")) == splits.split_hash(folds)
    owned = split.assign(patient=split["split"] + "-1")
    owned.to_csv(tmp_path / "split.csv", index=False)
    assert splits.adopt(tmp_path / "split.csv")["patient"].nunique() == 3
    splits.write_split(owned, tmp_path / "again.csv")
    assert splits.read_split(tmp_path / "again.csv")["patient"].nunique() == 3


def test_ids_of_an_own_split_that_were_read_as_numbers_are_found_by_the_label_table(tmp_path):
    table = random_table(50).assign(**{UID: [f"1.{n}" for n in range(10, 60)]})
    split = splits.split_patients(table).replace({UID: {"1.50": "1.5"}})
    split.to_csv(tmp_path / "split.csv", index=False)
    with pytest.raises(ValueError, match=r"read as numbers on their way .*'1.5 for 1.50'"):
        splits.adopt(tmp_path / "split.csv", table)


def test_folds_beside_a_split_leave_its_test_studies_out(split):
    table = random_table(50)
    folds = splits.k_folds(table, split=split, folds=4)
    assert folds.columns.tolist() == [UID, "fold"]
    assert sorted(folds[UID]) == sorted(split[UID][split["split"] != "test"])
    assert np.ptp(folds["fold"].value_counts().reindex(range(4))) <= 2


def two_scans_each(studies=60, seed=0):
    """Labels and split of patients with one to three studies each."""
    rng = np.random.default_rng(seed)
    table = random_table(studies, seed)
    patients = pd.Series(rng.permutation(np.repeat(np.arange(studies // 2), 2)), index=table[UID])
    of_patient = dict(zip(range(studies // 2), rng.choice(splits.SPLITS, studies // 2), strict=True))
    split = pd.DataFrame({UID: table[UID], "split": table[UID].map(patients).map(of_patient)})
    return table, split.assign(patient=("p" + split[UID].map(patients).astype(str)))


def test_folds_divide_patients_where_the_split_names_them(tmp_path):
    table, split = two_scans_each(400)
    folds = splits.k_folds(table, split=split, folds=4)
    assert folds.groupby("patient")["fold"].nunique().max() == 1
    assert folds.groupby("fold")["patient"].nunique().agg(np.ptp) <= 2
    of_patient = folds.merge(table, on=UID).groupby(["fold", "patient"])[list(VERTEBRAE)].max()
    assert np.ptp(of_patient.groupby("fold").sum(), axis=0).max() <= 2
    again = splits.k_folds(table[::-1], split=split.sample(frac=1, random_state=1), folds=4)
    pd.testing.assert_frame_equal(again, folds)
    splits.write_split(folds, tmp_path / "folds.csv")
    read = splits.read_split(tmp_path / "folds.csv", column="fold")
    pd.testing.assert_frame_equal(read, folds, check_dtype=False)


def test_every_study_is_out_of_one_fold_validates_one_and_teaches_the_others(split):
    folds = splits.k_folds(random_table(50), split=split, folds=5)
    parts = pd.concat([splits.fold_split(split, folds, fold) for fold in range(5)])
    counts = pd.crosstab(parts[UID], parts["split"])
    test = counts.index.isin(split[UID][split["split"] == "test"])
    assert (counts[test]["test"] == 5).all()
    assert (counts[~test] == pd.Series({"out_of_fold": 1, "test": 0, "train": 3, "validation": 1})).all(
        axis=None
    )
    own = splits.fold_split(split, folds, 4)
    validates = own[UID][own["split"] == "validation"]
    assert set(folds.set_index(UID)["fold"][validates]) == {0}


@pytest.mark.parametrize("fold", [-1, 5, 1.5, True])
def test_a_fold_outside_their_range_is_refused(split, fold):
    folds = splits.k_folds(random_table(50), split=split)
    with pytest.raises(
        ValueError, match=rf"^Folds are numbered 0 to 4; found {fold}\. Choose one of them\.$"
    ):
        splits.fold_split(split, folds, fold)


def test_two_folds_are_too_few_to_train_on(split):
    folds = splits.k_folds(random_table(50), split=split, folds=2)
    with pytest.raises(ValueError, match=r"3 or more, .*; found 2\. Ask for 5"):
        splits.fold_split(split, folds, 0)


def test_folds_of_other_studies_than_those_outside_the_test_split_are_refused(split):
    folds = splits.k_folds(random_table(50), split=split)
    added = splits.k_folds(random_table(50))  # the test studies as well
    with pytest.raises(ValueError, match=r"missing \(0\): none; too many \(10\): '"):
        splits.fold_split(split, added, 0)
    lacking = folds.sort_values("fold", kind="stable")[1:]
    with pytest.raises(
        ValueError, match=rf"missing \(1\): '{folds[UID][folds['fold'] == 0].iloc[0]}'; too many"
    ):
        splits.fold_split(split, lacking, 0)


def test_folds_that_share_a_patient_with_each_other_or_the_test_split_are_refused():
    table, split = two_scans_each()
    folds = splits.k_folds(table, split=split)
    torn = folds["patient"][folds["patient"].duplicated()].iloc[0]
    first = folds.index[folds["patient"] == torn][0]
    moved = folds.assign(fold=folds["fold"].where(folds.index != first, (folds["fold"] + 1) % 5))
    with pytest.raises(ValueError, match=rf"All studies of a patient belong to one fold.* \(1\): '{torn}'"):
        splits.fold_split(split, moved.drop(columns="patient"), 0)
    with pytest.raises(ValueError, match=rf"belong to one fold.* \(1\): '{torn}'"):
        splits.fold_split(split.drop(columns="patient"), moved, 0)
    tested = split["patient"][split["split"] == "test"].iloc[0]
    shared = split.assign(patient=split["patient"].where(split["patient"] != torn, tested))
    with pytest.raises(ValueError, match=rf"belong to one fold.* \(1\): '{tested}'"):
        splits.fold_split(shared, folds.drop(columns="patient"), 0)
