"""Calibrators: fitted on the validation split and on no other, judged on patients who had no part in the fit.

A calibrator belongs to one level (`cases.LEVELS`): one fitted on vertebrae says nothing about patients.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, cast, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from cspine_helpers.evaluation.cases import LEVELS, Cases, check_choice
from cspine_helpers.evaluation.reliability import logistic, parted, score_logit
from cspine_helpers.files.paths import listing
from cspine_helpers.metrics import check_scores, log_losses

Kind = Literal["temperature", "platt", "isotonic"]
# Patients with a fractured case, and patients with an intact one, that a fit needs at least: ten for each
# free number, and for isotonic regression enough that several steps have patients of both kinds.
LEAST_PATIENTS: dict[str, int] = {"temperature": 10, "platt": 20, "isotonic": 50}


@dataclass(frozen=True)
class Calibrator:
    """A map of scores to probabilities, fitted on the validation split; all plain numbers.

    `temperature` and `platt`: logit(probability) = slope · logit(score) + intercept, where temperature is
    1 / slope and has intercept 0. `isotonic`: lines through the points (`scores`, `probabilities`), level
    outside.

    Attributes:
        kind: `temperature`, `platt` or `isotonic`.
        level: the one of `cases.LEVELS` that it was fitted at, and holds for.
        patients, cases, positives: how many it was fitted on; positives are fractured cases.
        aggregation: at level `patient`, how vertebrae became patients, in a word; empty at other levels.
        slope, intercept: of the logit; 1 and 0 where the kind has none.
        scores, probabilities: (K,) rising and (K,) never falling, for `isotonic`.
    """

    kind: Kind
    level: str
    patients: int
    cases: int
    positives: int
    aggregation: str = ""
    slope: float = 1.0
    intercept: float = 0.0
    scores: tuple[float, ...] = ()
    probabilities: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, get_args(Kind))
        check_choice("level", self.level, LEVELS)
        if (self.level == "patient") != bool(self.aggregation):
            raise ValueError(
                f"A calibrator has an aggregation at level 'patient' and only there; found "
                f"{self.aggregation!r} at level {self.level!r}. Fit it again."
            )
        if not (np.isfinite([self.slope, self.intercept]).all() and self.slope > 0):
            raise ValueError(
                f"A calibrator keeps the order of the scores: slope above 0, both finite; found slope "
                f"{self.slope}, intercept {self.intercept}. Fit it again."
            )
        object.__setattr__(self, "scores", tuple(self.scores))  # JSON brings lists
        object.__setattr__(self, "probabilities", tuple(self.probabilities))
        if self.kind == "isotonic" and not (
            0 < len(self.scores) == len(self.probabilities)
            and all(a < b for a, b in zip(self.scores, self.scores[1:], strict=False))
            and all(a <= b for a, b in zip((0, *self.probabilities), (*self.probabilities, 1), strict=True))
        ):
            raise ValueError(
                f"Isotonic points are as many probabilities as scores, scores rising, the others never "
                f"falling in [0, 1]; found {len(self.scores)} and {len(self.probabilities)}. Fit it again."
            )

    @property
    def prevalence(self) -> float:
        """Share of fractured rows among those it was fitted on; where `clinical_utility.restate` starts."""
        return self.positives / self.cases

    def record(self) -> dict[str, Any]:
        """All of it, as JSON holds it; `Calibrator.from_record` is the way back."""
        return asdict(self) | {"scores": list(self.scores), "probabilities": list(self.probabilities)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Calibrator":
        """The calibrator of a `record`.

        Raises:
            ValueError: fields are missing or unknown, or hold what no fit gives.
        """
        names = {field.name for field in fields(cls)}
        if odd := names.symmetric_difference(record):
            raise ValueError(
                f"A calibrator's record has the fields {listing(sorted(names))}; missing or unknown: "
                f"{listing(sorted(odd))}. Fit it again."
            )
        return cls(**record)


def fit_calibrator(cases: Cases, *, kind: Kind) -> Calibrator:
    """Fit a calibrator by least log loss (`temperature`, `platt`) or least squares (`isotonic`).

    Temperature only sharpens or softens: it leaves 0.5 where it is. Platt also shifts. Isotonic regression
    takes any rising form; where its first step holds no fracture or its last nothing else, it would claim
    certainty, so that a first step of n rows becomes 1 / (n + 2) and a last one (n + 1) / (n + 2), as far as
    its neighbour lets it.

    Args:
        cases: of the validation split.
        kind: `temperature`, `platt` or `isotonic`.

    Raises:
        ValueError: cases of another split; fewer patients of either kind than `LEAST_PATIENTS`; scores that
            separate the classes without a mistake, or rank them the wrong way round, so that no best fit
            exists.

    Source: Guo et al., ICML (2017) 1321-1330, temperature; Platt, Advances in Large Margin Classifiers (1999)
    61-74; Zadrozny & Elkan, KDD (2002) 694-699, isotonic; rule of succession: Laplace (1774).
    """
    check_choice("kind", kind, get_args(Kind))
    y, p = cases.require("validation").label, cases.probability
    size = (cases.n_patients, len(cases), int(y.sum()))
    counted = (cases.sums(np.column_stack([y, 1 - y])) > 0).sum(axis=0)
    least = LEAST_PATIENTS[kind]
    if counted.min() < least:
        simpler = [name for name, count in LEAST_PATIENTS.items() if counted.min() >= count]
        case = cases.level if cases.name == "all" else cases.name
        both = f"patients with a fractured {case} and {least} with an intact one"
        both = f"fractured patients and {least} intact ones" if cases.level == "patient" else both
        raise ValueError(
            f"{kind} needs {least} {both}; found {counted[0]} and {counted[1]} of {size[0]} patients. "
            f"Use {' or '.join([*simpler, 'more studies'])}."
        )
    if kind == "isotonic":
        scores, values = _isotonic(y, p)
        slope, intercept, rise = 1.0, 0.0, values[-1] - values[0]
    else:
        scores, values, z = (), (), score_logit(p)
        _check_overlap(y, z, kind)
        slope, intercept = logistic(y, z, shift=kind == "platt")
        rise = slope
    if rise <= 0:
        raise ValueError(
            f"Higher scores do not go with more fractures at level {cases.name!r} (slope {rise:.3g}), and a "
            "calibrator does not turn a ranking round. Check labels and scores; the model may know nothing."
        )
    return Calibrator(kind, cases.name, *size, _aggregation(cases), slope, intercept, scores, values)


def _aggregation(cases: Cases) -> str:
    """How vertebrae became the cases, in a word; empty where the cases are vertebrae."""
    return cases.aggregation.name if cases.aggregation else ""


def _check_overlap(y: NDArray[np.int64], z: NDArray[np.float64], kind: str) -> None:
    """Refuse scores for which the likelihood has no maximum."""
    positive, negative = z[y == 1], z[y == 0]
    if kind == "platt":
        never = parted(y, z)
    else:
        never = positive.min() >= 0 >= negative.max() or positive.max() <= 0 <= negative.min()
    if never:
        where = "a score" if kind == "platt" else "0.5"
        raise ValueError(
            f"{kind} has no best fit: {where} parts all {len(positive)} fractured from all {len(negative)} "
            "intact cases, so that a steeper curve always fits better. Use isotonic, or more studies."
        )


def _isotonic(y: NDArray[np.int64], p: NDArray[np.float64]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    from sklearn.isotonic import IsotonicRegression

    fit = IsotonicRegression(y_min=0, y_max=1).fit(p, y)
    scores, values = fit.X_thresholds_, fit.y_thresholds_.copy()
    for certain, bound in ((0, np.minimum), (1, np.maximum)):
        step = values == certain
        if step.any() and not step.all():
            rows = int((fit.predict(p) == certain).sum())
            share = (1 + certain * rows) / (rows + 2)
            values[step] = bound(share, bound.reduce(values[~step]))
    return tuple(scores.tolist()), tuple(values.tolist())


def apply(calibrator: Calibrator, cases: Cases) -> Cases:
    """The cases, of any split, with calibrated probabilities.

    The highest of calibrated vertebrae is not a calibrated patient: fit one at that level.

    Raises:
        ValueError: the calibrator was fitted at another level, or on patients made in another way.
    """
    if (calibrator.level, calibrator.aggregation) != (cases.name, _aggregation(cases)):
        fitted, found = (
            f"level {level!r}" + (f" by {by!r}" if by else "")
            for level, by in ((calibrator.level, calibrator.aggregation), (cases.name, _aggregation(cases)))
        )
        raise ValueError(
            f"The calibrator was fitted at {fitted}; these cases are at {found}. "
            "Make them the same way, or fit another."
        )
    return cases.with_probability(calibrated(calibrator, cases.probability))


def calibrated(calibrator: Calibrator, probabilities: ArrayLike) -> NDArray[np.float64]:
    """Calibrated probabilities (N,) of scores (N,), which are of the calibrator's level.

    Raises:
        ValueError: a score is missing or outside [0, 1].
    """
    _, p = check_scores(np.zeros(np.shape(probabilities)), probabilities)
    if calibrator.kind == "isotonic":
        return np.interp(p, calibrator.scores, calibrator.probabilities)
    return expit(calibrator.slope * score_logit(p) + calibrator.intercept)


AS_PREDICTED = "as predicted"


def choose_calibrator(cases: Cases) -> tuple[Calibrator | None, pd.DataFrame]:
    """Choose a kind of calibrator by the lowest cross-fitted log loss, and fit it on all cases.

    The probabilities as predicted take part, and win where no kind helps.

    Args:
        cases: of the validation split: all vertebrae, or patients.

    Returns:
        The calibrator, which `decisions.freeze` takes; None: as predicted. And columns `kind, log_loss,
        refused`, one row a kind: the log loss on patients that were not fitted on, or why there is none.

    Example:
        >>> calibrator, scores = choose_calibrator(Cases.of(predictions, split="validation"))
        >>> scores["kind"].tolist()
        ['as predicted', 'temperature', 'platt', 'isotonic']

    Raises:
        ValueError: cases of another split.
    """
    cases.require("validation")
    rows: list[tuple[str, float, str]] = [(AS_PREDICTED, _log_loss(cases), "")]
    for kind in get_args(Kind):
        try:
            rows.append((kind, _log_loss(cross_fitted(cases, kind=kind)), ""))
        except ValueError as error:
            rows.append((kind, np.nan, str(error)))
    scores = pd.DataFrame(rows, columns=["kind", "log_loss", "refused"])
    best = min((row for row in rows if not np.isnan(row[1])), key=lambda row: row[1])[0]
    return None if best == AS_PREDICTED else fit_calibrator(cases, kind=cast(Kind, best)), scores


def _log_loss(cases: Cases) -> float:
    return float(log_losses(cases.label, cases.probability).mean())


def cross_fitted(cases: Cases, *, kind: Kind, folds: int = 5, seed: int = 0) -> Cases:
    """The cases, each calibrated by a calibrator that saw other patients only.

    So kinds can be compared, and calibrated probabilities judged, without the test split. Patients with and
    without a fracture are dealt to the folds evenly; `seed` is of the dealing. See `fit_calibrator`.

    Raises:
        ValueError: see `fit_calibrator`, for all patients or for all but one fold; fewer than 2 folds.

    Example:
        >>> cases = Cases.of(predictions, split="validation")
        >>> len(cross_fitted(cases, kind="platt")) == len(cases)
        True
    """
    fit_calibrator(cases, kind=kind)
    held_out, found = patient_folds(cases, folds, seed), cases.probability.copy()
    for each in range(folds):
        try:
            calibrator = fit_calibrator(cases.where(held_out != each), kind=kind)
        except ValueError as error:
            raise ValueError(f"With 1 of {folds} parts of the patients held out: {error}") from error
        found[held_out == each] = calibrated(calibrator, cases.probability[held_out == each])
    return cases.with_probability(found)


def patient_folds(cases: Cases, folds: int, seed: int) -> NDArray[np.intp]:
    """The fold of each case, (n,): patients dealt at random, those with a fracture and those without evenly.

    Raises:
        ValueError: fewer than 2 folds, or more than patients.
    """
    if folds < 2:
        raise ValueError(f"Cross-fitting needs 2 folds or more, as somebody has to be left; found {folds}.")
    present = cases.sums() > 0
    if folds > present.sum():
        raise ValueError(
            f"Cross-fitting needs a patient or more in each fold; found {folds} folds for {present.sum()} "
            "patients. Ask for fewer folds."
        )
    fractured = cases.sums(cases.label)[present] > 0
    order = np.lexsort((np.random.default_rng(seed).random(len(fractured)), fractured))
    fold = np.empty(len(present), dtype=np.intp)
    fold[present] = np.argsort(order) % folds  # by place in that order
    return fold[cases.number]
