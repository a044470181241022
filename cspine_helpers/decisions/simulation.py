"""The violation rate of guarantees: thresholds chosen on many sets of patients, whose true recall is known.

Source: Cervical Spine Fracture Detection Dataset, Copyright RSNA, 2023 (fractures per patient).
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from cspine_helpers.decisions.guarantees import Average, RecallTarget, guarantee_recall
from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.labels import VERTEBRAE

METHODS = ("guaranteed", "validation", "vertebrae as if independent")
TARGETS = {  # what recall is averaged over → in words
    "patient": "patients",
    "vertebra": "vertebrae, pooled",
    "vertebra, patient mean": "vertebrae, mean of patients",
}
_FRACTURES = np.array([623, 239, 64, 26, 7, 2, 0]) / 961  # patients with 1 … 7 fractured vertebrae
_COUNTS = np.arange(1, len(VERTEBRAE) + 1)


def simulate_guarantee(
    *,
    patients: int = 200,
    recall: float = 0.9,
    delta: float = 0.1,
    redraws: int = 2000,
    truth: "Truth | Population | None" = None,
    seed: int = 0,
) -> pd.DataFrame:
    """How often a threshold's true recall is below `recall`, over many sets of patients it is chosen on.

    Three methods: `guaranteed` (see `guarantee_recall`); `validation`, the highest threshold with that recall
    on the patients drawn; and the guarantee with each vertebra counted as if it were a patient of its own.

    Args:
        patients: with a fracture, in each redraw.
        recall: guaranteed.
        delta: the violation rate allowed.
        redraws: how many sets of patients.
        truth: the world they come from; None: the default one.
        seed: of the redraws.

    Returns:
        One row for each of `TARGETS` and method: `target, method, redraws, no_threshold` (redraws without a
        threshold, which violate nothing), `violations, violation_rate` (violations / redraws), `low, high`
        (its exact 95 % interval), `recall_5, recall_50, recall_95` (percentiles of true recall) and
        `specificity` (mean, true), the last four NaN where every redraw is without a threshold.

    Example:
        >>> simulate_guarantee(redraws=5)[["target", "method"]].iloc[0].tolist()
        ['patient', 'guaranteed']

    Raises:
        ValueError: fewer than one patient or redraw, or see `RecallTarget`.
    """
    from scipy.stats import binomtest

    if patients < 1 or redraws < 1:
        raise ValueError(f"At least one patient and one redraw; found {patients} and {redraws}. Give more.")
    truth, rng = truth or Truth(), np.random.default_rng(seed)
    drawn = [_thresholds(*truth.draw(patients, rng), recall, delta) for _ in range(redraws)]
    rows = []
    for target, method in drawn[0]:
        thresholds = np.array([each[target, method] for each in drawn], dtype=np.float64)  # None: NaN
        thresholds = thresholds[~np.isnan(thresholds)]
        true = truth.recall(thresholds, target)
        violations = int((true < recall - 1e-12).sum())
        interval = binomtest(violations, redraws).proportion_ci()
        found = np.full(4, np.nan)
        if len(thresholds):
            found = np.append(np.percentile(true, [5, 50, 95]), truth.specificity(thresholds, target).mean())
        counts = (redraws, redraws - len(thresholds), violations, violations / redraws)
        rows.append((target, method, *counts, interval.low, interval.high, *found))
    names = (
        "target method redraws no_threshold violations violation_rate low high recall_5 recall_50 recall_95"
    )
    return pd.DataFrame(rows, columns=[*names.split(), "specificity"])


def _thresholds(
    fractured: NDArray[np.bool_], probabilities: NDArray[np.float64], recall: float, delta: float
) -> dict[tuple[str, str], float | None]:
    """The threshold of every target and method on one set of patients."""
    patients = np.arange(len(fractured))
    best = probabilities.max(axis=1)
    whole = (np.ones(len(patients), dtype=int), best, patients)
    labels, scores = fractured.ravel(), probabilities.ravel()
    every = (labels, scores, np.repeat(patients, fractured.shape[1]))
    single = (np.ones(labels.sum(), dtype=int), scores[labels], np.arange(labels.sum()))
    guaranteed, validation, independent = METHODS
    patient, pooled, mean = TARGETS

    def choose(
        rows: tuple[NDArray, NDArray, NDArray], level: str, average: Average = "vertebrae"
    ) -> float | None:
        target = RecallTarget(recall, level=level, average=average, delta=delta)
        return guarantee_recall(*rows, target).threshold

    return {
        (patient, guaranteed): choose(whole, "patient"),
        (patient, validation): _just(best, recall),
        (pooled, guaranteed): choose(every, "vertebra"),
        (pooled, validation): _just(scores[labels], recall),
        (pooled, independent): choose(single, "patient"),
        (mean, guaranteed): choose(every, "vertebra", "patients"),
    }


def _just(positives: NDArray[np.float64], recall: float) -> float:
    """The highest threshold with at least that recall on these positives."""
    allowed = int(len(positives) * (1 - recall) + 1e-9)
    return float(np.sort(positives)[allowed])


@dataclass(frozen=True)
class Truth:
    """A world that patients are drawn from; by default about as RSNA 2022 looks to a model.

    Logits are normal with variance 1, of which patients' vertebrae share a part, as easy and hard CTs do;
    intact vertebrae have mean 0. How many are fractured follows RSNA 2022.

    Attributes:
        separation: mean logit of a patient's only fracture; intact vertebrae have 0.
        severity: added for each further fracture.
        correlation: share of the variance that a patient's vertebrae have in common, below 1.
    """

    separation: float = 1.1
    severity: float = -0.1
    correlation: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.correlation < 1:
            raise ValueError(f"correlation must be in [0, 1); found {self.correlation}. Give a fraction.")

    def draw(self, patients: int, rng: np.random.Generator) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Fractured or not, and the probabilities, of patients with a fracture, both (patients, 7)."""
        fractured = rng.choice(_COUNTS, patients, p=_FRACTURES)[:, None] >= _COUNTS
        noise = np.sqrt(1 - self.correlation) * rng.standard_normal(fractured.shape)
        shared = np.sqrt(self.correlation) * rng.standard_normal((patients, 1))
        means = np.where(fractured, self._means()[fractured.sum(axis=1) - 1, None], 0)
        return fractured, expit(means + shared + noise)

    def recall(self, thresholds: ArrayLike, target: str) -> NDArray[np.float64]:
        """True recall at each threshold, by one of `TARGETS`."""
        missed, weights = self._below(thresholds, self._means())  # (thresholds, counts, nodes)
        share = _FRACTURES * _COUNTS if target == "vertebra" else _FRACTURES
        if target == "patient":  # all of the fractured and all of the intact are below
            intact, _ = self._below(thresholds, np.zeros(1))
            missed = missed ** _COUNTS[:, None] * intact ** (len(_COUNTS) - _COUNTS)[:, None]
        lost: NDArray[np.float64] = np.einsum("tcq,c,q->t", missed, share / share.sum(), weights)
        return 1.0 - lost

    def specificity(self, thresholds: ArrayLike, target: str) -> NDArray[np.float64]:
        """Of intact vertebrae, or of patients without a fracture, the true share below each threshold."""
        intact, weights = self._below(thresholds, np.zeros(1))
        together = len(_COUNTS) if target == "patient" else 1
        below: NDArray[np.float64] = np.einsum("tq,q->t", intact[:, 0] ** together, weights)
        return below

    def _means(self) -> NDArray[np.floating]:
        return self.separation + self.severity * (_COUNTS - 1)

    def _below(self, thresholds: ArrayLike, means: NDArray) -> tuple[NDArray, NDArray]:
        """How likely a vertebra lies below, (thresholds, means, nodes of the shared part; Gauss–Hermite)."""
        from scipy.special import logit, ndtr

        nodes, weights = np.polynomial.hermite_e.hermegauss(80)
        logits = logit(np.atleast_1d(np.asarray(thresholds, dtype=np.float64)))[:, None, None]
        distance = logits - means[:, None] - np.sqrt(self.correlation) * nodes
        return ndtr(distance / np.sqrt(1 - self.correlation)), weights / weights.sum()


class Population:
    """A world of the patients of a predictions table, drawn with replacement, correlated as they are.

    Raises:
        ValueError: no patient, or every patient, has a fracture.
    """

    def __init__(self, predictions: pd.DataFrame) -> None:
        cases = Cases.of(predictions)
        probabilities, labels = cases.wide(), cases.with_probability(cases.label).wide()
        ill = cases.studies["label"].to_numpy() == 1
        if ill.all() or not ill.any():
            raise ValueError(f"{ill.sum()} of {len(ill)} patients have a fracture; both kinds are needed.")
        self.intact = {
            "patient": np.nanmax(probabilities[~ill], axis=1),
            "vertebra": probabilities[labels == 0],
        }
        self.fractured = labels[ill] == 1
        self.probabilities = np.nan_to_num(probabilities[ill])  # a vertebra outside the CT is never found

    def draw(self, patients: int, rng: np.random.Generator) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """As `Truth.draw`."""
        drawn = rng.integers(len(self.fractured), size=patients)
        return self.fractured[drawn], self.probabilities[drawn]

    def recall(self, thresholds: ArrayLike, target: str) -> NDArray[np.float64]:
        """As `Truth.recall`."""
        if target == "patient":
            return 1 - _share_below(self.probabilities.max(axis=1), thresholds)
        scores, counts = self.probabilities[self.fractured], self.fractured.sum(axis=1)
        weights = None if target == "vertebra" else np.repeat(1 / counts, counts)
        return 1 - _share_below(scores, thresholds, weights)

    def specificity(self, thresholds: ArrayLike, target: str) -> NDArray[np.float64]:
        """As `Truth.specificity`."""
        return _share_below(self.intact["patient" if target == "patient" else "vertebra"], thresholds)


def _share_below(
    scores: NDArray, thresholds: ArrayLike, weights: NDArray | None = None
) -> NDArray[np.float64]:
    order = np.argsort(scores)
    sums = np.cumsum(np.ones(len(scores)) if weights is None else weights[order])
    return np.append(0, sums)[np.searchsorted(scores[order], thresholds)] / sums[-1]
