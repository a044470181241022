"""How sure an answer is: confidences by name, higher = surer, for triage that may defer.

An answer is "fractured" at or above `p_low` and "intact" below. Each confidence says how likely that answer
is right, or how little speaks against it:

- `distance`: of the probability from `p_low`, in logits. Above `p_low` it ranks as plain probability does.
- `calibrated`: the calibrated probability that the answer is right (Platt). A cut of it is a band: deferred
  is what lies between `p_low` and a calibrated probability.
- `disagreement`: minus the standard deviation of the probability among several runs.
- `map_entropy`: minus the entropy of the map, 0 where it marks one cell, −1 where all cells weigh alike.
- `map_area`: minus the share of the map's cells above α times its highest.
- `mask_entropy` and `mask_area`: the same of the mask that a network gives beside its probability.
- `conformal`: 1 minus the conformal p-value of the other answer, class by class, patients as units: at least
  1 − ε just where the set at error ε leaves the other answer out.
- `combination`: probability that the answer is right, by a logistic model of logit, entropy, area and
  disagreement.

A map that is zero, constant or nowhere positive marks nothing: its confidence is −∞, which no cut lets pass.

Source: conformal sets by class, Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World (2005), 4.5;
with groups as units, Lee, Barber, Willett, "Distribution-free inference with hierarchical data" (2023).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cspine_helpers.decisions.thresholds import check_threshold
from cspine_helpers.evaluation.calibration import Calibrator, apply, fit_calibrator, patient_folds
from cspine_helpers.evaluation.cases import Cases, check_choice
from cspine_helpers.evaluation.reliability import score_logit
from cspine_helpers.files.paths import listing
from cspine_helpers.files.tables import require_columns
from cspine_helpers.labels import UID
from cspine_helpers.predictions import validate_predictions

Floats = NDArray[np.float64]
CONFIDENCES = (
    "distance",
    "calibrated",
    "disagreement",
    "map_entropy",
    "map_area",
    "mask_entropy",
    "mask_area",
    "conformal",
    "combination",
)
FITTED = (
    "calibrated",
    "conformal",
    "combination",
)  # on validation; judged there by `cross_fitted_confidence`
ALPHAS = (0.2, 0.4, 0.6, 0.8)  # of the highest cell of a map
ALPHA = 0.4
MASK = "mask_"  # before the names of features that are of a mask
_WITH_ALPHA = ("map_area", "mask_area", "combination")
_CONSTANT = 1e-6  # of the largest absolute value: what a map may vary by rounding alone
_CLASSES = ("intact", "fractured")
_FIT = {"conformal": _CLASSES, "combination": ("columns", "mean", "scale", "weights", "intercept")}


# ---------------------------------------------------------------------------------------------- features


def area_column(alpha: float) -> str:
    """The column of `map_features` with the share of cells above α times the highest: `area_0.4`."""
    return f"area_{alpha:g}"


def map_features(
    maps: ArrayLike, attention: ArrayLike | None = None, *, alphas: Sequence[float] = ALPHAS
) -> pd.DataFrame:
    """How concentrated maps are, each on its own grid: one row a case.

    Only the positive part of a map counts, as it is: nothing is stretched from its lowest to its highest
    cell. Entropy depends on the grid, also when normalised (a blob on 7 × 7 cells has less than the same on
    224 × 224), so that the grid is named and entropies of different grids are not compared.

    Args:
        maps: (N, T, h, w) of sequences or (N, h, w) of radiographs, raw and signed.
        attention: (N, T) by which the slices of a sequence weigh; None: as they are.
        alphas: shares of the highest cell, each in [0, 1).

    Returns:
        `entropy` of the positive part, divided by the logarithm of the number of cells, in [0, 1];
        `area_<α>`, share of cells above α times the highest; `peak` and `total`, the highest cell and the
        sum; `flat`, 1 where the map is zero, constant or nowhere positive (entropy and areas are 1 then);
        `grid`, as T×h×w.

    Example:
        >>> blob = np.zeros((1, 4, 4))
        >>> blob[0, 1, 1:3] = 2.0
        >>> map_features(blob, alphas=[0.5])[["entropy", "area_0.5", "grid"]].to_dict("records")
        [{'entropy': 0.25, 'area_0.5': 0.125, 'grid': '4×4'}]

    Raises:
        ValueError: maps of another shape, without a case, or with values that are not finite; attention of
            another shape or negative; an α outside [0, 1).
    """
    values = np.asarray(maps, dtype=np.float64)
    if values.ndim not in (3, 4) or not values.size:
        raise ValueError(
            f"Maps are (cases, slices, h, w) or (cases, h, w), with at least one case; found shape "
            f"{values.shape}. Pass Maps.values."
        )
    if bad := int((~np.isfinite(values)).reshape(len(values), -1).any(axis=1).sum()):
        raise ValueError(
            f"{bad} of {len(values)} maps hold values that are not finite. Compute them again in float32."
        )
    if wrong := [alpha for alpha in alphas if not 0 <= alpha < 1]:
        raise ValueError(f"α is a share of the highest cell, in [0, 1); found {listing(wrong)}. Correct it.")
    grid = "×".join(map(str, values.shape[1:]))
    cells = values.reshape(len(values), -1)
    flat = (np.ptp(cells, axis=1) <= _CONSTANT * np.abs(cells).max(axis=1)) | (cells.max(axis=1) <= 0)
    if attention is not None:
        weights = np.asarray(attention, dtype=np.float64)
        good = (weights >= 0) & (weights < np.inf)
        if values.ndim != 4 or weights.shape != values.shape[:2] or not good.all():
            raise ValueError(
                "Attention is (cases, slices), finite and none below 0, for maps (cases, slices, h, w); "
                f"found {weights.shape} for {values.shape}. Leave it out for radiographs."
            )
        cells = (values * weights[:, :, None, None]).reshape(len(values), -1)
    cells = np.maximum(cells, 0)
    peak, total = cells.max(axis=1), cells.sum(axis=1)
    flat |= peak <= 0  # also where all that is positive has no attention
    share = cells / np.where(flat, 1, total)[:, None]
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    entropy = -(share * logs).sum(axis=1) / np.log(max(cells.shape[1], 2))
    found = {"entropy": np.where(flat, 1.0, np.clip(entropy, 0, 1))}
    for alpha in alphas:
        above = (cells > alpha * peak[:, None]).mean(axis=1)
        found[area_column(alpha)] = np.where(flat, 1.0, above)
    return pd.DataFrame(found | {"peak": peak, "total": total, "flat": flat.astype(int), "grid": grid})


def disagreement(predictions: pd.DataFrame, others: Sequence[pd.DataFrame]) -> Floats:
    """How far several runs are apart: the standard deviation of their probabilities, (N,), a row each.

    Args:
        predictions: of the run that is judged.
        others: of the same rows by other runs, in any order and with any others; at least one.

    Example:
        >>> lower = predictions.assign(probability=predictions["probability"] / 2)
        >>> bool(np.allclose(disagreement(predictions, [lower]), predictions["probability"] / 4))
        True

    Raises:
        ValueError: no other run; one lacks rows or knows another label; names them.
    """
    table = validate_predictions(predictions)
    if isinstance(others, pd.DataFrame):
        raise ValueError("The others are a list of tables; found one table. Pass [table].")
    if not others:
        raise ValueError("Disagreement is of two runs or more; found one. Pass another run's predictions.")
    keys = pd.MultiIndex.from_frame(table[[UID, "vertebra"]])
    columns = [table["probability"].to_numpy()]
    for number, other in enumerate(others, start=1):
        rows = validate_predictions(other).set_index([UID, "vertebra"]).reindex(keys)
        if (lacking := rows["probability"].isna().to_numpy()).any():
            raise ValueError(
                f"The other run {number} of {len(others)} lacks rows that are judged ({lacking.sum()}): "
                f"{listing(f'{uid} {unit}' for uid, unit in keys[lacking])}. Predict the same splits with it."
            )
        if (odd := rows["label"].to_numpy() != table["label"].to_numpy()).any():
            raise ValueError(
                f"The other run {number} of {len(others)} was predicted with other labels ({odd.sum()}): "
                f"{listing(f'{uid} {unit}' for uid, unit in keys[odd])}. Predict the same cohort with it."
            )
        columns.append(rows["probability"].to_numpy())
    return np.std(columns, axis=0)


# -------------------------------------------------------------------------------------------- confidences


@dataclass(frozen=True)
class Confidence:
    """A confidence by name with all it takes to compute it again; plain values, as JSON holds them.

    Attributes:
        name: one of `CONFIDENCES`.
        p_low: at or above it the answer is "fractured", below "intact".
        alpha: of `map_area`, `mask_area` and `combination`: share of the highest cell; None at others.
        settings: what was fitted on validation; empty where nothing is.

    Example:
        >>> cases = Cases.of(predictions, split="validation")
        >>> fit_confidence("calibrated", cases, p_low=0.2).of(cases).round(1).max()
        np.float64(1.0)

    Raises:
        ValueError: an unknown name, a `p_low` that is no threshold, an α where none is due, no fit where one
            is.
    """

    name: str
    p_low: float
    alpha: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_choice("confidence", self.name, CONFIDENCES)
        check_threshold(self.p_low)
        if (self.alpha is not None) != (self.name in _WITH_ALPHA):
            raise ValueError(
                f"{', '.join(_WITH_ALPHA)} take an α, and only they do; found {self.name}, α {self.alpha}. "
                "Make it with fit_confidence(...)."
            )
        if lacking := [name for name in _FIT.get(self.name, ()) if name not in self.settings]:
            raise ValueError(f"The fit of {self.name} lacks {listing(lacking)}. Fit it again.")

    @property
    def title(self) -> str:
        """In words: map area (α 0.4)."""
        words = self.name.replace("_", " ")
        return f"{words} (α {self.alpha:g})" if self.name.endswith("area") else words

    def of(self, cases: Cases, features: pd.DataFrame | None = None) -> Floats:
        """The confidence of each case, (n,); −∞ where a map says nothing.

        Args:
            cases: of the level that it was fitted at.
            features: by `StudyInstanceUID` and `vertebra`, with the columns that it needs.

        Raises:
            ValueError: features are missing, or are not finite; names their rows.
        """
        p = cases.probability
        suspected = p >= self.p_low
        if self.name == "distance":
            return np.abs(score_logit(p) - score_logit(np.array([self.p_low])))
        if self.name == "calibrated":
            q = apply(Calibrator.from_record(self.settings), cases).probability
            return np.where(suspected, q, 1 - q)
        if self.name == "conformal":
            values = p_values(self.settings, p)
            return 1 - np.where(suspected, values[:, 0], values[:, 1])
        columns = _columns(self.name, self.alpha, features)
        found = _aligned(cases, features, columns)
        if self.name == "combination":
            q = _logistic(self.settings, _design(cases, found[columns]))
            sure = np.where(suspected, q, 1 - q)
        else:
            sure = -found[columns[0]].to_numpy(dtype=np.float64)
        return np.where(_flat(found), -np.inf, sure)

    def record(self) -> dict[str, Any]:
        """All of it, as JSON holds it; `Confidence.from_record` is the way back."""
        return asdict(self) | {"settings": dict(self.settings)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """The confidence of a `record`.

        Raises:
            ValueError: fields are missing or unknown.
        """
        names = {"name", "p_low", "alpha", "settings"}
        if not isinstance(record, Mapping):
            raise ValueError(
                f"A confidence's record is a mapping; found {type(record).__name__}. Fit it again."
            )
        if odd := names.symmetric_difference(record):
            raise ValueError(
                f"A confidence's record has the fields {listing(sorted(names))}; missing or unknown: "
                f"{listing(sorted(odd))}. Fit it again."
            )
        return cls(**record)


def fit_confidence(
    name: str,
    cases: Cases,
    features: pd.DataFrame | None = None,
    *,
    p_low: float,
    alpha: float = ALPHA,
) -> Confidence:
    """A confidence, with what it takes of the validation split: a calibrator, conformal scores, weights.

    What is fitted has seen these cases: there it is judged by `cross_fitted_confidence`.

    Args:
        name: one of `CONFIDENCES`.
        cases: of the validation split.
        features: by `StudyInstanceUID` and `vertebra`: `disagreement`, and columns of `map_features`; of a
            mask the same with `mask_` before their names. Of `combination` those that are there are used.
        p_low: at or above it the answer is "fractured".
        alpha: of `map_area`, `mask_area` and `combination`.

    Example:
        >>> cases = Cases.of(predictions, split="validation")
        >>> fit_confidence("distance", cases, p_low=0.2).name
        'distance'

    Raises:
        ValueError: cases of another split; see `fit_calibrator`; one class is absent; features are missing.
    """
    cases.require("validation")
    check_choice("confidence", name, CONFIDENCES)
    takes = alpha if name in _WITH_ALPHA else None
    settings: Mapping[str, Any] = {}
    if name == "calibrated":
        settings = fit_calibrator(cases, kind="platt").record()
    elif name == "conformal":
        settings = _conformal(cases)
    elif name == "combination":
        settings = _combination(cases, features, alpha)
    else:
        _columns(name, takes, features)  # refused here, not when it is asked
    return Confidence(name, float(p_low), takes, settings)


def cross_fitted_confidence(
    name: str,
    cases: Cases,
    features: pd.DataFrame | None = None,
    *,
    p_low: float,
    alpha: float = ALPHA,
    folds: int = 5,
    seed: int = 0,
) -> Floats:
    """The confidence of each validation case, by a fit that saw other patients only, (n,).

    What is not fitted is what `Confidence.of` says. See `fit_confidence`; `seed` is of the dealing.

    Example:
        >>> cases = Cases.of(predictions, split="validation")
        >>> len(cross_fitted_confidence("conformal", cases, p_low=0.2)) == len(cases)
        True

    Raises:
        ValueError: see `fit_confidence`, for all patients but one fold; fewer than 2 folds.
    """
    whole = fit_confidence(name, cases, features, p_low=p_low, alpha=alpha)
    if name not in FITTED:
        return whole.of(cases, features)
    fold, found = patient_folds(cases, folds, seed), np.empty(len(cases))
    for each in range(folds):
        out = fold == each
        fit = fit_confidence(name, cases.where(~out), features, p_low=p_low, alpha=alpha)
        found[out] = fit.of(cases.where(out), features)
    return found


def needs_alpha(name: str) -> bool:
    """Whether a confidence takes an α."""
    return name in _WITH_ALPHA


def usable(features: pd.DataFrame | None) -> list[str]:
    """The confidences that a table of features allows, the plainest first.

    Args:
        features: as `fit_confidence` takes them.
    """
    there: set[str] = set() if features is None else set(map(str, features.columns))
    needs: dict[str, set[str]] = {
        "disagreement": {"disagreement"},
        "map_entropy": {"entropy"},
        "map_area": {area_column(ALPHA)},
        "mask_entropy": {f"{MASK}entropy"},
        "mask_area": {f"{MASK}{area_column(ALPHA)}"},
    }
    found = [name for name in CONFIDENCES if needs.get(name, set()) <= there]
    some = any(each & there for each in needs.values())
    return found if some else [name for name in found if name != "combination"]


def p_values(settings: Mapping[str, Any], probability: ArrayLike) -> Floats:
    """Conformal p-values (n, 2) of "intact" and "fractured": how odd each label would be.

    The set at error ε holds the labels whose p-value is above ε. Whatever its true label, the set of a case
    of a new patient, drawn among the patient's cases of that label, holds it with probability 1 − ε at least.

    Args:
        settings: of a conformal `Confidence`.
        probability: (n,).
    """
    p = np.asarray(probability, dtype=np.float64)
    columns = []
    for name, sign in zip(_CLASSES, (-1, 1), strict=True):  # odd: high ones among intact, low ones otherwise
        scores = sign * np.array(settings[name]["probability"])
        order = np.argsort(scores)
        weights = np.append(0, np.cumsum(np.array(settings[name]["weight"])[order]))
        as_odd = weights[np.searchsorted(scores[order], sign * p, side="right")]
        columns.append((1 + as_odd) / (1 + settings[name]["patients"]))
    return np.stack(columns, axis=1)


def _conformal(cases: Cases) -> dict[str, Any]:
    """Of each class the probabilities, what each weighs (a patient's sum to 1), and how many patients."""
    _require_both(cases, "Conformal sets by class")
    found = {}
    for label, name in enumerate(_CLASSES):
        rows = cases.label == label
        _, whose, many = np.unique(cases.patient[rows], return_inverse=True, return_counts=True)
        found[name] = {
            "probability": cases.probability[rows].tolist(),
            "weight": (1 / many[whose]).tolist(),
            "patients": len(many),
        }
    return found


def _combination(cases: Cases, features: pd.DataFrame | None, alpha: float) -> dict[str, Any]:
    """The logistic model: columns, their mean and scale, weights, intercept; fitted where a map speaks."""
    from sklearn.linear_model import LogisticRegression

    columns = _columns("combination", alpha, features)
    found = _aligned(cases, features, columns)
    speaks = ~_flat(found)
    cases, found = cases.where(speaks), found[speaks]
    _require_both(cases, "A combination")
    table = _design(cases, found[columns])
    mean, scale = table.mean(axis=0), table.std(axis=0)
    scale = np.where(scale > 0, scale, 1)
    fit = LogisticRegression(C=1.0, solver="newton-cholesky", max_iter=1000, tol=1e-8)
    fit.fit((table - mean) / scale, cases.label)
    return {
        "columns": ["logit", *columns],
        "mean": mean.tolist(),
        "scale": scale.tolist(),
        "weights": fit.coef_[0].tolist(),
        "intercept": float(fit.intercept_[0]),
    }


def _require_both(cases: Cases, what: str) -> None:
    """Refuse a fit on one class."""
    positives = int(cases.label.sum())
    if not 0 < positives < len(cases):
        raise ValueError(
            f"{what} needs fractured and intact cases of validation; found {positives} fractured of "
            f"{len(cases)}. Use more studies."
        )


def _logistic(settings: Mapping[str, Any], table: Floats) -> Floats:
    from scipy.special import expit

    mean, scale, weights = (np.array(settings[name]) for name in ("mean", "scale", "weights"))
    found: Floats = expit(settings["intercept"] + (table - mean) / scale @ weights)
    return found


def _design(cases: Cases, columns: pd.DataFrame) -> Floats:
    """The logit and the features, (n, K)."""
    return np.column_stack([score_logit(cases.probability), columns.to_numpy(dtype=np.float64)])


def _columns(name: str, alpha: float | None, features: pd.DataFrame | None) -> list[str]:
    """The features that a confidence needs; of `combination`, those that are there.

    Raises:
        ValueError: they are missing.
    """
    if features is not None and not isinstance(features, pd.DataFrame):
        raise ValueError(
            f"Features are a table, one row a case; found {type(features).__name__}. Make it with "
            "map_features(...)."
        )
    there = [] if features is None else list(features.columns)
    area = "" if alpha is None else area_column(alpha)
    of_maps = ["entropy", area, f"{MASK}entropy", f"{MASK}{area}"]
    if name == "combination":
        found = [column for column in (*of_maps, "disagreement") if column in there]
        if not found:
            raise ValueError(
                f"A combination needs features beside the logit: entropy, {area} or disagreement; found "
                f"{listing(there) or 'none'}. Make them with map_features(...) or disagreement(...)."
            )
        return found
    kind, _, of = name.rpartition("_")
    needed = {"entropy": ["entropy"], "area": [area], "disagreement": ["disagreement"]}.get(of, [])
    needed = [f"{MASK}{column}" if kind == "mask" else column for column in needed]
    if lacking := [column for column in needed if column not in there]:
        raise ValueError(
            f"The confidence {name} needs the feature {listing(lacking)}; found {listing(there) or 'none'}. "
            "Make it with map_features(...) or disagreement(...)."
        )
    return needed


def _flat(found: pd.DataFrame) -> NDArray[np.bool_]:
    """Where a map or a mask among the features says nothing, (n,)."""
    marks = [column for column in found.columns if column.endswith("flat")]
    return (found[marks] == 1).any(axis=1).to_numpy()


def _aligned(cases: Cases, features: pd.DataFrame | None, columns: list[str]) -> pd.DataFrame:
    """The features' row of each case: `columns`, and which maps (`flat`) or masks (`mask_flat`) are flat.

    Raises:
        ValueError: cases without a row, with two, or with a value that is not finite; names them.
    """
    assert features is not None, "_columns refuses no features"
    of = {MASK if column.startswith(MASK) else "" for column in columns if column != "disagreement"}
    wanted = [*columns, *(f"{prefix}flat" for prefix in sorted(of))]
    require_columns(features, [UID, "vertebra", *wanted], what="The table of features")
    keys = pd.MultiIndex.from_arrays([cases.study, cases.unit], names=[UID, "vertebra"])
    table = features.set_index([UID, "vertebra"])[wanted]
    if (twice := table.index.duplicated()).any():
        named = listing(f"{uid} {unit}" for uid, unit in table.index[twice])
        raise ValueError(f"The table of features holds cases twice ({twice.sum()}): {named}. Keep one row.")
    found = table.reindex(keys).apply(pd.to_numeric, errors="coerce")
    bad = ~np.isfinite(found.to_numpy(dtype=np.float64)).all(axis=1)
    if bad.any():
        named = listing(f"{uid} {unit}" for uid, unit in keys[bad])
        raise ValueError(
            f"Cases without finite features {listing(wanted)} ({bad.sum()}): {named}. Compute the maps and "
            "predictions of all of them."
        )
    return found.reset_index(drop=True)
