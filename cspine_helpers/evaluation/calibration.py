"""Calibrators judged on patients who had no part in the fit, and one chosen so, without the test split.

Probabilities put right: calibrators, fitted on the validation split and on no other.

A calibrator belongs to one level (`metrics.LEVELS`): one fitted on vertebrae says nothing about patients.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, cast, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cspine_helpers.evaluation.cases import (
    LEVELS,
    Aggregation,
    Level,
    default_aggregation,
    resampled_units,
    rows_at,
    scored_rows,
)
from cspine_helpers.evaluation.reliability import logistic, logit, parted, sigmoid
from cspine_helpers.evaluation.resampling import patient_sums
from cspine_helpers.files.paths import listing
from cspine_helpers.metrics import check_scores, log_losses
from cspine_helpers.predictions import validation_rows

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
        level: the one of `metrics.LEVELS` that it was fitted at, and holds for.
        patients: how many patients it was fitted on.
        cases: how many rows.
        positives: how many of them are fractured.
        aggregation: at level `patient`, how vertebrae became patients, in a word; empty at other levels.
        slope: of the logit; 1 for `isotonic`.
        intercept: of the logit; 0 for `temperature` and `isotonic`.
        scores: (K,) rising, for `isotonic`.
        probabilities: (K,) never falling, for `isotonic`.
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
        _check_kind(self.kind)
        if self.level not in LEVELS:
            raise ValueError(f"Unknown level {self.level!r}. Choose one of {', '.join(LEVELS)}.")
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
        """Share of fractured rows among those it was fitted on; what `prevalence.restate` starts from."""
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


def _check_kind(kind: str) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"Unknown kind {kind!r}. Choose one of {', '.join(get_args(Kind))}.")


def fit_calibrator(
    predictions: pd.DataFrame, *, kind: Kind, level: str = "all", aggregation: str | None = None
) -> Calibrator:
    """Fit a calibrator by least log loss (`temperature`, `platt`) or least squares (`isotonic`).

    Temperature only sharpens or softens: it leaves 0.5 where it is. Platt also shifts. Isotonic regression
    takes any rising form; where its first step holds no fracture or its last nothing else, it would claim
    certainty, so that a first step of n rows becomes 1 / (n + 2) and a last one (n + 1) / (n + 2), as far as
    its neighbour lets it.

    Args:
        predictions: predictions table, or one of patients; validation rows only.
        kind: `temperature`, `platt` or `isotonic`.
        level: one of `metrics.LEVELS`; patients are those of `metrics.patient_level`.
        aggregation: of a table of patients: how they were made of vertebrae, in a word, as "noisy or".

    Raises:
        ValueError: see `reliability.scored_rows`; rows of another split than validation; fewer patients of
            either kind than `LEAST_PATIENTS`; scores that part the classes without a mistake, or rank them
            the wrong way round, so that no best fit exists; an aggregation missing, or where none belongs.

    Source: Guo et al., ICML (2017) 1321-1330, temperature; Platt, Advances in Large Margin Classifiers (1999)
    61-74; Zadrozny & Elkan, KDD (2002) 694-699, isotonic; rule of succession: Laplace (1774).
    """
    _check_kind(kind)
    rows = scored_rows(predictions, level, one_split=False)
    aggregation = _aggregation(predictions, level, aggregation)
    if others := sorted(set(rows["split"]) - {"validation"}):
        raise ValueError(
            f"A calibrator is fitted on validation only; the table also holds, or only holds, rows of "
            f"{listing(others)}. Pass predictions[predictions['split'] == 'validation']."
        )
    y, p = rows["label"].to_numpy(), rows["probability"].to_numpy()
    size = (resampled_units(rows).nunique(), len(rows), int(y.sum()))
    kinds = (patient_sums(rows, np.column_stack([y, 1 - y])) > 0).sum(axis=0)
    least = LEAST_PATIENTS[kind]
    if kinds.min() < least:
        simpler = [name for name, count in LEAST_PATIENTS.items() if kinds.min() >= count]
        case = "vertebra" if level == "all" else level
        both = f"patients with a fractured {case} and {least} with an intact one"
        both = f"fractured patients and {least} intact ones" if level == "patient" else both
        raise ValueError(
            f"{kind} needs {least} {both}; found {kinds[0]} and {kinds[1]} of {size[0]} patients. "
            f"Use {' or '.join([*simpler, 'more studies'])}."
        )
    if kind == "isotonic":
        scores, values = _isotonic(y, p)
        slope, intercept, rise = 1.0, 0.0, values[-1] - values[0]
    else:
        scores, values, z = (), (), logit(p)
        _check_overlap(y, z, kind)
        slope, intercept = logistic(y, np.stack([z, np.ones_like(z)][: 1 + (kind == "platt")], axis=1))
        rise = slope
    if rise <= 0:
        raise ValueError(
            f"Higher scores do not go with more fractures at level {level!r} (slope {rise:.3g}), and a "
            "calibrator does not turn a ranking round. Check labels and scores; the model may know nothing."
        )
    return Calibrator(kind, level, *size, aggregation, slope, intercept, scores, values)


def _aggregation(predictions: pd.DataFrame, level: str, given: str | None) -> str:
    """How the table's vertebrae become, or became, the rows at a level."""
    by_patient = "vertebra" not in predictions.columns
    if by_patient != bool(given):
        raise ValueError(
            f"aggregation says how a table of patients was made of vertebrae, as 'noisy or', and belongs to "
            f"such a table only; found {given!r} with a table of {'patients' if by_patient else 'vertebrae'}."
        )
    return given or (default_aggregation(predictions).name if level == "patient" else "")


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


def apply(
    calibrator: Calibrator, predictions: pd.DataFrame, *, aggregation: str | None = None
) -> pd.DataFrame:
    """The rows at the calibrator's level, of any split, with calibrated probabilities.

    For level `all` that is the predictions table again; for `patient` a table of patients, and for one of C1
    … C7 its rows. The highest of calibrated vertebrae is not a calibrated patient: fit one at that level.

    Args:
        calibrator: what to apply.
        predictions: predictions table, or one of patients.
        aggregation: of a table of patients, see `fit_calibrator`.

    Raises:
        ValueError: see `reliability.scored_rows`; the patients were made of vertebrae in another way than
            those that the calibrator was fitted on.
    """
    rows = scored_rows(predictions, calibrator.level, one_split=False)
    found = _aggregation(predictions, calibrator.level, aggregation)
    if found != calibrator.aggregation:
        raise ValueError(
            f"The calibrator was fitted on patients made by {calibrator.aggregation!r}; these are made by "
            f"{found!r}. Make them the same way, or fit another."
        )
    return rows.assign(probability=calibrated(calibrator, rows["probability"])).reset_index(drop=True)


def calibrated(calibrator: Calibrator, probabilities: ArrayLike) -> NDArray[np.float64]:
    """Calibrated probabilities (N,) of scores (N,), which are of the calibrator's level.

    Raises:
        ValueError: a score is missing or outside [0, 1].
    """
    _, p = check_scores(np.zeros(np.shape(probabilities)), probabilities)
    if calibrator.kind == "isotonic":
        return np.interp(p, calibrator.scores, calibrator.probabilities)
    return sigmoid(calibrator.slope * logit(p) + calibrator.intercept)


AS_PREDICTED = "as predicted"


def choose_calibrator(
    predictions: pd.DataFrame, *, level: Level, aggregation: Aggregation | None = None
) -> tuple[Calibrator | None, pd.DataFrame]:
    """Choose a kind of calibrator by the lowest cross-fitted log loss, and fit it on all of validation.

    The probabilities as predicted take part, and win where no kind helps.

    Args:
        predictions: predictions table; splits other than validation are not looked at.
        level: `vertebra`, one calibrator for all of them, or `patient`.
        aggregation: how a patient's vertebrae become one probability; at patient level, and only there.

    Returns:
        The calibrator, which `frozen.freeze` takes; None: as predicted. And columns `kind, log_loss,
        refused`, one row a kind: the log loss on patients that were not fitted on, or why there is none.

    Example:
        >>> calibrator, scores = choose_calibrator(predictions, level="vertebra")
        >>> calibrator.kind
        'platt'

    Raises:
        ValueError: the table breaks the schema or has no validation rows; see `levels.rows_at`.
    """
    rows = rows_at(validation_rows(predictions), level, aggregation)
    options: dict[str, Any] = {} if aggregation is None else {"level": level, "aggregation": aggregation.name}
    losses = {AS_PREDICTED: float(log_losses(rows["label"], rows["probability"]).mean())}
    refused = {}
    for kind in get_args(Kind):
        try:
            found = cross_fitted(rows, kind=kind, **options)
        except ValueError as error:
            refused[kind] = str(error)
        else:
            losses[kind] = float(log_losses(found["label"], found["probability"]).mean())
    scores = pd.DataFrame(
        [(kind, losses.get(kind, np.nan), refused.get(kind, "")) for kind in (AS_PREDICTED, *get_args(Kind))],
        columns=["kind", "log_loss", "refused"],
    )
    best = min(losses, key=losses.__getitem__)
    chosen = None if best == AS_PREDICTED else fit_calibrator(rows, kind=cast(Kind, best), **options)
    return chosen, scores


def cross_fitted(
    predictions: pd.DataFrame,
    *,
    kind: Kind,
    level: str = "all",
    aggregation: str | None = None,
    folds: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """The validation rows at a level, each calibrated by a calibrator that saw other patients only.

    So kinds can be compared, and calibrated probabilities judged, without the test split. Patients with and
    without a fracture are dealt to the folds evenly.

    Args:
        predictions: see `fit_calibrator`.
        kind: see there.
        level: see there.
        aggregation: see there.
        folds: how many calibrators are fitted, each without one part of the patients.
        seed: of the dealing.

    Raises:
        ValueError: see `fit_calibrator`, for all patients or for all but one fold; fewer than 2 folds.
    """
    fit_calibrator(predictions, kind=kind, level=level, aggregation=aggregation)
    if folds < 2:
        raise ValueError(f"Cross-fitting needs 2 folds or more, as somebody has to be left; found {folds}.")
    rows = scored_rows(predictions, level)
    whose = resampled_units(rows)
    fractured = rows.groupby(whose, sort=False)["label"].max()
    order = np.lexsort((np.random.default_rng(seed).random(len(fractured)), fractured))
    fold = pd.Series(np.argsort(order) % folds, index=fractured.index)  # by place in that order
    found = rows["probability"].to_numpy(copy=True)
    for held_out in range(folds):
        others = predictions[resampled_units(predictions).map(fold) != held_out]
        try:
            calibrator = fit_calibrator(others, kind=kind, level=level, aggregation=aggregation)
        except ValueError as error:
            raise ValueError(f"With 1 of {folds} parts of the patients held out: {error}") from error
        here = (whose.map(fold) == held_out).to_numpy()
        found[here] = calibrated(calibrator, rows["probability"][here])
    return rows.assign(probability=found).reset_index(drop=True)
