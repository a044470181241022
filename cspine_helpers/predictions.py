"""The predictions table: a row a study and vertebra, or a row an image; from our model or from anybody's."""

import hashlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pandas as pd

from cspine_helpers.files.paths import listing
from cspine_helpers.files.tables import (
    Column,
    checked,
    numbers,
    read_columns,
    refuse,
    require_columns,
    through_numbers,
    write_table,
)
from cspine_helpers.labels import PATIENT, TARGETS, UID, VERTEBRAE, read_labels
from cspine_helpers.runs import other_runs

COLUMNS = (UID, "vertebra", "split", "label", "probability")
OPTIONAL = ("patient",)  # who is resampled, where that is not the study
SINGLE = (
    "image",
    "study",
)  # units that are judged as they are: a table of one has one row an id, and no others
UNITS = (*VERTEBRAE, PATIENT, *SINGLE)  # what a row is about; the patient: by the model's own score
_OF_STUDIES = (*VERTEBRAE, PATIENT)
_TABLE = (
    Column(UID, "id"),
    Column(
        "vertebra", among=UNITS, wrong=f"vertebrae other than C1 … C7 and {PATIENT}, the model's own score"
    ),
    Column("split", wrong="rows that name no split"),
    Column("label", "whole", 0, 1, wrong="labels that are neither 0 nor 1"),
    Column("probability", "number", 0, 1, wrong="probabilities that are no numbers in [0, 1]"),
    Column("patient", optional=True, wrong="rows whose patient is empty"),
    Column("fold", "whole", 0, optional=True, empty=True, wrong="folds that are no whole numbers from 0"),
)
_UNIT_NAMES = {unit.lower(): unit for unit in _OF_STUDIES} | {unit[1]: unit for unit in VERTEBRAE}
_UNIT_NAMES |= {"overall": PATIENT}
_ROW_ID = re.compile(rf"^(.+)_(c[1-7]|{PATIENT})$", re.IGNORECASE)
_COMMA = re.compile(r"\d+,\d+")
_WHOSE = re.compile(r"(patient|subject)[ _-]*(u?id|name|number|no)?", re.IGNORECASE)
_SPLIT_NAME = re.compile(r"[^\W\d][\w -]*")


def read_predictions(path: str | Path) -> pd.DataFrame:
    """The predictions table of a file, checked by `validate_predictions`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the table breaks the schema; every offender is named.
    """
    source = f"Notebook 03 writes that of a run.{other_runs(Path(path).parent)}"
    text = (UID, "vertebra", *OPTIONAL)
    table = read_columns(path, COLUMNS, what="predictions table", source=source, text=text)
    table["vertebra"] = table["vertebra"].map(_unit_name, na_action="ignore")
    return validate_predictions(table, what=Path(path).name)


def write_predictions(table: pd.DataFrame, path: str | Path) -> None:
    """Check the predictions table and put it in place in one step, with its SHA-256 beside it.

    Tables made elsewhere need no hash.
    """
    write_table(validate_predictions(table), path, sealed=True)


def predictions_sha256(table: pd.DataFrame, *, split: str | None = None) -> str:
    """SHA-256 of the file that `write_predictions` makes of the table, or of one split of it.

    Raises:
        ValueError: the table breaks the schema.
    """
    table = validate_predictions(table)
    rows = table if split is None else table[table["split"] == split]
    text = rows.to_csv(index=False, lineterminator="\n")
    return hashlib.sha256(text.encode()).hexdigest()


def validate_predictions(table: pd.DataFrame, *, what: str = "The predictions table") -> pd.DataFrame:
    """The table in the schema's column order, where it keeps every rule.

    A study and vertebra occur once; a study has one split; labels are 0 or 1; probabilities are in [0, 1]. A
    study may lack vertebrae: its CT may not show them. A row whose vertebra is `patient_overall` is the
    model's own score of the patient; every study has one, or none has. Its label is 1 where a vertebra's is,
    and 0 where all seven are there and intact. A table of radiographs has rows of `image` only (or of `study`
    only, where several views are judged together), one for each id in the column `StudyInstanceUID`. The
    optional column `patient` names whose study it is, where
    patients have several; all of them belong to one split. The optional column `fold` says of predictions
    out of fold which one a study is in, and so which model predicts it; it is empty for all other rows.

    Raises:
        ValueError: lists all broken rules at once, each with its offenders.
    """
    found = checked(table, _TABLE, what=what, key=(UID, "vertebra"), rules=_rules)
    return found.astype({"fold": "Int64"}) if "fold" in found.columns else found


def _rules(values: pd.DataFrame) -> Iterator[str]:
    """What is wrong between rows of the predictions table."""
    folds = values["split"][values["split"].astype(str).str.fullmatch(r"\d+(\.0)?")].drop_duplicates()
    if len(folds):
        yield (
            f"splits that are numbers, as folds are ({listing(folds)}). Name the split of each row: "
            "validation may choose, test is opened once. Predictions made out of fold are all of one split"
        )
    pairs = {"studies in more than one split": (UID, "split")}
    if "patient" in values.columns:
        pairs["studies of more than one patient"] = (UID, "patient")
        pairs["patients in more than one split"] = ("patient", "split")
    if "fold" in values.columns:
        pairs["studies in more than one fold"] = (UID, "fold")
        if "patient" in values.columns:
            pairs["patients in more than one fold"] = ("patient", "fold")
    for wrong, (one, of) in pairs.items():
        each = values[[one, of]].dropna().drop_duplicates()
        torn = each[one][each[one].duplicated()].drop_duplicates()
        if len(torn):
            yield f"{wrong} ({len(torn)}): {listing(torn)}"
    units = values["vertebra"].dropna().unique().tolist()
    if len(units) > 1 and (kinds := [kind for kind in SINGLE if kind in units]):
        others = listing(unit for unit in units if unit != kinds[0])
        yield f"rows of {kinds[0]!r} beside rows of {others}. One kind makes a table"
    own = values["vertebra"] == PATIENT
    if not own.any():
        return
    without = values[UID][~values[UID].isin(values[UID][own])].drop_duplicates()
    if len(without):
        yield (
            f"studies without a {PATIENT} row, where others have one ({len(without)}): {listing(without)}. "
            "Add it, or drop the others"
        )
    found = values[own].groupby(UID)["label"].first()
    each = values[~own].groupby(UID)["label"].agg(["max", "count"]).reindex(found.index)
    odd = (found < each["max"]) | ((found > each["max"]) & (each["count"] == len(VERTEBRAE)))
    if odd.any():
        yield (
            f"studies whose {PATIENT} label is not the highest of C1 … C7 ({odd.sum()}): "
            f"{listing(odd.index[odd])}"
        )


def from_wide(
    wide: pd.DataFrame | str | Path,
    labels: pd.DataFrame | str | Path,
    split: str | pd.DataFrame,
    *,
    missing: Literal["raise", "drop"] = "raise",
) -> pd.DataFrame:
    """Predictions of any other program: a table with one row a study, or a Kaggle submission; or its file.

    A patient score in it (`patient_overall` or `Overall`) becomes the model's own (see
    `validate_predictions`). An empty cell is a vertebra that the CT does not show. Spaces around ids are
    dropped.

    Args:
        wide: `StudyInstanceUID` (or `uid`) and the probabilities C1 … C7 (or c1, or 1), perhaps
            `patient_overall` (or `Overall`) and `patient`, other columns are ignored; or `row_id, fractured`,
            row ids `<uid>_C1` … `<uid>_patient_overall`. Or the path of such a CSV file.
        labels: label table, or the path of its file.
        split: name of the split that all studies belong to, or a split table (its column `patient` counts,
            where `wide` has none; `splits.read_split` reads one).
        missing: what happens to studies that `wide`, `labels` and the split table do not all hold, and to
            fractured patients who would pass for intact, because neither their fractured vertebrae nor the
            patient has a probability; those that `drop` leaves out for that are named in a warning.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names the studies that are not in every table (unless `missing="drop"`), or whose ids
            were read as numbers; the tables have no study in common; one holds a study or a column twice; no
            vertebra has a probability; fractured patients would pass for intact (unless `missing="drop"`); or
            the table breaks the schema.

    Example:
        >>> wide = labels.assign(C1=0.4)  # probabilities of C1 … C7 in place of labels
        >>> from_wide(wide, labels, "validation").columns.tolist()
        ['StudyInstanceUID', 'vertebra', 'split', 'label', 'probability']
    """
    if missing not in ("raise", "drop"):
        raise ValueError(f"missing is 'raise' or 'drop'; found {missing!r}.")
    # 1. Files become tables, and columns get this package's names.
    if isinstance(wide, str | Path):
        wide = read_columns(wide, what="table of predictions", source="Give the path of a CSV file.")
    if {"row_id", "fractured"} <= set(wide.columns):
        wide = _wide_of_submission(wide)
    wide = _renamed(wide, what="The wide table")
    labels = (
        read_labels(labels) if isinstance(labels, str | Path) else _renamed(labels, what="The label table")
    )
    split = _split_of(split)

    # 2. What cannot be joined is refused.
    require_columns(wide, (UID, *VERTEBRAE), what="The wide table")
    refuse(_foreign_problems(wide, split), what="The wide table")
    require_columns(
        labels, (UID, *(unit for unit in _OF_STUDIES if unit in wide.columns)), what="The label table"
    )
    tables = {"the wide table": wide, "the label table": labels}
    if isinstance(split, pd.DataFrame):
        require_columns(split, (UID, "split"), what="The split")
        tables["the split"] = split
    for name, each in tables.items():
        twice = each[UID][each[UID].duplicated()].drop_duplicates()
        if len(twice):
            raise ValueError(
                f"{name.capitalize()} holds studies twice ({len(twice)}): {listing(twice)}. "
                "Keep one row each." + through_numbers(each[UID], labels[UID])
            )
    if hint := through_numbers(wide[UID], labels[UID]):
        raise ValueError(f"The wide table does not name its studies as the label table does.{hint}")
    studies = _common_studies(tables, drop=missing == "drop")
    studies -= _hidden_fractures(wide, labels, studies, drop=missing == "drop")

    # 3. One row for each study and unit that has a probability.
    rows = wide[wide[UID].isin(studies)]
    units = [unit for unit in _OF_STUDIES if unit in rows.columns]
    keys = [UID, *(name for name in OPTIONAL if name in rows.columns)]
    long = rows.melt(keys, units, "vertebra", "probability").dropna(subset="probability")
    truth = labels.melt(UID, units, "vertebra", "label")
    table = long.merge(truth, on=[UID, "vertebra"], validate="one_to_one")
    if isinstance(split, pd.DataFrame):
        known = [UID, "split", *(name for name in OPTIONAL if name in split.columns and name not in keys)]
        table = table.merge(split[known], on=UID, validate="many_to_one")
    else:
        table["split"] = split
    order = {uid: place for place, uid in enumerate(rows[UID])}
    table = table.iloc[table[UID].map(order).argsort(kind="stable")]  # studies as in `wide`, C1 … C7 in each
    return validate_predictions(table)


def _wide_of_submission(table: pd.DataFrame) -> pd.DataFrame:
    """One row a study from `row_id, fractured`, as Kaggle takes it for RSNA 2022."""
    found = table["row_id"].astype(str).str.strip().str.extract(_ROW_ID)
    if (odd := found.isna().any(axis=1)).any():
        raise ValueError(
            f"Row ids that do not end in _C1 … _C7 or _{PATIENT} ({odd.sum()}): "
            f"{listing(table['row_id'][odd])}. Write <StudyInstanceUID>_C1 and so on."
        )
    units = found[1].map(_unit_name)
    if (twice := found[[0]].assign(unit=units).duplicated()).any():
        raise ValueError(
            f"Repeated row ids ({twice.sum()}): {listing(table['row_id'][twice])}. Keep one row each."
        )
    values = pd.Series(table["fractured"].to_numpy(), index=pd.Index(found[0], name=UID))
    studies = pd.Index(values.index.unique())
    wide = {unit: values[(units == unit).to_numpy()].reindex(studies) for unit in _OF_STUDIES}
    return pd.DataFrame(wide).reset_index()


def _unit_name(name: object) -> str:
    """What a vertebra, or the patient, is called here: C1 for c1 or 1, `patient_overall` for Overall."""
    text = str(name).strip().lower()
    return _UNIT_NAMES.get(text, str(name))


def _renamed(table: pd.DataFrame, *, what: str) -> pd.DataFrame:
    """A copy with this package's column names, where it has others for the same, and no spaces around ids.

    Raises:
        ValueError: two columns mean the same.
    """
    own = {"uid": UID, UID.lower(): UID} | {name: name for name in ("split", *OPTIONAL)}
    names = {name: own.get(str(name).strip().lower(), _unit_name(name)) for name in table.columns}
    meant: dict[str, list[object]] = {}
    for name, new in names.items():
        meant.setdefault(new, []).append(name)
    if both := [listing(found) for found in meant.values() if len(found) > 1]:
        raise ValueError(
            f"{what} has columns that mean the same: {'; '.join(both)}. Which of them counts? "
            "Drop the others."
        )
    table = table.rename(columns=names)
    for name in (UID, *OPTIONAL):
        if (
            name in table.columns
            and table.columns.is_unique
            and not pd.api.types.is_numeric_dtype(table[name])
        ):
            table[name] = table[name].map(lambda text: text.strip() if isinstance(text, str) else text)
    return table


def _split_of(split: str | pd.DataFrame) -> str | pd.DataFrame:
    """The name of a split, or a split table."""
    if isinstance(split, pd.DataFrame):
        return _renamed(split, what="The split")
    if not (isinstance(split, str) and _SPLIT_NAME.fullmatch(split)):
        raise ValueError(
            f"split is the name of one, such as 'validation', or a split table; found {split!r}. Name the "
            "split, or read its file with splits.read_split."
        )
    return split


def _hidden_fractures(wide: pd.DataFrame, labels: pd.DataFrame, studies: set[str], *, drop: bool) -> set[str]:
    """Studies of fractured patients who would pass for intact: no row is left that says so.

    Raises:
        ValueError: there are some, unless they are to be dropped.
    """
    if PATIENT in wide.columns:  # its rows have the patient's label
        return set()
    truth = labels[labels[UID].isin(studies)].set_index(UID)
    fractured = truth[[name for name in TARGETS if name in truth.columns]].apply(numbers).max(axis=1) == 1
    shown = wide.set_index(UID)[list(VERTEBRAE)].notna().reindex(truth.index)
    seen = (shown & (truth[list(VERTEBRAE)].apply(numbers) == 1)).any(axis=1)
    hidden = truth.index[fractured & ~seen]
    if hidden.empty:
        return set()
    what = (
        f"Fractured patients without a probability of any fractured vertebra ({len(hidden)}): "
        f"{listing(hidden)}. Nothing in the table would say that they are fractured"
    )
    remedy = f"Add the probability of that vertebra or of the patient ({PATIENT})"
    if not drop:
        raise ValueError(f'{what}. {remedy}, or leave these studies out with missing="drop".')
    warnings.warn(f"{what}, so that they are left out. {remedy} to keep them.", stacklevel=3)
    return set(hidden)


def _foreign_problems(wide: pd.DataFrame, split: str | pd.DataFrame) -> Iterator[str]:
    """What other programs write that cannot be read, each with what to do."""
    if pd.api.types.is_numeric_dtype(wide[UID]):
        yield (
            f"study ids are numbers ({listing(wide[UID].head(3))} …), so that 1.10 has become 1.1. Read them "
            "as text: pd.read_csv(path, dtype={'uid': str})"
        )
    values = wide[[unit for unit in _OF_STUDIES if unit in wide.columns]]
    cells = set(values.astype(object).fillna("").map(str).to_numpy().ravel())
    if {cell.lower() for cell in cells} & {"true", "false"}:
        yield "values are True or False: calls, not probabilities. Write the probabilities"
    if any(map(_COMMA.fullmatch, cells)):
        yield "decimals are written with a comma. Write decimal points, or read it with decimal=','"
    if (none := values.isna().all(axis=1)).any():
        yield f"studies without any probability ({none.sum()}): {listing(wide[UID][none])}. Drop their rows"
    if values[list(VERTEBRAE)].isna().all(axis=None) and len(values):
        yield (
            "no vertebra has a probability, only the patients. This project decides about vertebrae as well: "
            f"add the columns {', '.join(VERTEBRAE)} (rows <uid>_C1 and so on)"
        )
    for of, each in {"": wide, " of the split": split}.items():
        near = [name for name in getattr(each, "columns", ()) if _WHOSE.fullmatch(str(name).strip())]
        if near and "patient" not in {*wide.columns, *getattr(split, "columns", ())}:
            yield (
                f"columns{of} that may say whose study it is: {listing(near)}. Call the one that does "
                "'patient' (studies of a patient are then kept together), or drop it"
            )
    if "patient" in wide.columns and (numbers(wide["patient"]) % 1 > 0).any():
        yield (
            f"the column 'patient' holds fractions, but names whose study it is. If it is the patient's "
            f"probability, call it {PATIENT}"
        )
    if isinstance(split, pd.DataFrame) and "split" not in split.columns:
        yield (
            "the split table has no column 'split'. Predictions made out of fold belong to one split, so "
            "pass its name, split='validation'; else name the split of each fold first"
        )


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
