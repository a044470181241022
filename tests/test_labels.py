import csv

import numpy as np
import pandas as pd
import pytest
from conftest import RSNA, needs_rsna
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import binomtest

from cspine_helpers import labels
from cspine_helpers.labels import PATIENT, TARGETS, UID, VERTEBRAE

# In percent. Source: Cervical Spine Fracture Detection Dataset, Copyright RSNA, 2023.
PUBLISHED = dict(zip(TARGETS, (47.6, 7.2, 14.1, 3.6, 5.3, 8.0, 13.7, 19.5), strict=True))


def make_table(patterns) -> pd.DataFrame:
    """A label table with one study for each row of seven 0/1 labels."""
    patterns = np.asarray(patterns, dtype=int).reshape(-1, 7)
    table = pd.DataFrame(patterns, columns=list(VERTEBRAE))
    table.insert(0, PATIENT, patterns.max(axis=1))
    table.insert(0, UID, [f"1.2.840.{number + 1}" for number in range(len(table))])
    return table


@pytest.fixture
def table():
    return make_table([[0] * 7, [0, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 1], [0] * 7])


def refused(table) -> str:
    with pytest.raises(ValueError, match="label table") as error:
        labels.validate_labels(table)
    return str(error.value)


def test_a_table_comes_back_from_its_file(table, tmp_path):
    labels.write_labels(table, tmp_path / "train.csv")
    pd.testing.assert_frame_equal(
        labels.read_labels(tmp_path / "train.csv"), table.astype({UID: "str"}), check_dtype=True
    )
    assert (tmp_path / "train.csv").read_bytes().count(b"\r") == 0


def test_the_file_has_the_published_header(table, tmp_path):
    labels.write_labels(table, tmp_path / "train.csv")
    header = (tmp_path / "train.csv").read_text().splitlines()[0]
    assert header == "StudyInstanceUID,patient_overall,C1,C2,C3,C4,C5,C6,C7"


def test_uids_that_look_like_numbers_stay_text(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text(f"{','.join(labels.COLUMNS)}\n1.20,0,0,0,0,0,0,0,0\n0012,0,0,0,0,0,0,0,0\n")
    assert labels.read_labels(path)[UID].tolist() == ["1.20", "0012"]


def test_columns_beyond_the_schema_and_a_byte_order_mark_do_no_harm(table, tmp_path):
    table.assign(age=60)[["age", *reversed(labels.COLUMNS)]].to_csv(
        tmp_path / "train.csv", index=False, encoding="utf-8-sig"
    )
    assert labels.read_labels(tmp_path / "train.csv").columns.tolist() == list(labels.COLUMNS)


def test_a_missing_file_is_named_as_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No label table at .*train\.csv.*`make cohort`"):
        labels.read_labels(tmp_path / "train.csv")


def test_semicolons_separate_values_as_commas_do(table, tmp_path):
    labels.write_labels(table, tmp_path / "train.csv")
    table.to_csv(tmp_path / "semicolons.csv", index=False, sep=";")
    expected = labels.read_labels(tmp_path / "train.csv")
    pd.testing.assert_frame_equal(labels.read_labels(tmp_path / "semicolons.csv"), expected)


def test_a_wrong_delimiter_is_refused_and_suspected(table, tmp_path):
    table.to_csv(tmp_path / "train.csv", index=False, sep="|")
    with pytest.raises(ValueError, match="separated by commas"):
        labels.read_labels(tmp_path / "train.csv")


@pytest.mark.parametrize("content", [b"", b'a,b\n1,2,3\n1,2\n"', b"\xff\xfe\x00"])
def test_a_file_that_is_no_table_is_refused(content, tmp_path):
    (tmp_path / "train.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.csv"):
        labels.read_labels(tmp_path / "train.csv")


def test_rows_longer_than_the_header_are_refused(table, tmp_path):
    path = tmp_path / "train.csv"
    table.to_csv(path, index=False)
    head, *rows = path.read_text().splitlines()
    path.write_text("\n".join([head, *(f"{row},0" for row in rows)]))
    with pytest.raises(ValueError, match="more values than the header"):
        labels.read_labels(path)


def test_every_missing_column_is_named(table):
    text = refused(table.drop(columns=["C3", PATIENT]))
    assert "'patient_overall', 'C3'" in text


def test_a_column_that_is_there_twice_is_refused(table, tmp_path):
    twice = table[[*labels.COLUMNS, "C2"]]
    assert "'C2'" in refused(twice)
    twice.to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(ValueError, match=r"'C2'.*twice"):
        labels.read_labels(tmp_path / "train.csv")


def test_an_empty_table_is_refused(table):
    assert "no rows" in refused(table[:0])


def test_every_duplicate_study_is_named(table):
    text = refused(pd.concat([table, table.iloc[[1, 2]]]))
    assert "rows that repeat StudyInstanceUID (2): '1.2.840.2', '1.2.840.3'" in text
    assert "1.2.840.1'" not in text


@pytest.mark.parametrize("value", [0.5, 2, -1, np.nan, None, "yes", "", float("inf"), pd.NA])
def test_values_that_are_not_0_or_1_are_named_with_study_and_column(table, value):
    table = table.astype(object)
    table.loc[0, "C4"] = value
    table.loc[3, PATIENT] = value
    text = refused(table)
    assert "neither 0 nor 1 (2)" in text
    assert "1.2.840.1 C4" in text
    assert "1.2.840.4 patient_overall" in text


def test_text_and_gaps_in_a_file_are_refused(table, tmp_path):
    rows = table.astype(object)
    rows.loc[0, "C1"], rows.loc[1, "C7"], rows.loc[2, "C3"] = "no", None, 0.5
    rows.to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(ValueError, match=r"\(3\).*840\.1 C1.*840\.2 C7.*840\.3 C3"):
        labels.read_labels(tmp_path / "train.csv")


def test_a_patient_label_that_is_not_the_maximum_is_named(table):
    table.loc[[0, 1], PATIENT] = [1, 0]
    assert "maximum of C1 … C7 (2): '1.2.840.1', '1.2.840.2'" in refused(table)


@pytest.mark.parametrize("uid", ["../../etc", "1/2", "", "x y", "1" * 65, "..", 1.2, None])
def test_uids_that_cannot_be_file_names_never_pass(table, uid):
    table = table.astype({UID: object})
    table.loc[2, UID] = uid
    assert repr(uid) in refused(table)


def test_a_uid_missing_from_a_file_is_refused(table, tmp_path):
    table.loc[1, UID] = None
    table.to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(ValueError, match="1 StudyInstanceUID that cannot be file names"):
        labels.read_labels(tmp_path / "train.csv")


def test_a_list_of_studies_to_leave_out_has_one_a_line_and_remarks(tmp_path):
    assert labels.exclusions(tmp_path) == []
    text = "\ufeff# RSNA 2022\r\n1.2.826.0.1.3680043.20574  # bad scan\r\n\r\n  PAT001\r\n# 1.2.3\r\n"
    (tmp_path / "exclude.txt").write_text(text, encoding="utf-8", newline="")
    assert labels.exclusions(tmp_path) == ["1.2.826.0.1.3680043.20574", "PAT001"]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"1.2.3, 1.2.4\n", "'1.2.3, 1.2.4'"),
        (b"../1.2\n", r"'\.\./1\.2'"),
        ("1.2\n".encode("utf-16"), "not UTF-8"),
    ],
)
def test_a_list_of_studies_that_is_none_is_refused(tmp_path, content, part):
    (tmp_path / "exclude.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^exclude\.txt.*{part}"):
        labels.exclusions(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"No list of studies at .*no\.txt"):
        labels.read_exclusions(tmp_path / "no.txt")


def test_all_broken_rules_are_listed_at_once(table):
    table = pd.concat([table, table.iloc[[0]]]).astype(object).reset_index(drop=True)
    table.loc[1, "C1"], table.loc[2, PATIENT], table.loc[3, UID] = 7, 0, "../x"
    assert refused(table).count("\n- ") == 4


@given(hnp.arrays(int, st.tuples(st.integers(1, 30), st.just(7)), elements=st.integers(0, 1)))
def test_counts_agree_with_counting_one_by_one(patterns):
    table = make_table(patterns)
    counts = labels.cooccurrence(table)
    prevalence = labels.prevalence(table).set_index("target")
    for i, first in enumerate(VERTEBRAE):
        assert prevalence.loc[first, "positives"] == sum(row[i] for row in patterns)
        for j, second in enumerate(VERTEBRAE):
            assert counts.loc[first, second] == sum(row[i] and row[j] for row in patterns)
    assert prevalence.loc[PATIENT, "positives"] == sum(any(row) for row in patterns)


@given(hnp.arrays(int, st.tuples(st.integers(1, 60), st.just(7)), elements=st.integers(0, 1)))
def test_intervals_are_those_of_scipy(patterns):
    for row in labels.prevalence(make_table(patterns)).itertuples():
        interval = binomtest(row.positives, row.total).proportion_ci(0.95, method="wilson")
        assert 0 <= row.low <= row.prevalence <= row.high <= 1
        assert (row.low, row.high) == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_an_empty_table_has_no_prevalence(table):
    with pytest.raises(ValueError, match="no rows; a prevalence needs one study"):
        labels.prevalence(table[:0])


def test_expanding_gives_each_vertebra_of_the_asked_studies_in_their_order(table):
    samples = labels.expand(table, ["1.2.840.3", "1.2.840.1"])
    assert samples.columns.tolist() == [UID, "vertebra", "label"]
    assert samples[UID].tolist() == ["1.2.840.3"] * 7 + ["1.2.840.1"] * 7
    assert samples["vertebra"].tolist() == [*VERTEBRAE, *VERTEBRAE]
    assert samples["label"].tolist() == [1, 1, 0, 0, 0, 0, 1] + [0] * 7


def test_studies_may_come_as_a_column_of_any_order_and_index(table):
    column = table[UID].iloc[[2, 0]]
    pd.testing.assert_frame_equal(labels.expand(table, column), labels.expand(table, column.tolist()))
    pd.testing.assert_frame_equal(labels.without(table, column), table.iloc[[1, 3]].reset_index(drop=True))
    assert labels.expand(table, []).empty


def test_expanding_unknown_or_repeated_studies_is_refused_by_name(table):
    with pytest.raises(ValueError, match=r"not in the table \(2\): '9.9', '8.8'"):
        labels.expand(table, ["1.2.840.1", "9.9", "8.8"])
    with pytest.raises(ValueError, match=r"more than once \(1\): '1.2.840.1'"):
        labels.expand(table, ["1.2.840.1", "1.2.840.1"])


def test_without_drops_the_named_studies_and_refuses_unknown_ones(table):
    assert labels.without(table, ["1.2.840.2", "1.2.840.4"])[UID].tolist() == ["1.2.840.1", "1.2.840.3"]
    with pytest.raises(ValueError, match=r"\(1\): '9.9'"):
        labels.without(table, ["1.2.840.2", "9.9"])


def make_boxes() -> pd.DataFrame:
    rows = [
        ("1.2", 10.5, 20.0, 30.0, 5.0, 7),
        ("1.2", 10.5, 21.0, 30.0, 5.0, 8),
        ("1.3", 0.0, 0.0, 1.0, 1.0, 0),
    ]
    return pd.DataFrame(rows, columns=list(labels.BOX_COLUMNS))


def test_boxes_come_back_from_their_file_also_when_there_are_none(tmp_path):
    for boxes in (make_boxes(), make_boxes()[:0]):
        labels.write_boxes(boxes, tmp_path / "boxes.csv")
        pd.testing.assert_frame_equal(
            labels.read_boxes(tmp_path / "boxes.csv"), boxes.astype({UID: "str"}), check_column_type=False
        )


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("width", 0),
        ("height", -1.0),
        ("x", np.nan),
        ("y", np.inf),
        ("slice_number", 1.5),
        ("slice_number", -1),
        ("x", "left"),
        (UID, "../1"),
    ],
)
def test_boxes_that_are_none_are_refused_with_their_study(column, value):
    boxes = make_boxes().astype(object)
    boxes.loc[2, column] = value
    with pytest.raises(ValueError, match=r"\.\./1" if column == UID else rf"\(1\): '1\.3.*: {value}'"):
        labels.validate_boxes(boxes)


def rewritten(path, way: str) -> bytes:
    """A table as another program writes it."""
    text = path.read_text()
    table = pd.read_csv(path, dtype={UID: str})
    numeric = table.columns[1:]
    whole = {
        "Windows": text.replace("\n", "\r\n"),
        "old Macintosh": text.replace("\n", "\r"),
        "spaces": text.replace(",", ", "),
        "empty rows": text + "\n\n" + "," * len(numeric) + "\n",
        "quotes": table.to_csv(index=False, quoting=csv.QUOTE_ALL),
        "pandas' index": table.to_csv(),
        "tabs": table.to_csv(index=False, sep="\t"),
        "other columns in another order": table.assign(reader="A, B")[
            ["reader", *table.columns[::-1]]
        ].to_csv(index=False),
        "floats": table.astype(dict.fromkeys(numeric, float)).to_csv(index=False),
    }
    if way in whole:
        return whole[way].encode()
    return text.encode({"Excel": "utf-8-sig", "Excel's Unicode": "utf-16"}[way])


WAYS = [
    "Windows",
    "old Macintosh",
    "spaces",
    "empty rows",
    "quotes",
    "pandas' index",
    "tabs",
    "floats",
    "Excel",
]
WAYS += ["other columns in another order", "Excel's Unicode"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "way"),
    [("synthetic", way) for way in WAYS]
    + [pytest.param("real", way, marks=needs_rsna) for way in ("Excel", "floats", "pandas' index")],
)
@pytest.mark.parametrize("kind", ["labels", "boxes"])
def test_tables_that_other_programs_rewrote_are_the_same_tables(table, tmp_path, source, kind, way):
    read = getattr(labels, f"read_{kind}")
    path = RSNA / {"labels": "train.csv", "boxes": "train_bounding_boxes.csv"}[kind]
    if source == "synthetic":
        path = tmp_path / "original.csv"
        (labels.write_labels if kind == "labels" else labels.write_boxes)(
            table if kind == "labels" else make_boxes(), path
        )
    again = tmp_path / "again.csv"
    again.write_bytes(rewritten(path, way))
    assert again.read_bytes() != path.read_bytes()
    pd.testing.assert_frame_equal(read(again), read(path))


@needs_rsna
def test_the_real_table_reproduces_the_published_prevalences():
    prevalence = labels.prevalence(labels.read_labels(RSNA / "train.csv"))
    found = dict(zip(prevalence["target"], (100 * prevalence["prevalence"]).round(1), strict=True))
    assert found == PUBLISHED
    assert (prevalence["total"] == 2019).all()


@needs_rsna
def test_the_real_boxes_read_and_lie_in_studies_with_fractures():
    table = labels.read_labels(RSNA / "train.csv")
    boxes = labels.read_boxes(RSNA / "train_bounding_boxes.csv")
    assert (len(boxes), boxes[UID].nunique()) == (7217, 235)
    assert table.set_index(UID).loc[boxes[UID].unique(), PATIENT].eq(1).all()
