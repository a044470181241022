"""The violation rate of guarantees: thresholds chosen on many sets of patients, whose true recall is known.

Of triage as well, with deferral on: whatever defers, a deferred fracture counts as found by its reader.

Source: Cervical Spine Fracture Detection Dataset, Copyright RSNA, 2023 (fractures per patient).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from cspine_helpers.decisions.confidence import fit_confidence, usable
from cspine_helpers.decisions.guarantees import Average, Guarantee, RecallTarget, guarantee_recall
from cspine_helpers.decisions.triage import Triage, patient_answers
from cspine_helpers.decisions.triage_search import Answered, SearchRule
from cspine_helpers.evaluation.cases import Aggregation, Cases
from cspine_helpers.files.tables import require_columns
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.predictions import validate_predictions

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


NONE, RANDOM, ADVERSARIAL, SEARCH = "none", "random", "adversarial", "search"
_SEARCHED = (0.0, 0.15, 0.3, 0.5)  # shares of the suspected that the search may defer


def simulate_triage(
    predictions: pd.DataFrame | None = None,
    features: pd.DataFrame | None = None,
    *,
    patients: int = 120,
    recall: float = 0.9,
    delta: float = 0.1,
    deferred: float = 0.3,
    redraws: int = 1000,
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """How often the true recall of patients is below the guaranteed one where a triage defers.

    The world is a finite one, whose recall is counted: all patients of a table. In each redraw, validation
    patients are drawn from it with replacement. On them p_low is guaranteed, each confidence is fitted and
    its cut chosen, as carelessly as may be on the same patients; then every patient of the world is answered.
    A deferred fracture counts as found.

    Beside the confidences of `CONFIDENCES` three try to break the guarantee: `random`; `adversarial`, which
    knows the labels and defers fractured patients first; and `search`, which picks the cheapest of several
    recalls, sharing δ, and of several cuts by the adversary or by the plain probability: its own recall must
    hold.

    Args:
        predictions: of C1 … C7 of each patient, the world; None: 500 patients drawn from `Truth`.
        features: of the world, as `fit_confidence` takes them.
        patients: with a fracture, and as many without, in each redraw.
        recall: guaranteed; the search also tries one and two steps of 0.05 less.
        delta: the violation rate allowed.
        deferred: share of the suspected validation patients that each cut defers.
        redraws: how many sets of patients.
        names: of confidences; None: all that the features allow.
        seed: of the redraws.

    Returns:
        One row for `none` (no deferral) and each confidence: `confidence, redraws, no_threshold` (redraws
        without one, where everything is suspected: they violate nothing), `violations, violation_rate`, `low,
        high` (exact 95 % interval), `recall_5, recall_50, recall_95` (percentiles of the true recall with
        deferred fractures found), `recall_lost` (mean with them lost), `coverage` (mean).

    Raises:
        ValueError: fewer than one patient or redraw; a share to defer outside (0, 1); see `RecallTarget`; the
            world lacks patients of either kind, or vertebrae.

    Example:
        >>> simulate_triage(patients=60, redraws=2, names=["distance"])["confidence"].tolist()
        ['none', 'distance', 'random', 'adversarial', 'search']
    """
    from scipy.stats import binomtest

    if patients < 1 or redraws < 1:
        raise ValueError(f"At least one patient and one redraw; found {patients} and {redraws}. Give more.")
    if not 0 < deferred < 1:
        raise ValueError(f"The share to defer lies between 0 and 1; found {deferred}. Give a fraction.")
    rng = np.random.default_rng(seed)
    if predictions is None:
        predictions, features = _triage_world(Truth(), 500, rng)
    world = _World(predictions, features, usable(features) if names is None else names)
    drawn = [world.redraw(patients, recall, delta, deferred, rng) for _ in range(redraws)]
    rows = []
    for name in drawn[0]:
        asked, found, lost, coverage = np.array([each[name] for each in drawn]).T
        violations = int((found < asked - 1e-12).sum())
        interval = binomtest(violations, redraws).proportion_ci()
        counts = (redraws, int(np.isnan(asked).sum()), violations, violations / redraws)
        shares = (*np.percentile(found, [5, 50, 95]), lost.mean(), coverage.mean())
        rows.append((name, *counts, interval.low, interval.high, *shares))
    columns = (
        "confidence redraws no_threshold violations violation_rate low high recall_5 recall_50 recall_95"
    )
    return pd.DataFrame(rows, columns=[*columns.split(), "recall_lost", "coverage"])


class _World:
    """All patients there are: sets drawn from them, and how triages made on these answer everybody.

    Raises:
        ValueError: a patient lacks a vertebra; see `simulate_triage`.
    """

    def __init__(
        self, predictions: pd.DataFrame, features: pd.DataFrame | None, names: Sequence[str]
    ) -> None:
        table = validate_predictions(predictions).assign(split="validation")
        self.cases = Cases.of(table, split="validation")
        patients = self.cases.patients(Aggregation("max"))
        self.ill = patients.label == 1
        if self.ill.all() or not self.ill.any():
            raise ValueError(
                f"{self.ill.sum()} of {len(self.ill)} patients have a fracture; both kinds are needed."
            )
        if len(self.cases) != len(VERTEBRAE) * len(patients) or (self.cases.missing > 0).any():
            raise ValueError(
                f"A world's patients have one study of C1 … C7 each; found {len(self.cases)} vertebrae of "
                f"{len(patients)} studies. Leave out those that lack some."
            )
        self.names, self.features = names, None
        if features is not None:
            require_columns(features, (UID, "vertebra"), what="The table of features")
            keys = pd.MultiIndex.from_arrays([self.cases.study, self.cases.unit], names=[UID, "vertebra"])
            self.features = features.set_index([UID, "vertebra"]).reindex(keys).reset_index()
        places = {uid: place for place, uid in enumerate(patients.study)}
        self.whose = np.array([places[uid] for uid in self.cases.study])
        self.rows = np.argsort(self.whose, kind="stable").reshape(-1, len(VERTEBRAE))  # of each patient

    def draw(self, patients: int, rng: np.random.Generator) -> tuple[Cases, pd.DataFrame | None]:
        """So many patients of either kind, with replacement: each is somebody of their own."""
        kinds = (np.flatnonzero(self.ill), np.flatnonzero(~self.ill))
        drawn = np.concatenate([rng.choice(each, patients) for each in kinds])
        rows = self.rows[drawn].ravel()
        names = np.array([f"drawn.{place}" for place in range(len(drawn))])
        studies = self.cases.studies.iloc[drawn].set_axis(pd.Index(names, name=UID)).assign(patient=names)
        whose = np.repeat(names, len(VERTEBRAE))
        some = {name: getattr(self.cases, name)[rows] for name in ("unit", "label", "probability", "split")}
        cases = replace(self.cases, patient=whose, study=whose, studies=studies, **some)
        features = None if self.features is None else self.features.iloc[rows].assign(**{UID: whose})
        return cases, features

    def redraw(
        self, patients: int, recall: float, delta: float, deferred: float, rng: np.random.Generator
    ) -> dict[str, tuple[float, float, float, float]]:
        """Of each confidence: recall that is guaranteed, true recall (found, lost), coverage, of one draw."""
        known, features = self.draw(patients, rng)
        guarantee = _guarantee_of(known, recall, delta)
        knows = (
            known.studies["label"].to_numpy()[np.repeat(np.arange(2 * patients), len(VERTEBRAE))],
            self.ill,
        )
        found = {NONE: self._result(guarantee, None, None)}
        for name in (*self.names, RANDOM, ADVERSARIAL):
            p_low = 0.0 if guarantee.threshold is None else guarantee.threshold
            if name == RANDOM:
                here, there = rng.random(len(known)), rng.random(len(self.cases))
            elif name == ADVERSARIAL:  # of equals, whoever: the cut must be able to part them
                here = rng.random(len(known)) - 2 * knows[0]
                there = rng.random(len(self.cases)) - 2 * knows[1][self.whose]
            else:
                fit = fit_confidence(name, known, features, p_low=p_low)
                here, there = fit.of(known, features), fit.of(self.cases, self.features)
            cut = Answered.of(known, here, p_low, by_vertebra=True).cut(deferred)
            found[name] = self._result(guarantee, there, cut)
        best, cut, by_adversary = self._search(known, knows[0], recall, delta, rng)
        adversary = rng.random(len(self.cases)) - 2 * knows[1][self.whose]
        sure = adversary if by_adversary else self.cases.probability
        return found | {SEARCH: self._result(best, sure, cut)}

    def _search(
        self, known: Cases, ill: NDArray, recall: float, delta: float, rng: np.random.Generator
    ) -> tuple[Guarantee, float | None, bool]:
        """The guarantee and cut of the lowest cost on the drawn patients; whether by the adversary."""
        recalls = [recall - 0.1, recall - 0.05, recall]
        rule, tried = SearchRule(), []
        for asked in recalls:
            guarantee = _guarantee_of(known, asked, delta / len(recalls))
            p_low = 0.0 if guarantee.threshold is None else guarantee.threshold
            adversary = rng.random(len(known)) - 2 * ill
            for confidence in (adversary, known.probability):
                part = Answered.of(known, confidence, p_low, by_vertebra=True)
                for share in _SEARCHED:
                    cut = part.cut(share) if share else None
                    cost = rule.value(part.labels, part.answers(cut))
                    tried.append((cost, guarantee, cut, confidence is adversary))
        return max(tried, key=lambda each: each[0])[1:]

    def _result(
        self, guarantee: Guarantee, confidence: NDArray | None, cut: float | None
    ) -> tuple[float, float, float, float]:
        """Recall guaranteed (NaN: none), true recall with deferred found and lost, coverage."""
        if guarantee.threshold is None:
            return np.nan, 1.0, 1.0, 1.0
        triage = Triage(guarantee, None if cut is None else "simulated", cut, by_vertebra=True)
        answers = patient_answers(self.cases, triage.answers(self.cases, None if cut is None else confidence))
        of_ill = answers[self.ill]
        found, lost = (of_ill != "negative").mean(), (of_ill == "positive").mean()
        return guarantee.target.recall, float(found), float(lost), float((answers != "inconclusive").mean())


def _guarantee_of(cases: Cases, recall: float, delta: float) -> Guarantee:
    """For patients by their highest vertebra."""
    target = RecallTarget(recall, level="patient", delta=delta, aggregation=Aggregation("max"))
    patients = cases.patients(Aggregation("max"))
    return guarantee_recall(patients.label, patients.probability, patients.patient, target)


def _triage_world(truth: "Truth", many: int, rng: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Predictions and features of patients, half of them with a fracture; maps are the sharper the surer."""
    fractured, ill = truth.draw(many // 2, rng)
    probabilities = np.concatenate([ill, truth.draw_intact(many - many // 2, rng)])
    label = np.concatenate([fractured, np.zeros((many - many // 2, len(VERTEBRAE)), dtype=bool)]).ravel()
    rows = [(f"patient.{n}", name, "validation") for n in range(many) for name in VERTEBRAE]
    table = pd.DataFrame(rows, columns=[UID, "vertebra", "split"])
    p = probabilities.ravel()
    blur = rng.standard_normal((3, len(p)))
    features = table[[UID, "vertebra"]].assign(
        **{"entropy": expit(blur[0] - p), "area_0.4": expit(blur[1] - p)},
        flat=(rng.random(len(p)) < 0.01).astype(int),
        disagreement=np.abs(blur[2]) * p * (1 - p),
    )
    return table.assign(label=label.astype(int), probability=p), features


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

    def draw_intact(self, patients: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """The probabilities of patients without a fracture, (patients, 7)."""
        noise = np.sqrt(1 - self.correlation) * rng.standard_normal((patients, len(_COUNTS)))
        return expit(np.sqrt(self.correlation) * rng.standard_normal((patients, 1)) + noise)

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
