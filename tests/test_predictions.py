import re

import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna

from cspine_helpers import predictions
from cspine_helpers.labels import PATIENT, UID, VERTEBRAE, read_labels
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
        ("probability", 1.01, r"no numbers in [0, 1] (1.01): '1.10 C2', '1.2 C2'"),
        ("probability", -0.1, r"no numbers in [0, 1] (-0.1): '1.10 C2', '1.2 C2'"),
        ("probability", np.nan, r"no numbers in [0, 1] (nan): '1.10 C2', '1.2 C2'"),
        ("probability", "high", r"no numbers in [0, 1] ('high'): '1.10 C2', '1.2 C2'"),
        ("label", 0.5, "neither 0 nor 1 (2): '1.10 C2', '1.2 C2'"),
        ("label", None, "neither 0 nor 1 (2): '1.10 C2', '1.2 C2'"),
        ("vertebra", "C8", "vertebrae are C1 … C7; found 'C8'"),
        ("vertebra", 2, "vertebrae are C1 … C7; found 2"),
        ("split", None, "name no split (2): '1.10 C2', '1.2 C2'"),
        ("split", " ", "name no split (2): '1.10 C2', '1.2 C2'"),
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
    assert "repeat a study and vertebra (1): '1.10 C1'" in text
    assert "in more than one split (1): '1.3'" in text


def test_a_wide_table_becomes_one_row_per_vertebra_in_its_order(wide, label_table):
    found = from_wide(wide, label_table, "validation")
    assert found.columns.tolist() == list(COLUMNS)
    assert found[UID].tolist() == ["1.30"] * 7 + ["1.1"] * 7 + ["1.2"] * 7
    assert found["vertebra"].tolist() == [*VERTEBRAE] * 3
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
    assert len(table) == 2018 * 7
    sample = table.sample(50, random_state=0)
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
    assert "neither 0 nor 1 (1): '1.10 C2'" in text
    assert "no numbers in [0, 1]" in text
