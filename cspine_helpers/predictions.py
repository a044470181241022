"""The predictions table: one row per study and vertebra, from our model or from anybody's."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pandas as pd

from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.paths import listing
from cspine_helpers.tables import (
    is_binary,
    numbers,
    read_table,
    refuse,
    require_columns,
    uid_problems,
    write_table,
)

COLUMNS = (UID, "vertebra", "split", "label", "probability")


def read_predictions(path: str | Path) -> pd.DataFrame:
    """The predictions table of a file, checked by `validate_predictions`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the table breaks the schema; every offender is named.
    """
    table = read_table(
        path, COLUMNS, what="predictions table", source="Notebook 03 writes that of a run.", text=(UID,)
    )
    return validate_predictions(table, what=Path(path).name)


def write_predictions(table: pd.DataFrame, path: str | Path) -> None:
    """Check the predictions table and put it in place in one step, with its SHA-256 beside it.

    Tables made elsewhere need no hash.
    """
    write_table(validate_predictions(table), path, sealed=True)


def predictions_sha256(table: pd.DataFrame) -> str:
    """SHA-256 of the file that `write_predictions` makes of the table.

    Raises:
        ValueError: the table breaks the schema.
    """
    text = validate_predictions(table).to_csv(index=False, lineterminator="\n")
    return hashlib.sha256(text.encode()).hexdigest()


def validate_predictions(table: pd.DataFrame, *, what: str = "The predictions table") -> pd.DataFrame:
    """The table in the schema's column order, where it keeps every rule.

    A study and vertebra stand there once; a study has one split; labels are 0 or 1; probabilities lie in
    [0, 1]. A study may lack vertebrae: its CT may not show them.

    Raises:
        ValueError: lists all broken rules at once, each with its offenders.
    """
    require_columns(table, COLUMNS, what=what)
    if table.empty:
        raise ValueError(f"{what} has no rows. It needs one row for each study and vertebra.")
    refuse(_problems(table), what=what)
    types = {"label": "int64", "probability": "float64"}
    return table[list(COLUMNS)].astype(types).reset_index(drop=True)


def _problems(table: pd.DataFrame) -> Iterator[str]:
    yield from uid_problems(table[UID].drop_duplicates())
    unknown = table["vertebra"][~table["vertebra"].isin(VERTEBRAE)].drop_duplicates()
    if len(unknown):
        yield f"vertebrae are C1 … C7; found {listing(unknown)}"
    nameless = table["split"].isna() | (table["split"].astype(str).str.strip() == "")
    if nameless.any():
        yield f"rows that name no split ({nameless.sum()}): {_rows(table, nameless)}"
    twice = table.duplicated([UID, "vertebra"])
    if twice.any():
        yield f"rows that repeat a study and vertebra ({twice.sum()}): {_rows(table, twice)}"
    pairs = table[[UID, "split"]].drop_duplicates()
    torn = pairs[UID][pairs[UID].duplicated()].drop_duplicates()
    if len(torn):
        yield f"studies in more than one split ({len(torn)}): {listing(torn)}"
    odd = ~pd.Series(is_binary(table["label"]), index=table.index)
    if odd.any():
        yield f"labels that are neither 0 nor 1 ({odd.sum()}): {_rows(table, odd)}"
    outside = ~numbers(table["probability"]).between(0, 1)
    if outside.any():
        found = listing(table["probability"][outside].drop_duplicates())
        yield f"probabilities that are no numbers in [0, 1] ({found}): {_rows(table, outside)}"


def _rows(table: pd.DataFrame, mask: pd.Series) -> str:
    chosen = table[mask]
    return listing(f"{uid} {vertebra}" for uid, vertebra in zip(chosen[UID], chosen["vertebra"], strict=True))


def from_wide(
    wide: pd.DataFrame,
    labels: pd.DataFrame,
    split: str | pd.DataFrame,
    *,
    missing: Literal["raise", "drop"] = "raise",
) -> pd.DataFrame:
    """Predictions from a table with one row a study, as competitions write them.

    Args:
        wide: `StudyInstanceUID` (or `uid`) and the probabilities C1 … C7; other columns are ignored.
        labels: label table.
        split: name of the split that all studies belong to, or a split table.
        missing: what happens to studies that `wide`, `labels` and the split table do not all hold.

    Raises:
        ValueError: names the studies that are not in every table (unless `missing="drop"`), the tables
            have no study in common, or the table breaks the schema.
    """
    if missing not in ("raise", "drop"):
        raise ValueError(f"missing is 'raise' or 'drop'; found {missing!r}.")
    if UID not in wide.columns:
        wide = wide.rename(columns={"uid": UID})
    require_columns(wide, (UID, *VERTEBRAE), what="The wide table")
    tables = {"the wide table": wide, "the label table": labels}
    if isinstance(split, pd.DataFrame):
        tables["the split"] = split
    twice = wide[UID][wide[UID].duplicated()]
    if len(twice):
        raise ValueError(
            f"The wide table holds studies twice ({len(twice)}): {listing(twice)}. Keep one row each."
        )
    studies = _common_studies(tables, drop=missing == "drop")

    rows = wide[wide[UID].isin(studies)]
    long = rows.melt(UID, list(VERTEBRAE), "vertebra", "probability")
    truth = labels.melt(UID, list(VERTEBRAE), "vertebra", "label")
    table = long.merge(truth, on=[UID, "vertebra"], validate="one_to_one")
    if isinstance(split, pd.DataFrame):
        table = table.merge(split[[UID, "split"]], on=UID, validate="many_to_one")
    else:
        table["split"] = split
    order = {uid: place for place, uid in enumerate(rows[UID])}
    table = table.iloc[table[UID].map(order).argsort(kind="stable")]  # studies as in `wide`, C1 … C7 in each
    return validate_predictions(table)


def _common_studies(tables: dict[str, pd.DataFrame], *, drop: bool) -> set[str]:
    studies = {name: set(table[UID]) for name, table in tables.items()}
    common, every = set.intersection(*studies.values()), set.union(*studies.values())
    if common != every and not drop:
        gaps = [
            f"Studies that are not in {name} ({len(every - held)}): {listing(sorted(every - held, key=str))}"
            for name, held in studies.items()
            if every != held
        ]
        raise ValueError("; ".join(gaps) + '. Add them, or leave them out with missing="drop".')
    if not common:
        raise ValueError(
            f"No study in common: {', '.join(studies)} share no {UID}. Check that they are of one data set, "
            "and that UIDs were read as text."
        )
    return common
