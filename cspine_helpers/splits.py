"""Patients into train, validation and test: stratified (`stratify`), checked, written with their hash."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from cspine_helpers.files.paths import listing, seal_of
from cspine_helpers.files.records import (
    Check,
    check_settings,
    config_of,
    parse_json,
    read_sealed,
    setting,
    whole,
    write_sealed,
)
from cspine_helpers.files.tables import (
    Column,
    checked,
    read_columns,
    seal_table,
    through_numbers,
    write_table,
)
from cspine_helpers.labels import SPLITS, TARGETS, UID, VERTEBRAE, prevalence, validate_labels

_CALLED = f"splits not called {', '.join(SPLITS)} (numbered folds belong in a column 'fold')"
_COLUMNS = {
    "split": Column("split", among=SPLITS, wrong=_CALLED),
    "fold": Column("fold", "whole", low=0),
}
_PATIENT = Column("patient", optional=True)  # whose study it is, where patients have several
FOLDS = "folds.csv"  # in the folder of a run that is trained in folds
OUT_OF_FOLD = "out_of_fold"  # in the split of a fold, the studies of that fold, see `fold_split`
_ADOPT = "If it is yours and whole, take it with splits.adopt(path, table)"


def _are_shares(value: Any) -> bool:
    try:
        shares = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        return False
    return shares.shape == (len(SPLITS),) and bool((shares > 0).all()) and bool(np.isclose(shares.sum(), 1))


@dataclass(frozen=True)
class SplitConfig:
    """How the patients of a cohort are divided, see `split_patients`.

    Attributes:
        fractions: shares of train, validation and test.
        seed: decides which of the studies with the same labels go where.
    """

    fractions: Sequence[float] = setting(
        (0.6, 0.2, 0.2), Check("three shares above 0 with the sum 1", _are_shares)
    )
    seed: int = setting(0, whole(0))

    def __post_init__(self) -> None:
        check_settings(self)
        object.__setattr__(self, "fractions", tuple(self.fractions))  # a list in JSON


def split_config(path: str | Path | None) -> SplitConfig:
    """What a settings file says of the split (see `training.settings`); without one, the defaults.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON of names and values, or its "split" has unknown or wrong settings.

    Example:
        >>> split_config(None).fractions
        (0.6, 0.2, 0.2)
    """
    if path is None:
        return SplitConfig()
    if not Path(path).is_file():
        raise FileNotFoundError(f"No settings at {path}. Name another file, or none.")
    found = parse_json(Path(path).read_bytes(), str(path))
    section = found.get("split") if isinstance(found, dict) else found
    return config_of(SplitConfig, {} if section is None else section, what=f"{path}: split")


def split_patients(
    table: pd.DataFrame, *, fractions: Sequence[float] = (0.6, 0.2, 0.2), seed: int = 0
) -> pd.DataFrame:
    """Each study's split, stratified by its labels: StudyInstanceUID, split; sorted by UID.

    The order of the table's rows does not matter; the same studies and seed give the same split.

    Args:
        table: label table.
        fractions: shares of train, validation and test; all above 0, their sum is 1.
        seed: decides which of the studies with the same labels go where.

    Raises:
        ValueError: the fractions are no shares, the seed is below 0 or not whole, or a split would stay
            empty.

    Example:
        >>> split_patients(labels)["split"].value_counts().tolist()
        [241, 80, 79]
    """
    shares = np.asarray(fractions, dtype=float)
    if not _are_shares(fractions):
        raise ValueError(
            f"fractions are three shares above 0 with the sum 1, for {listing(SPLITS)}; found {fractions}."
        )
    return _assign(table, shares, np.array(SPLITS, dtype=object), seed, "split")


def k_folds(
    table: pd.DataFrame, *, folds: int = 5, seed: int = 0, split: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Each study's fold 0 … folds - 1, stratified as in `split_patients`: StudyInstanceUID, fold.

    Args:
        table: label table.
        folds: how many, of equal size.
        seed: decides which of the studies with the same labels go where.
        split: split table of these studies. Its test studies are in no fold; its column `patient`, where
            there is one, is kept, and patients are then divided, by their fractures in any study.

    Raises:
        ValueError: there are fewer than two folds, fewer studies than folds, or the seed is below 0 or not
            whole; the split is of other studies, see `validate_split`.

    Example:
        >>> k_folds(labels, folds=4)["fold"].nunique()
        4
        >>> len(k_folds(labels, split=split_patients(labels)))
        321
    """
    if folds < 2:
        raise ValueError(f"folds is 2 or more; found {folds}.")
    parts = (np.full(folds, 1 / folds), np.arange(folds), seed, "fold")
    if split is None:
        return _assign(table, *parts)
    split = validate_split(split, table=validate_labels(table))
    divided = split[split["split"] != "test"]
    if "patient" not in split.columns:
        return _assign(table[table[UID].isin(divided[UID])], *parts)
    labelled = divided.merge(table, on=UID, validate="one_to_one")
    of_patient = labelled.groupby("patient", as_index=False)[list(TARGETS)].max()
    places = _assign(of_patient.assign(**{UID: [f"{n:09}" for n in range(len(of_patient))]}), *parts)
    found = dict(zip(of_patient["patient"], places["fold"], strict=True))  # both in the order of patients
    studies = divided[[UID, "patient"]].sort_values(UID, kind="stable").reset_index(drop=True)
    return studies.assign(fold=studies["patient"].map(found))[[UID, "fold", "patient"]]


def fold_split(split: pd.DataFrame, folds: pd.DataFrame, fold: int) -> pd.DataFrame:
    """The split that one fold's model is trained by: StudyInstanceUID, split.

    The studies of the fold are its `OUT_OF_FOLD`: no part of its training sees them. Those of the next fold
    (of fold 0 after the last) are its validation split, which chooses the epoch, and all others are its
    training split. Were the best epoch chosen on the fold itself, the predictions out of fold would be those
    of the luckiest epoch. So each study is predicted once and validates once, and a model of K folds learns
    from K - 2: more folds, more training studies. Test studies stay test studies.

    Args:
        split: of the cohort; only its test studies, and its column `patient`, matter.
        folds: of all its other studies, see `k_folds`.
        fold: number from 0.

    Raises:
        ValueError: there is no such fold, or fewer than three; the folds are of other studies than those
            outside the test split (named), or a patient is in two folds, or in one and in the test split.

    Example:
        >>> split = split_patients(labels)
        >>> fold_split(split, k_folds(labels, split=split), 0)["split"].value_counts().to_dict()
        {'train': 192, 'test': 79, 'out_of_fold': 65, 'validation': 64}
    """
    folds = validate_split(folds)
    count = folds["fold"].nunique()
    if count < 3:
        raise ValueError(
            f"Folds to train on are 3 or more, one to predict, one to choose the epoch, the others to learn "
            f"from; found {count}. Ask for 5."
        )
    if isinstance(fold, bool) or fold not in range(count):
        raise ValueError(f"Folds are numbered 0 to {count - 1}; found {fold}. Choose one of them.")
    test, others = (split[(split["split"] == "test") == wanted] for wanted in (True, False))
    gone = others[UID][~others[UID].isin(folds[UID])]
    added = folds[UID][~folds[UID].isin(others[UID])]
    if len(gone) or len(added):
        raise ValueError(
            "Folds hold exactly the studies outside the test split; "
            f"missing ({len(gone)}): {listing(gone) or 'none'}; too many ({len(added)}): "
            f"{listing(added) or 'none'}. Make them again with k_folds(labels, split=split)."
        )
    names = {fold: OUT_OF_FOLD, (fold + 1) % count: "validation"}
    parts = folds["fold"].map(names).fillna("train")
    named = pd.concat([folds.assign(split=parts), test.assign(split="test")], ignore_index=True)
    if "patient" in split.columns:  # what the cohort says of its patients counts
        named["patient"] = named[UID].map(split.set_index(UID)["patient"])
        check_leakage(pd.concat([folds, test.assign(fold=-1)])[[UID, "fold"]].merge(split[[UID, "patient"]]))
    columns = [UID, "split", *(["patient"] if "patient" in named.columns else [])]
    return named[columns].sort_values(UID, kind="stable").reset_index(drop=True)


def _assign(
    table: pd.DataFrame, shares: np.ndarray, names: np.ndarray, seed: int, column: str
) -> pd.DataFrame:
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed is a whole number from 0; found {seed!r}.")
    checked = validate_labels(table)
    # checked UIDs are ASCII: as bytes they sort like text, in a third of the time
    by_uid = np.argsort(checked[UID].to_numpy(dtype="S"), kind="stable")
    ordered = checked.iloc[by_uid].reset_index(drop=True)
    labels = ordered[list(VERTEBRAE)].to_numpy()
    counted = np.column_stack([np.ones(len(labels), dtype=int), labels.max(axis=1), labels])  # (N, 9)
    parts = stratify(counted, shares, np.random.default_rng(seed))
    empty = [str(names[part]) for part in range(len(shares)) if not (parts == part).any()]
    if empty:
        raise ValueError(
            f"{len(ordered)} studies are too few: nothing is left for {column} {listing(empty)}. "
            "Add studies, or ask for fewer or larger parts."
        )
    return pd.DataFrame({UID: ordered[UID], column: names[parts]})


def stratify(counted: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Part of each patient (N,), so that every column's sum is divided by `shares`, as nearly as it can be.

    Patients who count alike are shuffled and dealt out by `shares`, whole numbers only. What is left of each
    kind (fewer than K patients of it) goes one by one, rarest first, to the part where it best closes the
    gaps of all columns. Then pairs of these change places as long as that closes gaps.

    Args:
        counted: whole numbers from 0 `(N, F)`: how much a patient adds to each of what is balanced, as
            studies, patients with a fracture, fractures of each vertebra.
        shares: of the parts `(K,)`; their sum is 1.
        rng: decides which of the patients who count alike go where.

    Source: the idea of iterative stratification (Sechidis et al., ECML PKDD 2011). The library
    `iterative-stratification` balances fractures but not patients: it left patient prevalence up to 4.8
    percentage points apart on RSNA 2022, where this leaves 0.3 at most for any target; and its loop over
    all studies takes 40 times as long.
    """
    shuffled = rng.permutation(len(counted))
    by_kind = np.lexsort(counted[shuffled].T)
    order = shuffled[by_kind]
    new_kind = (np.diff(counted[order], axis=0) != 0).any(axis=1)
    starts = np.concatenate([[0], np.flatnonzero(new_kind) + 1])
    ends = np.append(starts[1:], len(order))

    total = counted.sum(axis=0)
    wanted = shares[:, None] * np.maximum(total, 1)  # (K, F)
    held = np.zeros_like(wanted)
    parts = np.empty(len(counted), dtype=int)
    remaining = []
    for start, end in zip(starts, ends, strict=True):
        quota = np.floor(shares * (end - start) + 1e-9).astype(int)
        dealt = start + quota.sum()
        parts[order[start:dealt]] = np.repeat(np.arange(len(shares)), quota)
        held += quota[:, None] * counted[order[start]]
        remaining.append(order[dealt:end])
    left = np.concatenate(remaining)
    rarity = (counted[left] / np.maximum(total, 1)).sum(axis=1)
    left = left[np.argsort(-rarity, kind="stable")]
    for patient in left:
        # growth of Σ (held - wanted)² / wanted when the patient joins each part
        growth = ((2 * (held - wanted) + counted[patient]) / wanted) @ counted[patient]
        parts[patient] = rng.choice(np.flatnonzero(np.isclose(growth, growth.min())))
        held[parts[patient]] += counted[patient]
    _swap(parts, left, counted, (held - wanted) / shares[:, None], shares)
    return parts


def _swap(
    parts: np.ndarray, left: np.ndarray, counted: np.ndarray, gaps: np.ndarray, shares: np.ndarray
) -> None:
    """Exchange pairs of the studies in `left` while that lessens Σ gaps², `gaps` (K, 9) being per share."""
    before = np.inf
    while (gaps**2).sum() < before - 1e-9:
        before = (gaps**2).sum()
        for study in left:
            here, there = parts[study], parts[left]
            step = counted[left] - counted[study]  # (L, 9) what `here` gains
            new_here = gaps[here] + step / shares[here]
            new_there = gaps[there] - step / shares[there, None]
            change = (new_here**2 - gaps[here] ** 2 + new_there**2 - gaps[there] ** 2).sum(axis=1)
            best = np.where(there == here, 0, change).argmin()
            if there[best] != here and change[best] < -1e-9:
                gaps[here], gaps[there[best]] = new_here[best], new_there[best]
                parts[study], parts[left[best]] = there[best], here


def split_prevalence(table: pd.DataFrame, split: pd.DataFrame) -> pd.DataFrame:
    """`labels.prevalence` of every split, one below the other, with the column `split` in front.

    Example:
        >>> split_prevalence(labels, split_patients(labels)).shape
        (24, 7)
    """
    parts = {name: prevalence(table[table[UID].isin(studies_of(split, name))]) for name in SPLITS}
    return pd.concat(parts, names=["split"]).reset_index(level=0).reset_index(drop=True)


def largest_gap(table: pd.DataFrame, split: pd.DataFrame) -> float:
    """Largest difference between two splits in the prevalence of any target (0 … 1).

    Example:
        >>> largest_gap(labels, split_patients(labels)) < 0.05
        True
    """
    by_target = split_prevalence(table, split).groupby("target")["prevalence"]
    return float((by_target.max() - by_target.min()).max())


def _column(split: pd.DataFrame) -> str:
    """Where the table says which part a study belongs to: `split`, or `fold` in a table of folds."""
    for column in ("split", "fold"):
        if column in split.columns:
            return column
    raise ValueError(f"A split has the column 'split' or 'fold'; found {listing(split.columns)}.")


def check_leakage(split: pd.DataFrame) -> None:
    """Refuse a split (or folds) in which a study is in two splits (folds), or twice in one.

    So is a patient, where a column `patient` says whose study it is.

    Raises:
        ValueError: names the first ten such studies, or patients.

    Example:
        >>> check_leakage(split_patients(labels))
    """
    column = _column(split)
    if "patient" in split.columns:
        pairs = split[["patient", column]].dropna().drop_duplicates()
        if len(torn := pairs["patient"][pairs["patient"].duplicated()].drop_duplicates()):
            raise ValueError(
                f"All studies of a patient belong to one {column}; these patients are in several "
                f"({len(torn)}): {listing(torn)}. Put their studies together."
            )
    twice = split[UID].duplicated(keep=False)
    if not twice.any():
        return
    places = split[twice].astype({column: str}).groupby(UID, dropna=False)[column].agg(", ".join)
    named = listing(f"{uid} ({where})" for uid, where in places.items())
    raise ValueError(
        f"A study belongs to one {column}, once; these do not ({len(places)}): {named}. "
        f"Make the {'split' if column == 'split' else 'folds'} again with notebook 02."
    )


def studies_of(split: pd.DataFrame, name: str | int) -> list[str]:
    """UIDs of the studies in the split of this name (or in this fold), in the table's order.

    Raises:
        ValueError: the split has no such name, or none of its studies.

    Example:
        >>> len(studies_of(split_patients(labels), "test"))
        79
    """
    column = _column(split)
    chosen = split[UID][split[column] == name].tolist()
    if not chosen:
        found = listing(sorted(split[column].unique()))
        raise ValueError(f"The split holds no studies of {name!r}; found {found}.")
    return chosen


def split_hash(split: pd.DataFrame) -> str:
    """SHA-256 of which study is where, whatever the order of rows and whoever the patients are.

    Without a column `patient`, that of the file `write_split` writes.

    Example:
        >>> split_hash(split_patients(labels)) == split_hash(split_patients(labels[::-1]))
        True
    """
    rows = split[[UID, _column(split)]].sort_values(UID, kind="stable")
    return hashlib.sha256(rows.to_csv(index=False, lineterminator="\n").encode()).hexdigest()


def validate_split(split: pd.DataFrame, *, table: pd.DataFrame | None = None) -> pd.DataFrame:
    """The split, refused for bad UIDs, unknown names, leaks, and (given labels) other studies than theirs.

    Splits are called train, validation and test; folds are numbered from 0, without a gap.

    Raises:
        ValueError: names every offender.
    """
    check_leakage(split)
    column = _column(split)

    def rules(values: pd.DataFrame) -> Iterator[str]:
        if column == "fold":
            found = split["fold"].unique()
            gaps = sorted(values["fold"].unique()) != list(range(len(found)))
            if gaps or len(found) < 2 or found.dtype == bool:
                yield f"folds are 0 … k - 1, two or more, without a gap; found {listing(found)}"
        if table is None:
            return
        for name, here, there in (("label table", split, table), ("split", table, split)):
            gone = here[UID][~here[UID].isin(there[UID])]
            if len(gone):
                hint = through_numbers(gone, table[UID]) if name == "label table" else ""
                yield f"studies that are not in the {name} ({len(gone)}): {listing(gone)}{hint}"

    columns = (Column(UID, "id"), _COLUMNS[column], _PATIENT)
    return checked(split, columns, what="The split", key=(UID,), rules=rules)


def write_split(
    split: pd.DataFrame,
    path: str | Path,
    *,
    replace: bool = False,
    made_with: Mapping[str, Any] | None = None,
) -> None:
    """Check the split (or folds) and write it, with its SHA-256 beside it as `sha256sum --check` reads it.

    A split that is there already is not written over unasked: runs were trained on it, or somebody made it by
    hand.

    Args:
        split: split table, or table of folds.
        path: `data/<cohort>/split.csv` as a rule.
        replace: put it in the place of another one.
        made_with: settings of `split_patients`, noted in `split.json` beside it for the records of runs.

    Raises:
        FileExistsError: another file is there, and `replace` is not set.
        ValueError: see `validate_split`.

    Example:
        >>> write_split(split_patients(labels, seed=3), "split.csv", made_with={"seed": 3})
    """
    path, table = Path(path), validate_split(split).sort_values(UID, kind="stable")
    same = table.to_csv(index=False, lineterminator="\n").encode()
    if path.exists() and not replace and path.read_bytes() != same:
        own = (
            "another split is there already"
            if seal_of(path).is_file()
            else f"a split of somebody's own is there: it has no SHA-256 beside it. {_ADOPT}"
        )
        raise FileExistsError(
            f"{path} is kept as it is: {own}. write_split(..., replace=True) puts this one in its place; "
            "runs that were trained on the other one are then of no use."
        )
    write_table(table, path, sealed=True)
    if made_with is not None:
        note = {"format": 1, "split_sha256": split_hash(split), "made_with": dict(made_with)}
        write_sealed(path.with_suffix(".json"), note)


def split_settings(path: str | Path) -> dict[str, Any] | None:
    """The settings that `write_split` noted for the split of a file; None where it noted none for this one.

    Raises:
        ValueError: the note was changed after it was written.
    """
    note = Path(path).with_suffix(".json")
    if not note.is_file():
        return None
    again, writer = "make the split again with notebook 02", "splits.write_split(...)"
    found = read_sealed(note, version=1, missing="", again=again, writer=writer)
    return found["made_with"] if found["split_sha256"] == split_hash(read_split(path)) else None


def adopt(path: str | Path, table: pd.DataFrame | None = None) -> pd.DataFrame:
    """Take a split (or folds) that somebody made in another way as the cohort's: check it, and seal it.

    The file stays as it is, to the byte; its SHA-256 is written beside it. Patients with several studies are
    kept together by a column `patient`: one of them in two splits is refused.

    Args:
        path: of the file, `data/<cohort>/split.csv` as a rule: `StudyInstanceUID` and `split` (or `fold`).
        table: label table, to check that both hold the same studies.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: see `validate_split`; or it is sealed, and was changed after that.

    Example:
        >>> split_patients(labels).to_csv("mine.csv", index=False)
        >>> adopt("mine.csv", labels).equals(read_split("mine.csv", labels))
        True
    """
    split = read_columns(
        path, what="split", source="Put it there, or make one with notebook 02.", text=(UID, "patient")
    )
    split = validate_split(split, table=table)
    if not seal_of(path).is_file():
        seal_table(path)
    return split


def read_split(
    path: str | Path, table: pd.DataFrame | None = None, *, column: Literal["split", "fold"] = "split"
) -> pd.DataFrame:
    """The split of a file (folds with `column="fold"`), checked against its hash and, given it, `table`.

    Raises:
        FileNotFoundError: the split or its hash is not there.
        ValueError: the file was changed after it was written, or breaks a rule; offenders are named.

    Example:
        >>> read_split(cohort_folder / "split.csv").columns.tolist()
        ['StudyInstanceUID', 'split']
    """
    what = "split" if column == "split" else "table of folds"
    source, text = "Notebook 02 makes it.", (UID, "patient")
    split = read_columns(path, (UID, column), what=what, source=source, text=text)
    if not (seal := seal_of(path)).is_file():
        raise FileNotFoundError(
            f"No {seal.name} beside {path}, so nobody knows whether it is whole. {_ADOPT}, or make the split "
            "again with notebook 02."
        )
    split = split.drop(columns={"split": "fold", "fold": "split"}[column], errors="ignore")
    return validate_split(split, table=table)
