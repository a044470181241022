import numpy as np
import pandas as pd
import pytest

from cspine_helpers.files.tables import Column, checked, read_columns

COLUMNS = (
    Column("uid", "id"),
    Column("level", among=("C1", "C2")),
    Column("depth_mm", "number", above=0),
    Column("width_mm", "number", above=0),
    Column("slice", "whole", low=0, high=9),
    Column("share", "number", low=0, high=1, optional=True, empty=True),
    Column("hash", pattern="[0-9a-f]{4}", optional=True, empty=True, wrong="what is no hash"),
    Column("note", optional=True),
)
GOOD = pd.DataFrame(
    {
        "uid": ["1.1", "1.1", "1.2"],
        "level": ["C1", "C2", "C1"],
        "depth_mm": [1.5, 2.0, 3.0],
        "width_mm": [1, 2, 3],
        "slice": [0, 9, 4],
        "share": [0, 1.0, np.nan],
        "hash": ["12ab", None, "0000"],
        "note": ["a", "b", "c"],
    }
)


def check(table: pd.DataFrame, **options) -> pd.DataFrame:
    return checked(table, COLUMNS, what="It", **{"key": ("uid", "level")} | options)


def refused(table: pd.DataFrame, **options) -> list[str]:
    with pytest.raises(ValueError, match="It is refused") as error:
        check(table, **options)
    return str(error.value).split("\n- ")[1:]


def test_a_good_table_comes_back_in_order_and_type_without_other_columns():
    shuffled = GOOD.astype(object).assign(other=1)[["other", *reversed(GOOD.columns)]]
    shuffled["slice"] = ["0", "9.0", "4"]  # numbers as a spreadsheet's text
    found = check(shuffled.set_index(pd.Index([7, 7, 9])))
    types = {"uid": "str", "level": "str", "width_mm": float, "hash": "str", "note": "str"}
    pd.testing.assert_frame_equal(found, GOOD.astype(types))


def test_columns_may_be_lacking_only_where_they_are_optional():
    assert check(GOOD.drop(columns=["share", "hash", "note"])).columns.tolist() == GOOD.columns[:5].tolist()
    with pytest.raises(ValueError, match=r"^It lacks the column\(s\) 'level', 'slice'; found"):
        check(GOOD.drop(columns=["level", "slice"]))


def test_a_table_without_rows_passes_only_where_it_may_be_empty():
    with pytest.raises(ValueError, match="It has no rows"):
        check(GOOD[:0])
    untyped = pd.DataFrame(columns=GOOD.columns)
    assert check(untyped, may_be_empty=True).dtypes["slice"] == "int64"


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("uid", "../x", "1 StudyInstanceUID that cannot be file names: '../x'"),
        ("level", "C9", "values that are none of C1, C2 (1): '1.2 C9'"),
        ("level", None, "values that are none of C1, C2 (1): '1.2 "),
        ("depth_mm", 0, "values that are not finite numbers above 0 (1): '1.2 C1 depth_mm: 0'"),
        ("width_mm", np.inf, "values that are not finite numbers above 0 (1): '1.2 C1 width_mm: inf'"),
        ("width_mm", None, "values that are not finite numbers above 0 (1): '1.2 C1 width_mm: None'"),
        ("slice", 1.5, "values that are not whole numbers from 0 to 9 (1): '1.2 C1: 1.5'"),
        ("slice", 10, "(1): '1.2 C1: 10'"),
        ("share", -0.1, "values that are not finite numbers from 0 to 1 (1): '1.2 C1: -0.1'"),
        ("share", "half", "(1): '1.2 C1: half'"),
        ("hash", "xyz", "what is no hash (1): '1.2 C1: xyz'"),
        ("hash", "12abc", "(1): '1.2 C1: 12abc'"),
        ("note", "  ", "cells without text (1): '1.2 C1:   '"),
        ("note", None, "cells without text (1): '1.2 C1: None'"),
    ],
)
def test_a_cell_that_breaks_its_columns_rule_is_named_with_its_row(column, value, problem):
    table = GOOD.astype(object)
    table.loc[2, column] = value
    [found] = refused(table)
    assert problem in found


def test_all_problems_come_at_once_each_with_ten_offenders_and_the_count():
    table = pd.concat([GOOD[:1]] * 13).assign(depth_mm=-1, width_mm=-1)
    sizes, repeats = refused(table)
    assert sizes.startswith(
        "values that are not finite numbers above 0 (26): '1.1 C1 depth_mm: -1', '1.1 C1 "
    )
    assert sizes.count("1.1 C1") == 10
    assert sizes.endswith("and 16 more")
    assert repeats == "rows that repeat uid and level (12): '1.1 C1'"
    assert len(refused(table, unique=False)) == 1


def test_rules_about_several_columns_see_numbers_and_name_rows():
    table = GOOD.astype(object)
    table.loc[0, "depth_mm"] = "deep"

    def rules(values):
        yield "levels deeper than wide", values["depth_mm"] > values["width_mm"]
        yield "levels as deep as wide", values["depth_mm"] == values["width_mm"]
        yield "one sentence"

    assert refused(table, rules=rules) == [
        "values that are not finite numbers above 0 (1): '1.1 C1 depth_mm: deep'",
        "levels as deep as wide (2): '1.1 C2', '1.2 C1'",
        "one sentence",
    ]


@pytest.mark.parametrize("value", [1e300, 2.0**60, 1 + 2j])
def test_whole_numbers_beyond_what_floats_count_are_refused(value):
    table = pd.DataFrame({"name": ["a"], "count": [value]})
    with pytest.raises(ValueError, match="values that are not whole numbers"):
        checked(table, [Column("name"), Column("count", "whole")], what="The table", key=["name"])


def test_a_short_row_is_found_beside_commas_in_quotes(tmp_path):
    (tmp_path / "table.csv").write_text('a,b\n"1,2",3\n4\n')
    with pytest.raises(ValueError, match=r"fewer values than the header has columns \(line 3\)"):
        read_columns(tmp_path / "table.csv", what="table", source="Make it.")
