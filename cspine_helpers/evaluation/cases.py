"""From vertebrae to the patient: four ways to make one probability of seven, and the model's own."""

from dataclasses import dataclass, field, replace
from typing import Literal, Self, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cspine_helpers.files.paths import listing
from cspine_helpers.files.tables import require_columns
from cspine_helpers.labels import PATIENT, UID, VERTEBRAE
from cspine_helpers.metrics import auroc, average_precision, check_scores
from cspine_helpers.predictions import validate_predictions, validation_rows

LEVELS = ("all", *VERTEBRAE, "patient")  # all vertebrae pooled, one of them, or whole patients


Level = Literal["vertebra", "patient"]


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        ValueError: names them.
    """
    if value not in choices:
        raise ValueError(f"Unknown {what} {value!r}. Choose one of {', '.join(choices)}.")


def resampled_units(predictions: pd.DataFrame) -> pd.Series:
    """Who varies by chance, for each row: its `patient` where the table has that column, else its study.

    Two scans of one patient are no two independent cases: whatever resamples, deals out or counts patients
    asks here whose row it is.
    """
    return predictions["patient" if "patient" in predictions.columns else UID]


def patients_in_words(predictions: pd.DataFrame) -> str:
    """How many patients the table holds: "60 patients", or "120 studies of 60 patients"."""
    studies, patients = predictions[UID].nunique(), resampled_units(predictions).nunique()
    whose = "" if studies == patients else f"{studies:,} studies of "
    return f"{whose}{patients:,} patients"


def patient_level(predictions: pd.DataFrame) -> pd.DataFrame:
    """One row for each study, its patient: the model's own score where it has one, else the highest vertebra.

    The model's own score is the row whose `vertebra` is `patient_overall` (`labels.PATIENT`). The label is
    the highest of all rows of the study. `aggregation.default_aggregation` says which of the two it is.

    Returns:
        Columns `StudyInstanceUID, split, label, probability`, and `patient` where the table has it, in the
        order of first appearance.
    """
    keys = [UID, "split", *(["patient"] if "patient" in predictions.columns else [])]
    grouped = predictions.groupby(keys, sort=False, observed=True)
    table = grouped[["label", "probability"]].max().reset_index()
    if has_own_score(predictions):
        own = predictions[predictions["vertebra"] == PATIENT].set_index(UID)["probability"]
        table["probability"] = table[UID].map(own)
    return table[[UID, "split", "label", "probability", *keys[2:]]]


def has_own_score(predictions: pd.DataFrame) -> bool:
    """Whether the table holds the model's own patient scores: rows whose vertebra is `patient_overall`."""
    return "vertebra" in predictions.columns and bool((predictions["vertebra"] == PATIENT).any())


def at_level(predictions: pd.DataFrame, level: str) -> pd.DataFrame:
    """The rows of one of `LEVELS`: all vertebrae, one of C1…C7, or patients (`patient_level`).

    Everything about vertebrae comes through here, so that a model's own patient score is never taken for one.

    Raises:
        ValueError: unknown level, or one of which the table has no row.
    """
    if level not in LEVELS:
        raise ValueError(f"Unknown level {level!r}. Choose one of {', '.join(LEVELS)}.")
    if level == "patient":
        return patient_level(predictions)
    name = predictions["vertebra"]
    rows = predictions[name != PATIENT if level == "all" else name == level]
    if rows.empty:
        raise ValueError(f"The predictions have no row at level {level!r}. Predict it, or choose another.")
    return rows


def defined_levels(predictions: pd.DataFrame) -> list[str]:
    """Those of `LEVELS` at which the table holds both classes, so that curves are defined."""
    present = {"all", "patient", *predictions["vertebra"].unique()}
    if not predictions["vertebra"].isin(VERTEBRAE).any():
        present.remove("all")
    return [
        level for level in LEVELS if level in present and at_level(predictions, level)["label"].nunique() == 2
    ]


def cleared_by_vertebrae(
    predictions: pd.DataFrame, threshold: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Share of patients without fracture who raise no alarm at C1, at C1 and C2, … at all seven.

    Returns:
        The shares found, and those that independent vertebrae would give (products of the single
        vertebrae's shares), (7,) each. A vertebra that is missing raises no alarm.

    Raises:
        ValueError: every patient has a fracture.
    """
    intact = predictions.groupby(UID)["label"].transform("max") == 0
    if not intact.any():
        raise ValueError("Every patient has a fracture, so none can be cleared. Use more studies.")
    wide = predictions[intact].pivot_table("probability", index=UID, columns="vertebra")
    below = ~(wide.reindex(columns=list(VERTEBRAE)).to_numpy() >= threshold)  # (patients, 7)
    return np.logical_and.accumulate(below, axis=1).mean(axis=0), np.cumprod(below.mean(axis=0))


Method = Literal["max", "noisy_or", "top_k", "logistic", "own"]
MIN_PATIENTS = 20  # with and without fracture each, for the learned aggregation
_LOGIT_LIMIT = 15.0  # probabilities of 0 and 1 have no finite logit
_COUNT = len(VERTEBRAE)


@dataclass(frozen=True)
class Aggregation:
    """How the probabilities of a patient's vertebrae become one; plain values, so it can stand in JSON.

    A vertebra that is missing says nothing: each method uses those that are present.

    Attributes:
        method: `max`, the highest; `noisy_or`, 1 - Π(1 - p), that of any fracture if vertebrae were
            independent; `top_k`, the mean of the `k` highest (of all, where fewer are present); `logistic`,
            the sigmoid of `intercept` + Σ `weights` · logits, logits sorted from the highest. In place of a
            missing vertebra, `logistic` takes the lowest logit among those present. `own` makes nothing of
            vertebrae: it is the score that the model gives the patient itself (rows `patient_overall`).
        k: of `top_k`.
        intercept: of `logistic`.
        weights: of `logistic`, seven, none below 0, so that a higher probability never lowers the patient's.
        fitted_on: of `logistic`: split, patients and positives that it was fitted on.
    """

    method: Method = "max"
    k: int | None = None
    intercept: float | None = None
    weights: tuple[float, ...] | None = None
    fitted_on: dict[str, str | int] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            choices = ", ".join(get_args(Method))
            raise ValueError(f"Unknown aggregation {self.method!r}. Choose one of {choices}.")
        if (self.method == "top_k") != (self.k is not None) or (
            self.k is not None and not (isinstance(self.k, int) and 1 <= self.k <= _COUNT)
        ):
            raise ValueError(
                f"top_k takes k, 1 to {_COUNT}, and only it does; found {self.method}, k={self.k}."
            )
        learned = self.intercept is not None and self.weights is not None and self.fitted_on is not None
        if (self.method == "logistic") != learned:
            raise ValueError(
                "logistic has intercept, weights and fitted_on, and only it does. "
                "Make it with fit_logistic(...)."
            )
        if self.weights is not None:
            values = np.array([self.intercept, *self.weights], dtype=np.float64)
            if len(values) != _COUNT + 1 or not np.isfinite(values).all() or (values[1:] < 0).any():
                raise ValueError(
                    f"logistic has {_COUNT} finite weights, none below 0; found {list(self.weights)}, "
                    f"intercept {self.intercept}. Make it with fit_logistic(...)."
                )
            object.__setattr__(
                self, "weights", tuple(values[1:].tolist())
            )  # a tuple also where JSON had a list

    @property
    def name(self) -> str:
        """In words: max, noisy or, mean of top 3, logistic, own score."""
        words = {"top_k": f"mean of top {self.k}", "own": "own score"}
        return words.get(self.method, self.method.replace("_", " "))

    @property
    def phrase(self) -> str:
        """What a patient's probability is: the max of the vertebrae, the model's own score."""
        return "the model's own score" if self.method == "own" else f"the {self.name} of the vertebrae"


@dataclass(frozen=True, eq=False)
class Cases:
    """The rows that are judged, checked once: vertebrae, or the patients made of them.

    `Cases.of` makes them of a predictions table. A patient is one study's row, labelled 1 where any row of
    the study is; `patient` says which of them belong to one person.

    Attributes:
        patient: (n,) who is resampled: the column `patient` where the table has it, else the study.
        study: (n,) `StudyInstanceUID`.
        unit: (n,) C1 … C7, or "patient".
        label: (n,) 0/1.
        probability: (n,) in [0, 1].
        split: (n,) its name.
        level: "vertebra" or "patient".
        aggregation: at patient level, how vertebrae were combined, or that the score is the model's own.
        name: one of `LEVELS`, as `of_unit` takes it.
        studies: by study, in order of first appearance, of all splits and vertebrae that the table gave:
            `patient, split, label`, `own` (the model's own score, or NaN), `vertebrae` (how many it has).
    """

    patient: NDArray[np.str_]
    study: NDArray[np.str_]
    unit: NDArray[np.str_]
    label: NDArray[np.int_]
    probability: NDArray[np.float64]
    split: NDArray[np.str_]
    level: Level
    studies: pd.DataFrame = field(repr=False)
    aggregation: Aggregation | None = None
    name: str = "all"

    @classmethod
    def of(
        cls,
        predictions: pd.DataFrame,
        *,
        split: str | None = None,
        level: Level = "vertebra",
        aggregation: Aggregation | None = None,
    ) -> Self:
        """The cases of a predictions table, of one split where it is named.

        Raises:
            ValueError: the table breaks the schema, or has no row of that split or level; an unknown level;
                an aggregation at vertebra level; see `patients`.

        Example:
            >>> cases = Cases.of(predictions, split="validation")
            >>> len(cases), len(cases.patients()), cases.patients().aggregation.name
            (140, 20, 'max')
        """
        check_choice("level", level, get_args(Level))
        if aggregation is not None and level == "vertebra":
            raise ValueError(
                "An aggregation belongs to the patient level. Leave it out, or choose that level."
            )
        table = validate_predictions(predictions)
        if split is not None:
            found = table["split"].unique()
            table = table[table["split"] == split]
            if table.empty:
                raise ValueError(
                    f"The predictions have no row of the split {split!r}; found {listing(sorted(found))}. "
                    "Predict it, or name the split of these patients so."
                )
        own = table["vertebra"] == PATIENT
        whose = (table["patient"] if "patient" in table.columns else table[UID]).astype(str)
        marked = table.assign(patient=whose, vertebrae=~own, own=table["probability"].where(own))
        by_study = marked.groupby(UID, sort=False)
        studies = by_study.agg({"patient": "first", "split": "first", "label": "max", "own": "max"})
        studies["vertebrae"] = by_study["vertebrae"].sum()
        rows = table[~own]
        if rows.empty and level == "vertebra":
            raise ValueError("The predictions have no row of a vertebra, only patients: use level='patient'.")
        cases = cls(
            patient=whose[~own].to_numpy(dtype=np.str_),
            study=rows[UID].to_numpy(dtype=np.str_),
            unit=rows["vertebra"].to_numpy(dtype=np.str_),
            label=rows["label"].to_numpy(),
            probability=rows["probability"].to_numpy(),
            split=rows["split"].to_numpy(dtype=np.str_),
            level="vertebra",
            studies=studies,
        )
        return cases.patients(aggregation) if level == "patient" else cases

    def patients(self, aggregation: Aggregation | None = None) -> Self:
        """One case for each study, in order of first appearance.

        Args:
            aggregation: how the probabilities of vertebrae become one. Where not given, the model's own score
                of the patient (rows `patient_overall`) if the table has it, else the highest vertebra's.

        Raises:
            ValueError: the aggregation is the own score, and there is none; it needs vertebrae, and a study
                has none; these are patients already, by another.
        """
        if self.level == "patient":
            if aggregation not in (None, self.aggregation):
                raise ValueError(
                    f"These patients are by {self.aggregation}, not by {aggregation}. Start from vertebrae."
                )
            return self
        has_own = self.studies["own"].notna().any()
        aggregation = aggregation or Aggregation("own" if has_own else "max")
        if aggregation.method == "own" and not has_own:
            raise ValueError(
                f"The predictions hold no patient score of the model's own (rows with vertebra {PATIENT}). "
                "Choose another aggregation, or add that row for each study."
            )
        if aggregation.method == "own":
            score = self.studies["own"].to_numpy()
        else:
            score = _combine(self.wide(), aggregation)
        return replace(
            self,
            patient=self.studies["patient"].to_numpy(dtype=np.str_),
            study=self.studies.index.to_numpy(dtype=np.str_),
            unit=np.full(len(self.studies), "patient"),
            label=self.studies["label"].to_numpy(),
            probability=score,
            split=self.studies["split"].to_numpy(dtype=np.str_),
            level="patient",
            aggregation=aggregation,
            name="patient",
        )

    def of_unit(self, unit: str) -> Self:
        """The cases of one vertebra; of all vertebrae ("all"); or the patients ("patient").

        Raises:
            ValueError: an unknown unit, or one of which there is no case.
        """
        check_choice("level", unit, LEVELS)
        if unit == "patient":
            return self.patients()
        if self.level == "patient":
            raise ValueError(f"These cases are patients; {unit!r} is of vertebrae. Start from those.")
        if unit == "all":
            return self
        if not (kept := self.unit == unit).any():
            raise ValueError(f"The predictions have no row at level {unit!r}. Predict it, or choose another.")
        return replace(self.where(kept), name=unit)

    def where(self, kept: NDArray[np.bool_]) -> Self:
        """The cases of a mask (n,); `studies` and whom a resample draws from stay the same."""
        names = ("patient", "study", "unit", "label", "probability", "split")
        return replace(self, **{name: getattr(self, name)[kept] for name in names})

    def with_probability(self, probability: ArrayLike) -> Self:
        """The same cases with other probabilities: one for all, or (n,)."""
        _, checked = check_scores(self.label, np.broadcast_to(probability, len(self)))
        return replace(self, probability=checked)

    def __len__(self) -> int:
        return len(self.label)

    @property
    def n_patients(self) -> int:
        """How many patients these cases are of."""
        return len(np.unique(self.patient))

    @property
    def n_studies(self) -> int:
        """How many studies these cases are of."""
        return len(np.unique(self.study))

    @property
    def missing(self) -> NDArray[np.int_]:
        """How many of C1 … C7 the study of each case lacks, (n,)."""
        return len(VERTEBRAE) - self.studies["vertebrae"].to_numpy()[self._place()]

    def wide(self) -> NDArray[np.float64]:
        """Probabilities of C1 … C7 of each of `studies`, (studies, 7); NaN where a vertebra is missing."""
        found = np.full((len(self.studies), len(VERTEBRAE)), np.nan)
        found[self._place(), pd.Index(VERTEBRAE).get_indexer(pd.Index(self.unit))] = self.probability
        return found

    def _place(self) -> NDArray[np.intp]:
        """Of each case in `studies`, (n,)."""
        return self.studies.index.get_indexer(pd.Index(self.study))

    def table(self) -> pd.DataFrame:
        """Columns `StudyInstanceUID, vertebra, split, label, probability`; of patients without `vertebra`.

        `patient` follows where one has several studies, and at patient level `missing`.
        """
        columns = {UID: self.study, "vertebra": self.unit, "split": self.split, "label": self.label}
        found = pd.DataFrame(columns | {"probability": self.probability})
        if (self.studies["patient"] != self.studies.index).any():
            found["patient"] = self.patient
        return (
            found if self.level == "vertebra" else found.drop(columns="vertebra").assign(missing=self.missing)
        )


def default_aggregation(predictions: pd.DataFrame) -> Aggregation:
    """How patients are made where nobody says how: the model's own score where the table has it, else max.

    `metrics.patient_level` makes them so; with `name`, this says which it is.

    Example:
        >>> default_aggregation(predictions).name
        'max'
    """
    return Aggregation("own" if has_own_score(predictions) else "max")


def aggregate(predictions: pd.DataFrame, aggregation: Aggregation) -> pd.DataFrame:
    """One row for each patient.

    Returns:
        Columns `StudyInstanceUID, split, label, probability` (and `patient`, where the table has it) as
        `metrics.patient_level`, and `missing`, how many of C1 … C7 are not there.

    Raises:
        ValueError: the table breaks the schema of predictions, or lacks what the aggregation is made of.

    Example:
        >>> aggregate(predictions, Aggregation("noisy_or"))["probability"]
    """
    table = validate_predictions(predictions)
    patients, wide = _wide(table)
    if aggregation.method == "own":
        if not has_own_score(table):
            raise ValueError(
                f"The predictions hold no patient score of the model's own (rows with vertebra {PATIENT}). "
                "Choose another aggregation, or add that row for each study."
            )
        score = patients["probability"].to_numpy()
    else:
        score = _combine(wide, aggregation)
    return patients.assign(probability=score, missing=np.isnan(wide).sum(axis=1))


def _wide(table: pd.DataFrame) -> tuple[pd.DataFrame, NDArray[np.float64]]:
    """Patients of `metrics.patient_level`, and their vertebrae (patients, 7), NaN where one is missing."""
    patients = patient_level(table)
    wide = table.pivot_table("probability", UID, "vertebra", sort=False)
    return patients, wide.reindex(index=patients[UID], columns=list(VERTEBRAE)).to_numpy(dtype=np.float64)


def _combine(wide: NDArray[np.float64], aggregation: Aggregation) -> NDArray[np.float64]:
    """Probability of each patient (N,) from those of the vertebrae (N, 7)."""
    if without := np.isnan(wide).all(axis=1).sum():
        raise ValueError(
            f"{without} patients have no vertebra to make a probability of, only a score of their own. Use "
            "Aggregation('own'), or add the vertebrae."
        )
    if aggregation.method == "max":
        return np.nanmax(wide, axis=1)
    if aggregation.method == "noisy_or":
        return 1 - np.nanprod(1 - wide, axis=1)
    if aggregation.method == "top_k":
        highest = -np.sort(-wide, axis=1)[:, : aggregation.k]  # NaN is sorted to the end
        return np.clip(np.nanmean(highest, axis=1), 0, 1)
    assert aggregation.weights is not None
    assert aggregation.intercept is not None
    logit = aggregation.intercept + sorted_logits(wide) @ np.array(aggregation.weights)
    return _sigmoid(logit)


def sorted_logits(wide: ArrayLike) -> NDArray[np.float64]:
    """Logits (N, 7), highest first, of probabilities (N, 7); a missing one (NaN) is the lowest present."""
    p = np.asarray(wide, dtype=np.float64)
    filled = np.where(np.isnan(p), np.nanmin(p, axis=1, keepdims=True), p)
    with np.errstate(divide="ignore"):  # the logits of 0 and 1 are infinite, and clipped
        logits = np.log(filled) - np.log1p(-filled)
    return -np.sort(-np.clip(logits, -_LOGIT_LIMIT, _LOGIT_LIMIT), axis=1)


def _sigmoid(logit: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0, -logit))


def fit_logistic(predictions: pd.DataFrame, *, penalty: float = 1.0) -> Aggregation:
    """The `logistic` aggregation, fitted on the patients of the validation split; no other row is looked at.

    Least Σ log loss + `penalty` / 2 · Σ weights², no weight below 0. A threshold that is then chosen on the
    same patients looks a little better than it is; the test split tells.

    Raises:
        ValueError: the table breaks the schema, has no validation rows, or fewer than `MIN_PATIENTS` patients
            there with, or without, a fracture.
    """
    if not (np.isfinite(penalty) and penalty >= 0):
        raise ValueError(f"penalty is a finite number, 0 or more; found {penalty}. 1 is usual.")
    patients, wide = _wide(validation_rows(predictions))
    labels = patients["label"].to_numpy()
    return _fit(labels, wide, penalty)


def _fit(labels: NDArray[np.int64], wide: NDArray[np.float64], penalty: float = 1.0) -> Aggregation:
    """Weights and intercept from labels (N,) and probabilities (N, 7)."""
    from scipy.optimize import minimize

    _require_both(labels)
    features = sorted_logits(wide)
    sign = 2 * labels - 1

    def loss(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        margin = sign * (values[0] + features @ values[1:])
        slope = -sign * _sigmoid(-margin)
        gradient = np.concatenate([[slope.sum()], features.T @ slope + penalty * values[1:]])
        return np.logaddexp(0, -margin).sum() + penalty / 2 * (values[1:] ** 2).sum(), gradient

    bounds = [(None, None)] + [(0, None)] * _COUNT
    found = minimize(
        loss, np.zeros(_COUNT + 1), jac=True, method="L-BFGS-B", bounds=bounds,
        options={"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-8},
    )  # fmt: skip
    intercept, *weights = found.x.tolist()
    counted: dict[str, str | int] = {"split": "validation", "patients": len(labels)}
    counted["positives"] = int(labels.sum())
    return Aggregation("logistic", intercept=intercept, weights=tuple(weights), fitted_on=counted)


def _require_both(labels: NDArray[np.int64]) -> None:
    positives = int(labels.sum())
    if min(positives, len(labels) - positives) < MIN_PATIENTS:
        raise ValueError(
            f"A learned aggregation needs {MIN_PATIENTS} patients with a fracture and {MIN_PATIENTS} without "
            f"to fit on; found {positives} and {len(labels) - positives}. Use max, or more patients."
        )


def compare_aggregations(
    predictions: pd.DataFrame, *, k: tuple[int, ...] = (2, 3), folds: int = 5, seed: int = 0
) -> pd.DataFrame:
    """All aggregations side by side, on the patients of the validation split.

    The learned one is judged on patients that it was not fitted on: `folds` times, each time fitted on the
    other folds.

    Returns:
        Columns `aggregation, patients, positives, incomplete, auroc, average_precision, brier, undefined`,
        one row a method, the model's own score first where it has one; `incomplete` counts patients with a
        vertebra missing. Where there are too few patients for the learned one, its three figures are NaN and
        `undefined` says why; else that is empty.

    Raises:
        ValueError: as `fit_logistic` about the table; or the split has one class only.
    """
    table = validation_rows(predictions)
    patients, wide = _wide(table)
    labels, _ = check_scores(patients["label"], np.zeros(len(patients)), both_classes=True)
    simple = [Aggregation("max"), Aggregation("noisy_or"), *(Aggregation("top_k", k=each) for each in k)]
    rows: list[tuple[str, NDArray[np.float64] | None, str]]
    rows = [(aggregation.name, _combine(wide, aggregation), "") for aggregation in simple]
    if has_own_score(table):
        rows.insert(0, (Aggregation("own").name, patients["probability"].to_numpy(), ""))
    try:
        groups = resampled_units(patients)
        rows.append(("logistic, cross-fitted", _cross_fitted(labels, wide, groups, folds, seed), ""))
    except ValueError as error:
        rows.append(("logistic, cross-fitted", None, str(error)))
    return pd.DataFrame(
        {
            "aggregation": name,
            "patients": len(labels),
            "positives": int(labels.sum()),
            "incomplete": int(np.isnan(wide).any(axis=1).sum()),
            "auroc": np.nan if score is None else auroc(labels, score),
            "average_precision": np.nan if score is None else average_precision(labels, score),
            "brier": np.nan if score is None else float(((score - labels) ** 2).mean()),
            "undefined": undefined,
        }
        for name, score, undefined in rows
    )


def _cross_fitted(
    labels: NDArray[np.int64], wide: NDArray[np.float64], patients: pd.Series, folds: int, seed: int
) -> NDArray[np.float64]:
    """Probability of each row (N,) from an aggregation that was fitted on the other folds' patients."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    _require_both(labels)
    found = np.empty(len(labels))
    kind = StratifiedKFold if patients.is_unique else StratifiedGroupKFold
    parts = kind(folds, shuffle=True, random_state=seed)
    for fit, judge in parts.split(wide, labels, None if patients.is_unique else patients):
        found[judge] = _combine(wide[judge], _fit(labels[fit], wide[fit]))
    return found


def scored_rows(predictions: pd.DataFrame, level: str, *, one_split: bool = True) -> pd.DataFrame:
    """The checked rows of a predictions table at one level, or of a table of patients at level `patient`.

    Args:
        predictions: predictions table, or `StudyInstanceUID, split, label, probability` with one row a
            patient.
        level: one of `metrics.LEVELS`; patients are those of `metrics.patient_level`.
        one_split: refuse rows of several splits, as a figure that pools them describes neither.

    Raises:
        ValueError: the table breaks the schema, holds patients where the level is one of vertebrae, has no
            row at that level, or holds several splits.
    """
    if "vertebra" in predictions.columns:
        rows = at_level(validate_predictions(predictions), level)
    elif level in LEVELS and level != "patient":
        raise ValueError(
            f"Level {level!r} is one of vertebrae, and the table has no column 'vertebra': its rows are "
            "patients. Use level='patient', or the predictions table."
        )
    else:
        require_columns(predictions, (UID, "split", "label", "probability"), what="The table of patients")
        check_scores(predictions["label"], predictions["probability"])
        if (twice := predictions[UID].duplicated()).any():
            names = listing(predictions[UID][twice].drop_duplicates())
            raise ValueError(f"Patients that stand in the table more than once: {names}. Keep one row each.")
        rows = at_level(predictions, level)
    splits = rows["split"].drop_duplicates().tolist()
    if one_split and len(splits) > 1:
        raise ValueError(f"The table holds the splits {listing(splits)}. Pass the rows of one of them.")
    return rows


def rows_at(table: pd.DataFrame, level: str, aggregation: Aggregation | None) -> pd.DataFrame:
    """The rows of a predictions table at a level: its vertebrae, or its patients by an aggregation.

    Raises:
        ValueError: there is an aggregation at vertebra level, or none at patient level.
    """
    check_choice("level", level, get_args(Level))
    if level == "patient":
        if aggregation is None:
            raise ValueError(
                "At patient level, say how the vertebrae of a patient become one probability: "
                "aggregation=Aggregation(...)."
            )
        return aggregate(table, aggregation)
    if aggregation is not None:
        raise ValueError("An aggregation belongs to the patient level. Leave it out, or choose that level.")
    return at_level(table, "all")
