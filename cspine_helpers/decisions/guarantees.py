"""Thresholds with a guaranteed recall on new patients, whatever the scores look like.

A threshold whose recall on the validation patients is just what was asked for falls short on new patients
about half the time. Here the threshold rises from the lowest score as long as a test rejects, at level δ,
that recall is below r (fixed-sequence testing). As recall only falls on the way, one δ serves all thresholds.

Patients are independent, their vertebrae are not, so that the tests count patients. A patient, or one of C1 …
C7, is found or missed: exact binomial test. Vertebrae are pooled over patients who have several: recall is at
least r just where X = missed − (1 − r) · fractured has a mean of at most 0 (X is divided by `fractured` where
recall is averaged over patients). Were the mean of X above 0, the product of 1 − λX over patients would have
a mean below 1, and reach 1/δ with probability δ at most (Markov), for any λ from 0 to 1 / max X that is fixed
without a look at the scores. As one patient may lose seven, pooled recall is costly where patients are few.
Of images a patient may have any number, so that their pooled recall has no such bound: it is averaged over
patients.

A guarantee is for patients drawn as these were, whom neither training, nor the choice of the epoch, nor a
fitted aggregation has seen; not for another hospital. Seven vertebrae hold together with confidence 1 − δ
where each is asked for with δ/7.

Source: Angelopoulos, Bates, Candès, Jordan, Lei, "Learn then test" (2021; fixed sequences). Bates et al.,
"Distribution-free, risk-controlling prediction sets", J. ACM 68 (2021). Clopper, Pearson, Biometrika 26
(1934; the binomial test). Waudby-Smith, Ramdas, "Estimating means of bounded random variables by betting",
JRSS B 86 (2024). The fixed λ is that of Hoeffding, JASA 58 (1963), theorem 1.
"""

from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass, fields, replace
from functools import cache
from math import ceil, log, log1p
from typing import Any, Literal, Self, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cspine_helpers.decisions.thresholds import Decision, check_threshold
from cspine_helpers.evaluation.cases import PLURALS, Aggregation, Cases, check_choice
from cspine_helpers.files.paths import listing
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.metrics import check_scores
from cspine_helpers.predictions import SINGLE, predictions_sha256

Average = Literal["vertebrae", "patients"]
GUARANTEE_LEVELS = ("patient", "vertebra", *VERTEBRAE, *SINGLE)
_SEVERAL = ("vertebra", *SINGLE)  # levels at which a patient may have several rows
MOST = len(VERTEBRAE)  # fractured vertebrae a patient can have
_LARGEST = 2**17  # patients; beyond that no number is worth naming


@dataclass(frozen=True)
class RecallTarget:
    """What is guaranteed: recall ≥ `recall` on new patients, with confidence 1 − `delta`.

    Attributes:
        recall: between 0 and 1.
        level: what the threshold applies to, one of `GUARANTEE_LEVELS`.
        delta: the violation rate allowed: how often, at most, recall may fall short.
        average: at level `vertebra`, what recall is averaged over: `vertebrae`, all alike (pooled, as
            `metrics.rates` counts), or `patients`, the share found of each one's fractures. At level `image`
            (or `study`) it is `patients`.
        aggregation: at level `patient`, how the patients' probabilities are made.

    Example:
        >>> RecallTarget(0.9, level="patient").delta
        0.05

    Raises:
        ValueError: a recall, delta, level or average that is none; an aggregation at another level.
    """

    recall: float
    _: KW_ONLY
    level: str
    delta: float = 0.05
    average: Average = "vertebrae"
    aggregation: Aggregation | None = None

    def __post_init__(self) -> None:
        for name, value in (("recall", self.recall), ("delta", self.delta)):
            if not 0 < value < 1:
                raise ValueError(
                    f"{name} must be between 0 and 1; found {value}. Give a fraction such as 0.9 or 0.05."
                )
        check_choice("level", self.level, GUARANTEE_LEVELS)
        check_choice("average", self.average, get_args(Average))
        if self.level in SINGLE:
            object.__setattr__(self, "average", "patients")
        if isinstance(self.aggregation, dict):  # from JSON
            object.__setattr__(self, "aggregation", Aggregation(**self.aggregation))
        if self.aggregation is not None and self.level != "patient":
            raise ValueError("An aggregation belongs to the patient level. Leave it out.")

    @property
    def decision_level(self) -> str:
        """Level of the decision whose threshold, or one of whose thresholds, it is for."""
        return self.level if self.level in ("patient", *SINGLE) else "vertebra"

    @property
    def phrase(self) -> str:
        """In words: recall of patients ≥ 0.9 with confidence 0.95."""
        what = PLURALS.get(self.level, self.level)
        over = ", averaged over patients," if self.level in _SEVERAL and self.average == "patients" else ""
        return f"recall of {what}{over} ≥ {self.recall:.4g} with confidence {1 - self.delta:.4g}"


@dataclass(frozen=True)
class Guarantee:
    """A threshold that meets its target on new patients, or why none does.

    Attributes:
        target: what is guaranteed, at which level, by which aggregation; it holds for no other.
        threshold: the highest that meets the target; None: only calling everything positive does.
        patients: fractured patients that it rests on.
        positives: their fractured vertebrae (or images) at level `vertebra` (or `image`); at other levels the
            same as `patients`.
        found: those of `positives` at or above the threshold; 0 where there is none.
        needed: fractured patients that would suffice if all positives were found.
        needed_as_hoped: fractured patients that would suffice to guarantee the threshold hoped for, at the
            recall observed there; None: nothing was hoped for, or no number up to 131,072 suffices.
        rows_sha256: `predictions_sha256` of the validation rows that it was made on; None: it was made on
            arrays, and no decision may carry it.
    """

    target: RecallTarget
    threshold: float | None
    patients: int
    positives: int
    found: int
    needed: int
    needed_as_hoped: int | None = None
    rows_sha256: str | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None:
            check_threshold(self.threshold)

    @property
    def reason(self) -> str:
        """One sentence that says why this threshold, or why none."""
        if self.threshold is None:
            return (
                f"No threshold guarantees {self.target.phrase}: {self.patients} fractured patients are too "
                f"few, even if all is found; that takes {self.needed}, and more where some is missed."
            )
        here = f"{self.found} of {self.positives} positives in {self.patients} fractured patients are found"
        return f"Highest threshold that guarantees {self.target.phrase}: {here} here."

    def require(self) -> float:
        """The threshold.

        Raises:
            ValueError: there is none; says why.
        """
        if self.threshold is None:
            raise ValueError(f"{self.reason} Use more patients, or ask for less recall or confidence.")
        return self.threshold

    def covers(self, decision: Decision) -> bool:
        """Whether a decision has this recall guaranteed: at this level, by this aggregation, not above it."""
        threshold = (decision.thresholds or {}).get(self.target.level)
        if self.target.level == decision.rule.level:
            threshold = decision.threshold
        if threshold is None or self.threshold is None:
            return False
        return decision.rule.aggregation == self.target.aggregation and threshold <= self.threshold

    def record(self) -> dict[str, Any]:
        """Plain values for JSON: the fields of the target and those of the guarantee, side by side."""
        whole = asdict(self)
        return whole.pop("target") | whole

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """The guarantee of a `record`."""
        of_target = {each.name for each in fields(RecallTarget)}
        target = RecallTarget(**{name: value for name, value in record.items() if name in of_target})
        return cls(target, **{name: value for name, value in record.items() if name not in of_target})


def one_or_several(given: object) -> tuple[Any, ...]:
    """What was handed in, one by one; a dict or a text is one thing, which an error can name whole."""
    if isinstance(given, Iterable) and not isinstance(given, Mapping | str):
        return tuple(given)
    return (given,)


def checked_guarantees(
    guarantees: Guarantee | Iterable[Guarantee], predictions: pd.DataFrame
) -> tuple[Guarantee, ...]:
    """The guarantees, one or several, each made on the validation rows of this predictions table.

    To be asked before one is shown beside a table or kept with a decision; `Guarantee.covers` then says for
    which decisions it holds. Each is made again, so that one that was edited is refused as well.

    Raises:
        ValueError: one is not a `Guarantee`, is of arrays, of other rows, or not what these rows give; says
            which. The table breaks the schema or has no validation rows.
    """
    found = one_or_several(guarantees)
    if not found:
        return ()
    cases, here = _validation(predictions)
    for each in found:
        wrong = ""
        if not isinstance(each, Guarantee):
            wrong = f"Found {type(each).__name__} {each!r}."
        elif each.rows_sha256 is None:
            wrong = "This one was made on arrays, which may be of any predictions."
        elif each.rows_sha256 != here:
            wrong = (
                f"This one was made on other rows: their SHA-256 is {each.rows_sha256}, that of the "
                f"validation rows here is {here}."
            )
        elif replace(each, needed_as_hoped=None) != (again := _guarantee(cases, here, each.target)):
            wrong = f"This one says: {each.reason} These rows say: {again.reason}"
        if wrong:
            raise ValueError(
                "A guarantee is for the predictions it was made on: make it with "
                f"guarantee_on_validation(...). {wrong}"
            )
    return found


def guarantee_on_validation(
    predictions: pd.DataFrame, target: RecallTarget, *, hoped: float | None = None
) -> Guarantee:
    """The guarantee that a decision about these predictions may carry; only validation rows are looked at.

    Args:
        predictions: predictions table; the split `validation` of it is what the guarantee rests on.
        target: what is guaranteed. Where it names no aggregation of patients, that of `Cases.patients`.
        hoped: see `guarantee_recall`.

    Example:
        >>> guarantee_on_validation(predictions, RecallTarget(0.5, level="patient")).target.aggregation.name
        'max'

    Raises:
        ValueError: see `guarantee_recall`; the table breaks the schema or has no validation rows; the
            aggregation was fitted on these patients; a patient has several studies.
    """
    return _guarantee(*_validation(predictions), target, hoped=hoped)


def _validation(predictions: pd.DataFrame) -> tuple[Cases, str]:
    """The validation cases, and the SHA-256 of their rows."""
    return Cases.of(predictions, split="validation"), predictions_sha256(predictions, split="validation")


def _guarantee(cases: Cases, rows_sha256: str, target: RecallTarget, hoped: float | None = None) -> Guarantee:
    """See `guarantee_on_validation`."""
    if target.aggregation is not None and target.aggregation.fitted_on is not None:
        raise ValueError(
            "No guarantee holds with an aggregation that was fitted on the validation patients: it has seen "
            "them. Use max, noisy_or or top_k, or leave the guarantee out."
        )
    if (target.level in SINGLE or cases.level in SINGLE) and target.level != cases.level:
        raise ValueError(
            f"The predictions are of {cases.plural}, and guarantee no recall at level {target.level!r}. "
            f"Ask for RecallTarget(…, level={cases.level!r})."
        )
    whose = cases.studies["patient"]
    several = whose[whose.duplicated()].unique()
    if len(several) and target.level not in SINGLE:  # neither test knows what these studies share
        raise ValueError(
            f"A guarantee counts patients, and takes one study of each; found several studies of "
            f"{len(several)} patients ({listing(several)}). Keep one: predictions[predictions"
            f"[{UID!r}] == predictions.groupby('patient')[{UID!r}].transform('first')]"
        )
    if target.level == "patient":
        cases = cases.patients(target.aggregation)
        target = replace(target, aggregation=cases.aggregation)
    elif target.level in VERTEBRAE:
        cases = cases.of_unit(target.level)
    made = guarantee_recall(cases.label, cases.probability, cases.patient, target, hoped=hoped)
    return replace(made, rows_sha256=rows_sha256)


def guarantee_recall(
    labels: ArrayLike,
    probabilities: ArrayLike,
    patients: ArrayLike,
    target: RecallTarget,
    *,
    hoped: float | None = None,
) -> Guarantee:
    """The highest threshold that meets the target on new patients.

    The proof on arrays, as simulations need it. A decision carries what `guarantee_on_validation` makes.

    Args:
        labels: (N,) of 0/1, at the target's level.
        probabilities: (N,) in [0, 1].
        patients: (N,) whose row it is. Several rows of one patient belong to level `vertebra` (or `image`)
            alone.
        target: what is guaranteed.
        hoped: a threshold one would rather have, to learn how many patients that would take.

    Example:
        >>> all_found = guarantee_recall([1] * 59, [0.7] * 59, range(59), RecallTarget(0.95, level="patient"))
        >>> all_found.threshold
        0.7

    Raises:
        ValueError: see `metrics.check_scores`; no positives; `hoped` is no threshold; a patient without id,
            with several rows where one is due, or over seven fractures.
    """
    if hoped is not None:
        check_threshold(hoped)
    y, p = check_scores(labels, probabilities)
    who = _check_patients(patients, y, target.level)
    codes, uids = pd.factorize(who[y == 1])
    if target.level not in SINGLE and (np.bincount(codes) > MOST).any():
        many = listing(uids[np.bincount(codes) > MOST].tolist())
        raise ValueError(
            f"A patient has {MOST} vertebrae; more are fractured in the rows of {many}. Drop repeated rows, "
            "and keep one study of each patient."
        )

    recall, delta = target.recall, target.delta
    pooled = target.level not in _SEVERAL or target.average == "vertebrae"
    losses = _PatientLosses(p[y == 1], codes, recall=recall, pooled=pooled)
    missed = None if hoped is None else losses.missed(hoped)
    if target.level in _SEVERAL:
        threshold = _highest_threshold(losses, delta)
        needed = losses.needed_if_all_found(delta)
        needed_as_hoped = None if missed is None else losses.needed(missed, delta)
    else:
        allowed = _most_misses(len(uids), recall, delta)
        threshold = None if allowed < 0 else float(losses.scores[allowed])  # one more would be too many
        needed = patients_needed(recall, delta=delta)
        needed_as_hoped = None if missed is None else _least_patients(recall, delta, float(1 - missed.mean()))
    found = 0 if threshold is None else int((losses.scores >= threshold).sum())
    return Guarantee(
        target, threshold, len(uids), len(losses.scores), found, needed, needed_as_hoped=needed_as_hoped
    )


def patients_needed(recall: float, *, delta: float = 0.05, observed: float = 1.0) -> int:
    """The least number of fractured patients that guarantees `recall` where the share `observed` is found.

    For patients and single vertebrae, by the exact binomial test; log δ / log r where all are found.

    Example:
        >>> patients_needed(0.9), patients_needed(0.9, observed=0.95)
        (29, 116)

    Raises:
        ValueError: recall or delta is none; `observed` is not above `recall`, so that no number suffices, or
            so close to it that more than 131,072 would be needed.
    """
    target = RecallTarget(recall, level="patient", delta=delta)
    if not target.recall < observed <= 1:
        raise ValueError(
            f"To guarantee recall {recall:.4g} one must observe more than that; found {observed:.4g}. "
            "Ask for less recall, or lower the threshold."
        )
    least = _least_patients(recall, delta, observed)
    if least is None:
        raise ValueError(
            f"To guarantee recall {recall:.4g} where {observed:.4g} is observed takes more than {_LARGEST:,} "
            "patients. Ask for less recall."
        )
    return least


def _check_patients(patients: ArrayLike, labels: NDArray[np.int64], level: str) -> NDArray:
    who = np.asarray(patients)
    absent = pd.isna(who)
    if who.shape != labels.shape or absent.any():
        raise ValueError(
            f"Each of the {len(labels)} rows needs its patient; found shape {who.shape}, {absent.sum()} "
            "missing. Pass the column StudyInstanceUID of the same table."
        )
    if not labels.any():
        raise ValueError(
            f"None of the {len(labels)} rows at level {level!r} is positive, so that recall is not defined. "
            "Use more studies, or another level."
        )
    if level not in _SEVERAL and (twice := pd.unique(who[pd.Series(who).duplicated()]).tolist()):
        raise ValueError(
            f"At level {level!r} a patient has one row; found several of {len(twice)} ({listing(twice)}). "
            f"Keep one study of each patient, and pass the cases of level {level!r}."
        )
    return who


@cache
def _least_patients(recall: float, delta: float, observed: float) -> int | None:
    """See `patients_needed`; None: no number, or too large a one."""
    from scipy.stats import binom

    first, last = 1, 1024
    while first < _LARGEST and observed > recall:
        n = np.arange(first, last)
        missed = np.ceil(n * (1 - observed) - 1e-9)
        enough = np.flatnonzero(binom.cdf(missed, n, 1 - recall) <= _rounded_up(delta))
        if len(enough):
            return int(n[enough[0]])
        first, last = last, 2 * last
    return None


@cache
def _most_misses(patients: int, recall: float, delta: float) -> int:
    """The most misses that the binomial test allows; -1: it allows no patient to be missed, nor none."""
    from scipy.stats import binom

    allowed = int(binom.ppf(delta, patients, 1 - recall))  # the first whose probability reaches δ …
    return allowed - int(binom.cdf(allowed, patients, 1 - recall) > _rounded_up(delta))  # … or exceeds it


def _rounded_up(delta: float) -> float:
    """δ with room for the rounding of a probability that equals it."""
    return delta * (1 + 1e-12)


class _PatientLosses:
    """X of each patient at any threshold; see the module.

    Attributes:
        scores: (K,) of positives, lowest first.
        codes: (K,) patient of each, 0 … n − 1.
        rank: (K,) its place among the patient's own, from 0 for the lowest.
        fractured: (n,) positives of each patient.
        weight: (n,) 1 for pooled recall, 1 / fractured for the average over patients.
        miss: share of misses that the target allows.
        largest: the largest X that a patient could have.
    """

    def __init__(
        self, scores: NDArray[np.float64], codes: NDArray[np.intp], *, recall: float, pooled: bool
    ) -> None:
        order = np.lexsort((scores, codes))
        self.fractured = np.bincount(codes)
        starts = np.cumsum(self.fractured) - self.fractured
        rank = np.arange(len(scores)) - np.repeat(starts, self.fractured)
        by_score = np.argsort(scores[order], kind="stable")
        self.scores, self.codes, self.rank = scores[order][by_score], codes[order][by_score], rank[by_score]
        self.weight = np.ones(len(self.fractured)) if pooled else 1 / self.fractured
        self.miss = 1 - recall
        self.largest = recall * (MOST if pooled else 1)

    def missed(self, threshold: float) -> NDArray[np.intp]:
        """Positives of each patient below a threshold, (n,)."""
        below = self.codes[: np.searchsorted(self.scores, threshold)]
        return np.bincount(below, minlength=len(self.fractured))

    def growth(
        self, bet: float, missed: NDArray, who: NDArray[np.intp] | slice = slice(None)
    ) -> NDArray[np.float64]:
        """log(1 − λX) of the patients `who`, so many of whose positives are missed."""
        x = self.weight[who] * (missed - self.miss * self.fractured[who])
        with np.errstate(divide="ignore"):  # one patient can cost all: log 0
            return np.log(np.maximum(1 - bet * x, 0))

    def needed_if_all_found(self, delta: float) -> int:
        """How many patients such as these would do if nothing were missed: the highest bet gains most."""
        return ceil(-log(delta) / self.growth(1 / self.largest, np.zeros(len(self.fractured))).mean() - 1e-9)

    def needed(self, missed: NDArray, delta: float) -> int | None:
        """How many patients such as these would do, with the best of bets; None: no number would."""
        bets = np.linspace(0.005, 1, 200) / self.largest
        best = max(self.growth(bet, missed).mean() for bet in bets)
        return ceil(-log(delta) / best - 1e-9) if best > 0 else None


def _highest_threshold(losses: _PatientLosses, delta: float) -> float | None:
    """The highest score of a positive down to which the product reaches 1/δ; None: not even at the lowest."""
    patients = len(losses.fractured)
    bet = min(_fixed_bet(patients, losses.miss, delta), 1 / losses.largest)
    steps = losses.growth(bet, losses.rank + 1, losses.codes)  # the threshold passes one after another
    steps -= losses.growth(bet, losses.rank, losses.codes)
    at_first = losses.growth(bet, np.zeros(patients)).sum()  # none missed
    owned = at_first + np.concatenate(([0.0], np.cumsum(steps)[:-1]))  # (K,) log, those before are missed
    first = np.searchsorted(losses.scores, losses.scores)  # equal scores are missed together
    enough = owned[first] >= -log(delta) - 1e-9
    return float(losses.scores[enough][-1]) if enough.any() else None


@cache
def _fixed_bet(patients: int, miss: float, delta: float) -> float:
    """λ, from the number of patients: the best where each is found or missed."""
    from scipy.optimize import brentq

    needed = -log(delta) / patients
    if needed >= -log1p(-miss):
        return 1 / (1 - miss)

    def gap(share: float) -> float:
        """Divergence of coins (Kullback–Leibler) between misses seen and allowed, less what is needed."""
        return share * log(share / miss) + (1 - share) * (log1p(-share) - log1p(-miss)) - needed

    least = 1e-12 * miss
    share = brentq(gap, least, miss) if gap(least) > 0 else 0.0
    return (miss - share) / (miss * (1 - miss))
