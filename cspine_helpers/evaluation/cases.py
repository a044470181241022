"""The rows that are judged, checked once at the door: vertebrae, or patients made of them; or images."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Self, cast, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit

from cspine_helpers.files.paths import listing
from cspine_helpers.labels import PATIENT, UID, VERTEBRAE
from cspine_helpers.metrics import auroc, average_precision, check_scores
from cspine_helpers.predictions import SINGLE, validate_predictions

LEVELS = ("all", *VERTEBRAE, "patient")  # all vertebrae (or images) pooled, one of them, or whole patients
Level = Literal["vertebra", "patient", "image", "study"]  # the last two: `SINGLE`, where no patient is made
PLURALS = {"vertebra": "vertebrae", "patient": "patients", "image": "images", "study": "studies"}
Method = Literal["max", "noisy_or", "top_k", "logistic", "own"]
MIN_PATIENTS = 20  # with and without fracture each, for the learned aggregation
_LOGIT_LIMIT = 15.0  # probabilities of 0 and 1 have no finite logit
_COUNT = len(VERTEBRAE)


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        ValueError: names them.
    """
    if value not in choices:
        raise ValueError(f"Unknown {what} {value!r}. Choose one of {', '.join(choices)}.")


@dataclass(frozen=True)
class Aggregation:
    """How the probabilities of a patient's vertebrae become one; plain values, as JSON holds them.

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

    Example:
        >>> Aggregation("top_k", k=3).phrase
        'the mean of top 3 of the vertebrae'
    """

    method: Method = "max"
    k: int | None = None
    intercept: float | None = None
    weights: tuple[float, ...] | None = None
    fitted_on: dict[str, str | int] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        check_choice("aggregation", self.method, get_args(Method))
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
            object.__setattr__(self, "weights", tuple(values[1:].tolist()))  # JSON brings a list

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
    """The rows that are judged, checked once: vertebrae, or the patients made of them; or images.

    `Cases.of` makes them of a predictions table. A patient is one study's row, labelled 1 where any row of
    the study is; `patient` says which of them belong to one person. Images (and studies of several views) are
    cases as they are: no patients are made of them, and `patient` says who is resampled as one.

    Attributes:
        patient: (n,) who is resampled: the column `patient` where the table has it, else the study.
        study: (n,) `StudyInstanceUID`.
        unit: (n,) C1 … C7, or "patient"; or "image".
        label: (n,) 0/1.
        probability: (n,) in [0, 1].
        split: (n,) its name.
        level: "vertebra" or "patient"; or "image" (or "study"), in a table of those.
        aggregation: at patient level, how vertebrae were combined, or that the score is the model's own.
        name: one of `LEVELS`, as `of_unit` takes it.
        studies: by study, in order of first appearance, of all splits and vertebrae that the table gave:
            `patient, split, label`, `own` (the model's own score, or NaN), `vertebrae` (how many it has).

    Example:
        >>> cases = Cases.of(predictions, split="validation")
        >>> len(cases), len(cases.patients()), cases.patients().aggregation.name
        (1400, 200, 'max')
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

        Where no level is asked for, they are of the table's own: vertebrae, or images.

        Raises:
            ValueError: the table breaks the schema, or has no row of that split or level; an unknown level;
                an aggregation at another than patient level; see `patients`.
        """
        check_choice("level", level, get_args(Level))
        if aggregation is not None and level != "patient":
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
        first = str(table["vertebra"].iloc[0])
        kind = cast(Level, first if first in SINGLE else "vertebra")
        if level not in (kind, "vertebra", "patient") or (kind in SINGLE and level == "patient"):
            raise ValueError(
                f"The predictions are of {PLURALS[kind]}; cases of level {level!r} are not made of them. "
                "Leave the level out."
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
            level=kind,
            studies=studies,
        )
        return cases.patients(aggregation) if level == "patient" else cases

    def patients(self, aggregation: Aggregation | None = None) -> Self:
        """One case for each study, in order of first appearance; images are cases as they are.

        Args:
            aggregation: how the probabilities of vertebrae become one. Where not given, the model's own score
                of the patient (rows `patient_overall`) if the table has it, else the highest vertebra's.

        Raises:
            ValueError: the aggregation is the own score, and there is none; it needs vertebrae, and a study
                has none; these are patients already, by another; these are some vertebrae only; there is an
                aggregation of images.
        """
        if self.level in SINGLE:
            self._require_vertebrae("aggregation") if aggregation else None
            return self
        if self.level == "patient":
            if aggregation not in (None, self.aggregation):
                raise ValueError(
                    f"These patients are by {self.aggregation}, not by {aggregation}. Start from vertebrae."
                )
            return self
        if self.name != "all" or len(self) != self.studies["vertebrae"].sum():
            raise ValueError(
                "These are some vertebrae; patients are made of all. Start from Cases.of(predictions)."
            )
        own = self.studies["own"].to_numpy()
        has_own = not np.isnan(own).all()
        aggregation = aggregation or Aggregation("own" if has_own else "max")
        if aggregation.method == "own" and not has_own:
            raise ValueError(
                f"The predictions hold no patient score of the model's own (rows with vertebra {PATIENT}). "
                "Choose another aggregation, or add that row for each study."
            )
        return replace(
            self,
            patient=self.studies["patient"].to_numpy(dtype=np.str_),
            study=self.studies.index.to_numpy(dtype=np.str_),
            unit=np.full(len(self.studies), "patient"),
            label=self.studies["label"].to_numpy(),
            probability=own if aggregation.method == "own" else _combine(self.wide(), aggregation),
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
        if unit != "all":
            self._require_vertebrae(f"level {unit!r}", also_of_patients=True)
        if unit == "patient":
            return self.patients()
        if self.level == "patient":
            raise ValueError(f"These cases are patients; {unit!r} is of vertebrae. Start from those.")
        if unit == self.name:
            return self
        if self.name != "all":
            raise ValueError(f"These are cases of {self.name} only. Start from Cases.of(predictions).")
        if not (kept := self.unit == unit).any():
            raise ValueError(f"The predictions have no row at level {unit!r}. Predict it, or choose another.")
        return replace(self.where(kept), name=unit)

    def units(self) -> dict[str, Self]:
        """The cases of each unit that occurs: C1 … C7 in their order; of images, all.

        Raises:
            ValueError: these are patients, or of one vertebra.
        """
        if self.level in SINGLE:
            return {self.level: self}
        return {name: self.of_unit(name) for name in VERTEBRAE if (self.unit == name).any()}

    def _require_vertebrae(self, what: str, *, also_of_patients: bool = False) -> None:
        """Refuse what images do not have."""
        if self.level in SINGLE:
            of = "vertebrae and patients" if also_of_patients else "vertebrae"
            raise ValueError(
                f"{PLURALS[self.level].capitalize()} are judged one by one; {what} is of {of}. Leave it out."
            )

    def where(self, kept: NDArray[np.bool_]) -> Self:
        """The cases of a mask (n,); `studies` and whom a resample draws from stay the same."""
        names = ("patient", "study", "unit", "label", "probability", "split")
        return replace(self, **{name: getattr(self, name)[kept] for name in names})

    def with_probability(self, probability: ArrayLike) -> Self:
        """The same cases with other probabilities: one for all, or (n,)."""
        _, checked = check_scores(self.label, np.broadcast_to(probability, len(self)))
        return replace(self, probability=checked)

    def require(self, split: str | None = None) -> Self:
        """The same cases, if all are of one split: of the one that is named.

        Raises:
            ValueError: names the splits.
        """
        found = np.unique(self.split).tolist()
        if split is not None and found != [split]:
            raise ValueError(
                f"Only the split {split!r} may be used here; these are of {listing(found)}. "
                f"Pass Cases.of(predictions, split={split!r})."
            )
        if len(found) > 1:
            raise ValueError(
                f"The predictions mix the splits {listing(found)}. Name one: Cases.of(predictions, split=…)."
            )
        return self

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
    def plural(self) -> str:
        """What the cases are: vertebrae, patients, images, studies."""
        return PLURALS[self.level]

    @property
    def words(self) -> str:
        """How many patients: "60 patients", or "120 studies of 60 patients"."""
        alone = self.n_studies == self.n_patients or self.level in SINGLE
        studies = "" if alone else f"{self.n_studies:,} studies of "
        return f"{studies}{self.n_patients:,} patients"

    @property
    def prevalence(self) -> float:
        """Share of the cases that are fractured."""
        return float(self.label.mean())

    @cached_property
    def population(self) -> pd.Index:
        """(P,) the patients that a resample draws from: also those without a case at this level."""
        return pd.Index(self.studies["patient"].unique())

    @cached_property
    def number(self) -> NDArray[np.intp]:
        """(n,) each case's patient, as its place in `population`."""
        return self.population.get_indexer(pd.Index(self.patient))

    def sums(self, values: NDArray | None = None) -> NDArray[np.float64]:
        """Values (n,) or (n, K) summed over each patient's cases, (P,) or (P, K); None: cases counted."""
        if values is not None and values.ndim == 2:
            return np.stack([self.sums(column) for column in values.T], axis=1)
        return np.bincount(self.number, values, len(self.population)).astype(np.float64)

    @property
    def missing(self) -> NDArray[np.int_]:
        """How many of C1 … C7 the study of each case lacks, (n,); of images 0."""
        if self.level in SINGLE:
            return np.zeros(len(self), dtype=np.int_)
        return _COUNT - self.studies["vertebrae"].to_numpy()[self._place()]

    def wide(self, values: ArrayLike | None = None) -> NDArray[np.float64]:
        """Values (n,), or the probabilities, by study and C1 … C7, (studies, 7); NaN where one is missing.

        Raises:
            ValueError: these are patients, or images.
        """
        self._require_vertebrae("a table by C1 … C7")
        if self.level == "patient":
            raise ValueError(
                "These cases are patients; vertebrae are needed. Start from Cases.of(predictions)."
            )
        found = np.full((len(self.studies), _COUNT), np.nan)
        vertebra = pd.Index(VERTEBRAE).get_indexer(pd.Index(self.unit))
        found[self._place(), vertebra] = self.probability if values is None else values
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
            found if self.level != "patient" else found.drop(columns="vertebra").assign(missing=self.missing)
        )


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
    return expit(aggregation.intercept + sorted_logits(wide) @ np.array(aggregation.weights))


def sorted_logits(wide: ArrayLike) -> NDArray[np.float64]:
    """Logits (N, 7), highest first, of probabilities (N, 7); a missing one (NaN) is the lowest present."""
    p = np.asarray(wide, dtype=np.float64)
    filled = np.where(np.isnan(p), np.nanmin(p, axis=1, keepdims=True), p)
    return -np.sort(-np.clip(logit(filled), -_LOGIT_LIMIT, _LOGIT_LIMIT), axis=1)


def defined_levels(cases: Cases) -> list[str]:
    """Those of `LEVELS` at which both classes occur, so that curves are defined; of images "all"."""
    if cases.level in SINGLE:
        return ["all"] if len(set(cases.label)) == 2 else []
    labels = {name: cases.label[cases.unit == name] for name in VERTEBRAE}
    labels |= {"all": np.concatenate([*labels.values()]), "patient": cases.studies["label"].to_numpy()}
    return [level for level in LEVELS if len(set(labels[level])) == 2]


def cleared_by_vertebrae(cases: Cases, threshold: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Share of patients without fracture who raise no alarm at C1, at C1 and C2, … at all seven.

    Returns:
        The shares observed, and those that independent vertebrae would give (products of the single
        vertebrae's shares), (7,) each. A vertebra that is missing raises no alarm.

    Raises:
        ValueError: every patient has a fracture.

    Example:
        >>> observed, independent = cleared_by_vertebrae(Cases.of(predictions, split="validation"), 0.5)
        >>> bool((np.diff(observed) <= 0).all())
        True
    """
    intact = cases.studies["label"].to_numpy() == 0
    if not intact.any():
        raise ValueError("Every patient has a fracture, so none can be cleared. Use more studies.")
    below = ~(cases.wide()[intact] >= threshold)  # (patients, 7)
    return np.logical_and.accumulate(below, axis=1).mean(axis=0), np.cumprod(below.mean(axis=0))


def fit_logistic(cases: Cases, *, penalty: float = 1.0) -> Aggregation:
    """The `logistic` aggregation, fitted on the patients of the validation split.

    Least Σ log loss + `penalty` / 2 · Σ weights², no weight below 0. A threshold that is then chosen on the
    same patients looks a little better than it is; the test split shows how much.

    Raises:
        ValueError: cases of another split, or fewer than `MIN_PATIENTS` patients with or without a fracture.
    """
    if not (np.isfinite(penalty) and penalty >= 0):
        raise ValueError(f"penalty is a finite number, 0 or more; found {penalty}. 1 is usual.")
    return _fit(cases.require("validation").studies["label"].to_numpy(), cases.wide(), penalty)


def _fit(labels: NDArray[np.int64], wide: NDArray[np.float64], penalty: float = 1.0) -> Aggregation:
    """Weights and intercept from labels (N,) and probabilities (N, 7)."""
    from scipy.optimize import minimize

    _require_both(labels)
    features, sign = sorted_logits(wide), 2 * labels - 1

    def loss(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        margin = sign * (values[0] + features @ values[1:])
        slope = -sign * expit(-margin)
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
    cases: Cases, *, k: tuple[int, ...] = (2, 3), folds: int = 5, seed: int = 0
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
        ValueError: cases of another split, or patients of one class only.

    Example:
        >>> compare_aggregations(Cases.of(predictions, split="validation"))["aggregation"].tolist()
        ['max', 'noisy or', 'mean of top 2', 'mean of top 3', 'logistic, cross-fitted']
    """
    wide = cases.require("validation").wide()
    patients = cases.patients()
    labels, _ = check_scores(patients.label, patients.probability, both_classes=True)
    simple = [Aggregation("max"), Aggregation("noisy_or"), *(Aggregation("top_k", k=each) for each in k)]
    scores: dict[str, NDArray[np.float64] | str] = {}
    if patients.aggregation == Aggregation("own"):
        scores["own score"] = patients.probability
    scores |= {each.name: _combine(wide, each) for each in simple}
    try:
        scores["logistic, cross-fitted"] = _cross_fitted(labels, wide, patients.patient, folds, seed)
    except ValueError as error:
        scores["logistic, cross-fitted"] = str(error)
    rows = []
    for name, score in scores.items():
        numbers, undefined = (np.nan,) * 3, score
        if not isinstance(score, str):
            brier = float(((score - labels) ** 2).mean())
            numbers, undefined = (auroc(labels, score), average_precision(labels, score), brier), ""
        incomplete = int(np.isnan(wide).any(axis=1).sum())
        rows.append((name, len(labels), int(labels.sum()), incomplete, *numbers, undefined))
    columns = ["aggregation", "patients", "positives", "incomplete"]
    return pd.DataFrame(rows, columns=[*columns, "auroc", "average_precision", "brier", "undefined"])


def _cross_fitted(
    labels: NDArray[np.int64], wide: NDArray[np.float64], patients: NDArray, folds: int, seed: int
) -> NDArray[np.float64]:
    """Probability of each row (N,) from an aggregation that was fitted on the other folds' patients."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    _require_both(labels)
    several = len(np.unique(patients)) < len(patients)
    parts = (StratifiedGroupKFold if several else StratifiedKFold)(folds, shuffle=True, random_state=seed)
    found = np.empty(len(labels))
    for fit, judge in parts.split(wide, labels, patients if several else None):
        found[judge] = _combine(wide[judge], _fit(labels[fit], wide[fit]))
    return found
