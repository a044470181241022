"""The label table and the fracture boxes, in the schema of RSNA 2022: read, check, count, expand."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cspine_helpers.files.paths import check_uids, cohort_remedy, listing
from cspine_helpers.files.tables import Column, checked, read_columns, write_table

UID = "StudyInstanceUID"
PATIENT = "patient_overall"
VERTEBRAE = ("C1", "C2", "C3", "C4", "C5", "C6", "C7")
TARGETS = (PATIENT, *VERTEBRAE)
COLUMNS = (UID, *TARGETS)
BOX_COLUMNS = (UID, "x", "y", "width", "height", "slice_number")
_BINARY = "labels that are neither 0 nor 1"
_LABELS = (Column(UID, "id"), *(Column(name, "whole", among=(0, 1), wrong=_BINARY) for name in TARGETS))
_BOXES = (
    Column(UID, "id"),
    *(Column(name, "number") for name in ("x", "y")),
    *(Column(name, "number", above=0) for name in ("width", "height")),
    Column("slice_number", "whole", low=0),
)


def read_labels(path: str | Path) -> pd.DataFrame:
    """The label table of a file, checked by `validate_labels`; columns beyond the schema are dropped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the table breaks the schema; every offender is named.

    Example:
        >>> read_labels(cohort_folder / "train.csv").shape
        (6, 9)
    """
    source = cohort_remedy(Path(path).parent)
    table = read_columns(path, what="label table", source=source, text=(UID,))
    return validate_labels(table, what=Path(path).name)


def validate_labels(table: pd.DataFrame, *, what: str = "The label table") -> pd.DataFrame:
    """The table in the schema's column order with integer labels, where it keeps every rule.

    One row a study; labels are 0 or 1; `patient_overall` is the maximum of C1 … C7; UIDs can be file names.

    Raises:
        ValueError: lists all violated rules at once, each with its offenders.

    Example:
        >>> validate_labels(labels)["C1"].dtype.name
        'int64'
    """
    return checked(table, _LABELS, what=what, key=(UID,), rules=_patient_rule)


def _patient_rule(values: pd.DataFrame) -> Iterator[tuple[str, pd.Series]]:
    """The patient's label, in studies without another fault, is the highest of the vertebrae's."""
    highest = values[list(VERTEBRAE)].max(axis=1)
    whole = values[list(TARGETS)].notna().all(axis=1)
    yield f"studies whose {PATIENT} is not the maximum of C1 … C7", whole & (values[PATIENT] != highest)


def write_labels(table: pd.DataFrame, path: str | Path) -> None:
    """Check the label table and put it in place in one step."""
    write_table(validate_labels(table), path)


def read_boxes(path: str | Path) -> pd.DataFrame:
    """Fracture boxes of a file: one row a box, x, y, width, height in pixels of axial slice `slice_number`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the table breaks the schema; every offender is named.

    Example:
        >>> write_boxes(pd.DataFrame([["1.2", 3, 4, 5, 6, 7]], columns=BOX_COLUMNS), "boxes.csv")
        >>> read_boxes("boxes.csv")["width"].tolist()
        [5.0]
    """
    source = cohort_remedy(Path(path).parent)
    boxes = read_columns(path, what="table of boxes", source=source, text=(UID,))
    return validate_boxes(boxes, what=Path(path).name)


def validate_boxes(table: pd.DataFrame, *, what: str = "The table of boxes") -> pd.DataFrame:
    """The boxes in the schema's order; sizes are positive, slice numbers whole and not negative.

    Raises:
        ValueError: lists all violated rules at once, each with its offenders.
    """
    return checked(table, _BOXES, what=what, key=(UID,), unique=False, may_be_empty=True)


def write_boxes(table: pd.DataFrame, path: str | Path) -> None:
    """Check the table of boxes and put it in place in one step."""
    write_table(validate_boxes(table), path)


def without(table: pd.DataFrame, studies: Iterable[str]) -> pd.DataFrame:
    """The table without the rows of these studies, for scans known to be bad.

    Raises:
        ValueError: names the studies that the table does not hold.

    Example:
        >>> without(labels, labels["StudyInstanceUID"][:3]).shape
        (397, 9)
    """
    return table[~table[UID].isin(_known(table, studies))].reset_index(drop=True)


def exclusions(folder: str | Path) -> list[str]:
    """Studies of the cohort's `exclude.txt`; none where there is no such file.

    Example:
        >>> exclusions(cohort_folder)
        []
    """
    path = Path(folder) / "exclude.txt"
    return read_exclusions(path) if path.is_file() else []


def read_exclusions(path: str | Path) -> list[str]:
    """Studies to exclude: one id a line; what follows `#` is a remark.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text, or holds what is no id.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No list of studies at {path}. It has one StudyInstanceUID a line.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        found = [uid for line in lines if (uid := line.partition("#")[0].strip())]
        check_uids(found)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text. Save it in that encoding.") from error
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    return found


def _known(table: pd.DataFrame, studies: Iterable[str]) -> list[str]:
    """These studies, where the table holds each of them."""
    # lists and sets: of millions of strings, pandas' own loop and look-up take three times as long
    asked = studies.tolist() if isinstance(studies, pd.Series) else list(studies)
    held = set(table[UID].tolist())
    unknown = [uid for uid in asked if uid not in held]
    if unknown:
        raise ValueError(
            f"Studies that are not in the table ({len(unknown)}): {listing(unknown)}. "
            "Check their UIDs, or drop them."
        )
    return asked


def prevalence(table: pd.DataFrame) -> pd.DataFrame:
    """How common each target is: target, positives, total, prevalence, and its 95 % Wilson interval.

    Source: Wilson, J Am Stat Assoc 22 (1927) 209-212. Unlike p ± 2 standard errors it stays in [0, 1]
    and keeps its coverage for rare targets.

    Raises:
        ValueError: the table has no rows.

    Example:
        >>> prevalence(labels)["target"].tolist()[:2]
        ['patient_overall', 'C1']
    """
    if table.empty:
        raise ValueError("The label table has no rows; a prevalence needs one study or more.")
    from scipy.stats import binomtest  # here alone: labels are read where no interval is asked for

    positives, total = table[list(TARGETS)].to_numpy().sum(axis=0), len(table)
    low, high = np.transpose([binomtest(int(n), total).proportion_ci(method="wilson") for n in positives])
    return pd.DataFrame(
        {
            "target": TARGETS,
            "positives": positives,
            "total": total,
            "prevalence": positives / total,
            "low": low,
            "high": high,
        }
    )


def cooccurrence(table: pd.DataFrame) -> pd.DataFrame:
    """Studies in which both vertebrae are fractured, 7 × 7; the diagonal counts each one's fractures.

    Example:
        >>> cooccurrence(labels).shape
        (7, 7)
    """
    labels = table[list(VERTEBRAE)].to_numpy()
    return pd.DataFrame(labels.T @ labels, index=list(VERTEBRAE), columns=list(VERTEBRAE))


def expand(table: pd.DataFrame, studies: Sequence[str]) -> pd.DataFrame:
    """One row per study and vertebra: StudyInstanceUID, vertebra, label; in the order of `studies`, C1 first.

    Pass the studies of one split. Expanding everything and splitting the rows afterwards would put the
    vertebrae of one patient on both sides.

    Raises:
        ValueError: names studies that are unknown, or asked for twice.

    Example:
        >>> expand(labels, labels["StudyInstanceUID"][:2])["vertebra"].tolist()[:3]
        ['C1', 'C2', 'C3']
    """
    asked = _known(table, studies)
    if len(set(asked)) < len(asked):
        twice = [uid for uid, times in Counter(asked).items() if times > 1]
        raise ValueError(
            f"The list of studies has some more than once ({len(twice)}): {listing(twice)}. Name each once."
        )
    labels = table.set_index(UID)[list(VERTEBRAE)].loc[asked].to_numpy(dtype="int64")  # (N, 7)
    names = pd.array(VERTEBRAE, dtype="str")
    samples = {
        UID: pd.array(asked, dtype="str").repeat(len(names)),
        "vertebra": names.take(np.tile(np.arange(len(names)), len(asked))),
        "label": labels.ravel(),  # (N·7,)
    }
    return pd.DataFrame(samples)


SPLITS = ("train", "validation", "test")
