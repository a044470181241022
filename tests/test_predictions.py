import re

import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna

from cspine_helpers import predictions
from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.files.paths import sha256_of
from cspine_helpers.labels import PATIENT, UID, VERTEBRAE, read_labels, write_labels
from cspine_helpers.predictions import COLUMNS, from_wide, validate_predictions


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    rows = [
        (uid, vertebra, split, int(rng.random() < 0.3), rng.random())
        for uid, split in (("1.10", "train"), ("1.2", "test"), ("1.3", "test"))
        for vertebra in VERTEBRAE
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


@pytest.fixture
def wide():
    probabilities = np.arange(21).reshape(3, 7) / 100
    wide = pd.DataFrame(probabilities, columns=list(VERTEBRAE))
    return wide.assign(uid=["1.30", "1.1", "1.2"], Overall=0.5)


@pytest.fixture
def label_table():
    labels = pd.DataFrame(np.eye(3, 7, dtype=int), columns=list(VERTEBRAE))
    return labels.assign(**{PATIENT: 1, UID: ["1.1", "1.2", "1.30"]})


def refused(table) -> str:
    with pytest.raises(ValueError, match="predictions table") as error:
        validate_predictions(table)
    return str(error.value)


def test_predictions_come_back_from_their_file_to_the_last_bit(table, tmp_path):
    predictions.write_predictions(table.assign(note="x"), tmp_path / "predictions.csv")
    found = predictions.read_predictions(tmp_path / "predictions.csv")
    pd.testing.assert_frame_equal(found, table, check_exact=True)
    header = (tmp_path / "predictions.csv").read_text().splitlines()[0]
    assert header == "StudyInstanceUID,vertebra,split,label,probability"


def test_a_study_may_lack_vertebrae(table):
    assert len(validate_predictions(table.drop(index=[3, 4]))) == 19


def test_a_missing_file_column_or_row_is_said_so(table, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No predictions table at .*Notebook 03"):
        predictions.read_predictions(tmp_path / "predictions.csv")
    assert "'split', 'probability'" in refused(table.drop(columns=["split", "probability"]))
    assert "no rows" in refused(table[:0])


@pytest.mark.parametrize(
    ("column", "value", "sentence"),
    [
        ("probability", 1.01, "no numbers in [0, 1] (2): '1.10 C2: 1.01', '1.2 C2: 1.01'"),
        ("probability", -0.1, "no numbers in [0, 1] (2): '1.10 C2: -0.1', '1.2 C2: -0.1'"),
        ("probability", np.nan, "no numbers in [0, 1] (2): '1.10 C2: nan', '1.2 C2: nan'"),
        ("probability", "high", "no numbers in [0, 1] (2): '1.10 C2: high', '1.2 C2: high'"),
        ("label", 0.5, "neither 0 nor 1 (2): '1.10 C2: 0.5', '1.2 C2: 0.5'"),
        ("label", None, "neither 0 nor 1 (2): '1.10 C2: None', '1.2 C2: None'"),
        (
            "vertebra",
            "C8",
            "vertebrae other than C1 … C7 and patient_overall, the model's own score (2): '1.10 C8'",
        ),
        ("vertebra", 2, "the model's own score (2): '1.10 2', '1.2 2'"),
        ("split", None, "name no split (2): '1.10 C2: None', '1.2 C2: None'"),
        ("split", " ", "name no split (2): '1.10 C2:  ', '1.2 C2:  '"),
        (UID, "../1", "cannot be file names: '../1'"),
    ],
)
def test_each_broken_rule_names_its_offenders(table, column, value, sentence):
    table = table.astype(object)
    table.loc[[1, 8], column] = value
    assert sentence in refused(table)


def test_a_repeated_vertebra_and_a_study_in_two_splits_are_named(table):
    table.loc[20, "split"] = "train"
    table.loc[1, "vertebra"] = "C1"
    text = refused(table)
    assert "repeat StudyInstanceUID and vertebra (1): '1.10 C1'" in text
    assert "in more than one split (1): '1.3'" in text


def test_a_wide_table_becomes_one_row_per_vertebra_in_its_order(wide, label_table):
    found = from_wide(wide, label_table, "validation")
    assert found.columns.tolist() == list(COLUMNS)
    own = found[found["vertebra"] == PATIENT]
    assert own[[UID, "label", "probability"]].to_numpy().tolist() == [[uid, 1, 0.5] for uid in wide["uid"]]
    assert found[UID].tolist() == ["1.30"] * 8 + ["1.1"] * 8 + ["1.2"] * 8
    assert found["vertebra"].tolist() == [*VERTEBRAE, PATIENT] * 3
    found = found[found["vertebra"] != PATIENT]
    assert found["probability"].tolist() == (np.arange(21) / 100).tolist()
    assert found["label"].to_numpy().reshape(3, 7).tolist() == np.eye(3, 7, dtype=int)[[2, 0, 1]].tolist()
    assert (found["split"] == "validation").all()


def test_a_split_table_gives_each_study_its_split(wide, label_table):
    split = pd.DataFrame({UID: ["1.1", "1.2", "1.30"], "split": ["train", "validation", "test"]})
    found = from_wide(wide.rename(columns={"uid": UID}), label_table, split)
    assert found.groupby(UID)["split"].unique().map(list).to_dict() == {
        "1.1": ["train"],
        "1.2": ["validation"],
        "1.30": ["test"],
    }


def test_studies_that_not_every_table_holds_are_named_or_dropped_when_asked(wide, label_table):
    split = pd.DataFrame({UID: ["1.1", "1.2", "1.4"], "split": "test"})
    with pytest.raises(ValueError, match='missing="drop"') as error:
        from_wide(wide[:2], label_table, split)
    assert "not in the wide table (2): '1.2', '1.4'" in str(error.value)
    assert "not in the label table (1): '1.4'" in str(error.value)
    assert "not in the split (1): '1.30'" in str(error.value)
    assert from_wide(wide, label_table, split, missing="drop")[UID].unique().tolist() == ["1.1", "1.2"]


def test_tables_without_a_common_study_are_refused(wide, label_table):
    other = pd.DataFrame({UID: ["2.1", "2.2"], "split": "test"})
    names = "the wide table, the label table, the split"
    with pytest.raises(ValueError, match=f"No study in common: {names} share no StudyInstanceUID"):
        from_wide(wide, label_table, other, missing="drop")
    with pytest.raises(ValueError, match="No study in common"):
        from_wide(wide[:0], label_table[:0], "test")


def test_a_wide_table_without_columns_or_with_a_study_twice_is_refused(wide, label_table):
    with pytest.raises(ValueError, match=r"wide table lacks .*'C7'"):
        from_wide(wide.drop(columns="C7"), label_table, "test")
    with pytest.raises(ValueError, match=r"studies twice \(1\): '1.30'"):
        from_wide(pd.concat([wide, wide[:1]]), label_table, "test")
    with pytest.raises(ValueError, match="found 'ignore'"):
        from_wide(wide, label_table, "test", missing="ignore")


@needs_rsna
def test_real_out_of_fold_predictions_are_one_call_away():
    labels = read_labels(RSNA / "train.csv")
    wide = pd.read_csv(RSNA / "oof_predictions.csv", dtype={"uid": str})
    with pytest.raises(ValueError, match=r"wide table \(1\): '1.2.826.0.1.3680043.20574'"):
        from_wide(wide, labels, "out of fold")
    table = from_wide(wide, labels, "out of fold", missing="drop")
    assert len(table) == 2018 * 8
    sample = table.sample(50, random_state=0)
    wide = wide.rename(columns={"Overall": PATIENT})
    for row in sample.itertuples(index=False):
        assert row.probability == wide.set_index("uid").loc[row.StudyInstanceUID, row.vertebra]
        assert row.label == labels.set_index(UID).loc[row.StudyInstanceUID, row.vertebra]


def test_a_table_of_ours_changed_by_hand_is_refused_and_one_made_elsewhere_needs_no_hash(table, tmp_path):
    path = tmp_path / "predictions.csv"
    predictions.write_predictions(table, path)
    path.write_text(path.read_text().replace(",test,", ",validation,"))
    with pytest.raises(ValueError, match=r"predictions\.csv is not the file that was written: its SHA-256"):
        predictions.read_predictions(path)
    (tmp_path / "predictions.csv.sha256").unlink()
    assert set(predictions.read_predictions(path)["split"]) == {"train", "validation"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "\n1.2,C1,test,",
            "\n1.2,C1,test\n1.2,C1,test,",
            "fewer values than the header has columns (line 9)",
        ),
        ("\n1.2,C1,test,", "\n1.2,C1,\u00e9,", "line 9 is not UTF-8 text"),
        ("\n1.2,", "\n1.2,x,", "Expected 5 fields in line 9, saw 6"),
        (",label,", ",label;", "more values than the header has columns"),
    ],
)
def test_a_damaged_file_is_refused_with_the_line(table, tmp_path, old, new, message):
    path = tmp_path / "predictions.csv"
    path.write_bytes(table.to_csv(index=False).replace(old, new).encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        predictions.read_predictions(path)
    assert "predictions.csv" in str(error.value)


def test_a_file_that_is_cut_off_or_holds_true_and_false_is_refused(table, tmp_path):
    path = tmp_path / "predictions.csv"
    text = table.to_csv(index=False)
    path.write_text(text[:-3])
    with pytest.raises(ValueError, match="its last line has no end: it may be cut off"):
        predictions.read_predictions(path)
    table.assign(label=table["label"] == 1).to_csv(path, index=False)
    with pytest.raises(ValueError, match="columns 'label' hold True or False"):
        predictions.read_predictions(path)


def test_a_number_too_long_for_a_float_is_refused(table):
    table = table.astype(object)
    table.loc[1, ["label", "probability"]] = 10**400
    text = refused(table)
    assert "neither 0 nor 1 (1): '1.10 C2: 1000" in text
    assert "no numbers in [0, 1]" in text


@pytest.fixture
def written(wide, label_table, tmp_path):
    """Write the wide table as other programs do, and read that file in one call."""

    def read(text, name="theirs.csv", encoding="utf-8"):
        (tmp_path / name).write_bytes(text.encode(encoding))
        return from_wide(tmp_path / name, label_table, "validation")

    return read


def wide_text(wide, **options) -> str:
    return wide.to_csv(index=False, lineterminator="\n", **options)


def submission(wide) -> pd.DataFrame:
    long = wide.rename(columns={"Overall": PATIENT}).melt("uid", var_name="unit", value_name="fractured")
    return pd.DataFrame({"row_id": long["uid"] + "_" + long["unit"], "fractured": long["fractured"]})


FORMS = {
    "as pandas writes it": wide_text,
    "tabs": lambda wide: wide_text(wide, sep="\t"),
    "semicolons and decimal points": lambda wide: wide_text(wide, sep=";"),
    "a space after each comma": lambda wide: wide_text(wide).replace(",", ", "),
    "a space after each comma of the header": lambda wide: wide_text(wide).replace(
        ",", ", ", wide.shape[1] - 1
    ),
    "empty rows of a spreadsheet": lambda wide: wide_text(wide) + "," * (wide.shape[1] - 1) + "\n,,,,,,,,\n",
    "CRLF": lambda wide: wide_text(wide).replace("\n", "\r\n"),
    "c1": lambda wide: wide_text(wide.rename(columns=str.lower)),
    "1": lambda wide: wide_text(wide.rename(columns={name: name[1] for name in VERTEBRAE})),
    "other columns": lambda wide: wide_text(wide.assign(fold=range(3), note="a; b")),
    "patient_overall": lambda wide: wide_text(wide.rename(columns={"Overall": PATIENT, "uid": UID})),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_wide_file_is_read_in_one_call_however_it_was_written(form, wide, label_table, written):
    expected = from_wide(wide, label_table, "validation")
    pd.testing.assert_frame_equal(written(FORMS[form](wide)), expected)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_are_read(encoding, wide, label_table, written):
    expected = from_wide(wide, label_table, "validation")
    pd.testing.assert_frame_equal(written(wide_text(wide), encoding=encoding), expected)


@pytest.mark.parametrize("change", [str, str.lower])
def test_a_kaggle_submission_is_read_in_one_call(change, wide, label_table, written):
    table = submission(wide)
    shuffled = table.assign(row_id=table["row_id"].map(change)).sample(frac=1, random_state=0)
    expected = from_wide(wide, label_table, "validation")
    found = written(shuffled.to_csv(index=False))
    keys = [UID, "vertebra"]
    pd.testing.assert_frame_equal(
        found.sort_values(keys, ignore_index=True), expected.sort_values(keys, ignore_index=True)
    )


def test_a_submission_with_odd_or_repeated_row_ids_is_refused_by_name(wide, label_table):
    table = submission(wide)
    odd = table.replace({"row_id": {"1.1_C1": "1.1_T1", "1.2_C2": "1.2"}})
    with pytest.raises(
        ValueError, match=r"do not end in _C1 … _C7 or _patient_overall \(2\): '1.1_T1', '1.2'"
    ):
        from_wide(odd, label_table, "validation")
    with pytest.raises(ValueError, match=r"Repeated row ids \(1\): '1.30_C1'"):
        from_wide(pd.concat([table, table[:1]]), label_table, "validation")
    with pytest.raises(ValueError, match="Repeated row ids"):
        from_wide(pd.concat([table, table[:1].replace("1.30_C1", "1.30_c1")]), label_table, "validation")


@needs_rsna
def test_a_submission_of_real_predictions_reads_like_the_wide_table(tmp_path):
    labels = read_labels(RSNA / "train.csv")
    wide = pd.read_csv(RSNA / "oof_predictions.csv", dtype=str)[["uid", *VERTEBRAE, "Overall"]]
    submission(wide).to_csv(tmp_path / "submission.csv", index=False)
    found = from_wide(tmp_path / "submission.csv", labels, "validation", missing="drop")
    expected = from_wide(RSNA / "oof_predictions.csv", labels, "validation", missing="drop")
    pd.testing.assert_frame_equal(found, expected)


def test_an_empty_cell_is_a_vertebra_that_the_ct_does_not_show(wide, label_table):
    wide.loc[0, ["C6", "C7"]] = np.nan
    found = from_wide(wide, label_table, "validation")
    assert len(found) == 22
    assert found[found[UID] == "1.30"]["vertebra"].tolist() == [*VERTEBRAE[:5], PATIENT]
    own = found[found["vertebra"] == PATIENT].set_index(UID)["label"]
    assert own["1.30"] == 1


REFUSED = {
    "no last line break": ({}, "its last line has no end: it may be cut off. If it is whole, add"),
    "calls": ({"C2": [True, False, True]}, "True or False: calls, not probabilities. Write the prob"),
    "decimal commas": ({"C2": ["0,1", "0,2", "0,3"]}, "decimals are written with a comma. Write decimal"),
    "a patient's score": ({"patient": [0.1, 0.2, 0.3]}, "holds fractions, but names whose study it is. If"),
    "own for some": ({"Overall": [0.1, None, 0.3]}, r"without a patient_overall row, .*\(1\): '1.1'. Add"),
    "nothing": (
        {name: [0.1, 0.2, None] for name in (*VERTEBRAE, "Overall")},
        r"any probability \(1\): '1.2'. Drop",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_a_sentence_that_says_what_to_do(case, wide, written):
    columns, sentence = REFUSED[case]
    text = wide_text(wide.assign(**columns))
    with pytest.raises(ValueError, match=sentence):
        written(text if columns else text[:-1])


def test_semicolons_with_decimal_commas_are_refused_with_the_call_that_reads_them(
    wide, label_table, tmp_path
):
    path = tmp_path / "theirs.csv"
    wide.to_csv(path, index=False, sep=";", decimal=",")
    with pytest.raises(ValueError, match="semicolons, and decimals by commas") as error:
        from_wide(path, label_table, "validation")
    assert "pd.read_csv(path, sep=';', decimal=',', dtype={'uid': str})" in str(error.value)
    read = pd.read_csv(path, sep=";", decimal=",", dtype={"uid": str})
    pd.testing.assert_frame_equal(
        from_wide(read, label_table, "validation"), from_wide(wide, label_table, "validation")
    )


def test_utf_16_without_its_mark_is_refused_by_name(wide, written):
    with pytest.raises(ValueError, match=r"theirs\.csv holds zero bytes, .*Save it as UTF-8"):
        written(wide_text(wide), encoding="utf-16-le")


@pytest.mark.parametrize(
    ("known", "found"),
    [("1.30", "1.3"), ("0042", "42"), ("42", "42.0"), ("1200000000000000000000000000072", "1.2e+30")],
)
def test_ids_that_were_read_as_numbers_are_found_by_the_label_table(known, found, wide, label_table):
    label_table.loc[2, UID] = known
    wide.loc[0, "uid"] = found
    for missing in ("raise", "drop"):
        with pytest.raises(ValueError, match="read as numbers on their way") as error:
            from_wide(wide, label_table, "validation", missing=missing)
        assert f"'{found} for {known}'" in str(error.value)
    with pytest.raises(ValueError, match=r"study ids are numbers .*dtype=\{'uid': str\}"):
        from_wide(wide.assign(uid=[1.3, 1.1, 1.2]), label_table, "validation")


def test_folds_are_no_splits_and_both_ways_say_what_to_do(wide, label_table, table):
    folds = pd.DataFrame({UID: wide["uid"], "fold": [1, 2, 3]})
    with pytest.raises(
        ValueError, match=r"no column 'split'. Predictions made out of fold belong to one split"
    ):
        from_wide(wide, label_table, folds)
    table["split"] = table[UID].map({"1.10": 1, "1.2": 2, "1.3": 5})
    assert "splits that are numbers, as folds are (1, 2, 5). Name the split of each row" in refused(table)


@pytest.mark.parametrize("names", [str.lower, lambda name: name[1]])
def test_c1_and_1_are_vertebrae_in_a_file_of_rows_too(names, table, tmp_path):
    table.assign(vertebra=table["vertebra"].map(names)).to_csv(tmp_path / "theirs.csv", index=False)
    pd.testing.assert_frame_equal(predictions.read_predictions(tmp_path / "theirs.csv"), table)


def with_patients(table, patients):
    own = table.groupby([UID, "split"], sort=False)[["label", "probability"]].max().reset_index()
    whole = pd.concat([table, own.assign(vertebra=PATIENT)], ignore_index=True)
    return whole.assign(patient=whole[UID].map(patients))


def test_own_scores_and_patients_come_back_from_their_file(table, tmp_path):
    whole = with_patients(table, {"1.10": "007", "1.2": "b", "1.3": "b"})
    predictions.write_predictions(whole, tmp_path / "predictions.csv")
    found = predictions.read_predictions(tmp_path / "predictions.csv")
    pd.testing.assert_frame_equal(found, whole[[*COLUMNS, "patient"]])


def test_a_patient_in_two_splits_or_nowhere_is_refused_by_name(table):
    torn = with_patients(table, {"1.10": "a", "1.2": "a", "1.3": "b"})
    assert "patients in more than one split (1): 'a'" in refused(torn)
    torn = with_patients(table, {"1.10": "a", "1.2": "b", "1.3": "c"})
    assert "patient is empty (1): '1.10 C1: nan'" in refused(
        torn.assign(patient=torn["patient"].mask(torn.index == 0))
    )
    torn.loc[0, "patient"] = "z"
    assert "studies of more than one patient (1): '1.10'" in refused(torn)


def test_an_own_score_that_only_some_have_or_that_contradicts_the_vertebrae_is_refused(table):
    whole = with_patients(table, dict.fromkeys(table[UID], "a")).drop(columns="patient")
    assert "where others have one (1): '1.3'" in refused(whole[:-1])
    whole.loc[whole.index[-1], "label"] = 1 - whole["label"].iloc[-1]
    assert "patient_overall label is not the highest of C1 … C7 (1): '1.3'" in refused(whole)


def test_a_fractured_patient_is_not_taken_for_intact_for_want_of_the_vertebras_probability(wide, label_table):
    alone = wide.drop(columns="Overall")
    alone.loc[1, "C1"] = np.nan  # of 1.1, whose only fracture it is
    what = r"without a probability of any fractured vertebra \(1\): '1.1'"
    with pytest.raises(ValueError, match=what + r'.*\(patient_overall\), or leave .* missing="drop"'):
        from_wide(alone, label_table, "validation")
    with pytest.warns(UserWarning, match=what + ".*left out"):
        found = from_wide(alone, label_table, "validation", missing="drop")
    assert found[UID].unique().tolist() == ["1.30", "1.2"]
    alone.loc[1, ["C1", "C2"]] = 0.5, np.nan  # an intact one
    assert len(from_wide(alone, label_table, "validation")) == 20
    alone.loc[1, "C1"] = np.nan
    two = label_table.assign(C4=1)  # the other fracture has a probability
    assert len(from_wide(alone, two, "validation")) == 19
    kept = from_wide(alone.assign(Overall=0.5), label_table, "validation")
    assert kept[kept[UID] == "1.1"]["label"].max() == 1


def test_a_table_of_patient_scores_alone_is_refused(wide, label_table):
    rows = submission(wide)
    rows = rows[rows["row_id"].str.endswith(PATIENT)]
    for table in (rows, wide.assign(**dict.fromkeys(VERTEBRAE, np.nan))):
        with pytest.raises(ValueError, match="no vertebra has a probability, only the patients"):
            from_wide(table, label_table, "validation")


TWINS = {
    "Overall, OVERALL": {"OVERALL": "Overall"},
    "C1, c1": {"c1": "C1"},
    "Overall, patient_overall": {PATIENT: "Overall"},
    "C2, 2": {"2": "C2"},
    "uid, UID": {"UID": "uid"},
}


@pytest.mark.parametrize("case", TWINS)
def test_two_columns_that_mean_the_same_are_refused(case, wide, label_table):
    ((new, old),) = TWINS[case].items()
    named = ", ".join(repr(name) for name in case.split(", "))
    with pytest.raises(ValueError, match=f"The wide table has columns that mean the same: {named}. Which"):
        from_wide(wide.assign(**{new: wide[old]}), label_table, "validation")


def test_labels_are_read_from_files_and_columns_under_other_names(wide, label_table, tmp_path):
    split = pd.DataFrame({UID: ["1.1", "1.2", "1.30"], "split": ["train", "validation", "test"]})
    expected = from_wide(wide, label_table, split)
    write_labels(label_table, tmp_path / "train.csv")
    other = split.rename(columns={UID: "uid", "split": "Split"})
    for labels in (
        tmp_path / "train.csv",
        str(tmp_path / "train.csv"),
        label_table.rename(columns={UID: "uid"}),
    ):
        pd.testing.assert_frame_equal(from_wide(wide, labels, other), expected)
    with pytest.raises(FileNotFoundError, match="trian"):
        from_wide(wide, str(tmp_path / "trian.csv"), split)


@pytest.mark.parametrize("name", ["", "data/split", "split.csv", "3", None, 1])
def test_what_is_no_name_of_a_split_is_refused(name, wide, label_table):
    with pytest.raises(ValueError, match=r"such as 'validation'.*read its file with splits"):
        from_wide(wide, label_table, name)


def test_a_study_twice_in_the_split_or_the_labels_and_labels_without_the_patient_are_refused(
    wide, label_table
):
    split = pd.DataFrame({UID: ["1.1", "1.2", "1.30", "1.2"], "split": "test"})
    with pytest.raises(ValueError, match=r"The split holds studies twice \(1\): '1.2'. Keep one row each"):
        from_wide(wide, label_table, split)
    with pytest.raises(ValueError, match=r"The label table holds studies twice \(1\): '1.1'"):
        from_wide(wide, pd.concat([label_table, label_table[:1]]), "test")
    with pytest.raises(ValueError, match=r"The label table lacks the column\(s\) 'patient_overall'"):
        from_wide(wide, label_table.drop(columns=PATIENT), "test")


@pytest.mark.parametrize("name", ["PatientID", "patient_id", "Subject"])
def test_a_column_that_may_say_whose_study_it_is_is_named(name, wide, label_table):
    whose = ["a", "b", "a"]
    expected = from_wide(wide.assign(patient=whose), label_table, "test")
    pd.testing.assert_frame_equal(
        from_wide(wide.assign(**{" Patient": whose}), label_table, "test"), expected
    )
    with pytest.raises(ValueError, match=f"columns that may say whose study it is: '{name}'. Call"):
        from_wide(wide.assign(**{name: whose}), label_table, "test")
    split = pd.DataFrame({UID: wide["uid"], "split": "test", name: whose})
    with pytest.raises(ValueError, match=f"columns of the split that may say .*: '{name}'. Call"):
        from_wide(wide, label_table, split)
    assert list(from_wide(wide.assign(patient=whose, **{name: 1}), label_table, "test")["patient"]) == list(
        expected["patient"]
    )


def test_spaces_around_ids_are_left_out(wide, label_table, written):
    expected = from_wide(wide, label_table, "validation")
    spaced = wide.assign(uid=" " + wide["uid"] + " ")
    pd.testing.assert_frame_equal(written(wide_text(spaced).replace(",", " ,")), expected)
    pd.testing.assert_frame_equal(
        from_wide(wide, label_table.assign(**{UID: label_table[UID] + " "}), "validation"), expected
    )
    rows = submission(wide).assign(row_id=lambda table: " " + table["row_id"] + " ")
    found = from_wide(rows, label_table, "validation")
    pd.testing.assert_frame_equal(found, expected)


def test_folds_come_back_from_their_file_and_are_empty_where_there_is_none(table, tmp_path):
    out_of_fold = table.assign(fold=table["split"].map({"test": 3}).astype("Int64"))
    predictions.write_predictions(out_of_fold, tmp_path / "predictions.csv")
    assert set(pd.read_csv(tmp_path / "predictions.csv", dtype=str)["fold"].fillna("")) == {"3", ""}
    found = predictions.read_predictions(tmp_path / "predictions.csv")
    pd.testing.assert_frame_equal(found, out_of_fold)
    assert predictions.predictions_sha256(found) == sha256_of(tmp_path / "predictions.csv")
    assert Cases.of(found, split="test").table().equals(Cases.of(table, split="test").table())


def test_folds_that_are_no_numbers_or_share_a_study_or_a_patient_are_refused_by_name(table):
    whole = with_patients(table, {"1.10": "a", "1.2": "a", "1.3": "b"}).assign(split="test")
    assert "whole numbers from 0 (1): '1.10 C1: 0.5'" in refused(
        whole.assign(fold=[0.5, *[0] * (len(whole) - 1)])
    )
    assert "studies in more than one fold (3): '1.10', '1.2', '1.3'" in refused(
        whole.assign(fold=range(len(whole)))
    )
    assert "patients in more than one fold (1): 'a'" in refused(
        whole.assign(fold=whole[UID].map({"1.10": 0, "1.2": 1, "1.3": 1}))
    )
