"""How often promises about recall are broken: patients drawn again and again from a known truth.

The logits of a patient's vertebrae share a part, as easy and hard CTs do: each is normal with variance 1, of
which the share `correlation` belongs to the patient. Intact vertebrae have mean 0, fractured ones
`separation` and `severity` more for each further fracture of the patient. How many are fractured follows
RSNA 2022. True recall at any threshold is an integral over the patient's part (Gauss–Hermite quadrature).

`Population` draws from real predictions instead, with replacement: their patients are then all there are.

Source: Cervical Spine Fracture Detection Dataset, Copyright RSNA, 2023 (fractures per patient).
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cspine_helpers.decisions.guarantees import Average, guarantee_recall
from cspine_helpers.evaluation.cases import at_level
from cspine_helpers.labels import UID, VERTEBRAE

_FRACTURES = np.array([623, 239, 64, 26, 7, 2, 0]) / 961  # patients with 1 … 7 fractured vertebrae
_COUNTS = np.arange(1, len(VERTEBRAE) + 1)
METHODS = ("guaranteed", "validation", "vertebrae as if independent")
_TARGETS = {
    "patient": "patients",
    "vertebra": "vertebrae, pooled",
    "vertebra, patients alike": "vertebrae, mean of patients",
}


@dataclass(frozen=True)
class Truth:
    """A world that patients are drawn from; see the module. As it stands, about as RSNA 2022 met a model.

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
            raise ValueError(f"correlation lies in [0, 1); found {self.correlation}. Give a fraction.")

    def draw(self, patients: int, rng: np.random.Generator) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Fractured or not, and the probabilities, of patients with a fracture, both (patients, 7)."""
        fractured = rng.choice(_COUNTS, patients, p=_FRACTURES)[:, None] >= _COUNTS
        noise = np.sqrt(1 - self.correlation) * rng.standard_normal(fractured.shape)
        shared = np.sqrt(self.correlation) * rng.standard_normal((patients, 1))
        means = np.where(fractured, self._means()[fractured.sum(axis=1) - 1, None], 0)
        return fractured, 1 / (1 + np.exp(-(means + shared + noise)))

    def recall(self, thresholds: ArrayLike, target: str) -> NDArray[np.float64]:
        """True recall at each threshold; `target` is `patient`, `vertebra`, or `vertebra, patients alike`."""
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
        """How likely a vertebra lies below, (thresholds, means, nodes), at nodes of the patient's part."""
        from scipy.special import logit, ndtr

        nodes, weights = np.polynomial.hermite_e.hermegauss(80)
        logits = logit(np.atleast_1d(np.asarray(thresholds, dtype=np.float64)))[:, None, None]
        distance = logits - means[:, None] - np.sqrt(self.correlation) * nodes
        return ndtr(distance / np.sqrt(1 - self.correlation)), weights / weights.sum()


class Population:
    """A world of the patients of a predictions table, with as much correlation as they have.

    Raises:
        ValueError: no patient, or every patient, has a fracture.
    """

    def __init__(self, predictions: pd.DataFrame) -> None:
        def wide(name: str) -> NDArray:
            rows = at_level(predictions, "all").pivot_table(name, UID, "vertebra", sort=False)
            return rows.reindex(columns=list(VERTEBRAE)).to_numpy()

        probabilities, labels = wide("probability"), wide("label")
        ill = (labels == 1).any(axis=1)
        if ill.all() or not ill.any():
            raise ValueError(f"{ill.sum()} of {len(ill)} patients have a fracture; both kinds are needed.")
        self.intact = {
            "patient": np.nanmax(probabilities[~ill], axis=1),
            "vertebra": probabilities[labels == 0],
        }
        self.fractured = labels[ill] == 1
        self.probabilities = np.nan_to_num(
            probabilities[ill]
        )  # vertebrae that a CT does not show: never found

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


def simulate_guarantee(
    *,
    patients: int = 200,
    recall: float = 0.9,
    delta: float = 0.1,
    redraws: int = 2000,
    truth: Truth | Population | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """How often a threshold's true recall is below `recall`, over many sets of patients it is chosen on.

    Three methods: `guaranteed` (see `guarantees`); `validation`, the highest threshold with that recall on
    the patients drawn; and the guarantee with each vertebra counted as if it were a patient of its own.

    Args:
        patients: with a fracture, in each redraw.
        recall: promised.
        delta: how often the promise may be broken.
        redraws: how many sets of patients.
        truth: the world they come from; None: the default one.
        seed: of the redraws.

    Returns:
        One row for each target (`patient`, `vertebra` pooled, `vertebra, patients alike`) and method:
        `target, method, redraws, unpromised` (redraws without a threshold, which break nothing), `broken,
        share` (broken / redraws), `low, high` (its exact 95 % interval), `recall_5, recall_50, recall_95`
        (percentiles of true recall) and `specificity` (mean, true), the last four NaN where every redraw is
        without a threshold.

    Raises:
        ValueError: fewer than one patient or redraw, or see `guarantees.guarantee_recall`.
    """
    from scipy.stats import binomtest

    if patients < 1 or redraws < 1:
        raise ValueError(f"At least one patient and one redraw; found {patients} and {redraws}. Give more.")
    truth, rng = truth or Truth(), np.random.default_rng(seed)
    chosen: dict[tuple[str, str], list[float]] = {}
    for _ in range(redraws):
        for key, threshold in _thresholds(*truth.draw(patients, rng), recall, delta).items():
            chosen.setdefault(key, []).append(np.nan if threshold is None else threshold)
    rows = []
    for (target, method), thresholds in chosen.items():
        promised = np.array(thresholds)[~np.isnan(thresholds)]
        true = truth.recall(promised, target)
        broken = int((true < recall - 1e-12).sum())
        interval = binomtest(broken, redraws).proportion_ci()
        known = len(promised) > 0
        percentiles = np.percentile(true, [5, 50, 95]) if known else np.full(3, np.nan)
        specificity = truth.specificity(promised, target).mean() if known else np.nan
        counts = (redraws, redraws - len(promised), broken, broken / redraws)
        rows.append((target, method, *counts, interval.low, interval.high, *percentiles, specificity))
    names = "target method redraws unpromised broken share low high recall_5 recall_50 recall_95 specificity"
    return pd.DataFrame(rows, columns=names.split())


def _thresholds(
    fractured: NDArray[np.bool_], probabilities: NDArray[np.float64], recall: float, delta: float
) -> dict[tuple[str, str], float | None]:
    """The threshold of every target and method on one set of patients."""
    patients = np.arange(len(fractured))
    best = probabilities.max(axis=1)
    whole = (np.ones(len(patients), dtype=int), best, patients)
    who, labels, scores = np.repeat(patients, fractured.shape[1]), fractured.ravel(), probabilities.ravel()
    every = (labels, scores, who)
    single = (np.ones(fractured.sum(), dtype=int), scores[labels], np.arange(fractured.sum()))
    guaranteed, validation, independent = METHODS
    pooled, alike = "vertebra", "vertebra, patients alike"

    def choose(rows: tuple[NDArray, NDArray, NDArray], level: str, average: Average) -> float | None:
        return guarantee_recall(*rows, level=level, average=average, recall=recall, delta=delta).threshold

    return {
        ("patient", guaranteed): choose(whole, "patient", "vertebrae"),
        ("patient", validation): _just(best, recall),
        (pooled, guaranteed): choose(every, "vertebra", "vertebrae"),
        (pooled, validation): _just(scores[labels], recall),
        (pooled, independent): choose(single, "patient", "vertebrae"),
        (alike, guaranteed): choose(every, "vertebra", "patients"),
    }


def _just(positives: NDArray[np.float64], recall: float) -> float:
    """The highest threshold with at least that recall on these positives."""
    allowed = int(len(positives) * (1 - recall) + 1e-9)
    return float(np.sort(positives)[allowed])
